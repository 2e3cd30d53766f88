"""Clocks that count tokens: of schedules, optimizers, plans and loaders; batch growth of others as plans."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import through_file, weight

import fastlr
from fastlr import BatchPlan, GrowingLoader
from fastlr.integrations import deepspeed

ROOT = Path(__file__).parent.parent
RAMP = fastlr.LinearRamp(0.0, 1.0, 1000, unit="token")


# -- schedules -----------------------------------------------------------------------------------------------


def test_a_schedule_in_tokens_has_the_values_of_one_in_samples() -> None:
    in_samples = fastlr.Cosine(0.1, 0.0, 50, unit="sample")
    assert (
        in_samples.values(0, 51).tolist() == fastlr.Cosine(0.1, 0.0, 50, unit="token").values(0, 51).tolist()
    )
    held = in_samples.in_tokens(7)
    assert (held.unit, held.duration) == ("token", 350)
    assert held.values(0, 350).tolist() == np.repeat(in_samples.values(0, 50), 7).tolist()
    assert fastlr.Schedule.from_dict(held.to_dict()) == held
    with pytest.warns(UserWarning, match="ended at token 1000 .* asked for token 1001"):
        fastlr.LinearRamp(0.0, 1.0, 1000, unit="token")(1001)


def test_schedules_in_tokens_do_not_turn_into_others() -> None:
    with pytest.raises(ValueError, match="counts tokens already; use it as it is"):
        RAMP.in_tokens(3)
    with pytest.raises(ValueError, match="counts tokens and cannot count samples"):
        RAMP.in_samples(3)
    with pytest.raises(ValueError, match="must share a unit, got 'token' and 'sample'"):
        RAMP.then(fastlr.Constant(0.1, unit="sample"))


# -- the optimizer's clock -----------------------------------------------------------------------------------


def test_an_optimizer_follows_its_tokens_and_a_file_brings_them_back() -> None:
    p = weight()
    opt = fastlr.FusedSGD([p], lr=RAMP)
    expected = torch.ones(5)
    for tokens in (100, 0, 250):
        rate = opt.param_groups[0]["lr"]
        assert rate == RAMP(opt.clock()[1])
        opt.step()
        opt.advance_tokens(tokens)
        expected = torch.addcmul(expected, torch.full((5,), 0.5), torch.tensor(-rate))
        assert torch.equal(p.detach(), expected)
    assert isinstance(opt.clock(), fastlr.optim.TokenClock)
    assert (opt.clock(), opt.clock().tokens, opt.param_groups[0]["lr"]) == ((3, 350), 350, 0.35)
    assert repr(opt.sync()) == "TokenClock(updates=3, tokens=350)"
    assert opt.clock()._asdict() == {"updates": 3, "tokens": 350}
    with pytest.raises(AttributeError, match="no samples, as it counts tokens: 350 so far"):
        _ = opt.clock().samples

    other = fastlr.FusedSGD([weight()], lr=0.5)
    assert isinstance(other.clock(), fastlr.Clock)
    other.load_state_dict(through_file(opt.state_dict()))
    for again in (other, copy.deepcopy(opt)):
        assert repr(again.clock()) == repr(opt.clock())
        again.advance_tokens(50)
        assert again.param_groups[0]["lr"] == 0.4


def test_one_optimizer_counts_samples_or_tokens() -> None:
    in_samples = fastlr.Constant(0.5, unit="sample")
    p, q = weight(), weight()
    with pytest.raises(
        ValueError, match=r"^lr of parameter group 0 counts tokens, but momentum of .* samples"
    ):
        fastlr.FusedSGD([p], lr=RAMP, momentum=in_samples)
    with pytest.raises(
        ValueError, match=r"^lr of parameter group 1 counts tokens, but lr of .* group 0 samples"
    ):
        fastlr.FusedSGD([{"params": [p], "lr": in_samples}, {"params": [q], "lr": RAMP}])

    opt = fastlr.FusedSGD([p], lr=0.1)
    opt.add_param_group({"params": [q], "lr": RAMP})  # nothing was counted yet
    assert [group["clock_unit"] for group in opt.param_groups] == ["token", "token"]
    before = copy.deepcopy(opt.state_dict()["param_groups"])
    refused: dict[str, Any] = {
        "momentum of parameter group 0 samples": lambda: opt.set_schedule(momentum=in_samples, group=0),
        "counts tokens, and stands at 0, so that it cannot count samples": lambda: opt.advance_samples(4),
        "count tokens, so that its clock cannot be set to samples": lambda: opt.set_clock(samples=4),
        "got samples=1 and tokens=2; leave one out": lambda: opt.set_clock(samples=1, tokens=2),
    }
    for message, call in refused.items():
        with pytest.raises((ValueError, RuntimeError), match=message):
            call()
        assert opt.state_dict()["param_groups"] == before


def test_a_clock_that_has_counted_samples_takes_tokens_by_set_clock_only() -> None:
    opt = fastlr.FusedSGD([weight()], lr=0.1)
    opt.step()
    opt.advance_samples(32)
    with pytest.raises(RuntimeError, match=r"counts samples, and stands at 32, .* advance_samples"):
        opt.advance_tokens(1)
    with pytest.raises(ValueError, match=r"has counted 32 samples; tell it .* set_clock\(tokens=...\)"):
        opt.set_schedule(RAMP, start="zero")
    assert repr(opt.clock()) == "Clock(updates=1, samples=32)"
    opt.set_clock(tokens=320)
    opt.set_schedule(RAMP, start="zero")
    assert (repr(opt.clock()), opt.param_groups[0]["lr"]) == ("TokenClock(updates=1, tokens=320)", 0.32)
    opt.set_schedule(momentum=RAMP * 0.5)
    with pytest.raises(ValueError, match="tokens must be >= 320, where the momentum schedule"):
        opt.set_clock(tokens=0)

    opt = fastlr.FusedSGD([weight()], lr=0.1)
    opt.advance_tokens(3)  # what it is told first
    assert opt.clock().tokens == 3


def test_schedules_that_are_set_aside_still_count() -> None:
    """Else a file would have samples with schedules in tokens, which nothing loads."""
    opt = fastlr.FusedSGD([weight()], lr=RAMP)
    with opt.handed_over():
        with pytest.raises(RuntimeError, match="the optimizer counts tokens, and stands at 0"):
            opt.advance_samples(4)
        opt.advance_tokens(4)
    again = fastlr.FusedSGD([weight()], lr=0.1)
    again.load_state_dict(through_file(opt.state_dict()))
    assert (again.clock().tokens, again.param_groups[0]["lr"]) == (4, RAMP(4))


@pytest.mark.parametrize("unit", ["sample", "token"])
def test_deepspeeds_steps_of_parts_are_one_update(unit: Any) -> None:
    """As ZeRO makes them in its stage 3, here with a bound loader that moves the second clock."""
    opt = fastlr.FusedSGD([weight()], lr=fastlr.LinearRamp(0.0, 1.0, 2000, unit=unit))
    length = LENGTH if unit == "token" else 1
    plan = BatchPlan.from_phases(
        [(0, 4), (1, 8)],
        dataset_size=40,
        epochs=2,
        lr=0.1,
        sequence_length=length if unit == "token" else None,
    )
    step = deepspeed._one_update(opt, lambda: [opt.step() for _ in range(3)])
    for batch in GrowingLoader(Texts(), plan, 8).bind(opt):
        before = opt.param_groups[0]["lr"]
        step()
        assert opt.clock()[1] == (batch.position + batch.global_batch) * length
        assert opt.param_groups[0]["lr"] > before
    assert opt.clock()[0] == plan.total_updates


def test_files_without_or_with_another_unit() -> None:
    opt = fastlr.FusedSGD([weight()], lr=RAMP)
    opt.set_clock(updates=2, tokens=64)
    saved = opt.state_dict()
    for change, message in (
        ({"clock_unit": "sample"}, "got sample with schedules in tokens"),
        (
            {"clock_unit": "word"},
            "clock_unit of the file's parameter group 0 must be one of epoch, sample, token",
        ),
    ):
        damaged = copy.deepcopy(saved)
        damaged["param_groups"][0].update(change)
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(damaged)
        assert repr(opt.clock()) == "TokenClock(updates=2, tokens=64)"

    old = fastlr.FusedSGD([weight()], lr=0.1)
    old.advance_samples(7)
    file = old.state_dict()
    del file["param_groups"][0]["clock_unit"]  # as before there were tokens
    opt.load_state_dict(file)
    assert repr(opt.clock()) == "Clock(updates=0, samples=7)"

    torchs = torch.optim.SGD([weight()], lr=0.25)
    opt = fastlr.FusedSGD([weight()], lr=RAMP)
    told = r"lr schedule of parameter group 0 goes on at tokens=0 .*set_clock\(updates=..., tokens=...\)"
    with pytest.warns(UserWarning, match=told):
        opt.load_state_dict(torchs.state_dict())
    assert isinstance(opt.clock(), fastlr.optim.TokenClock)


# -- plans ---------------------------------------------------------------------------------------------------

LENGTH = 16


def token_plan(**options: Any) -> BatchPlan:
    given: dict[str, Any] = {
        "unit": "token",
        "sequence_length": LENGTH,
        "dataset_size": 40,
        "epochs": 2,
        "lr": fastlr.Cosine(0.5, 0.0, 80 * LENGTH, unit="token"),
        "momentum": 0.5,
    }
    return BatchPlan.from_phases([(0, 4 * LENGTH), (24 * LENGTH, 8 * LENGTH)], **{**given, **options})


def test_a_plan_in_tokens_is_one_in_samples_clocked_in_tokens() -> None:
    plan = token_plan()
    same = BatchPlan.from_phases([(0, 4), (24, 8)], unit="sample", dataset_size=40, epochs=2, lr=0.5)
    assert (plan.starts, plan.batch_sizes, plan.unit) == (same.starts, same.batch_sizes, "token")
    assert (plan.total_tokens, same.total_tokens, plan.clock_at(24), same.clock_at(24)) == (
        1280,
        None,
        384,
        24,
    )
    assert [phase.lr for phase in plan.phases] == [0.5, plan.lr(24 * LENGTH)]
    assert plan.phases[1].last_lr == plan.lr(79 * LENGTH)
    assert plan.noise_scale(30) == plan.lr(30 * LENGTH) * 40 / (8 * (1 - 0.5))
    assert BatchPlan.from_dict(plan.to_dict()) == plan
    assert "2 epochs of 40 samples of 16 tokens" in str(plan)
    for lr in (0.5, fastlr.Constant(0.5, unit="epoch"), fastlr.Constant(0.5, unit="sample")):
        assert (token_plan(lr=lr).lr.unit, token_plan(lr=lr).lr(100)) == ("token", 0.5)


@pytest.mark.parametrize("scaling", ["linear", "sqrt"])
def test_plans_grow_alike_from_schedules_in_tokens_and_in_samples(scaling: Any) -> None:
    run: dict[str, Any] = {"batch_size": 4, "dataset_size": 400, "epochs": 1, "scaling": scaling}
    milestones = [100, 250]
    by_sample = BatchPlan.from_schedule(fastlr.MultiStep(0.5, milestones, 0.5, unit="sample"), **run)
    for schedule in (
        fastlr.MultiStep(0.5, milestones, 0.5, unit="sample"),
        fastlr.MultiStep(0.5, [m * LENGTH for m in milestones], 0.5, unit="token"),
    ):
        plan = BatchPlan.from_schedule(schedule, **run, sequence_length=LENGTH)
        assert (plan.starts, plan.batch_sizes) == (by_sample.starts, by_sample.batch_sizes)
        assert plan.batch_sizes == ((4, 8, 16) if scaling == "linear" else (4, 16, 64))
        for sample in range(400):
            assert plan.lr(sample * LENGTH) == by_sample.lr(sample)
            assert plan.noise_scale(sample) == by_sample.noise_scale(sample)

    smooth = fastlr.Cosine(0.5, 0.0, 400 * LENGTH, unit="token")
    plan = BatchPlan.from_schedule(smooth, **run, sequence_length=LENGTH, max_batch_size=12)
    assert plan.batch_sizes == (4, 8, 12)
    exact = by_sample.noise_scale(0) / 0.5
    for update in plan.updates_from():
        assert plan.noise_scale(update.start) == pytest.approx(
            exact * smooth(update.start * LENGTH), rel=1e-12
        )


BAD_PLANS: dict[str, tuple[dict[str, Any], str]] = {
    "no-length": ({"sequence_length": None}, "phases in tokens need a sequence_length"),
    "in-samples": ({"unit": "sample", "sequence_length": None}, "lr counts tokens; give the plan its"),
    "length": ({"sequence_length": 9}, r"batch_size of a phase must be whole samples of 9 tokens, got 64"),
    "long": ({"unit": "sample", "sequence_length": 2**62}, r"must have < 2\*\*63 - 1 tokens, got 80 samples"),
    "updates": ({"lr": fastlr.Constant(0.1)}, "cannot count updates; give a schedule"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD_PLANS.values(), ids=BAD_PLANS)
def test_bad_plans_in_tokens(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_plan(**{"dataset_size": 400 if "sequence_length" not in options else 40, **options})


def test_a_plan_and_its_schedules_count_the_same() -> None:
    plan = token_plan()
    with pytest.raises(
        ValueError, match='lr must be a schedule with unit="token", as the plan has a sequence'
    ):
        dataclasses.replace(plan, lr=fastlr.Constant(0.1, unit="sample"))
    with pytest.raises(ValueError, match="the schedule counts tokens; give the plan its sequence_length"):
        BatchPlan.from_schedule(RAMP, batch_size=4, dataset_size=40, epochs=1)


# -- loaders -------------------------------------------------------------------------------------------------


class Texts(torch.utils.data.Dataset[torch.Tensor]):
    """Sample k has 1 + k % 5 tokens, which are not 0."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        return (torch.arange(LENGTH) <= index % 5).long() * (index + 1)


