"""The stages of ``make gpu``, the most telling first."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Skip(Exception):
    """A stage that this machine lacks something for; says what."""


@dataclass(frozen=True)
class Settings:
    """What all stages are told.

    Attributes:
        out: where results go.
        site: where stage b installs fastlr.
        backend: "cuda" or "cuda-on-cpu".
        small: less of everything.
    """

    python: str
    out: Path
    site: Path
    backend: str
    small: bool
    path: str  # where programs are looked for

    def has(self, program: str) -> bool:
        return shutil.which(program, path=self.path) is not None

    def need(self, *modules: str) -> None:
        """Raises Skip where this Python lacks one of them."""
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            raise Skip(f"{self.python} has no {', '.join(missing)}")


@dataclass
class Found:
    """What a stage's files say.

    Attributes:
        headline: a line for the table.
        problems: each makes the stage a failed one, whatever its exit status.
        details: for its JSON file.
    """

    headline: str = ""
    problems: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A command with a time limit of its own.

    Attributes:
        name: its letter, then what it is.
        limit: seconds.
        command: what to run in the folder ``tests``; raises Skip.
        read: what it found, after it has ended, however it did.
        needs_build: whether it looks at what stage b has built.
    """

    name: str
    limit: float
    command: Callable[[Settings, Stage], list[str]]
    read: Callable[[Settings, Stage], Found]
    needs_build: bool = False

    @property
    def letter(self) -> str:
        return self.name[0]

    def file(self, settings: Settings, suffix: str) -> Path:
        return settings.out / f"{self.name}{suffix}"


# -- the project's own programs ------------------------------------------------------------------


def program(module: str, *arguments: str) -> Callable[[Settings, Stage], list[str]]:
    def command(settings: Settings, stage: Stage) -> list[str]:
        settings.need("torch", "numpy", "pytest")
        return [
            *(settings.python, "-m", f"on_gpu.{module}"),
            *("--result", str(stage.file(settings, ".found.json")), "--backend", settings.backend),
            *(["--small"] if settings.small else []),
            *arguments,
        ]

    return command


def read_report(settings: Settings, stage: Stage) -> Found:
    path = stage.file(settings, ".found.json")
    if not path.exists():
        return Found("", ["it wrote no report"])
    content = json.loads(path.read_text())
    path.unlink()
    problems = [f"{c['check']}: {c.get('error')}" for c in content["checks"] if not c["passed"]]
    return Found(content["headline"], problems, content)


def install(settings: Settings, stage: Stage) -> list[str]:
    settings.need("scikit_build_core", "pybind11", "pip")
    if not settings.has("cmake") and importlib.util.find_spec("cmake") is None:
        raise Skip("there is no cmake")
    if settings.backend == "cuda" and not settings.has("nvcc"):
        raise Skip("there is no nvcc on PATH, nor in /usr/local/cuda/bin")
    return program("install", "--site", str(settings.site))(settings, stage)


# -- tests ---------------------------------------------------------------------------------------

TESTS = (
    "test_cuda_device.py",
    "test_sgd.py",
    "test_rules.py",
    "test_rules_checkpoint.py",
    "test_rules_schedules.py",
    "test_rules_state.py",
    "test_tensors.py",
    "test_optimizer.py",
    "test_checkpoint.py",
    "test_amp.py",
    "test_grad_norm.py",
    "test_clip_grad_norm.py",
    "test_clip_grad_value.py",
    "test_grad_scaler.py",
    "test_averages.py",
    "test_buffer_averages.py",
    "test_master_weights.py",
    "test_stochastic_rounding.py",
    "test_whole_update.py",
    "test_scale_lr.py",
    "test_epoch_clock.py",
    "test_written_schedules.py",
    "test_batch_noise_scale.py",
    "test_benchmarks.py",
    "test_examples.py",
)
# Why a test may be left out on a machine that this command is for.
EXPLAINED = re.compile(
    "needs two CUDA devices|the CPU's kernels have (SIMD levels|threads)|launches do not wait for each other"
    "|a device's memory is not read before a step|torch's optimizer has no such implementation"
    "|torch's GradScaler takes no bfloat16 there"
)


def pytest(settings: Settings, stage: Stage) -> list[str]:
    settings.need("torch", "pytest", "hypothesis")
    tests = ("test_amp.py",) if settings.small else TESTS
    # Tests that need files of the repository only are not asked; plug-ins of the machine may warn.
    plugins = ["-p", "no:cacheprovider"] if settings.backend == "cuda" else []
    if importlib.util.find_spec("xdist") is not None and settings.backend == "cuda":
        plugins += ["-p", "xdist", "-n", "12"]
    return [
        *(settings.python, "-m", "pytest", "-q", "-x" if settings.small else "--maxfail=60", *plugins),
        *("--backend", settings.backend, f"--junitxml={stage.file(settings, '.junit.xml')}"),
        *("-p", "on_gpu.failures", f"--failures={stage.file(settings, '.failures.log')}"),
        *("-W", "ignore:The given buffer is not writable", *tests),
    ]


