"""What a built wheel and a source distribution hold, and that the wheel works."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path, PurePosixPath

import pytest
from native import toolchain

from fastlr import _core


def has_build_backend() -> bool:
    return all(importlib.util.find_spec(name) for name in ("scikit_build_core", "pybind11"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel as ``pip install .`` would build it where there is no CUDA."""
    out = tmp_path_factory.mktemp("wheel")
    isolation = ["--no-build-isolation"] if has_build_backend() else []
    toolchain.run_or_fail(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *isolation),
        *("--wheel-dir", out, "-C", "cmake.define.FASTLR_CUDA=OFF", toolchain.ROOT),
    )
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def extension(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (name,) = (n for n in wheel.namelist() if PurePosixPath(n).match("fastlr/_core*.so"))
    return Path(wheel.extract(name, tmp_path_factory.mktemp("extension")))


def test_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile):
    names = {PurePosixPath(n) for n in wheel.namelist()}
    info = {n for n in names if n.parts[0].endswith(".dist-info")}
    sources = {
        PurePosixPath(path.relative_to(toolchain.ROOT).as_posix())
        for path in (toolchain.ROOT / "fastlr").rglob("*")
        if path.suffix in (".html", ".py", ".pyi", ".typed")
    }
    assert {PurePosixPath(f"fastlr/{n}") for n in ("py.typed", "_core.pyi", "templates/demo.html")} <= sources
    compiled = [n for n in names if n.suffix == ".so"]
    assert len(compiled) == 1, compiled
    assert compiled[0].match("fastlr/_core*.so")
    # No tests, no C++ sources, no benchmarks, no settings.
    assert names - info == sources | set(compiled)
    assert any(n.name == "LICENSE" for n in info)


def test_wheel_without_cuda_is_small(wheel: zipfile.ZipFile):
    assert Path(str(wheel.filename)).stat().st_size < 3e6


def test_wheel_needs_only_torch_numpy_and_what_torch_needs_too(wheel: zipfile.ZipFile):
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    always = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert {re.match(r"[\w-]+", r)[0] for r in always} == {"torch", "numpy", "typing-extensions"}
    assert "typing-extensions" in " ".join(importlib.metadata.requires("torch"))
    assert metadata["Requires-Python"] == ">=3.10"


# What every Linux has that runs Python and PyTorch: no CUDA, PyTorch, OpenMP or Python among them.
OF_THE_SYSTEM = r"(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|ld-linux-\w+(-\w+)*)\.so"


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")
@pytest.mark.parametrize("built", ["wheel", "installed"])
def test_extension_links_to_the_system_alone(built: str, request: pytest.FixtureRequest):
    """So it loads without any CUDA library, and beside any PyTorch; also where it has CUDA kernels."""
    extension = _core.__file__ if built == "installed" else request.getfixturevalue("extension")
    dynamic = toolchain.run_or_fail(toolchain.tool("readelf"), "-d", extension)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert any(n.startswith("libc.so") for n in needed), dynamic
    assert not [n for n in needed if not re.match(OF_THE_SYSTEM, n)]
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)


def test_the_wheel_works(wheel: zipfile.ZipFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where it lies in front of what is installed; `make wheel` does so in an empty environment."""
    wheel.extractall(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said = toolchain.run_or_fail(
        sys.executable, "-W", "error", toolchain.TESTS / "wheel_smoke.py", cwd=tmp_path
    )
    assert "works with PyTorch" in said
    assert "cuda_status: it was built with FASTLR_CUDA=OFF" in said


def test_source_distribution_can_build_the_extension(tmp_path: Path):
    if not has_build_backend():
        pytest.skip("needs scikit-build-core and pybind11")
    script = f"from scikit_build_core.build import build_sdist; build_sdist({str(tmp_path)!r})"
    toolchain.run_or_fail(sys.executable, "-c", script, cwd=toolchain.ROOT)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {PurePosixPath(*PurePosixPath(n).parts[1:]).as_posix() for n in archive.getnames()}
    sources = {p.relative_to(toolchain.ROOT).as_posix() for p in toolchain.CSRC.rglob("*.*")}
    assert len(sources) > 10
    assert sources | {"CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert not [n for n in names if n.startswith((".ci", ".git/", ".venv", "report", "build"))]
