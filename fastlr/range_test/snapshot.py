"""Running something on a model and an optimizer that leaves no trace."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Literal, TypeAlias

import numpy as np
import torch

from fastlr._distributed import reshard
from fastlr.optim import FusedOptimizer
from fastlr.range_test.keeping import Path as Place
from fastlr.range_test.keeping import Undo
from fastlr.range_test.reachable import LIMIT, Reachable

Backup: TypeAlias = Literal["device", "host", "file"] | os.PathLike[str]


def all_parameters(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The model's parameters and the optimizer's, each once."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    return list({id(p): p for p in (*model.parameters(), *held)}.values())


class Snapshot:
    """What a model, an optimizer and whatever else takes part hold, to be put back as often as need be.

    The objects are those of before, and so are their bits; :mod:`fastlr.range_test.reachable` says what
    belongs to them.

    Args:
        training: model, optimizer, scaler and callables, by their names; None: there is none.
        loaders: by their names. Of what they hold, large data are not copied but watched.
        backup: where the values of tensors go: ``"device"``: each to its own device; ``"host"``; ``"file"``:
            one in the folder for temporary files; a path: that file. It is written at once and deleted by
            :meth:`close`.

    Raises:
        TypeError: something that belongs to them cannot be put back.
    """

    def __init__(self, training: Mapping[str, object], loaders: Mapping[str, object], backup: Backup) -> None:
        self._values: list[torch.Tensor] | None = None
        self._backup = backup
        self._models = [thing for thing in training.values() if isinstance(thing, torch.nn.Module)]
        for model in self._models:
            reshard(model.modules())
        self._file: Path | None = None
        # What an optimizer has told its devices follows the rest.
        self._last = [
            (Place(None, name), thing.keep_devices())
            for name, thing in training.items()
            if isinstance(thing, FusedOptimizer)
        ]
        self._training = Reachable()
        self._training.add(*((Place(None, name), thing) for name, thing in training.items()))
        self._data = Reachable(self._training.seen, LIMIT)
        roots = [(Place(None, name), loader) for name, loader in loaders.items()]
        self._data.add(*roots, *self._training.data)
        self._tensors = [t for part in (self._training, self._data) for t in part.tensors]
        self._copied = [t for t in self._tensors if t.copied]

    @property
    def bytes(self) -> int:
        """What the backup takes."""
        return sum(t.bytes for t in self._copied)

    @property
    def remarks(self) -> list[str]:
        """What is worth knowing about what is not copied."""
        watched, beyond = [path for path, _ in self._data.watched], self._data.beyond
        remarks = []
        if watched:
            remarks.append(f"{_listed(watched)}: too large to be copied, and watched instead")
        if beyond:
            remarks.append(
                f"{_listed(beyond)}: too large to be copied or watched; what the sweep writes there stays"
            )
        return remarks

    @property
    def afterthoughts(self) -> list[str]:
        """What is worth knowing about how things were put back."""
        reordered = [path for part in (self._training, self._data) for path in part.reordered]
        if not reordered:
            return []
        return [
            f"{_listed(reordered)}: changed by the sweep; the items of before are back, but the order in "
            "which a set gives them is another one"
        ]

    def write(self) -> None:
        """Makes the backup.

        Raises:
            OSError: the file exists already, or its disk has too little room.
            MemoryError: the device has.
        """
        if self._backup == "device":
            try:
                self._values = [t.values.clone() for t in self._copied]
            except torch.OutOfMemoryError as error:
                raise MemoryError(
                    f"no room for a backup of {size(self.bytes)} on the device; pass backup='host' or 'file'"
                ) from error
        elif self._backup == "host":
            self._values = [t.values.to("cpu", copy=True) for t in self._copied]
        else:
            self._write_file()

    def _write_file(self) -> None:
        folder = tempfile.gettempdir() if self._backup == "file" else Path(self._backup).parent
        free = shutil.disk_usage(folder).free
        if free < self.bytes:
            raise OSError(
                f"a backup of {size(self.bytes)} does not fit into the {size(free)} left in {folder}"
            )
        if self._backup == "file":
            handle, name = tempfile.mkstemp(prefix="fastlr-range-test-", suffix=".pt")
            os.close(handle)
            self._file = Path(name)
        else:
            path = Path(self._backup)
            path.touch(exist_ok=False)  # a file that is there may be the backup of a test that was killed
            self._file = path
        torch.save([t.values for t in self._copied], self._file)

    def rewind(self) -> None:
        """Puts back what belongs to the training, and not what belongs to the loaders."""
        self._put_back([self._training])

    def restore(self) -> None:
        """Puts everything back.

        Raises:
            RuntimeError: something could not be put back, or was written to and had not been copied; the
                message names it, and all the rest is as it was.
        """
        self._put_back([self._training, self._data])

    def _put_back(self, parts: list[Reachable]) -> None:
        failures: dict[str, Exception] = {}

        def attempt(path: Place, undo: Undo, *arguments: object) -> None:
            # Whatever goes wrong with one thing, the others are put back all the same.
            try:
                undo(*arguments)
            except Exception as error:
                failures.setdefault(str(path), error)

        for model in self._models:
            attempt(Place(None, "model"), reshard, model.modules())
        for part in parts:
            for path, unchanged in part.watched:
                attempt(path, _require_unchanged, unchanged)
        for part in parts:
            part.reordered.clear()
            for path, undo in part.undo:
                attempt(path, undo)
        attempt(Place(None, "the backup"), self._load)
        values = dict(zip(map(id, self._copied), self._values or (), strict=False))
        tensors = [tensor for part in parts for tensor in part.tensors]
        with torch.no_grad():
            for tensor in tensors:
                attempt(tensor.path, tensor.put_back_values, values.get(id(tensor)))
            for tensor in tensors:
                attempt(tensor.path, tensor.put_back_tensor)
        for path, undo in self._last:
            attempt(path, undo)
        if failures:
            first = next(iter(failures.values()))
            what = f"{_listed(failures)} could not be put back as before the range test"
            raise RuntimeError(
                f"{what} ({type(first).__name__}: {first}); everything else is as before"
            ) from first

    def _load(self) -> None:
        if self._file is None:
            return
        with warnings.catch_warnings():
            # PyTorch 2.15 tells that it looks at sparse tensors.
            warnings.filterwarnings("ignore", "Validating sparse tensor invariants", UserWarning)
            self._values = torch.load(self._file, map_location="cpu", weights_only=True, mmap=True)

    def close(self) -> None:
        """Deletes the file, where there is one."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def untouched(self, work: Callable[[], object]) -> None:
        """Makes the backup and does the work; whatever happens, afterwards all is bit for bit as before."""
        try:
            self.write()
        except BaseException:
            self.close()
            raise

        def with_new_workers() -> None:
            for loader in self._data.loaders:
                # Workers that outlive an epoch have random numbers of their own: the test gets others.
                vars(loader)["_iterator"] = None
            work()

        undone(with_new_workers, self._undo)

    def _undo(self) -> None:
        try:
            self.restore()
        finally:
            self.close()


