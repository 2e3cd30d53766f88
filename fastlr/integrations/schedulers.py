"""A scheduler object for frameworks that insist on one."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, SequentialLR

from fastlr._checks import count, describe, real
from fastlr.schedules import Schedule


class ReadOnlyScheduler(LRScheduler):
    """A ``torch.optim.lr_scheduler.LRScheduler`` that reports the rates and never writes one.

    The optimizer's step moves its schedules itself. A framework that asks for a scheduler gets this one;
    calling its ``step()`` is harmless, as often as the framework likes, and so is a ``ChainedScheduler`` of
    such. ``SequentialLR`` writes rates and refuses it: join schedules instead, by ``a.then(b, at=...)``.

    Args:
        optimizer: a fastlr optimizer.

    >>> import fastlr, torch
    >>> model = torch.nn.Linear(2, 2)
    >>> opt = fastlr.FusedSGD(model.parameters(), lr=fastlr.LinearRamp(0.0, 0.5, 2))
    >>> scheduler = fastlr.integrations.ReadOnlyScheduler(opt)
    >>> opt.step()
    >>> scheduler.get_last_lr(), scheduler.get_lr()  # of the update that was made, of the next
    ([0.0], [0.25])
    >>> scheduler.step()
    >>> scheduler.get_last_lr()
    [0.25]
    """

    # LRScheduler's constructor is not called: it adds keys to the groups and wraps optimizer.step.
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
        self.optimizer = optimizer
        self.last_epoch = 0
        self.base_lrs = self.get_lr()
        self._last_lr = self.get_lr()
        self._step_count = 1

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Whose rates are reported."""
        # SequentialLR asks each of its schedulers for this before it writes "lr", and for nothing else.
        if isinstance(sys._getframe(1).f_locals.get("self"), SequentialLR):
            raise TypeError(
                "SequentialLR writes rates, which a fastlr optimizer's schedule owns, and cannot have a "
                "ReadOnlyScheduler: join the schedules themselves, lr=a.then(b, at=...), and give the "
                "framework ReadOnlyScheduler(optimizer) alone"
            )
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def get_lr(self) -> list[float | torch.Tensor]:
        """The rate that each group's next update will use."""
        rates = [group["lr"] for group in self._optimizer.param_groups]
        if any(isinstance(rate, Schedule) for rate in rates):  # which somebody has written there
            self._optimizer.sync()  # type: ignore[attr-defined]
            rates = [group["lr"] for group in self._optimizer.param_groups]
        return [rate.clone() if isinstance(rate, torch.Tensor) else rate for rate in rates]

    def get_last_lr(self) -> list[float | torch.Tensor]:
        """Each group's rate as of the last :meth:`step`, as of torch's schedulers.

        So between ``optimizer.step()`` and ``scheduler.step()`` it is the rate of the update just made.
        """
        return self._last_lr

    def step(self, epoch: float | None = None) -> None:
        """Counts the call and notes the rates of the next update; the optimizer stays as it is.

        Args:
            epoch: which one it is, where the caller counts; of a part of one the epoch is noted.
        """
        self.last_epoch = self.last_epoch + 1 if epoch is None else math.floor(epoch)
        self._step_count += 1
        self._last_lr = self.get_lr()

    def state_dict(self) -> dict[str, Any]:
        """The number of calls and the last rates; schedules and clocks are in the optimizer's state_dict.

        torch's schedulers load it as their own; those whose states hold functions or other schedulers
        (LambdaLR, CyclicLR, SequentialLR) raise a KeyError instead.
        """
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count, "_last_lr": self._last_lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores these. The state of any of torch's schedulers will do; the rates stay the optimizer's.

        Args:
            state_dict: with ``last_epoch``; where ``_step_count`` is missing it follows from that, and for
                ``_last_lr`` stand the rates that the optimizer has now.

        Raises:
            ValueError: there is no ``last_epoch``, or not one rate for each parameter group; nothing has
                changed then.
        """
        if not isinstance(state_dict, Mapping) or "last_epoch" not in state_dict:
            is_state = isinstance(state_dict, Mapping)
            got = (", ".join(map(str, state_dict)) or "nothing") if is_state else describe(state_dict)
            raise ValueError(
                f"a scheduler's state must have last_epoch, got {got}; of a ChainedScheduler's pass one of "
                "its _schedulers"
            )
        last_epoch = count("last_epoch", state_dict["last_epoch"], -1)
        step_count = count("_step_count", state_dict.get("_step_count", last_epoch + 1), 0)
        last_lr = state_dict.get("_last_lr", self.get_lr())
        groups = len(self._optimizer.param_groups)
        if not isinstance(last_lr, (list, tuple)) or len(last_lr) != groups:
            raise ValueError(
                f"_last_lr must hold the rates of {groups} parameter groups, got {describe(last_lr)}"
            )
        for place, rate in enumerate(last_lr):
            real(f"the rate of parameter group {place} in _last_lr", rate, -math.inf)
        self.last_epoch, self._step_count, self._last_lr = last_epoch, step_count, list(last_lr)
