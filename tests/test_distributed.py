"""What a step makes of DTensors in one process, whose other one answers nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import run_page

import fastlr
from fastlr import _distributed
from fastlr._distributed import own_part

if not torch.distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

from strategies import FSDP2_ON_CPU
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

Begin = Callable[[int], DeviceMesh]
# What each reduction makes of a sum here, so that each of them shows.
ADDED_UP = 4.0


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Begin]:
    """Makes this one of four processes, of which the others send nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def begin(rank: int) -> DeviceMesh:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        # PyTorch remembers where parts of equal meshes lie, for the rank that first asked.
        return init_device_mesh("cpu", (2, 2), mesh_dim_names=(f"dp{rank}", f"tp{rank}"))

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, **_: tensor.mul_(ADDED_UP))
    yield begin
    torch.distributed.destroy_process_group()


def parameter(mesh: DeviceMesh, whole: torch.Tensor, *cut: Any) -> torch.nn.Parameter:
    p = torch.nn.Parameter(own_part(whole, mesh, cut))
    gradient = torch.arange(1.0, 1 + whole.numel()).view_as(whole).to(whole.dtype)
    p.grad = own_part(gradient, mesh, cut)
    return p


def plain(size: int) -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.zeros(size))
    p.grad = torch.full((size,), 2.0)
    return p


ALONG_NONE = (Replicate(), Replicate())
ALONG_DP = (Shard(0), Replicate())
ALONG_TP = (Replicate(), Shard(1))
ALONG_BOTH = (Shard(0), Shard(1))


def squares_of(p: torch.Tensor) -> float:
    return _distributed.local(p.grad).square().sum().item()


@pytest.mark.parametrize("use", ["clips", "measures", "seeks"])
def test_each_share_is_added_up_along_its_own_dimensions(backend: str, begin: Begin, use: str) -> None:
    if backend == "cuda":
        pytest.skip("the mesh is of CPUs")
    mesh = begin(3)
    zeros = torch.zeros(6, 4)
    cuts = (ALONG_TP, ALONG_NONE, ALONG_DP, ALONG_BOTH, ALONG_TP)
    model = [plain(3), *(parameter(mesh, zeros, *cut) for cut in cuts), plain(20_000)]
    opt = fastlr.FusedSGD(model, lr=1.0, max_grad_norm=2.0 if use == "clips" else None)
    expected = sum(
        squares_of(p) * ADDED_UP ** sum(placement.is_shard() for placement in getattr(p, "placements", ()))
        for p in model
    )
    if use == "seeks":
        scaler = fastlr.GradScaler("cpu", init_scale=1.0)
        scaler.scale(torch.zeros(()))
        scaler.step(opt)
    else:
        opt.measure_grad_norm = True
        opt.step()
    assert opt.last_grad_norm == pytest.approx(math.sqrt(expected), rel=1e-14)
    factor = 2.0 / (math.sqrt(expected) + 1e-6) if use == "clips" else 1.0
    for p in model:
        torch.testing.assert_close(
            _distributed.local(p), _distributed.local(p.grad) * -factor, rtol=1e-6, atol=0
        )


