"""What did the compiler make of the CUDA kernels? Registers, memory traffic, launches a step; no GPU needed.

    python benchmarks/cuda_static.py [--library PATH] [--out benchmarks/results]

Reads the machine code of an installed fastlr, or of any other library or object, with cuobjdump and
nvdisasm: `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`, or a CUDA toolkit's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fastlr.bench.models import gpt2_small, resnet50

ITEMSIZE = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
REGISTERS = 65_536  # of a multiprocessor, in every architecture from 7.5 to 12.0
THREADS = 256  # of a block


class Kernel(NamedTuple):
    """A rule's clock_kernel, one that norms of shares need, or a step_kernel or norm_kernel and what it is an
    instance for."""

    name: str
    rule: str = ""  # none of a norm
    param: str = ""
    state: str = ""
    strided: bool = False
    staged: bool = False  # whether there is more to it than the rule: averages, master weights, ...
    capacity: int = 0  # tensors that a launch takes


class Resources(NamedTuple):
    registers: int  # of a thread
    stack: int  # bytes of a thread
    local: int

    def resident_blocks(self) -> int:
        """Blocks for which a multiprocessor has registers, which it hands out by eights."""
        return REGISTERS // (THREADS * -(-self.registers // 8) * 8)


class Instruction(NamedTuple):
    labels: tuple[str, ...]  # that stand before it
    predicate: str  # "@P0", "@!UP1" or ""
    opcode: str
    operands: str


# -- the tools -----------------------------------------------------------------------------------


def find_tool(name: str) -> str | None:
    """A program of CUDA's: from the package of its name, on PATH, or None."""
    try:
        files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    packaged = (str(file.locate()) for file in files if file.stem == name)
    return next(packaged, None) or shutil.which(name)


