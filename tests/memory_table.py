"""What a parameter takes up with each optimizer: the table of docs/memory.md, measured.

``python memory_table.py`` in this folder writes it into the page anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastlr

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
MARKS = ("<!-- measured -->", "<!-- end of what was measured -->")
ELEMENTS = 1024


class Row(NamedTuple):
    """Optimizers that take up the same, and options of their rule."""

    optimizers: tuple[type[fastlr.FusedOptimizer], ...]
    options: dict[str, Any] = {}  # noqa: RUF012

    def title(self) -> str:
        names = ", ".join(f"`{kind.__name__}`" for kind in self.optimizers)
        return names + (f" with {_in_words(self.options)}" if self.options else "")


ROWS = (
    Row((fastlr.FusedSGD,)),
    Row((fastlr.FusedSGD,), {"momentum": 0.9}),
    Row((fastlr.FusedAdam, fastlr.FusedAdamW)),
    Row((fastlr.FusedAdam, fastlr.FusedAdamW), {"amsgrad": True}),
    Row((fastlr.FusedRMSprop,)),
    Row((fastlr.FusedRMSprop,), {"momentum": 0.9}),
    Row((fastlr.FusedRMSprop,), {"momentum": 0.9, "centered": True}),
    Row((fastlr.FusedAdagrad,)),
    Row((fastlr.FusedAdadelta,)),
    Row((fastlr.FusedLion,)),
)
# Parameters that take up the same.
TYPES = ((torch.float32,), (torch.bfloat16,), (torch.float16,), (torch.float64,))
# Options of every optimizer, a column each.
COLUMNS: tuple[dict[str, Any], ...] = (
    {},
    {"state_dtype": torch.float32},
    {"ema_decay": 0.999},
    {"state_dtype": torch.float32, "ema_decay": 0.999},
    {"master_weights": True},
    {"master_weights": True, "ema_decay": 0.999},
)


def _in_words(options: dict[str, Any]) -> str:
    """Options whose number makes no difference by their names alone."""
    return ", ".join(
        f"`{name}`" if isinstance(value, float) else f"`{name}={value}`" for name, value in options.items()
    )


def measured(kind: type[fastlr.FusedOptimizer], dtype: torch.dtype, options: dict[str, Any]) -> float:
    """Bytes an element of a parameter, its gradient and all its state, after an update."""
    p = torch.nn.Parameter(torch.ones(ELEMENTS, dtype=dtype))
    p.grad = torch.ones_like(p)
    optimizer = kind([p], **options)
    optimizer.step()
    state = [value for value in optimizer.state[p].values() if value.numel() == ELEMENTS]
    return sum(tensor.nbytes for tensor in (p, p.grad, *state)) / ELEMENTS


def cell(row: Row, dtypes: tuple[torch.dtype, ...], options: dict[str, Any]) -> str:
    found = {measured(kind, dtype, row.options | options) for kind in row.optimizers for dtype in dtypes}
    (size,) = found  # else they do not belong into one row
    return f"{size:g}"


def table() -> str:
    titles = ["optimizer", "parameter", *(_in_words(options) or "no option" for options in COLUMNS)]
    lines = [titles, ["---"] * 2 + ["---:"] * len(COLUMNS)]
    for row in ROWS:
        for dtypes in TYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            lines.append([row.title(), names, *(cell(row, dtypes, options) for options in COLUMNS)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def in_page() -> str:
    return PAGE.read_text().split(MARKS[0])[1].split(MARKS[1])[0].strip()


if __name__ == "__main__":
    before, rest = PAGE.read_text().split(MARKS[0])
    PAGE.write_text(f"{before}{MARKS[0]}\n{table()}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")
