"""The learning-rate range test: raise the rate with every update, watch the loss, read off the bounds.

:func:`range_test` runs the sweep and puts everything back as it was; :class:`RangeTestResult` reads
the curve, also one that was recorded elsewhere.
"""

from __future__ import annotations

import csv
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch

from fastlr._curve import Array, best, fit, medians, sound_part
from fastlr._snapshot import all_parameters, untouched
from fastlr.optim import FusedOptimizer
from fastlr.schedules import Exponential, LinearRamp, Schedule, Triangular2
from fastlr.schedules._base import choice, count, real
from fastlr.schedules.cyclic import Interpolation

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

__all__ = ["RangeTestResult", "range_test"]

Sweep = Literal["exponential", "linear"]
Metric: TypeAlias = Callable[[torch.Tensor, torch.Tensor], "torch.Tensor | float"]

# Losses are read from the device in blocks of this many updates: each read makes the host wait for it.
_BLOCK = 16

# Of the running mean of the losses that divergence is judged by: it averages over about ten updates.
_DECAY = 0.9


class _Reading(NamedTuple):
    base_lr: float | None = None
    max_lr: float | None = None
    steepest: float | None = None
    valley: float | None = None
    minimum: float | None = None
    reason: str | None = None


@dataclass(frozen=True, eq=False, repr=False, init=False)
class RangeTestResult:
    """The curve of a range test and what it says, or why it says nothing.

    The curve is smoothed without shifting it, on the axis of the sweep (log lr in an exponential one).
    Rates are None where the curve supports no answer; ``reason`` then says why.

    Args:
        lrs: learning rates, ascending, shape (n,).
        losses: the training loss at each, shape (n,). The curve ends before the first inf or NaN.
        accuracies: validation accuracy (or any metric for which larger is better) after the update at
            each rate, NaN where it was not measured, shape (n,); None: not measured.
        sweep: ``"exponential"`` or ``"linear"``: how the rates were raised.
        stopped: why the sweep ended before its last rate; None: it did not.
        metric_name: what ``accuracies`` holds.

    Attributes:
        max_lr: upper bound for a cyclic policy: where the accuracy stops improving, the lowest rate at which
            its smooth curve is within its standard error of its best; without accuracies, the rate at the
            lowest loss.
        base_lr: lower bound: a tenth of ``max_lr``, a rule of thumb and not a reading.
        steepest: the rate at which the loss falls fastest.
        valley: two thirds of the way from where the loss begins to fall to its minimum.
        minimum: the rate at the lowest loss.
        reason: why there are no bounds; None: there are.

    Raises:
        ValueError: the arrays differ in length, or the rates do not ascend.

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

    def __init__(
        self,
        lrs: ArrayLike,
        losses: ArrayLike,
        accuracies: ArrayLike | None = None,
        *,
        sweep: Sweep = "exponential",
        stopped: str | None = None,
        metric_name: str = "accuracy",
    ) -> None:
        choice("sweep", sweep, ("exponential", "linear"))
        arrays = {"lrs": _vector("lrs", lrs), "losses": _vector("losses", losses)}
        if accuracies is not None:
            arrays["accuracies"] = _vector("accuracies", accuracies)
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
        for name, array in arrays.items():
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        for name, value in (("sweep", sweep), ("stopped", stopped), ("metric_name", metric_name)):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        answer = (
            f"base_lr={self.base_lr:.3g}, max_lr={self.max_lr:.3g}" if self else f"reason={self.reason!r}"
        )
        return f"RangeTestResult({len(self.lrs)} updates, {answer})"

    def __bool__(self) -> bool:
        """Whether there are bounds."""
        return self.reason is None

    @property
    def _x(self) -> Array:
        return np.log(self.lrs) if self.sweep == "exponential" else self.lrs

    @property
    def measured(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Where ``accuracies`` holds a value, shape (n,)."""
        return np.zeros(len(self.lrs), bool) if self.accuracies is None else ~np.isnan(self.accuracies)

    @cached_property
    def smoothed_losses(self) -> Array:
        """The smooth curve that the rates are read from, shape (n,); NaN after training has broken down."""
        return self._smoothed(np.ones(len(self.lrs), bool), medians(self.losses))

    @cached_property
    def smoothed_accuracies(self) -> Array | None:
        """The same for the accuracies; NaN also where none was measured."""
        if self.accuracies is None:
            return None
        return -self._smoothed(self.measured, -self.accuracies[self.measured])

    def _smoothed(self, where: np.ndarray[Any, np.dtype[np.bool_]], values: Array) -> Array:
        smooth = np.full(len(self.lrs), np.nan)
        if len(values) >= 3:
            end = sound_part(values)
            smooth[np.flatnonzero(where)[:end]] = fit(self._x[where][:end], values[:end]).level
        return smooth

    @cached_property
    def _reading(self) -> _Reading:
        if len(self.lrs) < 10:
            ended = f": {self.stopped}; lower start_lr" if self.stopped else "; raise num_steps"
            return _Reading(reason=f"the curve has {len(self.lrs)} points, of 10 that are needed{ended}")
        ended_early = self.stopped is not None
        loss = best(self._x, self.losses, "the loss", spiky=True, ended_early=ended_early)
        named: dict[str, Any] = {}
        if loss.reason is None:
            level, lowest = loss.curve.level, loss.lowest
            barely_fallen = level[:lowest] > loss.start - 0.1 * (loss.start - level[lowest])
            onset = int(np.flatnonzero(barely_fallen)[-1]) if barely_fallen.any() else 0
            valley = self._x[onset] + 2 / 3 * (self._x[lowest] - self._x[onset])
            named = {
                "steepest": float(self.lrs[onset + loss.curve.slope[onset : lowest + 1].argmin()]),
                "valley": float(math.exp(valley) if self.sweep == "exponential" else valley),
                "minimum": float(self.lrs[lowest]),
            }
        rates, top = self.lrs, loss
        if self.accuracies is not None:
            rates = self.lrs[self.measured]
            if len(rates) < 6:
                few = f"{self.metric_name} was measured {len(rates)} times, of 6 that are needed"
                return _Reading(**named, reason=f"{few}; lower val_every or raise num_steps")
            x, y = self._x[self.measured], -self.accuracies[self.measured]
            top = best(x, y, f"the {self.metric_name}", spiky=False, ended_early=ended_early)
        if top.reason is not None:
            return _Reading(**named, reason=top.reason)
        max_lr = float(rates[top.lowest if self.accuracies is None else top.settled])
        return _Reading(**named, base_lr=max_lr / 10, max_lr=max_lr)

    @property
    def base_lr(self) -> float | None:
        return self._reading.base_lr

    @property
    def max_lr(self) -> float | None:
        return self._reading.max_lr

    @property
    def steepest(self) -> float | None:
        return self._reading.steepest

    @property
    def valley(self) -> float | None:
        return self._reading.valley

    @property
    def minimum(self) -> float | None:
        return self._reading.minimum

    @property
    def reason(self) -> str | None:
        return self._reading.reason

    def triangular2(
        self,
        step_size_up: float,
        step_size_down: float | None = None,
        interpolation: Interpolation = "linear",
    ) -> Triangular2:
        """The triangular2 policy between the bounds; arguments as :class:`fastlr.Triangular2`'s.

        Raises:
            ValueError: there are no bounds; the message says why.
        """
        if self.base_lr is None or self.max_lr is None:
            raise ValueError(f"the range test gives no bounds: {self.reason}")
        return Triangular2(self.base_lr, self.max_lr, step_size_up, step_size_down, interpolation)

    def plot(self, path: str | None = None) -> Figure:
        """Draws the curves and what was read from them. Needs matplotlib.

        Returns the figure; with ``path`` it is saved as well, in the format of the suffix.
        """
        from fastlr import plotting

        return plotting.plot_range_test(self, path)

    def to_csv(self, path: str | Path) -> None:
        """Writes the columns lr, loss and, where measured, the metric; one row for each update."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["lr", "loss"] + ([] if self.accuracies is None else [self.metric_name]))
            for i, row in enumerate(zip(self.lrs.tolist(), self.losses.tolist(), strict=True)):
                value = [] if self.accuracies is None else [self.accuracies[i] if self.measured[i] else ""]
                writer.writerow([*row, *value])


def _vector(name: str, values: ArrayLike) -> Array:
    array = np.array(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {array.shape}")
    return array


# -- the sweep -----------------------------------------------------------------------------------------


def range_test(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    train_loader: Iterable[Any],
    val_loader: Iterable[Any] | None = None,
    *,
    start_lr: float = 1e-5,
    end_lr: float = 1.0,
    num_steps: int = 200,
    sweep: Sweep = "exponential",
    metric: Metric | None = None,
    val_every: int = 10,
    val_batches: int | None = 8,
    diverge_factor: float = 4.0,
    progress: bool = True,
) -> RangeTestResult:
    """Trains for a moment while the rate rises from ``start_lr`` to ``end_lr``, and reads off the bounds.

    Afterwards, also after an exception, everything is bit for bit as before: parameters, buffers,
    gradients, training flags, the optimizer with its state, schedules and clock, the random numbers of
    Python, NumPy, torch and CUDA, and the generators that the loaders and their samplers hold. Random
    numbers inside loader workers that outlive the test (``persistent_workers=True``) are out of reach.

    All parameter groups sweep the same rates. A fastlr optimizer runs the sweep as its schedule; for any
    other the rate is written into its groups. Losses stay on the device and are read 16 at a time. Models
    in eval mode are put in train mode; in a model in train mode, modules in eval mode stay in it.

    Args:
        model: maps the first tensor of a batch to an output.
        optimizer: of that model's parameters, of any kind whose ``step()`` needs no closure.
        loss_fn: ``(output, target) -> scalar tensor``, as a criterion of ``torch.nn``.
        train_loader: yields pairs of tensors ``(input, target)``; begun again where it runs out. Batches
            are moved to the model's device.
        val_loader: the same for validation; None: no accuracies.
        start_lr: first rate, > 0 (>= 0 in a linear sweep).
        end_lr: last rate, > start_lr.
        num_steps: updates, >= 2.
        sweep: ``"exponential"``: equal factors; ``"linear"``: equal steps, as in Smith's paper.
        metric: ``(output, target) -> number``, larger is better; averaged over the samples. None: the part
            of the samples whose largest output is their target class. Needs a val_loader.
        val_every: updates between validations, >= 1.
        val_batches: how many batches to validate on, the same ones each time, kept on the device; None:
            all of the val_loader.
        diverge_factor: > 1. The sweep stops when the smoothed loss has risen above its lowest value by
            ``diverge_factor - 1`` times that value's size, or times the fall so far where that is more.
        progress: show a bar. Needs rich, and a terminal or notebook; elsewhere nothing is shown.

    Returns:
        The curve, up to where the loss diverged or became inf or NaN, and what it says.

    Raises:
        ValueError: an argument is out of range, a loader is empty, no parameter requires a gradient, the
            optimizer holds none of the model's parameters, or the loss is no scalar or has no gradient.
        TypeError: an argument is of the wrong kind, such as an iterator, which cannot be put back.

    >>> import fastlr, torch
    >>> model = torch.nn.Linear(4, 3)
    >>> opt = fastlr.FusedSGD(model.parameters(), momentum=0.9)
    >>> batches = [(torch.randn(32, 4), torch.randint(3, (32,))) for _ in range(20)]
    >>> found = fastlr.range_test(model, opt, torch.nn.functional.cross_entropy, batches, end_lr=10.0)
    >>> if found:
    ...     opt.set_schedule(lr=found.triangular2(step_size_up=2000))

    References:
        Smith, Cyclical Learning Rates for Training Neural Networks, arXiv 1506.01186.
    """
    schedule = _sweep_schedule(sweep, start_lr, end_lr, num_steps)
    lrs = schedule.values(0, num_steps)
    val_every = count("val_every", val_every)
    if val_batches is not None:
        val_batches = count("val_batches", val_batches)
    if metric is not None and val_loader is None:
        raise ValueError("metric needs a val_loader to be measured on")
    stop = _Stop(lrs, real("diverge_factor", diverge_factor, 1.0, above=True))
    device = _check(model, optimizer, {"train_loader": train_loader, "val_loader": val_loader})

    accuracies = np.full(num_steps, np.nan)
    with untouched(model, optimizer, (train_loader, val_loader)), _progress(num_steps, progress) as advance:
        if not model.training:
            model.train()
        if isinstance(optimizer, FusedOptimizer):
            optimizer.set_schedule(lr=schedule)
        held_out = (
            []
            if val_loader is None
            else list(islice(_batches("val_loader", val_loader, device), val_batches))
        )
        batches = _batches("train_loader", train_loader, device, endless=True)
        losses = torch.empty(0)
        for step in range(num_steps):
            if not isinstance(optimizer, FusedOptimizer):
                _write_lr(optimizer, float(lrs[step]))
            inputs, targets = next(batches)
            try:
                with torch.enable_grad():
                    loss = loss_fn(model(inputs), targets)
                    if step == 0:
                        losses = _loss_buffer(loss, num_steps)
                    losses[step] = loss.detach()
                    loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            except Exception:
                # Code may well choke on what an update with a loss of inf or NaN left behind. The losses
                # up to here tell; if they are sound, the error is the user's.
                if stop.read(losses[:step]):
                    break
                raise
            measure = held_out and (step % val_every == val_every - 1 or step == num_steps - 1)
            if (measure or step % _BLOCK == _BLOCK - 1 or step == num_steps - 1) and stop.read(
                losses[: step + 1]
            ):
                break
            if measure:
                accuracies[step] = _measure(model, held_out, metric or _accuracy)
            advance()

    size = len(stop.losses)
    return RangeTestResult(
        lrs[:size],
        stop.losses,
        None if val_loader is None else accuracies[:size],
        sweep=sweep,
        stopped=stop.reason,
        metric_name="accuracy" if metric is None else getattr(metric, "__name__", "metric"),
    )


def _sweep_schedule(sweep: str, start_lr: float, end_lr: float, num_steps: int) -> Schedule:
    choice("sweep", sweep, ("exponential", "linear"))
    start, end = real("start_lr", start_lr, above=sweep == "exponential"), real("end_lr", end_lr)
    if start >= end:
        raise ValueError(f"start_lr must be < end_lr, got start_lr={start!r}, end_lr={end!r}")
    intervals = count("num_steps", num_steps, 2) - 1
    if sweep == "linear":
        return LinearRamp(start, end, intervals)
    return Exponential(start, (end / start) ** (1 / intervals))


def _check(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, loaders: dict[str, Iterable[Any] | None]
) -> torch.device:
    """The model's device, once everything that can be seen from outside is in order."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(f"{type(optimizer).__name__}.step() needs a closure, which the sweep cannot give it")
    for name, loader in loaders.items():
        if isinstance(loader, Iterator):
            raise TypeError(
                f"{name} is an iterator, whose batches cannot be put back; pass a DataLoader or a list"
            )
    for p in all_parameters(model, optimizer):
        if torch.nn.parameter.is_lazy(p):
            raise ValueError("the model has uninitialized parameters; run one batch through it first")
    own = {id(p) for p in model.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"] if id(p) in own]
    if not held:
        raise ValueError("the optimizer holds none of the model's parameters")
    trained = [p for p in held if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the optimizer requires a gradient: the model is frozen")
    device: torch.device = trained[0].device
    return device


def _batches(
    name: str, loader: Iterable[Any], device: torch.device, *, endless: bool = False
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    while True:
        empty = True
        for batch in loader:
            if not (
                isinstance(batch, (tuple, list))
                and len(batch) == 2
                and all(isinstance(part, torch.Tensor) for part in batch)
            ):
                raise TypeError(f"{name} must yield pairs of tensors, got {type(batch).__name__}")
            empty = False
            yield batch[0].to(device, non_blocking=True), batch[1].to(device, non_blocking=True)
        if empty:
            raise ValueError(f"{name} is empty")
        if not endless:
            return


def _write_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def _loss_buffer(loss: object, size: int) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        got = (
            f"a {loss.dtype} tensor of shape {tuple(loss.shape)}"
            if isinstance(loss, torch.Tensor)
            else type(loss).__name__
        )
        raise ValueError(f"loss_fn must return a real scalar tensor, got {got}; take its mean()")
    if not loss.requires_grad:
        raise ValueError("the loss does not depend on any parameter that requires a gradient")
    return loss.new_empty((size, *loss.shape), requires_grad=False)


class _Stop:
    """Reads losses from the device and says when to stop.

    Args:
        lrs: the rate of each update.
        factor: see ``diverge_factor`` of :func:`range_test`.
    """

    def __init__(self, lrs: Array, factor: float) -> None:
        self.losses: list[float] = []
        self.reason: str | None = None
        self._lrs, self._factor = lrs, factor
        self._mean = 0.0
        self._first = self._lowest = math.nan

    def read(self, losses: torch.Tensor) -> bool:
        """Takes in the losses that it has not seen yet, up to the first that is a reason to stop."""
        for loss in losses[len(self.losses) :].flatten().tolist():
            lr = self._lrs[len(self.losses)]
            if not math.isfinite(loss):
                self.reason = f"the loss was {loss} at lr {lr:.3g}"
                return True
            self.losses.append(loss)
            self._mean = _DECAY * self._mean + (1 - _DECAY) * loss
            smooth = self._mean / (1 - _DECAY ** len(self.losses))
            if len(self.losses) == 1:
                self._first = self._lowest = smooth
            self._lowest = min(self._lowest, smooth)
            size = max(abs(self._lowest), self._first - self._lowest)
            if smooth - self._lowest > (self._factor - 1) * size:
                self.reason = f"the loss diverged at lr {lr:.3g}"
                return True
        return False


def _accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if output.ndim != target.ndim + 1 or target.is_floating_point():
        raise ValueError(
            f"no accuracy for an output of shape {tuple(output.shape)} and targets of shape "
            f"{tuple(target.shape)}, {target.dtype}; pass metric=(output, target) -> number, larger is better"
        )
    return (output.argmax(1) == target).double().mean()


@torch.no_grad()
def _measure(
    model: torch.nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]], metric: Metric
) -> float:
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    total = sum(metric(model(inputs), targets) * len(targets) for inputs, targets in batches)
    for module, training in flags:
        module.training = training
    return float(total) / sum(len(targets) for _, targets in batches)


@contextmanager
def _progress(total: int, wanted: bool) -> Iterator[Callable[[], object]]:
    """A bar for ``total`` updates, where it is wanted and can be shown; yields what moves it by one."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ModuleNotFoundError:
        wanted = False
    if not wanted:
        yield lambda: None
        return
    console = Console(stderr=True)
    shown = console.is_terminal or console.is_jupyter
    with Progress(console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("range test", total=total)
        yield lambda: bar.advance(task)
