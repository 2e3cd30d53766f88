"""Real data sets: handwritten digits and Fashion-MNIST, which need no download; CIFAR-10 from a folder."""

from __future__ import annotations

import gzip
import math
import pickle
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import numpy as np
import torch

from fastlr._checks import choice, count, file_name, within
from fastlr._extras import extra

__all__ = ["Batches", "Dataset", "load"]

Name = Literal["digits", "fashion-mnist", "cifar10"]

# Where Debian's package dataset-fashion-mnist puts its files.
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")

# Of the 1,797 digits a quarter is held out, the same ones in every run.
_DIGITS_TEST = 450

# CIFAR-10's python version: five files to train with, and one to test.
_CIFAR10 = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


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

    def held_out(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The training part, of which a sixth is held out to choose by: x and y to train with, x and y to
        validate on. The test set has no part in it."""
        count = len(self.x_train) // 6
        return self.x_train[count:], self.y_train[count:], self.x_train[:count], self.y_train[:count]

    def to(self, device: torch.device | str) -> Dataset:
        """The same on a device."""
        x_train, y_train = self.x_train.to(device), self.y_train.to(device)
        x_test, y_test = self.x_test.to(device), self.y_test.to(device)
        return replace(self, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)


def load(
    name: Name = "digits", path: str | Path | None = None, *, label_noise: float = 0.0, seed: int = 0
) -> Dataset:
    """A data set, split and standardised on its training part.

    Args:
        name: ``"digits"``: 8 x 8 pixels, from scikit-learn's own files. ``"fashion-mnist"``: 28 x 28
            pixels, from idx files, gzipped or not. ``"cifar10"``: 3 x 32 x 32, from the files of its python
            version, ``data_batch_1`` and so on.
        path: the folder of those files; None: where Debian's package dataset-fashion-mnist puts them, for
            Fashion-MNIST. The folder ``cifar-10-batches-py`` may also lie in it.
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
    elif name == "cifar10":
        if path is None:
            raise ValueError("cifar10 needs a path: the folder of data_batch_1 ... 5 and test_batch")
        x_train, y_train, x_test, y_test = _cifar10(Path(path))
    else:
        x_train, y_train, x_test, y_test = _fashion_mnist(_DEBIAN if path is None else Path(path))
    mean, deviation = x_train.mean(), x_train.std()
    if not deviation > 0:
        raise ValueError(f"the training images of {name} in {path} are all alike")
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
    with extra("demo"):
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
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
        if len(x) != len(y) or len(y) == 0 or int(y.max()) > 9:
            raise ValueError(f"{folder}: the {part} files do not hold one of 10 labels for each image")
    train, test = (x.shape[1] for x in parts[::2])
    if train != test:
        raise ValueError(f"{folder}: the train files hold images of {train} pixels, the t10k files of {test}")
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
            "dataset-fashion-mnist) or name the folder of its four idx files"
        )
    header = 4 + 4 * dimensions
    if content[:4] == bytes((0, 0, 8, dimensions)) and len(content) >= header:
        shape = tuple(int(size) for size in np.frombuffer(content[4:header], ">i4"))
        if min(shape) >= 0 and len(content) - header == math.prod(shape):
            values: Bytes = np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()
            return values
    raise ValueError(f"{folder / name} is no idx file of bytes in {dimensions} dimensions, or cut short")


class _Arrays(pickle.Unpickler):
    """Reads dicts, lists, numbers and NumPy arrays: a pickle of anything else could run code."""

    ALLOWED: ClassVar = {
        *((module, "_reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}")
        return super().find_class(module.replace("numpy.core", _NUMPY_CORE), name)


# What NumPy 2 calls its inner package; files name it as NumPy 1 did.
_NUMPY_CORE = "numpy._core" if hasattr(np, "_core") else "numpy.core"


def _cifar10(folder: Path) -> Arrays:
    inner = folder / "cifar-10-batches-py"
    parts = [_read_batch((inner if inner.is_dir() else folder) / name) for name in _CIFAR10]
    images = [torch.from_numpy(pixels).float() for pixels, _ in parts]
    labels = [torch.tensor(classes, dtype=torch.int64) for _, classes in parts]
    return torch.cat(images[:-1]), torch.cat(labels[:-1]), images[-1], labels[-1]


def _read_batch(path: Path) -> tuple[Bytes, list[int]]:
    """Pixels, shape (n, 3072), and classes of a file of CIFAR-10's python version."""
    if not path.exists():
        raise FileNotFoundError(
            f"no {path.name} in {path.parent}; name the folder of CIFAR-10's python version, as unpacked"
        )
    try:
        with path.open("rb") as file:
            content = _Arrays(file, encoding="bytes").load()
        pixels, classes = content[b"data"], list(content[b"labels"])
        good = pixels.dtype == np.uint8 and pixels.shape == (len(classes), 3072)
        good = good and all(isinstance(label, int) and 0 <= label < 10 for label in classes)
    except Exception as error:  # whatever a damaged file makes of the objects in it
        raise ValueError(f"{path} is no batch of CIFAR-10's python version: {error}") from error
    if not good:
        raise ValueError(f"{path} does not hold one of 10 labels for each image of 3072 bytes")
    return pixels.copy(), classes
