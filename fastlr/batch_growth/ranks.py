"""What the ranks of a run tell one another."""

from __future__ import annotations

import torch


def group_size() -> int:
    """Ranks of the default process group; 1 where there is none."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def sum_over_ranks(numbers: list[float], ranks: int) -> list[float]:
    """The sums over all ranks, on every rank.

    Args:
        numbers: this rank's.
        ranks: how many there have to be.
    """
    if ranks == 1:
        return numbers
    if ranks != group_size():
        raise RuntimeError(
            f"numbers of {ranks} ranks are to be added, but torch.distributed has {group_size()}; leave rank "
            "and world_size to torch.distributed.init_process_group()"
        )
    sums = torch.tensor(numbers, dtype=torch.float64, device=_device())
    torch.distributed.all_reduce(sums)
    return sums.tolist()


def ranks_agree(number: int) -> bool:
    """Whether all ranks of the default process group have the same number, in 0 .. 2**63 - 1."""
    if group_size() == 1:
        return True
    bounds = torch.tensor([number, -number], dtype=torch.int64, device=_device())
    torch.distributed.all_reduce(bounds, torch.distributed.ReduceOp.MAX)
    highest, lowest = bounds.tolist()
    return bool(highest == -lowest)


def _device() -> str:
    return "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
