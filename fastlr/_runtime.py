"""PyTorch's memory, devices and streams, as the native step asks for them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import increment_version

from fastlr import _distributed
from fastlr._distributed import local, locals_of


def as_copied(to: torch.Tensor, of: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as PyTorch's copy of many tensors takes them on devices too.

    There it knows no complex numbers of halves, and makes one NaN of all that halves of one type have.
    """
    if to.is_complex() and of.is_complex():
        to, of = torch.view_as_real(to), torch.view_as_real(of)
    if to.dtype is of.dtype and to.dtype.itemsize == 2:
        to, of = to.view(torch.int16), of.view(torch.int16)
    return to, of


class Runtime:
    """What native code calls; it holds nothing.

    A device is the index of a CUDA device, or a negative number: host memory that is updated as a device's,
    which only tests do.
    """

    # The type that a group may ask state to be kept in.
    float32 = torch.float32

    @staticmethod
    def new_state(parameter: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        """An uninitialized tensor for a parameter's state, laid out like it; dtype: None for its own."""
        dtype = dtype or parameter.dtype
        if parameter.is_complex():
            dtype = dtype.to_complex()
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)

    @staticmethod
    def new_average(parameter: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        """The same for its average; dtype: None for its own, or float32 where its own is narrower."""
        if dtype is not None:
            dtype = torch.promote_types(parameter.dtype.to_real(), dtype)
        return Runtime.new_state(parameter, dtype)

    @staticmethod
    def is_half(parameter: torch.Tensor) -> bool:
        """Whether a parameter has a type that steps compute in a wider one."""
        return parameter.dtype in (torch.bfloat16, torch.float16, torch.complex32)

    @staticmethod
    def is_flattened(parameter: torch.Tensor) -> bool:
        """Whether FSDP1 has flattened it, so that it may be this rank's part of a parameter."""
        return getattr(parameter, "_fsdp_flattened", False)

    @staticmethod
    def new_master(parameter: torch.Tensor) -> torch.Tensor:
        """The same for what is kept of a half parameter's master: 16 bits beside a bfloat16, or all of it."""
        dtype = torch.int16 if parameter.dtype is torch.bfloat16 else torch.float32
        return Runtime.new_state(parameter, dtype)

    @staticmethod
    def begin_stages(tensors: list[torch.Tensor], parameters: list[torch.Tensor]) -> None:
        """Makes averages and masters what they are before the first update of the parameter beside them."""
        copies = [pair for pair in zip(tensors, parameters, strict=True) if pair[0].dtype is not torch.int16]
        Runtime.copy([tensor for tensor, _ in copies], [parameter for _, parameter in copies])
        Runtime.fill([tensor for tensor in tensors if tensor.dtype is torch.int16], 0.0)

    @staticmethod
    def new_step(parameter: torch.Tensor) -> torch.Tensor:
        """Where a parameter's age is kept, uninitialized: float32, shape (), on its device."""
        return torch.empty((), dtype=torch.float32, device=parameter.device)

    @staticmethod
    def fill(tensors: list[torch.Tensor], value: float) -> None:
        """Makes all numbers in them the value, of complex ones both parts; of DTensors this process's.

        Zero, which is usual, on devices in few launches: thousands would make the host wait for a stream
        that is behind.
        """
        if value == 0.0:
            alike: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
            for tensor in locals_of(tensors):
                alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
            for group in alike.values():
                torch._foreach_zero_(group)
            return
        for tensor in locals_of(tensors):
            tensor.fill_(complex(value, value) if tensor.is_complex() else value)

    @staticmethod
    def copy(tensors: list[torch.Tensor], originals: list[torch.Tensor]) -> None:
        """Makes each tensor what the one beside it is, in its own type; of DTensors this process's parts."""
        if not tensors:  # which PyTorch's function refuses
            return
        # Not under no_grad(), which Ctrl-C may keep from being left.
        to, of = ([tensor.detach() for tensor in locals_of(these)] for these in (tensors, originals))
        pairs = [as_copied(*pair) for pair in zip(to, of, strict=True)]
        torch._foreach_copy_([tensor for tensor, _ in pairs], [original for _, original in pairs])

    @staticmethod
    def gradient_like(parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """A copy of the gradient that lies in memory as the parameter does."""
        return torch.empty_like(parameter, requires_grad=False).copy_(gradient)

    # will_write(parameters) counts their versions up, so that a backward pass through an overwritten one
    # raises. PyTorch's public function is a line of Python around this one, where Ctrl-C can come up after
    # the versions are counted and before anything is written.
    will_write = staticmethod(getattr(torch._C, "_increment_version", increment_version))

    @staticmethod
    def has_no_values(tensor: torch.Tensor) -> bool:
        """Whether a tensor is nothing but a shape and a type: on the meta device, or fake."""
        return tensor.is_meta or isinstance(local(tensor), FakeTensor)

    # Of DTensors; see there.
    part = staticmethod(_distributed.part)
    redistributed = staticmethod(_distributed.redistributed)
    add_up_shares = staticmethod(_distributed.added_up)

    @staticmethod
    def add_up_shares_in(shares: list[_distributed.Share], memory: torch.Tensor) -> None:
        """The same of numbers in :meth:`new_bytes`' memory, which begins with that of what has no share."""
        _distributed.add_up(shares, memory.view(torch.float64)[1 : 1 + len(shares)])

    @staticmethod
    def read_amp(found_inf: torch.Tensor | None, grad_scale: torch.Tensor | None) -> float | None:
        """What gradients are multiplied with, None: the update is to be skipped. Waits for the device.

        ``1 / grad_scale`` is rounded to float32, as ``unscale_`` does.
        """
        if found_inf is not None and float(found_inf) != 0.0:
            return None
        if grad_scale is None:
            return 1.0
        scale = float(grad_scale)
        if math.isfinite(scale) and scale > 0.0:
            inverse = 1.0 / scale
            if float(torch.finfo(torch.float32).tiny) <= inverse <= torch.finfo(torch.float32).max:
                return float(np.float32(inverse))
        raise ValueError(f"grad_scale must be finite and > 0, and its inverse a float32, got {scale!r}")

    @staticmethod
    def new_bytes(device: int, size: int) -> torch.Tensor:
        """Uninitialized memory, on the current stream: uint8, shape (size,)."""
        return torch.empty(size, dtype=torch.uint8, device=_device(device))

    @staticmethod
    def enter(device: int) -> torch.cuda.device | None:
        """Makes a device the current one until :meth:`leave`."""
        if device < 0 or device == torch.cuda.current_device():
            return None
        guard = torch.cuda.device(device)
        guard.__enter__()  # type: ignore[no-untyped-call]
        return guard

    @staticmethod
    def leave(guard: torch.cuda.device | None) -> None:
        if guard is not None:
            guard.__exit__(None, None, None)

    @staticmethod
    def stream(device: int) -> int:
        """The current stream, as a ``cudaStream_t``."""
        return 0 if device < 0 else torch.cuda.current_stream(device).cuda_stream

    @staticmethod
    def record_stream(tensor: torch.Tensor, device: int) -> None:
        """Keeps a tensor's memory from being given out again before the current stream is done with it."""
        if device >= 0:
            tensor.record_stream(torch.cuda.current_stream(device))

    @staticmethod
    def upload(memory: torch.Tensor, offset: int, data: memoryview) -> None:
        """Copies bytes to :meth:`new_bytes`' memory from ``offset`` on, without waiting for the device.

        Through memory of PyTorch's that is pinned, and that it keeps until the copy is done.
        """
        staged = torch.empty(len(data), dtype=torch.uint8, device="cpu", pin_memory=memory.is_cuda)
        staged.numpy()[:] = np.frombuffer(data, np.uint8)
        memory[offset : offset + len(data)].copy_(staged, non_blocking=True)

    @staticmethod
    def on_device(value: torch.Tensor | float, device: int) -> torch.Tensor:
        """A number as a float32 tensor on the device: itself where it is one already."""
        if isinstance(value, torch.Tensor):
            return value.to(_device(device), torch.float32, non_blocking=True)
        return torch.tensor(value, dtype=torch.float32, device=_device(device))

    @staticmethod
    def float_at(memory: torch.Tensor, offset: int) -> torch.Tensor:
        """The float32 at a byte of :meth:`new_bytes`' memory, in that memory."""
        return memory[offset : offset + 4].view(torch.float32)


def _device(index: int) -> torch.device:
    return torch.device("cpu") if index < 0 else torch.device("cuda", index)
