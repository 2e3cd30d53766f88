"""The native code without Python around it, under sanitizers."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from native import toolchain

LEVELS = ("baseline", "x86-64-v2", "x86-64-v3", "x86-64-v4")
MEMORY = ("-fsanitize=address",)
ADDRESS = (*toolchain.ADDRESS_SANITIZER, "-fsanitize=float-cast-overflow")


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[str]]:
    return toolchain.compile_commands(tmp_path_factory.mktemp("cmake"), toolchain.ON_CPU)


def build_driver(
    build: Path, commands: dict[tuple[str, str], list[str]], sanitizer: tuple[str, ...], *, whole: bool
) -> Path:
    """Compiles the CPU code with its own flags plus a sanitizer's.

    Args:
        whole: with every SIMD level, and the driver's own code under the sanitizer too.
    """
    compiler = commands["_core", "cpu/step_cpu.cpp"][0]
    toolchain.need_sanitizer(compiler, sanitizer, build)

    def compile_one(item: tuple[str, list[str], Path]) -> Path:
        name, command, source = item
        flags = [flag for flag in command if not flag.startswith(("-flto", "-fno-fat-lto"))]
        toolchain.run_or_fail(
            *flags, "-std=c++17", "-g1", f"-I{toolchain.CSRC}", "-c", source, "-o", build / f"{name}.o"
        )
        return build / f"{name}.o"

    # -O1: the driver's own loops need no speed, and its many templates compile faster.
    plain = [compiler, "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    items = [("driver", [*plain, *(sanitizer if whole else ())], toolchain.NATIVE / "driver.cpp")]
    for (target, source), command in commands.items():
        kept = source.startswith("cpu/") and (whole or target in ("_core", "kernels_baseline"))
        if kept or source == "rules.cpp":
            levels = () if whole else ("-UFASTLR_X86_LEVELS",)
            # What is undefined is so at all levels: half of them compile faster without looking for it.
            own = MEMORY if target in ("kernels_x86_64_v2", "kernels_x86_64_v3") else sanitizer
            name = f"{target}-{Path(source).stem}"
            items.append((name, [*command, *own, *levels], toolchain.CSRC / source))
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, items))
    # --no-as-needed: step_cpu.cpp refers to OpenMP weakly, which alone does not keep the library.
    toolchain.run_or_fail(
        compiler, *sanitizer, "-Wl,--no-as-needed", "-fopenmp", *objects, "-ldl", "-o", build / "driver"
    )
    return build / "driver"


@pytest.fixture(scope="module")
def address_driver(commands, tmp_path_factory) -> Path:
    return build_driver(tmp_path_factory.mktemp("address"), commands, ADDRESS, whole=True)


@pytest.fixture(scope="module")
def thread_driver(commands, tmp_path_factory) -> Path:
    # What the threads share, and how their shares meet, does not depend on the level; the driver's own
    # loops run in one thread and would be slow.
    return build_driver(tmp_path_factory.mktemp("thread"), commands, toolchain.THREAD_SANITIZER, whole=False)


def check(driver: Path, level: str, threads: str) -> None:
    if level not in toolchain.run_or_fail(driver, "--levels").split():
        pytest.skip(f"this build or machine has no {level}")
    options = {**toolchain.SANITIZER_OPTIONS, "OMP_WAIT_POLICY": "passive"}
    output = toolchain.run_or_fail(driver, level, threads, env={**os.environ, **options}, timeout=300)
    assert output == "ok\n"


@pytest.mark.parametrize("level", LEVELS)
def test_address_and_undefined_behaviour_sanitizers(address_driver: Path, level: str):
    check(address_driver, level, "openmp")


def test_thread_sanitizer(thread_driver: Path):
    check(thread_driver, "baseline", "std")
