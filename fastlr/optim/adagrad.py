"""Adagrad, driven by schedules."""

from __future__ import annotations

import torch
from typing_extensions import Unpack

from fastlr.optim._base import FusedOptimizer, Params
from fastlr.optim._groups import StepOptions
from fastlr.schedules import Schedule


class FusedAdagrad(FusedOptimizer):
    r"""Adagrad whose step evaluates its schedules and updates all parameters in one native pass.

    For each parameter with gradient :math:`g`, at its own t-th applied update, as ``torch.optim.Adagrad``::

        g = g + weight_decay * p
        a = a + g * g                               (first: a = initial_accumulator_value)
        p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(a) + eps)

    Args:
        params: as for :class:`FusedAdam`. Unlike torch's, the state of a parameter is made at its first
            update (a ``state_dict`` has that of all), and gradients are dense.
        lr: learning rate, >= 0, or a schedule (clocked in updates, epochs, samples or tokens).
        lr_decay: >= 0.
        weight_decay: L2 penalty, >= 0, or a schedule.
        initial_accumulator_value: where the sums of squares begin, >= 0. A group may have its own, which
            torch's leaves aside: there all begin with the constructor's.
        eps: added to the root, >= 0.
        maximize: ascend instead of descend.
        state_dtype, foreach, differentiable, fused: as for :class:`FusedAdam`.
        step_options: what every optimizer takes (clipping, averages): the list is in :mod:`fastlr.optim`.

    Raises:
        ValueError: an argument is out of range; the message names it, its value and the range.

    >>> import fastlr, torch
    >>> model = torch.nn.Linear(4, 2)
    >>> opt = fastlr.FusedAdagrad(model.parameters(), lr=fastlr.Triangular(1e-3, 1e-2, 2000))
    >>> opt.param_groups[0]["lr"]
    0.001

    References:
        Duchi, Hazan and Singer, Adaptive Subgradient Methods, JMLR 12, 2011.
    """

    _rule = "adagrad"

    def __init__(
        self,
        params: Params,
        lr: float | Schedule = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float | Schedule = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool | None = None,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        **step_options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "maximize": maximize,
            "state_dtype": state_dtype,
        }
        super().__init__(
            params,
            defaults,
            {"foreach": foreach, "differentiable": differentiable, "fused": fused, **step_options},
        )
