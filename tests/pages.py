"""Examples in the manual's pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import fastlr

DOCS = Path(__file__).parent.parent / "docs"


def run_page(page: str, **names: Any) -> dict[str, Any]:
    """Runs a page's Python blocks one after another and returns all names that there are then.

    Args:
        page: file, below docs.
        names: what readers have: model, loader and so on.
    """
    names = {"fastlr": fastlr, **names}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), flags=re.DOTALL)
    assert blocks, page
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names
