"""What ``make gpu`` runs, without a GPU: its stages on the emulated CUDA, and a stage that goes wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from native import toolchain
from on_gpu import __main__ as on_gpu
from on_gpu import sources
from on_gpu.stages import (
    STAGES,
    Found,
    Settings,
    Skip,
    Stage,
    read_junit,
    read_profile,
    read_report,
    read_sanitizer,
    read_speed,
)

import fastlr


def stage(name: str, code: str, limit: float = 30.0) -> Stage:
    return Stage(name, limit, lambda settings, _: [settings.python, "-c", code], lambda *_: Found("read"))


def missing(settings: Settings, stage: Stage) -> list[str]:
    raise Skip("there is no such tool")


def result(out: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    return found


def test_a_stage_that_goes_wrong_costs_the_others_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    child, late = tmp_path / "child.py", tmp_path / "late"
    child.write_text(f"import pathlib, time; time.sleep(3); pathlib.Path({str(late)!r}).touch()")
    hanging = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, {str(child)!r}]); "
        "print('begun', flush=True); time.sleep(60)"
    )
    stages = [
        stage("a-good", "print('fine')"),
        stage("b-hangs", hanging, limit=2.0),
        stage("c-crashes", "import os, signal; print('x', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"),
        stage("d-fails", "import sys; sys.exit(3)"),
        Stage("e-lacks", 1.0, missing, lambda *_: Found()),
        stage("f-good", "print('fine')"),
    ]
    assert on_gpu.main(["--out", str(tmp_path / "out")], stages) == 1
    out = tmp_path / "out"
    expected = {
        "a-good": ("passed", []),
        "b-hangs": ("failed", ["still running after 2 s"]),
        "c-crashes": ("failed", ["ended by SIGSEGV"]),
        "d-fails": ("failed", ["exit status 3"]),
        "e-lacks": ("skipped", ["there is no such tool"]),
        "f-good": ("passed", []),
    }
    assert {
        name: (result(out, name)["status"], result(out, name)["problems"]) for name in expected
    } == expected
    assert [row["stage"] for row in json.loads((out / "summary.json").read_text())] == list(expected)
    assert (out / "b-hangs.log").read_text().endswith("\nbegun\n")
    table = capsys.readouterr().out.split("headline\n")[1]
    assert all(name in table for name in expected)
    assert on_gpu.main(["--out", str(out), "--stages", "a,f"], stages) == 0
    time.sleep(2)
    assert not late.exists()  # what a stage has started is gone with it


def test_stages_that_do_not_exist_are_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        on_gpu.main(["--stages", "x"])
    assert "--stages must be among a, b, c, d, e, f, g, h, i, got 'x'" in capsys.readouterr().err


def settings(out: Path) -> Settings:
    return Settings(sys.executable, out, out / "site", "cuda", small=False, path=os.defpath)


def test_skipped_tests_must_be_explained(tmp_path: Path):
    made = stage("e-tests", "")
    made.file(settings(tmp_path), ".junit.xml").write_text(
        "<testsuites><testsuite>"
        "<testcase classname='t' name='one'/>"
        "<testcase classname='t' name='two'><skipped message='needs two CUDA devices'/></testcase>"
        "<testcase classname='t' name='three'><skipped message='no GPU'/></testcase>"
        "<testcase classname='t' name='four'><failure message='assert 1 == 2'/></testcase>"
        "</testsuite></testsuites>"
    )
    found = read_junit(settings(tmp_path), made)
    assert found.problems == ["unexplained skip of t::three: no GPU", "1 tests failed"]
    assert found.headline == "1 passed, 1 failed, 2 skipped"


def test_a_sanitizers_summary_is_read(tmp_path: Path):
    made = stage("f-memcheck", "")
    log = made.file(settings(tmp_path), ".log")
    log.write_text("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 2 errors\n")
    found = read_sanitizer(settings(tmp_path), made)
    assert found.headline == "ERROR SUMMARY: 2 errors; "
    assert found.problems == ["it wrote no report", "ERROR SUMMARY: 2 errors"]
    made.file(settings(tmp_path), ".found.json").write_text('{"headline": "1 of 1", "checks": []}')
    log.write_text("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n")
    assert read_sanitizer(settings(tmp_path), made).problems == []
    log.write_text("killed")
    assert "the sanitizer told no summary" in read_sanitizer(settings(tmp_path), made).problems


def test_a_profile_is_read(tmp_path: Path):
    made = stage("h-profile", "")
    log = made.file(settings(tmp_path), ".log")
    log.write_text(
        "==PROF== Connected\n"
        '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","step_kernel","launch__registers_per_thread","register/thread","72"\n'
    )
    found = read_profile(settings(tmp_path), made)
    assert found.headline == "registers 72 register/thread"
    assert "DRAM throughput" in found.problems[0]  # which was asked for, and is not there
    log.write_text("==ERROR== ERR_NVGPUCTRPERM - no permission\n")
    assert read_profile(settings(tmp_path), made).problems == ["==ERROR== ERR_NVGPUCTRPERM - no permission"]


CASES = [["step", "a"], ["clip", "a"]]
NOTHING = [
    ("d-speed", read_speed, None, "it wrote no report"),
    (
        *("d-speed", read_speed),
        {"cases": CASES, "results": [{"rule": "sgd", "case": "step", "set": "a"}]},
        "not measured: sgd, clip, a",
    ),
    ("d-speed", read_speed, {"cases": CASES, "results": []}, "nothing was measured"),
    ("g-training", read_report, None, "it wrote no report"),
    ("e-tests", read_junit, None, "it wrote no report"),
]


@pytest.mark.parametrize(("name", "read", "figures", "problem"), NOTHING)
def test_a_stage_that_shows_nothing_has_failed(
    tmp_path: Path, name: str, read: Any, figures: Any, problem: str
):
    made = stage(name, "")
    if figures is not None:
        content = {"headline": "", "checks": [], "figures": figures}
        made.file(settings(tmp_path), ".found.json").write_text(json.dumps(content))
    assert problem in read(settings(tmp_path), made).problems


def test_files_of_an_earlier_run_do_not_count(tmp_path: Path):
    made = Stage("g-training", 30.0, stage("g", "").command, read_report)
    for name in ("g-training.found.json", "g-training.json"):
        (tmp_path / name).write_text('{"headline": "6 of 6", "checks": []}')
    assert on_gpu.main(["--out", str(tmp_path)], [made]) == 1
    assert result(tmp_path, "g-training")["problems"] == ["it wrote no report"]
    assert result(tmp_path, "g-training")["headline"] == ""


def test_builds_of_other_sources_are_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="nothing is built here: run stage b"):
        on_gpu.check_build(settings(tmp_path))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / sources.FILE).write_text(sources.digest())
    on_gpu.check_build(settings(tmp_path))
    monkeypatch.setattr(sources, "digest", lambda: "others")
    with pytest.raises(ValueError, match="of other sources: run stage b"):
        on_gpu.check_build(settings(tmp_path))


def test_skipped_stages_alone_show_nothing(tmp_path: Path):
    assert on_gpu.main(["--out", str(tmp_path)], [Stage("e-lacks", 1.0, missing, lambda *_: Found())]) == 1


def test_a_run_that_is_ended_ends_its_stage(tmp_path: Path):
    late = tmp_path / "late"
    code = f"import pathlib, time; time.sleep(4); pathlib.Path({str(late)!r}).touch()"
    program = (
        "import sys; from on_gpu import __main__ as m; from on_gpu.stages import Stage, Found; "
        f"m.main(['--out', {str(tmp_path)!r}], "
        f"[Stage('a-x', 60.0, lambda *_: [sys.executable, '-c', {code!r}], lambda *_: Found())])"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=toolchain.TESTS) as process:
        while not (tmp_path / "a-x.log").exists():
            time.sleep(0.05)
        time.sleep(0.3)
        process.terminate()
        assert process.wait(10) != 0
    time.sleep(4.5)
    assert not late.exists()


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Of stages c and f."""
    monkeypatch.syspath_prepend(toolchain.ROOT / "benchmarks")
    from on_gpu import launch_everything, smoke

    return smoke, launch_everything


