"""How ranks share a model: the ways that tests run over, and the training that they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from fastlr._exchange import no_sync

WHOLE = StateDictOptions(full_state_dict=True)


class Strategy(NamedTuple):
    """A way to share a model.

    Attributes:
        wrap: makes the model of one process that of a rank.
        sharded: whether a rank has parts of parameters.
    """

    wrap: Callable[[torch.nn.Module], torch.nn.Module]
    sharded: bool = False


def _fsdp1(use_orig_params: bool) -> Callable[[torch.nn.Module], torch.nn.Module]:
    def wrap(model: torch.nn.Module) -> torch.nn.Module:
        return FullyShardedDataParallel(
            model,
            use_orig_params=use_orig_params,
            auto_wrap_policy=ModuleWrapPolicy({torch.nn.Sequential}),
            device_id=torch.device("cpu"),
        )

    return wrap


# PyTorch 2.6's records events on streams that CPUs do not have.
FSDP2_ON_CPU = hasattr(torch.cpu.Stream, "record_event")


def _fsdp2(model: torch.nn.Module) -> torch.nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        if isinstance(module, torch.nn.Sequential) and module is not model:
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def zero(model: torch.nn.Module, kind: Any, **options: Any) -> Any:
    """A ZeroRedundancyOptimizer."""
    # Here, as the import warns of torch.jit, which is an error in the process that collects tests.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    options = {"parameters_as_bucket_view": True, **options}
    return ZeroRedundancyOptimizer(model.parameters(), kind, **options)


STRATEGIES = {
    "ddp": Strategy(DistributedDataParallel),
    "ddp-bucket-view": Strategy(lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True)),
    "fsdp1-flat": Strategy(_fsdp1(False), sharded=True),
    "fsdp1-orig": Strategy(_fsdp1(True), sharded=True),
    **({"fsdp2": Strategy(_fsdp2, sharded=True)} if FSDP2_ON_CPU else {}),
}


def new_model(seed: int = 0) -> torch.nn.Module:
    """In float64; of sizes that two and four ranks cannot share evenly."""
    torch.manual_seed(seed)
    inner = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh())
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), inner, torch.nn.Linear(5, 3)).double()


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The values of its parameters, whole, whatever the ranks have of them; all ranks have to ask."""
    state = get_model_state_dict(model, options=WHOLE)
    return {name: value.detach().clone() for name, value in state.items()}


def data(updates: int, rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A rank's two micro-batches for each of some updates."""
    generator = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(2 * updates, 4, 5, generator=generator, dtype=torch.float64)
    return list(zip(x, torch.randint(0, 3, (2 * updates, 4), generator=generator), strict=True))


def loss(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1]) / 2


def train(model: torch.nn.Module, optimizer: Any, batches: Sequence[Any], before: Any = None) -> None:
    """Updates of two micro-batches each, of which ranks exchange gradients with the second."""
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        with no_sync(model):
            loss(model, first).backward()
        loss(model, second).backward()
        if before is not None:
            before(model)
        optimizer.step()
        optimizer.zero_grad()


def train_alone(
    model: torch.nn.Module, optimizer: Any, batches: Sequence[Sequence[Any]], before: Any = None
) -> None:
    """The same on one process, with the mean of all ranks' gradients, which for two ranks is exact."""
    parameters = list(model.parameters())
    for update in range(len(batches[0]) // 2):
        means = [torch.zeros_like(p) for p in parameters]
        for own in batches:
            for batch in own[2 * update : 2 * update + 2]:
                loss(model, batch).backward()
            for mean, p in zip(means, parameters, strict=True):
                assert p.grad is not None
                mean += p.grad / len(batches)
                p.grad = None
        for mean, p in zip(means, parameters, strict=True):
            p.grad = mean
        if before is not None:
            before(model)
        optimizer.step()
        optimizer.zero_grad()
