"""The build's options, and that no route or instruction set that it contains changes a result."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from native import toolchain

import fastlr
from fastlr import _build, _core

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)


@pytest.fixture(autouse=True)
def _as_found() -> Iterator[None]:
    exchange, level = _core.exchange_enabled(), _core.build_info()["simd_level"]
    yield
    _core.set_exchange_enabled(exchange)
    _core.set_simd_level(level)


# -- options -------------------------------------------------------------------------------------


def configured(build: Path, cuda: str, nvcc: object = None) -> str:
    """What CMake says; nvcc: the only one that it finds, or None: as this machine has it."""
    chosen = () if nvcc is None else (f"-DCMAKE_CUDA_COMPILER={nvcc}",)
    done = toolchain.configure(build, f"-DFASTLR_CUDA={cuda}", *chosen)
    return " ".join(f"{done.stdout} {done.stderr} rc={done.returncode}".split())  # CMake breaks lines


def pretended_nvcc(folder: Path, version: str, error: str) -> Path:
    """A compiler that tells a version and compiles nothing."""
    script = folder / "nvcc"
    script.write_text(
        f"#!/bin/sh\n"
        f'[ "$1" = --version ] && echo "Cuda compilation tools, release {version}, V{version}.1" && exit\n'
        f"echo '{error}' >&2\nexit 1\n"
    )
    script.chmod(0o755)
    return script


WITHOUT_CUDA = {
    "too-old": ("11.8", "", "nvcc 11.8 is too old: it needs CUDA 12.1 or newer"),
    "host-compiler": (
        "12.4",
        "host_config.h:143:2: error: #error -- unsupported GNU version!",
        "nvcc 12.4 did not work with its host compiler: host_config.h:143:2: error: #error -- unsupported",
    ),
    "no-version": ("none", "", "--version did not tell a version"),
}


@pytest.mark.parametrize(("version", "error", "reason"), WITHOUT_CUDA.values(), ids=WITHOUT_CUDA.keys())
def test_says_why_there_is_no_cuda(tmp_path: Path, version: str, error: str, reason: str):
    nvcc = pretended_nvcc(tmp_path, version, error)
    said = configured(tmp_path / "auto", "AUTO", nvcc)
    assert "fastlr without CUDA: " in said
    assert reason in said
    assert said.endswith("rc=0")
    said = configured(tmp_path / "on", "ON", nvcc)
    assert "FASTLR_CUDA=ON, but " in said
    assert reason in said
    assert said.endswith("rc=1")


def test_says_that_there_is_no_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDACXX", raising=False)
    done = toolchain.configure(tmp_path, "-DFASTLR_CUDA=AUTO", "-DFASTLR_NVCC=")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fastlr without CUDA: no nvcc was found when it was built" in " ".join(done.stdout.split())


def test_cuda_can_be_switched_off(tmp_path: Path):
    said = configured(tmp_path, "OFF")
    assert "fastlr without CUDA: it was built with FASTLR_CUDA=OFF" in said
    assert said.endswith("rc=0")


def with_cuda(build: Path, *options: str) -> str:
    """What CMake says where it finds an nvcc, with a build for Ninja."""
    toolchain.tool("nvcc")
    done = toolchain.configure(build, "-G", "Ninja", "-DFASTLR_CUDA=AUTO", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return " ".join(done.stdout.split())


def cuda_libraries(build: Path) -> list[str]:
    return re.findall(r"-lcudart\w*", (build / "build.ninja").read_text())


def test_finds_cuda_where_there_is_an_nvcc_and_links_its_runtime_statically(tmp_path: Path):
    said = with_cuda(tmp_path)
    assert re.search(r"fastlr with CUDA \d+\.\d+, architectures 75-real 80-real 86-real 89-real 90", said)
    assert cuda_libraries(tmp_path) == ["-lcudart_static"]


def test_cuda_runtime_is_linked_as_chosen(tmp_path: Path):
    with_cuda(tmp_path, "-DCMAKE_CUDA_RUNTIME_LIBRARY=Shared")
    assert cuda_libraries(tmp_path) == ["-lcudart"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")
@pytest.mark.skipif(not _core.build_info()["cuda"], reason="this build has no CUDA kernels")
def test_the_extension_shows_no_cuda_to_the_process():
    """Its CUDA runtime is linked statically, beside PyTorch's own; neither may find the other's functions."""
    listed = toolchain.run_or_fail(toolchain.tool("nm"), "-D", "--defined-only", _core.__file__)
    names = [line.split()[-1] for line in listed.splitlines()]
    assert "PyInit__core" in names
    assert not [name for name in names if re.match("_*cu(da)?[A-Z_]|__cuda|__fatbin", name)]


# What compilers are called by CMake, and how each is told not to contract.
COMPILERS = {
    "gcc": ("GNU", "GNU", "-ffp-contract=off"),
    "clang": ("Clang", "GNU", "-ffp-contract=off"),
    "apple": ("AppleClang", "GNU", "-ffp-contract=off"),
    "clang-cl": ("Clang", "MSVC", "/clang:-ffp-contract=off"),
}


def flags_of(folder: Path, compiler: str, words: str) -> str:
    script = folder / "flags.cmake"
    script.write_text(
        f'set(CMAKE_CXX_COMPILER_ID "{compiler}")\nset(CMAKE_CXX_COMPILER_FRONTEND_VARIANT "{words}")\n'
        f'include("{toolchain.ROOT / "cmake" / "compiler.cmake"}")\n'
        'message(STATUS "[${fastlr_flags} ${fastlr_hidden}]")\n'
    )
    done = toolchain.run(toolchain.tool("cmake"), "-P", script)
    return " ".join(f"{done.stdout} {done.stderr} rc={done.returncode}".split())


@pytest.mark.parametrize("name", COMPILERS)
def test_no_compiler_contracts(tmp_path: Path, name: str):
    compiler, words, flag = COMPILERS[name]
    said = flags_of(tmp_path, compiler, words)
    flags = re.search(r"\[(.*)\]", said)
    assert flags is not None, said
    found = flags[1].replace(";", " ").split()
    assert flag in found
    # Of the other kind a compiler knows none, or another thing: -Wall is all that there are to clang-cl.
    assert all(("-Wall" in found) != there for there in ("/W4" in found, words == "MSVC"))
    assert not [f for f in found if "fast-math" in f]


def test_a_compiler_that_cannot_build_it_is_refused(tmp_path: Path):
    said = flags_of(tmp_path, "MSVC", "MSVC")
    assert "CMAKE_GENERATOR_TOOLSET=ClangCL" in said
    assert said.endswith("rc=1")


def test_refuses_an_unknown_choice(tmp_path: Path):
    assert "FASTLR_CUDA must be AUTO, ON or OFF, got sometimes" in configured(tmp_path, "sometimes")


# -- routes and instruction sets -----------------------------------------------------------------


def layouts(dtype: torch.dtype) -> list[torch.Tensor]:
    """Tensors in different layouts, some inside larger ones, of lengths on both sides of a SIMD width."""

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype)

    flat = [values(n) for n in (0, 1, 7, 8, 33, 513)]
    return [
        *flat,
        values(),
        values(20_000),  # shared between threads
        values(64)[3:],
        values(30, 40)[::2, 1::3],
        values(9, 17).T,
        values(2, 3, 5, 7).contiguous(memory_format=torch.channels_last),
    ]


def special_gradients(like: torch.Tensor, step: int) -> torch.Tensor:
    """Random numbers among which lie infinities, NaN, zeros, subnormals and numbers close to overflow."""
    info = torch.finfo(like.dtype)
    tiny, large = info.smallest_normal * 0.375, info.max * 0.75
    special = [torch.inf, -torch.inf, torch.nan, 0.0, -0.0, tiny, -tiny, info.tiny, large, -large]
    parts = torch.view_as_real(like) if like.is_complex() else like
    flat = torch.randn(parts.numel(), dtype=torch.float64).to(parts.dtype)
    for k, value in enumerate(special):
        flat[k + step :: 29] = value
    gradient = flat.reshape(parts.shape)
    return torch.view_as_complex(gradient) if like.is_complex() else gradient


def trained(dtype: torch.dtype, momentum_dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """What a few steps with every option leave in parameters and momenta."""
    torch.manual_seed(1)
    results = []
    for options in (
        {"momentum": 0.0},
        {"momentum": 0.9, "weight_decay": 0.01, "dampening": 0.1},
        {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True, "maximize": True},
    ):
        params = [torch.nn.Parameter(t) for t in layouts(dtype)]
        lr = fastlr.Triangular2(0.01, 0.1, 2)
        opt = fastlr.FusedSGD(params, lr=lr, momentum_dtype=momentum_dtype, **options)
        for step in range(5):
            for p in params:
                p.grad = special_gradients(p.detach(), step)
            opt.step()
        results += [p.detach() for p in params]
        results += [opt.state[p]["momentum_buffer"] for p in params if opt.state]
    return results


def assert_same_bits(expected: list[torch.Tensor], actual: list[torch.Tensor]) -> None:
    """Signs of zeros included; which NaN a NaN is may differ."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    for index, tensors in enumerate(zip(expected, actual, strict=True)):
        e, a = (torch.view_as_real(t) if t.is_complex() else t for t in tensors)
        assert e.dtype == a.dtype
        e_bits, a_bits = (t.contiguous().view(integers[t.element_size()]) for t in (e, a))
        different = (e_bits != a_bits) & ~(e.isnan() & a.isnan())
        assert not different.any(), f"tensor {index}: {e[different]}, not {a[different]}"


