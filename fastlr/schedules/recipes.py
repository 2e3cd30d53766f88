"""Schedules of today's recipes, in a word: warm-ups and decays joined as their authors write them.

Each is a :class:`Schedule` like any other. What else is to be warmed up is given to
:func:`with_warmup`.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

from fastlr._checks import choice, count, real
from fastlr.schedules._base import Schedule, Unit, schedule
from fastlr.schedules.decay import Constant, Cosine, Exponential, InverseSqrt, LinearRamp, OneMinusSqrt

# How a rate falls from one value to another.
Fall: TypeAlias = Literal["linear", "cosine", "1-sqrt"]
_FALLS: dict[str, type[LinearRamp] | type[Cosine] | type[OneMinusSqrt]] = {
    "linear": LinearRamp,
    "cosine": Cosine,
    "1-sqrt": OneMinusSqrt,
}


def with_warmup(after: Schedule, warmup_steps: int, start_lr: float = 0.0) -> Schedule:
    """A linear warm-up from ``start_lr`` to a schedule's first value, and then that schedule from its zero.

    Args:
        after: what is warmed up.
        warmup_steps: clock units of its unit, >= 0; 0: none.
        start_lr: >= 0.

    >>> from fastlr import StepDecay
    >>> with_warmup(StepDecay(1.0, every=100, gamma=0.5), 4).values(0, 6).tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """
    peak = schedule("after", after)(0)
    steps = count("warmup_steps", warmup_steps, 0)
    ramp = LinearRamp(real("start_lr", start_lr), peak, max(steps, 1), unit=after.unit)
    return ramp.then(after) if steps else after


def cosine_with_warmup(
    max_lr: float,
    warmup_steps: int,
    total_steps: int,
    *,
    start_lr: float = 0.0,
    end_lr: float = 0.0,
    cooldown_steps: int = 0,
    unit: Unit = "update",
) -> Schedule:
    """A linear warm-up, half a cosine down to ``end_lr``, and ``end_lr`` for a while.

    transformers' ``get_cosine_schedule_with_warmup`` (``end_lr = 0``) and
    ``get_cosine_with_min_lr_schedule_with_warmup``; timm's ``CosineLRScheduler`` with ``warmup_prefix=True``,
    whose ``warmup_lr_init`` is ``start_lr``, and its ``cooldown_epochs``.

    Args:
        max_lr: after the warm-up, >= 0.
        warmup_steps: clock units, >= 0.
        total_steps: of warm-up and cosine, > ``warmup_steps``.
        start_lr, end_lr: >= 0.
        cooldown_steps: at ``end_lr``, >= 0; beyond them the value stays, without a warning while it lasts.
        unit: what the clock counts.

    >>> schedule = cosine_with_warmup(1.0, warmup_steps=10, total_steps=110)
    >>> schedule(0), schedule(5), schedule(10), round(schedule(60), 9), schedule(110)
    (0.0, 0.5, 1.0, 0.5, 0.0)
    """
    cooldown = count("cooldown_steps", cooldown_steps, 0)
    end = real("end_lr", end_lr)
    fall = Cosine(real("max_lr", max_lr), end, _after(warmup_steps, total_steps), unit=unit)
    whole = with_warmup(fall, warmup_steps, start_lr)
    return whole.then(Constant(end, unit=unit)) if cooldown else whole


def warmup_stable_decay(
    max_lr: float,
    warmup_steps: int,
    stable_steps: int,
    decay_steps: int,
    *,
    decay: Fall = "1-sqrt",
    start_lr: float = 0.0,
    end_lr: float = 0.0,
    unit: Unit = "update",
) -> Schedule:
    """A linear warm-up, ``max_lr`` for most of the run, and a short decay (WSD, the trapezoidal schedule).

    transformers' ``get_wsd_schedule``, whose ``min_lr_ratio`` makes ``start_lr`` and ``end_lr`` that part of
    ``max_lr``, and whose ``decay_type`` is ``decay``.

    Args:
        max_lr: >= 0.
        warmup_steps, stable_steps: clock units, >= 0.
        decay_steps: >= 1.
        decay: ``"1-sqrt"``, ``"linear"`` or ``"cosine"``.
        start_lr, end_lr: >= 0.
        unit: what the clock counts.

    >>> schedule = warmup_stable_decay(1.0, 10, 80, 16)
    >>> schedule(5), schedule(10), schedule(90), schedule(94), schedule(106)
    (0.5, 1.0, 1.0, 0.5, 0.0)

    References:
        Hu et al., MiniCPM, arXiv 2404.06395. Haegele et al., arXiv 2405.18392.
    """
    kind = _FALLS[choice("decay", decay, get_args(Fall))]
    peak, stable = real("max_lr", max_lr), count("stable_steps", stable_steps, 0)
    fall = kind(peak, real("end_lr", end_lr), count("decay_steps", decay_steps), unit=unit)
    whole = Constant(peak, unit=unit).then(fall, at=stable) if stable else fall
    return with_warmup(whole, warmup_steps, start_lr)


def inverse_sqrt(
    max_lr: float,
    warmup_steps: int,
    timescale: int | None = None,
    *,
    start_lr: float = 0.0,
    unit: Unit = "update",
) -> Schedule:
    """A linear warm-up to ``max_lr``, then ``max_lr / sqrt((t + timescale) / timescale)``, t from its end.

    transformers' ``get_inverse_sqrt_schedule``; fairseq's ``inverse_sqrt``, whose ``--warmup-init-lr`` is
    ``start_lr``.

    Args:
        max_lr: >= 0.
        warmup_steps: clock units, >= 0.
        timescale: clock units, >= 1; None: ``warmup_steps``, or 10,000 where that is 0.
        start_lr: >= 0.
        unit: what the clock counts.

    >>> schedule = inverse_sqrt(1.0, warmup_steps=100)
    >>> schedule(50), schedule(100), schedule(400)
    (0.5, 1.0, 0.5)
    """
    warmup = count("warmup_steps", warmup_steps, 0)
    scale = timescale if timescale is not None else warmup or 10_000
    return with_warmup(InverseSqrt(real("max_lr", max_lr), scale, unit=unit), warmup, start_lr)


def noam(model_size: int, warmup_steps: int, factor: float = 1.0, *, unit: Unit = "update") -> Schedule:
    """``factor * model_size ** -0.5 * min(n ** -0.5, n * warmup_steps ** -1.5)`` for the n-th update, from 1.

    The schedule of the Transformer; the clock before its n-th update is ``n - 1``.

    Args:
        model_size: the width of the model, >= 1.
        warmup_steps: clock units, >= 1.
        factor: >= 0.
        unit: what the clock counts.

    >>> schedule = noam(model_size=512, warmup_steps=4000)
    >>> round(schedule(3999), 9), schedule(15_999) / schedule(3999)
    (0.000698771, 0.5)

    References:
        Vaswani et al., Attention Is All You Need, arXiv 1706.03762, section 5.3.
    """
    warmup = count("warmup_steps", warmup_steps)
    peak = real("factor", factor) / math.sqrt(count("model_size", model_size) * warmup)
    fall = InverseSqrt(peak, warmup, unit=unit)
    if warmup == 1:
        return fall
    return LinearRamp(peak / warmup, peak, warmup - 1, unit=unit).then(fall)


def tri_stage(
    max_lr: float,
    warmup_steps: int,
    hold_steps: int,
    decay_steps: int,
    *,
    init_lr_scale: float = 0.01,
    final_lr_scale: float = 0.01,
    unit: Unit = "update",
) -> Schedule:
    """A linear warm-up, ``max_lr`` for a while, and an exponential decay that ends in a constant rate.

    fairseq's ``tri_stage``, as wav2vec 2.0 is trained: from ``init_lr_scale * max_lr`` up, and down to
    ``final_lr_scale * max_lr``.

    Args:
        max_lr: > 0.
        warmup_steps, hold_steps: clock units, >= 0.
        decay_steps: >= 1.
        init_lr_scale: >= 0. final_lr_scale: > 0.
        unit: what the clock counts.

    >>> schedule = tri_stage(1.0, 10, 30, 60)
    >>> schedule(0), schedule(10), schedule(40), round(schedule(70), 9), schedule(100), schedule(1000)
    (0.01, 1.0, 1.0, 0.1, 0.01, 0.01)

    References:
        Baevski et al., wav2vec 2.0, arXiv 2006.11477. Park et al., SpecAugment, arXiv 1904.08779.
    """
    steps, hold = count("decay_steps", decay_steps), count("hold_steps", hold_steps, 0)
    final = real("final_lr_scale", final_lr_scale, above=True)
    peak = real("max_lr", max_lr, above=True)
    fall = Exponential(peak, math.exp(math.log(final) / steps), unit=unit)
    whole = fall.then(Constant(peak * final, unit=unit), at=steps)
    if hold:
        whole = Constant(peak, unit=unit).then(whole, at=hold)
    return with_warmup(whole, warmup_steps, real("init_lr_scale", init_lr_scale) * peak)


def _after(warmup_steps: int, total_steps: int) -> int:
    warmup, total = count("warmup_steps", warmup_steps, 0), count("total_steps", total_steps)
    if total <= warmup:
        raise ValueError(f"total_steps must be > warmup_steps, which is {warmup}, got {total}")
    return total - warmup