def _require_unchanged(unchanged: Callable[[], bool]) -> None:
    if not unchanged():
        raise ValueError(
            "it was written to, and is too large for a copy to have been made; let the data set change copies"
        )


def _listed(paths: Iterable[object]) -> str:
    """The first few of them."""
    names = list(dict.fromkeys(map(str, paths)))
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def size(count: int) -> str:
    """Bytes in words."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def undone(work: Callable[[], object], undo: Callable[[], object]) -> None:
    """Does the work and undoes it, whatever happens; a Ctrl-C then waits until that is done.

    There is no gap between the two: Ctrl-C is seen at calls only, and none comes between the end of the work
    and the line from which on it waits. A context manager would have one, as leaving it is a call.
    """
    previous = signal.getsignal(signal.SIGINT)
    raise_as_before = previous if callable(previous) else signal.default_int_handler
    # In other threads there is no Ctrl-C; and what is no function, such as SIG_IGN, raises nothing.
    main = callable(previous) and threading.current_thread() is threading.main_thread()
    waiting: list[int] | None = []  # None: it is raised at once

    def handle(number: int, frame: FrameType | None) -> None:
        if waiting is None:
            raise_as_before(number, frame)
        else:
            waiting.append(number)

    try:
        if main:
            signal.signal(signal.SIGINT, handle)
        early, waiting = waiting, None
        if early:
            signal.raise_signal(signal.SIGINT)
        work()
    finally:
        waiting = []
        try:
            undo()
        finally:
            if main:
                signal.signal(signal.SIGINT, previous)
            if waiting:
                signal.raise_signal(signal.SIGINT)


def same_random_numbers(work: Callable[[], object]) -> None:
    """Does the work; whatever happens, afterwards the global generators stand where they stood."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    undone(work, put_back)
