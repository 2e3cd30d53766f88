"""What is killed leaves whole files.

A training, also one that writes its checkpoint, ends as if it had not been; a written result is the old one
or the new one.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from native import toolchain

TRAIN = Path(__file__).parent / "train.py"

# Starts one training after the other: "<file> <arguments>" on stdin, answered by the process id, and by the
# exit code when it is known. The first runs in this process itself, so that everything is imported once.
SERVER = """
import os, runpy, sys
import fastlr, torch

torch.set_num_threads(1)
first = True
for line in sys.stdin:
    sys.argv = line.split()
    if first:
        runpy.run_path(sys.argv[0], run_name="__main__")
        print(os.getpid(), 0, sep="\\n", flush=True)
        first = False
        continue
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        finally:
            os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Trainings:
    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def start(self, folder: Path, kind: str, workers: int) -> int:
        folder.mkdir(exist_ok=True)
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-c", SERVER],
                cwd=toolchain.TESTS,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        print(TRAIN, folder, kind, workers, file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())

    def exit_code(self) -> int:
        return int(self._server.stdout.readline())

    def close(self) -> None:
        if self._server is None:
            return
        self._server.stdin.close()
        self._server.wait(timeout=60)
        self._server.stdout.close()


@pytest.fixture
def trainings() -> Iterator[Trainings]:
    running = Trainings()
    yield running
    running.close()


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{where}[{i}]")
    else:
        assert a == b, where


def kill_in_a_write(pid: int, path: Path, rng: random.Random, length: float) -> None:
    """While the file is being written, if it ever is."""
    skip = rng.choice((0, 1, 2, 3))  # so many are left alone
    there = False
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        was, there = there, path.exists()
        if there and not was:
            if skip == 0:
                break
            skip -= 1
        if not Path(f"/proc/{pid}/stat").exists():
            return
    time.sleep(rng.uniform(0.0, length))
    os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes by Linux's /proc")
@pytest.mark.parametrize(
    ("kind", "workers", "kills"),
    [("plan", 0, (6, 60)), ("cyclic", 0, (0, 30)), ("adamw", 0, (3, 30)), ("plan", 1, (0, 10))],
    ids=["plan", "cyclic", "adamw", "worker-process"],
)
def test_killed_at_random_moments(
    trainings: Trainings, kind: str, workers: int, kills: tuple[int, int], tmp_path: Path, soak: bool
) -> None:
    if not kills[soak]:
        pytest.skip("only with --soak")
    trainings.start(tmp_path / "whole", kind, workers)
    assert trainings.exit_code() == 0
    expected = torch.load(tmp_path / "whole" / "end.pt", weights_only=True)
    begun = time.monotonic()
    trainings.start(tmp_path / "timed", kind, workers)
    assert trainings.exit_code() == 0
    duration = time.monotonic() - begun
    assert_equal(torch.load(tmp_path / "timed" / "end.pt", weights_only=True), expected)

    rng = random.Random(0)
    made = in_write = resumed = runs = finished = 0
    while made < kills[soak]:
        folder = tmp_path / f"run-{finished}"
        new = folder / "checkpoint.pt.new"
        resumed += (folder / "checkpoint.pt").exists()
        pid = trainings.start(folder, kind, workers)
        runs += 1
        if rng.random() < 0.5:
            kill_in_a_write(pid, new, rng, length=0.002)
        else:
            time.sleep(rng.uniform(0.0, duration))
            with contextlib.suppress(ProcessLookupError):  # it is through
                os.kill(pid, signal.SIGKILL)
        code = trainings.exit_code()
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            assert_equal(torch.load(folder / "end.pt", weights_only=True), expected, f"run {runs}")
            finished += 1
            continue
        made += 1
        if new.exists():
            in_write += 1
            new.unlink()
        if (folder / "checkpoint.pt").exists():
            torch.load(folder / "checkpoint.pt", weights_only=True)  # whole
    trainings.start(folder, kind, workers)
    assert trainings.exit_code() == 0
    assert_equal(torch.load(folder / "end.pt", weights_only=True), expected)
    print(
        f"{kind}, {workers} workers: {made} kills, {in_write} of them inside a write, {resumed} starts from "
        f"a checkpoint, {finished + 1} trainings ended, all as the uninterrupted one"
    )
    assert resumed
    assert in_write or not soak


# Writes the second file over the first in a child that kills itself at a chosen place of the call, and prints
# what is neither the one nor the other, or lies beside it and does not say that it is half.
WRITER = """
import os, signal, sys
from pathlib import Path
import numpy as np
import torch, fastlr
from fastlr import _files
from soak.interrupts import chosen, interrupted, places

torch.set_num_threads(1)
path, kind, there, most = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "there", int(sys.argv[4])
lrs = np.geomspace(1e-5, 1.0, 200)
results = [fastlr.RangeTestResult(lrs, np.full(200, level)) for level in (1.0, 2.0)]
grids = [fastlr.RangeTestGrid(({"momentum": level},), (results[0],)) for level in (0.5, 0.9)]
old, new = {
    "text": [lambda text=text: _files.write_text(path, text * 50_000) for text in ("old", "new")],
    "json": [lambda result=result: result.to_json(path) for result in results],
    "csv": [lambda result=result: result.to_csv(path) for result in results],
    "grid": [lambda grid=grid: grid.to_csv(path) for grid in grids],
}[kind]
whole = []
for write in (old, new):
    write()
    whole.append(path.read_bytes())
assert whole[0] != whole[1]
allowed = [whole[0] if there else None, whole[1]]


def prepare():
    path.unlink(missing_ok=True)
    if there:
        path.write_bytes(whole[0])


prepare()
count = places(new)
found = set()
for place in sorted({0, *chosen(count, most, seed=0), *range(max(count - 60, 0), count)}):
    prepare()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        interrupted(new, place)
        os._exit(0)  # it has fewer places now
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) in (0, -signal.SIGKILL), place
    content = path.read_bytes() if path.exists() else None
    beside = [file for file in path.parent.iterdir() if file != path]
    if content not in allowed or not all(file.name.startswith(".fastlr-") for file in beside):
        size = None if content is None else len(content)
        print(f"killed at place {place} of {count}: {size} bytes, beside it {beside}")
    found.add((allowed.index(content) if content in allowed else -1, bool(beside)))
    for file in beside:
        file.unlink()
assert found >= {(0, False), (0, True), (1, False)}, found  # before, inside and after the write
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="makes a process for each kill")
@pytest.mark.parametrize("there", ["new", "there"])
@pytest.mark.parametrize("kind", ["text", "json", "csv", "grid"])
def test_killed_at_places_of_a_write(kind: str, there: str, tmp_path: Path, soak: bool) -> None:
    """The file is the old one or the new one, whichever call the kill comes with."""
    if not soak and (kind, there) not in (("text", "new"), ("text", "there"), ("json", "there")):
        pytest.skip("only with --soak")
    command = [sys.executable, "-c", WRITER, str(tmp_path / "result"), kind, there, str(400 if soak else 30)]
    done = subprocess.run(command, cwd=toolchain.TESTS, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
