"""Builds and runs kernels_driver.cpp with the launcher and its kernels, under sanitizers and without."""

from __future__ import annotations

import os
import subprocess
import tempfile
from functools import cache, partial
from pathlib import Path

from native import toolchain

from . import build

SANITIZERS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "address": toolchain.ADDRESS_SANITIZER,
    "thread": toolchain.THREAD_SANITIZER,
}

# Each object's source and flags. The kernels are what sanitizers watch; the emulation is never compiled
# for ThreadSanitizer, and the driver's own loops would be slow under the other.
KERNELS = "launcher.cpp"
LAUNCHES = "cuda/launches.cpp"
RULES = "rules.cpp"
OBJECTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "driver": ("kernels_driver.cpp", ("-O1",)),
    "driver-thread": ("kernels_driver.cpp", ("-O1", *SANITIZERS["thread"])),
    "emulator": ("emulator.cpp", ("-O1",)),
    "kernels": (KERNELS, ("-O0",)),
    "kernels-thread": (KERNELS, ("-O1", *SANITIZERS["thread"])),
    "kernels-address": (KERNELS, ("-O0", *SANITIZERS["address"])),
    "launches": (LAUNCHES, ("-O0",)),
    "rules": (RULES, ("-O0",)),
    "launches-address": (LAUNCHES, ("-O0", *SANITIZERS["address"])),
}
PROGRAMS = {
    "plain": ("driver", "emulator", "kernels", "launches", "rules"),
    "address": ("driver", "emulator", "kernels-address", "launches-address", "rules"),
    "thread": ("driver-thread", "emulator", "kernels-thread", "launches", "rules"),
}


def compile_object(name: str, csrc: Path, output: Path) -> Path:
    """Compiles one of OBJECTS, with the project's sources from `csrc`."""
    source, flags = OBJECTS[name]
    path = csrc / source if source in (LAUNCHES, RULES) else build.HERE / source
    includes = (f"-I{build.HERE}", f"-I{csrc}", f"-I{toolchain.NATIVE.parent}", f"-I{toolchain.NATIVE}")
    command = (build.compiler(), *build.LANGUAGE_FLAGS, *flags, *includes, "-x", "c++", "-c", path)
    toolchain.run_or_fail(*command, "-o", output)
    return output


@cache
def need_sanitizer(kind: str) -> None:
    """Skips where there is no such one."""
    with tempfile.TemporaryDirectory() as folder:
        toolchain.need_sanitizer(build.compiler(), SANITIZERS[kind], Path(folder))


def link(kind: str, output: Path, replaced: dict[str, Path] | None = None) -> Path:
    """Links a program of PROGRAMS, with some of its objects replaced. The others are compiled once, by
    whoever needs one first."""
    need_sanitizer(kind)
    shared = build.built_here(build.CACHE) / "drivers"

    def unchanged(name: str) -> Path:
        return build.make_once(shared / f"{name}.o", partial(compile_object, name, toolchain.CSRC))

    own = replaced or {}
    objects = [own[name] if name in own else unchanged(name) for name in PROGRAMS[kind]]
    toolchain.run_or_fail(build.compiler(), *SANITIZERS[kind], *objects, "-pthread", "-o", output)
    return output


def run(program: Path) -> subprocess.CompletedProcess[str]:
    return toolchain.run(program, env={**os.environ, **toolchain.SANITIZER_OPTIONS}, timeout=300)
