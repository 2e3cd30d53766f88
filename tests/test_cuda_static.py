"""What nvcc makes of every rule's CUDA kernels: no warning, no spill, registers for as many blocks as the
rule asks for, 128-bit accesses, and no double precision where a consumer card pays for it in every block."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from native import toolchain


class Expected(NamedTuple):
    slots: int  # of state, at the most
    blocks: int  # of which a multiprocessor has registers for so many; one less of doubles


RULES = {
    "sgd": Expected(slots=1, blocks=3),
    "adam": Expected(slots=3, blocks=2),
    "rmsprop": Expected(slots=3, blocks=2),
    "adagrad": Expected(slots=1, blocks=3),
    "adadelta": Expected(slots=2, blocks=2),
    "lion": Expected(slots=1, blocks=3),
}
# Parameter and state, and the 16-byte accesses of one round to each: the narrower type fills one, the wider
# then needs two.
PAIRS = {
    ("float32", "float32"): (1, 1),
    ("float64", "float64"): (1, 1),
    ("float64", "float32"): (2, 1),
    ("bfloat16", "bfloat16"): (1, 1),
    ("bfloat16", "float32"): (1, 2),
    ("float16", "float16"): (1, 1),
    ("float16", "float32"): (1, 2),
}
SMALL, LARGE = 480, 3900  # tensors a launch
# Each takes a compilation of its own; the first stands for the others. It and the oldest, which has the
# fewest instructions, take every rule, most of a minute on two cores; the rest take the one with most state.
ARCHITECTURES = {
    "sm_90": tuple(RULES),
    "sm_75": tuple(RULES),
    **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_100", "sm_120"), ("adam",)),
}

# DADD, DFMA, DMUL, DSETP, MUFU.RCP64H, and conversions such as F2F.F64.F32 and I2F.F64.S64.
DOUBLE = re.compile(r"D(ADD|FMA|MUL|SETP|MNMX)\b|\w+\..*\b(F64|RCP64H|RSQ64H)\b")


@pytest.fixture(scope="module")
def cuda_static() -> Iterator[ModuleType]:
    """benchmarks/cuda_static.py, which reads machine code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(toolchain.ROOT / "benchmarks")
        yield importlib.import_module("cuda_static")


class Build(NamedTuple):
    library: Path
    architecture: str  # "sm_75"
    rules: tuple[str, ...]
    messages: str


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """CMake's command for each of the CUDA sources."""
    toolchain.tool("nvcc")
    commands = toolchain.compile_commands(tmp_path_factory.mktemp("cmake"))
    found = {source: words for (target, source), words in commands.items() if target == "kernels_cuda"}
    return found or pytest.skip("CMake builds no CUDA kernels here")


def generates(word: str) -> str:
    """The architecture for which this word of a command asks: "sm_90", or ""."""
    found = re.search(r"\bsm_\d+\w*", word) if word.startswith("--generate-code=") else None
    return found[0] if found else ""


