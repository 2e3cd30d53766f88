"""Pairs of models and optimizers that are stepped side by side."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

# Around SIMD widths (8 to 16 floats), a staging block (512), a thread's share (multiples of 64) and the
# size from which a step is shared between threads (16,384).
SIZES = (0, 1, 7, 8, 9, 16, 17, 33, 63, 64, 65, 511, 512, 513, 1023, 1025, 16383, 16384, 16385, 40003)

Shape = tuple[int, ...]


def parameters(
    shapes: Iterable[Shape],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> list[torch.nn.Parameter]:
    """On the test's default device unless another is named; with the same values on all."""
    device = device or torch.get_default_device()
    generator = torch.Generator("cpu").manual_seed(seed)
    return [
        torch.nn.Parameter(_normal(shape, generator, torch.float64).to(device, dtype)) for shape in shapes
    ]


def _normal(shape: Shape, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=dtype, device="cpu")


def twins(
    shapes: Iterable[Shape], dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """The same parameters on the test's default device and, for what is compared with, on the CPU: on CUDA
    the bits of PyTorch's own optimizers depend on what the compiler contracts."""
    shapes = list(shapes)
    return parameters(shapes, dtype, seed), parameters(shapes, dtype, seed, "cpu")


def set_gradients(step: int, *models: Sequence[torch.Tensor], scale: float = 1.0) -> None:
    """The same nonzero random gradients for each of the models, others at each step."""
    generator = torch.Generator("cpu").manual_seed(1000 + step)
    for parameters in zip(*models, strict=True):
        p = parameters[0]
        real_dtype = torch.float64 if not p.is_complex() else torch.complex128
        gradient = _normal(p.shape, generator, real_dtype) * scale
        for twin in parameters:
            twin.grad = gradient.to(twin.device, twin.dtype, copy=True)


def train(steps: int, *pairs: tuple[Sequence[torch.Tensor], Callable[[], object]], start: int = 0) -> None:
    """Steps several (parameters, step function) pairs with the same gradients."""
    for step in range(start, start + steps):
        set_gradients(step, *(model for model, _ in pairs))
        for _, update in pairs:
            update()


# How far results may be apart, relatively, where a GPU evaluates a schedule through pow():
# its library's last bits are not the host's. Everything else agrees to the bit.
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-12}


def assert_same(
    expected: Iterable[torch.Tensor], actual: Iterable[torch.Tensor], close: bool = False
) -> None:
    """Equal to the bit, NaN included; or close, see CLOSE. On whatever device."""
    for index, (e, a) in enumerate(zip(expected, actual, strict=True)):
        e, a = e.detach().cpu(), a.detach().cpu()
        assert e.dtype == a.dtype, f"tensor {index}"
        assert e.shape == a.shape, f"tensor {index}"
        same = (e == a) | (e.isnan() & a.isnan())
        if close:
            same |= (e - a).abs() <= CLOSE[e.dtype] * e.abs().clamp_min(1.0)
        assert bool(same.all()), f"tensor {index} of shape {tuple(e.shape)}: {(~same).sum()} elements differ"


# -- layouts ----------------------------------------------------------------------------------------


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# What is done to a contiguous base of shape (6, 4, 5, 3) to get a parameter of some layout.
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": channels_last,
    "transposed": lambda x: x.transpose(0, 3),
    "permuted": lambda x: x.permute(2, 0, 3, 1),
    "every-second": lambda x: x[::2],
    "column": lambda x: x[:, 1],
    "inner": lambda x: x[1:3, 1:3, 1:4, ::2],
    "one-element": lambda x: x[1:2, 1:2, 1:2, 1:2],
    "unsqueezed": lambda x: x.unsqueeze(1)[:, :, ::2],
    "misaligned": lambda x: x.flatten()[1:],
}
# How the gradient lies, given one that lies as the parameter.
GRADIENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "same": lambda g: g,
    "contiguous": lambda g: g.contiguous(),
    "reversed-strides": lambda g: (
        g.permute(*reversed(range(g.dim()))).contiguous().permute(*reversed(range(g.dim())))
    ),
    "gaps": lambda g: torch.stack([g, g], dim=-1)[..., 0],
    "expanded": lambda g: g.flatten()[:1].view([1] * g.dim()).expand(g.shape),
}


# -- files -------------------------------------------------------------------------------------------


def weight() -> torch.nn.Parameter:
    """A parameter with a gradient."""
    p = torch.nn.Parameter(torch.ones(5))
    p.grad = torch.full((5,), 0.5)
    return p


def through_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def leaves(value: Any) -> set[type]:
    if isinstance(value, dict):
        return set().union(*map(leaves, value.values())) | {dict}
    if isinstance(value, (list, tuple)):
        return set().union({type(value)} - {list}, *map(leaves, value))
    return {type(value)}
