"""What a loader lets its arguments be: options of a ``DataLoader``, and a data set as large as the plan's."""

from __future__ import annotations

from typing import Any

from torch.utils.data import IterableDataset

from fastlr._checks import count, describe, flag, function, real
from fastlr.batch_growth.plan import BatchPlan

# What the loader decides itself, and what says so instead.
_REFUSED = {
    "batch_size": "the plan says how large a batch is",
    "sampler": "the order comes from seed and shuffle",
    "batch_sampler": "GrowingBatchSampler works with a DataLoader of your own",
    "generator": "the order comes from seed",
    "in_order": "batches in another order would not be the plan's",
}


def check_options(options: dict[str, Any]) -> None:
    """The kinds of what a ``DataLoader`` takes as it is, or refuses without a name; the rest it checks."""
    for name, why in _REFUSED.items():
        if name in options:
            raise TypeError(f"GrowingLoader takes no {name}: {why}")
    if "num_workers" in options:
        count("num_workers", options["num_workers"], 0)
    if options.get("prefetch_factor") is not None:
        count("prefetch_factor", options["prefetch_factor"])
    for name in ("pin_memory", "persistent_workers"):
        if name in options:
            flag(name, options[name])
    if "timeout" in options:
        real("timeout", options["timeout"])
    if options.get("worker_init_fn") is not None:
        function("worker_init_fn", options["worker_init_fn"])


def check_size(dataset: Any, plan: BatchPlan) -> None:
    if isinstance(dataset, IterableDataset):
        try:
            size = len(dataset)  # type: ignore[arg-type]
        except TypeError:
            return
        wrong = size < plan.dataset_size
    else:
        try:
            size = len(dataset)
        except TypeError:  # also of a tensor or array without a dimension
            size = -1
        if size < 0 or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"dataset must have a length and items, or be an IterableDataset, got {describe(dataset)}"
            )
        wrong = size != plan.dataset_size
    if wrong:
        raise ValueError(
            f"the plan is for {plan.dataset_size:,} samples, but the data set has {size:,}; make the plan "
            f"with dataset_size={size}"
        )
