"""After Ctrl-C at any place of a call, the call was made or it was not."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import parameters, set_gradients

import fastlr
from fastlr import _core, _files
from soak.interrupts import chosen, interrupted, places

SHAPES = [(3,), (8, 5), (), (129,)]


class Subject:
    """An optimizer in mid-run: two groups on schedules of both clocks, one of which has no momentum yet."""

    def __init__(self, steps: int = 2, **options: Any) -> None:
        self.model = parameters(SHAPES)
        self.optimizer = fastlr.FusedSGD(
            [
                {"params": self.model[:2], "lr": fastlr.Cosine(0.1, 0.0, 50)},
                {"params": self.model[2:], "lr": fastlr.LinearRamp(0.2, 0.0, 500, unit="sample")},
            ],
            momentum=fastlr.LinearRamp(0.5, 0.9, 20),
            **options,
        )
        for step in range(steps):
            set_gradients(step, self.model)
            self.optimizer.step()
            self.optimizer.advance_samples(7)
        set_gradients(steps, self.model)

    def state(self) -> list[Any]:
        """Everything that a step changes, to be compared bit for bit."""
        optimizer = self.optimizer
        state = [
            [p.detach().clone() for p in self.model],
            [p._version for p in self.model],
            optimizer.clock(),
        ]
        state += [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        state.append([dict(optimizer.state[p]) if p in optimizer.state else None for p in self.model])
        state.append(set(map(id, optimizer.state)) <= set(map(id, self.model)))
        state.append(len(optimizer._optimizer_state_dict_post_hooks))
        state.append(len(optimizer._optimizer_load_state_dict_pre_hooks))
        return clone(state)


def clone(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: clone(v) for k, v in value.items()}
    return [clone(v) for v in value] if isinstance(value, list) else value


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def hooked(subject: Subject) -> Subject:
    for register in (subject.optimizer.register_step_pre_hook, subject.optimizer.register_step_post_hook):
        register(lambda *_: None)
    return subject


def measuring(subject: Subject) -> Subject:
    subject.optimizer.measure_grad_norm = True
    return subject


def step(subject: Subject) -> None:
    subject.optimizer.step()


def scaled_step(subject: Subject) -> None:
    subject.optimizer.grad_scale, subject.optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    subject.optimizer.step()
    del subject.optimizer.grad_scale, subject.optimizer.found_inf


def state_dict(subject: Subject) -> None:
    subject.optimizer.state_dict()


OTHER = Subject(steps=4).optimizer.state_dict()


def load(subject: Subject) -> None:
    subject.optimizer.load_state_dict(OTHER)


def set_schedule(subject: Subject) -> None:
    subject.optimizer.set_schedule(
        fastlr.Cosine(0.3, 0.1, 40), momentum=fastlr.LinearRamp(0.9, 0.5, 30), start="zero"
    )


CASES: dict[str, tuple[Callable[[], Subject], Callable[[Subject], None]]] = {
    "first step": (lambda: Subject(steps=0), step),
    "step": (Subject, step),
    "hooked first step": (lambda: hooked(Subject(steps=0)), step),
    "measured step": (lambda: measuring(Subject(steps=0)), step),
    "step with GradScaler": (Subject, scaled_step),
    "state_dict": (Subject, state_dict),
    "load_state_dict": (Subject, load),
    "load_state_dict into a new one": (lambda: Subject(steps=0), load),
    "set_schedule": (Subject, set_schedule),
    "set_schedule of a group": (Subject, lambda s: s.optimizer.set_schedule(0.5, momentum=0.1, group=1)),
    "set_clock": (Subject, lambda s: s.optimizer.set_clock(updates=9, samples=99)),
    "advance_samples": (Subject, lambda s: s.optimizer.advance_samples(5)),
}


@pytest.mark.parametrize(("make", "call"), CASES.values(), ids=CASES.keys())
def test_a_call_is_made_or_it_is_not(
    make: Callable[[], Subject], call: Callable[[Subject], None], soak: bool
) -> None:
    whole = make()
    before = whole.state()
    call(whole)
    after = whole.state()
    set_gradients(99, whole.model)
    whole.optimizer.step()
    next_after = whole.state()
    unhurt = make()
    set_gradients(99, unhurt.model)
    unhurt.optimizer.step()
    next_before = unhurt.state()

    counted = make()
    count = places(lambda: call(counted))
    assert count >= 5
    ready = make()
    begins = places(lambda s=ready: call(s), until="_step_once")
    for place in chosen(count, 10_000 if soak else 200, seed=0):
        subject = make()
        assert interrupted(lambda s=subject: call(s), place), f"place {place} of {count}"
        # Hooks of a call that was stopped may be there until the next one.
        found = subject.state()[:-2]
        made = same(found, after[:-2])
        assert made or same(found, before[:-2]), f"half a call after place {place} of {count}"
        subject.optimizer.state_dict()
        if call is load:
            call(subject)
            assert same(subject.state()[2:], after[2:]), f"not loaded again after place {place} of {count}"
            continue
        # GradScaler's own affair is what comes before a step's first lines.
        assert place < begins or not hasattr(subject.optimizer, "grad_scale")
        vars(subject.optimizer).pop("grad_scale", None)
        vars(subject.optimizer).pop("found_inf", None)
        set_gradients(99, subject.model)
        subject.optimizer.step()
        assert same(subject.state(), next_after if made else next_before), f"place {place} of {count}"


class Run:
    """A training over a GrowingLoader, whose updates can be gone through again from their beginning."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        data = torch.utils.data.TensorDataset(torch.randn(30, 4), torch.randn(30, 2))
        plan = fastlr.BatchPlan.from_phases([(0, 6), (1, 9)], dataset_size=30, epochs=2, lr=0.1, momentum=0.9)
        self.model = torch.nn.Linear(4, 2)
        self.optimizer = fastlr.FusedSGD(self.model.parameters(), lr=plan.lr, momentum=plan.momentum)
        self.loader = fastlr.GrowingLoader(data, plan, micro_batch_size=3).bind(self.optimizer)

    def train(self) -> None:
        self.optimizer.zero_grad()
        for epoch in self.loader.epochs():
            for batch in epoch:
                x, y = batch.data
                ((self.model(x) - y).square().mean() * batch.weight).backward()
                if batch.ends_update:
                    self.optimizer.step()
                    self.optimizer.zero_grad()

    def saved(self) -> dict[str, Any]:
        return clone(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "loader": self.loader.state_dict(),
            }
        )

    @classmethod
    def resumed(cls, saved: dict[str, Any]) -> Run:
        run = cls()
        run.model.load_state_dict(saved["model"])
        run.optimizer.load_state_dict(saved["optimizer"])
        run.loader.load_state_dict(saved["loader"])
        return run


