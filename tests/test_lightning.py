"""Lightning: range test, growing batches, averaging and configuration as its users have them."""

from __future__ import annotations

import copy
import functools
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same

import fastlr

lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from fastlr.integrations import lightning as ours  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),  # Lightning on new PyTorch
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings(
        "ignore:The number of training batches .* is smaller than the logging interval"
    ),
]

Trainer = lightning.Trainer
SAMPLES, BATCH = 24, 4
UPDATES = SAMPLES // BATCH  # in an epoch
LR = fastlr.Triangular2(0.01, 0.2, step_size_up=5)


def data() -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(7)
    return torch.utils.data.TensorDataset(
        torch.randn(SAMPLES, 6, generator=generator), torch.arange(SAMPLES) % 3
    )


def loader(**options: Any) -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(data(), batch_size=BATCH, **options)


class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
    """A small classifier with what may go wrong in it: BatchNorm, dropout and a metric that it logs."""

    def __init__(self, make: Any = None, seed: int = 0, dropout: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        layers = (
            torch.nn.Linear(6, 16),
            torch.nn.BatchNorm1d(16),
            torch.nn.Dropout(dropout),
            torch.nn.Linear(16, 3),
        )
        self.model = torch.nn.Sequential(*layers)
        self.make = make or (lambda params: fastlr.FusedSGD(params, lr=LR, momentum=0.9))
        self.sizes: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        self.sizes.append(len(x))
        loss = torch.nn.functional.cross_entropy(self.model(x), y)
        self.log("loss", loss, batch_size=len(x))
        return loss

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


class Validated(Module):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1]))


def trainer(folder: Path, **options: Any) -> Any:
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return Trainer(**{**defaults, **options})


def fit(folder: Path, module: Any = None, loaders: Any = None, ckpt_path: Any = None, **options: Any) -> Any:
    """A trained module, and its trainer."""
    module = Module() if module is None else module
    made = trainer(folder, **options)
    made.fit(module, loader() if loaders is None else loaders, ckpt_path=ckpt_path)
    return module, made


def assert_same_run(expected: Any, actual: Any) -> None:
    """Modules and their trainers: weights, buffers, state of the optimizer, rates and clock, to the bit."""
    (one, its), (other, others) = expected, actual
    assert_same(one.state_dict().values(), other.state_dict().values())
    first, second = (made.optimizers[0].state_dict() for made in (its, others))
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for key, entry in first["state"].items():
        assert_same(entry.values(), second["state"][key].values())


def saving(folder: Path, **options: Any) -> Any:
    return lightning.callbacks.ModelCheckpoint(folder, "{epoch}-{step}", save_top_k=-1, **options)


# -- range test ------------------------------------------------------------------------------------

SWEEP = {"num_steps": 30, "start_lr": 1e-3, "end_lr": 10.0, "progress": False}


@pytest.mark.parametrize("source", ["loader", "datamodule", "own"])
def test_a_range_test_leaves_no_trace(tmp_path: Path, source: str) -> None:
    class Data(lightning.LightningDataModule):  # type: ignore[misc,name-defined]
        def train_dataloader(self) -> Any:
            return loader(shuffle=True)

    module = Module()
    if source == "own":
        module.train_dataloader = lambda: loader(shuffle=True)
    given = {"loader": loader(shuffle=True), "datamodule": Data(), "own": None}[source]
    made = trainer(tmp_path, callbacks=[lightning.callbacks.LearningRateMonitor()], logger=Logger())
    before = copy.deepcopy(module.state_dict())
    numbers = torch.get_rng_state()
    callbacks, loggers, state = made.callbacks, made.loggers, copy.copy(made.state)
    found = ours.range_test(made, module, given, **SWEEP)
    assert isinstance(found, fastlr.RangeTestResult)
    assert len(found.lrs) > 5
    assert found.lrs[0] == 1e-3
    assert_same(before.values(), module.state_dict().values())
    assert torch.equal(torch.get_rng_state(), numbers)
    assert (made.callbacks, made.loggers, made.state) == (callbacks, loggers, state)
    assert made.optimizers == []
    assert module._trainer is None
    assert made.datamodule is None
    assert loggers[0].metrics == []
    assert not vars(module).keys() & {"log", "log_dict", "backward"}
    # Nor does the training see one.
    torch.manual_seed(1)
    made.fit(module, given)
    torch.manual_seed(0)
    plain = Module()
    if source == "own":
        plain.train_dataloader = module.train_dataloader
    untouched = trainer(tmp_path)
    torch.manual_seed(1)
    untouched.fit(plain, {"loader": loader(shuffle=True), "datamodule": Data(), "own": None}[source])
    assert_same_run((plain, untouched), (module, made))


