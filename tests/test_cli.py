"""The command line: every policy can be drawn, errors are clear and the exit code says so."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import fastlr
from fastlr import cli


def run(capsys, *arguments):
    """Exit code, output and error output of a command line."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# The options of each policy and the schedule that they mean.
POLICIES = {
    "constant": ("--value 0.1", fastlr.Constant(0.1)),
    "cosine": ("--start 0.1 --end 0.01 --steps 50", fastlr.Cosine(0.1, 0.01, 50)),
    "cosine_warm_restarts": (
        "--start 0.1 --end 0 --first-period 10 --mult 2",
        fastlr.CosineWarmRestarts(0.1, 0.0, 10, 2),
    ),
    "exp_range": (
        "--base 0.001 --max 0.006 --step-size-up 10 --step-size-down 5 --gamma 0.99 --decay-base",
        fastlr.ExpRange(0.001, 0.006, 10, 5, gamma=0.99, decay_base=True),
    ),
    "exponential": ("--start 0.1 --gamma 0.9", fastlr.Exponential(0.1, 0.9)),
    "linear_ramp": ("--start 0 --end 0.1 --steps 40", fastlr.LinearRamp(0.0, 0.1, 40)),
    "multi_step": ("--start 0.1 --milestones 10 30 --gamma 0.2", fastlr.MultiStep(0.1, (10, 30), 0.2)),
    "one_cycle": (
        "--max-lr 0.4 --total-steps 60 --anneal-strategy linear --three-phase --pct-start 0.2",
        fastlr.OneCycle(0.4, 60, 0.2, "linear", three_phase=True),
    ),
    "one_cycle_momentum": (
        "--base-momentum 0.85 --max-momentum 0.95 --total-steps 60",
        fastlr.OneCycleMomentum(0.85, 0.95, 60),
    ),
    "polynomial": ("--start 0.1 --end 0 --steps 50 --power 2", fastlr.Polynomial(0.1, 0.0, 50, 2.0)),
    "step_decay": ("--start 0.1 --every 20 --gamma 0.5", fastlr.StepDecay(0.1, 20, 0.5)),
    "tabulated": ("--table 0.1 0.2 0.3", fastlr.Tabulated([0.1, 0.2, 0.3])),
    "time_based": ("--start 0.1 --decay 0.1", fastlr.TimeBased(0.1, 0.1)),
    "triangular": (
        "--base 0.001 --max 0.006 --step-size-up 10 --interpolation sinusoidal --inverted",
        fastlr.Triangular(0.001, 0.006, 10, interpolation="sinusoidal", inverted=True),
    ),
    "triangular2": (
        "--base 0.001 --max 0.006 --step-size-up 10 --unit sample",
        fastlr.Triangular2(0.001, 0.006, 10, unit="sample"),
    ),
}
each_policy = pytest.mark.parametrize(("name", "case"), POLICIES.items(), ids=POLICIES.keys())


def test_every_schedule_that_is_made_from_numbers_is_a_policy(capsys):
    made_of_schedules = {"InSamples", "Joined", "PerEpoch", "Scaled", "Schedule", "Shifted", "one_cycle"}
    names = set(fastlr.schedules.__all__) - made_of_schedules
    assert len(names) == len(POLICIES)
    _, listing, _ = run(capsys, "schedule", "--help")
    listed = re.findall(r"^    (\w+)", listing, re.MULTILINE)
    assert sorted(listed) == sorted(POLICIES)


@each_policy
def test_a_policys_values_are_printed(capsys, name, case):
    options, schedule = case
    code, out, err = run(capsys, "schedule", name, *options.split(), "--at", 0, 1, 2)
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [[str(t), repr(schedule(t))] for t in range(3)]


