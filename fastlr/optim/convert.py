"""From torch's optimizer and scheduler to a fused optimizer, in the middle of a run too."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import torch

from fastlr._checks import describe
from fastlr.optim._base import FusedOptimizer
from fastlr.optim._from_torch import driven_by, kept_by, plain
from fastlr.optim._replaced import CHANGES, is_replaced, own_method, replace
from fastlr.optim._scheduler_tables import every
from fastlr.optim.adadelta import FusedAdadelta
from fastlr.optim.adagrad import FusedAdagrad
from fastlr.optim.adam import FusedAdam, FusedAdamW
from fastlr.optim.rmsprop import FusedRMSprop
from fastlr.optim.sgd import FusedSGD
from fastlr.schedules import Schedule

# By torch's classes, those that inherit from another one of them first.
_FUSED: dict[type[torch.optim.Optimizer], type[FusedOptimizer]] = {
    torch.optim.AdamW: FusedAdamW,
    torch.optim.Adam: FusedAdam,
    torch.optim.SGD: FusedSGD,
    torch.optim.RMSprop: FusedRMSprop,
    torch.optim.Adagrad: FusedAdagrad,
    torch.optim.Adadelta: FusedAdadelta,
}

# What would change a scheduler, and what to do in place of each.
_STEPS = "leave the call out, as its own step() moves the schedule"
_OF_SCHEDULERS = {
    "step": _STEPS,
    "step_update": _STEPS,
    "load_state_dict": "its own state_dict() has the schedule; files of torch's go to its load_torch()",
}


def fuse(
    optimizer: torch.optim.Optimizer,
    scheduler: Any = None,
    *,
    updates_per_tick: int | None = None,
    horizon: int | None = None,
) -> FusedOptimizer:
    """The fused optimizer that goes on where torch's optimizer and scheduler stand, in mid-run too.

    It updates the same parameters, and has copies of all else: groups with their names, rates and options,
    state, step hooks, and the scheduler's position as its clock. A later ``step()`` of the old optimizer or
    scheduler raises, as does what else would change them. Call it between two updates, after
    ``scheduler.step()`` where that was due.

    Args:
        optimizer: a ``torch.optim.SGD``, ``Adam``, ``AdamW``, ``RMSprop``, ``Adagrad`` or ``Adadelta``.
        scheduler: what drives it, of ``torch.optim.lr_scheduler`` or ``timm.scheduler``, or None. Without one
            the clock is at zero, as torch's optimizers have none: :meth:`FusedOptimizer.set_clock` sets it.
        updates_per_tick: how many updates there are to one ``scheduler.step()``, >= 1: 1 where it stands in
            the loop over batches, ``len(loader)`` where it is called once an epoch. Needed with a scheduler,
            as neither object knows.
        horizon: how many updates the whole run has, those already made included, for schedulers without a
            formula (``LambdaLR``, ``MultiplicativeLR``, timm's and your own): that many values are tabulated.

    Returns:
        The fused optimizer of the same rule.

    Raises:
        TypeError, ValueError: what is given cannot be moved over; the message says why and what to do.
            Nothing has changed then.

    >>> import fastlr, torch
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=30, gamma=0.5)
    >>> opt = fastlr.fuse(optimizer, scheduler, updates_per_tick=100)
    >>> opt.param_groups[0]["lr_schedule"].schedule
    StepDecay(unit='epoch', start=0.1, every=30, gamma=0.5)
    """
    kind = _kind_of(optimizer)
    left = any("initial_lr" in group for group in optimizer.param_groups)  # by timm's alone, too
    if scheduler is None and (left or hasattr(optimizer.step, "_wrapped_by_lr_sched")):
        warnings.warn(
            f"the {type(optimizer).__name__} has a scheduler, which was not given: its rates stay as they "
            "are. Pass it, fuse(optimizer, scheduler, updates_per_tick=...), to take it over.",
            UserWarning,
            stacklevel=2,
        )
    driven = driven_by(optimizer, scheduler, updates_per_tick, horizon)
    fused = _copied(optimizer, kind, driven, kept_by(scheduler))
    new = f"fastlr.fuse() has turned into a {kind.__name__}"
    for each in [] if scheduler is None else every(scheduler):
        replace(each, new, _OF_SCHEDULERS, ("state_dict", "get_last_lr") if each is scheduler else ())
    # Last, as a scheduler's class may object.
    replace(optimizer, new, {name: f"call {name}() of that one" for name in CHANGES}, ("state_dict",))
    return fused


def _kind_of(optimizer: torch.optim.Optimizer) -> type[FusedOptimizer]:
    """The class that takes an optimizer's place; raises for what cannot be moved over."""
    name = type(optimizer).__name__
    if isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"optimizer is a {name}, which is fused; give it schedules with set_schedule()")
    torch_kind = next((kind for kind in _FUSED if isinstance(optimizer, kind)), None)
    if torch_kind is None:
        known = ", ".join(sorted(kind.__name__ for kind in _FUSED))
        wraps = isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer)
        if wraps or not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be one of torch.optim ({known}), got "
                f"{name if wraps else describe(optimizer)}; where a framework wraps one, pass the optimizer "
                "inside"
            )
        raise TypeError(f"optimizer must be one of torch.optim's {known}, got {name}; keep that one")
    if is_replaced(optimizer):
        raise ValueError(f"the {name} was given to fastlr.fuse() before; go on with what that returned")
    if method := own_method(optimizer, torch_kind):
        raise ValueError(
            f"{name} has a {method}() of its own, which fastlr.{_FUSED[torch_kind].__name__} would not do; "
            f"pass a plain torch.optim.{torch_kind.__name__}, and what a step does besides give to a hook "
            "(register_step_pre_hook, register_step_post_hook)"
        )
    for place, group in enumerate(optimizer.param_groups):
        if group.get("differentiable"):
            raise ValueError(
                f"differentiable of parameter group {place} is True, and no gradient flows through a fused "
                "step; keep torch's optimizer"
            )
        for option in optimizer.defaults:
            held = group.get(option)
            for value in held if isinstance(held, (tuple, list)) else (held,):
                if isinstance(value, Schedule):
                    raise TypeError(
                        f"{option} of parameter group {place} is a schedule, {describe(value)}, which "
                        "torch's step takes for no number; write one there, and the schedule into what "
                        "fuse() returns"
                    )
        for number, p in enumerate(group["params"]):
            if p.grad is not None and p.grad.layout is not torch.strided:
                raise ValueError(
                    f"the gradient of parameter {number} of group {place}, shape {tuple(p.shape)}, is sparse "
                    f"({p.grad.layout}), and fused steps take dense ones; make its layer with sparse=False"
                )
    return _FUSED[torch_kind]


