"""What runs of several seeds say: paired intervals, in which a tie is called a tie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Literal

from fastlr._extras import extra

CONFIDENCE = 0.95

Outcome = Literal["above", "below", "a tie", "one run"]


@dataclass(frozen=True)
class Comparison:
    """Runs of a policy against runs of another, seed by seed.

    Attributes:
        difference: the mean of theirs.
        low, high: its 95 % interval by Student's t; None of a single pair.
    """

    difference: float
    low: float | None = None
    high: float | None = None

    @property
    def outcome(self) -> Outcome:
        """ "above" and "below" where the interval lies on one side of zero."""
        if self.low is None or self.high is None:
            return "one run"
        return "above" if self.low > 0 else "below" if self.high < 0 else "a tie"

    def no_worse(self, margin: float) -> bool:
        """Whether the whole interval lies above ``-margin``; of few runs that differ much, any two tie."""
        return (self.difference if self.low is None else self.low) > -margin

    def interval(self, digits: int = 1) -> str:
        """The difference and its interval in words, of numbers that are points of per cent."""
        gap = f"{self.difference:+.{digits}f}"
        if self.low is None:
            return f"{gap} points"
        return f"{gap} points, 95 % interval {self.low:+.{digits}f} to {self.high:+.{digits}f}"


def compared(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """a against b, where the runs of one seed differ in the policy only. Needs SciPy.

    >>> compared([3.0, 4.0, 5.0], [1.0, 2.5, 2.5]).outcome
    'above'
    >>> compared([3.0, 4.0], [3.0, 4.0]).outcome
    'a tie'
    """
    differences = [x - y for x, y in zip(a, b, strict=True)]
    gap = mean(differences)
    if len(differences) == 1:
        return Comparison(gap)
    if len(set(differences)) == 1:  # without a spread Student's t has no interval
        return Comparison(gap, gap, gap)
    with extra("demo"):
        from scipy import stats  # type: ignore[import-untyped]

    low, high = stats.t.interval(CONFIDENCE, len(differences) - 1, loc=gap, scale=stats.sem(differences))
    return Comparison(gap, float(low), float(high))


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Accuracies in [0, 1] as per cent: their mean, and the standard deviation of one.

    >>> spread([0.95, 0.97])
    '96.0 ± 1.4 %'
    """
    deviation = f" \u00b1 {100 * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.{digits}f}{deviation} %"
