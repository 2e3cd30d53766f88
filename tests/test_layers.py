"""Imports within the package point down only, close no circle, and leave other packages' private names alone.

Imports in functions and those for type checkers alone count as any other: they are what a reader has to know.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

import fastlr

ROOT = "fastlr"

# From the bottom up: what is imported stands below what imports it. What stands side by side does not import
# each other. "" is the package itself, which gathers what users import.
LAYERS = (
    ("_core",),
    ("_distributed",),
    (
        "_checks",
        "_extras",
        "_files",
        "_tables",
        "_build",
        "_exchange",
        "_runtime",
        "_progress",
        "_statistics",
        "data",
        "plotting",
    ),
    ("schedules",),
    ("optim",),
    ("range_test", "batch_growth"),
    ("integrations", "_training"),
    ("",),
    ("bench", "demo", "doctor"),
    ("cli",),
    ("__main__",),
)
LEVEL = {part: level for level, layer in enumerate(LAYERS) for part in layer}

# Private to the package, but not to a part of it.
EVERYBODYS = {part for part in LEVEL if part.startswith("_") and part != "__main__"}


class Import(NamedTuple):
    module: str  # that is imported
    name: str | None  # out of it, where it is no module itself


def modules_of(files: Iterable[str]) -> dict[str, str]:
    """The module that each file holds, by paths relative to the package."""
    return {
        file: ".".join((ROOT, *Path(file).with_suffix("").parts)).removesuffix(".__init__") for file in files
    }


def imports(file: str, source: str, modules: Mapping[str, str]) -> Iterator[Import]:
    """What of the package a file imports, wherever in it that stands."""
    known = set(modules.values())
    package = modules[file].split(".")[: None if Path(file).stem == "__init__" else -1]

    def module(name: str) -> Import:
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            if (found := ".".join(parts[:end])) in known:
                return Import(found, parts[end] if end < len(parts) else None)
        raise AssertionError(f"{file} imports {name}, which is nowhere")

    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [base if alias.name == "*" else f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        yield from (module(name) for name in names if name.split(".")[0] == ROOT)


def part(module: str) -> str:
    """The part of the package that a module belongs to; "": the package itself."""
    return [*module.split("."), ""][1]


def findings(sources: Mapping[str, str]) -> set[str]:
    """What is wrong with the imports of files, by their paths relative to the package."""
    modules = modules_of(sources)
    found = {f"{module} stands in no layer" for module in modules.values() if part(module) not in LEVEL}
    if found:
        return found
    graph: dict[str, set[str]] = {module: set() for module in modules.values()}
    for file, importer in modules.items():
        for target, name in imports(file, sources[file], modules):
            graph[importer].add(target)
            mine, theirs = part(importer), part(target)
            if mine == theirs:
                continue
            wanted = target if name is None else f"{target}.{name}"
            if LEVEL[theirs] > LEVEL[mine]:
                found.add(f"{importer} imports {wanted}, from a layer above")
            elif LEVEL[theirs] == LEVEL[mine] and theirs not in EVERYBODYS:
                found.add(f"{importer} imports {wanted}, from beside it")
            below = wanted.split(".")[2 if theirs in EVERYBODYS else 1 :]
            if any(word.startswith("_") and not word.endswith("__") for word in below):
                found.add(f"{importer} imports {wanted}, private to {ROOT}.{theirs}".removesuffix("."))
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.add(f"imports in a circle: {' <- '.join(error.args[1])}")
    return found


def package_sources() -> dict[str, str]:
    folder = Path(fastlr.__file__).parent
    files = [file for pattern in ("*.py", "*.pyi") for file in folder.rglob(pattern)]
    return {file.relative_to(folder).as_posix(): file.read_text("utf-8") for file in files}


def test_imports_of_the_package_are_in_order() -> None:
    assert findings(package_sources()) == set()


# -- the checker itself --------------------------------------------------------------------------------

EMPTY = {
    "__init__.py": "",
    "_core.pyi": "",
    "_checks.py": "",
    "plotting/__init__.py": "",
    "plotting/frame.py": "",
    "schedules/__init__.py": "",
    "schedules/_base.py": "",
    "schedules/decay.py": "",
    "optim/__init__.py": "",
    "optim/_groups.py": "",
    "range_test/__init__.py": "",
    "batch_growth/__init__.py": "",
    "batch_growth/plan.py": "",
    "cli.py": "",
}

GOOD = {
    "down": ("schedules/decay.py", "from fastlr import _core\nfrom fastlr._checks import count"),
    "everybody's, beside it": ("plotting/frame.py", "from fastlr._checks import count"),
    "within a package, private": ("schedules/decay.py", "from fastlr.schedules._base import _Held"),
    "within a package, relative": ("schedules/decay.py", "from . import _base\nfrom ._base import Schedule"),
    "a package below, relative": ("schedules/decay.py", "from ..plotting import frame"),
    "the whole": ("cli.py", "import fastlr\nfrom fastlr import __version__"),
    "others": ("_checks.py", "import torch\nfrom torch._utils import _pair\nfrom . import _core"),
    "a file called alike": ("_checks.py", "import fastlrs.optim"),
}

UP = "from a layer above"
BAD = {
    "up": ("schedules/decay.py", "import fastlr.optim", UP),
    "up, a name": ("schedules/decay.py", "from fastlr.optim import FusedSGD", UP),
    "up, a module": ("schedules/decay.py", "from fastlr import optim", UP),
    "up, all names": ("schedules/decay.py", "from fastlr.optim import *", UP),
    "up, relative": ("schedules/decay.py", "from .. import optim", UP),
    "up, relative, a name": ("schedules/decay.py", "from ..optim import FusedSGD", UP),
    "up, of a package's own file": ("schedules/__init__.py", "from ..optim import FusedSGD", UP),
    "up, in a function": (
        "schedules/decay.py",
        "def f():\n    def g():\n        from fastlr import optim",
        UP,
    ),
    "up, for type checkers": (
        "plotting/frame.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fastlr.batch_growth import BatchPlan",
        UP,
    ),
    "up, by a call": ("_checks.py", "import importlib\nimportlib.import_module('fastlr.optim')", UP),
    "up, the whole": ("optim/__init__.py", "import fastlr", UP),
    "up, a name of the whole": ("optim/__init__.py", "from fastlr import range_test_grid", UP),
    "up, in a stub": ("_core.pyi", "from fastlr._checks import count", UP),
    "siblings": ("batch_growth/plan.py", "from fastlr.range_test import range_test", "from beside it"),
    "private module": (
        "batch_growth/plan.py",
        "from fastlr.optim._groups import values",
        "private to fastlr.optim",
    ),
    "private module, as a name": (
        "batch_growth/plan.py",
        "from fastlr.optim import _groups",
        "private to fastlr.optim",
    ),
    "private module, relative": (
        "batch_growth/plan.py",
        "from ..optim import _groups",
        "private to fastlr.optim",
    ),
    "private name": (
        "batch_growth/plan.py",
        "from fastlr.schedules.decay import _power",
        "private to fastlr.schedules",
    ),
    "private name of everybody's": (
        "optim/__init__.py",
        "from fastlr._checks import _real",
        "private to fastlr._checks",
    ),
    "no layer": ("extras.py", "", "stands in no layer"),
    "itself": ("optim/__init__.py", "from fastlr.optim import Clock", "in a circle"),
}


@pytest.mark.parametrize(("file", "source"), GOOD.values(), ids=GOOD.keys())
def test_what_is_in_order_is_let_pass(file: str, source: str) -> None:
    assert findings({**EMPTY, file: source}) == set()


@pytest.mark.parametrize(("file", "source", "message"), BAD.values(), ids=BAD.keys())
def test_what_is_not_in_order_is_found(file: str, source: str, message: str) -> None:
    (found,) = findings({**EMPTY, file: source})
    assert message in found


CIRCLES = {
    "two modules": {
        "schedules/_base.py": "from fastlr.schedules import decay",
        "schedules/decay.py": "from fastlr.schedules._base import Schedule",
    },
    "in a function": {
        "schedules/_base.py": "def f():\n    from fastlr.schedules import decay",
        "schedules/decay.py": "from . import _base",
    },
    "through the package": {
        "schedules/__init__.py": "from fastlr.schedules._base import Schedule",
        "schedules/_base.py": "from fastlr import schedules",
    },
    "three modules": {
        "schedules/__init__.py": "from fastlr.schedules.decay import Constant",
        "schedules/decay.py": "from fastlr.schedules._base import Schedule",
        "schedules/_base.py": "from fastlr.schedules import Constant",
    },
}


@pytest.mark.parametrize("sources", CIRCLES.values(), ids=CIRCLES.keys())
def test_circles_are_found(sources: dict[str, str]) -> None:
    (found,) = findings({**EMPTY, **sources})
    assert "in a circle" in found
