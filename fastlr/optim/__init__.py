"""Optimizers whose native step evaluates its schedules and updates every parameter in one go.

Every optimizer takes, by keyword, besides the arguments of its rule, for all groups together:

    max_grad_norm: what the 2-norm of all gradients as one vector is clipped to before the update, > 0; None:
        it is not. An attribute, too: :attr:`FusedOptimizer.max_grad_norm`.
    nonfinite: where that norm is inf or NaN: ``"skip"`` the update, or ``"raise"``. An attribute, too:
        :attr:`FusedOptimizer.nonfinite`.

and as defaults, of which a parameter group may have its own:

    ema_decay: keeps an average of each parameter, that part of which stays at each update: in [0, 1), or a
        schedule that stays there; None: none is kept. See :meth:`FusedOptimizer.averaged_weights`.
    ema_warmup: let the decay grow from 0.1: ``min(ema_decay, (1 + t) / (10 + t))`` after t updates.
    ema_dtype: ``torch.float32`` keeps the averages of half parameters in float32, which wider ones do in
        their own type; None keeps all in their parameter's type.
    max_grad_value: gradients without GradScaler's scale are clipped to [-max_grad_value, max_grad_value]
        element by element, as by ``clip_grad_value_`` (of complex ones either part), before their norm is
        measured and clipped; > 0; None: they are not.
    cautious: decoupled weight decay spares what the rule moves away from zero (arXiv 2510.12402):
        ``p = p * (1 - lr * weight_decay)`` only where ``u * p >= 0``, u being what ``p = p - lr * u`` takes.
    master_weights: half parameters are updated as if they were float32, and their state is float32. What
        a bfloat16 lacks of its float32 master is kept in ``state[p]["master"]``: 16 bits (int16), to a
        float16 all of it (float32). Other parameters stay as they are.
    stochastic_rounding: a bfloat16 parameter is rounded up or down by chance, in proportion to the
        distances, so that small updates count on average. Not for float16; wider ones stay as they are.
    rounding_seed: of that chance, a number in [0, 2**32 - 1], whole or not; the same in all processes that
        hold the same parameters.

What they and the state cost in memory is in docs/memory.md.

>>> import fastlr, torch
>>> model = torch.nn.Linear(4, 2)
>>> groups = [{"params": [model.weight]}, {"params": [model.bias], "ema_decay": None}]
>>> opt = fastlr.FusedLion(groups, max_grad_norm=1.0, ema_decay=0.9999)
>>> opt.max_grad_norm, [group["ema_decay"] for group in opt.param_groups]
(1.0, [0.9999, None])
"""

from __future__ import annotations

from fastlr.optim._base import FusedOptimizer
from fastlr.optim._groups import Clock, EpochClock, TokenClock
from fastlr.optim.adadelta import FusedAdadelta
from fastlr.optim.adagrad import FusedAdagrad
from fastlr.optim.adam import FusedAdam, FusedAdamW
from fastlr.optim.convert import fuse
from fastlr.optim.cyclic import FusedCyclicAdam, FusedCyclicAdamW, FusedCyclicSGD
from fastlr.optim.grad_scaler import GradScaler
from fastlr.optim.lion import FusedLion
from fastlr.optim.rmsprop import FusedRMSprop
from fastlr.optim.sgd import FusedSGD

__all__ = [
    "Clock",
    "EpochClock",
    "FusedAdadelta",
    "FusedAdagrad",
    "FusedAdam",
    "FusedAdamW",
    "FusedCyclicAdam",
    "FusedCyclicAdamW",
    "FusedCyclicSGD",
    "FusedLion",
    "FusedOptimizer",
    "FusedRMSprop",
    "FusedSGD",
    "GradScaler",
    "TokenClock",
    "fuse",
]
