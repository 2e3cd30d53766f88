"""Adadelta, driven by schedules."""

from __future__ import annotations

import torch
from typing_extensions import Unpack

from fastlr.optim._base import FusedOptimizer, Params
from fastlr.optim._groups import StepOptions
from fastlr.schedules import Schedule


class FusedAdadelta(FusedOptimizer):
    r"""Adadelta whose step evaluates its schedules and updates all parameters in one native pass.

    For each parameter with gradient :math:`g`, as ``torch.optim.Adadelta``::

        g = g + weight_decay * p
        v = rho * v + (1 - rho) * g * g
        d = sqrt(a + eps) / sqrt(v + eps) * g
        a = rho * a + (1 - rho) * d * d
        p = p - lr * d

    Args:
        params: as for :class:`FusedAdam`.
        lr: learning rate, >= 0, or a schedule (clocked in updates, epochs, samples or tokens). In the paper
            it is 1.
        rho: decay of the averages, in [0, 1], or a schedule that stays there.
        eps: added under both roots, >= 0.
        weight_decay: L2 penalty, >= 0, or a schedule.
        maximize: ascend instead of descend.
        state_dtype, foreach, capturable, differentiable: as for :class:`FusedAdam`.
        step_options: what every optimizer takes (clipping, averages): the list is in :mod:`fastlr.optim`.

    Raises:
        ValueError: an argument is out of range; the message names it, its value and the range.

    >>> import fastlr, torch
    >>> model = torch.nn.Linear(4, 2)
    >>> opt = fastlr.FusedAdadelta(model.parameters(), lr=fastlr.Triangular(0.1, 1.0, 2000))
    >>> opt.param_groups[0]["lr"]
    0.1

    References:
        Zeiler, ADADELTA: An Adaptive Learning Rate Method, arXiv 1212.5701.
    """

    _rule = "adadelta"

    def __init__(
        self,
        params: Params,
        lr: float | Schedule = 1.0,
        rho: float | Schedule = 0.9,
        eps: float = 1e-6,
        weight_decay: float | Schedule = 0.0,
        foreach: bool | None = None,
        *,
        capturable: bool | None = None,
        maximize: bool = False,
        differentiable: bool | None = None,
        state_dtype: torch.dtype | None = None,
        **step_options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "rho": rho,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "state_dtype": state_dtype,
        }
        super().__init__(
            params,
            defaults,
            {"foreach": foreach, "capturable": capturable, "differentiable": differentiable, **step_options},
        )
