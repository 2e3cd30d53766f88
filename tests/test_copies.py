"""Copies of many tensors, which keep every bit where PyTorch's own function on devices does not."""

from __future__ import annotations

import pytest
import torch

import fastlr
from fastlr._runtime import Runtime

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")


def copy_as_devices_do(tensors: list[torch.Tensor], originals: list[torch.Tensor]) -> None:
    """As PyTorch 2.11 was seen to on a GPU."""
    for to, of in zip(tensors, originals, strict=True):
        if torch.complex32 in (to.dtype, of.dtype):
            raise NotImplementedError('"foreach_tensor_copy" not implemented for ComplexHalf')
        if to.dtype is of.dtype and to.dtype in (torch.float16, torch.bfloat16):
            changed = of.view(torch.int16).masked_fill(of.isnan(), 0x7FFF)
            to.copy_(changed.view(of.dtype))
        else:
            to.copy_(of)


@pytest.fixture(autouse=True)
def _devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_foreach_copy_", copy_as_devices_do)


def bits(tensor: torch.Tensor) -> list[int]:
    parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[parts.element_size()]
    return parts.detach().view(words).flatten().tolist()


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float32, torch.complex32, torch.complex64],
    ids=str,
)
def test_weights_come_back_to_the_bit(dtype: torch.dtype) -> None:
    """NaN of every kind, zeros of both signs, in a parameter with gaps."""
    parts = torch.tensor([float("nan"), -0.0, 1.5, 0.0, 2.0, -3.0, 0.5, 0.25], dtype=dtype.to_real())
    words = {2: torch.int16, 4: torch.int32}[parts.element_size()]
    parts.view(words)[-1] = parts.view(words)[0] + 1  # another NaN
    memory = torch.view_as_complex(parts.view(-1, 2)) if dtype.is_complex else parts
    p = torch.nn.Parameter(memory.clone()[::2])
    p.grad = torch.ones_like(p)
    opt = fastlr.FusedSGD([p], lr=0.1, ema_decay=0.5)
    opt.step()
    with torch.no_grad():
        p.copy_(memory[::2])
    before = bits(p)
    with opt.averaged_weights():
        assert bits(p) != before
    assert bits(p) == before


def test_complex_halves_have_averages_and_masters() -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.complex32))
    p.grad = torch.ones_like(p)
    opt = fastlr.FusedSGD([p], lr=0.25, ema_decay=0.5, master_weights=True)
    opt.step()
    assert opt.state[p]["master"].tolist() == [0.75] * 3
    assert opt.state[p]["ema"].tolist() == [0.875] * 3


def test_other_types_are_converted() -> None:
    to = [torch.empty(2, dtype=torch.float16), torch.empty(2), torch.empty(2, dtype=torch.int16)]
    of = [torch.tensor([1.0, 2.0]), torch.ones(2, dtype=torch.bfloat16), torch.tensor([3.0, 4.0])]
    Runtime.copy(to, of)
    assert [tensor.tolist() for tensor in to] == [[1.0, 2.0], [1.0, 1.0], [3, 4]]
    Runtime.copy([], [])
