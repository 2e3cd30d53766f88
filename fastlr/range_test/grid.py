"""Range tests side by side: several settings of weight decay, momentum and batch size."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from fastlr import _core, plotting
from fastlr._checks import count, describe, items, real
from fastlr._files import replacing
from fastlr._tables import aligned, html_table
from fastlr.optim import FusedOptimizer
from fastlr.range_test.result import RangeTestResult
from fastlr.range_test.snapshot import same_random_numbers, undone
from fastlr.range_test.sweep import range_test

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RangeTestGrid:
    """Range tests of several settings.

    Attributes:
        settings: of each test, such as ``{"weight_decay": 1e-4, "momentum": 0.9}``; all name the same.
        results: of each test; accuracies in all of them or in none.

    Raises:
        ValueError: there is no test, or not one result for each setting, or they do not go together.
        TypeError: a setting is no dict of numbers, or a result is of another kind.
    """

    settings: tuple[dict[str, float], ...]
    results: tuple[RangeTestResult, ...]

    def __post_init__(self) -> None:
        for name in ("settings", "results"):
            object.__setattr__(self, name, items(name, getattr(self, name)))
        if not self.settings or len(self.settings) != len(self.results):
            raise ValueError(
                "a grid must have one or more settings and a result for each, got "
                f"{len(self.settings)} settings and {len(self.results)} results"
            )
        for setting in self.settings:
            if not isinstance(setting, dict) or not all(isinstance(v, Real) for v in setting.values()):
                raise TypeError(f"settings must hold dicts of numbers, got {setting!r}")
            if list(setting) != list(self.settings[0]):
                raise ValueError(f"settings must all name the same, got {self.settings[0]} and {setting}")
        for result in self.results:
            if not isinstance(result, RangeTestResult):
                raise TypeError(f"results must hold range test results, got {type(result).__name__}")
            if (result.accuracies is None) != (self.results[0].accuracies is None):
                raise ValueError("results must have accuracies in all of them or in none, got some of each")

    def __iter__(self) -> Iterator[tuple[dict[str, float], RangeTestResult]]:
        return iter(zip(self.settings, self.results, strict=True))

    def __len__(self) -> int:
        return len(self.results)

    def names(self) -> list[str]:
        """Each setting in words."""
        return [", ".join(f"{key} {value:g}" for key, value in s.items()) for s in self.settings]

    def peaks(self) -> list[float]:
        """Of each test the best of its smooth curve: the highest accuracy, or else the lowest loss.

        NaN where the curve is too short to be smoothed.
        """
        peaks = []
        for result in self.results:
            smooth = result.smoothed_losses
            if result.smoothed_accuracies is not None:
                smooth = -result.smoothed_accuracies
            low = float(np.nanmin(smooth)) if not np.isnan(smooth).all() else np.nan
            peaks.append(low if result.accuracies is None else -low)
        return peaks

    def best(self) -> dict[str, float]:
        """The setting whose curve gets best, of those that have an answer.

        Raises:
            ValueError: none has an answer.
        """
        sign = 1 if self.results[0].accuracies is None else -1
        answers = [(sign * peak, i) for i, peak in enumerate(self.peaks()) if self.results[i]]
        if not answers:
            raise ValueError(f"no setting gives bounds; the first says: {self.results[0].reason}")
        return self.settings[min(answers)[1]]

    def table(self) -> list[list[str]]:
        """The tests as rows of text, under a row of headings."""
        first = self.results[0]
        peak = "lowest loss" if first.accuracies is None else f"best {first.metric_name}"
        rows = [[*self.settings[0], "base_lr", "max_lr", peak, "remark"]]
        for (setting, result), best in zip(self, self.peaks(), strict=True):
            rates = [f"{lr:.2g}" if lr is not None else "none" for lr in (result.base_lr, result.max_lr)]
            remark = result.reason or result.stopped or ""
            rows.append([*(f"{v:g}" for v in setting.values()), *rates, f"{best:.4g}", remark])
        return rows

    def summary(self) -> str:
        """The table in aligned columns."""
        return aligned(self.table())

    def _repr_html_(self) -> str:
        """The table, as a notebook shows it."""
        headings, *rows = self.table()
        return html_table(f"range tests of {len(self)} settings", rows, headings)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draws the smooth curves of all tests in one picture. Needs matplotlib.

        Returns the figure; with ``path`` it is saved as well, in the format of the suffix.
        """
        return plotting.plot_range_test_grid(self, path)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the table."""
        with replacing(path, newline="") as file:
            csv.writer(file).writerows(self.table())


def range_test_grid(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    train_loader: Iterable[Any] | Callable[[int], Iterable[Any]] | None = None,
    val_loader: Iterable[Any] | None = None,
    *,
    weight_decay: Sequence[float] = (),
    momentum: Sequence[float] = (),
    batch_size: Sequence[int] = (),
    **options: Any,
) -> RangeTestGrid:
    """A range test for each combination of settings, all from the same weights and random numbers.

    What weight decay, momentum and batch size to take shows in how high a rate each of them bears and how
    far it gets there.

    Args:
        model, optimizer, loss_fn, train_loader, val_loader: as for :func:`range_test`. With ``batch_size``
            the train_loader is a DataLoader, which is made anew for each size and leaves out a last batch
            of fewer samples; or a function ``(batch_size) -> loader``. Of its batches those are left out in
            which no tensor has batch_size rows, and the random numbers that it draws are put back.
        weight_decay: values to try, >= 0; none: the optimizer's own.
        momentum: values to try, in [0, 1): ``momentum``, or the first of ``betas``.
        batch_size: values to try, >= 1 and at most the samples that the train_loader draws in an epoch.
        options: the others of :func:`range_test`.

    Raises:
        ValueError: there is nothing to try, a value is out of range or not one that the optimizer has, or
            there are fewer samples than a batch is to have.
        TypeError: the train_loader does not let its batch size be changed, or values are no list.

    >>> import fastlr, torch
    >>> model = torch.nn.Linear(4, 3)
    >>> opt = fastlr.FusedSGD(model.parameters(), momentum=0.9)
    >>> batches = [(torch.randn(32, 4), torch.randint(3, (32,))) for _ in range(200)]
    >>> grid = fastlr.range_test_grid(model, opt, torch.nn.functional.cross_entropy, batches,
    ...                               weight_decay=[0, 1e-3], momentum=[0.8, 0.9], progress=False)
    >>> len(grid), grid.settings[0]
    (4, {'weight_decay': 0.0, 'momentum': 0.8})

    References:
        Smith, A disciplined approach to neural network hyper-parameters: Part 1, arXiv 1803.09820.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
    tried = {"weight_decay": weight_decay, "momentum": momentum, "batch_size": batch_size}
    axes: dict[str, list[float]] = {}
    for name, values in tried.items():
        if axis := _axis(name, values):
            axes[name] = axis
    if not axes:
        raise ValueError("nothing to try: give values for weight_decay, momentum or batch_size")
    for group in optimizer.param_groups:
        if "weight_decay" in axes and "weight_decay" not in group:
            raise ValueError(f"{type(optimizer).__name__} has no weight_decay to try values of")
        if "momentum" in axes and "momentum" not in group and "betas" not in group:
            raise ValueError(f"{type(optimizer).__name__} has neither momentum nor betas to try values of")
    loaders: dict[float | None, Any] = {None: train_loader}
    for size in axes.get("batch_size", []):
        # Each from the same random numbers, as the tests; and none of them stay drawn.
        same_random_numbers(partial(_add_loader, loaders, train_loader, int(size)))
    settings = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    results: list[RangeTestResult] = []

    def tested(setting: dict[str, float]) -> None:
        _set(optimizer, setting)
        loader = loaders[setting.get("batch_size")]
        results.append(range_test(model, optimizer, loss_fn, loader, val_loader, **options))

    for setting in settings:
        undone(partial(tested, setting), _kept_settings(optimizer))
    return RangeTestGrid(tuple(settings), tuple(results))