def shipped(commands: dict[str, list[str]]) -> set[str]:
    return {generates(word) for words in commands.values() for word in words} - {""}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if k == 0 else pytest.mark.repetition)
        for k, name in enumerate(ARCHITECTURES)
    ],
)
def build(
    request: pytest.FixtureRequest, commands: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Build:
    """The kernels and their launcher as CMake would compile them, with every warning an error, but for one
    architecture."""
    if request.param not in shipped(commands):
        pytest.skip(f"this nvcc is not asked for {request.param}")
    folder = tmp_path_factory.mktemp("cuda")
    strict = ("-Werror", "all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror", "-Xptxas=-v")
    rules = ARCHITECTURES[request.param]
    csrc = toolchain.CSRC if rules == tuple(RULES) else toolchain.copy_sources(folder, only=rules[0])
    messages = ""
    for source, words in commands.items():
        # What -v tells goes to one stream or the other, by the version of nvcc.
        own = [
            word.replace(str(toolchain.CSRC), str(csrc))
            for word in words
            if generates(word) in ("", request.param)
        ]
        done = toolchain.run(*own, *strict, "-o", f"{Path(source).stem}.o", cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        messages += done.stdout + done.stderr
    toolchain.run_or_fail("g++", "-shared", *folder.glob("*.o"), "-o", folder / "kernels.so")
    return Build(folder / "kernels.so", request.param, rules, messages)


@pytest.fixture(scope="module")
def resources(build: Build, cuda_static: ModuleType) -> dict:
    """What each kernel takes, by architecture, of which there is one."""
    if cuda_static.find_tool("cuobjdump") is None:
        pytest.skip("needs cuobjdump, which the test extra brings on Linux")
    return cuda_static.read_resources(build.library)


@pytest.fixture(scope="module")
def disassembly(build: Build, cuda_static: ModuleType) -> dict:
    """Each kernel's instructions, by architecture, of which there is one."""
    for name in ("cuobjdump", "nvdisasm"):
        if cuda_static.find_tool(name) is None:
            pytest.skip(f"needs {name}, which the test extra brings on Linux")
    return cuda_static.disassemble(build.library)


def expected_kernels(cuda_static: ModuleType, rules: tuple[str, ...]) -> set:
    layouts = ((False, SMALL), (False, LARGE), (True, SMALL))
    forms = {(strided, staged, SMALL) for strided, staged in product((False, True), repeat=2)}
    forms |= {(False, False, LARGE)}
    steps = {
        cuda_static.Kernel("step_kernel", rule, *pair, *form)
        for rule, pair, form in product(rules, PAIRS, forms)
    }
    norms = {
        cuda_static.Kernel("norm_kernel", "", param, "", strided, capacity=capacity)
        for param, (strided, capacity) in product({param for param, _ in PAIRS}, layouts)
    }
    others = {cuda_static.Kernel("clock_kernel", rule) for rule in rules}
    others |= {cuda_static.Kernel(name) for name in ("shares_kernel", "end_norm_kernel")}
    return others | steps | norms


def test_the_page_counts_the_kernels(cuda_static: ModuleType):
    kernels = expected_kernels(cuda_static, tuple(RULES))
    page = (toolchain.CSRC / "cuda" / "README.md").read_text("utf-8")
    steps = sum(kernel.name == "step_kernel" for kernel in kernels)
    assert f"There are {len(kernels)} kernels: of each of the six rules {steps // len(RULES)}" in page


# -- registers and local memory ------------------------------------------------------------------


def test_every_architecture_that_is_shipped_is_looked_at(commands: dict[str, list[str]]):
    assert len(shipped(commands)) >= 5
    assert shipped(commands) <= set(ARCHITECTURES)


def test_every_rule_is_looked_at():
    headers = (path.read_text() for path in (toolchain.CSRC / "rules").glob("*.h"))
    names = {name for text in headers for name in re.findall(r'kName = "(\w+)"', text)}
    assert names == set(RULES)


def test_every_kernel_is_compiled(build: Build, resources: dict, disassembly: dict, cuda_static: ModuleType):
    assert set(resources) == set(disassembly) == {build.architecture}
    assert set(resources[build.architecture]) == expected_kernels(cuda_static, build.rules)
    assert set(disassembly[build.architecture]) == expected_kernels(cuda_static, build.rules)


def test_step_kernels_spill_nothing_and_need_no_local_memory(build: Build, cuda_static: ModuleType):
    expected = product([build.architecture], expected_kernels(cuda_static, build.rules))
    seen = set()
    kernel, architecture = None, ""
    for line in build.messages.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)' for '(sm_\w+)'", line):
            kernel, architecture = cuda_static.kernel_of(entry[1]), entry[2]
        elif "Function properties for" in line:
            of_kernel = "_kernel" in line  # or of a function that it calls
        elif stack := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", line
        ):
            # The clock's is not run in every block: it may use stack, though it needs none today.
            if kernel.name != "clock_kernel":
                assert stack.groups() == ("0", "0", "0"), f"{kernel} for {architecture}: {line}"
            if of_kernel:
                seen.add((architecture, kernel))
    assert seen == set(expected)


