"""transformers: optimizer and scheduler for its Trainer in one call, and a range test before its training.

Not imported with fastlr: ``import fastlr.integrations.transformers``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from fastlr._checks import describe
from fastlr.integrations.schedulers import ReadOnlyScheduler
from fastlr.optim import FusedAdamW, FusedOptimizer, GradScaler
from fastlr.range_test import RangeTestResult, range_test

# Not by name: what mypy sees must not depend on which version is installed, if any.
transformers: Any = import_module("transformers")


def optimizers(
    model: torch.nn.Module,
    args: Any = None,
    optimizer: type[FusedOptimizer] = FusedAdamW,
    **options: Any,
) -> tuple[FusedOptimizer, ReadOnlyScheduler]:
    """For ``Trainer(optimizers=...)``: an optimizer with Trainer's groups, and a scheduler that reports.

    The first group decays; biases and norms, as ``Trainer.get_decay_parameter_names`` tells them, are the
    second and do not. Frozen parameters are in none.

    Args:
        model: that Trainer gets.
        args: its ``TrainingArguments``; ``weight_decay``, and for Adam's rules ``adam_beta1``, ``adam_beta2``
            and ``adam_epsilon``, are taken from there unless they are given. Its learning rate and scheduler
            are not: they are ``lr``. None: nothing is.
        optimizer: one of fastlr's classes.
        **options: its arguments, above all ``lr``: a number or a schedule in updates, which accumulated
            batches count once. One in samples or tokens stands still unless a callback moves its clock.

    Raises:
        TypeError: there is no ``lr``, or the optimizer is no class of fastlr's.
        ValueError: an argument is out of range, or no parameter requires a gradient.

    >>> import fastlr, torch, fastlr.integrations.transformers
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
    >>> opt, scheduler = fastlr.integrations.transformers.optimizers(
    ...     model, lr=fastlr.Cosine(1e-3, 0.0, 500), weight_decay=0.1)
    >>> [(len(group["params"]), group["weight_decay"]) for group in opt.param_groups]
    [(1, 0.1), (3, 0.0)]
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, FusedOptimizer)):
        raise TypeError(
            f"optimizer must be a class of fastlr's, such as fastlr.FusedAdamW, got {optimizer!r}"
        )
    if args is not None and not hasattr(args, "weight_decay"):
        raise TypeError(
            f"args must be TrainingArguments or None, got {describe(args)}; the class of the optimizer comes "
            "behind it"
        )
    known = inspect.signature(optimizer).parameters
    has_bounds = "base_lr" in known  # a cyclic optimizer, which takes lr only where somebody insists
    if not has_bounds and options.get("lr") is None:
        raise TypeError(
            "lr is missing: give a number or a schedule. args.learning_rate and args.lr_scheduler_type are "
            "not read; what Trainer has by default is lr=fastlr.LinearRamp(5e-5, 0.0, number_of_updates)"
        )
    if args is not None:
        options.setdefault("weight_decay", args.weight_decay)
        if "betas" in known and "eps" in known:
            options.setdefault("betas", (args.adam_beta1, args.adam_beta2))
            options.setdefault("eps", args.adam_epsilon)
    decayed = set(transformers.Trainer.get_decay_parameter_names(None, model))  # which uses no self
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires a gradient: the model is frozen")
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in trained if name in decayed]},
        {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
    ]
    made = optimizer(groups, **options)
    return made, ReadOnlyScheduler(made)


class RangeTest(transformers.TrainerCallback):  # type: ignore[misc]
    """A range test on the Trainer's own batches before its first update, after which all is as before.

    The loss is the model's own; ``gradient_accumulation_steps``, mixed precision and the clipping of
    ``max_grad_norm`` are the Trainer's. A resumed training is not tested again.

    Args:
        show: print the result's summary.
        **options: of :func:`fastlr.range_test`, such as ``end_lr`` or ``val_loader``.

    Attributes:
        result: the :class:`fastlr.RangeTestResult`; None before training.

    Raises:
        RuntimeError: there are several processes, whose gradients Trainer averages and this would not.
    """

    def __init__(self, *, show: bool = True, **options: Any) -> None:
        inspect.signature(range_test).bind_partial(**options)  # raises TypeError now, and not in training
        self.show, self.options = show, options
        self.result: RangeTestResult | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **training: Any) -> None:
        """Called by the Trainer."""
        if state.global_step > 0:
            return
        if args.world_size > 1:
            raise RuntimeError(
                f"RangeTest cannot test on {args.world_size} processes: no callback is given the model that "
                "averages their gradients; run it with one, or call fastlr.range_test() before the training"
            )
        optimizer = training["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # out of accelerate's
        options = {
            "train_loader": training["train_dataloader"],
            "accumulate": args.gradient_accumulation_steps,
        }
        if args.fp16:
            options["scaler"] = GradScaler(args.device.type)
        model = training["model"]
        with _clipping(model, optimizer, args.max_grad_norm or 0.0):
            self.result = range_test(model, optimizer, **{**options, **self.options})
        if self.show:
            print(self.result.summary())


@contextmanager
def _clipping(model: torch.nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> Iterator[None]:
    """Each step clips as the Trainer would, where max_norm is > 0."""

    def clip(*_: Any) -> None:
        scale = getattr(optimizer, "grad_scale", None)  # of gradients that the step unscales itself
        torch.nn.utils.clip_grad_norm_(
            model.parameters(), max_norm if scale is None else max_norm * float(scale)
        )

    if max_norm <= 0.0:
        yield
        return
    hook = optimizer.register_step_pre_hook(clip)
    try:
        yield
    finally:
        hook.remove()
