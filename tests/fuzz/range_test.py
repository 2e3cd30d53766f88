"""Jobs for a range test at random: models, optimizers and loaders with all kinds of hidden state.

``python -m fuzz.range_test 17`` in this folder's parent shows what seed 17 draws.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from fingerprint import Fingerprint, fingerprint
from test_range_test_trace import HIDDEN
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import fastlr
from fuzz.rules import RULES

FEATURES, CLASSES, SAMPLES = 4, 3, 20

# A file has no position once it is read by lines, and some training before the test may do so.
KINDS = [kind for kind in HIDDEN if kind != "file, read by lines"]


class Stop(Exception):
    """What a job raises in the middle."""


class Trigger:
    """Raises at the n-th call of one of the places that call it; None: never."""

    def __init__(self, place: str, at: int, error: type[BaseException] | None) -> None:
        self.place, self.left, self.error = place, at, error

    def __call__(self, place: str) -> None:
        if place == self.place and self.error is not None:
            self.left -= 1
            if self.left < 0:
                raise self.error("stop here")


class Hiding:
    """Some kinds of state, each used twice: a list that grows with each use is no different a third time."""

    def __init__(self, kinds: list[str], draws: list[str]) -> None:
        self.kinds, self.draws, self.uses = kinds, draws, 0
        self.states = [HIDDEN[kind][0]() for kind in kinds]

    def use(self) -> None:
        if "python" in self.draws:
            random.random()
        if "numpy" in self.draws:
            np.random.rand()  # noqa: NPY002
        if "torch" in self.draws:
            torch.rand(1)
        if self.uses < 2:
            with torch.enable_grad():  # some need it, and a metric is measured without
                for kind, state in zip(self.kinds, self.states, strict=True):
                    HIDDEN[kind][1](state)
        self.uses += 1


class Layer(torch.nn.Module):
    """Does nothing but change what it hides."""

    def __init__(self, hiding: Hiding) -> None:
        super().__init__()
        self.hiding, self.calls = hiding, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.hiding.use()
        self.calls += 1
        self.last = x.detach()
        return x


class Data(Dataset[Any]):
    def __init__(self, hiding: Hiding, trigger: Trigger, writes: bool) -> None:
        self.hiding, self.trigger, self.writes, self.reads = hiding, trigger, writes, 0
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(SAMPLES, FEATURES, generator=generator)
        self.y = torch.arange(SAMPLES) % CLASSES

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.trigger("data")
        self.hiding.use()
        self.reads += 1
        if self.writes:
            self.x[i] += 0.25
        return self.x[i], self.y[i]


class Order(Sampler[int]):
    def __init__(self, hiding: Hiding, trigger: Trigger, seed: int) -> None:
        self.hiding, self.trigger, self.epoch = hiding, trigger, 0
        self.rng, self.order = np.random.default_rng(seed), list(range(SAMPLES))

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[int]:
        self.trigger("sampler")
        self.hiding.use()
        self.epoch += 1
        self.rng.shuffle(self.order)  # type: ignore[arg-type]
        yield from list(self.order)
        self.epoch += 100


class Wrapper:
    def __init__(self, loader: Any, hiding: Hiding) -> None:
        self.parts, self.hiding = [{"loader": loader}], hiding

    def __iter__(self) -> Iterator[Any]:
        self.hiding.use()
        self.iterator = iter(self.parts[0]["loader"])
        for batch in self.iterator:
            self.last = batch
            yield batch
        self.iterator = None


class Criterion(torch.nn.Module):
    """Cross-entropy, which may end the sweep by an error or a loss that is no number."""

    def __init__(self, hiding: Hiding, trigger: Trigger, bad: tuple[int, float] | None) -> None:
        super().__init__()
        self.hiding, self.trigger, self.bad, self.calls = hiding, trigger, bad, 0

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.trigger("loss")
        self.hiding.use()
        self.calls += 1
        loss = torch.nn.functional.cross_entropy(output, target)
        return loss * self.bad[1] if self.bad is not None and self.calls > self.bad[0] else loss


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: fastlr.FusedSGD(p, momentum=0.9, weight_decay=1e-3),
    "scheduled": lambda p: fastlr.FusedSGD(
        p, lr=fastlr.Cosine(0.1, 0.0, 40, unit="sample"), momentum=fastlr.Triangular(0.8, 0.9, 3)
    ),
    "FusedCyclicSGD": lambda p: fastlr.FusedCyclicSGD(p, 0.01, 0.1, 3, cycle_momentum=True, nesterov=True),
    **{name: rule.fused for name, rule in RULES.items() if name != "sgd"},
    "scheduled AdamW": lambda p: fastlr.FusedAdamW(
        p,
        lr=fastlr.Cosine(0.1, 0.0, 40, unit="sample"),
        betas=(fastlr.Triangular(0.8, 0.9, 3), 0.99),
        amsgrad=True,
    ),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW, tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "ASGD": lambda p: torch.optim.ASGD(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p),
}


class Job:
    """A training job, and the range test that is made of it."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.rng = rng = Random(f"range test {seed}")
        self.log: list[str] = []
        torch.manual_seed(seed)
        place = rng.choice(["loss", "loss", "metric", "step", "data", "sampler"])
        error = rng.choice([None, None, Stop, KeyboardInterrupt])
        self.trigger = Trigger(place, rng.choice([0, 1, 3, 7, 15]), error)
        self.note(f"{error and error.__name__} by {place} at {self.trigger.left}")
        self.things: dict[str, Any] = {"model": self.model()}
        name = rng.choice(list(OPTIMIZERS))
        self.note(name)
        self.things["optimizer"] = OPTIMIZERS[name](self.parameters())
        bad = (
            (rng.randrange(12), rng.choice([float("nan"), float("inf"), 1e4])) if rng.random() < 0.3 else None
        )
        self.things["criterion"] = Criterion(self.hiding(), self.trigger, bad)
        self.things["train_loader"] = self.loader()
        self.things["val_loader"] = self.loader() if rng.random() < 0.5 else None
        self.things["scaler"] = self.scaler()
        self.options = self.drawn_options(folder)
        self.note(f"{self.options}")
        self.used_before()

    def note(self, what: str) -> None:
        self.log.append(what)

    def hiding(self) -> Hiding:
        kinds = self.rng.sample(KINDS, self.rng.choice([0, 1, 3]))
        draws = self.rng.sample(["python", "numpy", "torch"], self.rng.choice([0, 1]))
        self.note(f"hides {kinds}, draws {draws}")
        return Hiding(kinds, draws)

    def model(self) -> torch.nn.Module:
        rng = self.rng
        kinds: list[Callable[[], torch.nn.Module]] = [
            lambda: torch.nn.BatchNorm1d(6),
            lambda: torch.nn.Dropout(0.3),
            lambda: torch.nn.ReLU(),
            lambda: Layer(self.hiding()),
            lambda: torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(6, 6)),
            lambda: torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.LayerNorm(6)),
        ]
        hidden = [rng.choice(kinds)() for _ in range(rng.randrange(4))]
        model = torch.nn.Sequential(torch.nn.Linear(FEATURES, 6), *hidden, torch.nn.Linear(6, CLASSES))
        if rng.random() < 0.3:
            model[0].weight.requires_grad_(False)
        if rng.random() < 0.3:
            model.calls = []  # type: ignore[assignment]
            model.register_forward_hook(lambda module, args, output: module.calls.append(len(output)))
        model.train(rng.random() < 0.7)
        if rng.random() < 0.3:
            model[rng.randrange(len(model))].eval()
        self.note(" ".join(str(model).split()))
        return model

    def parameters(self) -> Any:
        parameters = list(self.things["model"].parameters())
        if self.rng.random() < 0.3:
            return [{"params": parameters[:1]}, {"params": parameters[1:]}]
        return parameters

    def loader(self) -> Any:
        rng = self.rng
        data: Any = Data(self.hiding(), self.trigger, rng.random() < 0.3)
        if rng.random() < 0.3:
            data = ConcatDataset([data, Subset(Data(self.hiding(), self.trigger, False), range(4))])
        generator = torch.Generator().manual_seed(1) if rng.random() < 0.5 else None
        samplers: dict[str, Callable[[], Any]] = {
            "sequential": lambda: SequentialSampler(data),
            "random": lambda: RandomSampler(data, generator=generator),
            "replacement": lambda: RandomSampler(data, replacement=True, num_samples=13, generator=generator),
            "weighted": lambda: WeightedRandomSampler([1.0] * 15 + [2.0] * 5, 17, generator=generator),
            "subset": lambda: SubsetRandomSampler(range(3, 19), generator=generator),
            "own": lambda: Order(self.hiding(), self.trigger, 3),
        }
        name = rng.choice(list(samplers))
        sampler, size = samplers[name](), rng.choice([3, 5, 8])
        if rng.random() < 0.3:
            loader: Any = DataLoader(
                data, batch_sampler=BatchSampler(sampler, size, True), generator=generator
            )
        else:
            loader = DataLoader(data, size, sampler=sampler, drop_last=True, generator=generator)
        kind = rng.choice(["loader", "loader", "wrapped", "list"])
        self.note(f"{name} in batches of {size}, {kind}")
        if kind == "list":
            return [
                (torch.randn(size, FEATURES), torch.arange(size) % CLASSES) for _ in range(rng.randint(1, 6))
            ]
        return Wrapper(loader, self.hiding()) if kind == "wrapped" else loader

    def scaler(self) -> torch.amp.GradScaler | None:
        if self.rng.random() < 0.7:
            return None
        return torch.amp.GradScaler("cpu", init_scale=self.rng.choice([4.0, 2.0**40]), growth_interval=3)

    def drawn_options(self, folder: Path) -> dict[str, Any]:
        rng = self.rng
        options: dict[str, Any] = {
            "num_steps": rng.choice([2, 5, 12]), "end_lr": rng.choice([0.01, 1.0, 1e6]), "progress": False,
            "sweep": rng.choice(["exponential", "linear"]), "accumulate": rng.choice([1, 1, 2]),
            "repeats": rng.choice([1, 1, 2]), "val_every": rng.choice([1, 3]),
            "backup": rng.choice(["device", "host", "file", folder / "backup.pt"]),
        }  # fmt: skip
        if rng.random() < 0.2:
            options["autocast"] = torch.bfloat16
        if self.things["val_loader"] is not None:
            options["metric"] = self.metric
        return options

    def metric(self, output: torch.Tensor, target: torch.Tensor) -> float:
        self.trigger("metric")
        return float((output.argmax(1) == target).float().mean())

    def used_before(self) -> None:
        """Some training, which leaves state and gradients."""
        model, optimizer = self.things["model"], self.things["optimizer"]
        for _ in range(self.rng.choice([0, 0, 1, 3])):
            output = model(torch.randn(5, FEATURES))
            torch.nn.functional.cross_entropy(output, torch.arange(5) % CLASSES).backward()
            optimizer.step()
            if self.rng.random() < 0.5:
                optimizer.zero_grad(set_to_none=self.rng.random() < 0.5)
        trigger = self.trigger
        if trigger.place == "step":
            optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: trigger("step"))
        if self.things["scaler"] is not None and self.rng.random() < 0.5:
            self.things["scaler"].scale(torch.ones(()))

    def range_test(self) -> fastlr.RangeTestResult:
        given = (
            self.things[name] for name in ("model", "optimizer", "criterion", "train_loader", "val_loader")
        )
        return fastlr.range_test(*given, scaler=self.things["scaler"], **self.options)

    def fingerprint(self) -> Fingerprint:
        python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        numbers = repr((python, [np.asarray(part).tolist() for part in numpy], cpu.tolist()))
        return fingerprint(**self.things, numbers=numbers)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as made:
            print(*Job(int(argument), Path(made)).log, sep="\n")
