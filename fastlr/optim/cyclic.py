"""The optimizers on a cyclic learning rate, in the words of ``torch.optim.lr_scheduler.CyclicLR``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from typing_extensions import Self, Unpack

from fastlr._checks import describe, flag, is_sequence, number, real
from fastlr.optim._base import FusedOptimizer, Params
from fastlr.optim._driving import scaled_for
from fastlr.optim._groups import TorchOptions, check_step_options
from fastlr.optim.adam import Betas, FusedAdam, FusedAdamW
from fastlr.optim.sgd import FusedSGD
from fastlr.schedules import ExpRange, Schedule, Triangular, Triangular2
from fastlr.schedules.cyclic import Interpolation

Mode = Literal["triangular", "triangular2", "exp_range"]

# The arguments that make up a cyclic learning rate.
_LR_CYCLE = ("base_lr", "max_lr", "step_size_up", "step_size_down", "mode", "gamma", "interpolation")

# A bound of the cycles, or one for each group.
Bounds: TypeAlias = float | Sequence[float] | np.ndarray[Any, Any]


class FoundBounds(Protocol):
    """What a range test found."""

    def bounds(self) -> list[tuple[float, float]]:
        """(base_lr, max_lr), one pair or one for each group; raises ValueError where there are none."""


class CyclicOptimizer(FusedOptimizer):
    """What the cyclic optimizers share: each group's rate, and its momentum if asked for, is a cycle."""

    _cycle: dict[str, Any]

    # Frameworks that make an optimizer with lr=... alone are to hear of it, and not that base_lr is missing.
    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        if "lr" in options and "base_lr" not in options and len(arguments) < 2:
            raise TypeError(
                f"lr must come with base_lr and max_lr, which make the rate of {cls.__name__}(), got "
                f"{describe(options['lr'])} alone{cls._instead()}"
            )
        return super().__new__(cls)

    @classmethod
    def _instead(cls) -> str:
        return (
            f"; for code that insists on lr use {cls.__name__.replace('Cyclic', '')} with "
            "lr=fastlr.Triangular(base_lr, max_lr, step_size_up), or Triangular2 or ExpRange"
        )

    def _set_cycle(self, params: Params, lr: object, cycle: dict[str, Any]) -> Params:
        """Keeps the cycle of all groups; returns the parameters with what is each group's own."""
        self._cycle = cycle
        for name in ("base_lr", "max_lr"):
            bounds = cycle[name]
            if getattr(bounds, "ndim", 0):  # an array, a tensor
                bounds = cycle[name] = bounds.tolist()
            if is_sequence(bounds):
                groups = _as_groups(params)
                if len(bounds) != len(groups):
                    raise ValueError(f"{name} has {len(bounds)} values for {len(groups)} groups")
                params = [{name: b} | g for b, g in zip(bounds, groups, strict=True)]
        if lr is not None:
            self._check_lr(lr)
        return params

    def _check_lr(self, lr: object) -> None:
        """Raises for an ``lr`` that is none of the cycles' rates."""
        base, top = (
            [real(name, bound) for bound in (bounds if is_sequence(bounds) else [bounds])]
            for name, bounds in (("base_lr", self._cycle["base_lr"]), ("max_lr", self._cycle["max_lr"]))
        )
        low, high, instead = min(base), max(top), type(self)._instead()
        if not low <= number("lr", lr, "a number between base_lr and max_lr", instead) <= high:
            raise ValueError(
                f"lr must be between base_lr and max_lr, which make the rate of {type(self).__name__}(), in "
                f"[{low!r}, {high!r}], got {describe(lr)}{instead}"
            )

    @classmethod
    def from_range_test(
        cls,
        params: Params,
        found: FoundBounds,
        step_size_up: float = 2000,
        *,
        mode: Mode = "triangular2",
        **options: Any,
    ) -> Self:
        """Cycles between the bounds that a range test found, each group between its own where it has them.

        Args:
            params: as for the class; of a model as it was tested.
            found: the range test's result.
            step_size_up: updates from base_lr to max_lr, >= 0; two to ten epochs are usual.
            mode: as for the class.
            options: its other arguments.

        Raises:
            ValueError: the range test gives no bounds; the message says why.

        >>> import fastlr, numpy as np, torch
        >>> lrs = np.geomspace(1e-4, 10, 200)
        >>> found = fastlr.RangeTestResult(lrs, 2 + np.log10(lrs / 0.1) ** 2 / 4)
        >>> model = torch.nn.Linear(4, 2)
        >>> opt = fastlr.FusedCyclicSGD.from_range_test(model.parameters(), found, 500, momentum=0.9)
        >>> opt.param_groups[0]["lr"] == found.base_lr
        True
        """
        base, top = zip(*found.bounds(), strict=True)
        several = len(base) > 1
        make: Any = cls  # one of the classes below, which have these arguments
        return make(  # type: ignore[no-any-return]
            params,
            list(base) if several else base[0],
            list(top) if several else top[0],
            step_size_up,
            mode=mode,
            **options,
        )

    def _in_own_words(self, param_group: dict[str, Any], where: str) -> dict[str, Any]:
        param_group = super()._in_own_words(param_group, where)
        if "lr" in param_group and (given := [key for key in _LR_CYCLE if key in param_group]):
            raise ValueError(f"a group takes lr or {', '.join(given)}, not both")
        own = {key: value for key, value in param_group.items() if key in self._cycle}
        group = {key: value for key, value in param_group.items() if key not in self._cycle}
        cycle = {**self._cycle, **own}
        driven = self._momentum(cycle, _cycles(**cycle))
        if not {"base_lr", "max_lr"} & own.keys():
            driven["lr"] = scaled_for(group, driven["lr"], where)
        lr = group.get("lr", driven["lr"])
        if not isinstance(lr, Schedule):
            # Of a group that another optimizer has used, too. CyclicLR would cycle it all the same.
            raise ValueError(
                f"lr{where} is {lr!r}, but {type(self).__name__} cycles the rate of every group; leave lr "
                f"out of the group, or keep its rate fixed by lr=fastlr.Constant({lr!r})"
            )
        for option in self._options.scheduled:
            name = option.name
            owner = group.get(f"{name}_schedule")
            if owner is not None and (name in driven or option.tuple in driven):
                raise ValueError(
                    f"{name}_schedule{where} is {owner!r}, of another optimizer, but {type(self).__name__} "
                    f"sets the {name} itself; leave {name}_schedule out of the group"
                )
        return {**driven, **group}

    def _momentum(self, cycle: dict[str, Any], cycles: _Cycles) -> dict[str, Any]:
        """A group's ``lr`` and what the rule has as momentum, cycled or not."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cycle": self._cycle}


class FusedCyclicSGD(CyclicOptimizer, FusedSGD):
    """:class:`FusedSGD` on a cyclic learning rate, in the words of ``torch.optim.lr_scheduler.CyclicLR``.

    Args:
        params: as for :class:`FusedSGD`. A group, also one that is added later, may have cycle arguments of
            its own where they differ (``base_lr``, ``max_lr``, ``mode``, ...), or a schedule as its ``lr``.
            A number as ``lr``, which groups that another optimizer has used bring, is an error.
        base_lr: lower bound of the cycles, >= 0; a list, tuple or array gives one for each group.
        max_lr: upper bound, >= base_lr; or one for each group.
        step_size_up: updates from base_lr to max_lr, >= 0; two to ten epochs are usual.
        step_size_down: updates back, >= 0; default: as step_size_up. Both together are at least 1.
        mode: ``"triangular"``, ``"triangular2"`` (height halved after each cycle) or ``"exp_range"``
            (height times ``gamma ** updates``).
        gamma: of exp_range only, > 0.
        cycle_momentum: cycle the momentum against the rate. Off unless given (PyTorch: on).
        base_momentum, max_momentum: its bounds in [0, 1), 0.8 and 0.9 unless given; only with it.
        interpolation: shape of the cycle, see :class:`fastlr.Triangular`.
        decay_base: let exp_range's lower bound decline too, as in Smith's paper.
        lr: for frameworks that insist on giving one: a number in [base_lr, max_lr], which changes nothing.
        momentum: fixed momentum; not with cycle_momentum.
        dampening, weight_decay, nesterov, maximize: as for :class:`FusedSGD`.
        decoupled_weight_decay, state_dtype, momentum_dtype: as for :class:`FusedSGD`.
        foreach, fused, capturable, differentiable: as for :class:`FusedSGD`.
        step_options: what every optimizer takes (clipping, averages): the list is in :mod:`fastlr.optim`.

    Raises:
        ValueError: an argument is out of range, or belongs to an option that is off.

    >>> import fastlr, torch
    >>> model = torch.nn.Linear(4, 2)
    >>> opt = fastlr.FusedCyclicSGD(model.parameters(), base_lr=0.001, max_lr=0.006,
    ...                             step_size_up=2000, mode="triangular2", momentum=0.9)
    >>> opt.param_groups[0]["lr"], opt.param_groups[0]["lr_schedule"](2000)
    (0.001, 0.006)

    References:
        Smith, Cyclical Learning Rates for Training Neural Networks, arXiv 1506.01186.
    """

    def __init__(
        self,
        params: Params,
        base_lr: Bounds,
        max_lr: Bounds,
        step_size_up: float = 2000,
        step_size_down: float | None = None,
        mode: Mode = "triangular",
        gamma: float = 1.0,
        *,
        cycle_momentum: bool = False,
        base_momentum: float | None = None,
        max_momentum: float | None = None,
        interpolation: Interpolation = "linear",
        decay_base: bool = False,
        lr: float | None = None,
        momentum: float | None = None,
        dampening: float = 0.0,
        weight_decay: float | Schedule = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        state_dtype: torch.dtype | None = None,
        momentum_dtype: torch.dtype | None = None,
        **step_options: Unpack[TorchOptions],
    ) -> None:
        check_step_options(dict(step_options), f"{type(self).__name__}()")
        params = self._set_cycle(
            params,
            lr,
            {
                "base_lr": base_lr,
                "max_lr": max_lr,
                "step_size_up": step_size_up,
                "step_size_down": step_size_down,
                "mode": mode,
                "gamma": gamma,
                "cycle_momentum": cycle_momentum,
                "base_momentum": base_momentum,
                "max_momentum": max_momentum,
                "interpolation": interpolation,
                "decay_base": decay_base,
                "momentum": momentum,
            },
        )
        super().__init__(
            params,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            decoupled_weight_decay=decoupled_weight_decay,
            state_dtype=state_dtype,
            momentum_dtype=momentum_dtype,
            **step_options,
        )

    def _momentum(self, cycle: dict[str, Any], cycles: _Cycles) -> dict[str, Any]:
        fixed = cycle["momentum"]
        if cycles.momentum is None:
            return {"lr": cycles.lr, "momentum": 0.0 if fixed is None else fixed}
        if fixed is not None:
            raise ValueError(
                f"momentum={fixed!r} cannot be fixed and cycled; leave it out and give base_momentum and "
                "max_momentum, or pass cycle_momentum=False"
            )
        return {"lr": cycles.lr, "momentum": cycles.momentum}


class FusedCyclicAdam(CyclicOptimizer, FusedAdam):
    """:class:`FusedAdam` on a cyclic learning rate, in the words of ``torch.optim.lr_scheduler.CyclicLR``.

    Args:
        params, base_lr, max_lr, step_size_up, step_size_down, mode, gamma, interpolation, decay_base, lr: as
            for :class:`FusedCyclicSGD`.
        cycle_momentum: cycle beta1 against the rate, as CyclicLR does with Adam. Off unless given.
        base_momentum, max_momentum: its bounds in [0, 1), 0.8 and 0.9 unless given; only with it.
        betas: fixed ones; with cycle_momentum the first is cycled, and only 0.9 or max_momentum may stand
            there.
        weight_decay: as for :class:`FusedAdam`, or, in :class:`FusedCyclicAdamW`, :class:`FusedAdamW`; None:
            what it is there unless given.
        eps, amsgrad, maximize, state_dtype, foreach, fused, capturable, differentiable: as for
            :class:`FusedAdam`.
        step_options: what every optimizer takes (clipping, averages): the list is in :mod:`fastlr.optim`.

    Raises:
        ValueError: an argument is out of range, or belongs to an option that is off.

    >>> import fastlr, torch
    >>> model = torch.nn.Linear(4, 2)
    >>> opt = fastlr.FusedCyclicAdam(model.parameters(), base_lr=1e-4, max_lr=1e-3, step_size_up=500,
    ...                              cycle_momentum=True)
    >>> opt.param_groups[0]["lr"], opt.param_groups[0]["betas"]
    (0.0001, (0.9, 0.999))
    """

    def __init__(
        self,
        params: Params,
        base_lr: Bounds,
        max_lr: Bounds,
        step_size_up: float = 2000,
        step_size_down: float | None = None,
        mode: Mode = "triangular",
        gamma: float = 1.0,
        *,
        cycle_momentum: bool = False,
        base_momentum: float | None = None,
        max_momentum: float | None = None,
        interpolation: Interpolation = "linear",
        decay_base: bool = False,
        lr: float | None = None,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Schedule | None = None,
        amsgrad: bool = False,
        maximize: bool = False,
        state_dtype: torch.dtype | None = None,
        **step_options: Unpack[TorchOptions],
    ) -> None:
        check_step_options(dict(step_options), f"{type(self).__name__}()")
        params = self._set_cycle(
            params,
            lr,
            {
                "base_lr": base_lr,
                "max_lr": max_lr,
                "step_size_up": step_size_up,
                "step_size_down": step_size_down,
                "mode": mode,
                "gamma": gamma,
                "cycle_momentum": cycle_momentum,
                "base_momentum": base_momentum,
                "max_momentum": max_momentum,
                "interpolation": interpolation,
                "decay_base": decay_base,
                "betas": betas,
            },
        )
        decay: dict[str, Any] = {} if weight_decay is None else {"weight_decay": weight_decay}
        super().__init__(
            params,
            eps=eps,
            amsgrad=amsgrad,
            maximize=maximize,
            state_dtype=state_dtype,
            **decay,
            **step_options,
        )

    def _momentum(self, cycle: dict[str, Any], cycles: _Cycles) -> dict[str, Any]:
        betas = cycle["betas"]
        if cycles.momentum is None or not is_sequence(betas) or not betas:
            return {"lr": cycles.lr, "betas": betas}  # whose form is looked at with the rest of the group
        beta1, *rest = betas
        if isinstance(beta1, Schedule) or beta1 not in (0.9, cycles.momentum.max):
            raise ValueError(
                f"betas={betas!r}: the first cannot be fixed and cycled; give its bounds as base_momentum "
                "and max_momentum, or pass cycle_momentum=False"
            )
        return {"lr": cycles.lr, "betas": (cycles.momentum, *rest)}


class FusedCyclicAdamW(FusedCyclicAdam, FusedAdamW):
    """:class:`FusedAdamW` on a cyclic learning rate; arguments as for :class:`FusedCyclicAdam`.

    The weight decay, 0.01 unless given, is decoupled: at each update the parameter shrinks by lr times it.
    What every optimizer takes (clipping, averages) is listed in :mod:`fastlr.optim`.

    >>> import fastlr, torch
    >>> model = torch.nn.Linear(4, 2)
    >>> opt = fastlr.FusedCyclicAdamW(model.parameters(), base_lr=1e-4, max_lr=1e-3, step_size_up=500,
    ...                               mode="triangular2", weight_decay=0.05)
    >>> opt.param_groups[0]["lr"], opt.param_groups[0]["lr_schedule"](500)
    (0.0001, 0.001)
    """


class _Cycles(NamedTuple):
    """A group's cycles."""

    lr: Triangular
    momentum: Triangular | None


