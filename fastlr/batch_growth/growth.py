"""From a schedule that decays the learning rate to a plan that grows the batch (arXiv 1711.00489)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from fastlr._checks import ENDLESS, choice, count, describe, real
from fastlr.batch_growth.scaling import SCALINGS, Scaling, Values, batch_sizes, rate_factor
from fastlr.schedules import Constant, InSamples, Schedule, Shifted

Mode = Literal["increase", "hybrid", "decay"]
BatchScale = Literal["linear", "sqrt", "none"]

# Values of a schedule that are looked at together: 8 MB of them.
_CHUNK = 1 << 20

# Two values of a schedule this close are one: 0.1 * 0.2 * 5 is not 0.1.
_ROUNDING = 1e-9


class _Phase(NamedTuple):
    start: int
    size: int
    steady_until: int  # the sample up to which the rate is the one at the start; start: not at all


class GrownPhases(NamedTuple):
    """The phases of a plan, and its schedules on its clock, samples or tokens."""

    starts: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    lr: Schedule
    momentum: Schedule


def grown_phases(
    schedule: Schedule,
    *,
    batch_size: int,
    dataset_size: int,
    epochs: int,
    momentum: float,
    mode: Mode,
    max_batch_size: int | None,
    hybrid_drops: int,
    lr_scale: float,
    scaling: Scaling,
    batch_scale: BatchScale | None,
    raised_momentum: float | None,
    granularity: int | None,
    sequence_length: int | None,
) -> GrownPhases:
    """The growth of the plan that :meth:`BatchPlan.from_schedule` returns; arguments as there."""
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a schedule, got {describe(schedule)}")
    batch_size = count("batch_size", batch_size)
    dataset_size, epochs = count("dataset_size", dataset_size), count("epochs", epochs)
    choice("mode", mode, ("increase", "hybrid", "decay"))
    choice("scaling", scaling, SCALINGS)
    if batch_scale is not None:
        choice("batch_scale", batch_scale, ("linear", "sqrt", "none"))
    if scaling == "sqrt" and raised_momentum is not None:
        raise ValueError(
            'raised_momentum needs scaling="linear", as it trades momentum for batch by SGD\'s noise scale, '
            f"which has no part in adaptive rules; leave it out, got {describe(raised_momentum)}"
        )
    momentum = _momentum("momentum", momentum)
    raised = momentum if raised_momentum is None else _momentum("raised_momentum", raised_momentum, momentum)
    lr_scale = real("lr_scale", lr_scale, 1.0)
    hybrid_drops = count("hybrid_drops", hybrid_drops)
    if mode != "hybrid" and hybrid_drops != 1:
        raise ValueError(f'hybrid_drops needs mode="hybrid", got {hybrid_drops} with mode={mode!r}')
    granularity = batch_size if granularity is None else count("granularity", granularity)

    # The batch's factor; the last keeps the noise scale, as "linear" does with linear scaling.
    factors: dict[str | None, float] = {"linear": lr_scale, "sqrt": math.sqrt(lr_scale), "none": 1.0}
    factors[None] = lr_scale * lr_scale if scaling == "sqrt" else lr_scale
    exact_start = batch_size * factors[batch_scale] * (1.0 - momentum) / (1.0 - raised)
    if exact_start >= ENDLESS:
        raise ValueError(
            f"the first batch must be within the data set's {dataset_size:,} samples, but "
            f"lr_scale={lr_scale!r} makes it {exact_start:.3g}"
        )
    start_size = round(exact_start)
    if abs(start_size - exact_start) <= _ROUNDING * exact_start:
        exact_start = float(start_size)
    cap = None if max_batch_size is None else count("max_batch_size", max_batch_size)
    if cap is not None and cap < start_size:
        raise ValueError(f"max_batch_size must be >= the first batch size, {start_size:,}, got {cap:,}")

    # The schedule as it is at every sample, and on the plan's clock.
    by_sample, on_clock = _looked_at(schedule, batch_size, dataset_size, sequence_length)
    clock = 1 if sequence_length is None else sequence_length
    run = _Run(by_sample, total=epochs * dataset_size)
    peak, peak_at = run.peak()
    if peak == 0.0:
        raise ValueError(f"the schedule is 0 throughout the run, got {describe(schedule)}")
    if mode != "decay":
        run.check_fall(peak, peak_at, dataset_size)
    sizes = _Sizes(
        start=start_size,
        exact_start=exact_start,
        granularity=granularity,
        cap=cap,
        growths={"decay": 0, "hybrid": hybrid_drops, "increase": None}[mode],
        peak=peak,
        peak_at=peak_at,
        scaling=scaling,
    )
    phases = _phases(run, sizes)

    # The rate that goes with each batch, so that the noise scale is the one asked for.
    lr: Schedule | None = None
    rate = math.inf
    stops = [*(phase.start for phase in phases[1:]), run.total]
    for phase, stop in zip(phases, stops, strict=True):
        scale = lr_scale * rate_factor(phase.size / exact_start, scaling)
        if phase.steady_until < stop:
            part = Shifted(on_clock, phase.start * clock) * scale
        else:
            exact = by_sample(phase.start) * scale
            rate = rate if abs(rate - exact) <= _ROUNDING * exact else exact
            part = Constant(rate, unit=on_clock.unit)
        lr = part if lr is None else lr.then(part, at=phase.start * clock)
    assert lr is not None
    return GrownPhases(
        starts=tuple(phase.start for phase in phases),
        batch_sizes=tuple(phase.size for phase in phases),
        lr=lr,
        momentum=Constant(raised, unit=on_clock.unit),
    )


class _BySample(NamedTuple):
    """A schedule in tokens, looked at where each sample begins."""

    schedule: Schedule
    tokens: int  # of a sample

    def __call__(self, sample: int) -> float:
        return self.schedule(sample * self.tokens)

    def values(self, start: int, stop: int) -> Values:
        self.schedule(max(stop - 1, 0) * self.tokens)  # warns where it has ended
        clocks = range(start * self.tokens, stop * self.tokens, self.tokens)
        return np.fromiter(map(self.schedule._native.value, clocks), np.float64, len(clocks))


def _looked_at(
    schedule: Schedule, batch_size: int, dataset_size: int, sequence_length: int | None
) -> tuple[Schedule | _BySample, Schedule]:
    if sequence_length is not None:
        sequence_length = count("sequence_length", sequence_length)
    if schedule.unit == "token":
        if sequence_length is None:
            raise ValueError("the schedule counts tokens; give the plan its sequence_length too")
        return _BySample(schedule, sequence_length), schedule
    if schedule.unit != "sample":
        schedule = schedule.in_samples(dataset_size if schedule.unit == "epoch" else batch_size)
    return schedule, schedule if sequence_length is None else schedule.in_tokens(sequence_length)


def _momentum(name: str, value: float, low: float = 0.0) -> float:
    if isinstance(value, Schedule) or not low <= real(name, value) < 1.0:
        raise ValueError(f"{name} must be a number in [{low:g}, 1), got {describe(value)}")
    return float(value)


class _Run:
    """A schedule in samples over a run, looked at chunk by chunk."""

    def __init__(self, schedule: Schedule | _BySample, total: int) -> None:
        self.schedule, self.total = schedule, total
        # Between two multiples of this many samples the schedule keeps its value.
        self.tick = schedule.samples if isinstance(schedule, InSamples) else 1
        self.source = schedule.schedule if isinstance(schedule, InSamples) else schedule
        self.ticks = -(-total // self.tick)

    def chunks(self, first: int = 0) -> Iterator[tuple[int, Values]]:
        """``(tick, values)`` of each chunk from tick ``first`` on."""
        for start in range(first, self.ticks, _CHUNK):
            yield start, self.source.values(start, min(start + _CHUNK, self.ticks))

    def peak(self) -> tuple[float, int]:
        """The largest value and the first tick that has it."""
        value, at = -1.0, 0
        for start, values in self.chunks():
            index = int(values.argmax())
            if values[index] > value:
                value, at = float(values[index]), start + index
        return value, at

    def plateaus(self, shortest: int) -> dict[int, int]:
        """Where a value begins that holds for at least so many samples, and where it ends."""
        found: dict[int, int] = {}
        begin, last = 0, self.schedule(0)
        for start, values in self.chunks():
            changes = np.flatnonzero(values != np.concatenate(([last], values[:-1])))
            ends = (start + changes) * self.tick
            begins = np.concatenate(([begin], ends))[:-1]
            # Only the long ones are gone through in Python: of a smooth schedule every tick is a change.
            long = ends - begins >= shortest
            found.update(zip(begins[long].tolist(), ends[long].tolist(), strict=True))
            begin, last = int(ends[-1]) if len(ends) else begin, float(values[-1])
        if self.total - begin >= shortest:
            found[begin] = self.total
        return found

    def check_fall(self, peak: float, peak_at: int, dataset_size: int) -> None:
        """Raises ValueError where the schedule rises after its peak."""
        before = peak
        for start, values in self.chunks(peak_at):
            previous = np.concatenate(([before], values[:-1]))
            rises = np.flatnonzero(values > previous * (1.0 + _ROUNDING))
            if len(rises):
                sample = (start + int(rises[0])) * self.tick
                raise ValueError(
                    f"the schedule rises at sample {sample:,} (epoch {sample / dataset_size:.4g}) after its "
                    f"peak, from {previous[rises[0]]:.6g} to {values[rises[0]]:.6g}; a batch that grew "
                    'cannot shrink again. Use a schedule that only falls after its peak, or mode="decay"'
                )
            before = float(values[-1])


class _Sizes(NamedTuple):
    """Which batch size goes with which rate of the schedule."""

    start: int
    exact_start: float
    granularity: int
    cap: int | None
    growths: int | None  # how often the batch may grow; None: as often as it can
    peak: float
    peak_at: int
    scaling: Scaling

    def of(self, values: Values, first: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The batch sizes for the values at ticks ``first``, first + 1, ..., before ``growths`` is minded."""
        exact = batch_sizes(self.exact_start, self.peak, values, self.scaling)
        exact[: max(self.peak_at - first, 0)] = self.exact_start  # the warm-up
        exact *= 1.0 + _ROUNDING
        largest = float(1 << 62) if self.cap is None else float(self.cap)
        multiples = np.floor(np.minimum(exact, largest) / self.granularity) * self.granularity
        sizes = np.where(exact >= largest, largest, np.maximum(multiples, self.start))
        return sizes.astype(np.int64)


