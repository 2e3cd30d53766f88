"""What the compiler made of the CPU kernels: packed loops where SIMD is promised, and nothing that a
machine without it could stumble over."""

from __future__ import annotations

import platform
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from native import toolchain

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="reads the machine code of x86-64"
)

LEVELS = ("baseline", "x86-64-v2", "x86-64-v3", "x86-64-v4")
# Multiply-adds, roots and quotients, which only the rules' loops and sums of squares have.
ARITHMETIC = re.compile(r"v(fn?m(add|sub)\d+|sqrt|div)(?P<width>[ps])[sd]$")
# The loop of a rule with some live slots, of a plain step, one with coupled weight decay or another, with
# stages or without.
LOOP = re.compile(r"update_live<fastlr::\w+, (\d+u, \w+, \w+, \w+), (?:float|double), ")
# A function that updates elements: its rule, and how it stores parameters.
UPDATES = re.compile(r"update_\w+<fastlr::([A-Z]\w+), (?:\d+u, \w+, \w+, \w+, )?(?:fastlr::)?(\w+)")


class Instruction(NamedTuple):
    address: int
    mnemonic: str
    operands: str


Functions = dict[str, list[Instruction]]


def suffixed(name: str, level: str) -> str:
    return f"{name}_{level.replace('-', '_')}"


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The kernels' object files by level, compiled with the flags that CMake gives them."""
    toolchain.tool("objdump")
    toolchain.tool("nm")
    build = tmp_path_factory.mktemp("kernels")
    commands = toolchain.compile_commands(build, toolchain.ON_CPU)
    source = toolchain.CSRC / "cpu" / "kernels.cpp"

    def compile_one(level: str) -> Path:
        target = suffixed("kernels", level)
        command = commands.get((target, "cpu/kernels.cpp"))
        if command is None:
            pytest.skip(f"CMake builds no {level} kernels with this compiler")
        toolchain.run_or_fail(*command, "-std=c++17", "-c", source, "-o", build / f"{level}.o")
        return build / f"{level}.o"

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(LEVELS, pool.map(compile_one, LEVELS), strict=True))


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


def packed_loops(code: list[Instruction]) -> int:
    """The loops in which all arithmetic is packed, some of it on full vectors."""
    found = 0
    for loop in loops(code):
        arithmetic = [(i, m["width"]) for i in loop if (m := ARITHMETIC.match(i.mnemonic))]
        full = any(re.search("%[yz]mm", i.operands) for i, _ in arithmetic)
        found += full and {width for _, width in arithmetic} == {"p"}
    return found


def versions_of_rules() -> dict[str, int]:
    """By the names of the rules' structs the loops that each has in a compute type: see LOOP."""
    found = {}
    for path in (toolchain.CSRC / "rules").glob("*.h"):
        text = path.read_text()
        if name := re.search(r"struct (\w+) : RuleDefaults", text):
            sets = re.search(r"kLiveSets\[\] = \{(.*?)\}", text, re.DOTALL)
            assert sets is not None, path
            found[name[1]] = 5 * (sets[1].count(",") + 1)
    # GCC makes four of one with momentum: whether it is the first, and whether nesterov.
    found["Sgd"] += 5 * 3
    assert len(found) >= 6
    return found


@pytest.mark.parametrize("level", ["x86-64-v3", "x86-64-v4"])
def test_every_update_loop_is_packed(objects: dict[str, Path], level: str):
    """GCC vectorises no loop with many conditions or a call, and says nothing of it."""
    functions = disassemble(objects[level])
    versions = versions_of_rules()
    checked = set()
    for name, code in functions.items():
        calls = [i.operands for i in code if i.mnemonic in ("call", "jmp") and name not in i.operands]
        called = {version[1] for operands in calls if (version := LOOP.search(operands))}
        if not called and not any(ARITHMETIC.match(i.mnemonic) for i in code):
            continue
        # What is left of a length runs once through code that is not packed, before or behind the loop.
        packed = packed_loops(code)
        if re.search("squares|move_averages|_masters|store_by_chance", name):
            assert packed >= 1, name
        elif LOOP.search(name):
            assert packed == 1, name
        else:
            updates = UPDATES.search(name)
            assert updates is not None, name
            rule, stored = updates.groups()
            # The others are inlined, perhaps at two places.
            here = versions[rule] - len(called)
            assert packed % here == 0 if here else packed == 0, f"{packed} of {here} in {name}"
            assert packed or not here, f"0 of {here} in {name}"
            checked.add((rule, "double" if stored == "double" else "float"))
    assert checked == {(rule, compute) for rule in versions for compute in ("float", "double")}


@pytest.mark.parametrize(
    ("half", "instructions"),
    [
        ("Float16", ("vcvtph2ps", "vcvtps2ph")),
        ("BFloat16", ("vpmovzxwd", "vpslld", "vpsrld")),  # widen, shift up; shift down
    ],
    ids=["float16", "bfloat16"],
)
def test_half_conversions_are_packed(objects: dict[str, Path], half: str, instructions: tuple[str, ...]):
    functions = disassemble(objects["x86-64-v3"])
    for rule in versions_of_rules():
        # update_dense<rule, T, T> and what it calls, which may be inlined into it.
        dense = rf"update_dense<fastlr::{rule}, fastlr::{half}, fastlr::{half}>"
        found = [
            code
            for name, code in functions.items()
            if re.search(rf"{dense}|(load|store)_dense\(.*fastlr::{half}", name)
        ]
        assert found, rule
        in_loops = [i for code in found for loop in loops(code) for i in loop]
        for mnemonic in instructions:
            packed = any(i.mnemonic == mnemonic and "%ymm" in i.operands for i in in_loops)
            assert packed, f"{mnemonic} of {rule}"


@pytest.mark.parametrize("level", ["baseline", "x86-64-v2"])
def test_lower_levels_hold_no_avx(objects: dict[str, Path], level: str):
    code = [i for code in disassemble(objects[level]).values() for i in code]
    assert len(code) > 1000
    # Every AVX instruction, and only they, begin with v.
    assert not [i for i in code if i.mnemonic.startswith("v") or re.search("%[yz]mm", i.operands)]


@pytest.mark.parametrize("level", LEVELS)
def test_only_the_entry_points_are_visible_to_the_linker(objects: dict[str, Path], level: str):
    """Another definition could be merged with another level's; see NOTE: [internal linkage]."""
    listed = toolchain.run_or_fail("nm", "-C", "--defined-only", "--extern-only", objects[level])
    names = [re.sub(r"\(.*", "", line.split(maxsplit=2)[2]) for line in listed.splitlines()]
    assert sorted(names) == [f"fastlr::{suffixed(name, level)}" for name in ("kernels", "squares")]


def test_the_rest_is_compiled_for_any_machine(tmp_path: Path):
    for (target, source), command in toolchain.compile_commands(tmp_path).items():
        if target in ("_core", "kernels_baseline"):
            assert not [flag for flag in command if flag.startswith("-m")], source