def run_tool(name: str, *arguments: object, cwd: Path | None = None) -> str:
    tool = find_tool(name)
    if tool is None:
        raise FileNotFoundError(f"{name} is needed: pip install nvidia-cuda-{name}")
    command = [tool, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


# -- what they say -------------------------------------------------------------------------------


def kernel_of(symbol: str) -> Kernel:
    """The kernel that a mangled name means.

    >>> kernel_of("_ZN6fastlr11step_kernelINS_4AdamEfS2_Lb0ELb1ELi480EEEvNS_13StepArgumentsIXT4_EEE")
    Kernel(name='step_kernel', rule='adam', param='float32', state='float32', strided=False, staged=True, \
capacity=480)
    """
    types = {"f": "float32", "d": "float64", "NS_8BFloat16E": "bfloat16", "NS_7Float16E": "float16"}
    one = "|".join(types)
    if found := re.match(
        rf"_ZN6fastlr11step_kernelINS_\d+([A-Z][a-z]+)E({one})({one}|S2_)Lb([01])ELb([01])ELi(\d+)EEEv",
        symbol,
    ):
        rule, param, state, strided, staged, capacity = found.groups()
        types["S2_"] = types[param]  # "the same again"
        return Kernel(
            *("step_kernel", rule.lower(), types[param], types[state]),
            *(strided == "1", staged == "1", int(capacity)),
        )
    if found := re.match(r"_ZN6fastlr\S*12clock_kernelINS_\d+([A-Z][a-z]+)EEE", symbol):
        return Kernel("clock_kernel", found[1].lower())
    if found := re.match(rf"_ZN6fastlr11norm_kernelI({one})Lb([01])ELi(\d+)EEEv", symbol):
        param, strided, capacity = found.groups()
        return Kernel("norm_kernel", "", types[param], "", strided == "1", capacity=int(capacity))
    if found := re.match(r"_ZN6fastlr\S*\d(shares_kernel|end_norm_kernel)E", symbol):
        return Kernel(found[1])
    raise ValueError(f"unknown kernel {symbol}")


def read_resources(library: Path) -> dict[str, dict[Kernel, Resources]]:
    """What each kernel takes, by architecture ("sm_90")."""
    found: dict[str, dict[Kernel, Resources]] = {}
    architecture = symbol = ""
    for line in run_tool("cuobjdump", "-res-usage", library).splitlines():
        if header := re.match(r"arch = (sm_\w+)", line):
            architecture = header[1]
        elif function := re.match(r"\s*Function (\S+):", line):
            symbol = function[1]
        elif usage := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            numbers = Resources(*map(int, usage.groups()))
            found.setdefault(architecture, {})[kernel_of(symbol)] = numbers
    return found


def disassemble(library: Path) -> dict[str, dict[Kernel, list[Instruction]]]:
    """Each kernel's instructions, by architecture; functions that it calls come at its end."""
    found: dict[str, dict[Kernel, list[Instruction]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        run_tool("cuobjdump", "-xelf", "all", library.resolve(), cwd=Path(folder))
        for cubin in sorted(Path(folder).glob("*.cubin")):
            architecture = re.search(r"\.(sm_\w+)\.cubin$", cubin.name)
            assert architecture is not None, cubin
            kernels = parse_disassembly(run_tool("nvdisasm", "-c", cubin))
            found.setdefault(architecture[1], {}).update(kernels)
    return found


def parse_disassembly(text: str) -> dict[Kernel, list[Instruction]]:
    kernels: dict[Kernel, list[Instruction]] = {}
    code: list[Instruction] = []
    labels: list[str] = []
    for line in text.splitlines():
        if section := re.match(r"//-+ \.text\.(\S+) -", line):
            code = kernels[kernel_of(section[1])] = []
        elif label := re.match(r"(\S+):$", line):
            labels.append(label[1])
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*(.*?)\s*;$", line):
            code.append(Instruction(tuple(labels), found[1] or "", found[2], found[3]))
            labels = []
    return kernels


def vector_accesses(code: list[Instruction]) -> tuple[int, int]:
    """128-bit loads from and stores to global memory; not those of what never changes, the schedules."""
    loads = sum(bool(re.match(r"LDG\.E\..*\b128\b(?!.*CONSTANT)", i.opcode)) for i in code)
    stores = sum(bool(re.match(r"STG\.E\..*\b128\b", i.opcode)) for i in code)
    return loads, stores


# -- the tables ----------------------------------------------------------------------------------


def launches(tensors: int, capacity: int) -> int:
    """Of a step on tensors of one storage type."""
    return -(-tensors // capacity)


def markdown(heads: list[str], rows: list[list[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def bytes_per_element(param: str, state: str, slots: int) -> int:
    """Reads parameter, gradient and so many slots of state, writes parameter and slots. An average is read
    and written as a slot is."""
    return 3 * ITEMSIZE[param] + 2 * slots * ITEMSIZE[state]


def range_of(numbers: Iterable[int]) -> str:
    """A number, or "70 to 72"."""
    found = sorted(numbers)
    low, high = found[0], found[-1]
    return str(low) if low == high else f"{low} to {high}"


def table_of_rule(
    rule: str,
    resources: dict[str, dict[Kernel, Resources]],
    disassembly: dict[str, dict[Kernel, list[Instruction]]],
) -> str:
    """Its kernels: one row for those that differ only in how many tensors a launch takes."""
    alike: dict[tuple[str, ...], list[Kernel]] = {}
    for kernel in sorted(next(iter(resources.values()))):
        if kernel.rule == rule:
            layout = ("strided" if kernel.strided else "dense") + (" with stages" if kernel.staged else "")
            what = (kernel.param, kernel.state, layout) if kernel.param else ("clock", "", "")
            alike.setdefault(what, []).append(kernel)
    rows: list[list[object]] = []
    for what, kernels in alike.items():
        vectors = {vector_accesses(disassembly[a][k]) for a in resources for k in kernels}
        texts = [f"{loads} + {stores}" for loads, stores in sorted(vectors)]
        registers = [range_of(resources[a][k].registers for k in kernels) for a in resources]
        rows.append([*what, ", ".join(texts) if what[1] else "", *registers])
    return markdown(["parameter", "state", "layout", "128-bit loads + stores", *resources], rows)


def report(
    resources: dict[str, dict[Kernel, Resources]], disassembly: dict[str, dict[Kernel, list[Instruction]]]
) -> str:
    """What :func:`read_resources` and :func:`disassemble` found, as tables."""
    resources = {a: resources[a] for a in sorted(resources, key=lambda name: int(name.removeprefix("sm_")))}
    steps = [kernel for kernel in next(iter(resources.values())) if kernel.name == "step_kernel"]
    rules = sorted({kernel.rule for kernel in steps})
    tables = "\n\n".join(f"### {rule}\n\n{table_of_rule(rule, resources, disassembly)}" for rule in rules)

    pairs = sorted({(kernel.param, kernel.state) for kernel in steps})
    of_pairs: list[list[object]] = [
        [*pair, *(bytes_per_element(*pair, slots) for slots in range(4))] for pair in pairs
    ]
    slots = ["parameter", "state", "no slot of state", "one", "two", "three"]

    capacities = sorted({kernel.capacity for kernel in steps})
    counts = {
        f"{n:,} ({name})": n
        for name, n in (("GPT-2 small", len(gpt2_small())), ("ResNet-50", len(resnet50())))
    }
    counts |= {"1,000": 1000, "5,000": 5000}
    of_counts: list[list[object]] = [
        [name, *(launches(tensors, capacity) for capacity in capacities)] for name, tensors in counts.items()
    ]
    used = [kernels[kernel] for kernels in resources.values() for kernel in steps]
    return f"""# What the compiler made of the CUDA kernels

From the machine code for {", ".join(resources)}; no GPU was needed, and nothing here is a timing.

## Registers of a thread, and vector accesses of a round

{tables}

State that is not live is neither read nor written. No step kernel takes more than \
{max(r.registers for r in used)} registers, so that at
least {min(r.resident_blocks() for r in used)} blocks of {THREADS} threads fit on a multiprocessor; stack \
and local memory of all of them together: {sum(r.stack + r.local for r in used)} bytes.

## Bytes that an element moves

{markdown(slots, of_pairs)}

Parameter, gradient and state are read, parameter and state written. An average is read and written as
well: 8 bytes more, of float64 16.

## Launches of a step, all tensors of one storage type

{markdown(["tensors", *(f"{c:,} a launch" for c in capacities)], of_counts)}

More than {capacities[0]} tensors a launch need CUDA 12.1, toolkit and driver.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--library", type=Path, help="default: the installed fastlr's")
    parser.add_argument("--out", type=Path, help="folder for cuda_static.md")
    arguments = parser.parse_args()

    library = arguments.library
    if library is None:
        import fastlr

        info = fastlr.build_info()
        if not info["cuda"]:
            print(f"This fastlr has no CUDA kernels: {info['cuda_status']}")
            return
        library = Path(fastlr._core.__file__)
    text = report(read_resources(library), disassemble(library))
    print(text, end="")
    if arguments.out:
        from fastlr._files import write_text

        arguments.out.mkdir(parents=True, exist_ok=True)
        write_text(arguments.out / "cuda_static.md", text)


if __name__ == "__main__":
    main()
