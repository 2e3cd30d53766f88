"""Contenders measured in turn, round after round in one run, so that a change of the machine's speed meets
all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def timed(step: Callable[[], object]) -> float:
    """Seconds that it takes; a turn, with ``functools.partial``."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def in_turn(turns: dict[str, Callable[[], T]], seconds: float, fewest: int = 12) -> dict[str, list[T]]:
    """What each turn measured in each round; without the first two rounds, which allocate state.

    Args:
        fewest: rounds, also where they take longer than ``seconds``.
    """
    measured: dict[str, list[T]] = {name: [] for name in turns}
    order = list(turns)
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < fewest or time.perf_counter() < deadline:
        order = order[1:] + order[:1]
        for name in order:
            measured[name].append(turns[name]())
        rounds += 1
    return {name: values[2:] for name, values in measured.items()}


def summary(times: dict[str, list[float]], reference: str = "fastlr") -> dict[str, dict[str, float]]:
    """Median microseconds of each contender, and the median of its ratio to the reference within a round."""
    return {
        name: {
            "us": statistics.median(values) * 1e6,
            "ratio": statistics.median(v / r for v, r in zip(values, times[reference], strict=True)),
            "rounds": len(values),
        }
        for name, values in times.items()
    }
