"""Adam and AdamW, driven by schedules."""

from __future__ import annotations

from typing import TypeAlias

import torch
from typing_extensions import Unpack

from fastlr.optim._base import FusedOptimizer, Params
from fastlr.optim._groups import TorchOptions, check_step_options
from fastlr.schedules import Schedule

Betas: TypeAlias = tuple[float | Schedule, float | Schedule]


class FusedAdam(FusedOptimizer):
    r"""Adam whose step evaluates its schedules and updates all parameters in one native pass.

    For each parameter with gradient :math:`g`, at its own t-th applied update, as ``torch.optim.Adam``::

        g = g + weight_decay * p                    (decoupled_weight_decay: p = p - lr * weight_decay * p)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        n = max(n, v) if amsgrad else v
        p = p - lr / (1 - beta1 ** t) * m / (sqrt(n) / sqrt(1 - beta2 ** t) + eps)

    float32 and float64 equal ``torch.optim.Adam(foreach=False)`` bit for bit, but for its square roots where
    those are not rounded correctly (see ``csrc/rules/adam.h``). Half types are computed in float32 and
    rounded once on each store.

    Args:
        params: parameters, named parameters or parameter groups, as for any torch optimizer: dense
            tensors of float16, bfloat16, float32, float64 or a complex type, of any shape and strides.
        lr: learning rate, >= 0, or a schedule (clocked in updates, epochs, samples or tokens).
        betas: decay of the averages of gradients and of their squares, each in [0, 1), or a schedule that
            stays there. Bias correction takes the present ones, as torch's does: ``1 - beta ** t``.
        eps: added to the root, >= 0.
        weight_decay: L2 penalty, >= 0, or a schedule.
        amsgrad: divide by the largest average of squares so far.
        maximize: ascend instead of descend.
        decoupled_weight_decay: shrink the parameter by ``lr * weight_decay`` instead of adding to the
            gradient, as :class:`FusedAdamW` always does.
        state_dtype: None keeps the averages in the parameter's type; ``torch.float32`` keeps them in
            float32 (complex64 for complex parameters).
        foreach, fused, capturable, differentiable: as torch's optimizers take them, for code that passes
            them on. A step is always fused, can be captured in CUDA graphs and is not differentiable; what
            asks for something else is an error.
        step_options: what every optimizer takes (clipping, averages): the list is in :mod:`fastlr.optim`.

    Each of them may stand in a parameter group. ``param_groups[i]["betas"]`` is a tuple of floats: what the
    next step will use; their owners stand under ``"beta1_schedule"`` and ``"beta2_schedule"``.
    :meth:`set_schedule` takes ``beta1`` and ``beta2`` alone, too.

    Raises:
        ValueError: an argument is out of range; the message names it, its value and the range.

    >>> import fastlr, torch
    >>> model = torch.nn.Linear(4, 2)
    >>> lr, beta1 = fastlr.one_cycle(max_lr=0.01, total_steps=100)
    >>> opt = fastlr.FusedAdam(model.parameters(), lr=lr, betas=(beta1, 0.999))
    >>> for _ in range(100):
    ...     model(torch.ones(8, 4)).square().mean().backward()
    ...     opt.step()
    ...     opt.zero_grad()
    >>> opt.clock(), opt.param_groups[0]["betas"]
    (Clock(updates=100, samples=0), (0.95, 0.999))

    References:
        Kingma and Ba, Adam, arXiv 1412.6980. Reddi, Kale and Kumar, On the Convergence of Adam and Beyond,
        ICLR 2018. Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101.
    """

    _rule = "adam"

    def __init__(
        self,
        params: Params,
        lr: float | Schedule = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Schedule = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        state_dtype: torch.dtype | None = None,
        **step_options: Unpack[TorchOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
            "state_dtype": state_dtype,
        }
        super().__init__(params, defaults, step_options)


class FusedAdamW(FusedAdam):
    r""":class:`FusedAdam` with decoupled weight decay, as ``torch.optim.AdamW``.

    Before each update ``p = p * (1 - lr * weight_decay)``, with the rate of that update.

    Args:
        params, lr, betas, eps, amsgrad, maximize, state_dtype, foreach, fused, capturable, differentiable: as
            for :class:`FusedAdam`.
        weight_decay: >= 0, or a schedule.
        step_options: what every optimizer takes (clipping, averages): the list is in :mod:`fastlr.optim`.

    Raises:
        ValueError: an argument is out of range; the message names it, its value and the range.

    >>> import fastlr, torch
    >>> model = torch.nn.Linear(4, 2)
    >>> lr = fastlr.Triangular2(1e-4, 1e-3, step_size_up=2000)
    >>> opt = fastlr.FusedAdamW(model.parameters(), lr=lr, weight_decay=0.05)
    >>> opt.param_groups[0]["lr"]
    0.0001
    """

    _fixed = {"decoupled_weight_decay": True}  # noqa: RUF012

    def __init__(
        self,
        params: Params,
        lr: float | Schedule = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Schedule = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype | None = None,
        **step_options: Unpack[TorchOptions],
    ) -> None:
        check_step_options(dict(step_options), f"{type(self).__name__}()")
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            decoupled_weight_decay=True,
            state_dtype=state_dtype,
            **step_options,
        )
