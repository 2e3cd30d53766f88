"""The ways to import an optimizer give one class, whatever asks for it."""

from __future__ import annotations

import copy
import importlib
import inspect
import multiprocessing
import os
import pickle
import pkgutil
import pydoc
import sys
import typing
import unittest
import unittest.mock
import warnings
from typing import Any

import pytest
import torch
from native import toolchain

import fastlr

OPTIMIZERS = [
    name
    for name in fastlr.optim.__all__
    if isinstance(getattr(fastlr, name), type) and issubclass(getattr(fastlr, name), torch.optim.Optimizer)
]


def imported(name: str) -> Any:
    """As `import fastlr.<name> as optimizer` binds it."""
    names: dict[str, Any] = {}
    exec(f"import fastlr.{name} as optimizer", names)
    return names["optimizer"]


def test_the_optimizers_are_found() -> None:
    assert {"FusedSGD", "FusedCyclicSGD"} <= set(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_way_gives_the_class(name: str) -> None:
    kind = getattr(fastlr, name)
    names: dict[str, Any] = {}
    exec(f"from fastlr import {name} as first\nimport fastlr.{name}", names)
    assert imported(name) is names["first"] is getattr(names["fastlr"], name) is kind
    assert importlib.import_module(f"fastlr.{name}") is kind
    assert pkgutil.resolve_name(f"fastlr.{name}") is pkgutil.resolve_name(f"fastlr:{name}") is kind
    assert pydoc.locate(f"fastlr.{name}") is kind


STATEMENTS = ("import fastlr.{0} as found", "from fastlr import {0} as found")
# Imports PyTorch once, and then in a process each what the arguments say; the exit statuses, a line each.
FORKS = """
import os, sys, traceback, torch
assert not any(name.split(".")[0] == "fastlr" for name in sys.modules)
for code in sys.argv[1:]:
    sys.stdout.flush()
    if (process := os.fork()) == 0:
        try:
            exec(code, {"__name__": "statement"})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""
# From Python 3.12 on a fork warns of threads, of which NumPy's linear algebra has some.
FRESH = (sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning", "-c")


def code_of(name: str, statement: str) -> str:
    return f"{statement.format(name)}; import fastlr; assert found is fastlr.{name}, found"


@pytest.fixture(scope="module")
def first_imports() -> dict[str, str]:
    """Exit status by code."""
    codes = [code_of(name, statement) for name in OPTIMIZERS for statement in STATEMENTS]
    said = toolchain.run_or_fail(*FRESH, FORKS, *codes, cwd=toolchain.TESTS)
    return dict(zip(codes, said.split(), strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("statement", STATEMENTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_first_import_of_a_process(first_imports: dict[str, str], name: str, statement: str) -> None:
    assert first_imports[code_of(name, statement)] == "0"


@pytest.mark.parametrize("statement", STATEMENTS)
def test_the_first_import_of_a_process_before_pytorchs(statement: str) -> None:
    toolchain.run_or_fail(*FRESH, code_of("FusedCyclicSGD", statement), cwd=toolchain.TESTS)


def built(kind: Any) -> Any:
    return kind([torch.nn.Parameter(torch.ones(2))], base_lr=0.1, max_lr=0.5, step_size_up=4)


def test_it_builds_copies_and_pickles_as_the_class() -> None:
    optimizer = imported("FusedCyclicSGD")
    opt = built(optimizer)
    for one in (opt, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert type(one) is optimizer
        assert isinstance(one, imported("FusedSGD"))
        assert isinstance(one, torch.optim.Optimizer)
    assert copy.deepcopy(optimizer) is pickle.loads(pickle.dumps(optimizer)) is optimizer


def test_a_spawned_process_imports_it() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(imported, ("FusedCyclicSGD",)) is fastlr.FusedCyclicSGD


def test_help_and_completion_see_the_class() -> None:
    optimizer = imported("FusedCyclicSGD")
    assert inspect.getmodule(optimizer) is sys.modules["fastlr.optim.cyclic"]
    assert inspect.getsource(optimizer).startswith("class FusedCyclicSGD(")
    assert "step_size_up" in inspect.signature(optimizer).parameters
    assert {"lr", "momentum", "step_options"} <= typing.get_type_hints(fastlr.FusedSGD.__init__).keys()
    assert {"step", "set_schedule", "from_range_test"} <= set(dir(optimizer))
    assert "FusedCyclicSGD" in dir(fastlr)
    assert "step_size_up" in pydoc.render_doc("fastlr.FusedCyclicSGD")


def test_what_walks_all_modules_walks_over_it() -> None:
    class Warns(unittest.TestCase):
        def runTest(self) -> None:
            with self.assertWarns(UserWarning):  # resets every module's __warningregistry__
                warnings.warn("a warning", stacklevel=1)

    result = unittest.TestResult()
    Warns().run(result)
    assert result.wasSuccessful(), result
    assert pickle.whichmodule(fastlr.one_cycle, "one_cycle") == "fastlr.schedules.cyclic"
    assert all(module.ispkg or module.name for module in pkgutil.walk_packages(fastlr.__path__, "fastlr."))
    with unittest.mock.patch("fastlr.FusedCyclicSGD.from_range_test", 3):
        assert fastlr.FusedCyclicSGD.from_range_test == 3
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    assert compiled(torch.zeros(1)).item() == 1.0


def test_it_is_no_package() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"'fastlr\.FusedSGD' is not a package"):
        importlib.import_module("fastlr.FusedSGD.step")


def test_reloading_the_package_keeps_the_class() -> None:
    kind = fastlr.FusedCyclicSGD
    importlib.reload(fastlr)
    assert imported("FusedCyclicSGD") is fastlr.FusedCyclicSGD is kind
