"""Schedules over their clock."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fastlr._checks import count, real
from fastlr.plotting.figure import COLORS, NARROW, Array, new_figure, require, saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ScheduleCurve(Protocol):
    """What a picture of a schedule shows."""

    @property
    def unit(self) -> str:
        """What the clock counts."""

    @property
    def quantity(self) -> str:
        """What the values are."""

    @property
    def duration(self) -> int | None:
        """How many clock units it lasts; None: it has no end."""

    @property
    def last(self) -> int | None:
        """The clock at which the last new value is reached; None: it has no end."""

    def __call__(self, clock: int) -> float:
        """The value at a clock."""

    def values(self, start: int, stop: int) -> Array:
        """The values at ``start, start + 1, ..., stop - 1``."""


def shown_steps(schedules: Mapping[str, ScheduleCurve], steps: int | None) -> int:
    """How many clock units to show of schedules, of which some end; None: all of the longest, and its end."""
    if steps is None:
        ends = [s.duration for s in schedules.values() if s.duration is not None]
        if not ends:
            raise ValueError(f"{', '.join(schedules)} has no end: say how many steps to draw")
        steps = max(ends) + 1
    return count("steps", steps)


def shown_values(
    schedule: ScheduleCurve, start: int, stop: int, places: int = 20_000
) -> tuple[np.ndarray[Any, Any], Array]:
    """Clocks from start on and before stop, and the values there: all, where there are few enough.

    A clock in tokens has billions: then as many stretches as places, and a clock in each, drawn at random
    (the same in every call). Equal distances would show cycles as long as they are as a level line.
    """
    if stop - start <= places:
        return np.arange(start, stop), schedule.values(start, stop)
    within = np.random.default_rng(0).random(places)
    at = [start + (stop - start) * place // places for place in range(places + 1)]
    clocks = [a + int(share * (b - a)) for a, b, share in zip(at, at[1:], within.tolist(), strict=False)]
    clocks[0], clocks[-1] = start, stop - 1
    return np.array(clocks), np.array([schedule(clock) for clock in clocks])


def plot_schedules(
    schedules: Mapping[str, ScheduleCurve],
    steps: int | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    width: float = 7.2,
) -> Figure:
    """Draws schedules over their clock, one line each.

    Args:
        schedules: name of each line and its schedule; all of one unit.
        steps: clock units to draw, >= 1; None: up to where the last of them ends. A line ends with its
            schedule.
        path: where to save the picture, in the format of the suffix; None: it is not saved.
        width: of the picture, in inches, > 0.

    Raises:
        ValueError: nothing to draw, units differ, or ``steps`` is None and none of them has an end.
        TypeError: an argument is of the wrong kind.
    """
    if not isinstance(schedules, Mapping):
        raise TypeError(f"schedules must be a dict of names and schedules, got {type(schedules).__name__}")
    for name, schedule in schedules.items():
        require(repr(name), schedule, "duration", "a fastlr schedule")
    units = {schedule.unit for schedule in schedules.values()}
    if len(units) != 1:
        raise ValueError(f"schedules must be one or more of one unit, got units {sorted(units)}")
    steps = shown_steps(schedules, steps)
    figure, axes = new_figure(real("width", width, above=True), 3.6)
    from matplotlib.ticker import EngFormatter, MaxNLocator

    for i, (name, schedule) in enumerate(schedules.items()):
        stop = steps if schedule.last is None else min(steps, schedule.last + 1)
        clocks, values = shown_values(schedule, 0, stop)
        style: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "label": name, "linewidth": 1.8}
        if len(values) <= 60:  # few enough to show that the value is constant during an update
            axes.stairs(values, baseline=None, **style)
        else:
            axes.plot(clocks, values, **style)
    axes.set_xlabel(f"{units.pop()}s")
    quantities = {schedule.quantity for schedule in schedules.values()}
    axes.set_ylabel(quantities.pop() if len(quantities) == 1 else "learning rate")
    axes.margins(x=0.01)
    axes.set_ylim(bottom=-0.015 * axes.get_ylim()[1])  # a line at zero is seen whole
    axes.xaxis.set_major_locator(MaxNLocator(9 if width >= NARROW else 5, integer=True))
    # All digits of more would run into each other.
    axes.xaxis.set_major_formatter("{x:,.0f}" if steps <= 1_000_000 else EngFormatter(sep=""))
    if len(schedules) > 1:
        figure.legend(
            frameon=False, loc="outside upper center", ncols=min(len(schedules), 4 if width >= NARROW else 2)
        )
    else:
        axes.set_title(next(iter(schedules)), loc="left")
    return saved(figure, path)
