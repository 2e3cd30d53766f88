"""Which rates the range test sweeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastlr._checks import choice, count, real
from fastlr.range_test.reading import Sweep
from fastlr.range_test.record import Record
from fastlr.range_test.result import Bounds, RangeTestResult
from fastlr.schedules import Exponential, LinearRamp, Schedule, StepDecay, Tabulated


@dataclass(frozen=True)
class Plan:
    """The sweep's arguments, checked.

    Attributes:
        schedules: of each parameter group's rate.
        group_bounds: of each group, where they differ; else empty.
        leap: what to say of a first step that is very large; None: it is not.
    """

    schedules: tuple[Schedule, ...]
    group_bounds: Bounds
    num_steps: int
    sweep: Sweep
    staircase: int
    accumulate: int
    repeats: int
    diverge_factor: float
    leap: str | None

    @classmethod
    def checked(
        cls,
        optimizer: torch.optim.Optimizer,
        start_lr: float | Sequence[float],
        end_lr: float | Sequence[float],
        num_steps: int,
        sweep: Sweep,
        staircase: int,
        accumulate: int,
        repeats: int,
        diverge_factor: float,
    ) -> Plan:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
        choice("sweep", sweep, ("exponential", "linear"))
        num_steps = count("num_steps", num_steps, 2)
        staircase = count("staircase", staircase)
        if num_steps % staircase or num_steps // staircase < 2:
            raise ValueError(
                f"num_steps must be a multiple of staircase, and at least twice it, got "
                f"num_steps={num_steps}, staircase={staircase}"
            )
        groups = len(optimizer.param_groups)
        starts = _each(start_lr, "start_lr", groups)
        ends = _each(end_lr, "end_lr", groups)
        bounds = []
        for start, end in zip(starts, ends, strict=True):
            low = real("start_lr", start, above=sweep == "exponential")
            high = real("end_lr", end)
            if low >= high:
                raise ValueError(f"start_lr must be < end_lr, got start_lr={low!r}, end_lr={high!r}")
            bounds.append((low, high))
        schedules = tuple(_schedule(sweep, *pair, num_steps // staircase, staircase) for pair in bounds)
        first, second = schedules[0](0), schedules[0](staircase)
        leap = None
        if first > 0.0 and second >= 10 * first:
            leap = (
                f"the first step already raises the rate from {first:.2g} to {second:.2g}, and nothing in "
                'between is tried; use sweep="exponential", a higher start_lr or more num_steps'
            )
        return cls(
            schedules,
            tuple(bounds) if len(set(bounds)) > 1 else (),
            num_steps,
            sweep,
            staircase,
            count("accumulate", accumulate),
            count("repeats", repeats),
            real("diverge_factor", diverge_factor, 1.0, above=True),
            leap,
        )

    def result(self, record: Record, metric_name: str | None) -> RangeTestResult:
        """The record as a curve of one point for each rate; no metric_name: none was measured."""
        lrs = self.schedules[0].values(0, self.num_steps)
        stairs: dict[float, list[tuple[float, float]]] = {}
        for index, loss, value in record.points:
            stairs.setdefault(float(lrs[index]), []).append((loss, value))
        values = [[v for _, v in points if not np.isnan(v)] for points in stairs.values()]
        return RangeTestResult(
            list(stairs),
            [float(np.mean([loss for loss, _ in points])) for points in stairs.values()],
            [float(np.mean(v)) if v else np.nan for v in values] if metric_name is not None else None,
            sweep=self.sweep,
            stopped=record.stopped,
            metric_name=metric_name or "accuracy",
            group_bounds=self.group_bounds,
        )


def _each(value: float | Sequence[float], name: str, groups: int) -> list[float]:
    if isinstance(value, (list, tuple)):
        if len(value) != groups:
            raise ValueError(f"{name} has {len(value)} values for {groups} parameter groups")
        return list(value)
    return [value] * groups  # type: ignore[list-item]  # what is no number is refused next


def _schedule(sweep: Sweep, start: float, end: float, rates: int, staircase: int) -> Schedule:
    if sweep == "exponential":
        factor = (end / start) ** (1 / (rates - 1))
        if factor == math.inf:
            raise ValueError(f"end_lr must be < 1e308 times start_lr, got start_lr={start!r}, end_lr={end!r}")
        return Exponential(start, factor) if staircase == 1 else StepDecay(start, staircase, factor)
    ramp = LinearRamp(start, end, rates - 1)
    return ramp if staircase == 1 else Tabulated(np.repeat(ramp.values(0, rates), staircase))
