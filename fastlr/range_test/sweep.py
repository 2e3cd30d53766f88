"""Running the range test."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import BuiltinMethodType, MethodType
from typing import Any

import numpy as np
import torch

from fastlr._checks import describe, flag
from fastlr._distributed import reshard
from fastlr.optim import FusedOptimizer
from fastlr.range_test.feeding import Feed, Metric
from fastlr.range_test.plan import Plan
from fastlr.range_test.progress import progress as shown_progress
from fastlr.range_test.reading import Sweep
from fastlr.range_test.record import Record, ranks
from fastlr.range_test.result import RangeTestResult
from fastlr.range_test.snapshot import (
    Backup,
    Snapshot,
    all_parameters,
    same_random_numbers,
    size,
)
from fastlr.range_test.update import Batches, Update, trained
from fastlr.range_test.validation import Validation
from fastlr.schedules import Schedule

_BACKUPS = ("device", "host", "file")


def range_test(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    train_loader: Iterable[Any] | None = None,
    val_loader: Iterable[Any] | None = None,
    *,
    step_fn: Callable[[Any], torch.Tensor] | None = None,
    start_lr: float | Sequence[float] = 1e-5,
    end_lr: float | Sequence[float] = 1.0,
    num_steps: int = 200,
    sweep: Sweep = "exponential",
    staircase: int = 1,
    metric: Metric | None = None,
    val_every: int = 10,
    val_batches: int | None = 8,
    accumulate: int = 1,
    autocast: torch.dtype | bool | None = None,
    scaler: torch.amp.GradScaler | None = None,
    repeats: int = 1,
    diverge_factor: float = 4.0,
    backup: Backup = "device",
    progress: bool = True,
) -> RangeTestResult:
    """Trains for a moment while the rate rises from ``start_lr`` to ``end_lr``, and reads off the bounds.

    The rate of update ``i`` of ``n`` is ``start_lr * (end_lr / start_lr) ** (i / (n - 1))``, or
    ``start_lr + (end_lr - start_lr) * i / (n - 1)`` in a linear sweep.

    Afterwards, also after an exception or Ctrl-C, everything is bit for bit as before: whatever can be
    reached from the model, the optimizer, the GradScaler, the loaders (their samplers, data sets, generators,
    and what they wrap) and a loss_fn, step_fn or metric that is an object, or a ``functools.partial`` that
    holds some, through attributes, slots and containers; and the random numbers of Python, NumPy, torch and
    CUDA. The objects are those of before, too.
    What cannot be put back, such as a running generator or an iterator, is refused before the sweep, by name.
    A set that the sweep has changed holds its items again, but Python has no way to promise their order:
    where it is another one the result's notes say so, and ``pop()`` may go on elsewhere in any case.
    Out of reach are the variables of functions and classes, the object of a bound method that is passed as
    loss_fn, step_fn or metric, the contents of files (also of those mapped into memory) and of memory that
    processes share, context variables and those of a thread, other processes, threads and locks, and what
    native code keeps to itself, such as a ``SimpleQueue``, an ``lru_cache``, a hash or a data base.

    Of the tensors and arrays that the loaders hold, 256 MiB are copied at most, the nearest first. Those that
    do not fit in are not copied but watched, by a checksum of their memory (on devices, and of files mapped
    into memory, by tensors' version counters, which miss what is written through ``.data``). If the sweep
    writes to them, that is an error afterwards. Of other objects and containers 256 MiB are copied, too; what
    is beyond is neither copied nor watched, which the result's notes say.

    A fastlr optimizer runs the sweep as its schedule; for any other the rate is written into its groups.
    Losses stay on the device and are read 16 at a time. From the first loss that is inf or NaN on the weights
    stay where they are, and the curve ends before it. Models in eval mode are put in train mode; in a model
    in train mode, modules in eval mode stay in it. With ``torch.distributed`` set up, every rank has to call
    this; losses and metrics are averaged over the ranks, so that all stop at the same update and get the same
    answer.

    Args:
        model: maps the input of a batch to an output; compiled models too.
        optimizer: of that model's parameters, of any kind whose ``step()`` needs no closure.
        loss_fn: ``(output, target) -> scalar tensor``, as a criterion of ``torch.nn``. None, and no step_fn:
            the model's own loss, ``model(**batch).loss`` or ``model(**batch)["loss"]``, as in transformers.
        train_loader: yields pairs ``(input, target)`` of tensors, or tuples or dicts of tensors; dicts for a
            model's own loss. Begun again where it runs out, which is said once. They are moved to the
            model's device.
        val_loader: the same for validation; None: no accuracies.
        step_fn: ``(batch) -> scalar tensor``, in place of loss_fn, for models that no signature fits. It gets
            the batch as the loader yields it.
        start_lr: first rate, > 0 (>= 0 in a linear sweep); a list gives one for each parameter group.
        end_lr: last rate, > start_lr; a list gives one for each parameter group.
        num_steps: updates, >= 2.
        sweep: ``"exponential"``: equal factors; ``"linear"``: equal steps, as in Smith's paper.
        staircase: updates with each rate, >= 1; the curve then has the mean of the losses at each rate.
        metric: ``(output, target) -> number``, with a model's own loss ``(output, batch) -> number``, with
            step_fn ``(batch) -> number``; larger is better. Called in eval mode without gradients; averaged
            over the samples (with step_fn over the batches). None: the part of the samples whose largest
            output (of a model's own ``logits``) is their target class (their ``labels``). Needs a val_loader.
        val_every: updates between validations, >= 1.
        val_batches: batches to validate on, >= 1, the same ones each time, kept in memory; None: all.
        accumulate: batches whose gradients make up one update, >= 1. The loss is their mean.
        autocast: a dtype to compute losses and metrics in where PyTorch deems it safe; True: the device's
            usual one; None or False: no autocast.
        scaler: to scale losses with, as in training. What it skips makes no point of the curve; ten skipped
            updates in a row end the sweep.
        repeats: sweeps, >= 1, from the same weights over other batches. See
            :meth:`RangeTestResult.from_repeats`.
        diverge_factor: > 1. The sweep stops when the smoothed loss has risen above its lowest value by
            ``diverge_factor - 1`` times that value's size, or times the fall so far where that is more.
        backup: where the copy of all tensors goes: ``"device"``, ``"host"``, ``"file"`` (a temporary
            one) or a path, whose file is deleted at the end. Its size is said before the sweep starts.
        progress: show a bar and say what is going on, on stderr. The bar needs rich, and a terminal or
            a notebook with ipywidgets. Without, the logger ``fastlr.range_test`` gets the sentences, as the
            result's notes do.

    Returns:
        The curve, up to where the loss diverged or became inf or NaN, and what it says.

    Raises:
        ValueError: an argument is out of range, a loader is empty, no parameter requires a gradient, the
            optimizer holds none of the model's parameters, the loss is no scalar or has no gradient, or the
            gradient is zero everywhere.
        TypeError: an argument is of the wrong kind, or it holds what cannot be put back, such as an iterator.
        MemoryError, OSError: there is no room for the backup.
        RuntimeError: called within ``torch.inference_mode()``; or, after the sweep, something could not be
            put back. The message names it, and all the rest is as before.

    >>> import fastlr, torch
    >>> model = torch.nn.Linear(4, 3)
    >>> opt = fastlr.FusedSGD(model.parameters(), momentum=0.9)
    >>> batches = [(torch.randn(32, 4), torch.randint(3, (32,))) for _ in range(200)]
    >>> found = fastlr.range_test(model, opt, torch.nn.functional.cross_entropy, batches, end_lr=10.0)
    >>> if found:
    ...     opt.set_schedule(found.triangular2(step_size_up=2000))

    References:
        Smith, Cyclical Learning Rates for Training Neural Networks, arXiv 1506.01186.
    """
    plan = Plan.checked(
        optimizer, start_lr, end_lr, num_steps, sweep, staircase, accumulate, repeats, diverge_factor
    )
    progress = flag("progress", progress)
    device = _check(
        model, optimizer, {"train_loader": train_loader, "val_loader": val_loader}, scaler, backup
    )
    assert train_loader is not None
    context = _autocast(autocast, device)
    feed = Feed.checked(model, loss_fn, step_fn, device)
    measure = Validation.checked(model, metric, val_loader, val_every, val_batches, context, feed)

    notes: list[str] = []
    main = ranks() == 1 or torch.distributed.get_rank() == 0
    results: list[RangeTestResult] = []

    def tested() -> None:
        with shown_progress(num_steps * plan.repeats, progress and main) as tell:

            def note(text: str) -> None:
                notes.append(text)
                tell.say(text)

            if plan.leap is not None:
                note(plan.leap)
            training = {"model": model, "optimizer": optimizer, "scaler": scaler}
            for name, function in {"loss_fn": loss_fn, "step_fn": step_fn, "metric": metric}.items():
                training |= _taking_part(name, function)
            loaders = {"train_loader": train_loader, "val_loader": val_loader}
            snapshot = Snapshot(training, loaders, backup)
            for remark in snapshot.remarks:
                note(remark)
            place = f"on the {backup}" if backup in ("device", "host") else "in a file"
            copy = sum(p.numel() * p.element_size() for p in trained(optimizer))
            tell.say(
                f"backup of {size(snapshot.bytes)} {place}, and {size(copy)} on the device for the sweep"
            )

            def sweeps() -> None:
                batches = Batches("train_loader", train_loader, feed.placed, note)
                measure.load()
                for repeat in range(plan.repeats):
                    if repeat > 0:
                        snapshot.rewind()
                    record = _swept(
                        model, optimizer, scaler, plan, batches, feed.loss, context, measure, tell.advance
                    )
                    results.append(plan.result(record, measure.name if measure.wanted else None))
                    if record.lost:
                        note(f"{measure.name} was inf or NaN in {record.lost} of its measurements")

            snapshot.untouched(sweeps)
            for afterthought in snapshot.afterthoughts:
                note(afterthought)
            if any(
                len(result.losses) and np.array_equal(result.losses, results[0].losses)
                for result in results[1:]
            ):
                note(
                    "repeats went over the same batches and say nothing about chance; let the loader shuffle"
                )

    same_random_numbers(tested)  # the bar draws some of Python's
    if notes:
        return RangeTestResult.from_repeats([r._replaced(notes=tuple(notes)) for r in results])
    return RangeTestResult.from_repeats(results)


def _taking_part(name: str, function: object) -> dict[str, object]:
    """What takes part in the training of something that is called, or of what a partial one is made of.

    The object of a bound method does not: that is whoever tests, with what it remembers of the test.
    """
    if isinstance(function, (MethodType, BuiltinMethodType)):
        return {}
    if not isinstance(function, partial):
        return {name: function}
    parts = {"func": function.func, **{f"args[{i}]": value for i, value in enumerate(function.args)}}
    parts |= {f"keywords[{key!r}]": value for key, value in function.keywords.items()}
    found: dict[str, object] = {}
    for part, value in parts.items():
        found |= _taking_part(f"{name}.{part}", value)
    return found


def _swept(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    plan: Plan,
    batches: Batches,
    batch_loss: Callable[[Any], torch.Tensor],
    context: Callable[[], AbstractContextManager[object]],
    measure: Validation,
    advance: Callable[[], object],
) -> Record:
    """One sweep, from the present weights."""
    if not model.training:
        model.train()
    for p in all_parameters(model, optimizer):
        p.grad = None  # so that the sweep's gradients are tensors of their own
    scheduled = isinstance(optimizer, FusedOptimizer)
    if isinstance(optimizer, FusedOptimizer):
        for group, schedule in enumerate(plan.schedules):
            optimizer.set_schedule(schedule, group=group)
    lrs = np.stack([schedule.values(0, plan.num_steps) for schedule in plan.schedules])
    update = Update(
        model, optimizer, scaler, batch_loss, plan.accumulate, context, None if scheduled else lrs
    )
    record: Record | None = None
    for step in range(plan.num_steps):
        try:
            loss, skipped = update(batches)
            if record is None:
                record = Record(lrs[0], plan.diverge_factor, held=scheduled, device=loss.device)
            record.add(loss, skipped)
            if measure.due(step, plan.num_steps):
                record.add_metric(*measure())
        except Exception:
            # Code may well choke on what a loss of inf or NaN, or an update with such gradients, left behind.
            # The losses up to here and the weights tell; if they are sound, the error is the user's.
            if record is None or batches.failed:
                raise
            record.read(alone=True)
            if record.stopped is None and not update.sound():
                record.stopped = f"weights were inf or NaN after the update at lr {lrs[0][step]:.3g}"
            if record.stopped is None:
                raise
            break
        advance()
        if record.over():
            break
    assert record is not None
    return record


def _check(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loaders: dict[str, Iterable[Any] | None],
    scaler: object,
    backup: object,
) -> torch.device:
    """The model's device, once everything that can be seen from outside is in order."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "a range test trains, which torch.inference_mode() rules out; call it outside of that"
        )
    _check_model(model)
    reshard(model.modules())  # what FSDP has made whole is none of the optimizer's parameters
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(f"{type(optimizer).__name__}.step() needs a closure, which the sweep cannot give it")
    if loaders["train_loader"] is None:
        raise TypeError("train_loader is missing")
    for name, loader in loaders.items():
        if isinstance(loader, Iterator):
            raise TypeError(
                f"{name} is an iterator, whose batches cannot be put back; pass a DataLoader or a list"
            )
        iterable = hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")
        if getattr(loader, "shape", None) == ():  # of an array, which cannot be iterated over all the same
            iterable = False
        if loader is not None and (not iterable or isinstance(loader, (str, bytes, dict))):
            raise TypeError(f"{name} must be batches to iterate over, got {type(loader).__name__}")
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
    if not (hasattr(backup, "__fspath__") or (isinstance(backup, str) and backup in _BACKUPS)):
        raise ValueError(
            f"backup must be one of {', '.join(_BACKUPS)} or a pathlib.Path, got {describe(backup)}"
        )
    for tensor in (*all_parameters(model, optimizer), *model.buffers()):
        if torch.nn.parameter.is_lazy(tensor):
            raise ValueError(
                "the model has uninitialized parameters or buffers; run one batch through it first"
            )
    if any("lr" not in group for group in optimizer.param_groups):
        raise ValueError(f"{type(optimizer).__name__} has parameter groups without an lr to sweep")
    own = {id(p) for p in model.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"] if id(p) in own]
    if not held:
        raise ValueError("the optimizer holds none of the model's parameters")
    trained = [p for p in held if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the optimizer requires a gradient: the model is frozen")
    device: torch.device = trained[0].device
    _check_wrapper(model, optimizer, device)
    return device


def _check_wrapper(model: torch.nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Raises ValueError for an optimizer around another one, or inside one, that the sweep cannot use."""
    for place, group in enumerate(optimizer.param_groups):
        owner = group.get("lr_schedule")
        if not isinstance(optimizer, FusedOptimizer) and isinstance(owner, Schedule):
            raise ValueError(
                f"{type(optimizer).__name__} wraps a fastlr optimizer in which {owner!r} owns the lr of "
                f"parameter group {place}; pass the fastlr optimizer itself, or, where each rank's has part "
                "of the parameters, as in ZeroRedundancyOptimizer, make one with a number as lr for the test"
            )
    if ranks() == 1:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    places = [place for place, p in enumerate(model.parameters()) if id(p) in held]
    digest = zlib.crc32(repr(places).encode())
    bounds = torch.tensor([digest, -digest], device=device)
    torch.distributed.all_reduce(bounds, torch.distributed.ReduceOp.MAX)
    highest, lowest = bounds.tolist()
    if highest != -lowest:
        raise ValueError(
            "each rank's optimizer holds other parameters of the model, as the one inside of a "
            "ZeroRedundancyOptimizer does; pass what updates all of them"
        )


def _check_model(model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for prefix, module in model.named_modules():
        for kind in ("_parameters", "_buffers"):
            tensors = getattr(module, kind)
            if not hasattr(tensors, "items"):
                where = f"model.{prefix}.{kind}".replace("..", ".")
                raise TypeError(f"{where} must be a dict of tensors, got {type(tensors).__name__}")
            for name, tensor in tensors.items() if isinstance(tensors, dict) else ():
                if not isinstance(tensor, (torch.Tensor, type(None))):
                    where = f"model.{prefix}.{name}".replace("..", ".")
                    raise TypeError(
                        f"{where} must be a tensor, as it is among the module's {kind}, got "
                        f"{type(tensor).__name__}; make it a plain attribute"
                    )


def _autocast(
    autocast: torch.dtype | bool | None, device: torch.device
) -> Callable[[], AbstractContextManager[object]]:
    if autocast is None or autocast is False:
        return nullcontext
    if autocast is not True and autocast not in (torch.float16, torch.bfloat16):
        raise ValueError(f"autocast must be torch.float16, torch.bfloat16, True or None, got {autocast!r}")
    dtype = None if autocast is True else autocast
    return lambda: torch.autocast(device.type, dtype=dtype)