def _phases(run: _Run, sizes: _Sizes) -> list[_Phase]:
    plateaus = run.plateaus(2 * sizes.start)
    starts = set(plateaus)
    if sizes.growths != 0:
        before = sizes.start
        for first, values in run.chunks():
            of_values = sizes.of(values, first)
            grows = np.flatnonzero(of_values != np.concatenate(([before], of_values[:-1])))
            starts.update(((first + grows) * run.tick).tolist())
            before = int(of_values[-1])

    def size_at(sample: int, before: list[_Phase]) -> int:
        grown = len({phase.size for phase in before}) - 1
        if sizes.growths is not None and grown >= sizes.growths:
            return before[-1].size
        tick = sample // run.tick
        return int(sizes.of(run.source.values(tick, tick + 1), tick)[0])

    phases = [_Phase(0, sizes.start, plateaus.get(0, 0))]
    for start in sorted(starts - {0}):
        earlier = [phase for phase in phases if phase.start < start]
        size = size_at(start, earlier)
        if plateaus.get(start, start) - start >= 2 * size:
            phases = [*earlier, _Phase(start, size, plateaus[start])]
        elif start > phases[-1].start:
            # A smooth fall: the batch grows where the update that is under way ends.
            last = phases[-1]
            begin = last.start + -(-(start - last.start) // last.size) * last.size
            if begin < run.total and (size := size_at(begin, phases)) > last.size:
                phases.append(_Phase(begin, size, begin))
    return phases
