"""A plan as a table of its phases."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from fastlr._tables import html_table
from fastlr.batch_growth.division import divide
from fastlr.batch_growth.phase import Phase
from fastlr.batch_growth.updates import Tail, Updates

# More phases than this are shown in part: a smooth schedule can have hundreds.
_ROWS = 32

_HEADINGS = (
    "epoch", "samples", "batch", "micro x steps x ranks", "lr", "momentum", "noise scale", "updates",
)  # fmt: skip


class Plan(Protocol):
    """What the table shows of a plan; ``BatchPlan`` says what each of them is."""

    @property
    def phases(self) -> Sequence[Phase]: ...
    @property
    def batch_sizes(self) -> Sequence[int]: ...
    @property
    def dataset_size(self) -> int: ...
    @property
    def epochs(self) -> int: ...
    @property
    def tail(self) -> Tail: ...
    @property
    def mode(self) -> str: ...
    @property
    def scaling(self) -> str: ...
    @property
    def micro_batch_size(self) -> int | None: ...
    @property
    def ranks(self) -> int: ...
    @property
    def sequence_length(self) -> int | None: ...
    @property
    def total_samples(self) -> int: ...
    @property
    def total_updates(self) -> int: ...


class _Table(NamedTuple):
    title: str
    rows: list[tuple[str, ...]]  # the last: the totals
    notes: list[str]


def as_text(plan: Plan) -> str:
    """The table in aligned columns."""
    title, rows, notes = _table(plan)
    widths = [max(map(len, column)) for column in zip(_HEADINGS, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

    rule = "-" * len(line(_HEADINGS))
    *phases, totals = map(line, rows)
    return "\n".join([title, "", line(_HEADINGS), rule, *phases, rule, totals, *notes])


def as_html(plan: Plan) -> str:
    """The table as a notebook shows it."""
    title, rows, notes = _table(plan)
    return html_table(title, rows, _HEADINGS, notes)


def _table(plan: Plan) -> _Table:
    shown = _folded(plan.phases) if len(plan.phases) > _ROWS else plan.phases
    rows = [_row(plan, phase) for phase in shown]
    hidden = len(rows) - _ROWS
    notes = []
    if hidden > 0:
        rows[_ROWS // 2 : -_ROWS // 2] = [("...",) + ("",) * (len(_HEADINGS) - 1)]
        notes.append(f"{hidden:,} of {len(shown):,} batch sizes are not shown.")
    rows.append(("total", f"{plan.total_samples:,}", "", "", "", "", "", f"{plan.total_updates:,}"))
    kind = plan.mode if plan.scaling == "linear" else f"{plan.mode}, {plan.scaling} scaling"
    each = "" if plan.sequence_length is None else f" of {plan.sequence_length:,} tokens"
    title = (
        f"Batch plan ({kind}): {plan.epochs:,} epochs of {plan.dataset_size:,} samples{each}, "
        f'tail="{plan.tail}"'
    )
    first = plan.batch_sizes[0]
    fixed = Updates((0,), (first,), plan.dataset_size, plan.epochs, plan.tail).total
    if fixed > 1.05 * plan.total_updates:
        times = fixed / plan.total_updates
        notes.append(f"With batches of {first:,} throughout: {fixed:,} updates, {times:.2g} times as many.")
    return _Table(title, rows, notes)


def _folded(phases: Iterable[Phase]) -> list[Phase]:
    """Neighbours with the same batch and momentum as one."""
    folded: list[Phase] = []
    for phase in phases:
        last = folded[-1] if folded else None
        if last and (last.batch_size, last.momentum) == (phase.batch_size, phase.momentum):
            folded[-1] = last._replace(
                stop_sample=phase.stop_sample, last_lr=phase.last_lr, updates=last.updates + phase.updates
            )
        else:
            folded.append(phase)
    return folded


def _row(plan: Plan, phase: Phase) -> tuple[str, ...]:
    micro, steps = divide(phase.batch_size, plan.micro_batch_size, plan.ranks)
    smooth = phase.last_lr != phase.lr
    return (
        f"{phase.start_sample / plan.dataset_size:.6g}",
        f"{phase.stop_sample - phase.start_sample:,}",
        f"{phase.batch_size:,}",
        f"{micro:,} x {steps} x {plan.ranks}",
        f"{phase.lr:.4g}" + (f" .. {phase.last_lr:.4g}" if smooth else ""),
        f"{phase.momentum:.4g}",
        f"{phase.noise_scale:,.4g}",
        f"{phase.updates:,}",
    )
