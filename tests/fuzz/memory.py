"""Tensors that lie in memory in many ways, beside twins that lie there plainly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import torch

SHAPES: list[tuple[int, ...]] = [
    (),
    (0,),
    (3, 0, 2),
    (1,),
    (7,),
    (33,),
    (5, 4),
    (2, 3, 4),
    (4, 1, 3),
    (64,),
    (513,),
]
EXACT = [torch.float32, torch.float64, torch.complex64, torch.complex128]
DTYPES = [*EXACT, torch.float32, torch.float16, torch.bfloat16]


def as_reals(tensor: torch.Tensor) -> torch.Tensor:
    """A complex tensor as pairs of reals."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def random_values(rng: Random, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Mostly ordinary, sometimes tiny, and now and then what numbers have at their ends."""
    generator = torch.Generator("cpu").manual_seed(rng.randrange(2**31))
    wide = torch.complex128 if dtype.is_complex else torch.float64
    values = torch.randn(shape, generator=generator, dtype=wide, device="cpu")
    values *= rng.choice([1.0, 1.0, 1.0, 1e-3, 1e-38])
    if values.numel() and rng.random() < 0.03:
        special = rng.choice([0.0, -0.0, float("inf"), float("nan"), 1e-310, 3e38])
        values.view(-1)[rng.randrange(values.numel())] = special
    return values.to(dtype)


@dataclass
class Memory:
    """A storage of which parameters are views, and what must stay as it is around them."""

    base: torch.Tensor
    covered: torch.Tensor = field(init=False)
    before: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.covered = torch.zeros(self.base.shape, dtype=torch.bool, device=self.base.device)
        self.before = self.base.clone()

    def view(self, shape: Sequence[int], strides: Sequence[int], offset: int) -> torch.Tensor:
        self.covered.as_strided(shape, strides, offset).fill_(True)
        return self.base.as_strided(shape, strides, offset)

    def check(self) -> None:
        size = self.base.element_size()
        kept, now = (t[~self.covered].view(torch.uint8) for t in (self.before, self.base))
        assert torch.equal(kept, now), f"elements of {size} bytes between those of a parameter were written"


def laid_out(rng: Random, values: torch.Tensor, kind: str | None = None) -> tuple[torch.Tensor, Memory]:
    """The values somewhere in a storage full of NaN, of integers full of -1, on the test's default device."""
    kind = kind or rng.choice(["contiguous", "contiguous", "permuted", "misaligned", "gaps", "all"])
    dims = list(range(values.dim()))
    if kind in ("permuted", "all"):
        rng.shuffle(dims)
    gap = rng.choice([2, 3]) if kind in ("gaps", "all") else 1
    offset = rng.randrange(1, 9) if kind in ("misaligned", "all") else 0
    strides, step = [0] * values.dim(), gap
    for dim in reversed(dims):
        strides[dim] = step
        step *= max(values.shape[dim], 1)
    if kind == "all":  # a dimension of one element may have any stride
        strides = [
            rng.choice([0, stride, 12345]) if n == 1 else stride
            for n, stride in zip(values.shape, strides, strict=True)
        ]
    poison = float("nan") if values.dtype.is_floating_point or values.is_complex() else -1
    base = torch.full((offset + step + rng.randrange(9),), poison, dtype=values.dtype)
    memory = Memory(base)
    view = memory.view(values.shape, strides, offset)
    view.copy_(values)
    return view, memory


def gradient_laid_out(rng: Random, gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The gradient of those values as autograd, hooks and people lay gradients out."""
    kind = rng.choice(["same", "same", "alike", "alike", "contiguous", "any", "any", "expanded", "lazy"])
    gradient = gradient.to(parameter.device)
    if kind == "expanded" and gradient.numel():
        return gradient.flatten()[:1].view([1] * gradient.dim()).expand(gradient.shape)
    if kind == "lazy" and gradient.is_complex():
        return gradient.conj().clone(memory_format=torch.contiguous_format).resolve_conj().conj()
    if kind == "any":
        return laid_out(rng, gradient)[0]
    if kind == "alike":  # with the parameter's gaps too
        reach = sum((n - 1) * step for n, step in zip(parameter.shape, parameter.stride(), strict=True))
        base = torch.full((max(reach, 0) + 1,), float("nan"), dtype=gradient.dtype, device=gradient.device)
        return base.as_strided(parameter.shape, parameter.stride()).copy_(gradient)
    return torch.empty_like(parameter, requires_grad=False).copy_(gradient) if kind == "same" else gradient


def rounded(values: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """To the type, or its reals, and back."""
    assert dtype is not None
    return values.to(dtype.to_real() if dtype.is_complex else dtype).to(values.dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = (a == b) | (a.isnan() & b.isnan())
    return bool(same.all())


def assert_twins(what: str, ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> None:
    """Equal to the bit, any NaN being like another."""
    assert ours.dtype == dtype, f"{what} has {ours.dtype}, not {dtype}"
    ours = as_reals(ours.cpu())
    theirs = theirs.to(ours.dtype)
    assert ours.shape == theirs.shape, what
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    assert bool(same.all()), f"{what}: {int((~same).sum())} of {same.numel()} elements differ"
