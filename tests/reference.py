"""What fastlr is tested against: every formula once more, slowly and independently.

Schedules are computed with 200 bits. A float argument stands for exactly the double that it is, so
that all that a test sees is the rounding of the code under test.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
from mpmath import MPContext

# -- schedules: the exact value at clock t -------------------------------------------------------------

exact = MPContext()
exact.prec = 200
Real: TypeAlias = "exact.mpf"


def _half_cosine(start: float, end: float, part: Real) -> Real:
    """From start (part 0) to end (part 1)."""
    return end + (exact.mpf(start) - end) * (1 + exact.cos(exact.pi * part)) / 2


def _straight(start: float, end: float, part: Real) -> Real:
    return start + (exact.mpf(end) - start) * part


def constant(t: int, value: float) -> Real:
    return exact.mpf(value)


def linear_ramp(t: int, start: float, end: float, steps: int) -> Real:
    return _straight(start, end, exact.mpf(min(t, steps)) / steps)


def cosine(t: int, start: float, end: float, steps: int) -> Real:
    return _half_cosine(start, end, exact.mpf(min(t, steps)) / steps)


def cosine_warm_restarts(t: int, start: float, end: float, first_period: int, mult: int = 1) -> Real:
    period = first_period
    if mult == 1:
        t %= period
    while t >= period:
        t, period = t - period, period * mult
    return _half_cosine(start, end, exact.mpf(t) / period)


def polynomial(t: int, start: float, end: float, steps: int, power: float) -> Real:
    return end + (exact.mpf(start) - end) * (exact.mpf(max(steps - t, 0)) / steps) ** exact.mpf(power)


def one_minus_sqrt(t: int, start: float, end: float, steps: int) -> Real:
    return end + (exact.mpf(start) - end) * (1 - exact.sqrt(exact.mpf(min(t, steps)) / steps))


def inverse_sqrt(t: int, start: float, timescale: int) -> Real:
    return start / exact.sqrt(exact.mpf(t + timescale) / timescale)


def exponential(t: int, start: float, gamma: float) -> Real:
    return start * exact.mpf(gamma) ** t


def time_based(t: int, start: float, decay: float) -> Real:
    return start / (1 + exact.mpf(decay) * t)


def step_decay(t: int, start: float, every: int, gamma: float) -> Real:
    return exponential(t // every, start, gamma)


def multi_step(t: int, start: float, milestones: Sequence[int], gamma: float) -> Real:
    return exponential(sum(m <= t for m in milestones), start, gamma)


def cycle(
    t: int,
    base: float,
    top: float,
    up: float,
    down: float,
    *,
    window: str = "linear",
    decay: str = "none",
    gamma: float = 1.0,
    inverted: bool = False,
) -> Real:
    """Smith's cycles: ``decay`` is "none", "halving", "height" or "both bounds"."""
    first, second = (top, base) if inverted else (base, top)
    length = exact.mpf(up) + down
    number = int(exact.floor(t / length))
    place = t - number * length
    s = place / up if place < up else (length - place) / down
    if window == "geometric":
        height = first * (exact.mpf(second) / first) ** s - first
    else:
        shape = {"linear": s, "parabolic": s * (2 - s), "sinusoidal": (1 - exact.cos(exact.pi * s)) / 2}
        height = (exact.mpf(second) - first) * shape[window]
    if decay == "halving":
        return first + exact.ldexp(height, -number)
    if decay == "height":
        return first + height * exact.mpf(gamma) ** t
    if decay == "both bounds":
        return (first + height) * exact.mpf(gamma) ** t
    return first + height


def one_cycle(
    t: int,
    max_lr: float,
    total_steps: int,
    pct_start: float = 0.3,
    anneal_strategy: str = "cos",
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
) -> Real:
    initial = exact.mpf(max_lr) / div_factor
    levels = [initial, max_lr, initial / final_div_factor]
    if three_phase:
        levels.insert(2, initial)
    return _through_phases(t, levels, total_steps, pct_start, anneal_strategy)


def one_cycle_momentum(
    t: int,
    base_momentum: float,
    max_momentum: float,
    total_steps: int,
    pct_start: float = 0.3,
    anneal_strategy: str = "cos",
    three_phase: bool = False,
) -> Real:
    levels = [max_momentum, base_momentum, max_momentum] + [max_momentum] * three_phase
    return _through_phases(t, levels, total_steps, pct_start, anneal_strategy)


def _through_phases(
    t: int, levels: Sequence[Real], total_steps: int, pct_start: float, anneal_strategy: str
) -> Real:
    """Through three levels (up, down) or four (up, down, out); held after update ``total_steps - 1``."""
    rise = exact.mpf(pct_start) * total_steps - 1
    ends = [0, rise, total_steps - 1] if len(levels) == 3 else [0, rise, 2 * rise, total_steps - 1]
    t = min(t, total_steps - 1)
    phase = next(i for i, end in enumerate(ends[1:]) if t <= end)
    part = (t - exact.mpf(ends[phase])) / (ends[phase + 1] - ends[phase])
    curve = _half_cosine if anneal_strategy == "cos" else _straight
    return curve(levels[phase], levels[phase + 1], part)


# -- SGD: one element ----------------------------------------------------------------------------------


def sgd_nesterov(
    p: float, g: float, m: float | None, lr: float, momentum: float, weight_decay: float
) -> tuple[float, float]:
    """Parameter and momentum after an update (m None: the first), in rational arithmetic.

    Every line is exact until it is rounded to a double once, as a fused multiply-add does; the product
    ``m * momentum`` is rounded before.
    """
    g = float(Fraction(weight_decay) * Fraction(p) + Fraction(g))
    m = g if m is None else float(Fraction(g) + Fraction(m * momentum))
    u = float(Fraction(m) * Fraction(momentum) + Fraction(g))
    return float(Fraction(u) * Fraction(-lr) + Fraction(p)), m