def tokens_in(data: torch.Tensor) -> int:
    return int((data != 0).sum())


def run(loader: GrowingLoader, opt: fastlr.FusedOptimizer, updates: int | None = None) -> list[Any]:
    seen = []
    for batch in loader:
        seen.append((batch.position, batch.tokens, batch.global_tokens, opt.param_groups[0]["lr"]))
        if batch.ends_update:
            opt.step()
            if updates is not None and opt.clock()[0] == updates:
                break
    return seen


@pytest.mark.parametrize("counted", [False, True])
def test_a_loader_tells_tokens(counted: bool) -> None:
    """By the plan's sequence length or by what it counts, through a resume from files."""
    plan = token_plan(lr=0.1)
    lr: fastlr.Schedule = fastlr.LinearRamp(0.0, 1.0, 2000, unit="token")
    if counted:
        plan = BatchPlan.from_phases([(0, 4), (0.6, 8)], dataset_size=40, epochs=2, lr=0.1)

    def made() -> tuple[GrowingLoader, fastlr.FusedOptimizer]:
        opt = fastlr.FusedSGD([weight()], lr=lr)
        return GrowingLoader(Texts(), plan, 4, count=tokens_in if counted else None).bind(opt), opt

    loader, opt = made()
    assert loader.tokens == 0
    whole = run(loader, opt)
    total = 2 * 8 * (1 + 2 + 3 + 4 + 5) if counted else 2 * 40 * LENGTH
    assert loader.tokens == opt.clock().tokens == total == sum(tokens for _, tokens, _, _ in whole)
    for position, _, global_tokens, rate in whole:
        assert global_tokens == sum(t for p, t, _, _ in whole if p == position)
        assert rate == lr(sum(t for p, t, _, _ in whole if p < position))

    loader, opt = made()
    first = run(loader, opt, updates=7)
    files = through_file((loader.state_dict(), opt.state_dict()))
    loader, opt = made()
    loader.load_state_dict(files[0])
    with pytest.raises(RuntimeError, match=r"lr schedule stands at token 0, the loader at \d+; load"):
        next(iter(loader))
    opt.load_state_dict(files[1])
    assert first + run(loader, opt) == whole


