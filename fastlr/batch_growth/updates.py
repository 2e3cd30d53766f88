"""Where the updates of a run begin and end: phases of one batch size each, cut by the tail rule."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from fastlr._checks import count

Tail = Literal["carry", "keep", "drop"]

TAILS = ("carry", "keep", "drop")


class Update(NamedTuple):
    """One update of a plan.

    Attributes:
        start: samples consumed before it.
        size: its samples, over all ranks; fewer than the phase's batch where a tail is kept.
        next_start: samples consumed when the next one begins, those that a tail rule drops included.
        batch_size: the phase's.
    """

    start: int
    size: int
    next_start: int
    batch_size: int


class Segment(NamedTuple):
    """A stretch that updates do not cross."""

    start: int
    stop: int
    batch_size: int


@dataclass(frozen=True)
class Updates:
    """The updates of a run; what :class:`BatchPlan` says of ``tail`` is done here.

    Args:
        starts: samples at which the phases begin, ascending; the first is 0.
        batch_sizes: of each phase, in 1 .. ``dataset_size``.
        dataset_size: samples of an epoch.
        epochs: of the run.
        tail: what ends an update early.

    Raises:
        ValueError: a phase has no samples, a batch is larger than the data set, or there is no update.
    """

    starts: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    dataset_size: int
    epochs: int
    tail: Tail

    def __post_init__(self) -> None:
        if self.starts[0] != 0:
            raise ValueError(f"the first phase must start at sample 0, got {self.starts[0]}")
        total = self.total_samples
        if self.starts[-1] >= total:
            raise ValueError(
                f"the last phase starts at sample {self.starts[-1]:,}, but the run ends at "
                f"{total:,} ({self.epochs} epochs of {self.dataset_size:,} samples); give it more epochs"
            )
        for k, (start, stop) in enumerate(itertools.pairwise(self.starts)):
            if stop <= start:
                raise ValueError(
                    f"phase {k} has no samples: it starts at sample {start:,}, and the next one at {stop:,}; "
                    "leave it out, or let the phases' starts ascend"
                )
        for start, size in zip(self.starts, self.batch_sizes, strict=True):
            if size > self.dataset_size:
                raise ValueError(
                    f"the batch size at sample {start:,} would be {size:,}, more than the data set's "
                    f"{self.dataset_size:,} samples; give a smaller batch_size or max_batch_size"
                )
        if not self.total:
            raise ValueError(
                'the plan has no update, because tail="drop" leaves out all of its samples; use "keep" or '
                '"carry", or smaller batches'
            )

    def check_each_phase(self) -> None:
        """Raises ValueError where a phase has no update.

        That is for whoever writes a plan to see. In one that grew, a phase may be shorter than the batch.
        """
        for k, updates in enumerate(self.of_phases):
            if updates == 0:
                raise ValueError(
                    f"phase {k}, from sample {self.starts[k]:,} with batch size {self.batch_sizes[k]:,}, "
                    'has no update, because tail="drop" leaves out all of its samples; use "keep" or "carry"'
                )

    @property
    def total_samples(self) -> int:
        return self.epochs * self.dataset_size

    @property
    def total(self) -> int:
        """How many updates there are, partial ones included."""
        return sum(self.of_phases)

    @property
    def stops(self) -> tuple[int, ...]:
        """Where each phase ends."""
        return (*self.starts[1:], self.total_samples)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """What updates do not cross: the phases, cut at the ends of epochs where the tail rule says so."""
        segments = []
        for start, stop, size in zip(self.starts, self.stops, self.batch_sizes, strict=True):
            cuts = [start, stop]
            if self.tail != "carry":
                first = start - start % self.dataset_size + self.dataset_size
                cuts[1:1] = range(first, stop, self.dataset_size)
            segments += [Segment(a, b, size) for a, b in itertools.pairwise(cuts)]
        return tuple(segments)

    @cached_property
    def of_phases(self) -> tuple[int, ...]:
        """How many updates each phase has."""
        updates = [0] * len(self.starts)
        for segment in self.segments:
            updates[self.phase_of(segment.start)] += self._in(segment)
        return tuple(updates)

    def phase_of(self, sample: int) -> int:
        """The index of the phase that a sample belongs to."""
        return bisect.bisect_right(self.starts, sample) - 1

    def next_start(self, sample: int) -> int:
        """Where the first update begins that begins at ``sample`` or later; the run's end if none does."""
        for index in range(self._segment_of(sample), len(self.segments)):
            segment = self.segments[index]
            before = max(-(-(sample - segment.start) // segment.batch_size), 0)
            if before < self._in(segment):
                return segment.start + before * segment.batch_size
        return self.total_samples

    def begin(self, sample: int) -> int:
        """``sample``, checked to be where an update begins, or the beginning or end of the run."""
        sample = count("sample", sample, 0)
        if sample > self.total_samples or (sample and self.next_start(sample) != sample):
            raise ValueError(f"no update of the plan begins at sample {sample:,}")
        return sample

    def since(self, sample: int) -> Iterator[Update]:
        """The updates in order, from the one that begins after ``sample`` samples."""
        waiting: tuple[int, int, int] | None = None
        for start, size, batch_size in self._cut(sample):
            if waiting is not None:
                yield Update(waiting[0], waiting[1], start, waiting[2])
            waiting = start, size, batch_size
        if waiting is not None:
            yield Update(waiting[0], waiting[1], self.total_samples, waiting[2])

    def grown(self, sample: int, batch_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Starts and sizes of the phases, once those from ``sample`` on are at least of ``batch_size``."""
        phases = dict(zip(self.starts, self.batch_sizes, strict=True))
        phases[sample] = self.batch_sizes[self.phase_of(sample)]
        merged: list[tuple[int, int]] = []
        for start in sorted(phases):
            grown = max(phases[start], batch_size) if start >= sample else phases[start]
            # A boundary that only growing made is dropped again where it separates nothing.
            if start in self.starts or not merged or merged[-1][1] != grown:
                merged.append((start, grown))
        return tuple(start for start, _ in merged), tuple(size for _, size in merged)

    def _in(self, segment: Segment) -> int:
        """How many updates a segment has."""
        whole, rest = divmod(segment.stop - segment.start, segment.batch_size)
        return whole + (rest > 0 and self.tail != "drop")

    def _segment_of(self, sample: int) -> int:
        """The index of the segment that a sample is in; the last one's for the end of the run."""
        return bisect.bisect_right(self.segments, sample, key=lambda segment: segment.start) - 1

    def _cut(self, sample: int) -> Iterator[tuple[int, int, int]]:
        sample = self.begin(sample)
        for segment in self.segments[self._segment_of(sample) :]:
            start = max(sample, segment.start)
            stop = segment.start + self._in(segment) * segment.batch_size
            for begin in range(start, stop, segment.batch_size):
                yield begin, min(segment.batch_size, segment.stop - begin), segment.batch_size
