"""A disk that is full while results and checkpoints are written: the old file stays whole."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from native import toolchain

# Files of at most so many bytes stand for the full disk: writing on raises, as SIGXFSZ is ignored.
PROGRAM = """
import os, resource, signal, sys
import numpy as np
import torch, fastlr

path, limit = sys.argv[1], int(sys.argv[3])
torch.set_num_threads(1)
lrs = np.geomspace(1e-5, 1.0, 3000)
small, large = (fastlr.RangeTestResult(lrs[:n], np.linspace(2.0, 1.0, n)) for n in (40, 3000))
model = torch.nn.Linear(100, 100)
optimizer = fastlr.FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
model(torch.ones(1, 100)).sum().backward()
optimizer.step()


def checkpoint():
    # As in docs/growing.md.
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{path}.new")
    os.replace(f"{path}.new", path)


write = {
    "json": lambda result: result.to_json(path),
    "csv": lambda result: result.to_csv(path),
    "png": lambda result: result.plot(path),
    "svg": lambda result: result.plot(path),
    "checkpoint": lambda _: checkpoint(),
}[sys.argv[2]]
write(small)
before = open(path, "rb").read()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    write(large)
except (OSError, RuntimeError) as error:
    print(type(error).__name__, error)
else:
    print("written")
assert open(path, "rb").read() == before
left = sorted(os.listdir(os.path.dirname(path)))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
write(large)
assert open(path, "rb").read() != before or sys.argv[2] == "checkpoint"
print(*left)
"""

with_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="pictures need matplotlib"
)
# What is written, at how many bytes the disk is full, what the error says.
CASES = {
    "json": ("json", 20_000, "File too large"),
    "csv": ("csv", 8192, "File too large"),
    "png": pytest.param("png", 4096, "File too large", marks=with_matplotlib),
    "svg": pytest.param("svg", 10_000, "File too large", marks=with_matplotlib),
    "checkpoint": ("checkpoint", 50_000, ""),  # PyTorch's own words
    "checkpoint, at its end": ("checkpoint", 83_000, ""),
}


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
@pytest.mark.parametrize(("what", "limit", "says"), CASES.values(), ids=CASES.keys())
def test_the_old_file_stays_whole(what: str, limit: int, says: str, tmp_path: Path, soak: bool) -> None:
    if not soak and (what, limit) not in (("json", 20_000), ("checkpoint", 50_000)):
        pytest.skip("only with --soak")
    path = tmp_path / f"result.{what}"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), what, str(limit)],
        cwd=toolchain.TESTS,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    error, left = done.stdout.splitlines()[0], done.stdout.splitlines()[-1]
    assert error.startswith("RuntimeError" if what == "checkpoint" else "OSError"), done.stdout
    assert says in error
    # PyTorch's half file is beside the checkpoint; the next one replaces it.
    assert left.split() == [path.name, f"{path.name}.new"][: 1 + (what == "checkpoint")]