@pytest.mark.parametrize("counted", [False, True])
def test_tokens_go_on_where_batches_grow_and_steps_are_skipped(counted: bool) -> None:
    plan = BatchPlan.from_phases(
        [(0, 4)], dataset_size=40, epochs=2, lr=0.1, sequence_length=None if counted else LENGTH
    )

    def made() -> tuple[GrowingLoader, fastlr.FusedOptimizer]:
        opt = fastlr.FusedSGD([weight()], lr=fastlr.LinearRamp(0.0, 1.0, 2000, unit="token"))
        return GrowingLoader(Texts(), plan, 4, count=tokens_in if counted else None).bind(opt), opt

    loader, opt = made()
    told = []
    for batch in loader:
        if batch.starts_update:
            told.append(batch.global_tokens)
        if batch.ends_update:
            opt.found_inf = torch.tensor(float(len(told) == 3))  # as GradScaler says it
            opt.step()
            assert opt.last_step_skipped == (len(told) == 3)
            assert opt.clock().tokens == loader.tokens == sum(told)
        if len(told) == 5 and batch.ends_update:
            loader.grow(8)
        if len(told) == 7 and batch.ends_update:
            files = through_file((loader.state_dict(), opt.state_dict()))
            loader, opt = made()
            loader.load_state_dict(files[0])
            opt.load_state_dict(files[1])
            break
    assert loader.samples == 5 * 4 + 2 * 8
    told += [batch.global_tokens for batch in loader if batch.starts_update]
    assert loader.tokens == opt.clock().tokens == sum(told) == (2 * 8 * 15 if counted else 80 * LENGTH)
    assert opt.clock()[0] == 6  # those that are asked for without a step count as tokens, not as updates