def _axis(name: str, values: Sequence[float]) -> list[float]:
    """The values to try of a setting."""
    try:
        tried = items(name, values)
    except TypeError:
        raise TypeError(
            f"{name} must be a list of values to try, got {describe(values)}; for one value pass [{values!r}]"
        ) from None
    if name == "batch_size":
        return [count(name, value) for value in tried]
    axis = [real(name, value) for value in tried]
    if name == "momentum" and max(axis, default=0.0) >= 1.0:
        raise ValueError(f"momentum must be in [0, 1), got {max(axis)!r}")
    return axis


class _Full:
    """The batches of a loader that have so many samples; others, such as a smaller last one, are left out.

    A batch has as many samples as one of its tensors has rows; one without tensors is taken as it is.
    """

    def __init__(self, loader: Iterable[Any], batch_size: int) -> None:
        self.loader, self.batch_size = loader, batch_size

    def __iter__(self) -> Iterator[Any]:
        others: set[int] = set()
        full = False
        for batch in self.loader:
            rows = set(_rows(batch))
            if not rows or self.batch_size in rows:
                full = True
                yield batch
            others |= rows
        if others and not full:
            raise ValueError(
                f"the function for batch_size {self.batch_size} returned a loader without a batch of that "
                f"size: its batches' tensors have {', '.join(map(str, sorted(others)))} rows"
            )


