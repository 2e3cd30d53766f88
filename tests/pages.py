"""Examples in the manual's pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import fastlr

DOCS = Path(__file__).parent.parent / "docs"

# Pages whose blocks run each by itself, with a model, a loss and loaders as any reader has them; the blocks
# of other pages belong together, or need more, and their tests run them.
GUIDES = (
    "cuda.md",
    "faq.md",
    "frameworks/index.md",
    "growing.md",
    "index.md",
    "options.md",
    "policies.md",
    "range_test.md",
    "rules.md",
    "start.md",
)


def blocks_of(page: Path) -> list[str]:
    """A page's Python blocks."""
    return re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)


def run_page(page: str, **names: Any) -> dict[str, Any]:
    """Runs a page's Python blocks one after another and returns all names that there are then.

    Args:
        page: file, below docs.
        names: what readers have: model, loader and so on.
    """
    names = {"fastlr": fastlr, **names}
    blocks = blocks_of(DOCS / page)
    assert blocks, page
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names