def test_ranks_tell_the_same_tokens() -> None:
    ends = []
    for rank in (0, 1):
        opt = fastlr.FusedSGD([weight()], lr=token_plan().lr)
        loader = GrowingLoader(Texts(), token_plan(), 2, rank=rank, world_size=2).bind(opt)
        ends.append(run(loader, opt))
    assert [seen[2:] for seen in ends[0]] == [seen[2:] for seen in ends[1]]
    per_update: dict[int, int] = {}
    for position, tokens, total, _ in ends[0] + ends[1]:
        per_update[position] = per_update.get(position, 0) + tokens
        assert total == (4 if position < 24 else 8) * LENGTH
    assert sum(per_update.values()) == 80 * LENGTH


def test_a_plan_in_tokens_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    plan = token_plan()
    line = plan.plot(tmp_path / "plan.svg").axes[1].lines[0]
    assert line.get_ydata()[0] == 0.5
    assert line.get_ydata()[-1] == plan.lr(79 * LENGTH) < 0.001


def test_what_is_left_out_has_tokens_by_a_sequence_length_only() -> None:
    plan = token_plan(tail="drop", lr=0.1, dataset_size=42)
    opt = fastlr.FusedSGD([weight()], lr=fastlr.Constant(0.1))
    loader = GrowingLoader(torch.zeros(42, LENGTH), plan, 8).bind(opt)
    run(loader, opt)
    assert repr(opt.clock()) == f"TokenClock(updates={plan.total_updates}, tokens={84 * LENGTH})"

    plan = BatchPlan.from_phases([(0, 4)], dataset_size=42, epochs=1, lr=0.1, tail="drop")
    opt = fastlr.FusedSGD([weight()], lr=RAMP)
    run(GrowingLoader(torch.ones(42, LENGTH), plan, count=tokens_in).bind(opt), opt)
    assert opt.clock().tokens == 40 * LENGTH


