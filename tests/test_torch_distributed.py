"""DDP, FSDP1, FSDP2, ZeroRedundancyOptimizer and Join on two processes: the bits of one, and a resume."""

from __future__ import annotations

import copy
import functools
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import assert_same, leaves, through_file
from rank_pool import Case, needs_gloo, outcomes
from rule_table import RULES, Rule, drive
from strategies import STRATEGIES, WHOLE, data, loss, new_model, train, train_alone, whole, zero
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel

import fastlr

pytestmark = needs_gloo

UPDATES = 6


def made(rule: Rule, parameters: Any, **options: Any) -> Any:
    return rule.make(parameters, **rule.full, lr=rule.drives["lr"], ema_decay=0.5, **options)


@functools.cache
def alone(name: str, before: Any = None) -> tuple[torch.nn.Module, Any]:
    """All updates on one process, after which torch's optimizer has made the same of its parameters."""
    rule = RULES[name]
    model, peer = new_model(), new_model()
    opt = made(rule, model.parameters())
    batches = [data(UPDATES, rank) for rank in range(dist.get_world_size())]
    train_alone(model, opt, batches, before)
    theirs = rule.make_torch(peer.parameters(), **rule.full)
    for update in range(UPDATES):
        drive(theirs.param_groups[0], {"lr": rule.drives["lr"]}, update)
        train_alone(peer, theirs, [own[2 * update : 2 * update + 2] for own in batches], before)
    assert_same(peer.parameters(), model.parameters())
    return model, opt


def resumed(model: torch.nn.Module, opt: Any, new: Any) -> tuple[torch.nn.Module, Any]:
    """The same training in new objects, which got what was saved; by ``new(model state)``."""
    state = whole(model)
    if isinstance(model, FullyShardedDataParallel) and not model._use_orig_params:
        saved = FullyShardedDataParallel.optim_state_dict(model, opt)
        assert leaves(saved["param_groups"]) <= {dict, int, float, bool, str, tuple, type(None)}
        second, again = new(state)
        again.load_state_dict(
            FullyShardedDataParallel.optim_state_dict_to_load(second, again, through_file(saved))
        )
    elif isinstance(model, FSDPModule):
        saved = get_optimizer_state_dict(model, opt, options=WHOLE)
        second, again = new(state)
        set_optimizer_state_dict(second, again, through_file(saved), options=WHOLE)
    else:
        # Each rank its own. With use_orig_params=True FSDP1's optim_state_dict() (PyTorch 2.13) returns, of
        # parameters on the CPU, the last of their tensors of state for all of them.
        second, again = new(state)
        again.load_state_dict(through_file(opt.state_dict()))
    return second, again


def trains_as_one_process(folder: Path, strategy: str, rule: str) -> None:
    entry, rank = RULES[rule], dist.get_rank()
    expected, single = alone(rule)

    def new(state: dict[str, torch.Tensor] | None = None) -> tuple[torch.nn.Module, Any]:
        plain = new_model(0 if state is None else 1)
        if state is not None:
            plain.load_state_dict(state)
        model = STRATEGIES[strategy].wrap(plain)
        return model, made(entry, model.parameters())

    model, opt = new()
    batches = data(UPDATES, rank)
    train(model, opt, batches[:UPDATES])
    model, opt = resumed(model, opt, new)
    train(model, opt, batches[UPDATES:])
    assert opt.clock() == single.clock()
    assert_same(whole(expected).values(), whole(model).values())
    with single.averaged_weights(), opt.averaged_weights():
        assert_same(whole(expected).values(), whole(model).values())
    assert_same(whole(expected).values(), whole(model).values())


def computes_with_averages(folder: Path, strategy: str) -> None:
    """Also after passes without a backward one, after which FSDP leaves the outermost parameters whole."""
    single, model = new_model(), STRATEGIES[strategy].wrap(new_model())
    peer, opt = (fastlr.FusedSGD(m.parameters(), lr=0.1, ema_decay=0.5) for m in (single, model))
    ranks = [data(1, rank) for rank in range(2)]
    for _ in range(2):
        train_alone(single, peer, ranks)
        train(model, opt, ranks[dist.get_rank()])
    x = ranks[0][0][0]

    def same_outputs() -> None:
        with torch.no_grad():
            torch.testing.assert_close(model(x), single(x), rtol=1e-13, atol=1e-13)

    same_outputs()
    with opt.averaged_weights(), peer.averaged_weights():
        same_outputs()
    same_outputs()
    with opt.averaged_weights(), peer.averaged_weights():
        same_outputs()
    train_alone(single, peer, ranks)
    train(model, opt, ranks[dist.get_rank()])
    assert_same(whole(single).values(), whole(model).values())
    same_outputs()
    found = [
        getattr(value, "full_tensor", value.clone)() for value in opt.averaged_state_dict(model).values()
    ]
    assert_same(peer.averaged_state_dict(single).values(), found)
    model(x)
    given_up = list(model.parameters())
    if isinstance(model, FSDPModule):  # whose parameters are others now
        with pytest.raises(ValueError, match="has no memory"):
            opt.copy_averages_to(given_up)
    opt.copy_averages_to(model)
    peer.copy_averages_to(single)
    same_outputs()


