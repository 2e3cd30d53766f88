"""Learning-rate and momentum schedules: small immutable values, evaluated by the native code.

A schedule is a pure function of a clock, which counts applied updates, consumed samples or tokens, or
epochs (``unit``). It holds no optimizer and no state: give it to :class:`fastlr.FusedSGD` as ``lr`` or
``momentum``, call it, plot it, join it to another.

>>> import fastlr
>>> warmup = fastlr.LinearRamp(0.0, 0.1, steps=500)
>>> schedule = warmup.then(fastlr.Cosine(0.1, 0.0, steps=8500))
>>> schedule(0), schedule(250), schedule(500), schedule(9000)
(0.0, 0.05, 0.1, 0.0)
"""

from fastlr.schedules._base import InSamples, InTokens, Joined, PerEpoch, Scaled, Schedule
from fastlr.schedules.composed import Shifted, Tabulated
from fastlr.schedules.cyclic import (
    ExpRange,
    OneCycle,
    OneCycleMomentum,
    Triangular,
    Triangular2,
    one_cycle,
)
from fastlr.schedules.decay import (
    Constant,
    Cosine,
    CosineWarmRestarts,
    Exponential,
    InverseSqrt,
    LinearRamp,
    MultiStep,
    OneMinusSqrt,
    Polynomial,
    StepDecay,
    TimeBased,
)
from fastlr.schedules.recipes import (
    cosine_with_warmup,
    inverse_sqrt,
    noam,
    tri_stage,
    warmup_stable_decay,
    with_warmup,
)

__all__ = [
    "Constant",
    "Cosine",
    "CosineWarmRestarts",
    "ExpRange",
    "Exponential",
    "InSamples",
    "InTokens",
    "InverseSqrt",
    "Joined",
    "LinearRamp",
    "MultiStep",
    "OneCycle",
    "OneCycleMomentum",
    "OneMinusSqrt",
    "PerEpoch",
    "Polynomial",
    "Scaled",
    "Schedule",
    "Shifted",
    "StepDecay",
    "Tabulated",
    "TimeBased",
    "Triangular",
    "Triangular2",
    "cosine_with_warmup",
    "inverse_sqrt",
    "noam",
    "one_cycle",
    "tri_stage",
    "warmup_stable_decay",
    "with_warmup",
]
