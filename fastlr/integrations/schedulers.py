"""A scheduler object for frameworks that insist on one."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler


class ReadOnlyScheduler(LRScheduler):
    """A ``torch.optim.lr_scheduler.LRScheduler`` that reports the rates and never writes one.

    The optimizer's step moves its schedules itself. A framework that asks for a scheduler gets this one;
    calling its ``step()`` is harmless, as often as the framework likes.

    Args:
        optimizer: a fastlr optimizer.

    >>> import fastlr, torch
    >>> model = torch.nn.Linear(2, 2)
    >>> opt = fastlr.FusedSGD(model.parameters(), lr=fastlr.Cosine(0.1, 0.0, 100))
    >>> scheduler = fastlr.integrations.ReadOnlyScheduler(opt)
    >>> scheduler.step()
    >>> scheduler.get_last_lr()
    [0.1]
    """

    # LRScheduler's constructor is not called: it adds keys to the groups and wraps optimizer.step.
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
        self.optimizer = optimizer
        self.last_epoch = 0
        self.base_lrs = self.get_lr()
        self._step_count = 1

    def get_lr(self) -> list[float | torch.Tensor]:
        """The rate that each group's next update will use."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_last_lr(self) -> list[float | torch.Tensor]:
        """As :meth:`get_lr`."""
        return self.get_lr()

    def step(self, epoch: int | None = None) -> None:
        """Counts the call and changes nothing else."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._step_count += 1

    def state_dict(self) -> dict[str, Any]:
        """The number of calls; rates and clocks are in the optimizer's state_dict."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the number of calls."""
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict["_step_count"]
