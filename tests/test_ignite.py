"""ignite's engines around fastlr's optimizers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from helpers import assert_same
from pages import run_page

import fastlr

pytest.importorskip("ignite", reason="ignite is not installed")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    from ignite.engine import Engine, Events, create_supervised_trainer
    from ignite.handlers import Checkpoint, DiskSaver, LRScheduler
    from ignite.handlers.param_scheduler import CosineAnnealingScheduler
    from ignite.handlers.tensorboard_logger import OptimizerParamsHandler, TensorboardLogger

LR = fastlr.Triangular2(0.001, 0.02, step_size_up=3)
MOMENTUM = fastlr.Cosine(0.95, 0.85, 20)
BATCHES = 5  # in each epoch


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator))
        for _ in range(BATCHES)
    ]


def make_model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))


Run = tuple[torch.nn.Module, fastlr.FusedSGD]


def made(seed: int = 0, lr: Any = LR, momentum: Any = MOMENTUM) -> Run:
    model = make_model(seed)
    return model, fastlr.FusedSGD(model.parameters(), lr=lr, momentum=momentum)


def make_trainer(model: torch.nn.Module, opt: Any, **options: Any) -> Engine:
    return create_supervised_trainer(model, opt, torch.nn.functional.cross_entropy, **options)


def plain(updates: int, accumulate: int = 1) -> Run:
    """The same training as a plain loop."""
    model, opt = made()
    for k in range(updates * accumulate):
        x, y = batches()[k % BATCHES]
        (torch.nn.functional.cross_entropy(model(x), y) / accumulate).backward()
        if k % accumulate == accumulate - 1:
            opt.step()
            opt.zero_grad()
    return model, opt


def assert_same_run(expected: Run, actual: Run) -> None:
    assert expected[1].clock() == actual[1].clock()
    assert expected[1].param_groups[0]["lr"] == actual[1].param_groups[0]["lr"]
    assert_same(expected[0].parameters(), actual[0].parameters())
    buffers = [
        [opt.state[p]["momentum_buffer"] for p in model.parameters()] for model, opt in (expected, actual)
    ]
    assert_same(*buffers)


def test_the_logger_has_the_rate_of_each_iteration() -> None:
    model, opt = made()
    trainer = make_trainer(model, opt)
    logger = MagicMock(spec=TensorboardLogger)
    logger.writer = MagicMock()
    handler = OptimizerParamsHandler(opt)
    trainer.add_event_handler(
        Events.ITERATION_STARTED, lambda engine: handler(engine, logger, Events.ITERATION_STARTED)
    )
    trainer.run(batches(), max_epochs=2)
    assert_same_run(plain(10), (model, opt))
    logged = [call.args for call in logger.writer.add_scalar.call_args_list]
    assert logged == [("lr/group_0", rate, k + 1) for k, rate in enumerate(LR.values(0, 10).tolist())]


def test_accumulation_is_that_of_a_plain_loop() -> None:
    model, opt = made()
    make_trainer(model, opt, gradient_accumulation_steps=2).run(batches(), max_epochs=2)
    assert_same_run(plain(5, 2), (model, opt))


def test_a_checkpoint_resumes_to_the_bit(tmp_path: Path) -> None:
    model, opt = made()
    trainer = make_trainer(model, opt)
    objects = {"model": model, "optimizer": opt, "trainer": trainer}
    checkpoint = Checkpoint(objects, DiskSaver(str(tmp_path)), n_saved=None)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint)
    trainer.run(batches(), max_epochs=3)

    resumed = made(seed=1, lr=0.5, momentum=0.0)
    trainer = make_trainer(*resumed)
    objects = {"model": resumed[0], "optimizer": resumed[1], "trainer": trainer}
    file = torch.load(tmp_path / "checkpoint_5.pt", weights_only=True)
    Checkpoint.load_objects(objects, file)
    assert resumed[1].clock() == (5, 0)
    trainer.run(batches(), max_epochs=3)
    assert_same_run(plain(15), resumed)
    assert_same_run((model, opt), resumed)


def test_a_run_that_was_ended_goes_on() -> None:
    model, opt = made()
    trainer = make_trainer(model, opt)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda engine: engine.terminate())
    trainer.run(batches(), max_epochs=1)
    assert_same_run(plain(3), (model, opt))
    make_trainer(model, opt).run(batches()[3:], max_epochs=1)
    assert_same_run(plain(5), (model, opt))


def test_ignites_schedulers_beside_a_schedule_are_noticed() -> None:
    model, opt = made()
    trainer = make_trainer(model, opt)
    trainer.add_event_handler(Events.ITERATION_STARTED, CosineAnnealingScheduler(opt, "lr", 0.1, 0.01, 10))
    trainer.logger.disabled = True  # it prints the error before it raises it
    with pytest.raises(RuntimeError, match=r"lr of parameter group 0 was set to .* but a schedule owns it"):
        trainer.run(batches(), max_epochs=1)
    model, opt = made(lr=0.1)  # a number they may drive, beside schedules of other options
    trainer = make_trainer(model, opt)
    trainer.add_event_handler(Events.ITERATION_STARTED, CosineAnnealingScheduler(opt, "lr", 0.1, 0.01, 10))
    trainer.run(batches(), max_epochs=1)
    assert opt.clock() == (5, 0)


def test_what_insists_on_a_scheduler_gets_the_one_that_reports() -> None:
    model, opt = made()
    trainer = make_trainer(model, opt)
    scheduler = LRScheduler(fastlr.integrations.ReadOnlyScheduler(opt), save_history=True)
    trainer.add_event_handler(Events.ITERATION_STARTED, scheduler)
    trainer.run(batches(), max_epochs=2)
    assert_same_run(plain(10), (model, opt))
    assert [entry[0] for entry in trainer.state.param_history["lr"]] == LR.values(0, 10).tolist()


def test_the_page_runs(tmp_path: Path) -> None:
    names = {"model": make_model(), "loss_fn": torch.nn.functional.cross_entropy}
    left = run_page("frameworks/ignite.md", loader=batches(), **names, folder=str(tmp_path))
    assert left["optimizer"].clock() == (10, 0)
    assert left["rates"] == left["schedule"].values(0, 10).tolist()
