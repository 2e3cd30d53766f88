"""From a fused optimizer to torch's, and from torch's checkpoints to a fused one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastlr.optim._from_torch import from_checkpoints
from fastlr.optim._to_torch import to_torch, torch_class


class Moving:
    """What :class:`FusedOptimizer` has for going back to torch, and for coming from its files."""

    load_state_dict: Callable[[dict[str, Any]], None]

    def to_torch(
        self, *, foreach: bool | None = None, fused: bool | None = None, capturable: bool | None = None
    ) -> tuple[torch.optim.Optimizer, Any]:
        """Torch's optimizer and scheduler that go on where this one stands: the way back from :func:`fuse`.

        They update the same parameters, and have copies of all else. A later step of this optimizer raises,
        as does what else would change it.

        Args:
            foreach, fused, capturable: how torch's step is made, as its class takes them; None: as it likes.

        Returns:
            The optimizer, and its scheduler or None, where no schedule drives anything. A schedule in
            epochs, or one that :meth:`Schedule.in_updates` made of such, is a scheduler to be stepped once
            an epoch, any other one after each update. What torch has no scheduler for is a ``LambdaLR`` over
            the schedules' values, and a warning says so.

        Raises:
            ValueError: it does what torch's optimizer does not (clipping, averages), or follows samples, or
                both updates and epochs; the message says what to do. Nothing has changed then.
            RuntimeError: something else has written a value that a schedule owns, or a block of
                :meth:`handed_over` is open.

        >>> import fastlr, torch
        >>> opt = fastlr.FusedSGD([torch.zeros(2)], lr=fastlr.StepDecay(0.1, every=30, gamma=0.5))
        >>> optimizer, scheduler = opt.to_torch()
        >>> type(optimizer).__name__, type(scheduler).__name__, scheduler.step_size
        ('SGD', 'StepLR', 30)
        """
        return to_torch(self, {"foreach": foreach, "fused": fused, "capturable": capturable})

    def load_torch(
        self,
        optimizer_state: dict[str, Any],
        scheduler_state: dict[str, Any],
        *,
        scheduler: Callable[[torch.optim.Optimizer], Any],
        updates_per_tick: int | None = None,
        horizon: int | None = None,
    ) -> None:
        """Loads checkpoints of torch's optimizer and of its scheduler, and goes on where their run was.

        The scheduler's schedules replace this optimizer's, and what no scheduler drove has the file's value.

        Args:
            optimizer_state: what ``state_dict()`` of torch's optimizer of the same rule returned.
            scheduler_state: what ``state_dict()`` of its scheduler returned.
            scheduler: the scheduler's class, or a function that makes it of an optimizer, where the file
                does not say all: ``lambda optimizer: SequentialLR(optimizer, ...)``, also of ``LambdaLR``.
            updates_per_tick, horizon: as for :func:`fuse`.

        Raises:
            TypeError, ValueError: they cannot be read; nothing has changed then.

        >>> import fastlr, torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=30, gamma=0.5)
        >>> opt = fastlr.FusedSGD([weight])
        >>> files = optimizer.state_dict(), scheduler.state_dict()
        >>> opt.load_torch(*files, scheduler=torch.optim.lr_scheduler.StepLR, updates_per_tick=1)
        >>> opt.param_groups[0]["lr_schedule"]
        StepDecay(unit='update', start=0.1, every=30, gamma=0.5)
        """
        self.load_state_dict(
            from_checkpoints(
                self,
                torch_class(self),
                optimizer_state,
                scheduler_state,
                scheduler,
                updates_per_tick,
                horizon,
            )
        )
