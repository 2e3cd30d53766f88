"""Growing batches at random: plans, growth on the way, ranks, workers and models with state.

``python -m fuzz.growth 17`` in this folder's parent shows what seed 17 draws.
"""

from __future__ import annotations

import io
import random
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

import fastlr
from fastlr import BatchPlan, GrowingLoader

# A plan that the ranks or the micro-batches cannot meet is drawn anew; so many refusals are a fault.
TRIES = 200

# torch's, Python's and NumPy's.
GENERATORS = 3


@dataclass
class Case:
    """What a seed draws.

    Attributes:
        size: samples of an epoch.
        starts: of the phases.
        batch_sizes: of the phases.
        micro: micro_batch_size.
        growths: after how many updates the batch grows, to what, and ``"before"`` or ``"after"`` the step
            of that update.
        layers: what the model has besides its linear layer.
        by_count: whether weights come from ``count``.
        skips: every how manyth sample an update that begins there is skipped, as by GradScaler; 0: none.
        seeded: whether the data set draws numbers, each sample under a seed of its own.
        noise: what the noise scale is measured on: ``"parameters"``, ``"optimizer"`` or None.
    """

    size: int
    epochs: int
    starts: list[int]
    batch_sizes: list[int]
    tail: str
    world: int
    micro: int | None
    workers: int
    shuffle: bool
    growths: dict[int, tuple[int, str]]
    layers: list[str] = field(default_factory=list)
    by_count: bool = False
    skips: int = 0
    seeded: bool = False
    noise: str | None = None

    def plan(self) -> BatchPlan:
        total = self.size * self.epochs
        lr = fastlr.LinearRamp(0.1, 0.02, total, unit="sample")
        momentum = fastlr.Constant(0.9, unit="sample")
        starts, sizes = tuple(self.starts), tuple(self.batch_sizes)
        return BatchPlan(starts, sizes, lr, momentum, self.size, self.epochs, self.tail)  # type: ignore[arg-type]

    def loader(self, rank: int = 0) -> GrowingLoader:
        place = {"rank": rank, "world_size": self.world}
        return GrowingLoader(
            Drawing(self.size) if self.seeded else torch.arange(self.size), self.plan(), self.micro,
            shuffle=self.shuffle, count=counted if self.by_count else None, num_workers=self.workers,
            seed_samples=self.seeded, **place,
        )  # fmt: skip


class Drawing(torch.utils.data.Dataset[Any]):
    """Samples with a number drawn by each of the generators."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> tuple[int, torch.Tensor]:
        drawn = [float(torch.rand((), dtype=torch.float64)), random.random(), float(np.random.rand())]  # noqa: NPY002
        return i, torch.tensor(drawn, dtype=torch.float64)


def places(data: Any) -> torch.Tensor:
    """Which samples a batch's data are."""
    return data if isinstance(data, torch.Tensor) else data[0]


def counted(data: Any) -> int:
    return 1 + int(places(data).sum()) % 5


def case(seed: int) -> Case:
    """The case of a seed that a loader takes."""
    for number in range(TRIES):
        drawn = _draw(random.Random(f"{seed} {number}"))
        try:
            drawn.loader()
        except ValueError:
            continue
        return drawn
    raise AssertionError(f"seed {seed}: {TRIES} plans were refused, one after another")