def _cycles(
    *,
    base_lr: float,
    max_lr: float,
    step_size_up: float,
    step_size_down: float | None,
    mode: str,
    gamma: float,
    cycle_momentum: bool,
    base_momentum: float | None,
    max_momentum: float | None,
    interpolation: Interpolation,
    decay_base: bool,
    **_: object,
) -> _Cycles:
    """From CyclicLR's arguments."""
    if mode not in ("triangular", "triangular2", "exp_range"):
        raise ValueError(f"mode must be triangular, triangular2 or exp_range, got {mode!r}")
    cycle_momentum = flag("cycle_momentum", cycle_momentum)
    decay_base = flag("decay_base", decay_base)
    if mode != "exp_range" and (gamma != 1.0 or decay_base):
        raise ValueError(
            f'gamma={gamma!r}, decay_base={decay_base!r} belong to mode="exp_range", got mode={mode!r}'
        )

    def policy(base: float, top: float, *, inverted: bool) -> Triangular:
        sizes = (step_size_up, step_size_down, interpolation)
        if mode == "exp_range":
            return ExpRange(
                base,
                top,
                *sizes,
                gamma=gamma,
                decay_base=decay_base and not inverted,
                inverted=inverted,
            )
        kind = Triangular2 if mode == "triangular2" else Triangular
        return kind(base, top, *sizes, inverted=inverted)

    lr = policy(*_ordered("base_lr", base_lr, "max_lr", max_lr), inverted=False)
    if not cycle_momentum:
        for name, value in (("base_momentum", base_momentum), ("max_momentum", max_momentum)):
            if value is not None:
                raise ValueError(f"{name}={value!r} needs cycle_momentum=True")
        return _Cycles(lr, None)
    low = number("base_momentum", 0.8 if base_momentum is None else base_momentum)
    high = number("max_momentum", 0.9 if max_momentum is None else max_momentum)
    if low < 1.0:  # what reaches 1 the option's own range refuses
        low, high = _ordered("base_momentum", low, "max_momentum", high)
    return _Cycles(lr, policy(low, high, inverted=True))


def _ordered(low_name: str, low: float, high_name: str, high: float) -> tuple[float, float]:
    """The bounds of a cycle as floats, under the names that they were given by.

    Raises:
        ValueError: one of them is none, or they are swapped.
    """
    low, high = real(low_name, low), real(high_name, high)
    if high < low:
        raise ValueError(
            f"{high_name} must be >= {low_name}, got {low_name}={low!r}, {high_name}={high!r}; swap them"
        )
    return low, high


def _as_groups(params: Params) -> list[Any]:
    """Parameters as a list of groups; what is wrong with them is left to PyTorch to say."""
    items: list[Any] = list(params)
    return items if items and isinstance(items[0], dict) else [{"params": items}]
