"""Running something on a model and an optimizer that leaves no trace."""

from __future__ import annotations

import copy
import os
import random
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fastlr.optim import FusedOptimizer

Undo: TypeAlias = Callable[[], object]
Backup: TypeAlias = Literal["device", "host", "file"] | os.PathLike[str]

# Modules of these packages keep attributes that belong together with state in C++ or on other ranks, such as
# whether they have been set up; those are left alone.
_WRAPPERS = ("torch.distributed.", "torch.nn.parallel.", "torch._dynamo.", "torch.jit.")


def all_parameters(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The model's parameters and the optimizer's, each once."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    return list({id(p): p for p in (*model.parameters(), *held)}.values())


class Snapshot:
    """What a model, an optimizer and a GradScaler hold, to be put back as often as need be.

    Every container is put back with what it contained, and every tensor with its values: the objects are
    those of before, and so are their bits.

    Args:
        model, optimizer, scaler: whose state to keep; no scaler: None.
        backup: where the values of tensors go: ``"device"``: each to its own device; ``"host"``; ``"file"``:
            one in the folder for temporary files; a path: that file. It is written at once and deleted by
            :meth:`close`.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, scaler: object, backup: Backup
    ) -> None:
        self._undo: list[Undo] = []
        self._seen: set[int] = set()
        self._tensors: list[torch.Tensor] = []
        self._values: list[torch.Tensor] | None = None
        self._backup = backup
        self._file: Path | None = None
        if isinstance(optimizer, FusedOptimizer):
            # First, and so put back last: what the optimizer has told its devices follows the rest.
            self._undo.append(optimizer.keep_devices())
        for module in model.modules():
            self._keep_module(module)
        self._keep_object(optimizer)
        if scaler is not None:
            self._keep_object(scaler)
        for p in all_parameters(model, optimizer):
            self._keep_gradient(p)

    @property
    def bytes(self) -> int:
        """What the backup takes."""
        return sum(t.numel() * t.element_size() for t in self._tensors)

    def write(self) -> None:
        """Makes the backup.

        Raises:
            OSError: the file exists already, or its disk has too little room.
            MemoryError: the device has.
        """
        if self._backup == "device":
            try:
                self._values = [t.detach().clone() for t in self._tensors]
            except torch.OutOfMemoryError as error:
                raise MemoryError(
                    f"no room for a backup of {size(self.bytes)} on the device; pass backup='host' or 'file'"
                ) from error
        elif self._backup == "host":
            self._values = [t.detach().to("cpu", copy=True) for t in self._tensors]
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
        torch.save([t.detach() for t in self._tensors], self._file)

    def rewind(self) -> None:
        """Puts everything back."""
        for undo in reversed(self._undo):
            undo()
        values = self._values
        if values is None:
            assert self._file is not None
            values = torch.load(self._file, map_location="cpu", weights_only=True, mmap=True)
        with torch.no_grad():
            for tensor, value in zip(self._tensors, values, strict=True):
                tensor.copy_(value)

    def close(self) -> None:
        """Deletes the file, where there is one."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _keep_module(self, module: torch.nn.Module) -> None:
        for name in ("_parameters", "_buffers", "_modules"):
            self._keep(getattr(module, name))
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            self._keep(tensor)  # a scripted module's stand in no dict
        if not type(module).__module__.startswith(_WRAPPERS):
            self._keep(vars(module))
        training = module.training

        def undo() -> None:
            module.training = training

        self._undo.append(undo)

    def _keep_object(self, thing: object) -> None:
        self._keep(vars(thing))

    def _keep_gradient(self, p: torch.Tensor) -> None:
        gradient = p.grad
        if gradient is not None:
            self._keep(gradient)

        def undo() -> None:
            p.grad = gradient

        self._undo.append(undo)

    def _keep(self, thing: object) -> None:
        """Remembers the contents of a container or tensor, and those of what it contains."""
        if id(thing) in self._seen:
            return
        if isinstance(thing, torch.Tensor):
            self._seen.add(id(thing))
            # Nothing can write to an expanded tensor in place, so putting it back is enough.
            if all(stride > 0 or n < 2 for n, stride in zip(thing.shape, thing.stride(), strict=True)):
                self._tensors.append(thing)
        elif isinstance(thing, (dict, list)):
            self._seen.add(id(thing))
            self._undo.append(_keep_container(thing))
            for value in thing.values() if isinstance(thing, dict) else thing:
                self._keep(value)
        elif isinstance(thing, tuple):
            for value in thing:
                self._keep(value)
        elif isinstance(thing, np.ndarray):
            self._seen.add(id(thing))
            self._undo.append(_keep_array(thing))
        elif isinstance(thing, torch.optim.Optimizer):  # one that is wrapped by another
            self._keep_object(thing)


def _keep_container(container: dict[Any, Any] | list[Any]) -> Undo:
    if isinstance(container, dict):
        contents = dict(container)

        def undo() -> None:
            container.clear()
            container.update(contents)

        return undo
    values = list(container)

    def undo_list() -> None:
        container[:] = values

    return undo_list


def _keep_array(array: np.ndarray[Any, Any]) -> Undo:
    values = array.copy()
    return lambda: np.copyto(array, values) if array.flags.writeable else None


def size(count: int) -> str:
    """Bytes in words."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


@contextmanager
def untouched(snapshot: Snapshot, loaders: Iterable[object]) -> Iterator[None]:
    """Whatever happens inside, afterwards the snapshot's objects and the loaders are bit for bit as before.

    The backup is made on entering.
    """
    with ExitStack() as undo:
        undo.callback(snapshot.close)
        snapshot.write()
        kept = ExitStack()
        undo.callback(_in_one_go, kept.close)
        kept.callback(snapshot.rewind)
        seen: set[int] = set()
        for loader in loaders:
            _keep_loader(loader, kept, seen)
        yield


def _in_one_go(work: Callable[[], object]) -> None:
    """Does the work; a Ctrl-C in the middle of it waits until it is done."""
    previous = signal.getsignal(signal.SIGINT)
    if previous is None or threading.current_thread() is not threading.main_thread():
        work()
        return
    interrupts: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    try:
        work()
    finally:
        signal.signal(signal.SIGINT, previous)
        if interrupts:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Whatever happens inside, afterwards the global generators stand where they stood."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]

    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def _keep_loader(thing: object, kept: ExitStack, seen: set[int]) -> None:
    """Remembers a loader's attributes and generators, and those of its samplers and data sets.

    Containers too, as samplers shuffle lists in place; but not those of data sets, which are the data.
    """
    attributes = getattr(thing, "__dict__", None)
    if attributes is None or id(thing) in seen:
        return
    seen.add(id(thing))
    kept.callback(_keep_container(attributes))
    for value in list(attributes.values()):
        parts = value if isinstance(value, (list, tuple)) else [value]
        if isinstance(value, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
            kept.callback(_keep_generator(value))
        elif parts and isinstance(parts[0], (DataLoader, Sampler, Dataset)):
            for part in parts:
                _keep_loader(part, kept, seen)
        elif not isinstance(thing, Dataset):
            if isinstance(value, (dict, list)):
                kept.callback(_keep_container(value))
            elif isinstance(value, np.ndarray):
                kept.callback(_keep_array(value))
    if isinstance(thing, DataLoader):
        # Workers that outlive an epoch have random numbers of their own: the test gets others.
        attributes["_iterator"] = None


def _keep_generator(
    generator: torch.Generator | np.random.Generator | np.random.RandomState | random.Random,
) -> Undo:
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        return lambda: generator.set_state(state)
    if isinstance(generator, np.random.Generator):
        bits, words = generator.bit_generator, copy.deepcopy(generator.bit_generator.state)
        return lambda: setattr(bits, "state", words)
    if isinstance(generator, np.random.RandomState):
        legacy = generator.get_state()
        return lambda: generator.set_state(legacy)
    numbers = generator.getstate()
    return lambda: generator.setstate(numbers)
