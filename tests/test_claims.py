"""The claims' runner on tiny settings, stopped and gone on; what a verdict is made of, on made-up figures."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from native import toolchain

import fastlr
from fastlr import data
from fastlr._statistics import compared, spread

pytest.importorskip("scipy", reason="intervals come from scipy")

FOLDER = toolchain.ROOT / "benchmarks" / "claims"
NAMES = sorted(
    path.stem
    for path in FOLDER.glob("*.py")
    if path.read_text("utf-8").rstrip().split("\n")[-1][:7] == "claim ="
)
VERDICTS = ("holds", "holds partly", "does not hold here")

Load = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def runner(load_claims: Load) -> ModuleType:
    return load_claims("runner")


def tiny(runner: ModuleType, name: str, **changes: Any) -> tuple[Any, Any]:
    """A claim, and a setting in which it takes a second."""
    claim = runner.load(name)
    options = {"seeds": 2, "scale": 0.02, "quick": True, **changes}
    return claim, runner.Setting(claim.data[0] if claim.data else None, **options)


def silent(name: str, total: int) -> Callable[[], object]:
    return lambda: None


def run(runner: ModuleType, name: str, out: Path, workers: int = 0) -> dict[str, Any]:
    """The JSON of a claim, without what was measured."""
    claim, setting = tiny(runner, name)
    with runner.pool(workers) as submit:
        runner.run_claim(claim, setting, out, submit, silent)
    return content(out / f"{runner.stem(claim, setting)}.json")


def content(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text("utf-8"))
    del loaded["measured"]
    return loaded


# -- every claim -------------------------------------------------------------------------------------


def test_every_claim_has_a_name_that_runs_it(load_claims: Load):
    assert sorted(load_claims("__main__").NAMES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_claim_writes_figures_tables_and_a_picture(
    runner: ModuleType, load_claims: Load, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if name == "batch_growth":  # whose noise takes longer to measure than its networks to train
        monkeypatch.setattr(load_claims(name), "PROBE", (64, 256, 2))
    claim, setting = tiny(runner, name)
    found = run(runner, name, tmp_path)
    stem = runner.stem(claim, setting)
    assert claim.name == name
    assert found["verdict"] in VERDICTS
    assert all(isinstance(statement["holds"], bool) for statement in found["statements"])
    assert [run["job"] for run in found["runs"]] == claim.jobs(setting)
    for table in found["tables"]:
        assert len({len(row) for row in table["rows"]}) == 1
        assert len(table["rows"]) > 1
    assert (tmp_path / f"{stem}.png").stat().st_size > 2000
    page = (tmp_path / f"{stem}.md").read_text("utf-8")
    for text in (claim.title, claim.rule, claim.paper_says, claim.paper, found["statements"][0]["text"]):
        assert text in page


@pytest.mark.parametrize("name", NAMES)
def test_no_two_jobs_are_alike(runner: ModuleType, name: str):
    for changes in ({}, {"quick": False, "seeds": 3}):
        claim, setting = tiny(runner, name, **changes)
        jobs = [json.dumps(job, sort_keys=True) for job in claim.jobs(setting)]
        assert len(set(jobs)) == len(jobs)


# -- stopped and gone on -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def out_of_whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def whole(runner: ModuleType, out_of_whole: Path) -> dict[str, Any]:
    return run(runner, "super_convergence", out_of_whole)


def test_processes_change_nothing(runner: ModuleType, whole: dict[str, Any], tmp_path: Path):
    assert run(runner, "super_convergence", tmp_path, workers=2) == whole


KILLED = """
import sys
from pathlib import Path
from test_claims import run
sys.path.insert(0, {root!r})
from benchmarks.claims import runner
run(runner, "super_convergence", Path({out!r}))
"""


def test_a_killed_run_goes_on(runner: ModuleType, whole: dict[str, Any], tmp_path: Path):
    path = runner.finished_path(*tiny(runner, "super_convergence"), tmp_path)
    code = KILLED.format(root=str(toolchain.ROOT), out=str(tmp_path))
    places = os.pathsep.join((str(Path(__file__).parent), str(Path(fastlr.__file__).parents[1])))
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": places}, cwd=tmp_path
    )  # not where the sources lie, whose native code may be built elsewhere
    lines = random.Random(0).randrange(3, 30)
    while process.poll() is None and not (path.exists() and path.read_text("utf-8").count("\n") > lines):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(tmp_path.glob("*.json"))
    done = path.read_text("utf-8").count("\n") - 1
    assert lines <= done < len(whole["runs"])
    assert run(runner, "super_convergence", tmp_path) == whole


@pytest.mark.parametrize("seed", range(4))
def test_a_line_that_was_cut_short_is_run_again(
    runner: ModuleType,
    whole: dict[str, Any],
    out_of_whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
):
    path = runner.finished_path(*tiny(runner, "super_convergence"), tmp_path)
    written = (out_of_whole / path.name).read_bytes()
    kept = written[: random.Random(seed).randrange(len(written))]
    path.write_bytes(kept)
    trained = []
    work = runner._work
    monkeypatch.setattr(runner, "_work", lambda *arguments: trained.append(1) or work(*arguments))
    assert run(runner, "super_convergence", tmp_path) == whole
    assert len(trained) == len(whole["runs"]) - max(0, kept.count(b"\n") - 1)


def test_runs_of_another_setting_do_not_count(runner: ModuleType, tmp_path: Path):
    claim, setting = tiny(runner, "super_convergence")
    path = tmp_path / "runs.jsonl"
    made_with = runner._made_with(claim, setting)
    runner.Finished(path, made_with).add(runner.Run({"seed": 0}, {}, {}))
    assert {"seed": 0} in runner.Finished(path, made_with)
    for other in ({**made_with, "source": "another"}, {**made_with, "torch": "1.0"}):
        begun = runner.Finished(path, other)
        assert {"seed": 0} not in begun
        assert {"seed": 0} in runner.Finished(path, made_with)  # nothing has been run with the other yet
        begun.add(runner.Run({"seed": 1}, {}, {}))
        assert {"seed": 0} not in runner.Finished(path, made_with)  # begun anew, for good
        runner.Finished(path, made_with).add(runner.Run({"seed": 0}, {}, {}))


def test_settings_keep_their_runs_apart(runner: ModuleType, tmp_path: Path):
    claim, setting = tiny(runner, "super_convergence")
    others = [setting, *(replace(setting, **change) for change in ({"seeds": 3}, {"device": "cuda"}))]
    assert len({runner.finished_path(claim, other, tmp_path) for other in others}) == 3


def test_a_damaged_line_does_not_count(runner: ModuleType, tmp_path: Path):
    made_with = runner._made_with(*tiny(runner, "super_convergence"))
    finished = runner.Finished(path := tmp_path / "runs.jsonl", made_with)
    for seed in range(3):
        finished.add(runner.Run({"seed": seed}, {}, {}))
    lines = path.read_bytes().split(b"\n")
    for damage in (b"\xff", lines[2][:-1], b'{"job": 3}', b"[]"):
        path.write_bytes(b"\n".join([*lines[:2], damage, *lines[3:]]))
        found = runner.Finished(path, made_with)
        assert [{"seed": seed} in found for seed in range(3)] == [True, False, True]


def test_what_decides_a_figure_is_told(runner: ModuleType, monkeypatch):
    claim, setting = tiny(runner, "super_convergence")
    before = runner._made_with(claim, setting)
    digits, load = data.load(), data.load
    changed = replace(digits, y_test=digits.y_test.flip(0))
    monkeypatch.setattr(data, "load", lambda *arguments: changed)
    runner._data_digest.cache_clear()
    assert (
        runner._made_with(claim, setting) == {**before, "data": runner._data_digest("digits", None)} != before
    )
    monkeypatch.setattr(data, "load", load)
    runner._data_digest.cache_clear()
    assert runner._made_with(claim, setting) == before


def test_a_job_that_fails_is_named(runner: ModuleType):
    _, setting = tiny(runner, "super_convergence")
    with (
        runner.pool(0) as submit,
        pytest.raises(RuntimeError, match=r"super_convergence, job \{'policy': 'none'.*'budget'"),
    ):
        list(submit("super_convergence", setting, [{"policy": "none"}]))


# -- the command -------------------------------------------------------------------------------------


def test_the_command_writes_and_draws_anew(load_claims: Load, tmp_path: Path, capsys, monkeypatch):
    main = load_claims("__main__")
    monkeypatch.setattr(main.runner, "QUICK", {"seeds": 2, "scale": 0.02, "quick": True})
    arguments = ["super_convergence", "--quick", "--workers", "0", "--out", str(tmp_path)]
    main.main(arguments)
    assert "super_convergence: " in capsys.readouterr().out
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(files) == [f"super_convergence-digits.{suffix}" for suffix in ("json", "md", "png")]
    for name in files:
        if not name.endswith(".json"):
            (tmp_path / name).unlink()
    main.main([*arguments, "--redraw"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


REFUSED = {
    "no such claim": "no claim is called no such claim",
    "--seeds 3": "say where they go with --out",
    "--seeds 1 --out {out}": "must be at least 2, got 1",
    "--workers -1": "must be at least 0, got -1",
    "cyclic --device nonsense": "nonsense",
    "cyclic --folder {out}": "digits come with scikit-learn",
    "cyclic --data fashion-mnist --folder {out}": "no train-images-idx3-ubyte",
    "--data cifar10": "cifar10 needs a path",
    "saddles --out {file}": "File exists",
    "--docs cyclic": "--docs makes the page of all claims",
    "--docs --quick": "--docs makes the page of all claims",
    "--docs --out {out}": "no results of saddles in",
    "--seeds 4 --out {out}": "fewer than 5 seeds",
    "--redraw --out {out}": "No such file",
    "--redraw --device meta": "go with no --seeds and no --device",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_cannot_be_is_refused_before_anything_runs(
    load_claims: Load, tmp_path: Path, capsys, monkeypatch, arguments
):
    main, file = load_claims("__main__"), tmp_path / "file"
    monkeypatch.chdir(tmp_path)
    file.write_text("")
    with pytest.raises(SystemExit) as stopped:
        main.main(
            [
                part.format(out=tmp_path, file=file)
                for part in ([arguments] if arguments.startswith("no") else arguments.split())
            ]
        )
    assert stopped.value.code == 2
    assert REFUSED[arguments] in capsys.readouterr().err
    assert list(tmp_path.rglob("*.*")) == []


def test_the_page_of_all_claims_is_made_from_their_files(
    load_claims: Load, runner: ModuleType, tmp_path: Path, monkeypatch
):
    main, results = load_claims("__main__"), tmp_path / "results"
    found = run(runner, "super_convergence", results)
    monkeypatch.setattr(main, "DOCS", tmp_path / "docs" / "claims.md")
    monkeypatch.setattr(main, "NAMES", ("super_convergence",))
    main.DOCS.parent.mkdir()
    with pytest.raises(SystemExit):
        main.main(["--docs", "--out", str(results)])  # of a quick run
    (written,) = results.glob("*.json")
    written.write_text(written.read_text("utf-8").replace('"quick": true', '"quick": false'))
    main.main(["--docs", "--out", str(results)])
    page = main.DOCS.read_text("utf-8")
    assert page.count("## One cycle at a large rate") == page.count("## ") == 1
    assert all(statement["text"] in page for statement in found["statements"])
    (picture,) = re.findall(r"!\[.*\]\((.*)\)", page)
    assert (main.DOCS.parent / picture).exists()


def test_the_page_in_the_documentation_is_that_of_the_results(
    load_claims: Load, runner: ModuleType, tmp_path: Path
):
    main, page = load_claims("__main__"), tmp_path / "claims.md"
    claims = list(map(runner.load, main.NAMES))
    results, kept = toolchain.ROOT / main.OUT, toolchain.ROOT / main.DOCS
    runner.write_docs(claims, results, page)
    from_docs, from_here = (os.path.relpath(results, path.parent) for path in (kept, page))
    assert page.read_text("utf-8").replace(from_here, from_docs) == kept.read_text("utf-8")
    for picture in re.findall(r"!\[.*\]\((.*)\)", kept.read_text("utf-8")):
        assert (kept.parent / picture).exists()
    for claim in claims:
        setting = runner.Setting(claim.data[0] if claim.data else None)
        kept_setting, runs, _ = runner.read(results / f"{runner.stem(claim, setting)}.json")
        assert kept_setting == setting
        assert [run.job for run in runs] == claim.jobs(setting)


def test_an_installed_fastlr_goes_before_sources_without_native_code(tmp_path: Path):
    shutil.copytree(FOLDER, tmp_path / "benchmarks" / "claims", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "fastlr").mkdir()
    (tmp_path / "fastlr" / "__init__.py").write_text("raise ImportError('these are the sources')")
    environment = {**os.environ, "PYTHONPATH": str(Path(fastlr.__file__).parents[1])}
    command = [sys.executable, "-m", "benchmarks.claims", "--help"]
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "super_convergence" in shown.stdout


# -- verdicts ----------------------------------------------------------------------------------------

PAIRS = {
    "clear win": ([95.0, 96.0, 97.5], [90.0, 91.0, 93.0], "above", True),
    "tie, told from a loss": ([95.0, 96.1, 97.0, 95.3], [95.1, 96.0, 97.1, 95.1], "a tie", True),
    "tie of runs that differ much": ([95.0, 90.0, 93.0], [94.0, 93.0, 91.0], "a tie", False),
    "equal": ([95.0, 96.0], [95.0, 96.0], "a tie", True),
    "small loss": ([95.0, 96.0, 97.0], [95.2, 96.25, 97.15], "below", True),
    "clear loss": ([90.0, 91.0, 93.0], [95.0, 96.0, 97.5], "below", False),
    "one run": ([95.0], [90.0], "one run", True),
}


@pytest.mark.parametrize(("a", "b", "outcome", "no_worse"), PAIRS.values(), ids=PAIRS.keys())
def test_comparisons_are_scipys_paired_test(a, b, outcome, no_worse):
    from scipy import stats

    found = compared(a, b)
    assert found.outcome == outcome
    assert found.no_worse(1.0) == no_worse
    assert found.difference == pytest.approx(sum(a) / len(a) - sum(b) / len(b))
    if a != b and len(a) > 1:
        test = stats.ttest_rel(a, b)
        interval = test.confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
        assert (outcome == "a tie") == (test.pvalue > 0.05)


def test_a_spread_is_mean_and_deviation():
    assert spread([0.95, 0.97]) == "96.0 \u00b1 1.4 %"
    assert spread([0.9513], 2) == "95.13 %"


@pytest.mark.parametrize(
    ("held", "verdict"),
    [([True, True], "holds"), ([True, False], "holds partly"), ([False, False], "does not hold here")],
)
def test_a_verdict_is_all_some_or_none(runner: ModuleType, held: list[bool], verdict: str):
    summary = runner.Summary([], [runner.Statement("", holds) for holds in held])
    assert summary.verdict == verdict


def made_up(
    runner: ModuleType, name: str, accuracy: Callable[[dict[str, Any]], float], **figures: Any
) -> Any:
    """The summary of a claim whose runs have such accuracies, the same all along but for a little at the end
    that differs from seed to seed; on the validation split, too."""
    claim, setting = tiny(runner, name, seeds=5)
    runs = []
    for job in claim.jobs(setting):
        measured = {policy: {"us": 1.0, "ratio": 1.0} for policy in ("fixed", "triangular2")}
        final = accuracy(job) + 0.001 * job.get("seed", 0)
        curve = {"updates": [10, 20], "validation": [final, final], "test": [final, final]}
        runs.append(
            runner.Run(job, {**curve, "bounds": [0.001, 0.01], "state bytes": 4.0, **figures}, measured)
        )
    return claim.summarise(setting, runs)


ALIKE = {"win": (0.95, 0.90), "tie": (0.92, 0.92), "loss": (0.80, 0.92)}


@pytest.mark.parametrize(
    ("case", "verdict"), [("win", "holds"), ("tie", "holds partly"), ("loss", "holds partly")]
)
def test_super_convergence_on_made_up_figures(runner: ModuleType, case: str, verdict: str):
    cycle, steps = ALIKE[case]

    def accuracy(job):
        right_rate = 0.1 if job["policy"] == "one-cycle" else 0.02
        return (cycle if job["policy"] == "one-cycle" else steps) - (0.0 if job["lr"] == right_rate else 0.1)

    summary = made_up(runner, "super_convergence", accuracy)
    assert summary.verdict == verdict
    no_worse, above, larger = (statement.holds for statement in summary.statements)
    assert (no_worse, above, larger) == (case != "loss", case == "win", True)
    lower = made_up(runner, "super_convergence", lambda job: 0.8 if job["policy"] == "one-cycle" else 0.9)
    assert lower.verdict == "does not hold here"


@pytest.mark.parametrize(
    ("case", "verdict"), [("win", "holds"), ("tie", "holds"), ("loss", "does not hold here")]
)
def test_adaptive_on_made_up_figures(runner: ModuleType, case: str, verdict: str):
    cyclic, fixed = ALIKE[case]

    def accuracy(job):
        return cyclic if job.get("policy") == "triangular2" else fixed

    assert made_up(runner, "adaptive", accuracy).verdict == verdict

    def mixed(job):
        return 0.5 if job.get("policy") == "triangular2" and job["rule"] == "Adam" else 0.9

    assert made_up(runner, "adaptive", mixed).verdict == "holds partly"


@pytest.mark.parametrize(
    ("case", "verdict"), [("win", "holds partly"), ("tie", "holds partly"), ("loss", "does not hold here")]
)
def test_cyclic_on_made_up_figures(runner: ModuleType, case: str, verdict: str):
    cyclic, others = ALIKE[case]
    summary = made_up(
        runner,
        "cyclic",
        lambda job: cyclic if job["policy"] in ("triangular", "triangular2", "exp_range") else others,
    )
    assert summary.verdict == verdict
    # Made-up curves are flat, so that the target is reached at once or never.
    assert [statement.holds for statement in summary.statements] == [case != "loss"] * 3 + [False]


@pytest.mark.parametrize(("case", "rate"), [("right", 0.03), ("wrong", 0.003), ("none", None)])
def test_range_test_on_made_up_figures(runner: ModuleType, load_claims: Load, case: str, rate: float | None):
    """All rates but 0.03 are bad; other readings say so."""
    ours, by_loss, *others = load_claims("range_test").READINGS
    read = {ours: rate, by_loss: rate, **dict.fromkeys(others, 0.3)}
    summary = made_up(runner, "range_test", lambda job: 0.9 if job.get("lr") == 0.03 else 0.5, read=read)
    assert [statement.holds for statement in summary.statements] == [case == "right", case == "right", True]
    wins = {**read, "valley": 0.03}
    summary = made_up(runner, "range_test", lambda job: 0.9 if job.get("lr") == 0.03 else 0.5, read=wins)
    assert summary.statements[2].holds == (case == "right")  # as often right is no more often
    shown = summary.tables[0].rows[1]
    assert shown[1:4] == ["100%" if case == answer else "0%" for answer in ("right", "none", "wrong")]


FEATURES = {"digits": 64, "fashion-mnist": 784, "cifar10": 3072}


@pytest.mark.parametrize("name", FEATURES)
def test_models_fit_the_data(load_claims: Load, name: str):
    x = torch.randn(3, FEATURES[name])
    dataset = data.Dataset(name, x, torch.zeros(3), x, torch.zeros(3), 10)
    makers = [load_claims("tasks").TASKS[name].model]
    network, models = load_claims("range_test").network, load_claims("range_test").MODELS
    makers += [partial(network, kind=k, batch_norm=norm) for k in models for norm in (False, True)]
    for make in makers:
        assert make(dataset)(x).shape == (3, 10)


def test_rates_are_chosen_on_the_validation_split(runner: ModuleType, load_claims: Load):
    tasks = load_claims("tasks")

    def run_of(lr: float, seed: int, validation: float, test: float) -> Any:
        return runner.Run(
            {"lr": lr, "seed": seed}, {"validation": [0.0, validation], "test": [0.0, test]}, {}
        )

    runs = [
        run_of(0.1, 0, 0.9, 0.5),
        run_of(0.2, 0, 0.8, 0.99),
        run_of(0.1, 1, 0.7, 0.6),
        run_of(0.2, 1, 0.7, 0.99),
    ]
    chosen = tasks.best(runs)
    assert [run.job for run in chosen] == [{"lr": 0.1, "seed": 0}, {"lr": 0.1, "seed": 1}]
    assert tasks.finals(chosen) == [0.5, 0.6]
