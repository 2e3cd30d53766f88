"""Which samples form which micro-batch on which rank: a pure function of plan, seed and position."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastlr._checks import count, describe, flag
from fastlr.batch_growth.division import divide
from fastlr.batch_growth.plan import BatchPlan
from fastlr.batch_growth.ranks import group_size
from fastlr.batch_growth.updates import Update


class MicroBatch(list[int]):
    """Indices of the samples that a rank takes at once, and what becomes of them.

    A plain list to a ``DataLoader``, so that any of its settings works with it.

    Attributes:
        epochs: the epoch in whose order each of them stands.
        weight: what to multiply a mean loss over them with; see :class:`fastlr.batch_growth.Batch`.
        update: the update of the plan that they belong to.
        starts_update: whether they are its first micro-batch.
        ends_update: whether they are its last.
    """

    def __init__(
        self, indices: list[int], epochs: list[int], weight: float, update: Update, first: bool, last: bool
    ) -> None:
        super().__init__(indices)
        self.epochs, self.weight, self.update = epochs, weight, update
        self.starts_update, self.ends_update = first, last

    def __reduce__(self) -> tuple[type[MicroBatch], tuple[object, ...]]:
        return MicroBatch, (
            list(self), self.epochs, self.weight, self.update, self.starts_update, self.ends_update,
        )  # fmt: skip


class Step(NamedTuple):
    """Samples ``start`` to ``stop`` of an update, which all ranks take at once."""

    start: int
    stop: int


@dataclass(frozen=True)
class GrowingBatchSampler:
    """Micro-batches of a :class:`BatchPlan` for one rank: a batch sampler for any ``DataLoader``.

    The order of epoch e is a random permutation from (seed, e). An update takes the next samples of it,
    and with ``tail="carry"`` the last update that begins in an epoch takes what it lacks from the next
    one's; sample i of an update goes to rank ``i % ranks``. It is immutable, and what it yields depends on
    its arguments and the position only, so neither prefetching nor persistent workers can make a batch
    late.

    **Sizes.** An update of the plan's size is cut into the fewest equal micro-batches of at most
    ``micro_batch_size`` samples per rank. A tail is cut as evenly as can be into micro-batches that are no
    larger. Every rank has the same number of micro-batches, and of samples, in every update; only in a
    tail that the ranks do not divide some have one more, which the weights account for.

    Args:
        plan: which batch size holds where.
        micro_batch_size: most samples that a rank takes at once, >= 1; None: the plan's.
        seed: of the order, >= 0.
        shuffle: False: each epoch in the data set's own order.
        rank: of this process; None: from ``torch.distributed`` where it is initialised, or else 0.
        world_size: number of ranks, >= 1; given with ``rank`` or not at all. None: the same, or else 1.

    Raises:
        ValueError: a batch of the plan cannot be shared between the ranks or cut into equal
            micro-batches, or a tail not without leaving a rank without a sample or giving it more than
            ``micro_batch_size``.
        RuntimeError: started by ``torchrun``, but ``torch.distributed`` is not initialised.

    >>> import fastlr
    >>> plan = fastlr.BatchPlan.from_phases([(0, 4), (1, 8)], dataset_size=10, epochs=2, lr=0.1)
    >>> sampler = fastlr.GrowingBatchSampler(plan, micro_batch_size=4, shuffle=False)
    >>> for micro_batch in sampler:
    ...     print(micro_batch, micro_batch.ends_update)
    [0, 1, 2, 3] True
    [4, 5, 6, 7] True
    [8, 9] True
    [0, 1, 2, 3] False
    [4, 5, 6, 7] True
    [8, 9] True
    """

    plan: BatchPlan
    micro_batch_size: int | None = None
    seed: int = 0
    shuffle: bool = True
    rank: int | None = None
    world_size: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.plan, BatchPlan):
            raise TypeError(f"plan must be a BatchPlan, got {describe(self.plan)}")
        rank, world_size = _place(self.rank, self.world_size)
        micro = self.plan.micro_batch_size if self.micro_batch_size is None else self.micro_batch_size
        checked = {
            "micro_batch_size": None if micro is None else count("micro_batch_size", micro),
            "seed": count("seed", self.seed, 0),
            "shuffle": flag("shuffle", self.shuffle),
            "rank": rank,
            "world_size": world_size,
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        for size in dict.fromkeys(self.plan.batch_sizes):
            divide(size, self.micro_batch_size, world_size)
        for segment in self.plan._updates.segments:
            tail = (segment.stop - segment.start) % segment.batch_size
            if 0 < tail < world_size and self.plan.tail != "drop":
                raise ValueError(
                    f"the update that ends at sample {segment.stop:,} has {tail} sample"
                    f"{'s' if tail > 1 else ''}, fewer than the {world_size} ranks; use "
                    f'tail="drop", which leaves such samples out'
                    + (', or tail="carry"' if self.plan.tail == "keep" else "")
                    + ", or another batch size"
                )
            # Of n >= 2 samples at a time a rank can take one more in its last micro-batch, of 1 it cannot.
            if tail % world_size and self.micro_batch_size == 1 and self.plan.tail != "drop":
                raise ValueError(
                    f"the update that ends at sample {segment.stop:,} has {tail} samples, which {world_size} "
                    "ranks cannot share without one taking two at once, but micro_batch_size is 1; use "
                    'micro_batch_size=2, or tail="drop", which leaves such samples out'
                )

    def __iter__(self) -> Iterator[MicroBatch]:
        return self.micro_batches()

    def __len__(self) -> int:
        return sum(len(self.steps(update)) for update in self.plan.updates_from())

    @property
    def batch_size(self) -> int:
        """There is no such number; it is asked for by those who would share the batches out among ranks.

        Raises:
            RuntimeError: there are several ranks, whose shares these micro-batches are.
            AttributeError: there is one.
        """
        ranks = max(self.world_size or 1, group_size())
        if ranks == 1:
            raise AttributeError("a GrowingBatchSampler has no one batch_size; see its plan's batch_sizes")
        raise RuntimeError(
            f"a GrowingBatchSampler yields what rank {self.rank} of {self.world_size} takes, and whoever "
            f"asks for its batch_size would share that out among {ranks} once more, as accelerate does in "
            "prepare(); pass it a fastlr.GrowingLoader, which it leaves as it is, or keep this DataLoader "
            "from it"
        )

    def micro_batches(self, sample: int = 0, epoch: int | None = None) -> Iterator[MicroBatch]:
        """This rank's micro-batches, from the update on that begins after ``sample`` samples.

        Args:
            sample: at which an update begins.
            epoch: stop after the last update that begins in this epoch, counted from 0; None: at the
                end of the run.

        Raises:
            ValueError: no update begins there, or an argument is out of range.
        """
        order = _Order(self)
        world, rank = self.world_size or 1, self.rank or 0
        for update, step in self.schedule(sample, epoch):
            # Sample i of an update belongs to rank i % world.
            mine = range(
                update.start + step.start + (rank - step.start) % world, update.start + step.stop, world
            )
            epochs, indices = order.of(mine)
            last = step.stop == update.size
            yield MicroBatch(
                indices, epochs, world * len(indices) / update.size, update, step.start == 0, last
            )

    def schedule(self, sample: int = 0, epoch: int | None = None) -> Iterator[tuple[Update, Step]]:
        """As :meth:`micro_batches`, the same on every rank: what is taken when, without the indices."""
        end = self.plan.total_samples
        if epoch is not None:
            end = (count("epoch", epoch, 0) + 1) * self.plan.dataset_size
        for update in self.plan.updates_from(sample):
            if update.start >= end:
                return
            for step in self.steps(update):
                yield update, step

    def steps(self, update: Update) -> list[Step]:
        """An update cut into what the ranks take at once."""
        world = self.world_size or 1
        micro, _ = divide(update.batch_size, self.micro_batch_size, world)
        each = update.size // world
        number = min(-(-update.size // (world * micro)), each)
        # Cuts at multiples of the ranks keep their numbers of samples equal.
        bounds = [world * -(-each * k // number) for k in range(number)] + [update.size]
        return [Step(a, b) for a, b in itertools.pairwise(bounds)]


class _Order:
    """The data set's order in each epoch; the last one is kept, as it is asked for again and again."""

    def __init__(self, sampler: GrowingBatchSampler) -> None:
        self.sampler, self.size = sampler, sampler.plan.dataset_size
        self.epoch = -1
        self.permutation = torch.empty(0, dtype=torch.int64, device="cpu")

    def of(self, samples: range) -> tuple[list[int], list[int]]:
        """``(epochs, indices)`` of samples that are counted over the run."""
        epochs = [sample // self.size for sample in samples]
        if not self.sampler.shuffle:
            return epochs, [sample % self.size for sample in samples]
        indices: list[int] = []
        for epoch in dict.fromkeys(epochs):
            if epoch != self.epoch:
                # On the host, whatever torch.set_default_device() says: the same order everywhere.
                generator = torch.Generator("cpu").manual_seed(mix(self.sampler.seed, epoch))
                self.permutation = torch.randperm(self.size, generator=generator, device="cpu")
                self.epoch = epoch
            places = [sample % self.size for sample in samples if sample // self.size == epoch]
            indices += self.permutation[places].tolist()
        return epochs, indices


def mix(*parts: int | str) -> int:
    """64 bits from several parts, to seed a generator or to compare; others for any other parts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ValueError(f"give both rank and world_size or neither, got {rank!r} and {world_size!r}")
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        launched = os.environ.get("WORLD_SIZE", "1")
        if launched != "1":
            raise RuntimeError(
                f"WORLD_SIZE is {launched}, but torch.distributed is not initialised, so that every process "
                "would take all samples; call torch.distributed.init_process_group() first, or pass rank "
                "and world_size"
            )
        return 0, 1
    world_size = count("world_size", world_size)
    if count("rank", rank, 0) >= world_size:
        raise ValueError(f"rank must be in 0 .. {world_size - 1}, got {rank}")
    return int(rank), world_size
