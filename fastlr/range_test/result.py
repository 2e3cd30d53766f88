"""What a range test recorded, and the rates that are read from it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlr import plotting
from fastlr._checks import choice, items, real, text, texts, vector
from fastlr._tables import html_table
from fastlr.range_test import files
from fastlr.range_test.curve import Array
from fastlr.range_test.reading import READINGS, Curve, Reading, Sweep, intervals, of_repeats
from fastlr.schedules import Triangular2
from fastlr.schedules.cyclic import Interpolation

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

Bounds = tuple[tuple[float, float], ...]


@dataclass(frozen=True, eq=False, repr=False, init=False)
class RangeTestResult:
    """The curve of a range test and what it says, or why it says nothing.

    The curve is smoothed without shifting it, on the axis of the sweep (log lr in an exponential one).
    Rates are None where the curve supports no answer; ``reason`` then says why.

    Args:
        lrs: learning rates, ascending, shape (n,); with bounds for each group those of the first.
        losses: the training loss at each, shape (n,). The curve ends before the first inf or NaN.
        accuracies: validation accuracy (or any metric for which larger is better) after the update at
            each rate, NaN or infinite where there is none, shape (n,); None: not measured.
        sweep: ``"exponential"`` or ``"linear"``: how the rates were raised.
        stopped: why the sweep ended before its last rate; None: it did not.
        metric_name: what ``accuracies`` holds.
        notes: what else is worth knowing about the sweep.
        group_bounds: first and last rate of each parameter group, where they differ; else empty.
        repeats: the results whose medians this one holds, see :meth:`from_repeats`.

    Attributes:
        max_lr: upper bound for a cyclic policy: where the accuracy (without accuracies, the loss) stops
            improving. That is the rate at which the smooth curve is best; but where it is as good, within 2 %
            of the improvement or its noise, over more than a factor of ten, it is the rate at which it comes
            within 5 %, the beginning of that plateau.
        base_lr: lower bound: a tenth of ``max_lr``, a rule of thumb and not a reading.
        onset: where the same curve starts to improve: the rate at which a tenth of the improvement is done.
        steepest: where it improves fastest, per log lr in an exponential sweep.
        steepest_region: lowest and highest rate around it between which it improves at least half as fast.
        valley: two thirds of the way from where the loss begins to fall to its minimum.
        minimum: the rate at the lowest loss.
        reason: why there are no bounds; None: there are.
        intervals: with repeats, the lowest and the highest of each reading among them, by its name. The
            median of many such tests lies in between with a probability of ``1 - 2**(1 - k)``: 75 % for
            three repeats, 94 % for five.

    Raises:
        ValueError: the arrays differ in length, or the rates do not ascend.
        TypeError: an argument is of the wrong kind, such as complex losses.

    >>> import numpy as np
    >>> lrs = np.geomspace(1e-4, 10, 200)
    >>> losses = 2 + np.log10(lrs / 0.1) ** 2 / 4  # lowest at 0.1
    >>> found = RangeTestResult(lrs, losses)
    >>> bool(found), round(found.max_lr, 2), round(found.base_lr, 3)
    (True, 0.1, 0.01)
    >>> print(RangeTestResult(lrs, np.ones(200)).max_lr)
    None

    References:
        Smith, Cyclical Learning Rates for Training Neural Networks, arXiv 1506.01186.
    """

    lrs: Array
    losses: Array
    accuracies: Array | None = None
    sweep: Sweep = field(default="exponential", kw_only=True)
    stopped: str | None = field(default=None, kw_only=True)
    metric_name: str = field(default="accuracy", kw_only=True)
    notes: tuple[str, ...] = field(default=(), kw_only=True)
    group_bounds: Bounds = field(default=(), kw_only=True)
    repeats: tuple[RangeTestResult, ...] = field(default=(), kw_only=True)

    def __init__(
        self,
        lrs: ArrayLike,
        losses: ArrayLike,
        accuracies: ArrayLike | None = None,
        *,
        sweep: Sweep = "exponential",
        stopped: str | None = None,
        metric_name: str = "accuracy",
        notes: Sequence[str] = (),
        group_bounds: Sequence[Sequence[float]] = (),
        repeats: Sequence[RangeTestResult] = (),
    ) -> None:
        choice("sweep", sweep, ("exponential", "linear"))
        arrays = {"lrs": vector("lrs", lrs), "losses": vector("losses", losses)}
        if accuracies is not None:
            arrays["accuracies"] = vector("accuracies", accuracies)
            arrays["accuracies"][np.isinf(arrays["accuracies"])] = np.nan
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"lrs, losses and accuracies must be of one length, got {lengths}")
        rates = arrays["lrs"]
        lowest_allowed = rates[:1] > 0.0 if sweep == "exponential" else rates[:1] >= 0.0
        if not (np.isfinite(rates).all() and lowest_allowed.all() and (np.diff(rates) > 0.0).all()):
            raise ValueError(
                f"lrs must be finite, {'> 0' if sweep == 'exponential' else '>= 0'} and strictly ascending, "
                f"got {rates}"
            )
        finite = np.isfinite(arrays["losses"])
        if not finite.all():
            end = int(finite.argmin())
            stopped = f"the loss was {arrays['losses'][end]} at lr {rates[end]:.3g}"
            arrays = {name: array[:end] for name, array in arrays.items()}
        for array in arrays.values():
            array.flags.writeable = False
        values = {
            **{"accuracies": None, **arrays},
            "sweep": sweep,
            "stopped": stopped if stopped is None else text("stopped", stopped),
            "metric_name": text("metric_name", metric_name),
            "notes": texts("notes", notes),
            "group_bounds": _bounds(group_bounds, sweep),
            "repeats": _results("repeats", repeats),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_repeats(cls, results: Sequence[RangeTestResult]) -> RangeTestResult:
        """One result from several tests of the same thing that differ by chance.

        Its curve is the median of theirs, at the rates that at least half of them reached. Each of its rates
        is the median of theirs, if more than half of them have an answer and their bounds lie within a factor
        of ten.

        Raises:
            ValueError: there are none, or they differ in sweep or metric.
        """
        results = _results("results", results)
        kinds = {(r.sweep, r.metric_name, r.accuracies is None, r.group_bounds) for r in results}
        if len(kinds) != 1:
            raise ValueError(f"results must be one or more of one sweep and metric, got {len(kinds)} kinds")
        first = results[0]
        if len(results) == 1:
            return first
        lrs = np.unique(np.concatenate([r.lrs for r in results]))
        columns: dict[str, list[Array]] = {"losses": [], "accuracies": []}
        for r in results:
            where = np.searchsorted(lrs, r.lrs)
            for name, column in columns.items():
                values = getattr(r, name)
                column.append(np.full(len(lrs), np.nan))
                if values is not None:
                    column[-1][where] = values
        losses = np.array(columns["losses"])
        reached = 2 * (~np.isnan(losses)).sum(0) >= len(results)
        stops = [f"{r.stopped} (repeat {i})" for i, r in enumerate(results, 1) if r.stopped]
        return cls(
            lrs[reached],
            _medians(losses[:, reached]),
            None if first.accuracies is None else _medians(np.array(columns["accuracies"])[:, reached]),
            sweep=first.sweep,
            stopped="; ".join(stops) or None,
            metric_name=first.metric_name,
            notes=tuple(dict.fromkeys(note for r in results for note in r.notes)),
            group_bounds=first.group_bounds,
            repeats=results,
        )

    def __repr__(self) -> str:
        answer = (
            f"base_lr={self.base_lr:.3g}, max_lr={self.max_lr:.3g}" if self else f"reason={self.reason!r}"
        )
        return f"RangeTestResult({len(self.lrs)} updates, {answer})"

    def __bool__(self) -> bool:
        """Whether there are bounds."""
        return self.reason is None

    # -- reading -----------------------------------------------------------------------------------

    @cached_property
    def _curve(self) -> Curve:
        return Curve(self.lrs, self.losses, self.accuracies, self.sweep, self.stopped, self.metric_name)

    @property
    def measured(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Where ``accuracies`` holds a value, shape (n,)."""
        return self._curve.measured

    @property
    def smoothed_losses(self) -> Array:
        """The smooth curve that the rates are read from, shape (n,); NaN after training has broken down."""
        return self._curve.smoothed_losses

    @property
    def smoothed_accuracies(self) -> Array | None:
        """The same for the accuracies, at every rate between the first and the last measured one."""
        return self._curve.smoothed_accuracies

    @cached_property
    def _reading(self) -> Reading:
        if not self.repeats:
            return self._curve.reading
        return of_repeats([repeat._reading for repeat in self.repeats], self.sweep)

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Of each reading the lowest and the highest among the repeats; empty without repeats."""
        return intervals([repeat._reading for repeat in self.repeats])

    @property
    def base_lr(self) -> float | None:
        return self._reading.rates.get("base_lr")

    @property
    def max_lr(self) -> float | None:
        return self._reading.rates.get("max_lr")

    @property
    def onset(self) -> float | None:
        return self._reading.rates.get("onset")

    @property
    def steepest(self) -> float | None:
        return self._reading.rates.get("steepest")

    @property
    def steepest_region(self) -> tuple[float, float] | None:
        return self._reading.region

    @property
    def valley(self) -> float | None:
        return self._reading.rates.get("valley")

    @property
    def minimum(self) -> float | None:
        return self._reading.rates.get("minimum")

    @property
    def reason(self) -> str | None:
        return self._reading.reason

    # -- using -------------------------------------------------------------------------------------

    def bounds(self) -> Bounds:
        """``(base_lr, max_lr)`` of each parameter group; one pair where all swept the same rates.

        Raises:
            ValueError: there are none; the message says why.
        """
        if self.max_lr is None:
            raise ValueError(f"the range test gives no bounds: {self.reason}")
        tops = (
            [self.max_lr] if not self.group_bounds else [self._in_group(i, self.max_lr) for i in self._groups]
        )
        return tuple((float(top) / 10, float(top)) for top in tops)

    @property
    def _groups(self) -> range:
        return range(len(self.group_bounds))

    def _in_group(self, index: int, lr: Any) -> Any:
        """The rate (or array of rates) that a group had when the first group had ``lr``."""
        (first, last), (low, high) = self.group_bounds[0], self.group_bounds[index]
        if self.sweep == "linear":
            return low + (high - low) * (lr - first) / (last - first)
        return low * (high / low) ** (np.log(lr / first) / np.log(last / first))

    def group(self, index: int) -> RangeTestResult:
        """The same test over the rates of one parameter group.

        Args:
            index: of the group, in 0 .. groups - 1.

        Raises:
            ValueError: there is no such group, or all groups swept the same rates.
        """
        known_kind = isinstance(index, (int, np.integer)) and not isinstance(index, bool)
        if not (known_kind and 0 <= index < len(self.group_bounds)):
            known = (
                f"0 .. {len(self.group_bounds) - 1}" if self.group_bounds else "none: all share their rates"
            )
            raise ValueError(f"groups with rates of their own are {known}; got {index!r}")
        repeats = [r.group(index) for r in self.repeats]
        return self._replaced(lrs=self._in_group(index, self.lrs), group_bounds=(), repeats=repeats)

    def _replaced(self, **changes: Any) -> RangeTestResult:
        return RangeTestResult(**{**{f.name: getattr(self, f.name) for f in fields(self)}, **changes})

    def triangular2(
        self,
        step_size_up: float,
        step_size_down: float | None = None,
        interpolation: Interpolation = "linear",
    ) -> Triangular2:
        """The triangular2 policy between the bounds; arguments as :class:`fastlr.Triangular2`'s.

        Raises:
            ValueError: there are no bounds; the message says why. Or each group has its own: ask
                ``group(i)`` then.
        """
        bounds = self.bounds()
        if len(bounds) > 1:
            raise ValueError(
                f"each of {len(bounds)} groups has bounds of its own: use group(i).triangular2(...) and "
                "set_schedule(..., group=i), or FusedCyclicSGD.from_range_test"
            )
        return Triangular2(*bounds[0], step_size_up, step_size_down, interpolation)

    def summary(self) -> str:
        """All of it in words, one fact to a line.

        >>> lrs = np.geomspace(1e-4, 10, 200)
        >>> print(RangeTestResult(lrs, 2 + np.log10(lrs / 0.1) ** 2 / 4).summary())
        range test: 200 rates from 0.0001 to 10, exponential
        base_lr   0.0098
        max_lr    0.098
        onset     0.00024
        steepest  0.00024, region 0.0001 to 0.0051
        valley    0.013
        minimum   0.098
        """
        rates = [f"{name:8}  {text}" for name, text in self._rates()]
        return "\n".join([self._title(), *self._why_none(), *rates, *self._remarks()])

    def _title(self) -> str:
        span = f" from {self.lrs[0]:.2g} to {self.lrs[-1]:.2g}" if len(self.lrs) else ""
        repeats = f", {len(self.repeats)} repeats" if self.repeats else ""
        return f"range test: {len(self.lrs)} rates{span}, {self.sweep}{repeats}"

    def _rates(self) -> list[tuple[str, str]]:
        """Each rate that was read, by its name, and what is known of its neighbourhood."""
        found = []
        for name in READINGS:
            if (rate := getattr(self, name)) is None:
                continue
            text = f"{rate:.2g}"
            if name in self.intervals:
                text += " [{:.2g}, {:.2g}]".format(*self.intervals[name])
            if name == "steepest" and self.steepest_region is not None:
                text += ", region {:.2g} to {:.2g}".format(*self.steepest_region)
            found.append((name, text))
        return found

    def _why_none(self) -> list[str]:
        return [] if self.reason is None else [f"no bounds: {self.reason}"]

    def _remarks(self) -> list[str]:
        """What else there is to say, a sentence each."""
        said = []
        if self.max_lr is not None and self.group_bounds:
            pairs = "; ".join(f"{low:.2g} to {high:.2g}" for low, high in self.bounds())
            said.append(f"bounds of each group: {pairs}")
        if self.stopped is not None:
            said.append(f"stopped early: {self.stopped}")
        return [*said, *(f"note: {note}" for note in self.notes)]

    def _repr_html_(self) -> str:
        """What :meth:`summary` says, as a notebook shows it."""
        return html_table(self._title(), self._rates(), notes=[*self._why_none(), *self._remarks()])

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draws the curves and what was read from them. Needs matplotlib.

        Returns the figure; with ``path`` it is saved as well, in the format of the suffix.
        """
        return plotting.plot_range_test(self, path)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the columns lr, loss and, where measured, the metric; one row for each rate.

        With repeats there is a first column repeat, counted from 1, and the rows are theirs.
        """
        files.write_csv(self, path)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Writes everything that :meth:`from_json` reads back, and the answers, for other readers."""
        files.write_json(self, path)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> RangeTestResult:
        """Reads what :meth:`to_json` wrote. The answers are read from the curve anew.

        Raises:
            ValueError: the file holds no range test.
        """
        return files.read_json(path, cls._from_dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything that :meth:`from_dict` reads back, and the answers: what :meth:`to_json` writes.

        Plain numbers, strings, lists and dicts, which checkpoints and JSON take.

        >>> found = RangeTestResult([0.1, 0.2], [2.0, 1.0])
        >>> found.to_dict()["losses"], found.to_dict()["answers"]["max_lr"]
        ([2.0, 1.0], None)
        """
        return files.to_dict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RangeTestResult:
        """Reads what :meth:`to_dict` returned. The answers are read from the curve anew.

        Raises:
            ValueError: it is no range test.
        """
        return files.read_dict(data, cls._from_dict, "data")

    @classmethod
    def _from_dict(cls, data: dict[str, Any]) -> RangeTestResult:
        own = {f.name: data[f.name] for f in fields(cls)}
        if own["accuracies"] is not None:
            own["accuracies"] = [np.nan if v is None else v for v in own["accuracies"]]
        own["repeats"] = [cls._from_dict(repeat) for repeat in own["repeats"]]
        return cls(**own)


def _results(name: str, values: Iterable[RangeTestResult]) -> tuple[RangeTestResult, ...]:
    results = items(name, values)
    for result in results:
        if not isinstance(result, RangeTestResult):
            raise TypeError(f"{name} must hold range test results, got {type(result).__name__}")
    return results


def _bounds(values: Iterable[Sequence[float]], sweep: Sweep) -> Bounds:
    bounds = []
    for index, pair in enumerate(items("group_bounds", values)):
        name = f"group_bounds[{index}]"
        numbers = () if isinstance(pair, str) else items(name, pair)
        if len(numbers) != 2:
            raise ValueError(f"{name} must be a first and a last rate, got {pair!r}")
        first = real(f"{name}[0]", numbers[0], above=sweep == "exponential")
        last = real(f"{name}[1]", numbers[1])
        if first >= last:
            raise ValueError(f"{name} must ascend, got {pair!r}")
        bounds.append((first, last))
    return tuple(bounds)


def _medians(rows: Array) -> Array:
    """The median of each column without its NaNs; NaN where there is nothing else."""
    return np.array(
        [np.median(kept) if len(kept := column[~np.isnan(column)]) else np.nan for column in rows.T]
    )
