"""Fixtures shared by all tests, and the backends that the optimizers' tests run on."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_on_cpu import build as cuda_on_cpu
from cuda_on_cpu.recording import Streams
from native import toolchain

from fastlr import _core

# What the emulated CUDA runs in another order each time: threads, blocks, how many are resident.
SEEDS = (0, 1, 2)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        action="append",
        choices=["cpu", "cuda", "cuda-on-cpu"],
        help="what the optimizers' tests run on, may be repeated; default: all that there are. cpu; cuda, a "
        "device of this machine; cuda-on-cpu, the CUDA sources built for the host",
    )
    parser.addoption("--soak", action="store_true", help="the long form of tests/soak")


@pytest.fixture
def soak(request: pytest.FixtureRequest) -> bool:
    """Whether a test may take its time."""
    return bool(request.config.getoption("--soak"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    chosen = metafunc.config.getoption("--backend") or ["cpu", "cuda", "cuda-on-cpu"]
    backends = []
    for name in chosen:
        if name == "cuda-on-cpu":
            backends += [f"cuda-on-cpu-{seed}" for seed in SEEDS]
        elif name == "cpu" or torch.cuda.is_available():
            backends.append(name)
        elif metafunc.config.getoption("--backend"):
            raise pytest.UsageError("--backend cuda: PyTorch finds no CUDA device here")
    metafunc.parametrize("backend", backends, indirect=True)


def parameters_of(item: pytest.Item) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})


def is_pointless(item: pytest.Item) -> bool:
    """CUDA does not use the CPU's threads, and for a run drawn at random one of the emulator's orders is
    enough."""
    parameters = parameters_of(item)
    backend = parameters.get("backend", "cpu")
    if backend.startswith("cuda-on-cpu") and "seed" in parameters:
        return parameters["seed"] % len(SEEDS) != int(backend[-1])
    return parameters.get("threads", 1) > 1 and backend != "cpu"


def needs_what_was_not_asked_for(item: pytest.Item) -> bool:
    """On a machine with a GPU the emulated CUDA, which compiles for minutes, shows nothing."""
    chosen = item.config.getoption("--backend")
    return chosen == ["cuda"] and "emulated" in getattr(item, "fixturenames", ())


def repeats_with_another_seed(item: pytest.Item) -> bool:
    """Each test on the emulated CUDA has one order that counts, drawn by its name, so that all are in use."""
    parameters = parameters_of(item)
    backend = parameters.get("backend", "cpu")
    if not backend.startswith("cuda-on-cpu") or "seed" in parameters:
        return False
    name = item.nodeid.replace(backend, "", 1).encode()
    return backend != f"cuda-on-cpu-{SEEDS[zlib.crc32(name) % len(SEEDS)]}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = {item for item in items if is_pointless(item) or needs_what_was_not_asked_for(item)}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]
    for item in items:
        if repeats_with_another_seed(item):
            item.add_marker(pytest.mark.repetition)
    if is_worker(config):
        items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What has been collected stays to the end: a million objects, through which every search for garbage
    would go, also those that tests and frameworks ask for."""
    gc.collect()
    gc.freeze()


# -- several processes (pytest-xdist) ------------------------------------------------------------

# Workers begin with these files, and so end at about the same time.
LONG = ("test_cuda_static.py", "test_native.py", "test_on_gpu.py", "test_wheel.py", "test_cuda_sanitized.py")
# With `--dist loadfile` a file is one process's, which makes the fixtures of a module once, but for these.
ONE_BY_ONE = ("test_cuda_sanitized.py",)


def is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    if not is_worker(config):
        # For processes that begin from now on: a thread that spins while it waits takes the core from the one
        # that it waits for, as soon as there are more of them than cores.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        return
    # The cores are shared; two at the least, or nothing would be split between threads.
    torch.set_num_threads(max(2, torch.get_num_threads() // config.workerinput["workercount"]))
    # Workers begin without Ctrl-C, which tests raise, and so would the processes that they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What `--dist loadfile` means here: files in the order of collection, and some of them in pieces."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return nodeid if file.endswith(ONE_BY_ONE) else file

    config.option.loadscopereorder = False
    return ByFile(config, log)


# -- fixtures ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    """The native step with the CUDA sources, emulated on the host."""
    library = os.environ.get(cuda_on_cpu.LIBRARY)
    return cuda_on_cpu.load_extension(
        Path(library) if library else cuda_on_cpu.build_extension(cuda_on_cpu.CACHE)
    )


@pytest.fixture(scope="module")
def load_claims() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of benchmarks/claims/."""
    for package in ("matplotlib", "scipy", "sklearn"):
        pytest.importorskip(package, reason=f"the claims need {package}")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(toolchain.ROOT)
        yield lambda name: importlib.import_module(f"benchmarks.claims.{name}")


@pytest.fixture
def on_emulated_cuda(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Optimizers that are built now update tensors in host memory by the CUDA launcher and kernels."""
    monkeypatch.setattr(_core, "Plan", emulated.Plan)
    monkeypatch.setattr(_core, "SquaredNorm", emulated.SquaredNorm)
    emulated.set_seed(0)
    emulated.route_host_to_cuda(1)
    yield emulated
    emulated.route_host_to_cuda(0)
    emulated.set_device_count(1)
    emulated.limit_launch_capacity(0)
    failure = emulated.last_failure()
    emulated.reset_failure()
    assert failure == ""


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    """The streams that optimizers built now run on."""
    made = Streams()
    monkeypatch.setattr("fastlr.optim._base.Runtime", lambda: made)
    return made


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """What updates parameters in this test: "cpu", "cuda" (then it is the default device) or
    "cuda-on-cpu-<seed>"."""
    if request.param.startswith("cuda-on-cpu"):
        request.getfixturevalue("on_emulated_cuda").set_seed(int(request.param[-1]))
    if request.param == "cpu" and cuda_on_cpu.LIBRARY in os.environ:  # a fault is planted into its CPU loops
        emulated = request.getfixturevalue("emulated")
        request.getfixturevalue("monkeypatch").setattr(_core, "Plan", emulated.Plan)
    if request.param == "cuda":
        torch.set_default_device("cuda")
    yield request.param
    if request.param == "cuda":
        torch.set_default_device(None)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Every test begins with the same seed and leaves PyTorch's global settings as it found them."""
    threads = torch.get_num_threads()
    # For CUDA and other devices, not in use yet, torch.manual_seed() would keep a picture of the stack each.
    torch.manual_seed(0) if torch.cuda.is_initialized() else torch.default_generator.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> int:
    torch.set_num_threads(request.param)
    return request.param


# -- Hugging Face --------------------------------------------------------------------------------


@pytest.fixture
def _accelerate_state() -> Iterator[None]:
    """accelerate keeps its settings in global objects, which a later test must not inherit."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield
    AcceleratorState._reset_state()
    PartialState._reset_state()
    GradientState._reset_state()