def test_every_native_rule_is_launched_with_every_set_of_state(programs: tuple[Any, Any]):
    smoke, launch_everything = programs
    native = toolchain.ROOT / "csrc"
    rules = re.findall(r"X\((\w+)\)", (native / "rules.h").read_text().split("FASTLR_FOR_EACH_RULE(X)")[1])
    found = launch_everything.optimizers()
    assert {rule.lower() for rule in rules} == set(found)
    for rule, kind in found.items():
        (sets,) = re.findall(r"kLiveSets\[\] = \{([^}]*)\}", (native / "rules" / f"{rule}.h").read_text())
        of_stages = 4  # averages or none, masters or none
        assert len(launch_everything.options_of(kind)) == of_stages * sets.count("0b")
    assert smoke.missing_rules() == set()


def test_a_new_optimizer_is_launched_and_missed_by_itself(
    programs: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
):
    smoke, launch_everything = programs
    new = type("FusedNew", (fastlr.FusedOptimizer,), {"_rule": "new"})
    monkeypatch.setattr(fastlr, "FusedNew", new, raising=False)
    monkeypatch.setattr(fastlr.optim, "__all__", [*fastlr.optim.__all__, "FusedNew"])
    assert launch_everything.optimizers()["new"] is new
    assert smoke.missing_rules() == {"FusedNew"}


@pytest.mark.repetition
def test_every_stage_runs_on_the_emulated_cuda(tmp_path: Path):
    out = tmp_path / "with blanks" / "gpu"
    done = toolchain.run(
        *("make", "gpu", "BACKEND=cuda-on-cpu", "SMALL=1", f"OUT={out}", f"PYTHON={sys.executable}"),
        cwd=toolchain.ROOT,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = {row["stage"]: row for row in json.loads((out / "summary.json").read_text())}
    assert list(summary) == [made.name for made in STAGES]
    assert summary.pop("h-profile")["problems"] == ["there is no hardware to profile"]
    assert {row["status"] for row in summary.values()} == {"passed"}
    assert "0 failed" in summary["e-tests"]["headline"]
    assert json.loads((out / "d-speed.json").read_text())["figures"]["results"][0]["set"] == "tiny"
