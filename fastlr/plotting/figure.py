"""What all pictures share: their look, and how they are saved."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fastlr._checks import describe, file_name
from fastlr._extras import extra
from fastlr._files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

# Told apart by readers who see red and green alike (Okabe and Ito's colours, darkest first).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#6b7280"

# Inches: narrower pictures, as for a phone or a column of a paper, have their legends above the axes.
NARROW = 6.0


def require(name: str, value: object, attribute: str, kind: str) -> None:
    """Raises TypeError where a value is not what a picture shows, told by an attribute."""
    if isinstance(value, type) or not hasattr(value, attribute):
        raise TypeError(f"{name} must be {kind}, got {describe(value)}")


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, ...]:
    """A figure and its axes, row by row; those of a column share the x axis."""
    with extra("plot"):
        from fastlr.plotting.picture import Picture

    figure = Picture(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    panels = figure.subplots(rows, columns, sharex="col", squeeze=False).flatten()
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.grid(True, color="#e5e7eb", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(color=GREY)
    return (figure, *panels)


def add_legend(axes: Axes, width: float) -> None:
    """What the lines are: beside the axes, where the figure is wide enough, or else above them."""
    if width < NARROW:
        place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "ncols": 2}
    else:
        place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.02)}
    axes.legend(frameon=False, fontsize=9, **place)


def saved(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    if path is not None:
        save(figure, path, bbox_inches="tight")
    return figure


def save(figure: Figure, path: str | os.PathLike[str], **options: Any) -> str:
    """Saves a picture in the format of the suffix, whole or not at all.

    Args:
        figure: what to save.
        path: of the file; without a suffix it gets that of matplotlib's usual format, as from ``savefig()``.
        options: of ``savefig()``.

    Returns:
        The name of the file.

    Raises:
        ValueError: matplotlib knows no such format.
        OSError: the path is a folder, or the file cannot be written.
    """
    from matplotlib import rcParams

    name = file_name("path", path)
    if name.endswith(os.sep) or os.path.isdir(name):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    suffix = os.path.splitext(name)[1]
    if suffix in ("", "."):
        name, suffix = f"{name.rstrip('.')}.{rcParams['savefig.format']}", rcParams["savefig.format"]
    with replacing(name, "wb") as file:
        figure.savefig(file, format=suffix.lstrip(".").lower(), **options)
    return name
