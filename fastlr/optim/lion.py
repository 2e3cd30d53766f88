"""Lion, driven by schedules."""

from __future__ import annotations

import torch
from typing_extensions import Unpack

from fastlr.optim._base import FusedOptimizer, Params
from fastlr.optim._groups import TorchOptions
from fastlr.optim.adam import Betas
from fastlr.schedules import Schedule


class FusedLion(FusedOptimizer):
    r"""Lion whose step evaluates its schedules and updates all parameters in one native pass.

    For each parameter with gradient :math:`g`::

        p = p - lr * weight_decay * p
        p = p - lr * sign(beta1 * m + (1 - beta1) * g)
        m = beta2 * m + (1 - beta2) * g

    Its updates are larger than Adam's: the authors take a rate three to ten times lower, and a weight decay
    as many times higher. A NaN among the gradients becomes one in the parameter.

    Args:
        params: as for :class:`FusedAdam`.
        lr: learning rate, >= 0, or a schedule (clocked in updates, epochs, samples or tokens).
        betas: decay of the average in the update, and of the average that is kept, each in [0, 1), or a
            schedule that stays there. :meth:`set_schedule` takes ``beta1`` and ``beta2`` alone, too.
        weight_decay: decoupled, >= 0, or a schedule.
        maximize: ascend instead of descend.
        state_dtype, foreach, fused, capturable, differentiable: as for :class:`FusedAdam`.
        step_options: what every optimizer takes (clipping, averages): the list is in :mod:`fastlr.optim`.

    Raises:
        ValueError: an argument is out of range; the message names it, its value and the range.

    >>> import fastlr, torch
    >>> model = torch.nn.Linear(4, 2)
    >>> opt = fastlr.FusedLion(model.parameters(), lr=fastlr.Triangular2(1e-5, 1e-4, 2000), weight_decay=0.1)
    >>> opt.param_groups[0]["lr"]
    1e-05

    References:
        Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675.
    """

    _rule = "lion"

    def __init__(
        self,
        params: Params,
        lr: float | Schedule = 1e-4,
        betas: Betas = (0.9, 0.99),
        weight_decay: float | Schedule = 0.0,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype | None = None,
        **step_options: Unpack[TorchOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "state_dtype": state_dtype,
        }
        super().__init__(params, defaults, step_options)