MOMENTUM_DTYPES = [(dtype, None) for dtype in DTYPES] + [
    (dtype, torch.float32) for dtype in (torch.float64, torch.bfloat16, torch.float16)
]


@pytest.mark.parametrize(("dtype", "momentum_dtype"), MOMENTUM_DTYPES, ids=str)
def test_data_ptr_route_equals_the_exchange_route(dtype: torch.dtype, momentum_dtype: torch.dtype | None):
    assert _core.exchange_enabled()
    if not _core.exchange_available(torch.Tensor):
        pytest.skip("this PyTorch has no exchange route, data_ptr() is the only one")
    by_exchange = trained(dtype, momentum_dtype)
    _core.set_exchange_enabled(False)
    assert_same_bits(by_exchange, trained(dtype, momentum_dtype))


@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3", "x86-64-v4"])
@pytest.mark.parametrize(("dtype", "momentum_dtype"), MOMENTUM_DTYPES, ids=str)
def test_simd_levels_agree(dtype: torch.dtype, momentum_dtype: torch.dtype | None, level: str):
    if level not in _core.build_info()["simd_levels"]:
        pytest.skip(f"this build or machine has no {level}")
    _core.set_simd_level("baseline")
    expected = trained(dtype, momentum_dtype)
    assert any(t.isnan().any() for t in expected)
    assert any(t.isinf().any() for t in expected)
    _core.set_simd_level(level)
    assert _core.build_info()["simd_level"] == level
    assert_same_bits(expected, trained(dtype, momentum_dtype))


