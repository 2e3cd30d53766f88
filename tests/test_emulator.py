"""The emulated CUDA of ``cuda_on_cpu``: small kernels of known results, with and without sanitizers."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from native import toolchain

EMULATOR = Path(__file__).parent / "cuda_on_cpu"
COMMON = ("-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{EMULATOR}")
ADDRESS = toolchain.ADDRESS_SANITIZER
THREAD = toolchain.THREAD_SANITIZER

# Each object's source and flags. Under the address sanitizer -O0, which compiles twice as fast.
OBJECTS = {
    "emulator": ("emulator.cpp", "-O1", "-g1"),
    "emulator_ucontext": ("emulator.cpp", "-O1", "-DFASTLR_EMULATOR_UCONTEXT"),
    "emulator_address": ("emulator.cpp", "-O0", *ADDRESS),
    "self_test": ("self_test.cpp", "-O1"),
    "self_test_address": ("self_test.cpp", "-O0", *ADDRESS),
    "self_test_thread": ("self_test.cpp", "-O1", "-g1", *THREAD),
}

# What each build is linked from, and its sanitizer. The emulation itself is never compiled for
# ThreadSanitizer.
BUILDS = {
    "plain": (("emulator", "self_test"), ()),
    "ucontext": (("emulator_ucontext", "self_test"), ()),
    "address-and-undefined": (("emulator_address", "self_test_address"), ADDRESS),
    "thread": (("emulator", "self_test_thread"), THREAD),
}

ENVIRONMENT = {**os.environ, **toolchain.SANITIZER_OPTIONS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the objects lie."""
    folder = tmp_path_factory.mktemp("emulator")
    compiler = toolchain.tool("c++")

    def compile_one(name: str) -> None:
        source, *flags = OBJECTS[name]
        target = folder / f"{name}.o"
        toolchain.run_or_fail(compiler, *COMMON, *flags, "-c", EMULATOR / source, "-o", target)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, OBJECTS))
    return folder


def self_test(folder: Path, name: str) -> Path:
    """The program of a build; skips where there is no such sanitizer."""
    program = folder / name
    if program.exists():
        return program
    compiler = toolchain.tool("c++")
    objects, sanitizer = BUILDS[name]
    toolchain.need_sanitizer(compiler, sanitizer, folder)
    files = [folder / f"{part}.o" for part in objects]
    toolchain.run_or_fail(compiler, *sanitizer, *files, "-pthread", "-o", program)
    return program


@pytest.mark.parametrize("name", BUILDS)
def test_self_test(folder: Path, name: str):
    output = toolchain.run_or_fail(self_test(folder, name), env=ENVIRONMENT, timeout=300)
    assert output == "ok\n"


@pytest.mark.parametrize(
    ("fault", "kernel"),
    [
        ("counter", "count_plainly"),
        ("counter-of-blocks", "count_plainly"),
        ("barrier", "read_without_barrier"),
        ("warp-barrier", "read_without_warp_barrier"),
        ("second-barrier", "reuse_without_barrier"),
        ("no-fence-before", "publish"),
        ("no-fence-after", "publish"),
        ("fence-too-early", "publish_after_fence"),
    ],
)
def test_thread_sanitizer_finds_planted_races(folder: Path, fault: str, kernel: str):
    done = toolchain.run(self_test(folder, "thread"), "fault", fault, env=ENVIRONMENT, timeout=60)
    assert done.returncode == 66, done.stderr  # ThreadSanitizer's own
    assert "ThreadSanitizer: data race" in done.stderr
    assert kernel in done.stderr
    assert re.search(r"'block \(\d,0,0\) thread \(\d+,0,0\)'", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("fault", "report"),
    [("past-shared", "heap-buffer-overflow"), ("misaligned-vector", "misaligned address")],
)
def test_address_and_undefined_sanitizers_find_planted_faults(folder: Path, fault: str, report: str):
    program = self_test(folder, "address-and-undefined")
    done = toolchain.run(program, "fault", fault, env=ENVIRONMENT, timeout=60)
    assert done.returncode == 1, done.stderr
    assert report in done.stderr


def test_nvcc_accepts_the_self_test(tmp_path: Path):
    nvcc = toolchain.tool("nvcc")
    options = ("-std=c++17", "-x", "cu", "-Werror", "all-warnings", "-ptx")
    # Where its own cuda_runtime.h is the one that is found.
    toolchain.run_or_fail(nvcc, *options, EMULATOR / "self_test.cpp", "-o", "a.ptx", cwd=tmp_path)
