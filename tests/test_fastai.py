"""fastai's Learner around fastlr's optimizers."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same
from pages import run_page

import fastlr

pytest.importorskip("fastai", reason="fastai is not installed")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its dependencies
    from fastai.callback import fp16
    from fastai.callback.core import Callback, CancelFitException
    from fastai.callback.schedule import ParamScheduler, SchedLin
    from fastai.callback.training import GradientAccumulation, GradientClip
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    from fastlr.integrations.fastai import Schedules

pytestmark = pytest.mark.filterwarnings(
    "ignore:numpy.core is deprecated:DeprecationWarning"
)  # fastai's loads

LR = fastlr.Triangular2(0.001, 0.02, step_size_up=3)
MOMENTUM = fastlr.Cosine(0.95, 0.85, 20)
BATCHES = 5  # in each epoch


def data() -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCHES * 8, 6, generator=generator)
    return torch.utils.data.TensorDataset(x, torch.randint(0, 3, (BATCHES * 8,), generator=generator))


def make_model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))


SGD = partial(OptimWrapper, opt=fastlr.FusedSGD)


def learner(folder: Path, *callbacks: Any, seed: int = 0, opt_func: Any = SGD, **options: Any) -> Learner:
    return Learner(
        DataLoaders(DataLoader(data(), bs=8), DataLoader(data(), bs=8), device=torch.device("cpu")),
        make_model(seed),
        loss_func=torch.nn.CrossEntropyLoss(),
        opt_func=opt_func,
        cbs=list(callbacks),
        path=folder,
        **options,
    )


def fit(learn: Learner, epochs: int, **options: Any) -> Learner:
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, **options)
    return learn


def plain(
    updates: int, accumulate: int = 1, clip: Callable[[Any], object] = lambda parameters: None
) -> tuple[torch.nn.Module, fastlr.FusedSGD]:
    """The same training as a plain loop."""
    model = make_model()
    opt = fastlr.FusedSGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    batches = [data()[k : k + 8] for k in range(0, BATCHES * 8, 8)]
    for k in range(updates * accumulate):
        x, y = batches[k % BATCHES]
        (torch.nn.functional.cross_entropy(model(x), y) / accumulate).backward()
        if k % accumulate == accumulate - 1:
            clip(list(model.parameters()))
            opt.step()
            opt.zero_grad()
    return model, opt


def assert_same_run(expected: tuple[torch.nn.Module, fastlr.FusedSGD], learn: Learner) -> None:
    model, opt = expected
    ours = learn.opt.opt
    assert opt.clock() == ours.clock()
    assert opt.param_groups[0]["lr"] == ours.param_groups[0]["lr"] == LR(opt.clock().updates)
    assert_same(model.parameters(), learn.model.parameters())
    buffers = [
        [o.state[p]["momentum_buffer"] for p in m.parameters()]
        for m, o in ((model, opt), (learn.model, ours))
    ]
    assert_same(*buffers)


def test_schedules_drive_and_the_recorder_has_the_rates_of_the_batches(tmp_path: Path) -> None:
    learn = fit(learner(tmp_path, Schedules(lr=LR, momentum=MOMENTUM)), 2)
    assert_same_run(plain(10), learn)
    assert learn.recorder.lrs == LR.values(0, 10).tolist()
    assert_same_run(plain(15), fit(learn, 1))  # which goes on


@pytest.mark.parametrize(
    "opt_func",
    [
        partial(OptimWrapper, opt=partial(fastlr.FusedSGD, lr=LR, momentum=MOMENTUM)),
        partial(OptimWrapper, opt=fastlr.FusedSGD, lr=LR, momentum=MOMENTUM),
    ],
    ids=["for the optimizer", "for the wrapper"],
)
def test_the_schedule_of_opt_func_is_taken(tmp_path: Path, opt_func: Any) -> None:
    assert_same_run(plain(10), fit(learner(tmp_path, Schedules(), opt_func=opt_func), 2))


def test_each_fit_may_begin_anew(tmp_path: Path) -> None:
    learn = fit(learner(tmp_path, Schedules(lr=LR, start="now")), 1)
    fit(learn, 1)
    assert learn.recorder.lrs == LR.values(0, 5).tolist()


def test_what_adam_has_in_a_tuple_is_driven(tmp_path: Path) -> None:
    beta1 = fastlr.Triangular(0.8, 0.95, 4, inverted=True)
    opt_func = partial(OptimWrapper, opt=fastlr.FusedAdamW)
    learn = fit(learner(tmp_path, Schedules(lr=LR, betas=(beta1, 0.99)), opt_func=opt_func), 1)
    assert learn.opt.opt.param_groups[0]["betas"] == (beta1(5), 0.99)


def test_a_saved_learner_resumes_to_the_bit(tmp_path: Path) -> None:
    first = fit(learner(tmp_path, Schedules(lr=LR, momentum=MOMENTUM)), 2)
    first.save("midway", with_opt=True)
    learn = learner(tmp_path, Schedules(lr=LR, momentum=MOMENTUM), seed=1)
    learn.load("midway", with_opt=True)
    assert learn.opt.opt.clock() == (10, 0)
    fit(learn, 4, start_epoch=2)  # the epochs behind it are skipped
    assert_same_run(plain(20), learn)


def test_the_callback_goes_with_a_learner_that_is_exported() -> None:
    copied = pickle.loads(pickle.dumps(Schedules(lr=LR, start="now")))
    assert (copied.schedules, copied.start) == ({"lr": LR}, "now")


def test_a_fit_that_was_stopped_goes_on(tmp_path: Path) -> None:
    class Stop(Callback):
        def after_batch(self) -> None:
            if self.training and self.iter == 2:
                raise CancelFitException

    learn = fit(learner(tmp_path, Schedules(lr=LR, momentum=MOMENTUM), Stop()), 2)
    assert_same_run(plain(3), learn)
    learn.remove_cb(Stop)
    fit(learn, 1)
    assert learn.opt.opt.clock() == (8, 0)
    assert learn.recorder.lrs == LR.values(3, 8).tolist()


def test_accumulation_and_clipping_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    callbacks = [GradientAccumulation(16), GradientClip(0.5)]
    learn = fit(learner(tmp_path, Schedules(lr=LR, momentum=MOMENTUM), *callbacks), 2)
    assert_same_run(plain(5, 2, lambda parameters: torch.nn.utils.clip_grad_norm_(parameters, 0.5)), learn)


def test_mixed_precision_skips_what_overflows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fastai's, made to take a CPU: the third batch overflows, and the clock does not count it."""
    monkeypatch.setattr(fp16, "autocast", lambda _, dtype: torch.autocast("cpu", dtype=dtype))
    monkeypatch.setattr(fp16, "GradScaler", lambda _, **options: torch.amp.GradScaler("cpu", **options))

    class Overflow(Callback):
        def after_loss(self) -> None:
            if self.training and self.iter == 2 and self.epoch == 0:
                self.learn.loss_grad = self.loss_grad * float("inf")

    learn = fit(learner(tmp_path, Schedules(lr=LR), Overflow(), fp16.MixedPrecision()), 2)
    assert learn.opt.opt.clock() == (9, 0)
    assert learn.recorder.lrs == [LR(clock) for clock in (0, 1, 2, *range(2, 9))]
    assert all(p.isfinite().all() for p in learn.model.parameters())


