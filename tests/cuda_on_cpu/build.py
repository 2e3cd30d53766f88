"""Builds the extension of module.cpp: the project's .cu files under g++."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
from filelock import FileLock
from native import toolchain

HERE = Path(__file__).parent
NAME = "_cuda_on_cpu"
LIBRARY = "FASTLR_CUDA_ON_CPU"  # an environment variable: the extension that tests load, where it is set
CACHE = toolchain.ROOT / ".pytest_cache" / "d" / "cuda_on_cpu"  # where pytest's `cache` has it too

# -fno-strict-aliasing: the kernels read and write memory through vector types, as CUDA allows.
# -ffp-contract=off: every fma is written out, on the host as with nvcc's -fmad=false.
LANGUAGE_FLAGS = ("-std=c++17", "-g1", "-Wall", "-Wextra", "-fno-strict-aliasing", "-ffp-contract=off")
FLAGS = (
    *LANGUAGE_FLAGS,
    *("-DFASTLR_HAS_CUDA", '-DFASTLR_CUDA_STATUS="CUDA emulated on the host"'),
    *(f"-I{HERE}", f"-I{toolchain.CSRC}"),
)
KERNELS = ("cuda/step_cuda.cu", "cuda/step_cuda_large.cu")
CPU_KERNELS = "cpu/kernels.cpp"
PLAN = (
    *("cuda/device_memory.cpp", "cuda/device_norm.cpp", "cuda/device_plan.cpp", "cuda/devices.cpp"),
    *("cuda/launches.cpp", "cuda/tensor_table.cpp"),
    *("gather.cpp", "gather_state.cpp", "groups.cpp", "layout.cpp", "messages.cpp", "overlaps.cpp"),
    *("placement.cpp", "plan.cpp", "rules.cpp", "shares.cpp", "squared_norm.cpp", "tensor_view.cpp"),
)


def compiler() -> str:
    return shutil.which("g++") or pytest.skip("needs g++, whose host code the emulation of CUDA is")


def compile_all(build: Path, items: list[tuple[Path, list[str]]]) -> list[Path]:
    """Compiles (source, flags) pairs, two at a time; returns the objects."""

    def compile_one(item: tuple[Path, list[str]]) -> Path:
        source, flags = item
        output = build / f"{source.name}.o"
        toolchain.run_or_fail(compiler(), *flags, "-x", "c++", "-c", source, "-o", output)
        return output

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, items))


def built_here(cache: Path) -> Path:
    """The cache's folder for the sources and flags as they are; what was built from others goes."""
    folders = (toolchain.CSRC, HERE, toolchain.NATIVE)
    sources = sorted(p for folder in folders for p in folder.rglob("*") if p.suffix != ".pyc" and p.is_file())
    digest = hashlib.sha256(repr((FLAGS, sys.version)).encode())
    for path in sources:
        digest.update(path.read_bytes())
    folder = cache / digest.hexdigest()[:16]
    cache.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(cache.with_suffix(".lock")):
        if not folder.exists():
            shutil.rmtree(cache, ignore_errors=True)
            folder.mkdir(parents=True)
    return folder


def make_once(output: Path, make: Callable[[Path], object]) -> Path:
    """A file that `make` writes; of all threads and processes that want it one does, the others wait."""
    output.parent.mkdir(exist_ok=True)
    with FileLock(f"{output}.lock"):
        if not output.exists():
            unfinished = output.with_suffix(".unfinished")
            make(unfinished)
            unfinished.rename(output)
    return output


def build_extension(cache: Path) -> Path:
    """The extension, built where the cache has none for these sources."""
    library = built_here(cache) / "extension" / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = [*FLAGS, *python_flags(), "-O2"]
    sources = (*KERNELS, *PLAN, "cpu/step_cpu.cpp", CPU_KERNELS)
    items = [(toolchain.CSRC / name, [*flags, *own_flags(name)]) for name in sources]
    items += [(HERE / name, flags) for name in ("module.cpp", "emulator.cpp")]
    return make_once(library, lambda output: link(compile_all(library.parent, items), output))


def own_flags(source: str) -> tuple[str, ...]:
    return ("-DFASTLR_SIMD_LEVEL=baseline",) if source == CPU_KERNELS else ()


def python_flags() -> list[str]:
    """For objects of an extension."""
    import pybind11

    includes = (sysconfig.get_path("include"), pybind11.get_include())
    return [*(f"-I{folder}" for folder in includes), "-fvisibility=hidden", "-fPIC"]


def link(objects: list[Path], library: Path) -> None:
    toolchain.run_or_fail(compiler(), "-shared", *objects, "-ldl", "-o", library)


def relink_extension(library: Path, csrc: Path, source: str, folder: Path) -> Path:
    """The extension of `library` again, in a folder, with one of its sources as `csrc` has it."""
    other = folder / "other.o"
    flags = [flag for flag in (*FLAGS, *own_flags(source)) if flag != f"-I{toolchain.CSRC}"]
    toolchain.run_or_fail(
        compiler(), *flags, f"-I{csrc}", *python_flags(), "-O0", "-c", csrc / source, "-o", other
    )
    replaced = library.parent / f"{Path(source).name}.o"
    objects = [other if path == replaced else path for path in sorted(library.parent.glob("*.o"))]
    link(objects, folder / library.name)
    return folder / library.name


def load_extension(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