# -- ZeroRedundancyOptimizer ---------------------------------------------------------------------


def consolidated(opt: Any) -> dict[str, Any]:
    """Rank 0's state of all ranks, as every rank reads it from a file."""
    opt.consolidate_state_dict(0)
    states = [opt.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(states)
    assert states[0] is not None
    return through_file(states[0])


def zero_trains_as_one_process(folder: Path, rule: str) -> None:
    entry, rank = RULES[rule], dist.get_rank()
    expected, single = alone(rule)
    options = {**entry.full, "lr": entry.drives["lr"], "ema_decay": 0.5}
    model = DistributedDataParallel(new_model())
    opt = zero(model, entry.fused, **options)
    batches = data(UPDATES, rank)
    train(model, opt, batches[:UPDATES])
    saved = consolidated(opt)
    second = DistributedDataParallel(new_model(1))
    second.load_state_dict(model.state_dict())
    opt = zero(second, entry.fused, **{**options, "lr": 1e-3})  # the schedule comes with the file
    opt.load_state_dict(copy.deepcopy(saved))
    assert opt.optim.clock() == (UPDATES // 2, 0)
    train(second, opt, batches[UPDATES:])
    assert opt.optim.clock() == single.clock()
    assert opt.param_groups[0]["lr"] == single.param_groups[0]["lr"]
    assert_same(whole(expected).values(), whole(second).values())
    # A process alone goes on from the file, too.
    last = new_model(1)
    last.load_state_dict(model.module.state_dict())
    own = entry.make(last.parameters(), **{**options, "lr": 1e-3})
    own.load_state_dict(saved)
    train_alone(last, own, [data(UPDATES, rank)[UPDATES:] for rank in range(2)])
    assert_same(expected.parameters(), last.parameters())
    # And the other way round: the file of a process alone.
    begun = new_model()
    own = made(entry, begun.parameters())
    train_alone(begun, own, [data(UPDATES, rank)[:UPDATES] for rank in range(2)])
    shared = DistributedDataParallel(begun)
    opt = zero(shared, entry.fused, **{**options, "lr": 1e-3})
    opt.load_state_dict(through_file(own.state_dict()))
    train(shared, opt, batches[UPDATES:])
    assert_same(whole(expected).values(), whole(shared).values())


def zero_says_what_it_cannot(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"of which ZeroRedundancyOptimizer leaves .*torch.nn.utils.clip_grad_norm_"
    ):
        zero(new_model(), fastlr.FusedAdamW, lr=0.1, max_grad_norm=1.0)
    whole_ones = zero(new_model(), fastlr.FusedAdamW, lr=0.1, max_grad_norm=None, nonfinite="raise")
    assert whole_ones.optim.nonfinite == "raise"
    with pytest.raises(ValueError, match="measure_grad_norm takes"):
        whole_ones.optim.measure_grad_norm = True
    averaged = zero(new_model(), fastlr.FusedAdamW, lr=0.1, ema_decay=0.5).optim
    for use in (
        lambda: averaged.averaged_weights().__enter__(),
        lambda: averaged.copy_averages_to(new_model()),
    ):
        with pytest.raises(RuntimeError, match="mixture of weights and averages"):
            use()
    for undone in (
        lambda: averaged.set_schedule(lr=0.2),
        lambda: averaged.set_clock(updates=3),
        lambda: averaged.scale_lr(0.5),
        lambda: averaged.advance_samples(3),
        lambda: averaged.advance_epoch(),
        lambda: averaged.load_state_dict(averaged.state_dict()),
    ):
        with pytest.raises(RuntimeError, match=r"would be undone by ZeroRedundancyOptimizer"):
            undone()
    with pytest.raises(ValueError, match="give it to FusedAdamW"):
        whole_ones.add_param_group({"params": [torch.zeros(3, requires_grad=True)], "max_grad_norm": 1.0})
    with pytest.raises(ValueError, match="functional optimizer"):  # PyTorch's
        zero(new_model(), fastlr.FusedSGD, overlap_with_ddp=True, lr=0.1)
    model = DistributedDataParallel(new_model())
    batches = [(x, y) for x, y in data(4, dist.get_rank())]
    scheduled = zero(model, fastlr.FusedSGD, lr=fastlr.Cosine(0.1, 0.0, 10))
    for tested, says in ((scheduled, "with a number as lr"), (scheduled.optim, "pass what updates all")):
        with pytest.raises(ValueError, match=says):
            fastlr.range_test(model, tested, torch.nn.functional.cross_entropy, batches, progress=False)


def zero_clips_before_the_step(folder: Path) -> None:
    def clip(model: torch.nn.Module) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.125)

    expected, _ = alone("AdamW", clip)
    entry = RULES["AdamW"]
    model = DistributedDataParallel(new_model())
    opt = zero(model, entry.fused, **entry.full, lr=entry.drives["lr"], ema_decay=0.5)
    train(model, opt, data(UPDATES, dist.get_rank()), clip)
    assert_same(whole(expected).values(), whole(model).values())


# -- FSDP1 -----------------------------------------------------------------------------------------


def fsdp1_has_no_norm_of_its_own(folder: Path, strategy: str) -> None:
    model = STRATEGIES[strategy].wrap(new_model().float())
    with pytest.raises(ValueError, match=r"got 0.5; .*model.clip_grad_norm_"):
        fastlr.FusedSGD(model.parameters(), lr=0.1, max_grad_norm=0.5)
    opt = fastlr.FusedSGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"max_grad_norm takes .* got 0.5"):
        opt.max_grad_norm = 0.5
    with pytest.raises(ValueError, match=r"measure_grad_norm takes .* got True"):
        opt.measure_grad_norm = True
    opt.max_grad_norm, opt.measure_grad_norm = None, False
    later = fastlr.FusedSGD([torch.zeros(3, requires_grad=True)], lr=0.1, max_grad_norm=0.5)
    with pytest.raises(ValueError, match="max_grad_norm takes"):
        later.add_param_group({"params": list(model.parameters())})
    assert len(later.param_groups) == 1
    # FSDP1's own clipping, which is for float32, goes with it.
    single = new_model().float()
    clipped = fastlr.FusedSGD(single.parameters(), lr=0.1, max_grad_norm=0.125)
    batches = [[(x.float(), y) for x, y in data(UPDATES, rank)] for rank in range(2)]
    train_alone(single, clipped, batches)
    train(model, opt, batches[dist.get_rank()], lambda model: model.clip_grad_norm_(0.125))
    found = whole(model)
    for name, value in whole(single).items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)

    batch = data(1, dist.get_rank())[0]
    scaler = fastlr.GradScaler("cpu")
    scaler.scale(loss(model, (batch[0].float(), batch[1]))).backward()
    with pytest.raises(
        ValueError, match=r"use torch\.distributed\.fsdp\.sharded_grad_scaler\.ShardedGradScaler"
    ):
        scaler.step(opt)