def test_nobody_hears_of_a_range_test(tmp_path: Path) -> None:
    """Who hears of exceptions may write files; a ModelCheckpoint's folder is fixed at its first fit."""
    heard: list[str] = []

    class Listener(lightning.Callback):  # type: ignore[misc,name-defined]
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            heard.append("callback: fit")

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            heard.append("callback: exception")

    class Data(lightning.LightningDataModule):  # type: ignore[misc,name-defined]
        def train_dataloader(self) -> Any:
            return loader()

        def on_exception(self, exception: BaseException) -> None:
            heard.append("data: exception")

    checkpoint = lightning.callbacks.ModelCheckpoint()
    module = Module()
    module.configure_callbacks = lambda: [Listener(), checkpoint]
    own = module.configure_callbacks
    made = trainer(tmp_path)
    ours.range_test(made, module, Data(), **SWEEP)
    assert heard == []
    assert checkpoint.dirpath is None
    assert module.configure_callbacks is own
    module = Module()
    ours.range_test(made, module, Data(), **SWEEP)
    assert "configure_callbacks" not in vars(module)


class Logger(lightning.loggers.logger.Logger):  # type: ignore[misc,name-defined]
    """Keeps what it is told; its experiment takes what a run of W&B does."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[dict[str, float]] = []
        self.entries: list[dict[str, Any]] = []
        self.experiment = self

    name, version = "kept", 0

    def log(self, entries: dict[str, Any], step: int | None = None) -> None:
        self.entries.append(entries)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append({**metrics, "step": step})

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


def test_a_range_test_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    """Of the same losses, accumulated and clipped alike."""
    limit = 0.5

    def plain() -> fastlr.RangeTestResult:
        module = Module(dropout=0.0)
        optimizer = fastlr.FusedSGD(module.parameters(), momentum=0.9)

        def clip(*_: Any) -> None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), limit)

        optimizer.register_step_pre_hook(clip)
        return fastlr.range_test(
            module.model,
            optimizer,
            torch.nn.functional.cross_entropy,
            loader(),
            accumulate=2,
            **SWEEP,
        )

    module = Module(dropout=0.0)
    made = trainer(tmp_path, gradient_clip_val=limit, accumulate_grad_batches=2)
    found = ours.range_test(made, module, loader(), **SWEEP)
    expected = plain()
    assert found.lrs.tolist() == expected.lrs.tolist()
    assert found.losses.tolist() == expected.losses.tolist()


def test_a_range_test_measures_on_the_trainers_validation_data(tmp_path: Path) -> None:
    class Data(lightning.LightningDataModule):  # type: ignore[misc,name-defined]
        def train_dataloader(self) -> Any:
            return loader()

        val_dataloader = train_dataloader

    module = Validated()

    def accuracy(batch: Any) -> torch.Tensor:
        return (module.model(batch[0]).argmax(1) == batch[1]).float().mean()

    found = ours.range_test(trainer(tmp_path), module, Data(), metric=accuracy, val_every=5, **SWEEP)
    assert found.metric_name == "accuracy"
    assert found.measured.sum() >= 2
    with pytest.raises(ValueError, match="one loader for validation, got none"):
        ours.range_test(trainer(tmp_path), Module(), loader(), metric=accuracy, **SWEEP)


def test_errors_in_a_range_test_reach_who_called_it(tmp_path: Path) -> None:
    class Manual(Module):
        automatic_optimization = False

    class Two(Manual):
        def configure_optimizers(self) -> Any:
            return [super().configure_optimizers(), super().configure_optimizers()]

    class Interrupted(Module):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if batch_idx == 3:
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    class Skipping(Module):
        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            return None

    for module, error, message in (
        (Manual(), TypeError, "Manual optimizes manually"),
        (Skipping(), ValueError, "training_step returned None"),
        (Interrupted(), KeyboardInterrupt, "^$"),
    ):
        made = trainer(tmp_path)
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(error, match=message):
            ours.range_test(made, module, loader(), **SWEEP)
        assert_same(before.values(), module.state_dict().values())
        assert module._trainer is None
        assert made.optimizers == []
    with pytest.raises(TypeError, match="scaler is the module's or the trainer's"):
        ours.range_test(trainer(tmp_path), Module(), loader(), scaler=None)
    with pytest.raises(TypeError, match="step_fn is the module's or the trainer's"):
        ours.RangeTest(step_fn=None)
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        ours.RangeTest(steps=3)
    with pytest.raises(ValueError, match="the trainer began no training"):
        ours.range_test(trainer(tmp_path, max_epochs=0), Module(), loader())
    with pytest.raises(ValueError, match="one loader for training, got 2"):
        ours.range_test(trainer(tmp_path), Module(), [loader(), loader()])


def test_the_callback_tests_and_sets_nothing_unless_asked(tmp_path: Path) -> None:
    plain = fit(tmp_path)
    logger = Logger()
    test = ours.RangeTest(**SWEEP)
    tested = fit(tmp_path, callbacks=[test, saving(tmp_path)], logger=logger, enable_checkpointing=True)
    assert_same_run(plain, tested)
    assert test.result is not None
    (entry,) = logger.entries
    assert entry["range_test/summary"] == test.result.summary()
    # A run that resumes has its answer, and makes no other test.
    again = ours.RangeTest(**SWEEP)
    checkpoint = tmp_path / f"epoch=0-step={UPDATES}.ckpt"
    resumed, _ = fit(
        tmp_path,
        Module(seed=1),
        ckpt_path=checkpoint,
        callbacks=[again, saving(tmp_path)],
        enable_checkpointing=True,
    )
    assert len(resumed.sizes) == UPDATES
    assert again.result is not None
    assert again.result.losses.tolist() == test.result.losses.tolist()


def test_the_callback_sets_what_is_asked_for(tmp_path: Path) -> None:
    schedule = fastlr.Cosine(0.3, 0.0, 30)
    seen: list[fastlr.RangeTestResult] = []

    def use(found: fastlr.RangeTestResult) -> fastlr.Schedule:
        seen.append(found)
        return schedule

    test = ours.RangeTest(use=use, **SWEEP)
    _, made = fit(tmp_path, callbacks=[test])
    assert seen == [test.result]
    assert made.optimizers[0].param_groups[0]["lr_schedule"] == schedule
    assert made.optimizers[0].param_groups[0]["lr"] == schedule(2 * UPDATES)
    sgd = Module(lambda params: torch.optim.SGD(params, lr=0.1))
    with pytest.raises(TypeError, match=r"an optimizer of fastlr's takes, got SGD"):
        fit(tmp_path, sgd, callbacks=[ours.RangeTest(use=use, **SWEEP)])
    fit(tmp_path, sgd, callbacks=[ours.RangeTest(**SWEEP)])


# -- training --------------------------------------------------------------------------------------


def test_the_rates_that_lightning_logs_are_ours(tmp_path: Path) -> None:
    logger = Logger()
    monitor = lightning.callbacks.LearningRateMonitor(logging_interval="step")
    fit(tmp_path, logger=logger, callbacks=[monitor], log_every_n_steps=1)
    rates = [entry["lr-FusedSGD"] for entry in logger.metrics if "lr-FusedSGD" in entry]
    assert rates == [LR(step) for step in range(2 * UPDATES)]


class Abort(lightning.Callback):  # type: ignore[misc,name-defined]
    """Ends a fit in the middle of an epoch."""

    def __init__(self, batch: int, error: type[BaseException]) -> None:
        self.batch, self.error = batch, error

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            raise self.error


def test_a_run_that_was_stopped_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    """Also in the middle of an epoch."""
    plain = fit(tmp_path, Module(dropout=0.0))  # whose numbers the checkpoint does not have
    stopped = [saving(tmp_path, every_n_train_steps=1), Abort(UPDATES + 2, ValueError)]
    with pytest.raises(ValueError, match=r"^$"):
        fit(tmp_path, Module(dropout=0.0), callbacks=stopped, enable_checkpointing=True)
    last = tmp_path / f"epoch=1-step={UPDATES + 2}.ckpt"
    resumed = Module(seed=1, dropout=0.0)
    callbacks = [saving(tmp_path, every_n_train_steps=1)]
    with pytest.warns(UserWarning, match="resuming from a checkpoint that ended before the epoch"):
        run = fit(tmp_path, resumed, StartingAt(2), last, callbacks=callbacks, enable_checkpointing=True)
    assert_same_run(plain, run)


class StartingAt:
    """Batches without those that a run has behind it."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __len__(self) -> int:
        return UPDATES

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        yield from list(loader())[start:]