def test_a_training_goes_on_after_ctrl_c(soak: bool) -> None:
    """In the same process, and from a checkpoint that is written then: to the same bits."""
    whole = Run()
    whole.train()
    expected = whole.saved()
    counted = Run()
    count = places(counted.train)
    for place in chosen(count, 1500 if soak else 25, seed=1):
        run = Run()
        interrupted(run.train, place)
        saved = run.saved()
        assert saved["optimizer"]["param_groups"][0]["samples"] == saved["loader"]["samples"]
        assert saved["optimizer"]["param_groups"][0]["updates"] == len(
            [u for u in run.loader.plan.updates_from() if u.start < saved["loader"]["samples"]]
        ), f"place {place} of {count}"
        resumed = Run.resumed(saved)
        resumed.train()
        assert same(resumed.saved(), expected), f"resumed after place {place} of {count}"
        run.train()
        assert same(run.saved(), expected), f"gone on after place {place} of {count}"


@pytest.mark.parametrize("kind", ["one", "grid", "grid of torch's"])
def test_a_range_test_leaves_no_trace_of_ctrl_c(kind: str, soak: bool) -> None:
    data = torch.utils.data.TensorDataset(torch.randn(20, 4), torch.randint(3, (20,)))
    loader = torch.utils.data.DataLoader(data, batch_size=5, shuffle=True)

    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        groups = [{"params": layer.parameters()} for layer in model]
        if kind == "grid of torch's":
            return model, torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        return model, fastlr.FusedSGD(groups, lr=fastlr.Cosine(0.1, 0.0, 9), momentum=0.9)

    def call(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        arguments = (model, optimizer, torch.nn.functional.cross_entropy, loader)
        if kind == "one":
            fastlr.range_test(*arguments, num_steps=2, progress=False)
        else:
            tried = {"weight_decay": [0.5], "momentum": [0.8]}
            fastlr.range_test_grid(*arguments, **tried, num_steps=2, progress=False)

    def state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
        return clone([model.state_dict(), optimizer.state_dict(), torch.get_rng_state()])

    call(*make())  # what is done only once is done now
    subject = make()
    count = places(lambda: call(*subject))
    # Also where putting back begins and ends.
    name = "_undo" if kind == "one" else "put_back_settings"
    undoing = places(lambda: call(*subject), until=name)
    around = range(undoing - 30, min(undoing + 30, count), 1 if soak or kind != "one" else 15)
    for place in [*chosen(count, 300 if soak else 3, seed=2), *around]:
        before = state(*subject)
        interrupted(lambda: call(*subject), place)
        assert same(state(*subject), before), f"a trace after place {place} of {count}"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# Of a file that nobody has got from open() yet.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("there", [False, True], ids=["new", "there"])
def test_ctrl_c_leaves_a_file_as_it_was_or_all_new(there: bool, tmp_path: Path) -> None:
    path = tmp_path / "result.txt"

    def write() -> None:
        _files.write_text(path, "new")

    write()
    for place in range(places(write)):
        path.unlink()
        if there:
            path.write_text("old")
        interrupted(write, place)
        found = {file.name: file.read_text() for file in tmp_path.iterdir()}
        before = {"result.txt": "old"} if there else {}
        assert found in (before, {"result.txt": "new"}), f"place {place}"
        path.touch()


@pytest.fixture
def _alarms_are_ctrl_c() -> Iterator[None]:
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture(params=[True, False], ids=["exchange", "data_ptr"])
def _read_either_way(request: pytest.FixtureRequest) -> Iterator[None]:
    before = _core.exchange_enabled()
    _core.set_exchange_enabled(request.param)
    yield
    _core.set_exchange_enabled(before)


@pytest.mark.usefixtures("_alarms_are_ctrl_c", "_read_either_way")
def test_real_signals(soak: bool) -> None:
    """From outside, at any time: the steps that were counted are those that were made."""
    signals = 2000 if soak else 500
    model, twin = parameters([(30_000,), (7,), (5, 3)]), parameters([(30_000,), (7,), (5, 3)])
    set_gradients(0, model, twin)
    optimizer = fastlr.FusedSGD(model, lr=fastlr.Cosine(0.1, 0.0, 100_000), momentum=0.9)
    alone = fastlr.FusedSGD(twin, lr=fastlr.Cosine(0.1, 0.0, 100_000), momentum=0.9)
    rng = random.Random(0)
    caught = 0
    for _ in range(signals):
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 2e-3))
            while True:
                optimizer.step()
                optimizer.state_dict()
                optimizer.set_schedule(fastlr.Cosine(0.1, 0.0, 100_000), start="zero")
        except KeyboardInterrupt:
            caught += 1
        while alone.clock().updates < optimizer.clock().updates:
            alone.step()
        assert all(torch.equal(a, b) for a, b in zip(model, twin, strict=True))
        assert optimizer.clock() == alone.clock()
        assert optimizer.param_groups[0]["lr"] == alone.param_groups[0]["lr"]
    assert caught == signals


def bound_step(subject: Subject) -> None:
    """As with a GrowingLoader, whose samples go with the step."""
    subject.optimizer._samples_of_step = 7
    subject.optimizer.step()


@pytest.mark.parametrize("steps", [0, 2], ids=["first step", "step"])
def test_a_step_on_a_device_is_made_or_it_is_not(
    steps: int, on_emulated_cuda: ModuleType, soak: bool
) -> None:
    """Its kernels are launched one after another; host and device agree afterwards on what was."""

    def state(subject: Subject) -> list[Any]:
        subject.optimizer.sync()
        return subject.state()

    whole = Subject(steps)
    before = state(whole)
    bound_step(whole)
    after = state(whole)
    del before[1], after[1]
    counted = Subject(steps)
    count = places(lambda: bound_step(counted))
    for place in chosen(count, 10_000 if soak else 10, seed=0):
        subject = Subject(steps)
        interrupted(lambda s=subject: bound_step(s), place)
        found = state(subject)
        # Versions may be counted up for a step that was stopped on its way to the device.
        del found[1]
        assert same(found, after) or same(found, before), f"half a step after place {place} of {count}"