# -- GradScaler, norms -----------------------------------------------------------------------------


def skips_on_all_ranks(
    folder: Path, strategy: str, kind: Any, options: dict[str, Any], share: bool = False
) -> None:
    """What one rank alone finds in its gradients. FSDP1 leaves it there, DDP has told the others already."""
    model = STRATEGIES[strategy].wrap(new_model())
    options = {"lr": 0.1, "momentum": 0.9, **options}
    opt = zero(model, fastlr.FusedSGD, **options) if share else fastlr.FusedSGD(model.parameters(), **options)
    fused = getattr(opt, "optim", opt)
    scaler = kind("cpu", init_scale=8.0)
    single = new_model()
    peer = fastlr.FusedSGD(single.parameters(), **options)
    ranks = [data(UPDATES, rank) for rank in range(2)]
    for update in range(UPDATES):
        first, second = ranks[dist.get_rank()][2 * update : 2 * update + 2]
        poisoned = update == 2 and dist.get_rank() == 1
        with model.no_sync():
            scaler.scale(loss(model, first)).backward()
        factor = math.inf if poisoned and not STRATEGIES[strategy].sharded else 1.0
        scaler.scale(loss(model, second) * factor).backward()
        if poisoned and STRATEGIES[strategy].sharded:
            next(p.grad for p in model.parameters() if p.grad is not None).view(-1)[0] = math.inf
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        if update != 2:
            train_alone(single, peer, [own[2 * update : 2 * update + 2] for own in ranks])
            assert fused.last_grad_norm == peer.last_grad_norm
        assert scaler.get_scale() == (8.0 if update < 2 else 4.0)
    assert fused.clock() == peer.clock() == (UPDATES - 1, 0)
    assert_same(whole(single).values(), whole(model).values())