# -- the rules: one update of a parameter, as the papers and PyTorch's documentation have them ----------

Floats: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
State: TypeAlias = "dict[str, Floats]"

# Each takes the parameter, its gradient, its state, which is empty before the first update and is changed,
# and returns the parameter. t counts the parameter's own updates, from 1 on.


def _ascent_and_decay(p: Floats, g: Floats, weight_decay: float, maximize: bool) -> Floats:
    return (-g if maximize else g) + weight_decay * p


def sgd(
    p: Floats, g: Floats, state: State, t: int, *, lr: float, momentum: float = 0.0, dampening: float = 0.0,
    weight_decay: float = 0.0, nesterov: bool = False, maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> Floats:  # fmt: skip
    g = _ascent_and_decay(p, g, 0.0 if decoupled_weight_decay else weight_decay, maximize)
    if decoupled_weight_decay:
        p = p - lr * weight_decay * p
    if momentum == 0.0:
        return p - lr * g
    b = state.get("momentum_buffer")
    b = state["momentum_buffer"] = g if b is None else momentum * b + (1 - dampening) * g
    return p - lr * (g + momentum * b if nesterov else b)


def adam(
    p: Floats, g: Floats, state: State, t: int, *, lr: float, betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8, weight_decay: float = 0.0, amsgrad: bool = False, maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> Floats:  # fmt: skip
    g = _ascent_and_decay(p, g, 0.0 if decoupled_weight_decay else weight_decay, maximize)
    if decoupled_weight_decay:
        p = p - lr * weight_decay * p
    beta1, beta2 = betas
    m = state["exp_avg"] = beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * g
    v = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * g**2
    if amsgrad:
        v = state["max_exp_avg_sq"] = np.maximum(state.get("max_exp_avg_sq", 0.0), v)
    return p - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)


def adamw(
    p: Floats, g: Floats, state: State, t: int, *, weight_decay: float = 1e-2, **options: Any
) -> Floats:
    return adam(p, g, state, t, weight_decay=weight_decay, decoupled_weight_decay=True, **options)


def rmsprop(
    p: Floats, g: Floats, state: State, t: int, *, lr: float, alpha: float = 0.99, eps: float = 1e-8,
    weight_decay: float = 0.0, momentum: float = 0.0, centered: bool = False, maximize: bool = False,
) -> Floats:  # fmt: skip
    g = _ascent_and_decay(p, g, weight_decay, maximize)
    v = state["square_avg"] = alpha * state.get("square_avg", 0.0) + (1 - alpha) * g**2
    if centered:
        a = state["grad_avg"] = alpha * state.get("grad_avg", 0.0) + (1 - alpha) * g
        v = v - a**2
    d = g / (np.sqrt(v) + eps)
    if momentum != 0.0:
        d = state["momentum_buffer"] = momentum * state.get("momentum_buffer", 0.0) + d
    return p - lr * d


def adagrad(
    p: Floats, g: Floats, state: State, t: int, *, lr: float, lr_decay: float = 0.0, eps: float = 1e-10,
    weight_decay: float = 0.0, initial_accumulator_value: float = 0.0, maximize: bool = False,
) -> Floats:  # fmt: skip
    g = _ascent_and_decay(p, g, weight_decay, maximize)
    a = state["sum"] = state.get("sum", initial_accumulator_value) + g**2
    return p - lr / (1 + (t - 1) * lr_decay) * g / (np.sqrt(a) + eps)


def adadelta(
    p: Floats, g: Floats, state: State, t: int, *, lr: float, rho: float = 0.9, eps: float = 1e-6,
    weight_decay: float = 0.0, maximize: bool = False,
) -> Floats:  # fmt: skip
    g = _ascent_and_decay(p, g, weight_decay, maximize)
    v = state["square_avg"] = rho * state.get("square_avg", 0.0) + (1 - rho) * g**2
    u = state.get("acc_delta", np.zeros_like(p))
    d = np.sqrt(u + eps) / np.sqrt(v + eps) * g
    state["acc_delta"] = rho * u + (1 - rho) * d**2
    return p - lr * d


def lion(
    p: Floats, g: Floats, state: State, t: int, *, lr: float, betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0, maximize: bool = False,
) -> Floats:  # fmt: skip
    g = -g if maximize else g
    beta1, beta2 = betas
    m = state.get("exp_avg", np.zeros_like(p))
    p = p - lr * weight_decay * p
    p = p - lr * np.sign(beta1 * m + (1 - beta1) * g)
    state["exp_avg"] = beta2 * m + (1 - beta2) * g
    return p


# -- the gradients' norm -------------------------------------------------------------------------------


def _sum_in_lanes(values: Floats) -> float:
    """Value i to lane i % 256, each lane in order, then lanes 128 apart, 64 apart, ..., 1 apart."""
    lanes = np.zeros(256)
    for row in np.pad(values, (0, -len(values) % 256)).reshape(-1, 256):
        lanes += row
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return float(lanes[0])


def squared_norm(gradients: Sequence[Floats]) -> float:
    """In chunks of 8,192, then over all chunks. Exact to the bit where squares are exact in float64."""
    flat = [np.ascontiguousarray(g).reshape(-1) for g in gradients]
    chunks = [g[i : i + 8192] for g in flat for i in range(0, len(g), 8192)]
    return _sum_in_lanes(np.array([_sum_in_lanes(chunk**2) for chunk in chunks]))