def _copied(
    optimizer: torch.optim.Optimizer, kind: Any, driven: list[dict[str, Any]], kept: tuple[str, ...]
) -> FusedOptimizer:
    """A fused optimizer over the same parameters with all that torch's holds.

    Args:
        kind: its class.
        driven: what its groups hold besides.
        kept: what the scheduler has kept in torch's groups.
    """
    arguments = inspect.signature(kind.__init__).parameters
    options = optimizer.defaults
    # Also left there by a file of ours that torch's optimizer has loaded.
    left = {*kind([torch.zeros(1)]).defaults, *kept} - {*options}
    groups = []
    for group in optimizer.param_groups:
        names = group.get("param_names")
        params = list(group["params"]) if names is None else list(zip(names, group["params"], strict=True))
        # Beside a momentum that is 0 now a step takes nesterov, and a constructor does not.
        later = {*left, "params", "param_names", "nesterov"}
        groups.append({**plain(group, options, later), "params": params})
    others = {name for name in options if name not in arguments}
    fused: FusedOptimizer = kind(groups, **plain(options, options, {*others, "nesterov"}))
    if "nesterov" in options:
        fused.defaults["nesterov"] = options["nesterov"]
    saved = optimizer.state_dict()
    of_rule = {*fused._rule_state.slots, "step"}  # which loading copies
    state = {
        key: {name: each if name in of_rule else copy.deepcopy(each) for name, each in entry.items()}
        for key, entry in saved["state"].items()
    }
    saved_groups = [
        {**plain(group, options, left), **found}
        for group, found in zip(saved["param_groups"], driven, strict=True)
    ]
    fused.load_state_dict({"state": state, "param_groups": saved_groups})
    fused._optimizer_step_pre_hooks.update(optimizer._optimizer_step_pre_hooks)
    fused._optimizer_step_post_hooks.update(optimizer._optimizer_step_post_hooks)
    return fused