def test_the_best_simd_level_is_chosen_and_others_are_refused():
    info = _core.build_info()
    assert info["simd_level"] == info["simd_levels"][-1]
    with pytest.raises(ValueError, match=r"simd level must be one of baseline.*, got mmx"):
        _core.set_simd_level("mmx")


# -- what importing and stepping loads -----------------------------------------------------------


def in_fresh_process(script: str) -> str:
    # Not in the source tree, where the package lies without its compiled part.
    return toolchain.run_or_fail(sys.executable, "-c", script, cwd=Path(__file__).parent)


STEP = """
import torch, fastlr
torch.set_num_threads(2)
p = torch.nn.Parameter(torch.zeros(100_000))
p.grad = torch.ones_like(p)
fastlr.FusedSGD([p], lr=0.1).step()
assert (p == p[0]).all() and p[0] != 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_is_loaded_and_it_is_pytorchs():
    report = "print(fastlr._core.build_info()['openmp_runtime'])\nprint(open('/proc/self/maps').read())"
    runtime, *maps = in_fresh_process(f"{STEP}\n{report}").splitlines()
    loaded = {line.split()[-1] for line in maps if re.search(r"/lib(gomp|iomp|omp)[^/]*\.so", line)}
    assert len(loaded) == 1, loaded
    assert Path(runtime).resolve() == Path(loaded.pop()).resolve()
    package = Path(torch.__file__).resolve().parent
    shipped = [*package.glob("lib/libgomp*"), *package.parent.glob("torch.libs/libgomp*")]
    if shipped:  # by PyTorch's own wheels; a distribution's PyTorch uses the system's
        assert Path(runtime).resolve() in shipped


def test_import_initialises_no_cuda():
    assert in_fresh_process(f"{STEP}\nprint(torch.cuda.is_initialized())") == "False\n"


def test_a_build_without_cuda_says_so_once_when_a_parameter_is_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    status = {"cuda": False, "cuda_status": "no nvcc was found when it was built"}
    monkeypatch.setattr(_core, "build_info", lambda: status)
    monkeypatch.setattr(_build, "_told", set())
    on_cpu, on_gpu = SimpleNamespace(is_cuda=False), SimpleNamespace(is_cuda=True)
    _build.tell_of_missing_cuda([on_cpu])
    with pytest.warns(UserWarning, match="no nvcc was found.* -C cmake.define.FASTLR_CUDA=ON"):
        _build.tell_of_missing_cuda([on_cpu, on_gpu])
    _build.tell_of_missing_cuda([on_gpu])  # a second warning would be an error
    status["cuda"] = True
    monkeypatch.setattr(_build, "_told", set())
    _build.tell_of_missing_cuda([on_gpu])
