"""Every example in a docstring, in the README and in the guides runs and says what it prints."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import runpy
from pathlib import Path
from types import ModuleType
from typing import Any

import memory_table
import pytest
import torch
import torchvision_without_cuda  # noqa: F401  # which frameworks import
from pages import DOCS, GUIDES, blocks_of

import fastlr
from fastlr.optim._groups import OF_ALL_GROUPS, StepOptions

MODULES = ["fastlr", *(m.name for m in pkgutil.walk_packages(fastlr.__path__, "fastlr."))]
MODULES = [name for name in MODULES if not name.endswith("__main__")]
README = Path(__file__).parent.parent / "README.md"


def imported(name: str) -> ModuleType:
    """Skips the test of a module for a framework that is not there."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not name.startswith("fastlr.integrations.") or str(error.name).startswith("fastlr"):
            raise
        pytest.skip(f"{error.name} is not installed")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what frameworks import
@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = imported(name)
    if not hasattr(module, "__file__") or module.__file__.endswith(".so"):
        pytest.skip("native code: its examples stand in Python")
    result = doctest.testmod(module)
    assert result.failed == 0


def test_the_examples_are_many() -> None:
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(name) for name in MODULES if "integrations." not in name]
    examples = sum(len(t.examples) for m in modules for t in finder.find(m))
    assert examples > 40


def test_the_options_of_every_optimizer_are_listed_in_one_place() -> None:
    assert fastlr.optim.__doc__ is not None
    listed = re.findall(r"^    (\w+): ", fastlr.optim.__doc__, flags=re.MULTILINE)
    assert sorted(listed) == sorted(StepOptions.__annotations__)
    by_group = fastlr.optim.__doc__.index("a parameter group may have its own:")
    for name in listed:
        place = fastlr.optim.__doc__.index(f"\n    {name}: ")
        assert (place < by_group) == (name in OF_ALL_GROUPS), name


