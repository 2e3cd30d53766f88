"""What PyTorch's distributed tensors (DTensor) are to a step: a process's part, and whose sums add up.

A :class:`Share` stands for the tensors that are cut along the same dimensions of one mesh; see NOTE: [shares]
in ``csrc/tensors.h``. Nothing here imports ``torch.distributed`` before there is a DTensor.
"""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch


class Share(NamedTuple):
    """What is cut along these dimensions of a mesh, over more than one process."""

    mesh: Any  # torch.distributed.device_mesh.DeviceMesh
    dims: tuple[int, ...]


def is_distributed(tensor: object) -> bool:
    """Whether it is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The memory that a process has of it: of a DTensor its own part, of any other all."""
    return tensor._local_tensor if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def share_of(tensor: Any) -> Share | None:
    """A DTensor's share; None: each process has all of it."""
    mesh = tensor.device_mesh
    dims = tuple(
        dim
        for dim, placement in enumerate(tensor.placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    )
    return Share(mesh, dims) if dims else None


def part(parameter: Any) -> tuple[Share | None, int]:
    """A parameter's share, and its first element in the whole one.

    The element counts in rows of the whole parameter, the first index varying slowest.

    Raises:
        ValueError: what it is are sums that are still to be added up.
    """
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = parameter.device_mesh, parameter.placements
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"a parameter, of shape {tuple(parameter.shape)}, is a DTensor with placements {placements}, of "
            "which Partial are sums to be added up; give the optimizer sharded or replicated parameters"
        )
    with unset_fake_temporarily():  # it computes with tensors, whose values fake ones have not
        _, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    first = 0
    for size, begin in zip(parameter.shape, offset, strict=True):
        first = first * size + begin
    return share_of(parameter), first


def redistributed(gradient: Any, parameter: Any) -> torch.Tensor:
    """A DTensor, as a gradient, cut as the parameter is; all processes of the mesh must ask for it.

    Raises:
        ValueError: it is on another mesh.
    """
    from torch.distributed.tensor import DTensor

    if gradient.device_mesh != parameter.device_mesh:
        raise ValueError(
            f"a tensor of shape {tuple(parameter.shape)} is a DTensor on {gradient.device_mesh}, and its "
            f"parameter one on {parameter.device_mesh}; redistribute it to that mesh"
        )
    moved: DTensor = gradient.detach().redistribute(placements=parameter.placements)
    settled = moved.to_local()  # waits for what is on its way
    return DTensor.from_local(
        settled,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def settled(gradient: Any) -> Any:
    """A DTensor without sums that are still to be added up; all processes of the mesh must ask for it."""
    from torch.distributed.tensor import Replicate

    cut = [Replicate() if placement.is_partial() else placement for placement in gradient.placements]
    return gradient.detach().redistribute(placements=cut)


def add_up(shares: Sequence[Share], sums: torch.Tensor) -> None:
    """Adds each share's sum up over the processes that have the other parts, in place.

    One reduction for each dimension of a mesh. All of its processes must call it; on CUDA devices the host
    waits for nothing.

    Args:
        sums: float64, shape (len(shares),), on the mesh's kind of device.
    """
    import torch.distributed as dist

    along: dict[tuple[Any, int], list[int]] = {}
    for place, share in enumerate(shares):
        for dim in share.dims:
            along.setdefault((share.mesh, dim), []).append(place)
    for (mesh, dim), places in along.items():
        group = mesh.get_group(dim)
        if len(places) == len(shares):
            dist.all_reduce(sums, group=group)
            continue
        some = torch.stack([sums[place] for place in places])
        dist.all_reduce(some, group=group)
        for place, total in zip(places, some.unbind(), strict=True):
            sums[place] = total


def added_up(shares: Sequence[Share], sums: Sequence[float]) -> list[float]:
    """The same of numbers on the host."""
    reduced = torch.tensor(sums, dtype=torch.float64, device=shares[0].mesh.device_type)
    add_up(shares, reduced)
    return reduced.tolist()


def any_nonzero(tensor: Any) -> bool:
    """Whether any number of it is not 0; of a DTensor, in any process, all of which must ask."""
    found = bool(local(tensor).any())
    if not is_distributed(tensor) or (share := share_of(tensor)) is None:
        return found
    return added_up([share], [float(found)])[0] > 0.0


def tell_of_inf(parameters: Iterable[torch.Tensor], found_inf: torch.Tensor) -> None:
    """Makes a number, 0 or 1, 1 where any process with other parts of the parameters has it so.

    All of them must call it; on CUDA devices the host waits for nothing.
    """
    shares = list(dict.fromkeys(share for p in parameters if is_distributed(p) and (share := share_of(p))))
    if shares:
        sums = found_inf.to(shares[0].mesh.device_type, torch.float64).repeat(len(shares))
        add_up(shares, sums)
        found_inf.copy_(sums.sum().clamp(max=1.0))


def cut_as(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape, cut as the other is, which may be plain too; itself where it is so already.

    Where one of them is a DTensor, all processes of its mesh must ask: they exchange what they have. A plain
    tensor is the same in all of them.

    Raises:
        ValueError: the two are DTensors on different meshes.
    """
    from_parts, to_parts = is_distributed(value), is_distributed(like)
    if not from_parts and not to_parts:
        return value
    if not to_parts:
        return value.detach().full_tensor()  # type: ignore[attr-defined, no-any-return]
    if from_parts:
        return redistributed(value, like)
    return own_part(value.detach().to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]


def own_part(whole: torch.Tensor, mesh: Any, placements: Sequence[Any]) -> torch.Tensor:
    """A process's part, as a DTensor, of what all processes have the same of; asks none of them."""
    from torch.distributed.tensor import DTensor, distribute_tensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if "src_data_rank" in inspect.signature(distribute_tensor).parameters:
        return distribute_tensor(whole, mesh, placements, src_data_rank=None)
    # PyTorch 2.6 would have the first process send everybody's.
    shape, first = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
    part = whole[tuple(slice(a, a + n) for a, n in zip(first, shape, strict=True))]
    part = part.clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def reshard(modules: Iterable[object]) -> None:
    """Has FSDP give up the parameters that a forward pass without a backward one leaves whole.

    They would be what the next pass computes with, and what the model says that its parameters are, whatever
    is put into the shards meanwhile. FSDP keeps them so for the outermost module, or where it is told not to
    reshard after the forward pass.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.fsdp._runtime_utils import _reshard  # which nothing public does of FSDP1

    for module in modules:
        # Not isinstance(), which asks proxies among them for what they stand for.
        if issubclass(type(module), FSDPModule):
            module.reshard()  # type: ignore[attr-defined]
        elif issubclass(type(module), FullyShardedDataParallel):
            held = vars(module)  # of one whose constructor has failed, not all
            handle = held.get("_handle")
            if held.get("_is_root") is not None and handle is not None and handle.uses_sharded_strategy:
                _reshard(module, handle, True)


def reshard_models() -> None:
    """The same of all models of this process: nothing leads from a shard to the module that has it."""
    if "torch.distributed.fsdp" in sys.modules:
        reshard(gc.get_objects())


def locals_of(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """:func:`local` of each."""
    return [local(tensor) for tensor in tensors]
