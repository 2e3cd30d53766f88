"""Real data sets that need no download: handwritten digits and Fashion-MNIST."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch

from fastlr._checks import choice, count, file_name, within

__all__ = ["Batches", "Dataset", "load"]

Name = Literal["digits", "fashion-mnist"]

# Where Debian's package dataset-fashion-mnist puts its files.
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")

# Of the 1,797 digits a quarter is held out, the same ones in every run.
_DIGITS_TEST = 450


@dataclass(frozen=True)
class Dataset:
    """A classification task in memory.

    Attributes:
        name: as given to :func:`load`.
        x_train: images as rows, shape (n, features), float32; over all of them mean 0 and variance 1.
        y_train: their classes, shape (n,), int64.
        x_test: held-out images, shifted and scaled as ``x_train`` was.
        y_test: their classes, never replaced.
        classes: how many there are.
    """

    name: str
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    classes: int


def load(
    name: Name = "digits", path: str | Path | None = None, *, label_noise: float = 0.0, seed: int = 0
) -> Dataset:
    """A data set, split and standardised on its training part.

    Args:
        name: ``"digits"``: 8 x 8 pixels, from scikit-learn's own files. ``"fashion-mnist"``: 28 x 28
            pixels, from idx files, gzipped or not.
        path: the folder of those files; None: where Debian's package dataset-fashion-mnist puts them.
        label_noise: part of the training labels to draw anew from all classes, in [0, 1]. A label may
            be drawn as it was.
        seed: of that draw, >= 0. The split does not depend on it.

    Raises:
        ValueError, TypeError: an argument is out of range, or a file is not what its name says.
        FileNotFoundError: a file is missing; the message says where to get it.
        ModuleNotFoundError: digits without scikit-learn.

    >>> digits = load("digits", label_noise=0.2)
    >>> digits.x_train.shape, digits.y_test.shape, digits.classes
    (torch.Size([1347, 64]), torch.Size([450]), 10)
    """
    choice("name", name, get_args(Name))
    label_noise = within("label_noise", label_noise, 0.0, 1.0)
    seed = count("seed", seed, 0)
    path = None if path is None else file_name("path", path)
    if name == "digits":
        if path is not None:
            raise ValueError(f"digits come with scikit-learn and are not read from a path, got {path!r}")
        x_train, y_train, x_test, y_test = _digits()
    else:
        x_train, y_train, x_test, y_test = _fashion_mnist(_DEBIAN if path is None else Path(path))
    mean, deviation = x_train.mean(), x_train.std()
    if label_noise:
        generator = torch.Generator().manual_seed(seed)
        replaced = torch.randperm(len(y_train), generator=generator)[: round(label_noise * len(y_train))]
        y_train[replaced] = torch.randint(10, (len(replaced),), generator=generator)
    return Dataset(name, (x_train - mean) / deviation, y_train, (x_test - mean) / deviation, y_test, 10)


class Batches:
    """Batches of a data set in memory, in a new order each time they are gone through.

    Does what a shuffling ``DataLoader`` does over a ``TensorDataset``, without collating sample by sample,
    which for small batches takes longer than the model.

    Args:
        x: inputs, shape (n, ...).
        y: targets, shape (n, ...).
        batch_size: samples, >= 1; the last batch may be smaller.
        seed: of the order, >= 0; None: the order in which they stand.

    Raises:
        ValueError, TypeError: an argument is out of range, or of the wrong kind.

    >>> batches = Batches(torch.arange(10), torch.arange(10), batch_size=4, seed=0)
    >>> [len(x) for x, _ in batches]
    [4, 4, 2]
    """

    def __init__(self, x: torch.Tensor, y: torch.Tensor, batch_size: int, seed: int | None = None) -> None:
        for name, tensor in (("x", x), ("y", y)):
            if not isinstance(tensor, torch.Tensor) or tensor.ndim == 0:
                got = "one of no dimension" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise TypeError(f"{name} must be a tensor of samples, got {got}")
        if len(x) != len(y):
            raise ValueError(f"x and y must be of one length, got {len(x)} and {len(y)}")
        self.x, self.y, self.batch_size = x, y, count("batch_size", batch_size)
        seed = None if seed is None else count("seed", seed, 0)
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.x) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if self.generator is None:
            order = torch.arange(len(self.x))
        else:
            order = torch.randperm(len(self.x), generator=self.generator)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            yield self.x[chosen], self.y[chosen]


Arrays: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]


def _digits() -> Arrays:
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn: pip install 'fastlr[demo]'", name=error.name
        ) from error
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32)
    y = torch.tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[:_DIGITS_TEST], order[_DIGITS_TEST:]
    return x[train], y[train], x[test], y[test]


def _fashion_mnist(folder: Path) -> Arrays:
    def images(part: str) -> torch.Tensor:
        return torch.from_numpy(_read_idx(folder, f"{part}-images-idx3-ubyte", 3)).flatten(1).float()

    def labels(part: str) -> torch.Tensor:
        return torch.from_numpy(_read_idx(folder, f"{part}-labels-idx1-ubyte", 1)).long()

    parts = images("train"), labels("train"), images("t10k"), labels("t10k")
    for x, y, part in ((*parts[:2], "train"), (*parts[2:], "t10k")):
        if len(x) != len(y) or int(y.max()) > 9:
            raise ValueError(f"{folder}: the {part} files do not hold one of 10 labels for each image")
    return parts


def _read_idx(folder: Path, name: str, dimensions: int) -> Bytes:
    """An idx file of bytes: two zero bytes, 8 (for bytes), the number of dimensions, each as a big-endian
    32-bit integer, then the values."""
    plain, packed = folder / name, folder / f"{name}.gz"
    if plain.exists():
        content = plain.read_bytes()
    elif packed.exists():
        try:
            content = gzip.decompress(packed.read_bytes())
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{packed} is damaged: {error}") from error
    else:
        raise FileNotFoundError(
            f"no {name} or {name}.gz in {folder}; install it (Debian, Ubuntu: apt install "
            "dataset-fashion-mnist) or name the folder of its four idx files (--data-path)"
        )
    header = 4 + 4 * dimensions
    if content[:4] == bytes((0, 0, 8, dimensions)) and len(content) >= header:
        shape = tuple(int(size) for size in np.frombuffer(content[4:header], ">i4"))
        if len(content) - header == math.prod(shape):
            values: Bytes = np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()
            return values
    raise ValueError(f"{folder / name} is no idx file of bytes in {dimensions} dimensions, or cut short")