def test_finding_a_rate_changes_nothing(tmp_path: Path) -> None:
    learn = learner(tmp_path, Schedules(lr=LR, momentum=MOMENTUM))
    fit(learn, 1)
    before = copy.deepcopy(learn.opt.opt.state_dict()["param_groups"])
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=8, start_lr=1e-3, end_lr=1.0, stop_div=False, show_plot=False)
    np.testing.assert_allclose(learn.recorder.lrs, np.geomspace(1e-3, 1.0, 9)[: len(learn.recorder.lrs)])
    assert len(learn.recorder.lrs) >= 8
    assert learn.opt.opt.state_dict()["param_groups"] == before
    assert_same_run(plain(10), fit(learn, 1))


def test_what_is_not_used_is_said(tmp_path: Path) -> None:
    learn = learner(tmp_path, Schedules(lr=LR))
    with pytest.warns(UserWarning, match=r"the rate 0.3 given to fit\(\) is not used, as Triangular2"):
        fit(learn, 1, lr=0.3)
    assert learn.recorder.lrs == LR.values(0, 5).tolist()
    layers = learner(
        tmp_path, Schedules(lr=LR), splitter=lambda m: [[*m[0].parameters()], [*m[2].parameters()]]
    )
    with pytest.warns(UserWarning, match=r"given to fit\(\) is not used"):
        fit(layers, 1, lr=slice(1e-5, layers.lr))  # the last group's is the default


def test_other_owners_are_refused(tmp_path: Path) -> None:
    learn = learner(tmp_path, Schedules(lr=LR))
    with learn.no_bar(), pytest.raises(ValueError, match=r"lr must be driven by fastai or by a schedule"):
        learn.fit_one_cycle(1)
    learn = learner(tmp_path, Schedules(lr=LR, momentum=MOMENTUM))
    with pytest.raises(ValueError, match="momentum must be driven"):
        fit(learn, 1, cbs=ParamScheduler({"mom": SchedLin(0.9, 0.8)}))
    assert learn.opt.opt.clock() == (0, 0)
    with pytest.raises(TypeError, match=r"must make a fastlr optimizer.* got SGD"):
        fit(learner(tmp_path, Schedules(lr=LR), opt_func=partial(OptimWrapper, opt=torch.optim.SGD)), 1)
    with pytest.raises(TypeError, match="there is no schedule for lr"):
        fit(learner(tmp_path, Schedules()), 1)
    with pytest.raises(TypeError, match=r"use FusedSGD with lr=fastlr.Triangular"):
        learner(tmp_path, opt_func=partial(OptimWrapper, opt=fastlr.FusedCyclicSGD)).create_opt()


def test_without_the_callback_the_rate_is_fastais(tmp_path: Path) -> None:
    learn = fit(learner(tmp_path, lr=0.05), 1)
    assert learn.recorder.lrs == [0.05] * 5
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, lr_max=0.1)
    assert learn.opt.opt.clock() == (10, 0)


def test_the_page_runs(tmp_path: Path) -> None:
    dls = DataLoaders(DataLoader(data(), bs=8), DataLoader(data(), bs=8), device=torch.device("cpu"))
    left = run_page("frameworks/fastai.md", dls=dls, model=make_model(), loss_fn=torch.nn.CrossEntropyLoss())
    assert left["learn"].recorder.lrs == left["schedule"].values(0, 15).tolist()