def test_a_policys_help_comes_from_its_docstring(capsys):
    code, text, _ = run(capsys, "schedule", "exp_range", "--help")
    words = " ".join(text.split())
    assert code == 0
    assert "clock units of the rise, >= 0" in words  # from the class that it extends
    assert "let the lower bound decline as well" in words
    assert "``" not in text


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("triangular2", "--base 0.001 --max 0.006 --step-size-up 2000 --steps 20000"),
        ("cosine", "--start 0.1 --end 0 --steps 100"),
        ("one_cycle", "--max-lr 0.4 --total-steps 60"),
    ],
)
def test_a_policy_is_drawn(capsys, tmp_path, policy, options):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    path = tmp_path / "lr.png"
    code, out, err = run(capsys, "schedule", policy, *options.split(), "--out", path)
    assert (code, err) == (0, "")
    assert str(path) in out
    assert path.read_bytes().startswith(b"\x89PNG")


ERRORS = {
    "out of range": ("schedule triangular --base 0.1 --max 0.01 --step-size-up 5 --at 0", 1, "max must be"),
    "negative clock": ("schedule constant --value 1 --at -1", 1, "clock must be"),
    "no end": ("schedule constant --value 1 --out {}/a.png", 1, "no end"),
    "unknown format": ("schedule cosine --start 1 --end 0 --steps 9 --out {}/a.docx", 1, "docx"),
    "no such folder": ("schedule cosine --start 1 --end 0 --steps 9 --out {}/b/a.png", 1, "No such file"),
    "neither picture nor values": ("schedule constant --value 1", 2, "give --out FILE"),
    "missing option": ("schedule constant --at 0", 2, "--value"),
    "unknown option": ("schedule constant --value 1 --gamma 2 --at 0", 2, "--gamma"),
    "unknown policy": ("schedule sawtooth --at 0", 2, "sawtooth"),
    "not a number": ("schedule constant --value high --at 0", 2, "high"),
    "no command": ("", 2, "COMMAND"),
    "unknown data": ("demo --data mnist", 2, "mnist"),
    "missing data": (
        "demo --data fashion-mnist --data-path {}/none --out {}/report",
        1,
        "apt install dataset-fashion-mnist",
    ),
    "no seeds": ("demo --seeds 0 --out {}/report", 1, "seeds must be >= 1"),
}


@pytest.mark.parametrize(("line", "code", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_are_said_and_set_the_exit_code(capsys, tmp_path, line, code, message):
    pytest.importorskip("matplotlib", reason="some of these get as far as drawing")
    got, out, err = run(capsys, *line.replace("{}", str(tmp_path)).split())
    assert got == code
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_the_demo_prints_table_verdict_and_report(capsys, tmp_path):
    for package in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(package, reason=f"the demo needs {package}")
    code, out, _ = run(capsys, "demo", "--out", tmp_path / "report", "--seeds", 2, "--updates", 40)
    assert code == 0
    for text in ("triangular2", "step decay", "fixed 0.001", "final accuracy", "Updates until", "index.html"):
        assert text in out
    assert (tmp_path / "report" / "index.html").exists()


@pytest.mark.parametrize("package", ["matplotlib", "sklearn"])
def test_a_missing_package_is_named_with_its_remedy(capsys, tmp_path, monkeypatch, package):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = run(capsys, "demo", "--out", tmp_path, "--seeds", 1, "--updates", 40)
    assert code == 1
    assert package.replace("sklearn", "scikit-learn") in err
    assert "pip install 'fastlr[demo]'" in err


def test_an_interruption_is_no_traceback(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(fastlr, "build_info", interrupted)
    code, _, err = run(capsys, "doctor")
    assert (code, err) == (130, "fastlr: interrupted\n")


def test_doctor_prints_what_build_info_knows(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == len(fastlr.build_info())
    for key, value in fastlr.build_info().items():
        (line,) = [line for line in lines if line.startswith(key.replace("_", " ") + "  ")]
        for part in value if isinstance(value, list) else [value]:
            assert str(part) in line


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"fastlr {fastlr.__version__}\n", "")


def test_the_package_can_be_run_as_a_module(tmp_path):
    command = [sys.executable, "-m", "fastlr", "schedule", "constant", "--value", "0.5", "--at", "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3 0.5\n", "")