def read_junit(settings: Settings, stage: Stage) -> Found:
    path = stage.file(settings, ".junit.xml")
    if not path.exists():
        return Found("", ["it wrote no report"])
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    found = Found(details={"counts": counts, "failures": []})
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        outcomes = {child.tag: child for child in case}
        if "failure" in outcomes or "error" in outcomes:
            counts["failed"] += 1
            broken = outcomes["failure"] if "failure" in outcomes else outcomes["error"]
            found.details["failures"].append({"test": name, "message": (broken.get("message") or "")[:400]})
        elif "skipped" in outcomes:
            counts["skipped"] += 1
            reason = outcomes["skipped"].get("message") or ""
            if settings.backend == "cuda" and not EXPLAINED.search(reason):
                found.problems.append(f"unexplained skip of {name}: {reason}")
        else:
            counts["passed"] += 1
    if counts["failed"]:
        found.problems.append(f"{counts['failed']} tests failed")
    if not counts["passed"]:
        found.problems.append("no test passed")
    found.headline = ", ".join(f"{count} {name}" for name, count in counts.items())
    return found


# -- sanitizers and profiler ---------------------------------------------------------------------

SANITIZED = 99  # compute-sanitizer's exit status where it has found something


def read_speed(settings: Settings, stage: Stage) -> Found:
    found = read_report(settings, stage)
    figures = found.details.get("figures", {})
    measured = {(result["rule"], result["case"], result["set"]) for result in figures.get("results", [])}
    rules = {rule for rule, *_ in measured}
    asked = [(rule, *case) for case in figures.get("cases", []) for rule in rules]
    if left_out := [", ".join(each) for each in asked if each not in measured]:
        found.problems.append(f"not measured: {'; '.join(left_out)}")
    if not measured:
        found.problems.append("nothing was measured")
    return found


def sanitizer(tool: str) -> Callable[[Settings, Stage], list[str]]:
    def command(settings: Settings, stage: Stage) -> list[str]:
        # racecheck takes ten seconds over each kernel with large arguments, which share memory as others do.
        run = program("launch_everything", *(["--small"] if tool == "racecheck" else []))(settings, stage)
        if settings.backend != "cuda":
            return run  # its stand-in watches nothing: that the program runs is all that is shown
        if not settings.has("compute-sanitizer"):
            raise Skip("compute-sanitizer is not installed")
        return ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(SANITIZED), *run]

    return command


def read_sanitizer(settings: Settings, stage: Stage) -> Found:
    found = read_report(settings, stage)
    log = stage.file(settings, ".log").read_text(errors="replace")
    summary = re.findall(r"=+ (?:ERROR|RACECHECK) SUMMARY: .*", log)
    if summary:
        told = summary[-1].strip("= ")
        if any(int(number) for number in re.findall(r"\d+", told)):
            found.problems.append(told)
        found.headline = f"{told}; {found.headline}"
    elif settings.backend == "cuda":
        found.problems.append("the sanitizer told no summary")
    else:
        found.headline = f"no sanitizer; {found.headline}"
    return found


METRICS = {
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM throughput, % of peak",
    "dram__bytes.sum.per_second": "DRAM bytes a second",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy, %",
    "launch__registers_per_thread": "registers",
    "launch__occupancy_limit_registers": "blocks that registers allow",
    "gpu__time_duration.sum": "duration",
}


def profiler(settings: Settings, stage: Stage) -> list[str]:
    if settings.backend != "cuda":
        raise Skip("there is no hardware to profile")
    if not settings.has("ncu"):
        raise Skip("ncu is not installed")
    return [
        *("ncu", "--csv", "--clock-control", "none", "--metrics", ",".join(METRICS)),
        *("--kernel-name", "regex:step_kernel", "--launch-skip", "2", "--launch-count", "2"),
        *program("launch_everything", "--large", "100000000")(settings, stage),
    ]


def read_profile(settings: Settings, stage: Stage) -> Found:
    lines = stage.file(settings, ".log").read_text(errors="replace").splitlines()
    refused = [line for line in lines if "ERR_NVGPUCTRPERM" in line or "==ERROR==" in line]
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return Found("", [refused[0] if refused else "ncu printed no table"])
    rows = list(csv.DictReader(line for line in lines[begin:] if line.startswith('"')))
    figures = {
        METRICS[row["Metric Name"]]: f"{row['Metric Value']} {row['Metric Unit']}".strip()
        for row in rows
        if row["Metric Name"] in METRICS
    }
    missing = [name for name in METRICS.values() if not re.search(r"\d", figures.get(name, ""))]
    problems = [f"ncu told nothing of {', '.join(missing)}"] if missing else []
    headline = ", ".join(f"{name} {value}" for name, value in figures.items())
    return Found(headline, problems, {"figures": figures})


STAGES = [
    Stage("a-environment", 60, program("environment"), read_report),
    Stage("b-build", 240, install, read_report),
    Stage("c-smoke", 180, program("smoke"), read_report, needs_build=True),
    Stage("d-speed", 120, program("speed"), read_speed, needs_build=True),
    Stage("e-tests", 240, pytest, read_junit, needs_build=True),
    *(
        Stage(f"f-{tool}", 180, sanitizer(tool), read_sanitizer, needs_build=True)
        for tool in ("memcheck", "racecheck", "synccheck", "initcheck")
    ),
    Stage("g-training", 240, program("training"), read_report, needs_build=True),
    Stage("i-sharded", 120, program("sharding"), read_report, needs_build=True),
    Stage("h-profile", 60, profiler, read_profile, needs_build=True),
]
