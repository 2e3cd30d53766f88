"""The files of a range test: CSV for spreadsheets, and JSON that is read back."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from fastlr._checks import file_name
from fastlr._files import replacing
from fastlr.plotting.range_test import SweptCurve
from fastlr.range_test.reading import READINGS

_FORMAT = "fastlr range test, version 1"

T = TypeVar("T")


class Recorded(SweptCurve, Protocol):
    """What the files hold; :class:`RangeTestResult` says what each of them is."""

    @property
    def repeats(self) -> Sequence[Recorded]: ...
    @property
    def notes(self) -> Sequence[str]: ...
    @property
    def group_bounds(self) -> Sequence[tuple[float, float]]: ...


def write_csv(result: Recorded, path: str | os.PathLike[str]) -> None:
    """Writes the columns lr, loss and, where measured, the metric; before them repeat, if there are."""
    with replacing(path, newline="") as file:
        writer = csv.writer(file)
        metric = [] if result.accuracies is None else [result.metric_name]
        writer.writerow([*(["repeat"] if result.repeats else []), "lr", "loss", *metric])
        for number, one in enumerate(result.repeats or (result,), 1):
            lead = [number] if result.repeats else []
            for i, row in enumerate(zip(one.lrs.tolist(), one.losses.tolist(), strict=True)):
                value: list[Any] = []
                if one.accuracies is not None:
                    value = [float(one.accuracies[i]) if one.measured[i] else ""]
                writer.writerow([*lead, *row, *value])


def write_json(result: Recorded, path: str | os.PathLike[str]) -> None:
    """Writes everything that :func:`read_json` reads back, and the answers, for other readers."""
    with replacing(path) as file:
        json.dump(to_dict(result), file, indent=1)
        file.write("\n")


def read_json(path: str | os.PathLike[str], made_of: Callable[[dict[str, Any]], T]) -> T:
    """What ``made_of`` makes of what :func:`write_json` wrote, its values under the names of attributes.

    Raises:
        ValueError: the file holds no range test.
    """
    with open(file_name("path", path), encoding="utf-8") as file:
        try:
            data = json.load(file)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{os.fspath(path)} is no JSON file: {error}") from error
    return read_dict(data, made_of, os.fspath(path))


def read_dict(data: object, made_of: Callable[[dict[str, Any]], T], where: str) -> T:
    """What ``made_of`` makes of what :func:`to_dict` returned.

    Raises:
        ValueError: it is no range test; ``where`` is its name.
    """
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise ValueError(f'{where} holds no "{_FORMAT}"')
    try:
        return made_of(data)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where} is incomplete or damaged: {error!r}") from error


def to_dict(result: Recorded) -> dict[str, Any]:
    """Everything that :func:`read_dict` reads back, and the answers, as JSON has values."""
    data: dict[str, Any] = json.loads(json.dumps({"format": _FORMAT, **_to_dict(result)}, allow_nan=False))
    return data


def _to_dict(result: Recorded) -> dict[str, Any]:
    answers = {name: getattr(result, name) for name in (*READINGS, "steepest_region", "reason", "intervals")}
    arrays = {name: getattr(result, name) for name in ("lrs", "losses", "accuracies")}
    return {
        "answers": answers,
        "sweep": result.sweep,
        "stopped": result.stopped,
        "metric_name": result.metric_name,
        "notes": result.notes,
        "group_bounds": result.group_bounds,
        **{
            name: None if array is None else [None if np.isnan(v) else v for v in array.tolist()]
            for name, array in arrays.items()
        },
        "repeats": [_to_dict(repeat) for repeat in result.repeats],
    }