def test_the_blocks_of_a_rule_fit_on_a_multiprocessor(resources: dict):
    """As kResidentBlocks in kernels.cuh asks for, which says why."""
    for architecture, kernels in resources.items():
        for kernel, used in kernels.items():
            if kernel.name != "clock_kernel":
                if not kernel.rule:
                    blocks = 4
                elif kernel.staged:
                    blocks = 2 if kernel.param == "float32" else 1
                else:
                    blocks = RULES[kernel.rule].blocks - (kernel.param == "float64")
                assert used.resident_blocks() >= blocks, f"{kernel} for {architecture}: {used}"
                assert used.stack == used.local == 0


# -- instructions --------------------------------------------------------------------------------


def targets(code: list) -> list[list[int]]:
    """The places that each instruction names: of a jump, a call, or where threads join again."""
    places = {label: k for k, instruction in enumerate(code) for label in instruction.labels}
    return [
        [places[label] for label in re.findall(r"\.L_x_\d+|(?<=`\()\$\S+(?=\))", i.operands)] for i in code
    ]


def loops_with_vector_stores(code: list) -> list[list]:
    """The innermost stretches between a backward jump's target and the jump."""
    spans = {
        (to, k)
        for k, places in enumerate(targets(code))
        for to in places
        if to <= k and code[k].opcode.startswith("BRA")
    }
    spans = {span for span in spans if any(is_vector_store(i) for i in code[span[0] : span[1] + 1])}
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [code[first : last + 1] for first, last in inner]


def is_vector_store(instruction) -> bool:
    return re.match(r"STG\.E\..*\b128\b", instruction.opcode) is not None


def test_dense_kernels_move_16_bytes_at_a_time(build: Build, disassembly: dict, cuda_static: ModuleType):
    checked = 0
    for architecture, kernels in disassembly.items():
        for kernel, code in kernels.items():
            if kernel.name != "step_kernel":
                continue
            loads, stores = cuda_static.vector_accesses(code)
            if kernel.strided:
                assert (loads, stores) == (0, 0)
                continue
            of_param, of_slot = PAIRS[kernel.param, kernel.state]
            of_state = of_slot * RULES[kernel.rule].slots + kernel.staged
            where = f"{kernel} for {architecture}"
            assert loads >= 2 * of_param + of_state, where  # the gradient's are as many as the parameter's
            assert stores >= of_param + of_state, where
            loops = loops_with_vector_stores(code)
            assert loops, where
            for loop in loops:
                # Generic accesses (LD, ST) would look for the kind of memory first.
                accesses = [i.opcode for i in loop if re.match(r"(LD|ST)[GL]?\.", i.opcode)]
                narrow = [opcode for opcode in accesses if not re.match(r"(LDG|STG)\.E\..*\b128\b", opcode)]
                assert not narrow, f"{narrow} in {where}"
            checked += 1
    assert checked == len(build.rules) * len(PAIRS) * 3  # small, large and with stages


def reached(starts: list[int], edges: list[list[int]]) -> set[int]:
    found, open_ends = set(starts), list(starts)
    while open_ends:
        for k in edges[open_ends.pop()]:
            if k not in found:
                found.add(k)
                open_ends.append(k)
    return found


def flow(code: list) -> list[list[int]]:
    """What may run after each instruction: what it names, and the next one."""
    edges = targets(code)
    for k, instruction in enumerate(code):
        if instruction.opcode.startswith("BRX"):
            assert edges[k], f"nvdisasm does not tell the targets of {instruction}"
        jumps = re.fullmatch(r"(EXIT|RET|BRX)\b.*", instruction.opcode) or (
            instruction.opcode == "BRA" and re.fullmatch(r"`\(\S+\)", instruction.operands)
        )
        if (not jumps or instruction.predicate) and k + 1 < len(code):
            edges[k].append(k + 1)
    return edges


def before_ticket(code: list, edges: list[list[int]]) -> set[int]:
    """The instructions that may run before a block draws its ticket, and so in every block; see NOTE: [the
    last block] in kernels.cuh."""
    backward: list[list[int]] = [[] for _ in code]
    for k, places in enumerate(edges):
        for to in places:
            backward[to].append(k)
    (ticket,) = (k for k, i in enumerate(code) if i.opcode.startswith("ATOM"))
    before = reached([ticket], backward)
    # Functions have names of their own; a CALL to a label is but a jump.
    calls = [k for k in before if code[k].opcode.startswith("CALL") and "`($" in code[k].operands]
    return before | reached([edges[k][0] for k in calls], edges)


