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
    "one_minus_sqrt": ("--start 0.1 --end 0 --steps 50", fastlr.OneMinusSqrt(0.1, 0.0, 50)),
    "inverse_sqrt": ("--start 0.1 --timescale 50", fastlr.InverseSqrt(0.1, 50)),
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
    made_of_schedules = {"InSamples", "InTokens", "Joined", "PerEpoch", "Scaled", "Schedule", "Shifted"}
    classes = {name for name in fastlr.schedules.__all__ if name[0].isupper()}
    names = classes - made_of_schedules
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
    "no seeds": ("demo --seeds 0 --out {}/report", 1, "seeds must be an integer >= 1"),
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


# -- range-test -----------------------------------------------------------------------------------------

FACTORIES = """
import torch, fastlr

def job(targets=True):
    torch.manual_seed(0)
    x = torch.randn(512, 6)
    y = (x @ torch.randn(6, 3)).argmax(1) if targets else torch.randint(3, (512,))
    model = torch.nn.Linear(6, 3)
    data = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True)
    optimizer = fastlr.FusedSGD(model.parameters(), momentum=0.9)
    return model, optimizer, torch.nn.functional.cross_entropy, loader

def learns():
    return {**as_dict(), "val_loader": job()[3]}

def as_dict():
    names = ("model", "optimizer", "loss_fn", "train_loader")
    return {**dict(zip(names, job())), "end_lr": 1000.0}

def hopeless():
    return job(targets=False)

def frozen():
    model, *rest = job()
    return model.requires_grad_(False), *rest, rest[2]

def number():
    return 5

def unknown():
    return {**as_dict(), "epochs": 3}

def broken():
    raise RuntimeError("the data are not here")

constant = 5
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the report has a picture")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "__init__.py").write_text("")
    (tmp_path / "jobs" / "made.py").write_text(FACTORIES)
    (tmp_path / "jobs" / "needy.py").write_text("import no_such_package")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "jobs"]:
        del sys.modules[name]


@pytest.mark.parametrize("factory", ["learns", "as_dict"])
def test_a_range_test_of_ones_own_is_run_and_kept(capsys, factories, factory):
    code, out, err = run(capsys, "range-test", f"jobs.made:{factory}", "--out", "found", "--num-steps", 150)
    assert code == 0
    assert "backup of" in err
    found = fastlr.RangeTestResult.from_json("found/range_test.json")
    assert found.summary() in out
    assert (factories / "found" / "range_test.txt").read_text() == found.summary() + "\n"
    assert len((factories / "found" / "range_test.csv").read_text().splitlines()) == len(found.lrs) + 1
    assert (factories / "found" / "range_test.png").read_bytes().startswith(b"\x89PNG")
    assert (found.accuracies is None) == (factory == "as_dict")


def test_options_of_the_range_test_are_passed_on(capsys, factories):
    options = "--start-lr 0.001 --end-lr 0.5 --num-steps 40 --sweep linear --staircase 2 --repeats 2"
    options += " --accumulate 2 --val-every 2 --val-batches 1 --backup host --no-progress"
    run(capsys, "range-test", "jobs.made:learns", *options.split())
    found = fastlr.RangeTestResult.from_json("report/range_test.json")
    assert (found.lrs[0], len(found.repeats), found.sweep) == (0.001, 2, "linear")
    assert found.repeats[0].lrs[1] == pytest.approx(0.001 + 0.499 / 19)
    assert capsys.readouterr().err == ""


def test_without_an_answer_the_report_is_written_and_the_exit_code_is_1(capsys, factories):
    line = ["range-test", "jobs.made:hopeless", "--num-steps", "60", "--end-lr", "1e-4", "--no-progress"]
    code, out, err = run(capsys, *line)
    assert code == 1
    assert err.startswith("fastlr: error: the range test gives no bounds: the loss improves nowhere")
    assert "no bounds" in out
    assert (factories / "report" / "range_test.png").exists()


RANGE_TEST_ERRORS = {
    "no colon": ("jobs.made", "must be given as package.module:function, got 'jobs.made'"),
    "no module": ("jobs.missing:job", "there is no module jobs.missing"),
    "no package": ("nowhere.at.all:job", "there is no module nowhere"),
    "no function": ("jobs.made:missing", "jobs.made has no function missing"),
    "no function but a number": ("jobs.made:constant", "jobs.made has no function constant"),
    "no job": (
        "jobs.made:number",
        "must return a tuple (model, optimizer, loss_fn, train_loader[, val_loader])",
    ),
    "unknown argument": ("jobs.made:unknown", "epochs"),
    "frozen": ("jobs.made:frozen", "the model is frozen"),
    "broken": ("jobs.made:broken", "the data are not here"),
    "out of range": ("jobs.made:learns --start-lr 2000", "start_lr must be < end_lr"),
    "out is a file": ("jobs.made:learns --out jobs/made.py", "Not a directory: 'jobs/made.py'"),
    "out is in a file": ("jobs.made:learns --out jobs/made.py/report", "Not a directory"),
    "out is nothing": ("jobs.made:learns --out=", "--out must name a file, got ''"),
}


@pytest.mark.parametrize(("line", "message"), RANGE_TEST_ERRORS.values(), ids=RANGE_TEST_ERRORS.keys())
def test_a_range_test_that_cannot_be_run_says_why(capsys, factories, line, message):
    code, out, err = run(capsys, "range-test", *line.split())
    assert code == 1
    assert message in err
    assert "backup of" not in err  # it is said before the sweep
    assert out == ""
    assert not (factories / "report").exists()


def test_a_package_that_the_factory_misses_is_its_own_affair(capsys, factories):
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        run(capsys, "range-test", "jobs.needy:job")


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