# -- Join ----------------------------------------------------------------------------------------


def join_goes_on_without_who_is_through(folder: Path) -> None:
    """Rank 0 has two batches more; DDP divides by the ranks that are left, and hands out the last weights."""

    def trained(make: Any, joined: Any = lambda model, opt: [model]) -> tuple[torch.nn.Module, Any]:
        model = DistributedDataParallel(new_model())
        opt = make(model)
        batches = data(4, dist.get_rank())
        with Join(joined(model, opt), divide_by_initial_world_size=False):
            for batch in batches[: 8 - 2 * dist.get_rank()]:
                loss(model, batch).backward()
                opt.step()
                opt.zero_grad()
        return model, opt

    sgd = {"lr": 0.05, "momentum": 0.9}
    theirs, _ = trained(lambda model: torch.optim.SGD(model.parameters(), foreach=False, **sgd))
    ours, opt = trained(lambda model: fastlr.FusedSGD(model.parameters(), **sgd))
    assert_same(whole(theirs).values(), whole(ours).values())
    # The clock and the state of who was through stand where it was: they are the other's that go on.
    assert opt.clock() == (8 - 2 * dist.get_rank(), 0)
    states = [opt.state_dict()]
    dist.broadcast_object_list(states, src=0)
    opt.load_state_dict(states[0])
    assert opt.clock() == (8, 0)
    # With ZeroRedundancyOptimizer who is through steps along.
    theirs, ours = (
        trained(lambda model, kind=kind: zero(model, kind, **sgd), lambda model, opt: [model, opt])
        for kind in (torch.optim.SGD, fastlr.FusedSGD)
    )
    assert_same(whole(theirs[0]).values(), whole(ours[0]).values())
    assert ours[1].optim.clock() == (8, 0)


# -- range test ----------------------------------------------------------------------------------


def range_test_leaves_nothing(folder: Path, strategy: str) -> None:
    """Every rank gets the same answer, and the training is none the wiser, before its first pass or later."""

    def trained(tested: bool) -> tuple[dict[str, torch.Tensor], list[list[float]]]:
        model = STRATEGIES[strategy].wrap(new_model())
        opt = fastlr.FusedAdamW(model.parameters(), lr=fastlr.Cosine(0.1, 0.0, 20))
        batches = data(UPDATES, dist.get_rank())
        curves = []
        for part in (batches[:UPDATES], batches[UPDATES:]):
            with torch.no_grad():  # after which FSDP1 leaves parameters whole
                model(batches[0][0])
            if tested:
                found = fastlr.range_test(
                    model, opt, torch.nn.functional.cross_entropy, batches, batches[:2],
                    num_steps=20, val_every=10, accumulate=2, progress=False,
                )  # fmt: skip
                curves.append([*found.losses, *found.accuracies[9::10]])
            train(model, opt, part)
        return whole(model), curves

    plain, _ = trained(False)
    tested, curves = trained(True)
    assert_same(plain.values(), tested.values())
    assert len(curves[0]) == 22
    assert curves[0] != curves[1]
    everybodys: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybodys, curves)
    assert all(other == curves for other in everybodys)


def range_test_where_a_rank_has_nothing(folder: Path, strategy: str) -> None:
    """Of a single weight one rank alone has a gradient."""
    model = STRATEGIES[strategy].wrap(torch.nn.Linear(1, 1, bias=False))
    opt = fastlr.FusedSGD(model.parameters(), lr=0.1)
    batches = [(torch.ones(4, 1), torch.full((4, 1), 3.0))]
    mean_square = torch.nn.functional.mse_loss
    with torch.no_grad():  # after which FSDP leaves parameters whole
        model(batches[0][0])
    found = fastlr.range_test(model, opt, mean_square, batches, num_steps=20, progress=False)
    assert found.losses[-1] < found.losses[0]
    with pytest.raises(ValueError, match="the gradient is zero everywhere"):
        fastlr.range_test(model, opt, lambda x, y: 0.0 * mean_square(x, y), batches, progress=False)


