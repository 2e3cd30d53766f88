"""The CUDA launcher and kernels, emulated on the host by a program without Python: under sanitizers, and
with planted faults, each of which must be noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
from cuda_on_cpu import drivers, faults
from native import toolchain


def first_of_each_kind() -> list[str]:
    """Of the faults that are noticed by the same in the same build."""
    found = {(fault.build, fault.noticed): name for name, fault in reversed(faults.FAULTS.items())}
    return list(found.values())


FIRST = first_of_each_kind()


@pytest.mark.parametrize("kind", drivers.PROGRAMS)
def test_driver(tmp_path: Path, kind: str):
    done = drivers.run(drivers.link(kind, tmp_path / "driver"))
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stdout + done.stderr


@pytest.mark.parametrize(
    "fault",
    [pytest.param(name, marks=() if name in FIRST else pytest.mark.repetition) for name in faults.FAULTS],
)
def test_fault_is_noticed(tmp_path: Path, fault: str):
    done = faults.run_faulty(fault, tmp_path / "build")
    assert faults.noticed_by(done) == faults.FAULTS[fault].noticed, done.stdout + done.stderr


def test_every_fault_can_be_planted(tmp_path: Path):
    """Those that are repetitions too, so that whoever changes the code hears of it at once."""
    for k, fault in enumerate(faults.FAULTS.values()):
        faults.plant(fault, tmp_path / str(k))


@pytest.mark.parametrize("old", ["no such text", "__syncthreads();"], ids=["absent", "not-unique"])
def test_a_fault_must_match_once(tmp_path: Path, old: str):
    fault = faults.Fault(faults.KERNELS, old, "", "plain", "race")
    with pytest.raises(ValueError, match="times, not once"):
        faults.plant(fault, tmp_path)
    assert "__syncthreads" in (toolchain.CSRC / faults.KERNELS).read_text()  # a copy is changed