def behind_branches(code: list, edges: list[list[int]]) -> Iterator[set[int]]:
    """For each side of each branch, what is run only where it is taken."""
    everything = reached([0], edges)
    for k in sorted(everything):
        places = edges[k]
        if len(set(places)) < 2 or code[k].opcode.startswith("CALL"):
            continue
        for side in set(places):
            edges[k] = [place for place in places if place != side]
            yield everything - reached([0], edges)
            edges[k] = places


def opcodes(code: list, places: set[int]) -> set[str]:
    return {code[k].opcode.split(".")[0] for k in places}


def unexplained_doubles(code: list, before: set[int], edges: list[list[int]]) -> list:
    """Of the instructions that run before the ticket those in double precision that are neither of the two
    stretches which test_double_precision_is_rare() names."""
    edges = [[to for to in places if to in before] if k in before else [] for k, places in enumerate(edges)]
    early = {k for k in before if DOUBLE.match(code[k].opcode)}
    stretches = [
        stretch
        for stretch in behind_branches(code, edges)
        if stretch & early and not any(is_vector_store(code[k]) for k in stretch)
    ]
    of_norm = [
        stretch
        for stretch in stretches
        if {code[k].opcode for k in stretch & early} <= {"F2F.F64.F32", "DFMA", "DADD"}
        and "BAR" in opcodes(code, stretch)  # the whole block adds
        and not opcodes(code, stretch) & {"ATOM", "ATOMG"}
    ]
    norm = max(of_norm, key=lambda stretch: len(stretch & early), default=set())
    of_one_thread = [
        stretch
        for stretch in stretches
        if not opcodes(code, stretch) & {"ATOM", "ATOMG", "BAR", "STG", "ST"}
        # Two barriers are run only where it may be: they stand around it.
        and any(stretch < s and sum(code[k].opcode.startswith("BAR") for k in s) == 2 for s in stretches)
    ]
    own = max(of_one_thread, key=lambda stretch: len(stretch & early - norm), default=set())
    return [code[k] for k in sorted(early - norm - own)]


def test_double_precision_is_rare(build: Build, disassembly: dict, cuda_static: ModuleType):
    """Consumer cards compute 64 times as fast in float32. Where parameters are not float64, a block that is
    not the last computes in double in two places, each behind a branch that the others do not take: where the
    gradients' norm is measured, in additions of squares alone; and in one thread of a block whose tensor has
    missed updates of its group, which forms the tensor's own scalars between two barriers."""
    checked = 0
    for architecture, kernels in disassembly.items():
        for kernel, code in kernels.items():
            if kernel.name != "step_kernel":
                continue
            where = f"{kernel} for {architecture}"
            edges = flow(code)
            before = before_ticket(code, edges)
            assert sum(DOUBLE.match(i.opcode) is not None for i in code) > 100, where  # the schedules
            assert cuda_static.vector_accesses([code[k] for k in sorted(before)]) == (
                cuda_static.vector_accesses(code)
            ), where
            if kernel.param != "float64":
                found = unexplained_doubles(code, before, edges)
                assert not found, f"{found[:5]} in {where}"
                checked += 1
    assert checked == len(build.rules) * 5 * 5


def test_the_table_holds_every_kernel(
    build: Build, resources: dict, disassembly: dict, cuda_static: ModuleType
):
    def and_a_later(found: dict) -> dict:
        return {"sm_1000": found[build.architecture], **found}

    text = cuda_static.report(and_a_later(resources), and_a_later(disassembly))
    assert re.findall(r"^### (\w+)$", text, re.MULTILINE) == sorted(build.rules)
    of_rules = re.findall(r"^\| b?float\d+ \| b?float\d+ \| (?:dense|strided) \| ", text, re.MULTILINE)
    assert len(of_rules) == len(build.rules) * len(PAIRS) * 2
    assert "| bfloat16 | float32 | 6 | 14 | 22 | 30 |" in text
    assert "| 5,000 | 11 | 2 |" in text
    assert f"| {build.architecture} | sm_1000 |\n" in text
