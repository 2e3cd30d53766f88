"""The command line: every policy can be drawn, errors are clear and the exit code says so."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import os
import pickle
import platform
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

import fastlr
from fastlr import bench, cli, doctor


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
    assert {type(schedule).__name__ for _, schedule in POLICIES.values()} == classes - made_of_schedules
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


def test_a_policy_is_drawn_in_the_terminal(capsys, monkeypatch):
    """A row for each stretch, its bar as long as the highest value there."""
    pytest.importorskip("rich", reason="bars are rich's")
    monkeypatch.setenv("COLUMNS", "90")
    code, out, err = run(capsys, "schedule", "triangular", *TRIANGULAR, "--steps", 240)
    assert (code, err) == (0, "")
    title, heading, *rows = out.splitlines()
    assert title.strip() == "Triangular: learning rate, 240 updates"
    assert heading.split() == ["updates", "from", "lowest", "highest"]
    schedule = fastlr.Triangular(0.0, 0.8, 60)
    assert len(rows) == 24
    bars = []
    for row, start in zip(rows, range(0, 240, 10), strict=True):
        cells = row.split()
        values = schedule.values(start, start + 10)
        assert cells[0] == str(start)
        assert [float(cell) for cell in cells[1:3]] == pytest.approx([values.min(), values.max()], rel=1e-3)
        bars.append((values.max(), len(cells[3])))
    longest = max(length for _, length in bars)
    assert longest > 40
    assert all(abs(length - longest * value / 0.8) <= 1 for value, length in bars)


TRIANGULAR = ["--base", "0", "--max", "0.8", "--step-size-up", "60"]


@pytest.mark.parametrize(
    ("line", "rows"),
    [
        ("cosine --start 0.1 --end 0 --steps 5", 6),
        ("constant --value 0 --steps 3", 3),
        ("cosine --start 0.1 --end 0 --steps 9000000000000000000", 24),
    ],
)
def test_short_level_and_long_schedules_are_drawn_in_the_terminal(capsys, line, rows):
    pytest.importorskip("rich", reason="bars are rich's")
    code, out, err = run(capsys, "schedule", *line.split())
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 2 + rows


@pytest.mark.parametrize("columns", [1, 20, 25, 29, 40])
def test_a_narrow_terminal_cuts_no_number(capsys, monkeypatch, columns):
    pytest.importorskip("rich", reason="bars are rich's")
    monkeypatch.setenv("COLUMNS", str(columns))
    line = "cosine --start 0.1 --end 0 --steps 9000000000000000000"
    code, out, _ = run(capsys, "schedule", *line.split())
    assert code == 0
    rows = [row.split() for row in out.splitlines() if re.match(r" *[\d,]+  ", row)]
    assert [row[0] for row in rows] == [f"{(9 * 10**18 + 1) * row // 24:,}" for row in range(24)]
    assert all(float(low) <= float(high) for _, low, high, *_ in rows)
    assert "\u2026" not in out


def test_cycles_shorter_than_a_row_are_drawn_with_their_height(capsys):
    """Also where a round number of them makes up a row."""
    pytest.importorskip("rich", reason="bars are rich's")
    line = ["schedule", "triangular", "--base", 0, "--max", 1, "--step-size-up", 50_000]
    code, out, _ = run(capsys, *line, "--steps", 1_200_000_000)
    assert code == 0
    rows = [row.split() for row in out.splitlines()[2:]]
    assert all(float(low) < 0.05 and float(high) > 0.95 for _, low, high, _ in rows)


def test_the_file_is_named_as_it_was_written(capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    line = ["schedule", "cosine", "--start", 1, "--end", 0, "--steps", 9, "--out", tmp_path / "lr"]
    assert run(capsys, *line) == (0, f"saved {tmp_path / 'lr.png'}\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["lr.png"]


@pytest.mark.filterwarnings("default")
def test_a_clock_past_the_end_is_warned_of_without_a_line_of_code(capsys):
    code, out, err = run(
        capsys, *["schedule", "cosine", "--start", "1", "--end", "0", "--steps", "9", "--at", "10", "11"]
    )
    assert (code, out) == (0, "10 0.0\n11 0.0\n")
    assert err.startswith("fastlr: warning: Cosine ended at update 9")
    assert len(err.splitlines()) == 1


def test_a_policys_json_is_read_back(capsys):
    schedule = fastlr.Cosine(0.1, 0.0, 4)
    line = ["schedule", "cosine", "--start", 0.1, "--end", 0, "--steps", 4, "--json"]
    code, out, err = run(capsys, *line)
    read = json.loads(out)
    assert (code, err) == (0, "")
    assert fastlr.Schedule.from_dict(read["schedule"]) == schedule
    assert (read["quantity"], read["duration"]) == ("learning rate", 4)
    assert (read["clocks"], read["values"]) == ([0, 1, 2, 3, 4], schedule.values(0, 5).tolist())
    _, out, _ = run(capsys, *line, "--at", 3, 1)
    assert (json.loads(out)["clocks"], json.loads(out)["values"]) == ([3, 1], [schedule(3), schedule(1)])


ERRORS = {
    "out of range": ("schedule triangular --base 0.1 --max 0.01 --step-size-up 5 --at 0", 1, "max must be"),
    "below zero": ("schedule cosine --start -1e-3 --end 0 --steps 9", 1, "start must be a finite"),
    "infinite": ("schedule cosine --start -inf --end 0 --steps 9", 1, "start must be a finite"),
    "below zero, too": ("bench --seconds -.5e1", 1, "seconds must be"),
    "negative clock": ("schedule constant --value 1 --at -1", 1, "clock must be"),
    "no end": ("schedule constant --value 1 --out {}/a.png", 1, "no end"),
    "unknown format": ("schedule cosine --start 1 --end 0 --steps 9 --out {}/a.docx", 1, "docx"),
    "no such folder": ("schedule cosine --start 1 --end 0 --steps 9 --out {}/b/a.png", 1, "No such file"),
    "a folder": ("schedule cosine --start 1 --end 0 --steps 9 --at 0 --out {}", 1, "Is a directory"),
    "a folder, too": ("schedule cosine --start 1 --end 0 --steps 9 --out {}/a/", 1, "Is a directory"),
    "no name": ("schedule cosine --start 1 --end 0 --steps 9 --out=", 1, "--out must name a file, got ''"),
    "no folder, JSON": ("schedule cosine --start 1 --end 0 --steps 9 --json --out {}/b/a.png", 1, "No such"),
    "too many values": ("schedule cosine --start 1 --end 0 --steps 2000000 --json", 1, "pick some with --at"),
    "no end in the terminal": ("schedule constant --value 1", 1, "no end"),
    "no end in JSON": ("schedule constant --value 1 --json", 1, "no end"),
    "unknown rule": ("bench --rules lion", 2, "lion"),
    "no thread": ("bench --threads 0", 1, "threads must be an integer >= 1, got 0"),
    "more threads than cores": ("bench --threads 100000", 1, "threads must be at most this machine's"),
    "unknown shell": ("completion cmd", 2, "cmd"),
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
    for package in ("jinja2", "matplotlib", "scipy", "sklearn"):
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

def left():
    raise SystemExit(0)

def mute():
    raise ValueError

def loss_fails():
    def loss(output, target):
        raise ValueError("no such loss")
    model, optimizer, _, loader = job()
    return model, optimizer, loss, loader

def arguments():
    import argparse
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=float, default=0.5)
    print("a rate of", parser.parse_args().rate)
    return learns()

constant = 5
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the report has a picture")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "__init__.py").write_text("")
    (tmp_path / "jobs" / "made.py").write_text(FACTORIES)
    (tmp_path / "jobs" / "needy.py").write_text("import no_such_package")
    (tmp_path / "jobs" / "notes.txt").write_text("def job(): ...")
    (tmp_path / "jobs" / "random.py").write_text("def job(): ...")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [
        name for name in sys.modules if name.split(".")[0] in ("helper", "jobs", "made", "my-train")
    ]:
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
    options += " --diverge-factor 9 --accumulate 2 --val-every 2 --val-batches 1 --backup host --no-progress"
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
    "no colon": (
        "jobs.made",
        "must be given as package.module:function or ./file.py:function, got 'jobs.made'",
    ),
    "no function's name": ("jobs.made:", "must be given as package.module:function or ./file.py:function"),
    "no file": ("jobs/missing.py:job", "No such file or directory: 'jobs/missing.py'"),
    "no Python file": ("jobs/notes.txt:job", "notes.txt is no Python file"),
    "no function in the file": ("jobs/made.py:missing", "jobs/made.py has no function missing"),
    "a file called as a module": ("jobs/random.py:job", "rename the file"),
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
    "broken, where": ("jobs.made:broken", "in broken\n    raise RuntimeError("),
    "without a word": ("jobs.made:mute", "fastlr: error: ValueError"),
    "its end": ("jobs.made:left", "jobs.made ended the process before there was anything to test, with 0"),
    "a folder": ("./jobs:job", "Is a directory: 'jobs'"),
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


def test_an_error_within_the_test_says_where_the_users_code_raised_it(capsys, factories):
    code, out, err = run(capsys, "range-test", "jobs/made.py:loss_fails", "--no-progress")
    assert (code, out) == (1, "")
    place, line, message = err.splitlines()
    assert re.fullmatch(r'  File ".*jobs/made.py", line \d+, in loss', place)
    assert line == '    raise ValueError("no such loss")'
    assert message == "fastlr: error: no such loss"


def test_the_factory_finds_no_arguments_and_prints_into_no_json(capsys, factories, monkeypatch):
    argv = ["fastlr", "range-test", "--rate", "7"]
    monkeypatch.setattr(sys, "argv", argv)
    line = ["range-test", "jobs.made:arguments", "--num-steps", 150, "--no-progress", "--json"]
    code, out, err = run(capsys, *line)
    assert (code, err) == (0, "a rate of 0.5\n")
    assert json.loads(out)["answers"]["max_lr"] > 0
    assert sys.argv is argv


def test_the_range_tests_help_says_what_the_defaults_are(capsys):
    _, text, _ = run(capsys, "range-test", "--help")
    words = " ".join(text.split())
    assert "updates, >= 2. (default: 200)" in words
    assert "as in Smith's paper. (default: exponential)" in words
    assert "a list gives" not in words
    assert "None" not in words


@pytest.mark.parametrize("where", ["jobs.needy", "jobs/needy.py"])
def test_a_package_that_the_factory_misses_is_its_own_affair(capsys, factories, where):
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        run(capsys, "range-test", f"{where}:job")
    assert "needy" not in sys.modules


IN_A_FILE = """
import helper

