"""mmengine's Runner around fastlr's optimizers."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision_without_cuda  # noqa: F401  # which mmengine imports
from helpers import assert_same
from pages import run_page

import fastlr

pytest.importorskip("mmengine", reason="mmengine is not installed")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    from mmengine.hooks import Hook
    from mmengine.model import BaseModel
    from mmengine.optim.optimizer import amp_optimizer_wrapper
    from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIMIZERS
    from mmengine.runner import Runner

    from fastlr.integrations.mmengine import FusedOptimWrapperConstructor, register

NAMES = register()
LR = fastlr.Triangular2(0.001, 0.02, step_size_up=3)
BETA1 = fastlr.Triangular(0.8, 0.95, 4, inverted=True)
ADAMW = {
    "type": "FusedAdamW",
    "lr": {"type": "Triangular2", "base": 0.001, "max": 0.02, "step_size_up": 3},
    "betas": [BETA1.to_dict(), 0.99],
    "weight_decay": 0.1,
}
BATCHES = 5  # in each epoch


class Model(BaseModel):
    """A classifier in mmengine's words."""

    factor = 1.0

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))

    def forward(self, x: torch.Tensor, y: torch.Tensor, mode: str = "loss") -> dict[str, torch.Tensor]:
        return {"loss": torch.nn.functional.cross_entropy(self.net(x).float(), y) * self.factor}


def data() -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCHES * 8, 6, generator=generator)
    return torch.utils.data.TensorDataset(x, torch.randint(0, 3, (BATCHES * 8,), generator=generator))


def make_runner(folder: Path, *, seed: int = 0, epochs: int = 2, hooks: Any = (), **options: Any) -> Runner:
    wrapper = options.pop("optim_wrapper", {})
    wrapper = {"constructor": "FusedOptimWrapperConstructor", "optimizer": ADAMW, **wrapper}
    make_runner.made += 1  # type: ignore[attr-defined]
    return Runner(
        model=Model(seed),
        work_dir=str(folder),
        train_dataloader=torch.utils.data.DataLoader(data(), batch_size=8),
        train_cfg={"by_epoch": True, "max_epochs": epochs},
        optim_wrapper=copy.deepcopy(wrapper),
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1}},
        custom_hooks=list(hooks),
        experiment_name=f"run {make_runner.made}",  # type: ignore[attr-defined]
        log_level=logging.ERROR,
        **options,
    )


make_runner.made = 0  # type: ignore[attr-defined]


def plain(
    updates: int,
    accumulate: int = 1,
    clip: Callable[[Any], object] = lambda parameters: None,
    groups: Callable[[torch.nn.Module], Any] = lambda model: model.parameters(),
) -> tuple[torch.nn.Module, Any]:
    """The same training as a plain loop."""
    model = Model()
    opt = fastlr.FusedAdamW(groups(model), lr=LR, betas=(BETA1, 0.99), weight_decay=0.1)
    batches = [data()[k : k + 8] for k in range(0, BATCHES * 8, 8)]
    for k in range(updates * accumulate):
        (model(*batches[k % BATCHES])["loss"] / accumulate).backward()
        if k % accumulate == accumulate - 1:
            clip(list(model.parameters()))
            opt.step()
            opt.zero_grad()
    return model, opt


def assert_same_run(expected: tuple[torch.nn.Module, Any], runner: Runner) -> None:
    model, opt = expected
    ours = runner.optim_wrapper.optimizer
    assert opt.clock() == ours.clock()
    assert [group["lr"] for group in opt.param_groups] == [group["lr"] for group in ours.param_groups]
    assert_same(model.parameters(), runner.model.parameters())
    for p, q in zip(model.parameters(), runner.model.parameters(), strict=True):
        assert opt.state[p].keys() == ours.state[q].keys()
        assert_same(opt.state[p].values(), ours.state[q].values())


def rates(runner: Runner) -> list[float]:
    """Those that LoggerHook prints."""
    history: list[float] = runner.message_hub.get_scalar("train/lr").data[0].tolist()
    return history


def test_a_schedule_of_the_configuration_drives_and_its_rates_are_logged(tmp_path: Path) -> None:
    runner = make_runner(tmp_path)
    runner.train()
    assert_same_run(plain(10), runner)
    assert rates(runner) == LR.values(0, 10).tolist()


