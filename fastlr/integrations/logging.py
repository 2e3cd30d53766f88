"""What was found, and how an optimizer is set, for TensorBoard, Weights & Biases and Lightning's loggers.

Nothing of them is imported: they are known by what they offer.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from fastlr._checks import count, describe, text
from fastlr.range_test import RangeTestResult
from fastlr.schedules import Schedule

__all__ = ["hparams", "log_range_test"]

_READINGS = ("base_lr", "max_lr", "onset", "steepest", "valley", "minimum")


def log_range_test(
    to: Any, found: RangeTestResult, tag: str = "range_test", *, step: int | None = None, figure: bool = True
) -> None:
    """Logs a range test: its picture, its curve and what was read from it.

    In TensorBoard the curve is the scalars ``{tag}/lr``, ``{tag}/loss`` and, where measured,
    ``{tag}/accuracy`` (or what the metric is called) against the number of the rate. In Weights & Biases it
    is one entry, so that the run's step moves on by one: picture, table ``{tag}/curve`` and readings.

    Args:
        to: a ``SummaryWriter`` of ``torch.utils.tensorboard`` or tensorboardX; a run of ``wandb`` or what
            else has ``log(dict)``; or a logger of Lightning around one.
        found: the result.
        tag: what the entries begin with.
        step: the training's, >= 0, which picture and readings are logged at; None: 0 in TensorBoard, the
            run's own in Weights & Biases.
        figure: whether to log the picture, which needs matplotlib.

    Raises:
        TypeError: nothing of this kind can be logged to.

    >>> import fastlr, numpy as np
    >>> class Run:  # as wandb.init() returns one
    ...     def log(self, entries, step=None):
    ...         print(sorted(entries))
    >>> lrs = np.geomspace(1e-4, 10, 200)
    >>> found = fastlr.RangeTestResult(lrs, 2 + np.log10(lrs / 0.1) ** 2 / 4)
    >>> log_range_test(Run(), found, figure=False)  # doctest: +NORMALIZE_WHITESPACE
    ['range_test/base_lr', 'range_test/max_lr', 'range_test/minimum', 'range_test/onset',
     'range_test/steepest', 'range_test/summary', 'range_test/valley']
    """
    if not isinstance(found, RangeTestResult):
        raise TypeError(f"found must be a range test's result, got {describe(found)}")
    text("tag", tag)
    if step is not None:
        count("step", step, 0)
    if not _is_writer(to) and not callable(getattr(to, "log", None)) and hasattr(to, "experiment"):
        to = to.experiment  # a Lightning logger's; on ranks that log nothing it takes everything
    readings = {name: value for name in _READINGS if (value := getattr(found, name)) is not None}
    picture = found.plot() if figure else None
    if _is_writer(to):
        _to_tensorboard(to, found, tag, 0 if step is None else step, readings, picture)
    elif callable(getattr(to, "log", None)):
        _to_run(to, found, tag, step, readings, picture)
    else:
        raise TypeError(
            f"a range test cannot be logged to {describe(to)}; give a SummaryWriter, a wandb run (or what "
            "has log(dict)), or a Lightning logger of one"
        )


def _is_writer(to: Any) -> bool:
    return all(callable(getattr(to, name, None)) for name in ("add_figure", "add_scalar", "add_text"))


def _curve(found: RangeTestResult) -> dict[str, list[float]]:
    """The columns of the curve, NaN where nothing was measured."""
    columns = {"lr": found.lrs.tolist(), "loss": found.losses.tolist()}
    if found.accuracies is not None:
        columns[found.metric_name] = found.accuracies.tolist()
    return columns


def _to_tensorboard(
    writer: Any, found: RangeTestResult, tag: str, step: int, readings: dict[str, float], picture: Any
) -> None:
    for name, values in _curve(found).items():
        for i, value in enumerate(values):
            if value == value:
                writer.add_scalar(f"{tag}/{name}", value, i)
    for name, value in readings.items():
        writer.add_scalar(f"{tag}/{name}", value, step)
    # Markdown: four spaces before a line keep it as it is.
    writer.add_text(f"{tag}/summary", "    " + found.summary().replace("\n", "\n    "), step)
    if picture is not None:
        writer.add_figure(f"{tag}/figure", picture, step)


def _to_run(
    run: Any, found: RangeTestResult, tag: str, step: int | None, readings: dict[str, float], picture: Any
) -> None:
    # The package that the run is from, which whoever made it has imported.
    package = sys.modules.get(type(run).__module__.split(".")[0])
    image, table = getattr(package, "Image", None), getattr(package, "Table", None)
    entries: dict[str, Any] = {f"{tag}/{name}": value for name, value in readings.items()}
    entries[f"{tag}/summary"] = found.summary()
    if table is not None:
        columns = _curve(found)
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        entries[f"{tag}/curve"] = table(columns=list(columns), data=rows)
    if picture is not None:
        entries[f"{tag}/figure"] = picture if image is None else image(picture)
    if step is None:
        run.log(entries)
    else:
        run.log(entries, step=step)


def hparams(optimizer: torch.optim.Optimizer) -> dict[str, float | str]:
    """How an optimizer is set, as numbers and text: for ``add_hparams``, ``run.config`` and their kin.

    Schedules are text, as they are written in code, and ``betas`` are ``beta1`` and ``beta2``. Of further
    groups there is what differs from the first, as ``group1/lr``.

    Args:
        optimizer: any torch optimizer.

    >>> import fastlr, torch
    >>> p = torch.zeros(2, requires_grad=True)
    >>> opt = fastlr.FusedSGD([p], lr=fastlr.Cosine(0.1, 0.0, 100), momentum=0.9)
    >>> settings = hparams(opt)
    >>> settings["optimizer"], settings["momentum"]
    ('FusedSGD', 0.9)
    >>> settings["lr"]
    "Cosine(unit='update', start=0.1, end=0.0, steps=100)"
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch optimizer, got {describe(optimizer)}")
    first, *others = [_settings(group, optimizer.defaults) for group in optimizer.param_groups]
    settings: dict[str, float | str] = {"optimizer": type(optimizer).__name__, **first}
    settings |= {
        name: _plain(getattr(optimizer, name)) for name in _OF_ALL_GROUPS if hasattr(optimizer, name)
    }
    for place, group in enumerate(others, 1):
        settings |= {f"group{place}/{name}": v for name, v in group.items() if first.get(name) != v}
    return settings


# Options of a fused optimizer that are not in its groups.
_OF_ALL_GROUPS = ("max_grad_norm", "nonfinite")
# What the groups of a fused optimizer hold besides its options.
_NO_OPTIONS = ("updates", "samples", "clock_unit", "fresh")


def _settings(group: dict[str, Any], defaults: dict[str, Any]) -> dict[str, float | str]:
    settings: dict[str, float | str] = {}
    for name in defaults:
        if name in _NO_OPTIONS or name.endswith("_start") or name not in group:
            continue
        value = group[name]
        if isinstance(value, (tuple, list)):
            settings |= {f"{name.removesuffix('s')}{i}": _plain(part) for i, part in enumerate(value, 1)}
        elif not name.endswith("_schedule"):
            settings[name] = _plain(value)
    owners = {name: value for name, value in group.items() if isinstance(value, Schedule)}
    return settings | {name.removesuffix("_schedule"): repr(value) for name, value in owners.items()}


def _plain(value: Any) -> float | str:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    return value if isinstance(value, (bool, int, float, str)) else str(value)