class Kept:
    pass

def setup():
    return helper.as_dict()

if __name__ == "__main__":
    raise SystemExit("the script itself was run")
"""


def test_the_factory_may_stand_in_a_file(capsys, factories):
    """With what lies beside it, as if it were run; JSON says the same as the report."""
    folder = factories / "elsewhere"
    folder.mkdir()
    (folder / "my-train.py").write_text(IN_A_FILE)
    (folder / "helper.py").write_text(FACTORIES)
    line = ["range-test", "elsewhere/my-train.py:setup", "--num-steps", 150, "--no-progress", "--json"]
    code, out, err = run(capsys, *line)
    assert (code, err) == (0, "")
    assert json.loads(out) == fastlr.RangeTestResult.from_json("report/range_test.json").to_dict()
    # A loader's worker finds what it is sent by the name of its module.
    module = sys.modules["my-train"]
    assert isinstance(pickle.loads(pickle.dumps(module.Kept())), module.Kept)
    assert importlib.util.find_spec("my-train").origin == str(folder / "my-train.py")
    _, again, _ = run(capsys, *line)
    assert json.loads(again) == json.loads(out)
    assert sys.modules["my-train"] is module


MISSING = {
    "jinja2": ("demo --seeds 1 --updates 40 --out {}", "jinja2", "demo"),
    "matplotlib": ("demo --seeds 1 --updates 40 --out {}", "matplotlib", "demo"),
    "scipy": ("demo --seeds 2 --updates 40 --out {}", "scipy", "demo"),
    "sklearn": ("demo --seeds 1 --updates 40 --out {}", "scikit-learn", "demo"),
    "rich": ("schedule cosine --start 1 --end 0 --steps 9", "rich", "cli"),
    "matplotlib, plot": ("schedule cosine --start 1 --end 0 --steps 9 --out {}/a.png", "matplotlib", "plot"),
    "shtab": ("completion bash", "shtab", "cli"),
}


@pytest.mark.parametrize(("package", "case"), MISSING.items(), ids=MISSING.keys())
def test_a_missing_package_is_named_with_its_remedy(capsys, tmp_path, monkeypatch, package, case):
    line, name, extra = case
    if line.startswith("demo"):
        for needed in {"jinja2", "matplotlib", "scipy", "sklearn"} - {package}:
            pytest.importorskip(needed, reason=f"the demo needs {needed}")
    package = package.split(",")[0]
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, "fastlr.plotting.picture", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = run(capsys, *line.format(tmp_path).split())
    assert code == 1  # and no run was made in vain
    assert err == f"fastlr: error: {name} is not installed; pip install 'fastlr[{extra}]' brings it\n"


def test_an_interruption_is_no_traceback(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(fastlr, "build_info", interrupted)
    code, _, err = run(capsys, "doctor")
    assert (code, err) == (130, "fastlr: interrupted\n")


def test_doctor_prints_what_build_info_knows(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for key, value in fastlr.build_info().items():
        text = ", ".join(value) if isinstance(value, list) else str(value)
        assert (
            f"torch version {text}" if key == "torch" else f"fastlr {key.replace('_', ' ')} {text}"
        ) in lines
    assert f"machine python {platform.python_implementation()} {platform.python_version()}" in lines


def test_doctors_json_says_the_same(capsys):
    _, out, _ = run(capsys, "doctor", "--json")
    report = json.loads(out)
    info = fastlr.build_info()
    assert report["torch"]["version"] == info.pop("torch")
    assert report["fastlr"] == info


# What build_info() says, the GPUs that there are, and what is then told.
DOCTORS = {
    "all in use": ({}, ["a GPU"], []),
    "no CUDA": ({"cuda": False}, [], ["CUDA kernels: no nvcc; there is no GPU that PyTorch could use here"]),
    "no CUDA for a GPU": ({"cuda": False}, ["a GPU"], ["CUDA kernels: no nvcc"]),
    "no GPU": ({}, [], ["CUDA kernels: PyTorch finds no GPU (driver's CUDA: 13.0)"]),
    "slower code": ({"simd_level": "old"}, ["a GPU"], ["SIMD level new: old was asked for"]),
    "no OpenMP": ({"openmp_runtime": None}, ["a GPU"], ["threads: PyTorch loaded no OpenMP runtime"]),
    "idle cores": ({"threads": 1}, ["a GPU"], ["threads: PyTorch has 1 for 2 cores"]),
    "no DLPack": (
        {"tensor_access": "data_ptr()"},
        ["a GPU"],
        ["DLPack exchange API: PyTorch has it from 2.10"],
    ),
}


@pytest.mark.parametrize(("info", "devices", "said"), DOCTORS.values(), ids=DOCTORS.keys())
def test_the_doctor_says_what_is_not_in_use_and_why(capsys, monkeypatch, info, devices, said):
    whole = {"version": "1", "torch": "2", "cuda": True, "cuda_status": "no nvcc", "cuda_driver": "13.0"}
    whole |= {"simd_levels": ["old", "new"], "simd_level": "new", "openmp_runtime": "a.so", "threads": 2}
    whole |= {"tensor_access": "DLPack exchange API", **info}
    monkeypatch.setattr(fastlr, "build_info", lambda: whole)
    monkeypatch.setattr(doctor, "_devices", lambda: devices)
    monkeypatch.setattr(doctor, "_cores", lambda: 2)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    _, out, _ = run(capsys, "doctor")
    told = [line[2:] for line in out.splitlines() if line.startswith("- ")]
    assert len(told) == len(said)
    assert all(line.startswith(start) for line, start in zip(told, said, strict=True))
    assert ("everything that could be used is in use" in out) == (not said)


def test_the_doctor_knows_the_extras_packages(monkeypatch):
    lines = ["torch>=2.6", 'rich>=13; extra == "demo"', "no_such [x]>1 ; extra == 'plot'"]
    lines += ["pytest>=8; extra == 'test'", 'fastlr[demo]; extra == "test"']
    monkeypatch.setattr(doctor, "requires", lambda name: lines)
    installed = importlib.metadata.version
    monkeypatch.setattr(doctor, "version", lambda name: "1" if name == "rich" else installed(name))
    report = doctor.examined()
    assert report["packages"] == {"no_such": None, "rich": "1"}
    assert ["packages", "no_such", "not installed"] in doctor.table(report)


# -- bench ----------------------------------------------------------------------------------------------


@pytest.fixture
def small_bench(monkeypatch):
    monkeypatch.setattr(bench, "PARAMETER_SETS", {"tiny": [(3, 2), (5,)], "tinier": [(2,)]})
    monkeypatch.setattr(bench, "SETS", ("tiny", "tinier"))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)


def test_the_bench_has_a_row_for_each_update(capsys, small_bench):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    code, out, err = run(capsys, "bench", "--seconds", 0, "--threads", 1, "--rules", "sgd", "rmsprop")
    assert code == 0
    assert err.splitlines()[0].startswith("sgd, 4 runs")
    assert "threads 1" in out.splitlines()[0]
    heading, *rows = [re.split(r"  +", line) for line in out.splitlines()[3:]]
    assert heading == ["rule", "update", "parameters", "fastlr", "torch fused", "torch foreach"]
    assert [tuple(row[:3]) for row in rows] == [
        (rule, update, name)
        for rule in ("sgd", "rmsprop")
        for update in ("step", "clip, step, average")
        for name in ("tiny", "tinier")
    ]
    for row in rows:
        assert float(row[3].replace(",", "")) > 0
        assert (row[4] == "none") == (row[0] == "rmsprop")
        assert re.fullmatch(r"[\d,.]+ \(\d+\.\d\dx\)", row[5])
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_the_benchs_json_says_what_was_measured(capsys, small_bench):
    code, out, _ = run(capsys, "bench", "--seconds", 0, "--rules", "sgd", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["machine"]["fastlr"] == fastlr.__version__
    first = report["rows"][0]
    assert (first["parameters"], first["tensors"], first["elements"]) == ("tiny", 2, 11)
    assert list(first["times"]) == ["fastlr", "torch fused", "torch foreach"]
    assert all(t["us"] > 0 and t["ratio"] > 0 and t["rounds"] == 5 for t in first["times"].values())


@pytest.mark.parametrize(("load", "busy"), [(0.9, False), (1.1, True), (None, False)])
def test_the_bench_says_when_the_machine_is_busy(capsys, small_bench, monkeypatch, load, busy):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    if load is None:
        monkeypatch.delattr(os, "getloadavg", raising=False)
    else:
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    _, out, _ = run(capsys, "bench", "--seconds", 0, "--rules", "rmsprop")
    assert ("busy before this began (load 1.1 on 4 cores)" in out) == busy


# -- help and completion --------------------------------------------------------------------------------


def commands_of(parser):
    (found,) = [action.choices for action in parser._actions if hasattr(action.choices, "values")]
    return found


def test_every_example_of_the_help_can_be_given():
    parsed = 0
    for name, command in commands_of(cli.parser()).items():
        examples = re.findall(r"^  (?:eval \"\$\()?fastlr ([^)>\n]*)", command.epilog, re.MULTILINE)
        assert examples, name
        for example in examples:
            if not example.endswith("--help"):
                parsed += bool(cli.parser().parse_args(example.split()).command)
    assert parsed >= 15


def test_every_argument_has_a_help():
    def check(parser):
        for action in parser._actions:
            if hasattr(action.choices, "values"):
                for command in action.choices.values():
                    check(command)
            else:
                assert action.help, (parser.prog, action.dest)
                assert "``" not in action.help

    check(cli.parser())


def test_the_help_says_what_the_exit_codes_are(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    codes = out.split("exit codes:\n")[1].split("\n\n")[0]
    assert re.findall(r"^  (\d+) ", codes, re.MULTILINE) == ["0", "1", "2", "130"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_commands_and_options(capsys, shell):
    pytest.importorskip("shtab", reason="completion is shtab's")
    code, out, _ = run(capsys, "completion", shell)
    assert code == 0
    for word in ("range-test", "triangular2", "num-steps", "step-size-up"):
        assert word in out


def test_bash_completes(capsys, tmp_path):
    """Commands, and the files that a command takes."""
    pytest.importorskip("shtab", reason="completion is shtab's")
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    (tmp_path / "train.py").touch()
    _, script, _ = run(capsys, "completion", "bash")
    (function,) = re.findall(r"^complete .*-F (\S+) fastlr$", script, re.MULTILINE)
    for words in ("fastlr schedule triang", "fastlr range-test tra"):
        script += f"\nCOMP_WORDS=({words}); COMP_CWORD=2; {function}; echo ${{COMPREPLY[@]}}"
    done = subprocess.run([bash, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.stdout.splitlines() == ["triangular triangular2", "train.py"]


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"fastlr {fastlr.__version__}\n", "")


# What becomes of stdout, and what the command then says and exits with.
OUTPUTS = {
    "closed, small": ("schedule constant --value 1 --at 0 | sleep 0; echo ${PIPESTATUS[0]}", "", "1\n"),
    "closed, large": (
        "schedule constant --value 1 --steps 9999 --json | head -1; echo ${PIPESTATUS[0]}",
        "",
        "{\n1\n",
    ),
    "full": (
        "schedule constant --value 1 --at 0 > /dev/full; echo $?",
        "fastlr: error: [Errno 28] No space left on device\n",
        "1\n",
    ),
}


@pytest.mark.parametrize(("line", "err", "out"), OUTPUTS.values(), ids=OUTPUTS.keys())
def test_what_stdout_does_not_take_is_said_once_or_not_at_all(tmp_path, line, err, out):
    bash = shutil.which("bash")
    if bash is None or not os.path.exists("/dev/full"):
        pytest.skip("there is no bash, or no /dev/full")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [bash, "-c", f"{shlex.quote(sys.executable)} -m fastlr {line}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, env=environment)
    assert (done.stdout, done.stderr) == (out, err)


def test_what_an_encoding_lacks_stops_nothing(monkeypatch):
    """Bars are drawn of signs that it has."""
    pytest.importorskip("rich", reason="bars are rich's")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["schedule", "cosine", "--start", "1", "--end", "0", "--steps", "9"]) == 0
    monkeypatch.setattr(doctor, "examined", lambda: print("95.5 \u00b1 1.0 %") or {"not_in_use": []})
    monkeypatch.setattr(doctor, "table", lambda report: [["a"]])
    assert cli.main(["doctor"]) == 0
    assert out.errors == "strict"
    text = out.buffer.getvalue().decode("ascii")
    assert "95.5 ? 1.0 %" in text
    bars = [row.count("#") for row in text.splitlines()[2:12]]
    assert bars == sorted(bars, reverse=True)
    assert bars[0] > 40
    assert "?" not in text.splitlines()[2]


def test_the_package_can_be_run_as_a_module(tmp_path):
    command = [sys.executable, "-m", "fastlr", "schedule", "constant", "--value", "0.5", "--at", "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3 0.5\n", "")
