"""Rows of text as a table: in columns, and as a notebook shows it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_CELL_CHARACTERS = 100  # a cell of more is cut: a schedule may hold thousands of values


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns.

    >>> print(aligned([["a", "lr"], ["long", "0.1"]]))
    a     lr
    long  0.1
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def html_table(
    title: str,
    rows: Iterable[Sequence[str]],
    headings: Sequence[str] = (),
    notes: Iterable[str] = (),
) -> str:
    """A table in HTML, of any text. It has no colours of its own: the notebook's, light or dark, are right.

    Args:
        title: above it.
        rows: the first cell of each is its name.
        headings: of the columns, if they have any.
        notes: sentences below it.

    >>> html_table("a < b", [["a", "1"]])
    '<table><caption>a &lt; b</caption><tbody><tr><th>a</th><td>1</td></tr></tbody></table>'
    """
    head = "".join(f"<th>{_cell(text)}</th>" for text in headings)
    body = "".join(
        f"<tr><th>{_cell(name)}</th>" + "".join(f"<td>{_cell(text)}</td>" for text in cells) + "</tr>"
        for name, *cells in rows
    )
    return (
        f"<table><caption>{escape(title)}</caption>"
        + (f"<thead><tr>{head}</tr></thead>" if head else "")
        + f"<tbody>{body}</tbody></table>"
        + "".join(f"<p>{escape(note)}</p>" for note in notes)
    )


def _cell(text: str) -> str:
    return escape(text if len(text) <= _CELL_CHARACTERS else text[: _CELL_CHARACTERS - 3] + "...")
