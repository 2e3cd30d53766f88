"""SGD with momentum, driven by schedules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from typing_extensions import Self, Unpack

from fastlr._checks import flag
from fastlr.optim._base import FusedOptimizer, Params
from fastlr.optim._groups import TorchOptions, check_torch_options
from fastlr.schedules import ExpRange, Schedule, Triangular, Triangular2
from fastlr.schedules.cyclic import Interpolation

Mode = Literal["triangular", "triangular2", "exp_range"]

# The arguments that make up a cyclic learning rate.
_LR_CYCLE = ("base_lr", "max_lr", "step_size_up", "step_size_down", "mode", "gamma", "interpolation")


class FoundBounds(Protocol):
    """What a range test found."""

    @property
    def reason(self) -> str | None:
        """Why there are no bounds; None: there are."""

    def bounds(self) -> Sequence[tuple[float, float]]:
        """``(base_lr, max_lr)`` of each parameter group; one pair where all share it."""


class FusedSGD(FusedOptimizer):
    r"""SGD with momentum whose step evaluates its schedules and updates all parameters in one native pass.

    For each parameter with gradient :math:`g`, as ``torch.optim.SGD`` and bit for bit the same in
    float32 and float64::

        g = g + weight_decay * p
        m = momentum * m + (1 - dampening) * g      (first update: m = g)
        u = g + momentum * m if nesterov else m
        p = p - lr * u

    This differs from Sutskever et al., who multiply lr into the buffer. Half types are computed in
    float32 and rounded once on each store.

    Args:
        params: parameters, named parameters or parameter groups, as for any torch optimizer: dense
            tensors of float16, bfloat16, float32, float64 or a complex type, of any shape and strides.
        lr: learning rate, >= 0, or a schedule (clocked in updates or samples).
        momentum: in [0, 1), or a schedule that stays there.
        dampening: of the gradient that enters the buffer.
        weight_decay: L2 penalty, >= 0.
        nesterov: Nesterov momentum; needs a momentum and no dampening.
        maximize: ascend instead of descend.
        momentum_dtype: None keeps momentum in the parameter's type; ``torch.float32`` keeps it in
            float32 (complex64 for complex parameters).
        foreach, fused, capturable, differentiable: as torch's optimizers take them, for code that passes
            them on. A step is always fused, can be captured in CUDA graphs and is not differentiable; what
            asks for something else is an error.

    Each of them may stand in a parameter group. ``param_groups[i]["lr"]`` is a float: what the next
    step will use; its owner stands under ``"lr_schedule"``, a schedule or None.

    Raises:
        ValueError: an argument is out of range; the message names it, its value and the range.

    >>> import fastlr, torch
    >>> model = torch.nn.Linear(4, 2)
    >>> opt = fastlr.FusedSGD(model.parameters(), lr=fastlr.Cosine(0.1, 0.0, 100), momentum=0.9)
    >>> for _ in range(100):
    ...     model(torch.ones(8, 4)).square().mean().backward()
    ...     opt.step()
    ...     opt.zero_grad()
    >>> opt.param_groups[0]["lr"], opt.clock()
    (0.0, Clock(updates=100, samples=0))
    """

    _rule = "sgd"

    def __init__(
        self,
        params: Params,
        lr: float | Schedule = 1e-3,
        momentum: float | Schedule = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        momentum_dtype: torch.dtype | None = None,
        **torch_options: Unpack[TorchOptions],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "maximize": maximize,
                "momentum_dtype": momentum_dtype,
            },
            torch_options,
        )

    def _checked(self, group: dict[str, Any], where: str, *, new: bool = False) -> dict[str, Any]:
        dtype = group["momentum_dtype"]
        if dtype is not None and dtype is not torch.float32:
            raise ValueError(f"momentum_dtype{where} must be None or torch.float32, got {dtype!r}")
        values = super()._checked(group, where, new=new)
        # Chosen together; in a group in use momentum may be set to zero, as in torch.
        without = values["momentum"] == 0.0 and group["momentum_schedule"] is None
        if new and values["nesterov"] and without:
            raise ValueError(f"momentum{where} must be > 0 with nesterov=True, got {group['momentum']!r}")
        return values


class FusedCyclicSGD(FusedSGD):
    """:class:`FusedSGD` on a cyclic learning rate, in the words of ``torch.optim.lr_scheduler.CyclicLR``.

    Args:
        params: as for :class:`FusedSGD`. A group, also one that is added later, may have cycle arguments of
            its own where they differ (``base_lr``, ``max_lr``, ``mode``, ...), or a schedule as its ``lr``.
            A number as ``lr``, which groups that another optimizer has used bring, is an error.
        base_lr: lower bound of the cycles, >= 0; a list gives one for each group.
        max_lr: upper bound, >= base_lr; a list gives one for each group.
        step_size_up: updates from base_lr to max_lr; two to ten epochs are usual.
        step_size_down: updates back; default: as step_size_up.
        mode: ``"triangular"``, ``"triangular2"`` (height halved after each cycle) or ``"exp_range"``
            (height times ``gamma ** updates``).
        gamma: of exp_range only, > 0.
        cycle_momentum: cycle the momentum against the rate. Off unless given (PyTorch: on).
        base_momentum, max_momentum: its bounds (0.8 and 0.9 unless given); only with cycle_momentum.
        interpolation: shape of the cycle, see :class:`fastlr.Triangular`.
        decay_base: let exp_range's lower bound decline too, as in Smith's paper.
        momentum: fixed momentum; not with cycle_momentum.
        dampening, weight_decay, nesterov, maximize, momentum_dtype, foreach, fused, capturable,
            differentiable: as for :class:`FusedSGD`.

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
        base_lr: float | list[float],
        max_lr: float | list[float],
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
        momentum: float | None = None,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        momentum_dtype: torch.dtype | None = None,
        **torch_options: Unpack[TorchOptions],
    ) -> None:
        check_torch_options(dict(torch_options), f"{type(self).__name__}()")
        self._cycle: dict[str, Any] = {
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
        }
        for name in ("base_lr", "max_lr"):
            bounds = self._cycle[name]
            if isinstance(bounds, (list, tuple)):
                groups = _as_groups(params)
                if len(bounds) != len(groups):
                    raise ValueError(f"{name} has {len(bounds)} values for {len(groups)} groups")
                params = [{name: b} | g for b, g in zip(bounds, groups, strict=True)]
        super().__init__(
            params,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            momentum_dtype=momentum_dtype,
            **torch_options,
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
            params: as for :class:`FusedCyclicSGD`; of a model as it was tested.
            found: the range test's result, a :class:`fastlr.RangeTestResult`.
            step_size_up: updates from base_lr to max_lr; two to ten epochs are usual.
            mode: as for :class:`FusedCyclicSGD`.
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
        return cls(
            params,
            list(base) if several else base[0],
            list(top) if several else top[0],
            step_size_up,
            mode=mode,
            **options,
        )

    def _in_own_words(self, param_group: dict[str, Any], where: str) -> dict[str, Any]:
        if "lr" in param_group and (given := [key for key in _LR_CYCLE if key in param_group]):
            raise ValueError(f"a group takes lr or {', '.join(given)}, not both")
        own = {key: value for key, value in param_group.items() if key in self._cycle}
        group = {key: value for key, value in param_group.items() if key not in self._cycle}
        cycle = _cycle_schedules(**{**self._cycle, **own})
        lr = group.get("lr", cycle["lr"])
        if not isinstance(lr, Schedule):
            # Of a group that another optimizer has used, too. CyclicLR would cycle it all the same.
            raise ValueError(
                f"lr{where} is {lr!r}, but FusedCyclicSGD cycles the rate of every group; leave lr out "
                f"of the group, or keep its rate fixed by lr=fastlr.Constant({lr!r})"
            )
        for name in cycle:
            if (owner := group.get(f"{name}_schedule")) is not None:
                raise ValueError(
                    f"{name}_schedule{where} is {owner!r}, of another optimizer, but FusedCyclicSGD sets the "
                    f"{name} itself; leave {name}_schedule out of the group"
                )
        return {**cycle, **group}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cycle": self._cycle}


def _as_groups(params: Params) -> list[Any]:
    """Parameters as a list of groups; what is wrong with them is left to PyTorch to say."""
    items: list[Any] = list(params)
    return items if items and isinstance(items[0], dict) else [{"params": items}]


def _cycle_schedules(
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
    momentum: float | None,
) -> dict[str, float | Schedule]:
    """A group's ``lr`` and ``momentum`` from CyclicLR's arguments."""
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

    lr = policy(base_lr, max_lr, inverted=False)
    if not cycle_momentum:
        for name, value in (("base_momentum", base_momentum), ("max_momentum", max_momentum)):
            if value is not None:
                raise ValueError(f"{name}={value!r} needs cycle_momentum=True")
        return {"lr": lr, "momentum": 0.0 if momentum is None else momentum}
    if momentum is not None:
        raise ValueError(
            f"momentum={momentum!r} cannot be fixed and cycled; leave it out and give base_momentum and "
            "max_momentum, or pass cycle_momentum=False"
        )
    low = 0.8 if base_momentum is None else base_momentum
    high = 0.9 if max_momentum is None else max_momentum
    return {"lr": lr, "momentum": policy(low, high, inverted=True)}
