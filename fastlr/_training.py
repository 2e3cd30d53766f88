"""The training that the demo and the papers' claims share: one plain loop, and what goes into it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice, repeat
from typing import TypeVar

import torch

from fastlr.data import Batches
from fastlr.range_test import RangeTestResult, range_test

T = TypeVar("T")


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    measure_at: Sequence[int],
    measure: Callable[[], T],
) -> tuple[list[T], float]:
    """Trains a classifier, going through the batches again and again.

    Returns what ``measure`` says after each of the given numbers of updates, the last of which ends the run;
    and the seconds that the updates took, without those of measuring.
    """
    endless = chain.from_iterable(repeat(batches))
    finish = waiting_for(model)
    measured: list[T] = []
    seconds, done = 0.0, 0
    for stop in measure_at:
        finish()
        begin = time.perf_counter()
        for x, y in islice(endless, stop - done):
            torch.nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        finish()
        seconds += time.perf_counter() - begin
        done = stop
        measured.append(measure())
    return measured, seconds


def waiting_for(model: torch.nn.Module) -> Callable[[], None]:
    """What waits until the model's device has done all that it was given, so that a clock can be read."""
    device = next(model.parameters()).device
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


def accuracy(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """The part of the samples that the model, in eval mode, takes for what they are."""
    training = model.training
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(images).argmax(1) == labels).sum()) for images, labels in Batches(x, y, 10_000)
        )
    model.train(training)
    return right / len(y)


def points(updates: int, count: int) -> tuple[int, ...]:
    """Numbers of updates, evenly apart, after which to measure; the last is the end of the run."""
    return tuple(sorted({round(updates * part / count) for part in range(1, count + 1)} - {0}))


def seeded(seed: int, make: Callable[[], T]) -> T:
    """What ``make`` makes on the CPU with random numbers of this seed; the caller's go on as if nothing had
    been."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # that of CPUs; torch.manual_seed would seed GPUs', too
        return make()


def mlp(features: int, hidden: Sequence[int], classes: int, *, batch_norm: bool = False) -> torch.nn.Module:
    """Fully connected layers with ReLU between them."""
    layers: list[torch.nn.Module] = []
    for width in hidden:
        layers.append(torch.nn.Linear(features, width))
        if batch_norm:
            layers.append(torch.nn.BatchNorm1d(width))
        layers.append(torch.nn.ReLU())
        features = width
    return torch.nn.Sequential(*layers, torch.nn.Linear(features, classes))


def find_bounds(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    train_batches: Batches,
    val_batches: Batches,
    *,
    start_lr: float = 1e-5,
    end_lr: float = 1.0,
    num_steps: int = 400,
) -> RangeTestResult:
    """The range test as the demo and the claims run it."""
    return range_test(
        model,
        optimizer,
        torch.nn.functional.cross_entropy,
        train_batches,
        val_batches,
        start_lr=start_lr,
        end_lr=end_lr,
        num_steps=num_steps,
        val_every=5,
        progress=False,
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """The models are so small that a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
