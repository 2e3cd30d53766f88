"""What the ranks of a run tell one another."""

from __future__ import annotations

import torch


def sum_over_ranks(numbers: list[float]) -> list[float]:
    """The sums over all ranks, on every rank."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return numbers
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    distributed.all_reduce(sums)
    return sums.tolist()