def _draw(rng: random.Random) -> Case:
    tail, world = rng.choice(["carry", "keep", "drop"]), rng.choice([1, 1, 2, 3])
    size, epochs = rng.randint(max(world, 3), 24), rng.randint(1, 4)
    unit = 1
    if tail != "drop" and rng.random() < 0.8:
        unit = world  # tails that the ranks can share
        size -= size % unit
    places = range(unit, size * epochs, unit)
    starts = [0, *sorted(rng.sample(places, min(rng.choice([0, 1, 2, 3]), len(places))))]
    largest = size // world
    small = max(largest // 3, 1)
    usual = largest if tail == "drop" else small
    sizes = [world * rng.randint(1, rng.choice([small, usual, largest])) for _ in starts]
    growths = {}
    for _ in range(rng.choice([0, 1, 1, 2])):
        grown = min(max(sizes) * rng.choice([1, 2, 3]), world * largest)
        growths[rng.choice([0, 1, 1, 2, 3, 5])] = (grown, rng.choice(["before", "after"]))
    return Case(
        size, epochs, starts, sizes, tail, world, rng.choice([None, 1, 2, 3, 5]),
        2 if rng.random() < 0.15 else 0, rng.random() < 0.7, growths,
        rng.sample(["dropout", "drift"], rng.randint(0, 2)), world == 1 and rng.random() < 0.2,
        rng.choice([0, 0, 1, 2, 3]), rng.random() < 0.5,
        rng.choice([None, "parameters", "optimizer"]) if world == 1 else None,
    )  # fmt: skip


def expected_updates(case: Case, growths: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """``(start, size)`` of each update, found by walking through the run.

    Args:
        case: of which the tail rule and the phases count.
        growths: from which sample on the batch is at least how large.
    """
    total, at = case.size * case.epochs, 0
    while at < total:
        phase = sum(start <= at for start in case.starts) - 1
        batch_size = max([case.batch_sizes[phase], *(size for start, size in growths if start <= at)])
        ends = [total, *case.starts[phase + 1 : phase + 2]]
        if case.tail != "carry":
            ends.append((at // case.size + 1) * case.size)
        taken = min(batch_size, min(ends) - at)
        if taken == batch_size or case.tail != "drop":
            yield at, taken
        at += taken


class Drift(torch.nn.Module):
    """A running mean, as BatchNorm's, that a micro-batch of one sample is enough for."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


PARTS = ("model", "optimizer", "loader", "noise")
LAYERS = {"dropout": lambda: torch.nn.Dropout(0.5), "drift": Drift}


class Taken(NamedTuple):
    """A micro-batch."""

    position: int
    samples: int
    indices: list[int]
    weight: float
    drawn: list[float]


class NoiseScale:
    """The noise scale once more, by the paper's formulas, from the gradients."""

    def __init__(self, decay: float) -> None:
        self.decay, self.observations = decay, 0
        self.gradient = self.noise = self.weight = 0.0

    def observe(self, batch: fastlr.Batch, gradients: list[torch.Tensor], applied: bool) -> None:
        squares = sum(float(g.double().square().sum()) for g in gradients)
        if batch.starts_update:
            self.small = batch.samples, squares / batch.weight**2
        if not (batch.ends_update and not batch.starts_update and batch.full and applied):
            return
        (b1, g1), (b2, g2) = self.small, (batch.global_batch, squares)
        self.observations += 1
        for name, value in {
            "gradient": (b2 * g2 - b1 * g1) / (b2 - b1),
            "noise": (g1 - g2) * b1 * b2 / (b2 - b1),
            "weight": 1.0,
        }.items():
            setattr(self, name, self.decay * getattr(self, name) + (1 - self.decay) * value)


class Run:
    """One rank's training, with all that the example of docs/growing.md saves."""

    def __init__(self, case: Case, rank: int = 0, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.case = case
        self.features = torch.randn(case.size, 3, generator=torch.Generator().manual_seed(1))
        layers = [LAYERS[name]() for name in case.layers]
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 4), *layers, torch.nn.Linear(4, 1))
        plan = case.plan()
        self.optimizer = fastlr.FusedSGD(self.model.parameters(), lr=plan.lr, momentum=plan.momentum)
        self.loader = case.loader(rank).bind(self.optimizer)
        measured = self.optimizer if case.noise == "optimizer" else self.model.parameters()
        self.noise, self.own_noise = fastlr.GradientNoiseScale(measured, decay=0.9), NoiseScale(0.9)
        self.saved: list[bytes] = []
        self.updates: list[tuple[int, int]] = []
        self.epochs: list[int] = []
        self.taken: list[Taken] = []

    def save(self) -> bytes:
        file = io.BytesIO()
        parts = {name: getattr(self, name).state_dict() for name in PARTS}
        torch.save({**parts, "rng": torch.get_rng_state()}, file)
        return file.getvalue()

    def load(self, file: bytes) -> None:
        state = torch.load(io.BytesIO(file), weights_only=True)
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["rng"])

    def grow(self, updates: int, when: str) -> None:
        size, at = self.case.growths.get(updates, (0, ""))
        if not size or at != when:
            return
        before = self.loader.state_dict()
        try:
            self.loader.grow(size)
        except ValueError as error:  # that ranks or micro-batches cannot meet it can depend on the position
            reasons = ("cannot be", "fewer than the", "cannot share", "the plan has no update")
            if not any(reason in str(error) for reason in reasons) or self.loader.state_dict() != before:
                raise

    def train(self) -> None:
        if not self.optimizer.clock().updates:
            self.grow(0, "after")
        for epoch in self.loader.epochs():
            self.epochs.append(epoch.index)
            for batch in epoch:
                assert batch.epoch == epoch.index == batch.position // self.case.size
                assert batch.position == self.loader.samples == self.optimizer.clock().samples
                at, drawn = places(batch.data), batch.data[1] if self.case.seeded else torch.zeros(0)
                noted = drawn.flatten().tolist()
                self.taken.append(Taken(batch.position, batch.samples, at.tolist(), batch.weight, noted))
                x = self.features[at]
                x = x + drawn.to(x) if self.case.seeded else x
                loss = self.model(x).sin().mean()  # which no rate lets diverge
                (loss * batch.weight).backward()
                if batch.ends_update:
                    self.grow(self.optimizer.clock().updates + 1, "before")
                if not self.case.layers:  # nothing that an update under way has changed already
                    self.saved.append(self.save())
                skipped = self.case.skips > 0 and batch.position % self.case.skips == 0
                self.observe(batch, skipped)
                if not batch.ends_update:
                    continue
                if skipped:
                    self.optimizer.found_inf = torch.ones(())
                self.optimizer.step()
                assert self.optimizer.last_step_skipped == skipped
                if skipped:
                    del self.optimizer.found_inf
                self.optimizer.zero_grad()
                self.grow(self.optimizer.clock().updates, "after")
                self.updates.append((batch.position, batch.global_batch))
                self.saved.append(self.save())
            assert epoch.finished
            self.saved.append(self.save())
        assert self.loader.samples == self.optimizer.clock().samples == self.case.size * self.case.epochs

    def observe(self, batch: fastlr.Batch, skipped: bool) -> None:
        if self.case.noise is None:
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "an update of one micro-batch")
            self.noise.observe(batch)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.own_noise.observe(batch, gradients, not skipped or self.case.noise == "parameters")

    def trained(self) -> list[torch.Tensor]:
        """All that training changed: weights, buffers, momenta."""
        return [
            *self.model.state_dict().values(),
            *(entry["momentum_buffer"] for entry in self.optimizer.state.values()),
        ]


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(case(int(argument)))
