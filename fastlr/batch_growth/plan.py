"""BatchPlan: which batch size, learning rate and momentum hold at every sample of a run.

The noise scale ``g = lr * N / (B * (1 - momentum))`` and the trade of rate against batch are those of
Smith, Kindermans, Ying and Le, arXiv 1711.00489; for adaptive rules see ``scaling.py``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from fastlr import plotting
from fastlr._checks import ENDLESS, choice, count, describe, items, real
from fastlr.batch_growth.division import divide
from fastlr.batch_growth.growth import BatchScale, grown_phases
from fastlr.batch_growth.phase import Phase
from fastlr.batch_growth.scaling import SCALINGS, Scaling, noise_scale
from fastlr.batch_growth.table import as_html, as_text
from fastlr.batch_growth.updates import TAILS, Tail, Update, Updates
from fastlr.schedules import Constant, Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Mode = Literal["increase", "hybrid", "decay", "phases"]
Unit = Literal["epoch", "sample", "token"]

# Plans of more phases than this are not written out: from smooth schedules they have hundreds.
_WRITTEN = 8


@dataclass(frozen=True)
class BatchPlan:
    """Batch size, learning rate and momentum of a whole run, clocked in samples or tokens. Immutable.

    Make one with :meth:`from_schedule` or :meth:`from_phases`.

    **Tail rule.** A new phase begins at the very sample that the plan names, so an update that is under
    way there ends there, smaller than the others. What an epoch's end does is for ``tail`` to say:

    - ``"carry"``: nothing; the update takes what it lacks from the next epoch's samples. A phase of n
      samples and batch size B has ceil(n / B) updates.
    - ``"keep"``: the update ends there, smaller than the others.
    - ``"drop"``: as ``"keep"``, but updates that are cut short, by an epoch's end or a phase's, are left
      out; the clock passes over their samples.

    Args:
        starts: samples at which the phases begin, ascending; the first is 0.
        batch_sizes: of each phase, over all ranks and accumulation steps, in 1 .. ``dataset_size``.
        lr: learning rate, a schedule in samples; in tokens, where there is a ``sequence_length``.
        momentum: the same, in [0, 1).
        dataset_size: samples of an epoch, >= 1.
        epochs: >= 1.
        tail: see above.
        mode: where the plan is from; shown by ``print``.
        micro_batch_size: the most samples that a rank takes at once, >= 1; None: its share of any batch.
            Shown by ``print``, and what a loader takes unless told otherwise; plans that differ in nothing
            else are equal.
        ranks: processes that share a batch, >= 1; as ``micro_batch_size``.
        scaling: how rate and batch go together: ``"linear"`` for SGD, ``"sqrt"`` for adaptive rules such as
            Adam. Says what :meth:`noise_scale` is.
        sequence_length: tokens of each sample, >= 1: then the schedules count tokens. None: samples.

    Raises:
        ValueError: an argument is out of range, a phase has no samples, the plan has no updates, or a
            batch cannot be shared between the ranks.

    >>> import fastlr
    >>> plan = fastlr.BatchPlan.from_phases(
    ...     [(0, 100), (2, 200)], dataset_size=1000, epochs=3, lr=0.1, momentum=0.9)
    >>> plan.total_updates, plan.phase_at(1999).batch_size, plan.phase_at(2000).batch_size
    (25, 100, 200)

    References:
        Smith, Kindermans, Ying and Le, Don't Decay the Learning Rate, Increase the Batch Size,
        arXiv 1711.00489.
    """

    starts: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    lr: Schedule
    momentum: Schedule
    dataset_size: int
    epochs: int
    tail: Tail = "carry"
    mode: Mode = "phases"
    micro_batch_size: int | None = field(default=None, compare=False)
    ranks: int = field(default=1, compare=False)
    scaling: Scaling = field(default="linear", kw_only=True)
    sequence_length: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        starts = tuple(count("starts", start, 0) for start in items("starts", self.starts))
        sizes = tuple(count("batch_sizes", size) for size in items("batch_sizes", self.batch_sizes))
        if len(starts) != len(sizes) or not starts:
            raise ValueError(f"each phase needs a start and a batch size, got {len(starts)} and {len(sizes)}")
        checked: dict[str, object] = {
            "starts": starts,
            "batch_sizes": sizes,
            "dataset_size": count("dataset_size", self.dataset_size),
            "epochs": count("epochs", self.epochs),
            "ranks": count("ranks", self.ranks),
            "tail": choice("tail", self.tail, TAILS),
            "scaling": choice("scaling", self.scaling, SCALINGS),
            "mode": choice("mode", self.mode, ("increase", "hybrid", "decay", "phases")),
        }
        if self.micro_batch_size is not None:
            checked["micro_batch_size"] = count("micro_batch_size", self.micro_batch_size)
        if self.sequence_length is not None:
            checked["sequence_length"] = count("sequence_length", self.sequence_length)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.total_samples >= ENDLESS:
            raise ValueError(
                f"epochs * dataset_size must be < 2**63 - 1, got {self.epochs:,} * {self.dataset_size:,}"
            )
        if (self.total_tokens or 0) >= ENDLESS:
            raise ValueError(
                f"the run must have < 2**63 - 1 tokens, got {self.total_samples:,} samples of "
                f"{self.sequence_length:,}"
            )
        _ = self._updates  # checks the phases
        for name in ("lr", "momentum"):
            value = getattr(self, name)
            if not isinstance(value, Schedule) or value.unit != self.unit:
                why = "" if self.sequence_length is None else ", as the plan has a sequence_length"
                raise ValueError(
                    f'{name} must be a schedule with unit="{self.unit}"{why}, got {describe(value)}'
                )
        if not self.momentum.peak < 1.0:
            raise ValueError(
                f"momentum must stay in [0, 1), got a schedule that peaks at {self.momentum.peak!r}"
            )
        for size in dict.fromkeys(sizes):
            divide(size, self.micro_batch_size, self.ranks)

    @cached_property
    def _updates(self) -> Updates:
        return Updates(self.starts, self.batch_sizes, self.dataset_size, self.epochs, self.tail)

    def _without_empty_phases(self) -> BatchPlan:
        """This plan, of which each phase is meant to have updates."""
        self._updates.check_each_phase()
        return self

    # -- making plans --------------------------------------------------------------------------------

    @classmethod
    def from_schedule(
        cls,
        schedule: Schedule,
        *,
        batch_size: int,
        dataset_size: int,
        epochs: int,
        momentum: float = 0.0,
        mode: Literal["increase", "hybrid", "decay"] = "increase",
        max_batch_size: int | None = None,
        hybrid_drops: int = 1,
        lr_scale: float = 1.0,
        batch_scale: BatchScale | None = None,
        raised_momentum: float | None = None,
        granularity: int | None = None,
        tail: Tail = "carry",
        micro_batch_size: int | None = None,
        ranks: int = 1,
        scaling: Scaling = "linear",
        sequence_length: int | None = None,
    ) -> BatchPlan:
        r"""A plan with the noise scale of a run that decays its learning rate at a fixed batch size.

        With the schedule's rate s, its batch size :math:`B_0` and momentum :math:`m_0`, the noise scale is
        :math:`g = s N / (B_0 (1 - m_0))` at every sample, and the plan has the same. ``mode`` says what
        makes it fall:

        - ``"decay"``: the rate; the batch stays as it is.
        - ``"increase"``: the batch, until it is ``max_batch_size``. There the cap takes what it can, and
          the rate takes the rest.
        - ``"hybrid"``: the batch, the first ``hybrid_drops`` times that it grows; then the rate.

        The start may be raised: the rate by ``lr_scale``, the batch with it as ``batch_scale`` says, and
        the momentum to ``raised_momentum``, the batch with it by (1 - m_0) / (1 - m). A batch_scale of one's
        own multiplies the noise scale of the whole plan, by lr_scale over what goes with the batch's factor.

        **Adaptive rules.** That noise scale is SGD's. Adam, RMSprop and their kin divide by the gradient's
        root mean square, which hides a factor of the rate's size from it; there the rate goes with the square
        root of the batch. With ``scaling="sqrt"`` the plan keeps :math:`g = s \sqrt{N / B_0}`:

        =====================================  ==================  =====================
        ..                                     ``"linear"``        ``"sqrt"``
        =====================================  ==================  =====================
        rate s at a batch of B                 s * B / B_0         s * sqrt(B / B_0)
        batch in place of a decay by f < 1     B_0 / f             B_0 / f**2
        rate that the cap leaves, of s         s * B_max / B_0     s * sqrt(B_max / B_0)
        batch with a rate raised by lr_scale   B_0 * lr_scale      B_0 * lr_scale**2
        =====================================  ==================  =====================

        Momentum, ``betas[0]`` there, takes no part in it, and there is no ``raised_momentum``. Where the
        batch grows by k, Malladi et al. also take 1 - beta to k * (1 - beta) for each of the betas, and eps
        to eps / sqrt(k). A plan does neither: the optimizer's betas and eps stay, so that its averages span
        as many updates as before, and k times the samples. (Their rule ends at k = 1 / (1 - beta), 10 for
        0.9, where an average is of one update.) Both need noise to dominate the gradient: batches well below
        what :class:`fastlr.GradientNoiseScale` measures.

        Batch sizes are the start's, multiples of ``granularity`` and the cap; the largest that is not
        above the exact value is taken, and the rate takes the rest, so that the noise scale is the given
        one at every sample. For steps whose factors are whole numbers the rate stays exactly fixed.
        Where the rate is then held for two updates or more, the phase begins at the very sample where the
        schedule drops. Where the schedule falls smoothly, the batch grows between two updates, and each
        update's rate is the one at its first sample.

        Up to its peak a schedule may rise (a warm-up): the batch stays at its start's size, and the rate
        follows the schedule. In mode ``"decay"`` it may rise anywhere.

        Args:
            schedule: the learning rate at ``batch_size``, in epochs (each value is held for an epoch), in
                samples, in updates of ``batch_size`` samples, or in tokens, which is looked at where a sample
                begins. Where it ends before the run does, it holds its last value and warns.
            batch_size: the schedule's, >= 1.
            dataset_size: samples of an epoch, >= 1.
            epochs: of the run, >= 1. What the schedule has beyond is not used.
            momentum: the schedule's, in [0, 1).
            mode: see above.
            max_batch_size: the largest batch, >= the start's; None: no cap.
            hybrid_drops: how often the batch grows, >= 1; only in mode ``"hybrid"``.
            lr_scale: factor of the rate, >= 1.
            batch_scale: the batch's factor for it: ``"linear"`` (lr_scale), ``"sqrt"`` (its root) or
                ``"none"`` (1); None: the one that keeps the noise scale, by ``scaling``.
            raised_momentum: in [momentum, 1); None: as ``momentum``. Only with linear scaling.
            granularity: batch sizes grow in steps of so many samples, >= 1; None: of ``batch_size``.
            tail: what an epoch's end does to an update; see :class:`BatchPlan`.
            micro_batch_size: see :class:`BatchPlan`.
            ranks: see :class:`BatchPlan`.
            scaling: ``"linear"`` for SGD, ``"sqrt"`` for adaptive rules.
            sequence_length: see :class:`BatchPlan`; needed for a schedule in tokens.

        Raises:
            ValueError: an argument is out of range, the schedule rises after its peak, the batch would
                outgrow the data set, or a phase has no updates.

        >>> import fastlr
        >>> plan = fastlr.BatchPlan.from_schedule(
        ...     fastlr.MultiStep(0.1, [60, 120, 160], 0.2, unit="epoch"), batch_size=128,
        ...     dataset_size=50_000, epochs=200, momentum=0.9, max_batch_size=5120)
        >>> [(phase.batch_size, round(phase.lr, 4)) for phase in plan.phases]
        [(128, 0.1), (640, 0.1), (3200, 0.1), (5120, 0.032)]
        >>> plan.total_updates
        29142

        The same for Adam: a fifth of the rate is 25 times the batch.

        >>> plan = fastlr.BatchPlan.from_schedule(
        ...     fastlr.MultiStep(1e-3, [60, 120, 160], 0.2, unit="epoch"), batch_size=128,
        ...     dataset_size=50_000, epochs=200, max_batch_size=12_800, scaling="sqrt")
        >>> [(phase.batch_size, round(phase.lr, 6)) for phase in plan.phases]
        [(128, 0.001), (3200, 0.001), (12800, 0.0004), (12800, 8e-05)]

        References:
            Smith, Kindermans, Ying and Le, arXiv 1711.00489: linear scaling, and growing the batch.
            Krizhevsky, One weird trick for parallelizing convolutional neural networks, arXiv 1404.5997: the
            square root.
            Malladi, Lyu, Panigrahi and Arora, On the SDEs and Scaling Rules for Adaptive Gradient Algorithms,
            arXiv 2205.10287: the square root for RMSprop and Adam.
        """
        grown = grown_phases(
            schedule,
            batch_size=batch_size,
            dataset_size=dataset_size,
            epochs=epochs,
            momentum=momentum,
            mode=mode,
            max_batch_size=max_batch_size,
            hybrid_drops=hybrid_drops,
            lr_scale=lr_scale,
            scaling=scaling,
            batch_scale=batch_scale,
            raised_momentum=raised_momentum,
            granularity=granularity,
            sequence_length=sequence_length,
        )
        return cls(
            starts=grown.starts,
            batch_sizes=grown.batch_sizes,
            lr=grown.lr,
            momentum=grown.momentum,
            dataset_size=dataset_size,
            epochs=epochs,
            tail=tail,
            mode=mode,
            micro_batch_size=micro_batch_size,
            ranks=ranks,
            scaling=scaling,
            sequence_length=sequence_length,
        )._without_empty_phases()

    @classmethod
    def from_phases(
        cls,
        phases: Iterable[tuple[float, int]],
        *,
        unit: Unit = "epoch",
        dataset_size: int,
        epochs: int,
        lr: float | Schedule,
        momentum: float | Schedule = 0.0,
        tail: Tail = "carry",
        micro_batch_size: int | None = None,
        ranks: int = 1,
        scaling: Scaling = "linear",
        sequence_length: int | None = None,
    ) -> BatchPlan:
        """A plan written by hand.

        Args:
            phases: ``(epoch, batch_size)`` of each phase, epochs ascending from 0. A phase begins at the
                sample nearest to ``epoch * dataset_size``. Batches may also shrink.
            unit: ``"epoch"``: as said. ``"sample"``: a phase is ``(samples, batch_size)``. ``"token"``: it is
                ``(tokens, batch size in tokens)``, both multiples of ``sequence_length``.
            dataset_size: samples of an epoch, >= 1.
            epochs: of the run, >= 1.
            lr: a number, or a schedule in epochs, samples or, with a ``sequence_length``, tokens.
            momentum: the same, in [0, 1).
            tail: what an epoch's end does to an update; see :class:`BatchPlan`.
            micro_batch_size: see :class:`BatchPlan`.
            ranks: see :class:`BatchPlan`.
            scaling: see :class:`BatchPlan`; rates are taken as they are given.
            sequence_length: see :class:`BatchPlan`.

        Raises:
            ValueError: an argument is out of range, or a phase has no samples or no updates.

        >>> import fastlr
        >>> plan = fastlr.BatchPlan.from_phases(
        ...     [(0, 64), (0.5, 128)], dataset_size=1000, epochs=2, lr=0.1, tail="keep")
        >>> [(phase.start_sample, phase.updates) for phase in plan.phases]
        [(0, 8), (500, 12)]

        Batches of 32k tokens, and of 128k from the 2**20th on:

        >>> plan = fastlr.BatchPlan.from_phases(
        ...     [(0, 2**15), (2**20, 2**17)], unit="token", sequence_length=2**10, dataset_size=4096,
        ...     epochs=1, lr=fastlr.Cosine(3e-4, 3e-5, 2**22, unit="token"), scaling="sqrt")
        >>> plan.starts, plan.batch_sizes, plan.total_tokens
        ((0, 1024), (32, 128), 4194304)
        """
        dataset_size = count("dataset_size", dataset_size)
        if sequence_length is not None:
            sequence_length = count("sequence_length", sequence_length)
        choice("unit", unit, ("epoch", "sample", "token"))
        if unit == "token" and sequence_length is None:
            raise ValueError(
                "phases in tokens need a sequence_length, as a batch is made of samples; give it too"
            )
        pairs = []
        for pair in items("phases", phases):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ValueError(f"phases must be pairs ({unit}, batch_size), got {describe(pair)}")
            pairs.append(_phase_in_samples(pair[0], pair[1], unit, dataset_size, sequence_length or 1))
        return cls(
            starts=tuple(start for start, _ in pairs),
            batch_sizes=tuple(size for _, size in pairs),
            lr=_on_clock("lr", lr, dataset_size, sequence_length),
            momentum=_on_clock("momentum", momentum, dataset_size, sequence_length),
            dataset_size=dataset_size,
            epochs=epochs,
            tail=tail,
            micro_batch_size=micro_batch_size,
            ranks=ranks,
            scaling=scaling,
            sequence_length=sequence_length,
        )._without_empty_phases()

    def grown(self, sample: int, batch_size: int) -> BatchPlan:
        """This plan, with batches of at least ``batch_size`` from ``sample`` on. Rates stay as they are.

        So the noise scale falls: with the batch for SGD, with its square root for adaptive rules.

        Args:
            sample: at which an update begins.
            batch_size: in 1 .. ``dataset_size``. With ``tail="drop"``, what no longer fills a batch is left
                out, if need be a whole phase.

        Raises:
            ValueError: no update begins there, or batch_size is out of range.

        >>> import fastlr
        >>> plan = fastlr.BatchPlan.from_phases([(0, 100)], dataset_size=1000, epochs=2, lr=0.1)
        >>> plan.grown(300, 200).starts, plan.grown(300, 200).batch_sizes
        ((0, 300), (100, 200))
        """
        sample, size = self._updates.begin(sample), count("batch_size", batch_size)
        if sample == self.total_samples:
            raise ValueError(f"the run ends at sample {sample:,}, so no update begins there")
        starts, batch_sizes = self._updates.grown(sample, size)
        return dataclasses.replace(self, starts=starts, batch_sizes=batch_sizes)

    # -- what a plan says ----------------------------------------------------------------------------

    @property
    def total_samples(self) -> int:
        """Samples of the run, ``epochs * dataset_size``; those that a tail rule drops included."""
        return self.epochs * self.dataset_size

    @property
    def total_tokens(self) -> int | None:
        """Tokens of the run; None: the plan has no ``sequence_length``."""
        return None if self.sequence_length is None else self.total_samples * self.sequence_length

    @property
    def unit(self) -> Literal["sample", "token"]:
        """What ``lr`` and ``momentum`` count."""
        return "sample" if self.sequence_length is None else "token"

    def clock_at(self, sample: int) -> int:
        """The clock of ``lr`` and ``momentum`` at a sample: the sample itself, or the tokens before it.

        >>> import fastlr
        >>> plan = fastlr.BatchPlan.from_phases(
        ...     [(0, 4)], dataset_size=8, epochs=1, lr=0.1, sequence_length=1024)
        >>> plan.clock_at(2)
        2048
        """
        return count("sample", sample, 0) * (self.sequence_length or 1)

    @property
    def total_updates(self) -> int:
        """Updates of the run, partial ones included."""
        return self._updates.total

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The phases in order."""
        updates = self._updates
        return tuple(
            self._phase(start, stop, size, number)
            for start, stop, size, number in zip(
                self.starts, updates.stops, self.batch_sizes, updates.of_phases, strict=True
            )
        )

    def phase_at(self, sample: int) -> Phase:
        """The phase that a sample belongs to, counted over the whole run from 0."""
        sample = count("sample", sample, 0)
        if sample >= self.total_samples:
            raise ValueError(f"the run ends at sample {self.total_samples:,}, got {sample:,}")
        return self.phases[self._updates.phase_of(sample)]

    def noise_scale(self, sample: int) -> float:
        """The scale of the fluctuations at a sample, for a batch B well below the data set's N.

        For SGD, ``scaling="linear"``, that is ``lr * N / (B * (1 - momentum))``, in units of the rate. For
        adaptive rules, ``scaling="sqrt"``, it is ``lr * sqrt(N / B)``: how far noise drives a parameter in an
        epoch. Only plans of one scaling can be compared by it.

        >>> import fastlr
        >>> plan = fastlr.BatchPlan.from_phases([(0, 100)], dataset_size=1000, epochs=2, lr=0.1, momentum=0.5)
        >>> plan.noise_scale(0)
        2.0
        """
        phase = self.phase_at(sample)
        return self._phase(sample, phase.stop_sample, phase.batch_size, 0).noise_scale

    def updates_from(self, sample: int = 0) -> Iterator[Update]:
        """The updates in order, from the one that begins after ``sample`` samples.

        >>> import fastlr
        >>> plan = fastlr.BatchPlan.from_phases([(0, 4), (1, 8)], dataset_size=10, epochs=2, lr=0.1)
        >>> [(update.start, update.size) for update in plan.updates_from(4)]
        [(4, 4), (8, 2), (10, 8), (18, 2)]
        """
        return self._updates.since(sample)

    def __repr__(self) -> str:
        """As it is written in code; of many phases, how many there are, with the first and the last.

        So short a text does not tell two plans apart; ``==`` and :meth:`to_dict` do.
        """
        if len(self.starts) <= _WRITTEN:
            fields = (f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self))
            return f"BatchPlan({', '.join(fields)})"
        return (
            f"<BatchPlan of {len(self.starts):,} phases, batch {self.batch_sizes[0]:,} from sample 0 "
            f"to batch {self.batch_sizes[-1]:,} from sample {self.starts[-1]:,}; "
            f"{self.epochs:,} epochs of {self.dataset_size:,} samples, {self.total_updates:,} updates>"
        )

    def __str__(self) -> str:
        """The phases as a table."""
        return as_text(self)

    def _repr_html_(self) -> str:
        """The same table, as a notebook shows it."""
        return as_html(self)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draws batch size, rate and noise scale over the epochs. Needs matplotlib.

        Returns the figure; with ``path`` it is saved as well, in the format of the suffix.
        """
        return plotting.plot_batch_plan(self, path)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain numbers, strings, lists and dicts; :meth:`from_dict` reads it back."""
        return {
            f.name: value.to_dict()
            if isinstance(value := getattr(self, f.name), Schedule)
            else list(value)
            if isinstance(value, tuple)
            else value
            for f in dataclasses.fields(self)
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BatchPlan:
        """The plan that :meth:`to_dict` described.

        >>> import fastlr
        >>> plan = fastlr.BatchPlan.from_phases([(0, 100)], dataset_size=1000, epochs=2, lr=0.1)
        >>> fastlr.BatchPlan.from_dict(plan.to_dict()) == plan
        True
        """
        names = {f.name for f in dataclasses.fields(cls)}
        if (
            not isinstance(data, dict)
            or not {"starts", "batch_sizes", "lr", "momentum"} <= set(data) <= names
        ):
            raise ValueError(f"a plan must be what BatchPlan.to_dict() returned, got {describe(data)}")
        schedules = {name: Schedule.from_dict(data[name]) for name in ("lr", "momentum")}
        return cls(**{**data, **schedules})

    def _phase(self, start: int, stop: int, size: int, updates: int) -> Phase:
        lr, momentum = (value(self.clock_at(start)) for value in (self.lr, self.momentum))
        scale = noise_scale(lr, momentum, size, self.dataset_size, self.scaling)
        return Phase(start, stop, size, lr, self.lr(self.clock_at(stop - 1)), momentum, scale, updates)


def _phase_in_samples(
    start: Any, batch_size: Any, unit: Unit, dataset_size: int, sequence_length: int
) -> tuple[int, int]:
    if unit == "epoch":
        epoch = real("the epoch of a phase", start)
        if epoch * dataset_size >= ENDLESS:
            raise ValueError(f"the epoch of a phase must lie within the run, got {epoch!r}")
        return round(epoch * dataset_size), count("batch_size of a phase", batch_size)
    start, batch_size = count("start of a phase", start, 0), count("batch_size of a phase", batch_size)
    if unit == "sample":
        return start, batch_size
    for name, tokens in (("start", start), ("batch_size", batch_size)):
        if tokens % sequence_length:
            raise ValueError(
                f"{name} of a phase must be whole samples of {sequence_length:,} tokens, got {tokens:,}; "
                f"round it up to {tokens + -tokens % sequence_length:,}"
            )
    return start // sequence_length, batch_size // sequence_length


def _on_clock(name: str, value: float | Schedule, dataset_size: int, sequence_length: int | None) -> Schedule:
    """A number or a schedule as one on the clock of a plan, samples or tokens."""
    if not isinstance(value, Schedule):
        return Constant(real(name, value), unit="sample" if sequence_length is None else "token")
    if value.unit == "update":
        raise ValueError(
            f"{name} of phases with batches of several sizes cannot count updates; give a schedule in "
            "epochs, samples or tokens"
        )
    if value.unit == "token":
        if sequence_length is None:
            raise ValueError(f"{name} counts tokens; give the plan its sequence_length too")
        return value
    if value.unit == "epoch":
        value = value.in_samples(dataset_size)
    return value if sequence_length is None else value.in_tokens(sequence_length)