# -- growing batches -------------------------------------------------------------------------------


def plan(**options: Any) -> fastlr.BatchPlan:
    """Phases that begin within epochs, batches that epochs and micro-batches do not divide."""
    phases = [(0, 4), (1.25, 6), (2.5, 12)]
    return fastlr.BatchPlan.from_phases(
        phases, dataset_size=SAMPLES + 1, epochs=4, lr=fastlr.Exponential(0.1, 0.7, unit="epoch"), **options
    )


def odd_data(more: int = 1) -> torch.utils.data.TensorDataset:
    x, y = data().tensors
    return torch.utils.data.TensorDataset(torch.cat([x, x[:more]]), torch.cat([y, y[:more]]))


class Grown(Module):
    """Which tells what made up each update."""

    def __init__(self, grow: Any, its_plan: fastlr.BatchPlan, seed: int = 0) -> None:
        super().__init__(lambda params: fastlr.FusedSGD(params, lr=its_plan.lr, momentum=0.9), seed, 0.0)
        self.grow = grow
        self.updates: list[tuple[int, int]] = []
        self.model[1] = torch.nn.LayerNorm(16)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.updates.append((self.grow.batch.position, sum(self.sizes)))
        self.sizes.clear()


def fit_grown(folder: Path, seed: int = 0, ckpt_path: Any = None, *callbacks: Any, **options: Any) -> Any:
    its_plan = plan(**options)
    grow = ours.GrowBatch(its_plan, micro_batch_size=3, seed=5)
    return fit(
        folder,
        Grown(grow, its_plan, seed),
        grow.batches(odd_data()),
        ckpt_path,
        max_epochs=its_plan.epochs,
        callbacks=[grow, *callbacks],
        enable_checkpointing=bool(callbacks),
    )