def test_schedules_are_scaled_by_paramwise_cfg(tmp_path: Path) -> None:
    paramwise = {"custom_keys": {"net.2": {"lr_mult": 0.1, "decay_mult": 0.5}}, "bias_decay_mult": 0.0}
    runner = make_runner(tmp_path, optim_wrapper={"paramwise_cfg": paramwise, "clip_grad": {"max_norm": 0.5}})
    runner.train()

    def groups(model: torch.nn.Module) -> list[dict[str, Any]]:
        first, _, last = model.net
        return [
            {"params": [first.weight]},
            {"params": [first.bias], "weight_decay": 0.0},
            *({"params": [p], "lr": LR * 0.1, "weight_decay": 0.05} for p in (last.weight, last.bias)),
        ]

    def clip(parameters: Any) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)

    assert_same_run(plain(10, clip=clip, groups=groups), runner)
    assert rates(runner) == LR.values(0, 10).tolist()
    assert "train/base_lr" not in runner.message_hub.log_scalars
    assert runner.message_hub.get_scalar("train/grad_norm").data[0].size == 10


def test_accumulation_and_clipping_by_value_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    clipping = {"accumulative_counts": 2, "clip_grad": {"type": "value", "clip_value": 0.05}}
    runner = make_runner(tmp_path, optim_wrapper=clipping)
    runner.train()
    expected = plain(5, 2, lambda parameters: torch.nn.utils.clip_grad_value_(parameters, 0.05))
    assert_same_run(expected, runner)


@pytest.mark.filterwarnings("ignore:Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD:UserWarning")
def test_a_run_that_was_stopped_resumes_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Hook):
        def before_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
            if runner.iter == 7:
                raise KeyboardInterrupt

    # Its checkpoints hold more than torch.load reads unless told to.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    stopped = make_runner(tmp_path, hooks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    fixed = {"optimizer": {"type": "FusedAdamW", "lr": 0.5}}
    runner = make_runner(tmp_path, seed=1, epochs=3, optim_wrapper=fixed, resume=True)
    runner.train()
    assert_same_run(plain(15), runner)


def test_amp_steps_as_with_torchs_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made to take a CPU; two updates overflow."""

    class Overflow(Hook):
        def before_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
            runner.model.factor = float("inf") if runner.iter in (2, 6) else 1.0

    monkeypatch.setattr(amp_optimizer_wrapper, "is_cuda_available", lambda: True)
    monkeypatch.setattr(
        amp_optimizer_wrapper, "GradScaler", lambda **options: torch.amp.GradScaler("cpu", **options)
    )
    amp: dict[str, Any] = {"type": "AmpOptimWrapper", "dtype": "bfloat16", "clip_grad": {"max_norm": 0.5}}
    optimizer = {"type": "FusedSGD", "lr": ADAMW["lr"], "momentum": 0.9}
    ours = make_runner(tmp_path, hooks=[Overflow()], optim_wrapper={**amp, "optimizer": optimizer})
    ours.train()
    assert ours.optim_wrapper.optimizer.clock() == (8, 0)
    assert ours.optim_wrapper.optimizer.param_groups[0]["lr"] == LR(8)

    class Follow(Hook):
        """A schedule by hand: the rate after so many updates as were applied."""

        applied, scale = 0, 0.0

        def before_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
            self.scale = runner.optim_wrapper.loss_scaler.get_scale()
            runner.optim_wrapper.optimizer.param_groups[0]["lr"] = LR(self.applied)

        def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
            self.applied += runner.optim_wrapper.loss_scaler.get_scale() >= self.scale

    optimizer = {"type": "SGD", "lr": 1.0, "momentum": 0.9, "foreach": False}
    theirs = make_runner(
        tmp_path, hooks=[Overflow(), Follow()], optim_wrapper={**amp, "optimizer": optimizer}
    )
    theirs.train()
    assert_same(ours.model.parameters(), theirs.model.parameters())


def test_mmengines_schedulers_beside_a_schedule_are_noticed(tmp_path: Path) -> None:
    runner = make_runner(tmp_path, param_scheduler={"type": "StepLR", "step_size": 1})
    with pytest.raises(RuntimeError, match="a schedule owns it"):
        runner.train()
    fixed = {"type": "FusedSGD", "lr": 0.1}  # which they may drive
    runner = make_runner(
        tmp_path, optim_wrapper={"optimizer": fixed}, param_scheduler={"type": "StepLR", "step_size": 1}
    )
    runner.train()
    assert rates(runner) == pytest.approx([0.1] * 5 + [0.01] * 5)


def test_what_is_registered() -> None:
    assert register() == NAMES
    assert {OPTIMIZERS.get(name) for name in NAMES} == {getattr(fastlr, name) for name in NAMES}
    assert OPTIM_WRAPPER_CONSTRUCTORS.get("FusedOptimWrapperConstructor") is FusedOptimWrapperConstructor
    with pytest.raises(TypeError, match=r"use FusedSGD with lr=fastlr.Triangular"):
        OPTIMIZERS.build({"type": "FusedCyclicSGD", "params": [torch.zeros(1)], "lr": 0.1})


def test_the_page_runs(tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader(data(), batch_size=8)
    left = run_page("frameworks/mmengine.md", model=Model(), loader=loader, folder=str(tmp_path))
    assert left["runner"].optim_wrapper.optimizer.clock() == (10, 0)
