"""Optimizers whose native step evaluates its schedules and updates every parameter in one go."""

from __future__ import annotations

from fastlr.optim._base import Clock, FusedOptimizer
from fastlr.optim.sgd import FusedCyclicSGD, FusedSGD

__all__ = ["Clock", "FusedCyclicSGD", "FusedOptimizer", "FusedSGD"]
