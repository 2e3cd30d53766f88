"""How long an optimizer's update takes on this machine, beside PyTorch's best pieces for it: a quick table.

What a GPU takes, and every part, rule and thread count of its own, is for benchmarks/ to measure, which is
made of the same parts.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

import fastlr
from fastlr._build import processor
from fastlr._checks import choice, count, flag, items, real
from fastlr._progress import progress as shown_progress
from fastlr.bench.models import PARAMETER_SETS
from fastlr.bench.rounds import in_turn, summary
from fastlr.bench.rules import RULES
from fastlr.bench.updates import CASES, CONTENDERS, make_contenders, turns

__all__ = ["Report", "Row", "run"]

# Many small tensors, a small network, and one that memory bandwidth decides on.
SETS = ("161 tensors of 64", "MLP, 6 tensors", "ResNet-18")
_FEWEST = 7  # rounds, of which the first two do not count
UPDATES = {"step": "step", "clip, average": "clip, step, average"}  # the schedule takes part in both


@dataclass(frozen=True)
class Row:
    """An update of one rule over one set of parameters.

    Attributes:
        rule: such as ``"sgd"``.
        update: what it is made of, beside the schedule.
        parameters: the set's name.
        tensors, elements: of the set.
        times: of each contender the median microseconds (``us``), the median of its ratio to fastlr within a
            round (``ratio``) and the rounds that were measured (``rounds``).
    """

    rule: str
    update: str
    parameters: str
    tensors: int
    elements: int
    times: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Report:
    """What was measured.

    Attributes:
        machine: what it was measured on, and with; ``load``: of the last minute before, None where the
            system does not say it.
        rows: one for each rule, update and set of parameters.
    """

    machine: dict[str, Any]
    rows: tuple[Row, ...]

    def table(self) -> list[list[str]]:
        """The rows as text, under a row of headings: microseconds, and in brackets times fastlr's."""
        names = [name for name in CONTENDERS if any(name in row.times for row in self.rows)]
        table = [["rule", "update", "parameters", *names]]
        for row in self.rows:
            cells = [row.rule, row.update, row.parameters]
            for name in names:
                found = row.times.get(name)
                ratio = "" if found is None or name == "fastlr" else f" ({found['ratio']:.2f}x)"
                cells.append("none" if found is None else f"{found['us']:,.1f}{ratio}")
            table.append(cells)
        return table

    def busy(self) -> str | None:
        """What else the processor had to do, in words; None: little, or there is no telling."""
        load, cores = self.machine["load"], os.cpu_count() or 1
        if load is None or load < cores / 4:
            return None
        return (
            f"The machine was busy before this began (load {load:.1f} on {cores} cores): threads that wait "
            "for each other are hit hardest, so measure again when it is not."
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain numbers, strings, lists and dicts."""
        return asdict(self)


def run(
    seconds: float = 30.0,
    rules: Sequence[str] = ("sgd", "adamw"),
    *,
    threads: int | None = None,
    progress: bool = True,
) -> Report:
    """Measures the step, and the whole update (clipping, step, average), each with its schedule, on the CPU.

    fastlr and both of torch's forms make the same updates of the same gradients, in turn, round after round.

    Args:
        seconds: for all of it, >= 0; each row takes 7 rounds at least, and setting it up.
        rules: to measure.
        threads: of fastlr and torch, from 1 to this machine's cores; None: as many as torch has now.
        progress: show how far it is: as bars in a terminal, elsewhere as lines.

    Raises:
        ValueError: an argument is out of range.
    """
    seconds, progress = real("seconds", seconds), flag("progress", progress)
    rules = [choice("rules", rule, RULES) for rule in items("rules", rules)]
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    before = torch.get_num_threads()
    if threads is not None and count("threads", threads) > (cores := os.cpu_count() or threads):
        raise ValueError(f"threads must be at most this machine's {cores} cores, got {threads}")
    threads = before if threads is None else count("threads", threads)
    rows: list[Row] = []
    try:
        torch.set_num_threads(threads)
        with torch.random.fork_rng(devices=[]), shown_progress(progress) as stage:
            torch.manual_seed(0)
            for rule in rules:
                advance = stage(rule, len(UPDATES) * len(SETS))
                for case, name in itertools.product(UPDATES, SETS):
                    share = seconds / (len(rules) * len(UPDATES) * len(SETS))
                    rows.append(_measured(rule, case, name, share))
                    advance()
    finally:
        torch.set_num_threads(before)
    info = fastlr.build_info()
    machine = {
        "processor": processor(),
        "threads": threads,
        "load": load,
        "simd_level": info["simd_level"],
        "torch": torch.__version__,
        "fastlr": fastlr.__version__,
    }
    return Report(machine, tuple(rows))


def _measured(rule: str, case: str, name: str, seconds: float) -> Row:
    shapes = PARAMETER_SETS[name]
    gradients, _, updates = make_contenders(RULES[rule], shapes, CASES[case], compiled=False)
    elements = sum(math.prod(shape) for shape in shapes)
    times = summary(in_turn(turns(gradients, updates), seconds, _FEWEST))
    return Row(rule, UPDATES[case], name, len(shapes), elements, times)
