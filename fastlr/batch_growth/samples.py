"""Reading samples in worker processes, with randomness that depends on the sample and nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from fastlr.batch_growth.sampler import MicroBatch, mix

# NOTE: [randomness of a sample]
# torch's CPU generator, numpy.random and random are seeded from (seed, epoch, index) before each sample is
# read, and from (seed, epoch, index of the first sample) before a batch is collated. So an augmentation
# depends neither on the worker nor on what was read before, and a resumed run repeats it. In the main
# process the generators are put back afterwards, so that dropout, say, does not notice.
_SAMPLE, _COLLATE, _STREAM = 0, 1, 2


class Reader:
    """The data set as a ``DataLoader`` sees it: a micro-batch of indices in, collated data out."""

    def __init__(
        self, dataset: Any, size: int, collate: Callable[[list[Any]], Any], seed: int | None
    ) -> None:
        self.dataset, self.size, self.collate, self.seed = dataset, size, collate, seed
        self.stream = _Stream(self) if isinstance(dataset, IterableDataset) else None

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, batch: MicroBatch) -> Any:
        with _kept_generators(self.seed is not None and get_worker_info() is None):
            samples = self._samples(batch)
            self.sow(_COLLATE, batch.epochs[0], batch[0])
            return self.collate(samples)

    def _samples(self, batch: MicroBatch) -> list[Any]:
        if self.stream is None and self.seed is None and hasattr(self.dataset, "__getitems__"):
            together: list[Any] = self.dataset.__getitems__(list(batch))
            return together
        samples = []
        for epoch, index in zip(batch.epochs, batch, strict=True):
            if self.stream is None:
                self.sow(_SAMPLE, epoch, index)
                samples.append(self.dataset[index])
            else:
                samples.append(self.stream.read(epoch, index))
        return samples

    def sow(self, purpose: int, epoch: int, index: int) -> None:
        """Seeds the generators that code of a data set draws from."""
        if self.seed is None:
            return
        seed = mix(self.seed, purpose, epoch, index)
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed: it seeds every GPU as well
        np.random.seed([seed & 0xFFFFFFFF, seed >> 32])  # noqa: NPY002  # it is the data sets that use it
        random.seed(seed)


class _Stream:
    """An iterable data set, read forward to the samples that are asked for.

    Every worker, and every rank, goes through the whole stream and keeps what it was asked for. That is
    the only way to the exact sample: how a data set would share itself out among workers is not known.
    So it is not told that there are several.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.iterator: Iterator[Any] = iter(())
        self.epoch, self.next = -1, 0

    def read(self, epoch: int, index: int) -> Any:
        with _alone():
            if epoch != self.epoch or index < self.next:
                self._begin(epoch)
            while True:
                self.reader.sow(_SAMPLE, epoch, self.next)
                try:
                    sample = next(self.iterator)
                except StopIteration:
                    raise RuntimeError(
                        f"the iterable data set ended after {self.next:,} samples of epoch {epoch}, but the "
                        f"plan counts on {self.reader.size:,} in each; give the plan the right dataset_size. "
                        "Every rank has to see the whole stream: a data set that shares itself out among "
                        "ranks must not do so here"
                    ) from None
                self.next += 1
                if self.next > index:
                    return sample

    def _begin(self, epoch: int) -> None:
        dataset = self.reader.dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
        self.reader.sow(_STREAM, epoch, 0)
        self.iterator = iter(dataset)
        self.epoch, self.next = epoch, 0


@contextmanager
def _alone() -> Iterator[None]:
    """Hides from ``get_worker_info()`` that this is a worker."""
    worker = torch.utils.data._utils.worker
    info, worker._worker_info = worker._worker_info, None
    try:
        yield
    finally:
        worker._worker_info = info


@contextmanager
def _kept_generators(keep: bool) -> Iterator[None]:
    """Puts the generators back as they were. A worker has its own, which nobody else draws from."""
    if not keep:
        yield
        return
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


def as_it_is(value: Any) -> Any:
    """The collate function of the ``DataLoader``: the reader has collated already."""
    return value
