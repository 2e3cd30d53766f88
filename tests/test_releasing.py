"""What builds, tests and publishes a release names what there is, and says the same everywhere."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from native import toolchain

import fastlr

yaml = pytest.importorskip("yaml", reason="reads YAML")
if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="reads TOML")

ROOT = toolchain.ROOT
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
with_workflows = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)

pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="a source distribution has no .github")


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def project() -> dict[str, Any]:
    return tomllib.loads(read("pyproject.toml"))


def steps(path: Path) -> Iterator[dict[str, Any]]:
    for job in yaml.safe_load(path.read_text("utf-8"))["jobs"].values():
        yield from job["steps"]


def targets() -> set[str]:
    return {
        name
        for names in re.findall(r"^([a-z][\w -]*):", read("Makefile"), re.MULTILINE)
        for name in names.split()
    }


def test_the_version_stands_in_one_place() -> None:
    version = project()["project"]["version"]
    assert (
        fastlr.__version__
        == fastlr.build_info()["version"]
        == importlib.metadata.version("fastlr")
        == version
    )
    others = [*(ROOT / "fastlr").rglob("*.py"), *(ROOT / "csrc").rglob("*.*")]
    others += [ROOT / name for name in ("CMakeLists.txt", "CITATION.cff", "Makefile")]
    assert len(others) > 100
    written = re.compile(rf"version\W{{1,6}}{re.escape(version)}\b", re.IGNORECASE)
    assert not [path for path in others if written.search(path.read_text("utf-8"))]


def test_the_changelog_begins_with_what_is_to_come_or_this_version() -> None:
    first = re.search(r"^## \[?([\w.]+)", read("CHANGELOG.md"), re.MULTILINE)
    assert first is not None
    assert first[1] in ("Unreleased", project()["project"]["version"])


@with_workflows
def test_a_workflow_names_what_there_is(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(list(steps(path))) > 2
    made = [name for step in steps(path) for name in re.findall(r"\bmake ([\w-]+)", step.get("run", ""))]
    assert set(made) <= targets()
    files = re.findall(r"(?<![\w/.-])((?:\.ci|\.github|tests|docs|benchmarks|examples)/[\w./-]*\w)", text)
    assert not [name for name in files if not (ROOT / name).exists()]
    used = [step["uses"] for step in steps(path) if "uses" in step]
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d[\w.]*", name) for name in used), used


def test_what_is_known_of_workflows_is_in_use() -> None:
    """Or the test above would look at nothing."""
    runs = "\n".join(step.get("run", "") for path in WORKFLOWS for step in steps(path))
    assert {".ci/run", "make wheel"} <= set(runs.splitlines())
    assert "make test TORCH=" in runs
    assert {"test", "lint", "wheel", "gpu"} <= targets()


def test_every_pytorch_that_is_named_is_the_same() -> None:
    """The oldest is what pip accepts."""
    with_torch = yaml.safe_load(read(".github/workflows/tests.yml"))["jobs"]["torch"]
    oldest, newest = (entry["torch"] for entry in with_torch["strategy"]["matrix"]["include"])
    (required,) = (r for r in project()["project"]["dependencies"] if r.startswith("torch"))
    assert f"{required}.0" == f"torch>={oldest}"
    pinned = re.search(r"torch==([\d.]+)", read(".ci/constraints.txt"))
    assert pinned is not None
    assert (
        [*map(int, oldest.split("."))] < [*map(int, pinned[1].split("."))] <= [*map(int, newest.split("."))]
    )


def test_another_pytorch_has_an_environment_of_its_own() -> None:
    command = ("make", "--dry-run", "--always-make", "-C", ROOT, "test")
    toolchain.tool("make")
    # Not what a make that runs this was told.
    environment = {
        k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "EXTRAS")
    }
    said = toolchain.run_or_fail(*command, "TORCH=2.6.0", env=environment)
    assert re.search(r'\.venv-torch-2\.6\.0/bin/pip install --quiet "torch==2\.6\.0" "\.\[test,lint\]"', said)
    assert ".venv-torch-2.6.0/bin/pytest" in said
    assert "torch==" not in toolchain.run_or_fail(*command, env=environment)


def test_the_wheel_is_repaired_and_tried_alike_everywhere() -> None:
    settings, makefile = project()["tool"]["cibuildwheel"], read("Makefile")
    repair = settings["linux"]["repair-wheel-command"]
    excluded = re.findall(r"--exclude (\S+)", repair)
    assert len(excluded) == 5
    assert excluded == re.findall(r"--exclude '(\S+)'", makefile)
    tried = settings["test-command"].removeprefix("python {project}/")
    assert (ROOT / tried).exists()
    assert f"/{tried}" in makefile


HELP = "from fastlr.cli import main; main(['--help'])"

IDENTIFIERS = {
    "linux": ("x86_64", "manylinux_x86_64"),
    "linux-arm": ("aarch64", "manylinux_aarch64"),
    "macos": ("arm64", "macosx_arm64"),
    "windows": ("AMD64", "win_amd64"),
}


@pytest.mark.parametrize("system", IDENTIFIERS)
def test_cibuildwheel_builds_for_every_python_where_there_is_pytorch(system: str) -> None:
    if importlib.util.find_spec("cibuildwheel") is None:
        pytest.skip("needs cibuildwheel")
    machine, platform = IDENTIFIERS[system]
    said = toolchain.run_or_fail(
        *(sys.executable, "-m", "cibuildwheel", "--print-build-identifiers"),
        *("--platform", system.removesuffix("-arm"), "--archs", machine, ROOT),
    )
    pythons = [line.removesuffix(f"-{platform}") for line in said.split()]
    assert pythons == ["cp310", "cp311", "cp312", "cp313", "cp314"]
    wheels = yaml.safe_load(read(".github/workflows/wheels.yml"))
    assert wheels["jobs"]["cuda"]["strategy"]["matrix"]["python"] == pythons


def test_the_tests_ask_the_cibuildwheel_that_the_workflow_runs() -> None:
    wheels = yaml.safe_load(read(".github/workflows/wheels.yml"))
    needed = project()["project"]["optional-dependencies"]["test"]
    (tried,) = (r for r in needed if r.startswith("cibuildwheel"))
    assert tried.partition(";")[0] == wheels["env"]["CIBUILDWHEEL"]


def test_pre_commit_runs_make_lint() -> None:
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    (hook,) = repository["hooks"]
    assert (repository["repo"], hook["entry"], hook["pass_filenames"]) == ("local", "make lint", False)


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github").glob("ISSUE_TEMPLATE/*.yml")), ids=lambda p: p.stem
)
def test_a_form_asks_for_what_it_can_show(path: Path) -> None:
    form = yaml.safe_load(path.read_text("utf-8"))
    if path.stem == "config":
        assert form["blank_issues_enabled"] in (True, False)
        return
    assert form.keys() >= {"name", "description", "body"}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    names = [field["id"] for field in fields]
    assert len(set(names)) == len(names) > 0
    assert all(field["attributes"]["label"] for field in fields)
    commands = re.findall(r"`fastlr ([\w-]+)", path.read_text("utf-8"))
    said = toolchain.run(sys.executable, "-c", HELP, cwd=toolchain.TESTS).stdout
    assert not [name for name in commands if name not in said]