def test_a_device_waits_for_no_norm(
    on_emulated_cuda: Any, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_here(*_: object) -> None:
        raise AssertionError("the host waited for a norm")

    monkeypatch.setattr("fastlr._runtime.Runtime.add_up_shares", staticmethod(not_here))
    mesh = begin(0)
    opt = fastlr.FusedAdamW([parameter(mesh, torch.zeros(6, 4), *ALONG_BOTH), plain(2)], max_grad_norm=1.0)
    opt.step()
    assert opt.clock().updates == 1


def test_a_process_without_gradients_adds_its_nothing(backend: str, begin: Begin) -> None:
    if backend == "cuda":
        pytest.skip("the mesh is of CPUs")
    mesh = begin(0)
    model = [parameter(mesh, torch.zeros(6, 4), *ALONG_DP)]
    opt = fastlr.FusedSGD(model, lr=1.0, max_grad_norm=1.0)
    opt.step()
    model[0].grad = None
    opt.step()
    assert opt.last_grad_norm == 0.0
    assert opt.clock().updates == 2


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize(
    ("cut", "dims", "first"),
    [
        (ALONG_NONE, None, (0, 0, 0, 0)),
        (ALONG_DP, (0,), (0, 0, 16, 16)),
        (ALONG_TP, (1,), (0, 2, 0, 2)),
        (ALONG_BOTH, (0, 1), (0, 2, 16, 18)),
        ((Shard(0), Shard(0)), (0, 1), (0, 8, 16, 24)),
    ],
)
def test_part(begin: Begin, rank: int, cut: Any, dims: Any, first: tuple[int, ...]) -> None:
    mesh = begin(rank)
    share, element = _distributed.part(parameter(mesh, torch.zeros(7, 4), *cut))
    assert share == (None if dims is None else (mesh, dims))
    assert element == first[rank]


@pytest.mark.parametrize("cut", [ALONG_DP, (Shard(0), Shard(0))])
def test_rows_are_rounded_as_if_they_were_not_cut(backend: str, begin: Begin, cut: Any) -> None:
    if backend == "cuda":
        pytest.skip("the mesh is of CPUs")

    def trained(p: torch.nn.Parameter) -> torch.Tensor:
        opt = fastlr.FusedSGD([p], lr=0.01, stochastic_rounding=True)
        for _ in range(3):
            opt.step()
        return _distributed.local(p).detach()

    whole = torch.linspace(1.0, 3.0, 4000).view(400, 10).to(torch.bfloat16)
    alone = torch.nn.Parameter(whole.clone())
    alone.grad = torch.arange(1.0, 4001).view(400, 10).to(torch.bfloat16)
    parts = [trained(parameter(begin(rank), whole.clone(), *cut)) for rank in range(4)]
    assert torch.equal(torch.cat(parts if len(parts[0]) == 100 else parts[::2]), trained(alone))


def test_versions_of_a_parameter_and_its_part_move(begin: Begin) -> None:
    p = parameter(begin(0), torch.zeros(6, 4), *ALONG_DP)
    before = p._version, p._local_tensor._version
    fastlr.FusedSGD([p], lr=0.1).step()
    assert (p._version, p._local_tensor._version) > before
    assert p._local_tensor._version > before[1]


def test_fake_parts_get_state_of_their_kind(begin: Begin) -> None:
    mesh = begin(0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        p = torch.nn.Parameter(DTensor.from_local(torch.zeros(3, 4), mesh, ALONG_DP, run_check=False))
        p.grad = torch.zeros_like(p)
        opt = fastlr.FusedAdamW([p])
        opt.step()
        average = opt.state[p]["exp_avg"]
    assert isinstance(average, DTensor)
    assert average.placements == p.placements
    assert isinstance(average._local_tensor, FakeTensor)


def test_state_that_is_cut_otherwise_is_refused(backend: str, begin: Begin) -> None:
    if backend == "cuda":
        pytest.skip("the mesh is of CPUs")
    mesh = begin(0)
    p = parameter(mesh, torch.zeros(6, 4), *ALONG_DP)
    opt = fastlr.FusedSGD([p], lr=0.1, momentum=0.9)
    opt.step()
    before = p._local_tensor.detach().clone()
    in_other_rows = (Replicate(), Shard(0))  # as many of them
    for other in (
        own_part(torch.zeros(6, 4), mesh, in_other_rows),
        torch.zeros(3, 4),
        own_part(torch.zeros(6, 4), mesh, ALONG_BOTH),
    ):
        opt.state[p]["momentum_buffer"] = other
        with pytest.raises(ValueError, match="the momentum_buffer of parameter 0 of group 0"):
            opt.step()
    assert torch.equal(before, p._local_tensor)


def test_a_plain_parameter_with_a_part_as_its_gradient_is_refused(begin: Begin) -> None:
    class Strange(torch.nn.Parameter):
        grad = None  # which PyTorch's own would not take

    mesh = begin(0)
    p = Strange(torch.zeros(6, 4))
    p.grad = own_part(torch.ones(6, 4), mesh, ALONG_DP)
    with pytest.raises(ValueError, match=r"is a DTensor, .*and the parameter a plain tensor"):
        fastlr.FusedSGD([p], lr=0.1).step()


def test_more_ways_to_cut_than_a_step_adds_up(begin: Begin) -> None:
    begin(0)
    model = []
    for k in range(17):
        mesh = init_device_mesh("cpu", (4,), mesh_dim_names=(f"d{k}",))
        model.append(parameter(mesh, torch.zeros(8), Shard(0)))
    with pytest.raises(ValueError, match="cut in 16 ways, the most of an optimizer"):
        fastlr.FusedSGD(model, lr=0.1).step()
    fastlr.FusedSGD(model[:16], lr=0.1, max_grad_norm=1.0).step()


@pytest.mark.skipif(not FSDP2_ON_CPU, reason="this PyTorch's FSDP2 does not run on CPUs")
def test_the_page_on_sharded_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    try:
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        loader = [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(3)]
        names = run_page(
            "distributed.md", model=model, loader=loader, loss_fn=torch.nn.functional.cross_entropy
        )
    finally:
        torch.distributed.destroy_process_group()
    assert names["opt"].clock().updates == 3


def test_a_file_of_whole_state_is_cut(begin: Begin) -> None:
    whole = torch.nn.Parameter(torch.zeros(6, 4))
    whole.grad = torch.arange(24.0).view(6, 4)
    alone = fastlr.FusedAdam([whole])
    alone.step()
    p = parameter(begin(2), torch.zeros(6, 4), *ALONG_DP)
    opt = fastlr.FusedAdam([p])
    opt.load_state_dict(alone.state_dict())
    average = opt.state[p]["exp_avg"]
    assert isinstance(average, DTensor)
    assert average.placements == p.placements
    assert torch.equal(average.to_local(), alone.state[whole]["exp_avg"][3:])
