"""skorch's nets around fastlr's optimizers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same
from pages import run_page

import fastlr
from fastlr.integrations import ReadOnlyScheduler

pytest.importorskip("skorch", reason="skorch is not installed")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    from sklearn.base import clone
    from sklearn.model_selection import GridSearchCV
    from skorch import NeuralNetClassifier
    from skorch.callbacks import Callback, Checkpoint, GradientNormClipping, LoadInitState, LRScheduler

LR = fastlr.Triangular2(0.01, 0.1, step_size_up=3)
MOMENTUM = fastlr.Cosine(0.95, 0.85, 20)
BATCHES = 5  # in each epoch


def data() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    x = generator.standard_normal((BATCHES * 8, 6), dtype=np.float32)
    return x, generator.integers(0, 3, BATCHES * 8)


class Module(torch.nn.Sequential):
    """Gives logits."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))


def make_net(**options: Any) -> NeuralNetClassifier:
    return NeuralNetClassifier(
        Module,
        **{
            "criterion": torch.nn.CrossEntropyLoss,
            "optimizer": fastlr.FusedSGD,
            "optimizer__lr": LR,
            "optimizer__momentum": MOMENTUM,
            "batch_size": 8,
            "max_epochs": 2,
            "train_split": None,
            "verbose": 0,
            **options,
        },
    )


def plain(updates: int, limit: float = float("inf"), groups: Any = None) -> tuple[Any, fastlr.FusedSGD]:
    """The same training as a plain loop."""
    model = Module()
    opt = fastlr.FusedSGD(model.parameters() if groups is None else groups(model), lr=LR, momentum=MOMENTUM)
    x, y = map(torch.from_numpy, data())
    for k in range(updates):
        batch = slice(k % BATCHES * 8, k % BATCHES * 8 + 8)
        torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        if limit < float("inf"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        opt.step()
        opt.zero_grad()
    return model, opt


def assert_same_run(expected: tuple[Any, fastlr.FusedSGD], net: NeuralNetClassifier) -> None:
    model, opt = expected
    assert opt.clock() == net.optimizer_.clock()
    assert [g["lr"] for g in opt.param_groups] == [g["lr"] for g in net.optimizer_.param_groups]
    assert_same(model.parameters(), net.module_.parameters())
    runs = (model, opt), (net.module_, net.optimizer_)
    assert_same(*([o.state[p]["momentum_buffer"] for p in m.parameters()] for m, o in runs))


def reporting(optimizer: torch.optim.Optimizer, last_epoch: int) -> ReadOnlyScheduler:
    """For skorch's callback, which makes a scheduler so."""
    return ReadOnlyScheduler(optimizer)


def rates(net: NeuralNetClassifier) -> list[float]:
    """Those that skorch's callback has put into the history."""
    return [rate for epoch in net.history[:, "batches", :, "event_lr"] for rate in epoch]


def test_a_schedule_drives_and_its_rates_are_in_the_history() -> None:
    net = make_net(callbacks=[LRScheduler(policy=reporting, step_every="batch")]).fit(*data())
    assert_same_run(plain(10), net)
    assert rates(net) == LR.values(0, 10).tolist()
    short = NeuralNetClassifier(Module, optimizer=fastlr.FusedSGD, lr=LR).initialize()
    assert short.optimizer_.param_groups[0]["lr_schedule"] == LR


def test_parameter_groups_have_schedules_of_their_own() -> None:
    own = fastlr.LinearRamp(0.0, 0.05, 20)
    net = make_net(optimizer__param_groups=[("2.*", {"lr": own})]).fit(*data())

    def groups(model: torch.nn.Module) -> list[dict[str, Any]]:
        return [{"params": model[2].parameters(), "lr": own}, {"params": model[0].parameters()}]

    assert_same_run(plain(10, groups=groups), net)


def test_clipping_is_that_of_a_plain_loop() -> None:
    net = make_net(callbacks=[GradientNormClipping(0.3)]).fit(*data())
    assert_same_run(plain(10, limit=0.3), net)


def test_a_checkpoint_resumes_to_the_bit(tmp_path: Path) -> None:
    make_net(callbacks=[Checkpoint(monitor=None, dirname=str(tmp_path))]).fit(*data())
    checkpoint = Checkpoint(monitor=None, dirname=str(tmp_path))
    net = make_net(
        module__seed=1,
        optimizer__lr=0.5,
        optimizer__momentum=0.0,
        max_epochs=1,
        callbacks=[checkpoint, LoadInitState(checkpoint)],
    )
    assert_same_run(plain(15), net.fit(*data()))


def test_a_fit_that_was_interrupted_goes_on() -> None:
    class Stop(Callback):
        def on_batch_end(self, net: Any, *_: Any, **__: Any) -> None:
            if net.optimizer_.clock().updates == 3:
                raise KeyboardInterrupt

    net = make_net(callbacks=[Stop()]).fit(*data())  # which skorch catches
    assert_same_run(plain(3), net)
    net.partial_fit(*(part[24:] for part in data()), epochs=1)
    assert_same_run(plain(5), net)


def test_searches_try_schedules() -> None:
    assert clone(make_net()).get_params()["optimizer__lr"] == LR
    search = GridSearchCV(make_net(), {"optimizer__lr": [LR, 0.0]}, cv=2, scoring="accuracy", refit=True)
    search.fit(*data())
    assert search.best_params_["optimizer__lr"] == LR
    assert search.best_estimator_.optimizer_.clock() == (10, 0)
    net = search.best_estimator_.set_params(optimizer__lr=0.25)
    assert [group["lr"] for group in net.optimizer_.param_groups] == [0.25]


def test_other_schedulers_and_cyclic_optimizers_are_noticed() -> None:
    net = make_net(callbacks=[LRScheduler(policy="StepLR", step_size=1)])
    with pytest.raises(RuntimeError, match="a schedule owns it"):
        net.fit(*data())
    with pytest.raises(TypeError, match=r"use FusedSGD with lr=fastlr.Triangular"):
        make_net(optimizer=fastlr.FusedCyclicSGD).initialize()
    cycle = {"optimizer__base_lr": 0.01, "optimizer__max_lr": 0.1, "optimizer__step_size_up": 3}
    net = make_net(optimizer=fastlr.FusedCyclicSGD, lr=0.05, optimizer__lr=0.05, **cycle).fit(*data())
    assert net.optimizer_.param_groups[0]["lr"] == fastlr.Triangular(0.01, 0.1, 3)(net.optimizer_.clock()[0])
    with pytest.raises(ValueError, match=r"lr must be between base_lr and max_lr, .* got 0\.5; .*FusedSGD"):
        make_net(optimizer=fastlr.FusedCyclicSGD, optimizer__lr=0.5, **cycle).initialize()


def test_the_page_runs() -> None:
    x, y = data()
    left = run_page("frameworks/skorch.md", torch=torch, Module=Module, X=x, y=y)
    net = left["net"]
    assert rates(net) == left["schedule"].values(0, net.optimizer_.clock().updates).tolist()