def grown_by_hand(**options: Any) -> tuple[Module, fastlr.FusedSGD]:
    its_plan = plan(**options)
    module = Grown(None, its_plan)
    optimizer = module.configure_optimizers()
    for batch in fastlr.GrowingLoader(odd_data(), its_plan, micro_batch_size=3, seed=5).bind(optimizer):
        x, y = batch.data
        (torch.nn.functional.cross_entropy(module.model(x), y) * batch.weight).backward()
        if batch.ends_update:
            optimizer.step()
            optimizer.zero_grad()
    return module, optimizer


@pytest.mark.parametrize("tail", ["carry", "keep", "drop"])
def test_batches_grow_as_the_plan_says(tmp_path: Path, tail: str) -> None:
    module, made = fit_grown(tmp_path, tail=tail)
    its_plan = plan(tail=tail)
    assert len(module.updates) == made.global_step == its_plan.total_updates
    for position, size in module.updates:
        assert size <= its_plan.phase_at(position).batch_size
    if tail == "drop":
        assert all(size == its_plan.phase_at(position).batch_size for position, size in module.updates)
    else:
        assert sum(size for _, size in module.updates) == its_plan.total_samples
    plain, optimizer = grown_by_hand(tail=tail)
    assert_same(plain.state_dict().values(), module.state_dict().values())
    assert made.optimizers[0].clock() == optimizer.clock()
    # Trainer and module are as they were.
    assert (made.accumulate_grad_batches, made.reload_dataloaders_every_n_epochs) == (1, 0)
    assert not vars(module).keys() & {"backward", "optimizer_zero_grad"}


