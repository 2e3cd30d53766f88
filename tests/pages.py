"""The code in pages of the manual, as their readers run it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

import fastlr

DOCS = Path(__file__).parent.parent / "docs"


def examples(page: Path) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)


def run(page: str, **names: Any) -> dict[str, Any]:
    """Runs a page's blocks, one after another, with a model, a loss and a loader as any reader has them.

    Args:
        page: its path below ``docs``.
        names: what its readers have besides.

    Returns:
        What the blocks leave.
    """
    blocks = examples(DOCS / page)
    assert blocks, f"{page} has no examples"
    data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(0, 3, (64,)))
    names = {
        "model": torch.nn.Linear(4, 3),
        "loss_fn": torch.nn.functional.cross_entropy,
        "loader": torch.utils.data.DataLoader(data, batch_size=16),
        "torch": torch,
        "fastlr": fastlr,
        **names,
    }
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names
