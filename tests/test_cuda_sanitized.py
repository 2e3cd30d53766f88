"""The CUDA launcher and kernels, emulated on the host by a program without Python: under sanitizers, and
with planted faults, each of which must be noticed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from cuda_on_cpu import drivers, faults
from native import toolchain


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def made(pool: ThreadPoolExecutor, tmp_path_factory: pytest.TempPathFactory) -> drivers.Drivers:
    return drivers.Drivers(tmp_path_factory.mktemp("drivers"), pool)


@pytest.fixture(scope="module")
def running(
    request: pytest.FixtureRequest,
    pool: ThreadPoolExecutor,
    made: drivers.Drivers,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[str, str], Future[subprocess.CompletedProcess[str]]]:
    """What this module's tests look at, by function and parameter: built and run two at a time."""
    started = {}
    for item in request.session.items:
        if item.path != Path(__file__) or "running" not in item.fixturenames:
            continue
        (name,) = item.callspec.params.values()
        if item.originalname == "test_driver":
            future = pool.submit(lambda kind: drivers.run(made.unchanged(kind)), name)
        else:
            folder = tmp_path_factory.mktemp("fault") / "build"
            future = pool.submit(faults.run_faulty, name, made, folder)
        started[item.originalname, name] = future
    return started


@pytest.mark.parametrize("kind", drivers.PROGRAMS)
def test_driver(running, kind: str):
    done = running["test_driver", kind].result()
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stdout + done.stderr


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_fault_is_noticed(running, fault: str):
    done = running["test_fault_is_noticed", fault].result()
    assert faults.noticed_by(done) == faults.FAULTS[fault].noticed, done.stdout + done.stderr


@pytest.mark.parametrize("old", ["no such text", "__syncthreads();"], ids=["absent", "not-unique"])
def test_a_fault_must_match_once(tmp_path: Path, old: str):
    fault = faults.Fault(faults.KERNELS, old, "", "plain", "race")
    with pytest.raises(ValueError, match="times, not once"):
        faults.plant(fault, tmp_path)
    assert "__syncthreads" in (toolchain.CSRC / faults.KERNELS).read_text()  # a copy is changed
