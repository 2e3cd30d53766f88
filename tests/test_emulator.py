"""The emulated CUDA of ``cuda_on_cpu``: small kernels of known results, with and without sanitizers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from native import toolchain

EMULATOR = Path(__file__).parent / "cuda_on_cpu"
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREAD = ("-fsanitize=thread",)


def build(folder: Path, *flags: str) -> Path:
    """The self-test; ``flags`` are for all of it, but the emulation itself is never built for
    ThreadSanitizer."""
    compiler = toolchain.tool("c++")
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    for command in ([compiler, *flags, probe, "-o", folder / "probe"], [folder / "probe"]):
        done = toolchain.run(*command)
        if done.returncode != 0:
            pytest.skip(f"this compiler or machine has no {' '.join(flags)}: {done.stderr[-300:]}")
    own = [flag for flag in flags if flag not in THREAD]
    common = ("-std=c++17", "-O1", "-g1", *WARNINGS, f"-I{EMULATOR}", "-c")
    for name, chosen in (("emulator", own), ("self_test", flags)):
        toolchain.run_or_fail(
            compiler, *common, *chosen, EMULATOR / f"{name}.cpp", "-o", folder / f"{name}.o"
        )
    objects = (folder / "emulator.o", folder / "self_test.o")
    toolchain.run_or_fail(compiler, *flags, *objects, "-pthread", "-o", folder / "self_test")
    return folder / "self_test"


@pytest.fixture(scope="module")
def thread_self_test(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("thread"), *THREAD)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((), id="plain"),
        pytest.param(("-DFASTLR_EMULATOR_UCONTEXT",), id="ucontext"),
        pytest.param(ADDRESS, id="address-and-undefined"),
    ],
)
def test_self_test(tmp_path: Path, flags: tuple[str, ...]):
    # Looking for leaks needs ptrace, which containers often refuse.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1"}
    assert toolchain.run_or_fail(build(tmp_path, *flags), env=environment, timeout=120) == "ok\n"


def test_thread_sanitizer_finds_no_race_where_there_is_none(thread_self_test: Path):
    assert toolchain.run_or_fail(thread_self_test, timeout=300) == "ok\n"


@pytest.mark.parametrize(
    ("race", "kernel"),
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
def test_thread_sanitizer_finds_planted_races(thread_self_test: Path, race: str, kernel: str):
    done = toolchain.run(thread_self_test, "race", race, timeout=60)
    assert done.returncode == 66, done.stderr  # ThreadSanitizer's own
    assert "ThreadSanitizer: data race" in done.stderr
    assert kernel in done.stderr
    assert "block (0,0,0) thread (" in done.stderr


def test_nvcc_accepts_the_self_test(tmp_path: Path):
    nvcc = toolchain.tool("nvcc")
    options = ("-std=c++17", "-x", "cu", "-Werror", "all-warnings")
    # Where its own cuda_runtime.h is the one that is found.
    toolchain.run_or_fail(nvcc, *options, "-c", EMULATOR / "self_test.cpp", "-o", "a.o", cwd=tmp_path)
