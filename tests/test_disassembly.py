"""What the compiler made of the CPU kernels: packed loops where SIMD is promised, and nothing that a
machine without it could stumble over."""

from __future__ import annotations

import platform
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from native import toolchain

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="reads the machine code of x86-64"
)

ENTRY_POINTS = {
    "baseline": "update_baseline",
    "x86-64-v2": "update_x86_64_v2",
    "x86-64-v3": "update_x86_64_v3",
    "x86-64-v4": "update_x86_64_v4",
}
FMA = re.compile(r"vfn?m(add|sub)\d+(?P<width>[ps])[sd]$")


class Instruction(NamedTuple):
    address: int
    mnemonic: str
    operands: str


Functions = dict[str, list[Instruction]]


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The kernels' object files by level, compiled with the flags that CMake gives them."""
    toolchain.tool("objdump")
    toolchain.tool("nm")
    build = tmp_path_factory.mktemp("kernels")
    commands = toolchain.compile_commands(build)
    source = toolchain.CSRC / "cpu" / "kernels.cpp"

    def compile_one(level: str) -> Path:
        target = ENTRY_POINTS[level].replace("update_", "kernels_")
        command = commands.get((target, "cpu/kernels.cpp"))
        if command is None:
            pytest.skip(f"CMake builds no {level} kernels with this compiler")
        toolchain.run_or_fail(*command, "-std=c++17", "-c", source, "-o", build / f"{level}.o")
        return build / f"{level}.o"

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ENTRY_POINTS, pool.map(compile_one, ENTRY_POINTS), strict=True))


def disassemble(path: Path) -> Functions:
    functions: Functions = {}
    code: list[Instruction] = []
    for line in toolchain.run_or_fail("objdump", "-d", "-C", "--no-show-raw-insn", path).splitlines():
        if header := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            code = functions[header[1]] = []
        elif found := re.match(r"\s+([0-9a-f]+):\s+(\S+)\s*(.*)$", line):
            code.append(Instruction(int(found[1], 16), found[2], found[3]))
    return functions


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The innermost stretches between a backward jump's target and the jump."""
    spans = set()
    for jump in code:
        target = re.match(r"([0-9a-f]+) <", jump.operands)
        if jump.mnemonic.startswith("j") and target and code[0].address <= int(target[1], 16) < jump.address:
            spans.add((int(target[1], 16), jump.address))
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [[i for i in code if first <= i.address <= last] for first, last in inner]


def arithmetic_loops(code: list[Instruction]) -> Counter[str]:
    """Counts the loops with multiply-adds: all "packed" (on full vectors), all "scalar", or "mixed"."""
    found: Counter[str] = Counter()
    for loop in loops(code):
        widths = {m["width"] for i in loop if (m := FMA.match(i.mnemonic))}
        vectors = any(FMA.match(i.mnemonic) and re.search("%[yz]mm", i.operands) for i in loop)
        if widths == {"p"} and vectors:
            found["packed"] += 1
        elif widths == {"s"}:
            found["scalar"] += 1
        elif widths:
            found["mixed"] += 1
    return found


@pytest.mark.parametrize("level", ["x86-64-v3", "x86-64-v4"])
def test_every_update_loop_is_packed(objects: dict[str, Path], level: str):
    functions = disassemble(objects[level])
    checked = 0
    for name, code in functions.items():
        if not any(FMA.match(i.mnemonic) for i in code):
            continue
        found = arithmetic_loops(code)
        if "squares" in name:  # of less than 256 values at the end of a chunk, the last few one by one
            assert found["packed"] >= 1, f"{found} in {name}"
            continue
        # Besides the vector loops, what is left of a length runs once through straight-line code.
        assert found["scalar"] == 0, f"{found} in {name}"
        # One for each kind of step (first, later, without momentum) at the least.
        assert found["packed"] >= 3, f"{found} in {name}"
        checked += 1
    # Dense and strided for seven pairs of types; some are inlined into the entry point.
    assert checked >= 7, list(functions)


@pytest.mark.parametrize(
    ("half", "instructions"),
    [
        ("Float16", ("vcvtph2ps", "vcvtps2ph")),
        ("BFloat16", ("vpmovzxwd", "vpslld", "vpsrld")),  # widen, shift up; shift down
    ],
    ids=["float16", "bfloat16"],
)
def test_half_conversions_are_packed(objects: dict[str, Path], half: str, instructions: tuple[str, ...]):
    # update_dense<T, T> and what it calls, which may be inlined into it.
    functions = {
        name: code
        for name, code in disassemble(objects["x86-64-v3"]).items()
        if re.search(
            rf"update_dense<fastlr::{half}, fastlr::{half}>|(load|store)_dense\(.*fastlr::{half}", name
        )
    }
    assert functions
    in_loops = [i for code in functions.values() for loop in loops(code) for i in loop]
    for mnemonic in instructions:
        assert any(i.mnemonic == mnemonic and "%ymm" in i.operands for i in in_loops), mnemonic


@pytest.mark.parametrize("level", ["baseline", "x86-64-v2"])
def test_lower_levels_hold_no_avx(objects: dict[str, Path], level: str):
    code = [i for code in disassemble(objects[level]).values() for i in code]
    assert len(code) > 1000
    # Every AVX instruction, and only they, begin with v.
    assert not [i for i in code if i.mnemonic.startswith("v") or re.search("%[yz]mm", i.operands)]


@pytest.mark.parametrize("level", ENTRY_POINTS)
def test_only_the_entry_points_are_visible_to_the_linker(objects: dict[str, Path], level: str):
    """Another definition could be merged with another level's; see NOTE: [internal linkage]."""
    listed = toolchain.run_or_fail("nm", "-C", "--defined-only", "--extern-only", objects[level])
    names = [re.sub(r"\(.*", "", line.split(maxsplit=2)[2]) for line in listed.splitlines()]
    update = f"fastlr::{ENTRY_POINTS[level]}"
    assert sorted(names) == sorted([update, update.replace("update", "squares")])


def test_the_rest_is_compiled_for_any_machine(tmp_path: Path):
    for (target, source), command in toolchain.compile_commands(tmp_path).items():
        if target in ("_core", "kernels_baseline"):
            assert not [flag for flag in command if flag.startswith("-m")], source
