"""How the tests of the native code find its compiler and the flags that CMake gives it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
NATIVE = Path(__file__).parent
TESTS = NATIVE.parent  # where processes are started: the root's `fastlr` is not the one that is installed

ADDRESS_SANITIZER = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREAD_SANITIZER = ("-fsanitize=thread",)
SANITIZER_OPTIONS = {
    # Looking for leaks needs ptrace, which containers often refuse.
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1",
    "TSAN_OPTIONS": "halt_on_error=1:atexit_sleep_ms=0",
}


def run(*command: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **kwargs)


def run_or_fail(*command: object, **kwargs: object) -> str:
    """Its standard output; a failing test that shows what the command wrote where it fails."""
    done = run(*command, **kwargs)
    if done.returncode != 0:
        pytest.fail(f"{shlex.join(map(str, command))}\n{done.stdout}\n{done.stderr}", pytrace=False)
    return done.stdout


def tool(name: str) -> str:
    """The path of a program, of this environment's or the machine's; skips where there is none."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return shutil.which(name, path=path) or pytest.skip(f"needs {name}")


def need_sanitizer(compiler: str, flags: tuple[str, ...], build: Path) -> None:
    """Skips where a program that is compiled with these flags cannot be built or run."""
    probe = build / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    for command in ([compiler, *flags, probe, "-o", build / "probe"], [build / "probe"]):
        done = run(*command)
        if done.returncode != 0:
            pytest.skip(f"this compiler or machine has no {flags[0]}: {done.stderr[-300:]}")


def copy_sources(folder: Path, *, only: str = "") -> Path:
    """A copy of csrc.

    Args:
        only: the name of a rule, which takes the place of all others in the list of rules, so that no other
            kernels are compiled.
    """
    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc)
    if only:
        path = csrc / "rules.h"
        path.write_text(re.sub(r"\bX\([A-Z]\w*\)", f"X({only.capitalize()})", path.read_text()))
    return csrc


# For compile_commands(), where none of CUDA is looked at: to ask nvcc what it can takes most of configure().
ON_CPU = "-DFASTLR_CUDA=OFF"


def configure(build: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs CMake's configure step, as an isolated build would; skips where it cannot be run."""
    if importlib.util.find_spec("pybind11") is None:
        pytest.skip("needs pybind11")
    import pybind11

    return run(
        tool("cmake"),
        *("-S", ROOT, "-B", build, "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        *options,
    )


def compile_commands(build: Path, *options: str) -> dict[tuple[str, str], list[str]]:
    """Each object's command, without what it reads and writes, by target and source, from a configured
    build: ``{("kernels_x86_64_v3", "cpu/kernels.cpp"): ["/usr/bin/c++", "-O3", ...], ...}``."""
    done = configure(build, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {}
    for entry in json.loads((build / "compile_commands.json").read_text()):
        words = shlex.split(entry["command"])
        output = Path(words[words.index("-o") + 1])
        target = next(p.removesuffix(".dir") for p in output.parts if p.endswith(".dir"))
        kept = words[: words.index("-o")]
        found[target, Path(entry["file"]).relative_to(CSRC).as_posix()] = kept
    return found
