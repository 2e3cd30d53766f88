"""Running something on a model and an optimizer that leaves no trace."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

import numpy as np
import torch

Undo: TypeAlias = Callable[[], object]


@contextmanager
def untouched(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, loaders: Iterable[object]
) -> Iterator[None]:
    """Whatever happens inside, afterwards model, optimizer and random numbers are bit for bit as before.

    Parameters and buffers are copied and written back. For the optimizer it is the other way round: the
    sweep works on copies, and the originals come back, so that no type or identity changes.
    """
    with ExitStack() as undo:
        for generator in (g for loader in loaders for g in _generators(loader)):
            undo.callback(_keep_generator(generator))
        undo.callback(_keep_global_generators())
        undo.callback(_keep_tensors(model, optimizer))
        undo.callback(_keep_optimizer(optimizer))
        yield


def all_parameters(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    held = [p for group in optimizer.param_groups for p in group["params"]]
    return list({id(p): p for p in (*model.parameters(), *held)}.values())


def _keep_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Undo:
    modules = [(m, m.training, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    parameters = all_parameters(model, optimizer)
    gradients = [(p, p.grad) for p in parameters]
    # An expanded tensor is left alone: nothing can write to it in place, so putting it back is enough.
    values = [
        (t, t.detach().clone())
        for t in (*parameters, *model.buffers())
        if all(stride > 0 or size < 2 for size, stride in zip(t.shape, t.stride(), strict=True))
    ]
    for p in parameters:
        p.grad = None  # so that the sweep's gradients are tensors of their own

    def undo() -> None:
        with torch.no_grad():
            for module, training, own_parameters, own_buffers in modules:
                module.training = training
                module._parameters.update(own_parameters)
                module._buffers.update(own_buffers)
            for tensor, value in values:
                tensor.copy_(value)
            for p, gradient in gradients:
                p.grad = gradient

    return undo


def _keep_optimizer(optimizer: torch.optim.Optimizer) -> Undo:
    attributes = dict(vars(optimizer))
    state = dict(optimizer.state)
    groups = [(group, dict(group)) for group in optimizer.param_groups]
    copies = {p: copy.deepcopy(entry) for p, entry in state.items()}
    group_copies = [
        {key: copy.deepcopy(value) for key, value in own.items() if key != "params"} for _, own in groups
    ]
    optimizer.state.update(copies)
    for (group, _), group_copy in zip(groups, group_copies, strict=True):
        group.update(group_copy)

    def undo() -> None:
        vars(optimizer).clear()
        vars(optimizer).update(attributes)
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, own in groups:
            group.clear()
            group.update(own)

    return undo


def _keep_global_generators() -> Undo:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]

    def undo() -> None:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return undo


def _generators(loader: object) -> Iterator[object]:
    """The random number generators that a loader and its samplers hold."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    for owner in (
        loader,
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    ):
        for value in getattr(owner, "__dict__", {}).values():
            if isinstance(value, (torch.Generator, np.random.Generator, random.Random)):
                yield value


def _keep_generator(generator: object) -> Undo:
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        return lambda: generator.set_state(state)
    if isinstance(generator, np.random.Generator):
        bits, words = generator.bit_generator, copy.deepcopy(generator.bit_generator.state)
        return lambda: setattr(bits, "state", words)
    assert isinstance(generator, random.Random)
    numbers = generator.getstate()
    return lambda: generator.setstate(numbers)