def range_test_with_zero(folder: Path) -> None:
    """With a number as lr it sweeps as any optimizer."""
    batches = data(UPDATES, dist.get_rank())

    def tested(make: Any) -> Any:
        model = DistributedDataParallel(new_model())
        before = whole(model)
        found = fastlr.range_test(
            model, make(model), torch.nn.functional.cross_entropy, batches, num_steps=20, progress=False
        )
        assert_same(before.values(), whole(model).values())
        return found.losses.tolist()

    whole_one = tested(lambda model: fastlr.FusedSGD(model.parameters(), lr=0.1, momentum=0.9))
    assert tested(lambda model: zero(model, fastlr.FusedSGD, lr=0.1, momentum=0.9)) == whole_one


# -- the page ------------------------------------------------------------------------------------

PAGE = Path(__file__).parent.parent / "docs" / "frameworks" / "torch_distributed.md"


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def page_runs(folder: Path, example: int) -> None:
    """Each block by itself, with what any reader has."""
    x, y = torch.randn(32, 4), torch.randint(0, 3, (32,))
    names = {
        "torch": torch,
        "fastlr": fastlr,
        "model": torch.nn.Linear(4, 3),
        "loss_fn": torch.nn.functional.cross_entropy,
        "loader": list(zip(x.split(8), y.split(8), strict=True)),
        "device": torch.device("cpu"),
    }
    os.chdir(folder)
    exec(compile(examples()[example], PAGE.name, "exec"), names)
    clocks: list[Any] = [None] * dist.get_world_size()
    opt = names["opt"]
    dist.all_gather_object(clocks, getattr(opt, "optim", opt).clock())
    assert clocks == [(4, 0)] * 2


CASES = {
    **{f"page-{example}": Case(2, page_runs, {"example": example}) for example in range(len(examples()))},
    **{
        f"{strategy}-{rule}": Case(2, trains_as_one_process, {"strategy": strategy, "rule": rule})
        for strategy in STRATEGIES
        for rule in RULES
    },
    **{
        f"{strategy}-averages": Case(2, computes_with_averages, {"strategy": strategy})
        for strategy in STRATEGIES
    },
    **{f"zero-{rule}": Case(2, zero_trains_as_one_process, {"rule": rule}) for rule in RULES},
    "zero-refuses": Case(2, zero_says_what_it_cannot),
    "zero-clips": Case(2, zero_clips_before_the_step),
    **{
        f"{strategy}-norm": Case(2, fsdp1_has_no_norm_of_its_own, {"strategy": strategy})
        for strategy in ("fsdp1-flat", "fsdp1-orig")
    },
    **{
        f"{strategy}-{kind.__name__}": Case(
            2, skips_on_all_ranks, {"strategy": strategy, "kind": kind, "options": options}
        )
        for strategy, kind, options in (
            ("fsdp1-flat", ShardedGradScaler, {}),
            ("fsdp1-orig", ShardedGradScaler, {}),
            ("ddp", torch.amp.GradScaler, {"max_grad_norm": 0.125}),
            ("ddp-bucket-view", fastlr.GradScaler, {"max_grad_norm": 0.125}),
        )
    },
    **{
        f"zero-{kind.__module__.split('.')[0]}-GradScaler": Case(
            2, skips_on_all_ranks, {"strategy": "ddp", "kind": kind, "options": {}, "share": True}
        )
        for kind in (torch.amp.GradScaler, fastlr.GradScaler)
    },
    "join": Case(2, join_goes_on_without_who_is_through),
    **{
        f"{strategy}-range-test": Case(2, range_test_leaves_nothing, {"strategy": strategy})
        for strategy in STRATEGIES
    },
    **{
        f"{strategy}-nothing": Case(2, range_test_where_a_rank_has_nothing, {"strategy": strategy})
        for strategy, how in STRATEGIES.items()
        if how.sharded
    },
    "zero-range-test": Case(2, range_test_with_zero),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return outcomes(CASES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_on_two_ranks(told: dict[str, str], case: str) -> None:
    if told[case]:
        pytest.fail(told[case], pytrace=False)


def test_steps_come_to_their_parameters_devices() -> None:
    """ZeroRedundancyOptimizer loads them on the host; here a device that does nothing stands for others."""
    opt = fastlr.FusedAdamW([torch.zeros(3, requires_grad=True)])
    p = torch.zeros(3, device="meta")
    at_home = {"step": torch.tensor(3.0)}
    states = {
        p: {"exp_avg": torch.zeros(3, device="meta"), "step": torch.tensor(2.0)},
        torch.zeros(3): at_home,
    }
    step = at_home["step"]
    opt._rule_state.bring_home(states)
    assert states[p]["step"].device == p.device
    assert at_home["step"] is step
