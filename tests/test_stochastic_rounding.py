"""bfloat16 parameters rounded by chance: unbiased, and the same wherever the step is made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from cuda_on_cpu.recording import Graph, Streams
from helpers import LAYOUTS, assert_same, parameters, set_gradients, through_file
from rule_table import Rule, with_rules

import fastlr
from fastlr import _core

with_backends = pytest.mark.usefixtures("backend")


def rounded(values: torch.Tensor, steps: int = 1, **options: float) -> list[torch.Tensor]:
    """What zeros become in updates that would make them these values, each time from zero on."""
    p = torch.nn.Parameter(torch.zeros(values.shape, dtype=torch.bfloat16))
    # A gradient is a bfloat16, too: its upper part, and what of the value is beyond as a rate.
    fused = fastlr.FusedSGD([p], lr=1.0, stochastic_rounding=True, **options)
    found = []
    for _ in range(steps):
        p.data.copy_(values.bfloat16())
        p.grad = -(values - values.bfloat16().float()).bfloat16()
        fused.step()
        found.append(p.detach().clone())
    return found


def chances(n: int, steps: int, **options: float) -> np.ndarray:
    """Of 1 + 2**-9, a quarter of the way to the next: which elements went up."""
    found = rounded(torch.full((n,), 1.0 + 2.0**-9), steps, **options)
    ups = torch.stack(found).float().cpu().numpy()
    assert set(np.unique(ups)) == {1.0, 1.0 + 2.0**-7}
    return ups > 1.0


@with_backends
def test_mean_and_variance() -> None:
    """Of as many as show a bias of a thousandth of a unit in the last place."""
    n, steps = 2**17, 8
    ups = chances(n, steps)
    deviation = (0.25 * 0.75 / ups.size) ** 0.5
    assert abs(ups.mean() - 0.25) < 4 * deviation
    # Independent of each other: sums over elements, and over updates, spread as a binomial's.
    for axis, count in ((1, n), (0, steps)):
        sums = ups.sum(axis=axis) - 0.25 * count
        expected = 0.25 * 0.75 * count
        assert abs((sums**2).mean() / expected - 1.0) < 4 * (2.0 / sums.size) ** 0.5 + 0.02
    for shift in (1, 2, 3, 8, 256, 512, 8192):
        pairs = (ups[:, shift:] & ups[:, :-shift]).mean()
        assert abs(pairs - 0.0625) < 4 * (0.0625 * 0.9375 / ups.size) ** 0.5


@with_backends
@pytest.mark.parametrize("part", [1, 2**7, 2**15, 2**16 - 1])
def test_as_often_as_it_is_near(part: int) -> None:
    """All 16 bits that a bfloat16 lacks of a float32 count; both signs alike."""
    n = 2**18
    master = torch.cat([torch.full((n,), 0x3F800000 + part, dtype=torch.int32)] * 2).view(torch.float32)
    master[n:] *= -1
    p = torch.nn.Parameter(torch.zeros(2 * n, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p) * torch.tensor([-1.0, 1.0]).repeat_interleave(n).bfloat16()
    fused = fastlr.FusedSGD([p], lr=float(master[0]), stochastic_rounding=True)
    fused.step()
    found = p.detach().float().abs()
    assert set(found.unique().tolist()) <= {1.0, 1.0 + 2.0**-7}
    assert bool((p.detach().sign() == master.sign()).all())
    for half in (found[:n], found[n:]):
        ups = float((half > 1.0).double().mean())
        chance = part / 2**16
        assert abs(ups - chance) < 4.5 * (chance * (1 - chance) / n) ** 0.5 + 1e-9


@with_backends
def test_small_updates_are_not_lost() -> None:
    p, q = (torch.nn.Parameter(torch.ones(2**14, dtype=torch.bfloat16)) for _ in range(2))
    fused = fastlr.FusedSGD([p], lr=2.0**-12, stochastic_rounding=True)
    plain = fastlr.FusedSGD([q], lr=2.0**-12)
    for _ in range(256):
        for x in (p, q):
            x.grad = torch.full_like(x, -1.0)
        fused.step()
        plain.step()
    assert float(p.detach().double().mean()) == pytest.approx(1.0 + 2.0**-4, abs=1e-3)
    assert bool((q == 1.0).all())


@with_backends
@with_rules
def test_to_one_of_the_two_neighbours(rule: Rule) -> None:
    """Of what a step with master weights computes, with the state that it keeps."""
    ours, theirs = (parameters([(8193,), (33, 9), ()], torch.bfloat16) for _ in range(2))
    options = {**rule.full, "state_dtype": torch.float32}
    fused = rule.make(ours, stochastic_rounding=True, **options)
    exact = rule.make(theirs, master_weights=True, **options)
    set_gradients(0, ours, theirs)
    fused.step()
    exact.step()
    for p, q in zip(ours, theirs, strict=True):
        upper = q.detach().view(torch.int16).to(torch.int32) << 16
        master = (upper + exact.state[q]["master"].to(torch.int32)).view(torch.int32)
        low = master >> 16
        mine = p.detach().view(torch.int16).to(torch.int32)
        exactly = (master & 0xFFFF) == 0
        assert bool(((mine == low) | ((mine == low + 1) & ~exactly)).all())


def run(make: Callable[[], list[torch.nn.Parameter]], steps: int = 3) -> list[torch.Tensor]:
    model = make()
    fused = fastlr.FusedAdamW(model, lr=0.1, stochastic_rounding=True, max_grad_norm=1.0, ema_decay=0.5)
    for step in range(steps):
        set_gradients(step, model)
        fused.step()
    return [p.detach().clone() for p in model] + [fused.state[p]["ema"].clone() for p in model]


def test_threads_and_simd_levels_make_no_difference() -> None:
    found = []
    level = _core.build_info()["simd_level"]
    try:
        for name in _core.build_info()["simd_levels"]:
            for threads in (1, 2, 3):
                _core.set_simd_level(name)
                torch.set_num_threads(threads)
                found.append(run(lambda: parameters([(70_001,), (33,)], torch.bfloat16)))
    finally:
        _core.set_simd_level(level)
    for other in found[1:]:
        assert_same(found[0], other)


def test_a_device_rounds_as_the_host_does(on_emulated_cuda: ModuleType) -> None:
    def make() -> list[torch.nn.Parameter]:
        wide = parameters([(20_001,), (33, 5), (7,)], torch.bfloat16)
        wide[1].data = wide[1].detach().t()
        return wide

    on_device = run(make)
    on_emulated_cuda.route_host_to_cuda(0)
    assert_same(run(make), on_device)


@with_backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_chance_goes_by_memory_and_not_by_how_a_gradient_lies(layout: str) -> None:
    base = torch.randn((6, 4, 5, 3), generator=torch.Generator().manual_seed(0), device="cpu")
    found = []
    for turned in (False, True):
        p = LAYOUTS[layout](base.to(torch.get_default_device(), torch.bfloat16)).detach().requires_grad_()
        fused = fastlr.FusedSGD([p], lr=0.01, momentum=0.9, stochastic_rounding=True)
        for step in range(3):
            set_gradients(step, [p])
            if turned:
                gradient = p.grad.permute(*reversed(range(p.dim()))).contiguous()
                p.grad = gradient.permute(*reversed(range(p.dim())))
            fused.step()
        found.append(p.detach())
    assert_same(found[:1], found[1:])


@with_backends
@with_rules
def test_a_resume_in_the_middle_changes_nothing(rule: Rule) -> None:
    ours = parameters([(300,), (9000,)], torch.bfloat16)
    fused = rule.make(ours, stochastic_rounding=True, rounding_seed=7, **rule.full)
    for step in range(2):
        set_gradients(step, ours)
        fused.step()
    model = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    loaded = rule.make(model)
    loaded.load_state_dict(through_file(fused.state_dict()))
    other = copy.deepcopy(fused)
    for step in range(2, 5):
        twin = other.param_groups[0]["params"]
        set_gradients(step, ours, model, twin)
        for optimizer in (fused, loaded, other):
            optimizer.step()
    assert_same(ours, model)
    assert_same(ours, twin)


@with_backends
def test_seeds_places_and_updates_make_a_difference() -> None:
    values = torch.full((4096,), 1.0 + 2.0**-8)
    first, second = rounded(values, 2)
    (other,) = rounded(values, rounding_seed=1)
    for a, b in ((first, second), (first, other)):
        assert 0.4 < float((a != b).double().mean()) < 0.6
    model = [torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2)]
    fused = fastlr.FusedSGD(model, lr=2.0**-8, stochastic_rounding=True)
    for p in model:
        p.grad = torch.full_like(p, -1.0)
    fused.step()
    assert 0.4 < float((model[0] != model[1]).double().mean()) < 0.6


@with_backends
def test_what_is_no_number_and_wide_parameters_stay() -> None:
    p = torch.nn.Parameter(torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0], dtype=torch.bfloat16))
    before = p.detach().clone()
    wide, plain = (parameters([(50,)]) for _ in range(2))
    fused = fastlr.FusedSGD([p, *wide], lr=0.1, stochastic_rounding=True)
    other = fastlr.FusedSGD(plain, lr=0.1)
    set_gradients(0, wide, plain)
    p.grad = torch.zeros_like(p)
    fused.step()
    other.step()
    assert_same([before], [p])
    assert_same(plain, wide)


@with_backends
def test_what_is_refused() -> None:
    halves = parameters([(5, 2)], torch.float16)
    message = r"stochastic_rounding of parameter group 0 must be False.* shape \(5, 2\) has float16"
    for given in (halves, [("weight", halves[0])], [{"params": halves[0]}]):
        with pytest.raises(ValueError, match=message):
            fastlr.FusedSGD(given, stochastic_rounding=True)
    fused = fastlr.FusedSGD(halves)
    fused.param_groups[0]["stochastic_rounding"] = True
    set_gradients(0, halves)
    before = halves[0].detach().clone()
    with pytest.raises(ValueError, match="stochastic_rounding is for bfloat16, and parameter 0 of group 0"):
        fused.step()
    assert_same([before], halves)
    with pytest.raises(ValueError, match="rounding_seed"):
        fastlr.FusedSGD(parameters([(5,)]), rounding_seed=-1)


def test_a_file_for_bfloat16_is_refused_beside_float16() -> None:
    saved = fastlr.FusedSGD(parameters([(5,)], torch.bfloat16), stochastic_rounding=True).state_dict()
    optimizer = fastlr.FusedSGD(parameters([(5,)], torch.float16), master_weights=True)
    kept = str(optimizer.state_dict())
    message = r"^stochastic_rounding of the file's parameter group 0 must be False.* \(5,\) has float16"
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(through_file(saved))
    assert str(optimizer.state_dict()) == kept
    optimizer.step()


@pytest.fixture
def cuda(on_emulated_cuda: ModuleType, streams: Streams) -> ModuleType:
    return on_emulated_cuda


def test_a_graph_rounds_anew_on_every_replay(cuda: ModuleType) -> None:
    ours, theirs = (parameters([(9000,), (5,)], torch.bfloat16) for _ in range(2))
    fused, other = (fastlr.FusedSGD(m, lr=0.1, stochastic_rounding=True) for m in (ours, theirs))
    set_gradients(0, ours, theirs)
    fused.step()
    other.step()
    graph = Graph(cuda, fused.step)
    for _ in range(3):
        graph.replay()
        other.step()
    assert_same(theirs, ours)