class SaveEach(lightning.Callback):  # type: ignore[misc,name-defined]
    """Saves after each micro-batch, which may be in the middle of an update."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.fit_loop.total_batch_idx}.ckpt")


def test_a_growing_run_goes_on_wherever_it_was_saved(tmp_path: Path) -> None:
    plain = fit_grown(tmp_path)
    batches, epochs = tmp_path / "batches", tmp_path / "epochs"
    fit_grown(tmp_path, 0, None, SaveEach(batches), saving(epochs))
    ends = sorted(epochs.glob("*.ckpt"))
    assert len(ends) == plan().epochs
    # Within an update, where one ends, and at the last batch of epochs of 14 and 10 batches.
    for checkpoint in [*(batches / f"{number}.ckpt" for number in (4, 5, 13, 22, 23, 31)), *ends[:-1]]:
        assert_same_run(plain, fit_grown(tmp_path, 1, checkpoint, saving(epochs)))


def test_what_a_growing_run_cannot_have_is_refused(tmp_path: Path) -> None:
    its_plan = plan()

    def run(grow: Any, data: Any = None, module: Any = None, **options: Any) -> None:
        module = Grown(grow, its_plan) if module is None else module
        data = grow.batches(odd_data()) if data is None else data
        fit(tmp_path, module, data, callbacks=[grow], **{"max_epochs": 4, **options})

    class Manual(Module):
        automatic_optimization = False

    for options, error, message in (
        ({"max_epochs": 5}, ValueError, r"max_epochs must be in 1 \.\. 4, as many as the plan has, got 5"),
        ({"accumulate_grad_batches": 2}, ValueError, "accumulate_grad_batches must be 1.* got 2"),
        ({"limit_train_batches": 3}, ValueError, r"limit_train_batches must be 1\.0.* got 3"),
        ({"module": Manual()}, TypeError, "Manual optimizes manually"),
        ({"data": loader()}, ValueError, r"give it grow\.batches\(dataset\)"),
        (
            {"module": Module(lambda params: torch.optim.SGD(params, 0.1))},
            TypeError,
            "samples clock, got SGD",
        ),
    ):
        with pytest.raises(error, match=message):
            run(ours.GrowBatch(its_plan), **options)
    with pytest.raises(TypeError, match="plan must be a BatchPlan, got 4"):
        ours.GrowBatch(4)


def test_a_range_test_of_growing_batches_is_of_those_that_the_plan_begins_with(tmp_path: Path) -> None:
    plain = fit_grown(tmp_path)
    tests = ours.RangeTest(**SWEEP), ours.RangeTest(**SWEEP)
    its_plan = plan()
    for test, order in zip(tests, (1, -1), strict=True):  # before the loader is bound and after
        grow = ours.GrowBatch(its_plan, micro_batch_size=3, seed=5)
        module, made = Grown(grow, its_plan), trainer(tmp_path, max_epochs=4, callbacks=[test, grow][::order])
        made.fit(module, grow.batches(odd_data()))
        assert_same_run(plain, (module, made))
    sizes = []  # out of the test's reach, which undoes what the module keeps

    class Watched(Grown):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            sizes.append(len(batch[0]))
            return super().training_step(batch, batch_idx)

    grow = ours.GrowBatch(its_plan, micro_batch_size=3, seed=5)
    found = ours.range_test(trainer(tmp_path), Watched(grow, its_plan), grow.batches(odd_data()), **SWEEP)
    for test in tests:
        assert test.result is not None
        assert test.result.losses.tolist() == found.losses.tolist()
    assert set(sizes) == {2}  # 4 in micro-batches of at most 3
    assert len(sizes) % 2 == 0


# -- stochastic weight averaging -------------------------------------------------------------------

DECAY = fastlr.StepDecay(0.2, every=UPDATES, gamma=0.5)


def averaging(folder: Path, optimizer: Any, kind: Any, seed: int = 0, **options: Any) -> Any:
    """Four epochs, of which the last two are averaged, with a rate that comes to be that of SWA."""
    module = Module(optimizer, seed, 0.0)
    callbacks = [kind(0.05, swa_epoch_start=2, annealing_epochs=2), saving(folder)]
    return fit(folder, module, max_epochs=4, callbacks=callbacks, enable_checkpointing=True, **options)


def scheduled(params: Any) -> fastlr.FusedSGD:
    return fastlr.FusedSGD(params, lr=DECAY, momentum=fastlr.Constant(0.9))


def by_torch(params: Any) -> Any:
    sgd = torch.optim.SGD(params, lr=0.2, momentum=0.9, foreach=False)
    return [sgd], [torch.optim.lr_scheduler.StepLR(sgd, 1, 0.5)]


def test_weights_are_averaged_as_with_torchs_optimizer(tmp_path: Path) -> None:
    theirs = lightning.callbacks.StochasticWeightAveraging
    plain, made = averaging(tmp_path, scheduled, ours.StochasticWeightAveraging)
    with pytest.raises(RuntimeError, match="by something else, but a schedule owns it"):
        averaging(tmp_path, scheduled, theirs)
    by_lightning, _ = averaging(tmp_path, by_torch, theirs)
    assert_same(by_lightning.state_dict().values(), plain.state_dict().values())
    by_ours, _ = averaging(tmp_path, by_torch, ours.StochasticWeightAveraging)
    assert_same(by_lightning.state_dict().values(), by_ours.state_dict().values())
    group = made.optimizers[0].param_groups[0]
    assert (group["lr_schedule"], group["lr"]) == (DECAY, DECAY(4 * UPDATES))


# PyTorch 2.6's SWALR has a function in its state, which torch.load() refuses: Lightning's own callback, too.
SWALR = torch.optim.swa_utils.SWALR(torch.optim.SGD([torch.zeros(1)], 0.1), 0.1)
SWALR_CAN_BE_READ = not any(map(callable, SWALR.state_dict().values()))


@pytest.mark.skipif(not SWALR_CAN_BE_READ, reason="this PyTorch's SWALR saves what it does not load")
def test_averaging_goes_on_where_it_was_saved_and_ends_where_it_is_stopped(tmp_path: Path) -> None:
    plain = averaging(tmp_path, scheduled, ours.StochasticWeightAveraging)
    for epoch in (0, 1, 2):
        checkpoint = tmp_path / f"epoch={epoch}-step={(epoch + 1) * UPDATES}.ckpt"
        options = {"seed": 1, "ckpt_path": checkpoint}
        run = averaging(tmp_path, scheduled, ours.StochasticWeightAveraging, **options)
        assert_same_run(plain, run)

    class Stopped(Module):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if self.current_epoch == 3:
                assert self.trainer.optimizers[0].param_groups[0]["lr_schedule"] is None
                raise ValueError("stopped")
            return super().training_step(batch, batch_idx)

    module = Stopped(scheduled, 0, 0.0)
    made = trainer(
        tmp_path, max_epochs=4, callbacks=[ours.StochasticWeightAveraging(0.05, swa_epoch_start=2)]
    )
    with pytest.raises(ValueError, match="stopped"):
        made.fit(module, loader())
    assert made.optimizers[0].param_groups[0]["lr_schedule"] == DECAY


def test_lightnings_search_for_a_rate_takes_what_is_handed_over(tmp_path: Path) -> None:
    module = Module(dropout=0.0)
    optimizer = scheduled(module.parameters())
    module.make = lambda params: optimizer
    made = trainer(tmp_path, max_epochs=20)
    with optimizer.handed_over():
        found = lightning.tuner.Tuner(made).lr_find(module, loader(), num_training=20, update_attr=False)
    assert len(found.results["lr"]) > 5
    assert optimizer.clock() == (0, 0)
    assert (optimizer.param_groups[0]["lr_schedule"], optimizer.param_groups[0]["lr"]) == (DECAY, 0.2)


# -- configuration ---------------------------------------------------------------------------------

COSINE = {"class_path": "fastlr.Cosine", "init_args": {"start": 0.1, "end": 0.0, "steps": 50}}
CONFIGURED = {
    "in a file": {"class_path": "fastlr.FusedSGD", "init_args": {"lr": COSINE, "momentum": 0.9}},
    "betas": {"class_path": "fastlr.FusedAdamW", "init_args": {"lr": COSINE, "betas": [COSINE, 0.9]}},
    "lists": {
        "class_path": "fastlr.FusedSGD",
        "init_args": {
            "lr": {
                "class_path": "fastlr.schedules.MultiStep",
                "init_args": {"start": 0.1, "milestones": [3, 5], "gamma": 0.5},
            },
            "max_grad_norm": 1.0,
        },
    },
}


class Configured(Module):
    def __init__(self) -> None:
        super().__init__()

    # Which LightningCLI would leave alone.
    configure_optimizers = lightning.LightningModule.configure_optimizers


@pytest.fixture
def _no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI looks at those of the process, too; and uses what jsonargparse is about to drop."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


def configured(arguments: Any) -> fastlr.FusedOptimizer:
    pytest.importorskip("jsonargparse", reason="jsonargparse, which LightningCLI needs, is not installed")
    from lightning.pytorch.cli import LightningCLI

    quiet = {"logger": False, "accelerator": "cpu", "enable_checkpointing": False}
    cli = LightningCLI(
        Configured,
        args=arguments,
        run=False,
        save_config_callback=None,
        trainer_defaults=quiet,
        seed_everything_default=False,
    )
    made: fastlr.FusedOptimizer = cli.model.configure_optimizers()
    return made


@pytest.mark.parametrize("config", CONFIGURED.values(), ids=CONFIGURED.keys())
@pytest.mark.usefixtures("_no_arguments")
def test_lightning_cli_takes_schedules_in_a_file(config: dict[str, Any]) -> None:
    optimizer = configured({"optimizer": config})
    assert type(optimizer).__name__ == config["class_path"].split(".")[1]
    group = optimizer.param_groups[0]
    if "betas" in config["init_args"]:
        assert group["beta1_schedule"] == fastlr.Cosine(0.1, 0.0, 50)
    if config is CONFIGURED["lists"]:
        assert group["lr_schedule"] == fastlr.MultiStep(0.1, [3, 5], 0.5)
        assert optimizer.max_grad_norm == 1.0
    else:
        assert group["lr_schedule"] == fastlr.Cosine(0.1, 0.0, 50)


@pytest.mark.usefixtures("_no_arguments")
def test_lightning_cli_takes_schedules_on_the_command_line() -> None:
    lr = [
        "--optimizer.lr=fastlr.Cosine",
        *(f"--optimizer.lr.{a}" for a in ("start=0.1", "end=0", "steps=50")),
    ]
    optimizer = configured(["--optimizer=fastlr.FusedSGD", *lr, "--optimizer.momentum=0.9"])
    assert optimizer.param_groups[0]["lr_schedule"] == fastlr.Cosine(0.1, 0.0, 50)
    assert configured(["--optimizer=fastlr.FusedSGD", "--optimizer.lr=0.5"]).param_groups[0]["lr"] == 0.5


HYDRA = {
    "lr": "lr: {_target_: fastlr.Cosine, start: 0.1, end: 0.0, steps: 50}",
    "lists": "lr: {_target_: fastlr.MultiStep, start: 0.1, milestones: [3, 5], gamma: 0.5}",
    "betas": "{lr: 0.1, betas: [{_target_: fastlr.Cosine, start: 0.9, end: 0.5, steps: 50}, 0.99]}",
    "joined": """
        lr:
          _target_: fastlr.schedules.Joined
          parts:
          - {_target_: fastlr.LinearRamp, start: 0.0, end: 0.1, steps: 10}
          - {_target_: fastlr.Cosine, start: 0.1, end: 0.0, steps: 40}
          starts: [10]""",
}


@pytest.mark.parametrize("config", HYDRA.values(), ids=HYDRA.keys())
def test_hydra_takes_schedules(config: str) -> None:
    hydra = pytest.importorskip("hydra", reason="hydra is not installed")
    from omegaconf import OmegaConf

    settings = OmegaConf.create(textwrap.dedent(config))
    settings.update({"_target_": "fastlr.FusedAdamW", "_partial_": True})
    if config in (HYDRA["betas"], HYDRA["joined"]):  # in whose lists hydra would make a dict of a schedule
        settings["_convert_"] = "all"
    model = torch.nn.Linear(2, 2)
    optimizer = hydra.utils.instantiate(settings)(model.parameters())
    group = optimizer.param_groups[0]
    expected = {
        HYDRA["lr"]: ("lr", fastlr.Cosine(0.1, 0.0, 50)),
        HYDRA["lists"]: ("lr", fastlr.MultiStep(0.1, [3, 5], 0.5)),
        HYDRA["betas"]: ("beta1", fastlr.Cosine(0.9, 0.5, 50)),
        HYDRA["joined"]: ("lr", fastlr.LinearRamp(0.0, 0.1, 10).then(fastlr.Cosine(0.1, 0.0, 40), at=10)),
    }
    name, schedule = expected[config]
    assert group[f"{name}_schedule"] == schedule
    assert type(group["betas"]) is tuple
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    other = fastlr.FusedAdamW(model.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0][f"{name}_schedule"] == schedule


def test_hydra_takes_a_list_of_bounds() -> None:
    hydra = pytest.importorskip("hydra", reason="hydra is not installed")
    from omegaconf import OmegaConf

    text = "{_target_: fastlr.FusedCyclicSGD, _partial_: true, base_lr: [0.1, 0.2], max_lr: [0.3, 0.4]}"
    groups = [{"params": [torch.zeros(2)]}, {"params": [torch.zeros(2)]}]
    optimizer = hydra.utils.instantiate(OmegaConf.create(text))(groups)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


# -- the page --------------------------------------------------------------------------------------


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parent.parent / "docs" / "frameworks" / "lightning.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lightning, "Trainer", functools.partial(trainer, tmp_path, logger=Logger()))
    dataset = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.arange(64) % 3)
    names = {"dataset": dataset, "loader": torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=True)}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("when", ["at its end", "at its validation", "in its middle"])
def test_epochs_of_the_page_go_on_from_a_file(tmp_path: Path, when: str) -> None:
    """Also where it was written before an epoch's end; and accumulation does not divide one."""
    page = Path(__file__).parent.parent / "docs" / "frameworks" / "lightning.md"
    (block,) = re.findall(
        r"```python\n(class PerEpoch.*?)\n\n\ntrainer = ", page.read_text("utf-8"), flags=re.DOTALL
    )
    names: dict[str, Any] = {"fastlr": fastlr, "Classifier": Validated}
    exec(compile(block, page.name, "exec"), names)
    seen: list[tuple[int, float]] = []

    class Seen(lightning.Callback):  # type: ignore[misc,name-defined]
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            seen.append((trainer.current_epoch, optimizer.param_groups[0]["lr"]))

    how = {"save_on_train_epoch_end": when == "at its end"}
    if when == "in its middle":
        how = {"every_n_train_steps": 1}

    def fitted(ckpt_path: Any = None) -> Any:
        made = trainer(
            tmp_path,
            max_epochs=4,
            callbacks=[Seen(), saving(tmp_path, **how)],
            accumulate_grad_batches=4,
            enable_checkpointing=True,
            num_sanity_val_steps=0,
        )
        module = names["PerEpoch"]()
        made.fit(module, loader(), loader(), ckpt_path=ckpt_path)
        return module, made

    whole = fitted()
    assert seen == [(epoch, 0.1 * 0.5**epoch) for epoch in range(4) for _ in range(2)]
    seen.clear()
    first = sorted(tmp_path.glob("epoch=1*.ckpt"))[0]
    left = [1, 2, 2, 3, 3] if when == "in its middle" else [2, 2, 3, 3]
    resumed = fitted(first)
    assert seen == [(epoch, 0.1 * 0.5**epoch) for epoch in left]
    assert resumed[1].optimizers[0].clock() == whole[1].optimizers[0].clock()


