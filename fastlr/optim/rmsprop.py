"""RMSprop, driven by schedules."""

from __future__ import annotations

import torch
from typing_extensions import Unpack

from fastlr.optim._base import FusedOptimizer, Params
from fastlr.optim._groups import StepOptions
from fastlr.schedules import Schedule


class FusedRMSprop(FusedOptimizer):
    r"""RMSprop whose step evaluates its schedules and updates all parameters in one native pass.

    For each parameter with gradient :math:`g`, as ``torch.optim.RMSprop``::

        g = g + weight_decay * p
        v = alpha * v + (1 - alpha) * g * g
        a = alpha * a + (1 - alpha) * g             (centered)
        d = sqrt(v - a * a if centered else v) + eps
        b = momentum * b + g / d                    (with momentum, else b = g / d)
        p = p - lr * b

    Args:
        params: as for :class:`FusedAdam`.
        lr: learning rate, >= 0, or a schedule (clocked in updates, epochs, samples or tokens).
        alpha: decay of the averages, in [0, 1], or a schedule that stays there.
        eps: added to the root, >= 0.
        weight_decay: L2 penalty, >= 0, or a schedule.
        momentum: in [0, 1), or a schedule that stays there.
        centered: divide by the root of an estimate of the variance.
        maximize: ascend instead of descend.
        state_dtype, foreach, capturable, differentiable: as for :class:`FusedAdam`.
        step_options: what every optimizer takes (clipping, averages): the list is in :mod:`fastlr.optim`.

    Raises:
        ValueError: an argument is out of range; the message names it, its value and the range.

    >>> import fastlr, torch
    >>> model = torch.nn.Linear(4, 2)
    >>> opt = fastlr.FusedRMSprop(model.parameters(), lr=fastlr.Triangular(1e-4, 1e-3, 2000), momentum=0.9)
    >>> opt.param_groups[0]["lr"]
    0.0001

    References:
        Tieleman and Hinton, Lecture 6.5 of Neural Networks for Machine Learning, 2012. Graves, Generating
        Sequences With Recurrent Neural Networks, arXiv 1308.0850 (centered).
    """

    _rule = "rmsprop"

    def __init__(
        self,
        params: Params,
        lr: float | Schedule = 1e-2,
        alpha: float | Schedule = 0.99,
        eps: float = 1e-8,
        weight_decay: float | Schedule = 0.0,
        momentum: float | Schedule = 0.0,
        centered: bool = False,
        capturable: bool | None = None,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool | None = None,
        *,
        state_dtype: torch.dtype | None = None,
        **step_options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "maximize": maximize,
            "state_dtype": state_dtype,
        }
        super().__init__(
            params,
            defaults,
            {"capturable": capturable, "foreach": foreach, "differentiable": differentiable, **step_options},
        )
