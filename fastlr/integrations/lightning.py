"""Lightning: the range test, growing batches and stochastic weight averaging as its users have them.

For the package ``lightning`` from 2.4 on, or ``pytorch_lightning`` where that is not there.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from fastlr._checks import describe, function
from fastlr.batch_growth import Batch, BatchPlan, Epoch, GrowingLoader
from fastlr.integrations.logging import log_range_test
from fastlr.optim import FusedOptimizer
from fastlr.range_test import RangeTestResult
from fastlr.range_test import range_test as plain_range_test
from fastlr.schedules import Schedule

__all__ = ["GrowBatch", "RangeTest", "StochasticWeightAveraging", "range_test"]

_PACKAGE = "lightning.pytorch" if importlib.util.find_spec("lightning") is not None else "pytorch_lightning"
try:
    _lightning: Any = importlib.import_module(_PACKAGE)
except ModuleNotFoundError as error:
    if error.name != _PACKAGE:
        raise
    raise ModuleNotFoundError(
        'fastlr.integrations.lightning needs Lightning; "pip install fastlr[lightning]" installs it',
        name="lightning",
    ) from None
_Callback: Any = _lightning.Callback
_Averaging: Any = _lightning.callbacks.StochasticWeightAveraging


# -- range test ------------------------------------------------------------------------------------


class _Tested(BaseException):
    """Ends the fit that a range test has borrowed."""


def range_test(trainer: Any, module: Any, data: Any = None, **options: Any) -> RangeTestResult:
    """The range test of what a trainer would train: see :func:`fastlr.range_test`.

    The loss is that of ``training_step``, in the trainer's precision, on its devices, of batches that went
    through the hooks for them; the optimizer is from ``configure_optimizers``; gradients are accumulated and
    clipped as in training. ``self.log`` does nothing meanwhile, and no callback or logger hears of it.

    Afterwards, also after an exception or Ctrl-C, weights, optimizer, data and random numbers are as
    :func:`fastlr.range_test` leaves them, and callbacks, loggers, data and progress of the trainer are those
    of before. The hooks that set up a fit (``prepare_data``, ``setup``, ``configure_model``,
    ``configure_optimizers``, ``on_fit_start``) have been called once.

    Args:
        trainer: a ``Trainer``, outside of a fit. Inside of one use :class:`RangeTest`.
        module: a ``LightningModule`` with automatic optimization and one optimizer.
        data: a ``LightningDataModule``, or a loader for training; None: the module's own. Of
            :meth:`GrowBatch.batches` it is the batch size that the plan begins with.
        options: those of :func:`fastlr.range_test`, but for loss_fn, step_fn and scaler. With ``metric``,
            which gets a batch, val_loader may be left out where the trainer has one.

    Raises:
        ValueError: there are several optimizers or loaders, the trainer has nothing to train, or it starts
            processes for each fit.
        TypeError: the module optimizes manually.
    """
    launcher = trainer.strategy.launcher
    if launcher is not None and hasattr(launcher, "_start_method"):
        raise ValueError(
            f"{type(trainer.strategy).__name__} starts other processes for each fit, from which no answer "
            'comes back; use strategy="ddp", or test on one device'
        )
    _check_options(options)
    test = _Borrowed(options)
    kept = {
        name: vars(trainer)[name] for name in ("state", "should_stop", "datamodule") if name in vars(trainer)
    }
    kept |= {"callbacks": trainer.callbacks, "loggers": trainer.loggers}
    kept["num_sanity_val_steps"] = trainer.num_sanity_val_steps
    optimizers, schedulers = trainer.strategy.optimizers, trainer.strategy.lr_scheduler_configs
    owner, own_callbacks = module._trainer, vars(module).get("configure_callbacks")
    seeds = importlib.import_module(f"{_PACKAGE}.utilities.seed")
    try:
        trainer.callbacks, trainer.loggers, trainer.num_sanity_val_steps = [test], [], 0
        trainer.state = type(trainer.state)()
        module.configure_callbacks = list  # those would hear of it, too
        with seeds.isolate_rng(), torch.set_grad_enabled(torch.is_grad_enabled()):
            try:
                trainer.fit(module, data)
            except _Tested:
                pass
            except BaseException as error:  # kept, as isolate_rng would not clean up
                test.error = error
    finally:
        for name, value in kept.items():
            setattr(trainer, name, value)
        trainer.strategy.optimizers, trainer.strategy.lr_scheduler_configs = optimizers, schedulers
        module.trainer = owner
        del module.configure_callbacks
        if own_callbacks is not None:
            module.configure_callbacks = own_callbacks
    if test.error is not None:
        raise test.error
    if test.result is None:
        raise ValueError(
            "the trainer began no training, as it has no batches or has reached its max_epochs or max_steps; "
            "give it some, or a new Trainer"
        )
    return test.result


class _Borrowed(_Callback):  # type: ignore[misc]
    """Tests where training would start, and ends the fit."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.result: RangeTestResult | None = None
        self.error: BaseException | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        try:
            self.result = _tested(trainer, pl_module, self.options)
        except BaseException as error:
            self.error = error  # which Lightning would turn into an exit, were it Ctrl-C
        trainer.datamodule = None  # which would hear of an exception
        raise _Tested