def test_plans_in_tokens_tell_an_optimizer_samples_that_counts_them() -> None:
    opt = fastlr.FusedSGD([weight()], lr=fastlr.Constant(0.1, unit="sample"))
    run(GrowingLoader(Texts(), token_plan(lr=0.1), 8).bind(opt), opt)
    assert repr(opt.clock()) == "Clock(updates=13, samples=80)"


def test_a_file_that_does_not_know_the_tokens_so_far_is_told_them() -> None:
    plan = BatchPlan.from_phases([(0, 4)], dataset_size=40, epochs=1, lr=0.1)
    loader = GrowingLoader(Texts(), plan).bind(opt := fastlr.FusedSGD([weight()], lr=0.1))
    run(loader, opt, updates=3)
    file = loader.state_dict()
    for lr in (0.1, RAMP):
        opt = fastlr.FusedSGD([weight()], lr=lr)
        opt.set_clock(updates=3, tokens=30)
        loader = GrowingLoader(Texts(), plan, count=tokens_in)
        loader.load_state_dict(file)
        with pytest.raises(RuntimeError, match=r"had before sample 12 is not known: .* load {\*\*state, "):
            run(loader.bind(opt), opt)
        loader.load_state_dict({**file, "tokens": opt.clock()[1]})
        run(loader, opt)
        assert opt.clock().tokens == loader.tokens > 30


