"""Builds and runs kernels_driver.cpp with the launcher and its kernels, under sanitizers and without."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
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
OBJECTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "driver": ("kernels_driver.cpp", ("-O1",)),
    "driver-thread": ("kernels_driver.cpp", ("-O1", *SANITIZERS["thread"])),
    "emulator": ("emulator.cpp", ("-O1",)),
    "kernels": (KERNELS, ("-O0",)),
    "kernels-thread": (KERNELS, ("-O1", *SANITIZERS["thread"])),
    "kernels-address": (KERNELS, ("-O0", *SANITIZERS["address"])),
    "launches": (LAUNCHES, ("-O0",)),
    "launches-address": (LAUNCHES, ("-O0", *SANITIZERS["address"])),
}
PROGRAMS = {
    "plain": ("driver", "emulator", "kernels", "launches"),
    "address": ("driver", "emulator", "kernels-address", "launches-address"),
    "thread": ("driver-thread", "emulator", "kernels-thread", "launches"),
}


def compile_object(name: str, csrc: Path, output: Path) -> Path:
    """Compiles one of OBJECTS, with the project's sources from `csrc`."""
    source, flags = OBJECTS[name]
    path = csrc / source if source == LAUNCHES else build.HERE / source
    includes = (f"-I{build.HERE}", f"-I{csrc}", f"-I{toolchain.NATIVE.parent}", f"-I{toolchain.NATIVE}")
    command = (build.compiler(), *build.LANGUAGE_FLAGS, *flags, *includes, "-x", "c++", "-c", path)
    toolchain.run_or_fail(*command, "-o", output)
    return output


class Drivers:
    """Links drivers from objects that are compiled once.

    Args:
        folder: an empty one, where everything is built.
        pool: compiles the objects, from now on.
    """

    def __init__(self, folder: Path, pool: ThreadPoolExecutor) -> None:
        def probe(kind: str) -> None:
            (folder / kind).mkdir()
            toolchain.need_sanitizer(build.compiler(), SANITIZERS[kind], folder / kind)

        self._folder = folder
        self._extension = pool.submit(build.build_extension, build.CACHE)
        self._usable = {kind: pool.submit(probe, kind) for kind in SANITIZERS}
        self._objects = {
            name: pool.submit(compile_object, name, toolchain.CSRC, folder / f"{name}.o") for name in OBJECTS
        }

    def link(self, kind: str, output: Path, replaced: dict[str, Path] | None = None) -> Path:
        """Links a program of PROGRAMS, with some of its objects replaced; skips where there is no such
        sanitizer."""
        self._usable[kind].result()
        own = replaced or {}
        objects = [own[name] if name in own else self._objects[name].result() for name in PROGRAMS[kind]]
        toolchain.run_or_fail(build.compiler(), *SANITIZERS[kind], *objects, "-pthread", "-o", output)
        return output

    def extension(self) -> Path:
        """That of module.cpp, with the sources as they are."""
        return self._extension.result()

    def unchanged(self, kind: str) -> Path:
        """The driver of the sources as they are."""
        return self.link(kind, self._folder / kind / "driver")


def run(program: Path) -> subprocess.CompletedProcess[str]:
    return toolchain.run(program, env={**os.environ, **toolchain.SANITIZER_OPTIONS}, timeout=300)
