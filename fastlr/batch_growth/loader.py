"""GrowingLoader: the batches of a plan, exact to the sample, resumable and distributed."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any, SupportsFloat

from torch.utils.data import IterableDataset, default_collate

from fastlr._checks import count as _count
from fastlr._checks import describe, flag, function, items, saved_state
from fastlr.batch_growth.batch import Batch
from fastlr.batch_growth.options import check_options, check_size
from fastlr.batch_growth.place import Place
from fastlr.batch_growth.plan import BatchPlan
from fastlr.batch_growth.ranks import group_size, ranks_agree
from fastlr.batch_growth.reading import BatchSource
from fastlr.batch_growth.sampler import GrowingBatchSampler, mix
from fastlr.batch_growth.updates import Update
from fastlr.optim import FusedOptimizer, TokenClock


class GrowingLoader:
    r"""The batches of a :class:`BatchPlan`, each of the very size that the plan has for its samples.

    Where PyTorch prefetches, a changed ``batch_sampler.batch_size`` comes late by as many batches, and
    with ``drop_last`` not at all. Here what is read is a function of the position, so that no setting of
    the ``DataLoader`` changes it. A batch larger than ``micro_batch_size`` times the ranks is reached by
    accumulating gradients:

    .. code-block:: python

        loader = fastlr.GrowingLoader(dataset, plan, micro_batch_size=256, num_workers=4).bind(opt)
        for epoch in loader.epochs():
            for batch in epoch:
                x, y = batch.to(device).data
                with batch.sync(model):
                    (loss_fn(model(x), y) * batch.weight).backward()
                if batch.ends_update:
                    opt.step()
                    opt.zero_grad()

    Each sample comes once an epoch, except those that ``tail="drop"`` leaves out. With ``tail="carry"``
    the update that an epoch's end cuts is yielded whole with that epoch: its last samples are the first
    ones of the next epoch's order. So none is under way between two epochs, which is where to validate
    and to save. With ``tail="drop"`` an epoch can be without batches.

    **Randomness.** Before each sample is read, and before a batch is collated, torch's CPU generator,
    ``numpy.random`` and ``random`` are seeded from the seed, the epoch and the sample's index, whatever
    the worker, and put back afterwards; generators that a data set owns are its own affair.

    **Iterable data sets** are streams of ``plan.dataset_size`` samples or more, begun anew in each epoch
    (after ``set_epoch(epoch)``, where they have it); what is beyond is not read. Every worker and every
    rank reads the whole stream and keeps its share, and resuming reads up to the position again: exact,
    but not for free. ``get_worker_info()`` is None while they are read.

    **Next batch, next update.** An update counts as completed when a bound optimizer has stepped (a step
    that GradScaler made it skip included) or the next batch is asked for; without a bound optimizer, as
    soon as its last micro-batch was yielded. So nothing may fetch batches
    ahead of the training loop; the loader does so itself, with ``num_workers`` and ``prefetch_factor``.

    Args:
        dataset: map-style with ``plan.dataset_size`` samples, or iterable.
        plan: which batch size holds where.
        micro_batch_size: most samples that a rank takes at once, >= 1; None: the plan's.
        seed: of the order and of the samples' randomness, >= 0.
        shuffle: None: True for map-style data sets. Iterable ones shuffle themselves.
        count: ``count(data)``: how much of what the loss averages over there is in a micro-batch, such as
            its tokens that are not padding. The weights are then by these counts, over all ranks; a whole
            update is read before its first micro-batch is yielded. An optimizer whose schedules have
            ``unit="token"`` is told them, unless the plan has a ``sequence_length``. None: samples.
        drop_last: True: the plan with ``tail="drop"``.
        rank: of this process; None: from ``torch.distributed`` where it is initialised, or else 0.
        world_size: number of ranks, >= 1; given with ``rank`` or not at all. None: the same, or else 1.
        seed_samples: False: leave the generators alone, which saves some 30 microseconds a sample. A data
            set's ``__getitems__`` is then used where there is one.
        collate_fn: list of samples to data; None: PyTorch's.
        **options: of ``torch.utils.data.DataLoader``: ``num_workers``, ``prefetch_factor``,
            ``persistent_workers``, ``pin_memory``, ``worker_init_fn``, ``timeout`` and so on.

    Raises:
        ValueError: the data set has not as many samples as the plan, a batch cannot be met with these
            ranks and micro-batches, or an argument is out of range.
        RuntimeError: started by ``torchrun``, but ``torch.distributed`` is not initialised.

    >>> import fastlr, torch
    >>> plan = fastlr.BatchPlan.from_phases([(0, 4), (1, 8)], dataset_size=8, epochs=2, lr=0.1)
    >>> loader = fastlr.GrowingLoader(torch.arange(8), plan, micro_batch_size=4, shuffle=False)
    >>> for epoch in loader.epochs():
    ...     for batch in epoch:
    ...         print(epoch.index, batch.data.tolist(), batch.weight, batch.ends_update)
    0 [0, 1, 2, 3] 1.0 True
    0 [4, 5, 6, 7] 1.0 True
    1 [0, 1, 2, 3] 0.5 False
    1 [4, 5, 6, 7] 0.5 True
    """

    def __init__(
        self,
        dataset: Any,
        plan: BatchPlan,
        micro_batch_size: int | None = None,
        *,
        seed: int = 0,
        shuffle: bool | None = None,
        count: Callable[[Any], SupportsFloat] | None = None,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        seed_samples: bool = True,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(plan, BatchPlan):
            raise TypeError(f"plan must be a BatchPlan, got {describe(plan)}")
        check_options(options)
        for name, value in (("count", count), ("collate_fn", collate_fn)):
            if value is not None:
                function(name, value)
        if flag("drop_last", drop_last):
            plan = dataclasses.replace(plan, tail="drop")._without_empty_phases()
        check_size(dataset, plan)
        iterable = isinstance(dataset, IterableDataset)
        shuffle = not iterable if shuffle is None else flag("shuffle", shuffle)
        if iterable and shuffle:
            raise ValueError("shuffle=True needs a map-style data set; an iterable one shuffles itself")
        self._sampler = GrowingBatchSampler(
            plan,
            micro_batch_size,
            seed,
            shuffle,
            rank,
            world_size,
        )
        world = self._sampler.world_size or 1
        if count is not None and world not in (1, group_size()):
            raise ValueError(
                f"count adds up over torch.distributed's {group_size()} ranks, but world_size is {world}; "
                "leave rank and world_size to torch.distributed.init_process_group()"
            )
        self._one_run = world > 1 and rank is None  # the ranks of the process group share this run
        self._planned = plan
        self._growths: list[tuple[int, int]] = []
        self._place = Place(plan)
        self._counts = count is not None
        self._set_plan(plan)
        self._reading = BatchSource(
            dataset,
            plan.dataset_size,
            default_collate if collate_fn is None else collate_fn,
            count,
            flag("seed_samples", seed_samples),
            options,
        )
        self._regrown = False  # whether what is read still has the plan before the last grow()
        self._iteration = 0
        self._reading.open(self._sampler.seed)  # now, so that bad options are refused before training

    def _set_plan(self, plan: BatchPlan) -> None:
        self._sampler = dataclasses.replace(self._sampler, plan=plan)
        self.plan = self._place.plan = dataclasses.replace(
            plan, micro_batch_size=self._sampler.micro_batch_size, ranks=self._sampler.world_size or 1
        )

    # -- with the optimizer ------------------------------------------------------------------------

    def bind(self, optimizer: Any) -> GrowingLoader:
        """Lets this loader move the optimizer's clock of samples, or of tokens, by those of each update.

        Skipped AMP updates count too: their samples are gone. So the schedules ``plan.lr`` and
        ``plan.momentum`` stand where the batches do. An optimizer counts tokens where its schedules do, or
        the plan has a ``sequence_length``; how many an update had, that says, or else the loader's ``count``.

        Warns where the plan trades rate for batch by SGD's linear scaling, which is the default, and the
        optimizer's rule is an adaptive one. Not the other way round: nobody gets ``scaling="sqrt"`` without
        asking for it, and there are those who scale SGD's rate so (arXiv 1705.08741).

        Args:
            optimizer: a fused optimizer, or a framework's wrapper around one, or ZeroRedundancyOptimizer,
                with which an update has to end in a step: a skipped one cannot move the clock.

        Returns:
            The loader itself.

        Raises:
            TypeError: the optimizer has no samples clock.
            ValueError: it counts tokens, and neither the plan has a ``sequence_length`` nor the loader a
                ``count``.

        >>> import fastlr, torch
        >>> plan = fastlr.BatchPlan.from_phases([(0, 4)], dataset_size=8, epochs=1, lr=0.1)
        >>> opt = fastlr.FusedSGD(torch.nn.Linear(2, 1).parameters(), lr=plan.lr)
        >>> loader = fastlr.GrowingLoader(torch.ones(8, 2), plan).bind(opt)
        >>> for batch in loader:
        ...     opt.step()
        ...     print(opt.clock())
        Clock(updates=1, samples=4)
        Clock(updates=2, samples=8)
        """
        while not isinstance(optimizer, FusedOptimizer):
            wrapped = getattr(
                optimizer, "optimizer", getattr(optimizer, "optim", None)
            )  # ZeRO's is the latter
            if wrapped is None:
                break
            optimizer = wrapped
        if not isinstance(optimizer, FusedOptimizer):
            raise TypeError(
                f"only a fastlr optimizer has a samples clock, got {type(optimizer).__name__}; use "
                "fastlr.FusedSGD, or set your optimizer's rate to plan.lr(plan.clock_at(batch.position)) "
                "yourself"
            )
        if self.plan.unit == "token" and not optimizer.clock()[1]:
            with contextlib.suppress(RuntimeError):  # its schedules count samples, which it is told as well
                optimizer.advance_tokens(0)
        if isinstance(optimizer.clock(), TokenClock) and not (self._counts or self.plan.unit == "token"):
            raise ValueError(
                "the optimizer counts tokens, but nobody says how many a batch has: give the plan a "
                "sequence_length, where all samples are as long, or else the loader count=..., as in "
                "count=lambda data: data[0].numel()"
            )
        trades = self.plan.mode in ("increase", "hybrid") and len(set(self.plan.batch_sizes)) > 1
        if trades and self.plan.scaling == "linear" and optimizer._adapts:
            warnings.warn(
                'the plan trades rate for batch in proportion, as SGD does (scaling="linear"), but in '
                f"{type(optimizer).__name__} the rate goes with the square root of the batch; make the plan "
                'with scaling="sqrt", or ignore this warning where the proportion is meant',
                stacklevel=2,
            )
        self._place.bind(optimizer)
        return self

    def _check_ranks(self) -> None:
        """Raises RuntimeError where ranks would not take parts of the same batches."""
        # Plan, sizes, seed and shuffle; a plan's own text may leave phases out.
        run = f"{self.plan.to_dict()!r} {dataclasses.replace(self._sampler, rank=0)!r}"
        if self._one_run and not ranks_agree(mix(self._place.samples, run) >> 1):
            raise RuntimeError(
                "the ranks' loaders differ in plan, micro_batch_size, seed, shuffle or position (here seed "
                f"{self._sampler.seed}, sample {self._place.samples:,}); make them alike on every rank, and "
                "load the same checkpoint"
            )

    # -- iteration -----------------------------------------------------------------------------------

    @property
    def samples(self) -> int:
        """Samples of the run, over all ranks, that completed updates have consumed."""
        self._place.catch_up()
        return self._place.samples

    @property
    def tokens(self) -> int | None:
        """Tokens, over all ranks, that completed updates have consumed; None: nobody counts them.

        By the plan's ``sequence_length``; without one, those that ``count`` has found in what was read.
        """
        self._place.catch_up()
        return self._place.tokens if self._counts or self.plan.unit == "token" else None

    def __iter__(self) -> Iterator[Batch]:
        """All batches that are left of the run, epoch after epoch."""
        for epoch in self.epochs():
            yield from epoch

    def __len__(self) -> int:
        """How many batches iterating now would yield."""
        return sum(1 for _ in self._sampler.schedule(self._place.samples))

    def epochs(self) -> Iterator[Epoch]:
        """The epochs that are left of the run; the first may be the rest of one, and any may be empty.

        Each has to be gone through to its end before the next is asked for. After breaking out of both
        loops, a new call goes on from the beginning of the update that was left; its gradients so far
        have to be zeroed.

        Raises:
            RuntimeError: an epoch was left before its end, or the bound optimizer stands elsewhere.
        """
        self._settle()
        for index in range(self._place.next_epoch, self.plan.epochs):
            epoch = Epoch(self, index)
            if epoch.finished:
                self._place.next_epoch = index + 1  # now: nobody has to ask an empty epoch for batches
            yield epoch
            self._settle()
            if not epoch.finished:
                raise RuntimeError(
                    f"epoch {index} was left before its end, at sample {self._place.samples:,}, and the plan "
                    "counts on all of its samples. Break out of the loop over loader.epochs() as well; a "
                    "new one goes on from there"
                )

    def _count_left(self, epoch: int) -> int:
        return sum(1 for _ in self._sampler.schedule(self._place.samples, epoch))

    def _settle(self) -> None:
        """Ends an iteration that was left, at the beginning of the update that it was in.

        An iterator of which all batches of the epoch were taken was not left, though it may be dropped
        without being asked for one more: that is how frameworks use an epoch whose length they know.
        """
        self._place.catch_up()
        if self._place.epoch is not None and (self._place.epoch.left or self._place.given is not None):
            self._place.epoch.left = self._count_left(self._place.epoch.index)
        self._place.given = self._place.epoch = None

    def _iterate(self, epoch: Epoch) -> Iterator[Batch]:
        if not len(epoch):
            return
        self._settle()
        if epoch.finished or epoch.index != self._place.next_epoch:
            what = "is not the next one" if epoch.index > self._place.next_epoch else "is over"
            raise RuntimeError(f"epoch {epoch.index} {what}; take the next one from loader.epochs()")
        self._place.check_clock()
        self._check_ranks()
        self._iteration += 1
        mine = self._iteration
        self._place.epoch = epoch
        epoch.left = self._count_left(epoch.index)
        # Of this iteration alone, so that its worker processes end with it.
        source: Iterator[tuple[Batch, Update]] | None = None
        while epoch.left:
            if source is None or (self._regrown and self._place.given is None):
                source = self._reading.of(self._sampler, self._place.samples, epoch.index)
                self._regrown = False
            self._place.given = batch, _ = next(source)
            epoch.left -= 1
            if not self._place.bound:
                self._place.complete()
            try:
                yield batch
            except GeneratorExit:
                if mine == self._iteration:
                    self._settle()
                raise
            if mine != self._iteration:
                raise RuntimeError(
                    "the loader was iterated anew, or loaded, while this iteration was under way"
                )
            self._place.complete()
            if self._regrown and self._place.given is None:
                epoch.left = self._count_left(epoch.index)
        self._place.next_epoch = epoch.index + 1  # also where nothing was left of it
        self._place.epoch = None

    def grow(self, batch_size: int) -> None:
        """Batches of at least ``batch_size``, from the next update on. Rates stay as the plan has them.

        So growing by k is like decaying the rate, by k for SGD and by sqrt(k) for adaptive rules: what
        ``loader.plan.noise_scale()`` falls by, with the plan's ``scaling``.

        The one thing that changes a plan on the way, for policies that measure, such as
        :class:`fastlr.AdaptiveGrowth`. Every rank has to call it at the same update. What was fetched
        ahead is fetched anew, and ``len()`` of an epoch under way no longer holds. With ``tail="drop"``,
        what no longer fills a batch is left out: the rest of the epoch, or a phase that is shorter.

        Args:
            batch_size: over all ranks, in 1 .. ``dataset_size``.

        Raises:
            ValueError: it cannot be shared between the ranks or cut into equal micro-batches.
        """
        batch_size = _count("batch_size", batch_size)
        self._place.catch_up()
        at = self._place.samples
        if self._place.given is not None:
            at = self._place.start_after(self._place.given[1])
        if at == self.plan.total_samples:
            return  # the last update is under way
        grown = self.plan.grown(at, batch_size)
        if grown == self.plan:
            return  # its batches are that large
        self._set_plan(grown)
        self._growths.append((at, batch_size))
        self._regrown = True
        if self._place.given is None:
            self._place.move_to(self.plan._updates.next_start(at))

    def _check_growth(self, batch_size: int) -> None:
        """Raises ValueError where :meth:`grow` would."""
        dataclasses.replace(self._sampler, plan=self.plan.grown(self._place.samples, batch_size))

    # -- checkpoints ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, after the updates that are completed; plain numbers, lists and dicts.

        Save it with the model's and the optimizer's, and the generators' states where the model draws
        numbers, between two epochs or right after ``opt.step()``. In the middle of an update that is its
        beginning; then a model with dropout or BatchNorm would go through a part of it twice.
        """
        self._place.catch_up()
        return {
            "epoch": self._place.next_epoch,
            "samples": self._place.samples,
            "seed": self._sampler.seed,
            "shuffle": self._sampler.shuffle,
            "plan": self._planned.to_dict(),
            "growths": [list(growth) for growth in self._growths],
            **({"tokens": self.tokens} if self._counts and self.plan.unit == "sample" else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stands where the run stood, with its seed. Ranks and micro-batch size may have changed.

        Args:
            state: what :meth:`state_dict` returned.

        Raises:
            ValueError: it is damaged, of another plan or order, or its batches cannot be met with these
                ranks and micro-batches. Nothing has changed then.
        """
        keys = ("epoch", "samples", "seed", "shuffle", "plan", "growths")
        state = saved_state("a GrowingLoader", state, keys)
        theirs = BatchPlan.from_dict(state["plan"])
        if theirs != self._planned:
            differing = [
                f"{f.name} ({getattr(theirs, f.name)!r} in the file, {getattr(self._planned, f.name)!r} here)"
                for f in dataclasses.fields(BatchPlan)
                if f.compare and getattr(theirs, f.name) != getattr(self._planned, f.name)
            ]
            raise ValueError(
                f"the file is of another plan: {'; '.join(differing)}. Make the loader with "
                'fastlr.BatchPlan.from_dict(state["plan"])'
            )
        if flag("shuffle", state["shuffle"]) != self._sampler.shuffle:
            raise ValueError(
                f"the file's run has shuffle={state['shuffle']}, this loader {self._sampler.shuffle}"
            )
        plan, growths = self._planned, []
        for growth in items("growths", state["growths"]):
            if not isinstance(growth, (list, tuple)) or len(growth) != 2:
                raise ValueError(f"growths must be pairs (sample, batch_size), got {describe(growth)}")
            growths.append((_count("sample of growths", growth[0], 0), _count("size of growths", growth[1])))
            plan = plan.grown(*growths[-1])
        samples, epoch = plan._updates.begin(state["samples"]), _count("epoch", state["epoch"], 0)
        stands = samples // plan.dataset_size
        # Before the epoch that the next update begins in there can be empty ones, still to come.
        empty = epoch < stands and plan._updates.next_start(epoch * plan.dataset_size) == samples
        if epoch != stands and not empty:
            raise ValueError(
                f"epoch must be the one that the run stands in at sample {samples:,}, {stands}, got {epoch}"
            )
        tokens = state.get("tokens")  # where a count has found them
        if tokens is not None:
            tokens = _count("tokens", tokens, 0)
        if plan.unit == "token":
            tokens = plan.clock_at(samples)
        sampler = dataclasses.replace(self._sampler, plan=plan, seed=state["seed"])
        self._sampler, self._growths = sampler, growths
        self._set_plan(plan)
        self._place.stand(samples, epoch, tokens)
        self._regrown = False
        self._iteration += 1  # what was under way is over
        self._reading.open(self._sampler.seed)


class Epoch:
    """One epoch of a :class:`GrowingLoader`, or the rest of one.

    Attributes:
        index: counted over the run, from 0.
        left: batches that are still to come; None before the first is asked for, but 0 where there are none.
    """

    def __init__(self, loader: GrowingLoader, index: int) -> None:
        self._loader, self.index = loader, index
        self._length = loader._count_left(index)
        self.left: int | None = None if self._length else 0

    @property
    def finished(self) -> bool:
        """Whether all of its batches were yielded."""
        return self.left == 0

    def __len__(self) -> int:
        """How many batches it has, on each rank."""
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        return self._loader._iterate(self)
