"""What a range test's curve says: its smooth form, and the rates that are read from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from fastlr.range_test.curve import Array, Best, best

Sweep = Literal["exponential", "linear"]

# What is read from a curve, under the names by which it is asked for.
READINGS = ("base_lr", "max_lr", "onset", "steepest", "valley", "minimum")

# Repeats that differ by more than this factor do not agree on a bound: the upper one of some would be below
# the lower one of others.
_AGREE = 10.0


class Reading(NamedTuple):
    """What is read from a curve.

    Attributes:
        rates: those of :data:`READINGS` that it has.
        region: lowest and highest rate around the steepest; None: there is no steepest.
        reason: why there are no bounds; None: there are.
    """

    rates: dict[str, float]
    region: tuple[float, float] | None
    reason: str | None


@dataclass(frozen=True, eq=False)
class Curve:
    """The curve of one range test; attributes as :class:`RangeTestResult`'s."""

    lrs: Array
    losses: Array
    accuracies: Array | None
    sweep: Sweep
    stopped: str | None
    metric_name: str

    @property
    def measured(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        return np.zeros(len(self.lrs), bool) if self.accuracies is None else ~np.isnan(self.accuracies)

    @property
    def _x(self) -> Array:
        """The rates on the axis of the sweep."""
        return np.log(self.lrs) if self.sweep == "exponential" else self.lrs

    @cached_property
    def _best_loss(self) -> Best | None:
        if len(self.lrs) < 3:
            return None
        early = self.stopped is not None
        x = self._x
        return best(x, self.losses, x, self.lrs, "the loss", spiky=True, ended_early=early)

    @cached_property
    def _best_accuracy(self) -> Best | None:
        where = self.measured
        if self.accuracies is None or where.sum() < 3:
            return None
        early, x = self.stopped is not None, self._x[where]
        inside = (self._x >= x[0]) & (self._x <= x[-1])
        name, y = f"the {self.metric_name}", -self.accuracies[where]
        return best(x, y, self._x[inside], self.lrs[inside], name, spiky=False, ended_early=early)

    @cached_property
    def smoothed_losses(self) -> Array:
        return np.full(len(self.lrs), np.nan) if self._best_loss is None else self._best_loss.level

    @cached_property
    def smoothed_accuracies(self) -> Array | None:
        if self.accuracies is None:
            return None
        smooth = np.full(len(self.lrs), np.nan)
        if self._best_accuracy is not None:
            first = int(self.measured.argmax())
            smooth[first : first + len(self._best_accuracy.level)] = -self._best_accuracy.level
        return smooth

    @cached_property
    def reading(self) -> Reading:
        rates: dict[str, float] = {}
        if len(self.lrs) < 10 or self._best_loss is None:
            if self.stopped is None:
                remedy = "; raise num_steps"
            elif len(self.lrs) == 0:
                remedy = f": {self.stopped}, before any update; look at the model and the data"
            else:
                remedy = f": {self.stopped}; lower start_lr"
            return Reading(
                rates, None, f"the curve has {len(self.lrs)} points, of 10 that are needed{remedy}"
            )
        loss, lrs = self._best_loss, self.lrs
        if loss.reason is None:
            onset, lowest = self._x[loss.onset], self._x[loss.lowest]
            valley = onset + 2 / 3 * (lowest - onset)
            rates["valley"] = float(np.exp(valley) if self.sweep == "exponential" else valley)
            rates["minimum"] = float(lrs[loss.lowest])
        top = loss
        if self.accuracies is not None:
            times = int(self.measured.sum())
            if times < 6 or self._best_accuracy is None:
                few = f"{self.metric_name} has {times} finite values, of 6 that are needed"
                remedy = "lower val_every or raise num_steps, or look at a metric that gives inf or NaN"
                return Reading(rates, None, f"{few}; {remedy}")
            top, lrs = self._best_accuracy, lrs[int(self.measured.argmax()) :]
        if top.reason is not None:
            return Reading(rates, None, top.reason)
        max_lr = float(lrs[top.settled])
        rates |= {"onset": float(lrs[top.onset]), "steepest": float(lrs[top.steepest])}
        rates |= {"base_lr": max_lr / 10, "max_lr": max_lr}
        return Reading(rates, (float(lrs[top.region[0]]), float(lrs[top.region[1]])), None)


def intervals(readings: Sequence[Reading]) -> dict[str, tuple[float, float]]:
    """Of each rate the lowest and the highest among several readings."""
    found: dict[str, tuple[float, float]] = {}
    for name in READINGS:
        rates = [reading.rates[name] for reading in readings if name in reading.rates]
        if rates:
            found[name] = (min(rates), max(rates))
    return found


def of_repeats(readings: Sequence[Reading], sweep: Sweep) -> Reading:
    """The medians of several readings that differ by chance, where they agree."""
    answers = [r for r in readings if r.reason is None]
    if 2 * len(answers) <= len(readings):
        why = next(r.reason for r in readings if r.reason is not None)
        return Reading({}, None, f"{len(answers)} of {len(readings)} repeats give bounds: {why}")
    rates = {
        name: _median([r.rates[name] for r in answers if name in r.rates], sweep)
        for name in READINGS
        if any(name in r.rates for r in answers)
    }
    low, high = intervals(readings)["max_lr"]
    if high > _AGREE * low:
        disagree = f"the repeats disagree: max_lr between {low:.2g} and {high:.2g}"
        return Reading({}, None, f"{disagree}; raise num_steps, or use larger batches")
    regions = [r.region for r in answers if r.region is not None]
    return Reading(
        rates, (_median([a for a, _ in regions], sweep), _median([b for _, b in regions], sweep)), None
    )


def _median(rates: list[float], sweep: Sweep) -> float:
    if sweep == "exponential":
        return float(np.exp(np.median(np.log(rates))))
    return float(np.median(rates))