class RangeTest(_Callback):  # type: ignore[misc]
    """A callback that makes a range test where a fit begins, from the weights that it begins with.

    What it did is undone, and the training is that of a trainer without it, unless ``use`` says what to make
    of the answer. It is made once: a fit that resumes a run has the run's answer.

    Args:
        use: ``(result) -> schedule`` for the learning rate of the optimizer, which has to be one of fastlr's:
            ``lambda found: found.triangular2(step_size_up=2000)``. A result without bounds raises there, and
            the fit ends; None, or to return None: nothing is set.
        options: as for :func:`range_test`.

    Attributes:
        result: the answer; None: there is none yet. The trainer's loggers get it as
            :func:`fastlr.integrations.logging.log_range_test` logs it.
    """

    def __init__(
        self, use: Callable[[RangeTestResult], Schedule | None] | None = None, **options: Any
    ) -> None:
        if use is not None:
            function("use", use)
        _check_options(options)
        self.use, self.options = use, options
        self.result: RangeTestResult | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step > 0:
            return
        if self.use is not None and not isinstance(trainer.optimizers[0], FusedOptimizer):
            raise TypeError(
                "use sets a schedule, which only an optimizer of fastlr's takes, got "
                f"{type(trainer.optimizers[0]).__name__}; make it fastlr.FusedSGD, or leave use out"
            )
        self.result = _tested(trainer, pl_module, self.options)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                if _takes_range_tests(logger):
                    log_range_test(logger, self.result)
        schedule = None if self.use is None else self.use(self.result)
        if schedule is not None:
            trainer.optimizers[0].set_schedule(schedule)

    def state_dict(self) -> dict[str, Any]:
        return {"result": None if self.result is None else self.result.to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        data = state_dict["result"]
        self.result = None if data is None else RangeTestResult.from_dict(data)


def _takes_range_tests(logger: Any) -> bool:
    """CSVLogger's experiment, and those of some others, take numbers alone."""
    experiment = getattr(logger, "experiment", None)
    return callable(getattr(experiment, "add_figure", None)) or callable(getattr(experiment, "log", None))


def _check_options(options: dict[str, Any]) -> None:
    for name in ("model", "optimizer", "loss_fn", "step_fn", "scaler", "train_loader"):
        if name in options:
            raise TypeError(f"{name} is the module's or the trainer's; leave it out")
    inspect.signature(plain_range_test).bind_partial(**options)  # raises TypeError for what it does not take


def _tested(trainer: Any, module: Any, options: dict[str, Any]) -> RangeTestResult:
    """The range test of a fit that is about to train."""
    options = dict(options)
    if not module.automatic_optimization:
        raise TypeError(
            f"{type(module).__name__} optimizes manually, so that training_step makes the updates itself; "
            "call fastlr.range_test(model, optimizer, step_fn=..., train_loader=...) with what gives its loss"
        )
    if len(trainer.optimizers) != 1:
        raise ValueError(
            f"a range test is of one optimizer, configure_optimizers gives {len(trainer.optimizers)}"
        )
    (optimizer,) = trainer.optimizers
    loader = _one_loader("training", trainer.train_dataloader)
    accumulate = trainer.accumulate_grad_batches
    if isinstance(loader, _Epochs):
        loader, accumulate = loader.beginning()
    if options.get("metric") is not None:
        options["metric"] = _moving(trainer, options["metric"])
        if options.get("val_loader") is None:
            options["val_loader"] = _one_loader("validation", trainer.val_dataloaders)
    options.setdefault("accumulate", accumulate)
    takes_index = len(inspect.signature(module.training_step).parameters) > 1
    done = 0

    def loss_of(batch: Any) -> torch.Tensor:
        nonlocal done
        output = trainer.strategy.training_step(batch, *([done] if takes_index else []))
        done += 1
        loss = output["loss"] if isinstance(output, dict) else output
        if loss is None:
            raise ValueError(
                "training_step returned None, which skips a batch; a range test needs every loss"
            )
        return loss  # type: ignore[no-any-return]

    with _silent(trainer, module), _clipping(trainer, module, optimizer):
        return plain_range_test(
            trainer.strategy.model,
            optimizer,
            train_loader=loader,
            step_fn=_moving(trainer, loss_of),
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            **options,
        )


def _one_loader(what: str, loaders: Any) -> Any:
    if isinstance(loaders, (list, tuple)) and len(loaders) == 1:
        (loaders,) = loaders
    if isinstance(loaders, (list, tuple, dict)) or loaders is None:
        got = "none" if loaders is None else f"{len(loaders)}"
        raise ValueError(f"a range test takes one loader for {what}, got {got}")
    return loaders


def _moving(trainer: Any, of_batch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of batches that are as the module gets them: converted, moved and through its hooks."""

    @functools.wraps(of_batch)
    def moved(batch: Any) -> Any:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return of_batch(trainer.strategy.batch_to_device(batch, dataloader_idx=0))

    return moved


@contextmanager
def _silent(trainer: Any, module: Any) -> Iterator[None]:
    """Nothing that the module logs goes anywhere."""
    loggers = trainer.loggers
    dummy = importlib.import_module(f"{_PACKAGE}.loggers.logger").DummyLogger
    patched = ("log", "log_dict")
    for name in patched:
        setattr(module, name, lambda *_, **__: None)
    trainer.loggers = [dummy()] if loggers else []
    try:
        yield
    finally:
        trainer.loggers = loggers
        for name in patched:
            delattr(module, name)


@contextmanager
def _clipping(trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Each step clips as the trainer would."""

    def clip(*_: Any) -> None:
        module.configure_gradient_clipping(
            optimizer,
            gradient_clip_val=trainer.gradient_clip_val,
            gradient_clip_algorithm=trainer.gradient_clip_algorithm,
        )

    hook = optimizer.register_step_pre_hook(clip)
    try:
        yield
    finally:
        hook.remove()


# -- growing batches -------------------------------------------------------------------------------


class GrowBatch(_Callback):  # type: ignore[misc]
    """A callback with which a module trains on the batches of a :class:`fastlr.BatchPlan`, to the sample.

    The module stays as it is, with automatic optimization: ``training_step`` gets a micro-batch of a
    :class:`fastlr.GrowingLoader`, the callback sees to it that Lightning steps where an update ends, weighs
    each loss so that they add up to the mean over the update, and binds the optimizer to the loader, whose
    samples clock the plan's rates follow::

        grow = GrowBatch(plan, micro_batch_size=256, num_workers=4)
        trainer = Trainer(max_epochs=plan.epochs, callbacks=[grow])
        trainer.fit(module, grow.batches(dataset))       # or so in train_dataloader()

    ``accumulate_grad_batches`` alone could not do it: Lightning counts it from each epoch's beginning, and
    divides an epoch's last losses by as many batches as were not there; and a phase may begin anywhere.

    The place in the plan goes into the trainer's checkpoints; a run that resumes one, wherever in an epoch,
    ends as the run that was not interrupted. With DDP each rank gets its share.

    Args:
        plan: which batch size holds where.
        options: those of :class:`fastlr.GrowingLoader`, but for the data set and the plan.

    Attributes:
        loader: the :class:`fastlr.GrowingLoader` of the last fit; None: there was none.
        batch: the :class:`fastlr.batch_growth.Batch` that the module has at present.
    """

    def __init__(self, plan: BatchPlan, **options: Any) -> None:
        if not isinstance(plan, BatchPlan):
            raise TypeError(f"plan must be a BatchPlan, got {describe(plan)}")
        self.plan, self.options = plan, options
        self.loader: GrowingLoader | None = None
        self.batch: Batch | None = None
        self._saved: dict[str, Any] | None = None
        self._trainer: Any = None
        self._before: dict[str, Any] = {}

    def batches(self, dataset: Any) -> _Epochs:
        """What a trainer takes as its loader for training: in each epoch, that epoch's micro-batches.

        Args:
            dataset: as for :class:`fastlr.GrowingLoader`.
        """
        return _Epochs(self, dataset)

    # -- what the trainer calls

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        self._check(trainer, pl_module)
        self.loader = self.batch = self._saved = None
        self._trainer = trainer
        self._before = {"reload_dataloaders_every_n_epochs": trainer.reload_dataloaders_every_n_epochs}
        self._before["accumulate_grad_batches"] = trainer.accumulate_grad_batches
        trainer.reload_dataloaders_every_n_epochs = 1  # as epochs differ in length

    def _check(self, trainer: Any, module: Any) -> None:
        if not module.automatic_optimization:
            raise TypeError(
                f"{type(module).__name__} optimizes manually, so that it has to step itself where "
                "batch.ends_update is True; give it a fastlr.GrowingLoader"
            )
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "accumulate_grad_batches must be 1, as the plan says how many micro-batches make an update, "
                f"got {trainer.accumulate_grad_batches}"
            )
        epochs = trainer.max_epochs
        if epochs is None or not 1 <= epochs <= self.plan.epochs:
            raise ValueError(
                f"max_epochs must be in 1 .. {self.plan.epochs}, as many as the plan has, got {epochs}"
            )
        if trainer.limit_train_batches != 1.0:
            raise ValueError(
                "limit_train_batches must be 1.0, as the plan counts on every sample of an epoch, got "
                f"{trainer.limit_train_batches} (fast_dev_run and overfit_batches set it, too)"
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.loader is None:
            raise ValueError(
                "the trainer has another loader for training; give it grow.batches(dataset) of this callback"
            )
        self.loader.bind(trainer.optimizers[0])
        self._zero_grad = pl_module.optimizer_zero_grad
        backward = pl_module.backward

        def weighted(loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            assert self.batch is not None
            # Which Lightning has divided by it; a power of two, so that no bit is lost.
            backward(loss * (self.batch.weight * trainer.accumulate_grad_batches), *args, **kwargs)

        pl_module.backward = weighted
        pl_module.optimizer_zero_grad = lambda *_, **__: None  # Lightning does not know where updates begin

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        assert self.batch is not None
        if self.batch.starts_update:
            self._zero_grad(trainer.current_epoch, batch_idx, trainer.optimizers[0])
        # Lightning steps where it divides the number of the batch, counted from 1, and at an epoch's end,
        # which always ends an update.
        number, every = batch_idx + 1, 1
        while not self.batch.ends_update and number % every == 0:
            every *= 2
        trainer.accumulate_grad_batches = every

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._leave(trainer, pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._leave(trainer, pl_module)

    def _leave(self, trainer: Any, module: Any) -> None:
        for name in ("backward", "optimizer_zero_grad"):
            vars(module).pop(name, None)
        for name, value in self._before.items():
            setattr(trainer, name, value)
        self._before = {}

    def state_dict(self) -> dict[str, Any]:
        return {"loader": None if self.loader is None else self.loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict["loader"]

    # -- what its batches call

    def _loader_of(self, dataset: Any) -> GrowingLoader:
        """Made late: when the ranks are known, and with the place of a run that is resumed."""
        if self.loader is None:
            self.loader = GrowingLoader(dataset, self.plan, **self.options)
        if self._saved is not None:
            self.loader.load_state_dict(self._saved)
            self._saved = None
        return self.loader

    def _length(self, epoch: Epoch | None) -> int:
        """How many batches Lightning's epoch has, of which the loader has this one, or its rest, to come."""
        left = 0 if epoch is None else len(epoch)
        loop = None if self._trainer is None else self._trainer.fit_loop
        if loop is None or not loop.epoch_loop.restarting:
            if epoch is not None and left == 0:
                raise ValueError(
                    f"epoch {epoch.index} of the plan has no batches, which Lightning takes for the end of "
                    "the training; make the plan with smaller batches or fewer epochs"
                )
            return left
        # A run that is resumed counts on from the batches that it has behind it: what was completed, or was
        # so but for the hook that saved. Lightning's epoch may be at its end, with the loader's next to come.
        batches = loop.epoch_loop.batch_progress.current
        behind = batches.ready if batches.processed == batches.ready else batches.completed
        comes = epoch is not None and epoch.index <= loop.epoch_progress.current.processed
        return int(behind) + (left if comes else 0)


class _Epochs:
    """The epochs of a plan, one at each iteration; see :meth:`GrowBatch.batches`."""

    def __init__(self, grow: GrowBatch, dataset: Any) -> None:
        self._grow, self.dataset = grow, dataset
        self._epoch: Epoch | None = None
        self._under_way: GrowingLoader | None = None  # whose epoch that is, from its first batch on
        self._length = 0

    def _next(self) -> Epoch | None:
        return next(self._grow._loader_of(self.dataset).epochs(), None)

    def __len__(self) -> int:
        # To ask the loader for its next epoch is to leave the one that it is in.
        left = self._epoch is not None and not self._epoch.finished
        if not left or self._under_way is not self._grow.loader:
            self._length = self._grow._length(self._next())
        return self._length

    def __iter__(self) -> Iterator[Any]:
        self._epoch = self._next()
        self._under_way = self._grow.loader
        for batch in self._epoch if self._epoch is not None else ():
            self._grow.batch = batch
            yield batch.data

    def beginning(self) -> tuple[_Beginning, int]:
        """Batches of the size that the plan begins with, and how many of them make an update."""
        size, samples = self._grow.plan.batch_sizes[0], self._grow.plan.dataset_size
        same = BatchPlan.from_phases([(0, size)], dataset_size=samples, epochs=1, lr=1.0, tail="drop")
        make = functools.partial(GrowingLoader, self.dataset, same, **self._grow.options)
        return _Beginning(make), len(make()) // same.total_updates

    # Lightning asks what can be resumed in the middle of an epoch for these; the callback keeps the place.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class _Beginning:
    """The batches of a loader's epoch, again at each iteration in another order."""

    def __init__(self, make: Callable[..., GrowingLoader]) -> None:
        self._make = make
        self._seed = int(make.keywords.get("seed", 0))  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[Any]:
        self._seed += 1
        for batch in self._make(seed=self._seed):
            yield batch.data


# -- stochastic weight averaging -------------------------------------------------------------------


class StochasticWeightAveraging(_Averaging):  # type: ignore[misc]
    """Lightning's ``StochasticWeightAveraging`` for an optimizer whose schedule owns the rate.

    From ``swa_epoch_start`` on the options of the optimizer are handed over (see
    :meth:`fastlr.FusedOptimizer.handed_over`), and Lightning's ``SWALR`` writes the rate; a momentum or decay
    that a schedule drove stays what it then is. When the training ends, or is stopped, the schedules are in
    charge again. A run that resumes a checkpoint from within goes on with the rate that it had.

    Arguments are Lightning's. With an optimizer of torch's it is Lightning's own.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._handed: ExitStack | None = None
        self._optimizer: FusedOptimizer | None = None  # whose options are handed over
        self._numbers: list[dict[str, Any]] | None = None  # of a run that is resumed

    def _hand_over(self, trainer: Any) -> None:
        optimizer = trainer.optimizers[0]
        if self._handed is None and isinstance(optimizer, FusedOptimizer):
            self._handed = ExitStack()
            self._handed.enter_context(optimizer.handed_over())
            self._optimizer = optimizer

    def _take_back(self) -> None:
        handed, self._handed, self._optimizer = self._handed, None, None
        if handed is not None:
            handed.close()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        numbers, self._numbers = self._numbers, None
        if numbers is not None:
            self._hand_over(trainer)
            for group, own in zip(trainer.optimizers[0].param_groups, numbers, strict=True):
                group.update(own)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self.swa_start <= trainer.current_epoch <= self.swa_end:
            self._hand_over(trainer)
        super().on_train_epoch_start(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_end(trainer, pl_module)
        self._take_back()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._take_back()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._take_back()

    def state_dict(self) -> dict[str, Any]:
        groups = None if self._optimizer is None else self._optimizer.param_groups
        numbers = None if groups is None else [_numbers(group) for group in groups]
        return {**super().state_dict(), "numbers": numbers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._numbers = state_dict.get("numbers")  # a checkpoint of Lightning's own has none
        super().load_state_dict(state_dict)


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    """The options in a group that are handed over, and what ``SWALR`` keeps there, which are no counts."""
    numbers: dict[str, Any] = {name: float(v) for name, v in group.items() if isinstance(v, float)}
    return numbers | {name: tuple(map(float, v)) for name, v in group.items() if isinstance(v, tuple)}