# -- two processes ---------------------------------------------------------------------------------


def shared_plan() -> fastlr.BatchPlan:
    """Each of whose updates has samples for two ranks."""
    phases = [(0, 4), (1.5, 6), (2.5, 12)]
    return fastlr.BatchPlan.from_phases(phases, dataset_size=SAMPLES + 2, epochs=4, lr=0.1)


RANK = """
import subprocess
import sys
import warnings

warnings.simplefilter("ignore")
import torch

torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from pathlib import Path

from test_lightning import SWEEP, Grown, Module, loader, odd_data, ours, shared_plan, trainer

folder = Path(sys.argv[2])
ddp = {"strategy": "ddp", "devices": 2}
module = Module(dropout=0.0)
made = trainer(folder, **ddp)
before = [p.detach().clone() for p in module.parameters()]
found = ours.range_test(made, module, loader(), **SWEEP)
assert all(torch.equal(p, q) for p, q in zip(before, module.parameters()))
plan = shared_plan()
grow = ours.GrowBatch(plan, micro_batch_size=2, seed=5)
grown = Grown(grow, plan)
grown_by = trainer(folder, max_epochs=4, callbacks=[grow], **ddp)
grown_by.fit(grown, grow.batches(odd_data(2)))
torch.save({
    "losses": found.losses.tolist(),
    "weights": [p.detach() for p in grown.parameters()],
    "updates": grown.updates,
    "clock": tuple(grown_by.optimizers[0].clock()),
}, folder / f"{grown_by.global_rank}.pt")
"""


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("two processes talk through gloo")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    finished = subprocess.run(
        [*run, str(script), str(Path(__file__).parent), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert finished.returncode == 0, finished.stderr[-5000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["losses"] == second["losses"]
    its_plan = shared_plan()
    grow = ours.GrowBatch(its_plan, seed=5)
    module, made = fit(
        tmp_path, Grown(grow, its_plan), grow.batches(odd_data(2)), max_epochs=4, callbacks=[grow]
    )
    assert first["clock"] == second["clock"] == made.optimizers[0].clock()
    updates = zip(first["updates"], second["updates"], strict=True)
    assert [(at, size + other) for (at, size), (_, other) in updates] == module.updates
    assert_same(first["weights"], second["weights"])
    for ours_, theirs in zip(first["weights"], module.parameters(), strict=True):
        torch.testing.assert_close(ours_, theirs.detach(), rtol=1e-5, atol=1e-6)