def _rows(batch: Any) -> Iterator[int]:
    if isinstance(batch, torch.Tensor):
        yield from batch.shape[:1]
    elif isinstance(batch, (Mapping, tuple, list)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _rows(part)


def _add_loader(loaders: dict[float | None, Any], loader: Any, batch_size: int) -> None:
    loaders[batch_size] = _with_batch_size(loader, batch_size)


def _with_batch_size(loader: Any, batch_size: int) -> Any:
    """A loader of batches of that size, once there is data for one."""
    if callable(loader) and not hasattr(loader, "__iter__"):
        made = loader(batch_size)
        if isinstance(made, DataLoader) and made.batch_size is not None:
            if made.batch_size != batch_size:
                raise ValueError(
                    f"the function for batch_size {batch_size} returned a DataLoader of batch_size "
                    f"{made.batch_size}; pass what it is called with on to the DataLoader"
                )
            _check_filled(made, batch_size)
        takes_part = isinstance(made, Iterable) and not isinstance(made, (Iterator, str, bytes, dict))
        return _Full(made, batch_size) if takes_part else made  # which the test refuses
    if (
        type(loader) is not DataLoader
        or loader.batch_size is None
        or isinstance(loader.dataset, torch.utils.data.IterableDataset)
    ):
        raise TypeError(
            f"the batch size of this train_loader ({type(loader).__name__}) cannot be changed; pass a "
            "DataLoader with a batch_size over a data set with a length, or a function (batch_size) -> loader"
        )
    _check_filled(loader, batch_size)
    kept = ["num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "generator"]
    kept += ["multiprocessing_context", "prefetch_factor", "sampler"]
    arguments: dict[str, Any] = {name: getattr(loader, name) for name in kept}
    # A last batch of fewer samples would be an update of another batch size than the grid says.
    return DataLoader(loader.dataset, batch_size, drop_last=True, **arguments)


def _check_filled(loader: DataLoader[Any], batch_size: int) -> None:
    try:
        samples = len(loader.sampler)  # type: ignore[arg-type]
    except TypeError:
        return  # there is no telling
    if samples < batch_size:
        raise ValueError(
            f"batch_size {batch_size} is more than the {samples} samples of the train_loader; try sizes up "
            f"to {samples}"
        )


def _set(optimizer: torch.optim.Optimizer, setting: dict[str, float]) -> None:
    for index, group in enumerate(optimizer.param_groups):
        given: dict[str, Any] = {name: value for name, value in setting.items() if name != "batch_size"}
        if isinstance(optimizer, FusedOptimizer):  # also takes it from what drives it
            if "momentum" in given and "betas" in group:
                given["beta1"] = given.pop("momentum")
            optimizer.set_schedule(**given, group=index)
            continue
        if "momentum" in given and "momentum" not in group:
            group["betas"] = (given.pop("momentum"), *group["betas"][1:])
        group.update(given)


def _kept_settings(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """What gives every group what it has now, on devices as well."""
    before = [dict(group) for group in optimizer.param_groups]
    put_back_devices = optimizer.keep_devices() if isinstance(optimizer, FusedOptimizer) else None

    def put_back_settings() -> None:
        _core.update_groups(optimizer.param_groups, before)
        if put_back_devices is not None:
            put_back_devices()

    return put_back_settings
