"""From micro-batches of indices to weighted batches of data, read ahead by PyTorch's DataLoader."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, SupportsFloat

import torch
from torch.utils.data import DataLoader

from fastlr._checks import real
from fastlr.batch_growth.batch import Batch
from fastlr.batch_growth.ranks import sum_over_ranks
from fastlr.batch_growth.sampler import GrowingBatchSampler, MicroBatch, mix
from fastlr.batch_growth.samples import Reader, as_it_is
from fastlr.batch_growth.updates import Update


class BatchSource:
    """Reads a data set through a ``DataLoader``, in the order of a sampler.

    Args:
        dataset: map-style or iterable.
        size: samples of an epoch.
        collate: list of samples to data.
        count: what a micro-batch's data count for its weight; None: samples.
        seed_samples: whether each sample is read under a seed of its own.
        options: of the ``DataLoader``.
    """

    def __init__(
        self,
        dataset: Any,
        size: int,
        collate: Callable[[list[Any]], Any],
        count: Callable[[Any], SupportsFloat] | None,
        seed_samples: bool,
        options: dict[str, Any],
    ) -> None:
        self._dataset, self._size, self._collate, self._count = dataset, size, collate, count
        self._seed_samples, self._options = seed_samples, options

    def open(self, seed: int) -> None:
        """Makes the ``DataLoader``, whose samples' randomness is from ``seed``."""
        self._feed = _Feed()
        self.loader: DataLoader[Any] = DataLoader(
            Reader(self._dataset, self._size, self._collate, seed if self._seed_samples else None),  # type: ignore[arg-type]
            batch_sampler=self._feed,
            collate_fn=as_it_is,
            # Its own, because each iterator draws a number, which would be missing from the global one;
            # on the default device, where the iterator puts the number (PyTorch 2.6 cannot be asked for it
            # once it was set back to None).
            generator=torch.Generator(torch.empty(0).device).manual_seed(mix(seed)),
            **self._options,
        )

    def of(self, sampler: GrowingBatchSampler, samples: int, epoch: int) -> Iterator[tuple[Batch, Update]]:
        """The batches of an epoch, from the update on that begins after so many samples of the run."""
        batches = self._read(sampler, samples, epoch)
        return batches if self._count is None else self._counted(batches, self._count)

    def _read(self, sampler: GrowingBatchSampler, samples: int, epoch: int) -> Iterator[tuple[Batch, Update]]:
        sent = self._feed.aim(sampler, samples, epoch)
        length = sampler.plan.sequence_length
        for data in self.loader:
            micro = sent.popleft()
            update = micro.update
            yield (
                Batch(
                    data=data,
                    samples=len(micro),
                    weight=micro.weight,
                    position=update.start,
                    global_batch=update.size,
                    epoch=epoch,
                    starts_update=micro.starts_update,
                    ends_update=micro.ends_update,
                    full=update.size == update.batch_size,
                    ranks=sampler.world_size or 1,
                    tokens=None if length is None else len(micro) * length,
                    global_tokens=None if length is None else update.size * length,
                ),
                update,
            )

    def _counted(
        self, batches: Iterator[tuple[Batch, Update]], count: Callable[[Any], SupportsFloat]
    ) -> Iterator[tuple[Batch, Update]]:
        """Batches weighted by what they count, once all of an update are there."""
        window: list[tuple[Batch, Update]] = []
        for item in batches:
            window.append(item)
            if not item[0].ends_update:
                continue
            counts: list[float] = []
            wrong: Exception | None = None
            try:
                counts += [real("count(data)", count(batch.data)) for batch, _ in window]
            except Exception as error:
                wrong = error
            world = item[0].ranks
            # Told to the others first, which would otherwise wait for this rank.
            total = sum_over_ranks([sum(counts) if wrong is None else math.nan], world)[0]
            if wrong is not None:
                raise wrong
            if not 0.0 < total < math.inf:
                raise ValueError(
                    f"count(data) must be > 0 for one micro-batch of an update, and valid on every rank, got "
                    f"{counts} in the update at sample {item[1].start:,}"
                )
            for (batch, update), number in zip(window, counts, strict=True):
                if batch.global_tokens is None:  # the plan says nothing of them
                    batch = dataclasses.replace(batch, tokens=_whole(number), global_tokens=_whole(total))
                yield dataclasses.replace(batch, weight=world * number / total), update
            window = []


def _whole(number: float) -> int | None:
    return int(number) if number.is_integer() else None


class _Feed:
    """The batch sampler of the ``DataLoader``: what was sent to be read is noted, in order.

    What it yields next is kept as where that begins, and not as an iterator, which nothing could copy.
    """

    def __init__(self) -> None:
        self._next: tuple[GrowingBatchSampler, int, int] | None = None
        self._sent: deque[MicroBatch] = deque()

    def aim(self, sampler: GrowingBatchSampler, samples: int, epoch: int) -> deque[MicroBatch]:
        """Sets what the next iterator yields; returns where that is noted."""
        self._next, self._sent = (sampler, samples, epoch), deque()
        return self._sent

    def __iter__(self) -> Iterator[MicroBatch]:
        if self._next is None:
            return iter(())
        sampler, samples, epoch = self._next
        return self._noted(sampler.micro_batches(samples, epoch), self._sent)

    @staticmethod
    def _noted(micro_batches: Iterator[MicroBatch], sent: deque[MicroBatch]) -> Iterator[MicroBatch]:
        for micro_batch in micro_batches:
            sent.append(micro_batch)
            yield micro_batch