def test_tokens_that_nobody_counts_are_an_error() -> None:
    plan = BatchPlan.from_phases([(0, 4)], dataset_size=40, epochs=1, lr=0.1)
    opt = fastlr.FusedSGD([weight()], lr=RAMP)
    with pytest.raises(ValueError, match="nobody says how many a batch has: give the plan a"):
        GrowingLoader(Texts(), plan).bind(opt)
    loader = GrowingLoader(Texts(), plan, count=lambda data: tokens_in(data) + 0.5).bind(opt)
    with pytest.raises(RuntimeError, match=r"how many the update at sample 0 has is not known: let .* count"):
        run(loader, opt)
    assert opt.clock() == (0, 0)


# -- other trainers' batch growth, as the examples write it --------------------------------------------------


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))

    def load(name: str) -> Any:
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    return load


@pytest.mark.parametrize(
    ("start", "increment", "ramp", "full"),
    [
        (16, 16, 3000, 128),
        (32, 8, 10_000, 64),
        (4, 12, 100, 64),
        (8, 8, 7, 64),
        (3, 7, 977, 80),
        (16, 16, 50_000, 128),  # longer than the run
    ],
)
def test_megatrons_batch_rampup(examples: Any, start: int, increment: int, ramp: int, full: int) -> None:
    plan = examples("megatron_batch_rampup").rampup_plan(
        (start, increment, ramp), full, samples=20_000, lr=fastlr.Constant(0.1, unit="sample")
    )
    consumed, expected = 0, []
    while consumed < 20_000:
        # Its calculator's arithmetic: the ramp is cut into as many stretches as there are increments.
        stretch = ramp / ((full - start) // increment)
        size = full if consumed > ramp else start + int(consumed / stretch) * increment
        expected.append((consumed, size))
        consumed += size
    found = [(update.start, update.batch_size) for update in plan.updates_from()]
    assert found == expected


@pytest.mark.parametrize(
    "due", [(304, 1024), (301, 1000), (330, 331), (1, 3), (1000, 4090)], ids=lambda due: f"{due[0]}-{due[1]}"
)
def test_olmo_cores_batch_sizes(examples: Any, due: tuple[int, int]) -> None:
    """A batch grows once its tokens are due and the batches so far can be counted in the new size."""
    length, total = 64, 64 * 4096
    sizes = [8 * length, 16 * length, 64 * length]
    dues = [0, due[0] * length + 1, due[1] * length]
    base = fastlr.LinearRamp(0.0, 4e-4, 100 * length, unit="token").then(
        fastlr.Cosine(4e-4, 4e-5, total - 100 * length, unit="token")
    )
    growth_plan = examples("olmo_batch_growth").growth_plan
    plan = growth_plan(sizes, dues, length, total, base)
    tokens, size, factor, expected = 0, sizes[0], 1.0, []
    while tokens < total:
        target = max(s for s, due in zip(sizes, dues, strict=True) if tokens >= due)
        if target > size and (tokens // size) % (target // size) == 0:
            factor *= math.sqrt(target / size)
            size = target
        expected.append((tokens, min(size, total - tokens), base(tokens) * factor))
        tokens += size
    found = [
        (update.start * length, update.size * length, plan.lr(update.start * length))
        for update in plan.updates_from()
    ]
    assert [f[:2] for f in found] == [e[:2] for e in expected]
    np.testing.assert_allclose([f[2] for f in found], [e[2] for e in expected], rtol=1e-15)
    # The square root keeps the noise scale of adaptive rules where the base rate does not move.
    flat = examples("olmo_batch_growth").growth_plan(
        sizes, dues, length, total, fastlr.Constant(1e-3, unit="token")
    )
    scales = [phase.noise_scale for phase in flat.phases]
    assert scales == pytest.approx([scales[0]] * len(scales), rel=1e-15)


@pytest.mark.parametrize("name", ["megatron_batch_rampup", "olmo_batch_growth"])
def test_the_examples_run(examples: Any, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    examples(name).main()
    assert "Batch plan" in capsys.readouterr().out
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) < 60


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tokens.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, Any] = {"model": torch.nn.Linear(8, 8), "dataset": torch.randn(64, 8), "fastlr": fastlr}
    for block in blocks:
        exec(compile(block, "tokens.md", "exec"), names)