OPTIMIZERS = [getattr(fastlr.optim, name) for name in fastlr.optim.__all__ if name.startswith("Fused")]
OPTIMIZERS.remove(fastlr.FusedOptimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_every_optimizer_says_where_its_other_options_are(optimizer: type[fastlr.FusedOptimizer]) -> None:
    assert optimizer.__doc__ is not None
    assert "what every optimizer takes (clipping, averages)" in optimizer.__doc__.lower()
    assert ":mod:`fastlr.optim`" in optimizer.__doc__


def guides_examples() -> dict[str, str]:
    """The blocks of the README and the guides, by page and first line."""
    pages = {"README.md": README, **{page: DOCS / page for page in GUIDES}}
    return {
        f"{name}, {number}, {block.splitlines()[0][:40]}": block
        for name, page in pages.items()
        for number, block in enumerate(blocks_of(page))
    }


@pytest.mark.parametrize("example", guides_examples().values(), ids=guides_examples().keys())
def test_guides_examples(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block runs by itself, with a model, a loss and a loader as any reader has them."""
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(4, 3)
    data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(0, 3, (64,)))
    names = {
        "model": model,
        "loss_fn": torch.nn.functional.cross_entropy,
        "loader": torch.utils.data.DataLoader(data, batch_size=16, shuffle=True),
        "val_loader": torch.utils.data.DataLoader(data, batch_size=16),
        "torch": torch,
        "fastlr": fastlr,
    }
    exec(compile(example, "a guide", "exec"), names)


@pytest.mark.parametrize("page", ["README.md", *GUIDES])
def test_guides_have_examples(page: str) -> None:
    assert any(name.startswith(f"{page}, ") for name in guides_examples())


def table_rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the table under that heading's row."""
    lines = (DOCS / page).read_text("utf-8").splitlines()
    begin = lines.index(heading) + 2
    end = next(i for i in range(begin, len(lines)) if not lines[i].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[begin:end]]


def test_options_in_the_table_of_policies_do_what_they_say() -> None:
    """Whole calls are made, and what are arguments is given to an optimizer."""
    tried = 0
    for _, cell in table_rows("policies.md", "| in a paper or a course | here |"):
        for code in re.findall(r"`([^`]+)`", cell):
            if code.startswith("lr, momentum = ") or re.fullmatch(r"fastlr\.\w+\(.*\)", code):
                if "..." not in code and "model" not in code and "schedule" not in code:
                    exec(code, {"fastlr": fastlr})
                    tried += 1
            elif re.match(r"\w+=", code):
                arguments = eval(f"dict({code})", {"fastlr": fastlr})
                kind: Any = fastlr.FusedSGD
                if {"mode", "gamma", "interpolation"} & set(arguments):
                    kind, arguments = fastlr.FusedCyclicSGD, arguments | {"base_lr": 0.001, "max_lr": 0.006}
                if "cautious" in arguments:
                    kind = fastlr.FusedAdamW
                kind(torch.nn.Linear(4, 3).parameters(), **arguments)
                tried += 1
    assert tried >= 18


def test_plans_in_the_table_have_these_updates() -> None:
    schedule = fastlr.MultiStep(0.1, [60, 120, 160], 0.2, unit="epoch")
    rows = table_rows("growing.md", "| plan for this schedule | options | updates | the paper reports |")
    for _, options, updates, _ in rows:
        plan = fastlr.BatchPlan.from_schedule(
            schedule,
            batch_size=128,
            dataset_size=50_000,
            epochs=200,
            momentum=0.9,
            **eval(f"dict({options.replace('`', '')})"),
        )
        assert f"{plan.total_updates:,}" == updates
    assert len(rows) == 5


@pytest.mark.parametrize("script", sorted((DOCS / "gallery").glob("*.py")), ids=lambda script: script.stem)
def test_gallery_draws(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    monkeypatch.chdir(tmp_path)
    rng = torch.get_rng_state()
    runpy.run_path(str(script))["figure"].savefig("drawn.png")
    torch.set_rng_state(rng)


def test_the_memory_that_the_page_names_is_taken_up() -> None:
    assert memory_table.in_page() == memory_table.table(), "python memory_table.py writes it anew"


@pytest.mark.parametrize("script", ["gpu_report", "report"])
def test_figures_are_those_of_the_results(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(README.parent / "benchmarks")
    report = importlib.import_module(script)
    for name, table in report.tables().items():
        written = report.between_marks(name)
        assert written == table, f"python benchmarks/{script}.py --write"


def test_what_no_gpu_has_shown_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(README.parent / "benchmarks")
    gpu_report, report = (importlib.import_module(name) for name in ("gpu_report", "report"))
    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path)
    assert set(gpu_report.tables().values()) == {gpu_report.NOT_MEASURED}
    rows = [row for row in report.beside_torch().splitlines() if "make gpu" in row]
    assert len(rows) == len(report.ON_GPU)
    assert all("a GPU | not measured | not measured |" in row for row in rows)


def test_the_readme_tells_what_the_other_benchmarks_found() -> None:
    readme, guide = README.read_text("utf-8"), (DOCS / "range_test.md").read_text("utf-8")
    results = (README.parent / "benchmarks" / "results" / "range_test.md").read_text("utf-8")
    best = re.findall(
        r"^\| ([\w-]+) \| (range test|by hand, .*the best of these) \|.* (\S+ %) \|$", results, re.M
    )
    assert [(data, how.split(",")[0]) for data, how, _ in best] == [
        (data, how) for data in ("digits", "fashion-mnist") for how in ("range test", "by hand")
    ]
    for _, _, accuracy in best:
        assert accuracy in readme
        assert accuracy in guide
    verdicts = re.findall(
        r"^\| .* \| (holds|holds partly|does not hold) \|$", (DOCS / "claims.md").read_text("utf-8"), re.M
    )
    assert (len(verdicts), verdicts.count("holds"), verdicts.count("holds partly")) == (7, 1, 6)
    assert "of seven | holds in full: one; partly: six" in readme
