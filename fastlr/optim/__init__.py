"""Optimizers whose native step evaluates its schedules and updates every parameter in one go."""

from __future__ import annotations

from fastlr.optim._base import FusedOptimizer
from fastlr.optim._groups import Clock
from fastlr.optim.adadelta import FusedAdadelta
from fastlr.optim.adagrad import FusedAdagrad
from fastlr.optim.adam import FusedAdam, FusedAdamW
from fastlr.optim.cyclic import FusedCyclicAdam, FusedCyclicAdamW, FusedCyclicSGD
from fastlr.optim.grad_scaler import GradScaler
from fastlr.optim.lion import FusedLion
from fastlr.optim.rmsprop import FusedRMSprop
from fastlr.optim.sgd import FusedSGD

__all__ = [
    "Clock",
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
]
