"""Proves and measures everything on a GPU, stage by stage; ``make gpu``.

Each stage is a process with a time limit of its own, and its result is on disk the moment it ends: one
that hangs, crashes or fails costs the others nothing. Needs what the machine has, and fetches nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .report import write_json
from .stages import ROOT, STAGES, Found, Settings, Skip, Stage


@dataclass
class Outcome:
    stage: str
    status: str  # passed, failed or skipped
    seconds: float
    headline: str
    problems: list[str]

    def row(self) -> str:
        told = self.headline if self.status == "passed" else "; ".join([*self.problems[:2], self.headline])
        return f"{self.stage:14} {self.status:8} {self.seconds:7.1f} s  {told.strip('; ')}"


def environment(settings: Settings) -> dict[str, str]:
    """Finds the fastlr that stage b has built, or else the one that is installed."""
    tools = [str(Path(settings.python).parent), os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    paths = [str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    if settings.site.exists():
        paths.insert(0, str(settings.site))
    return {
        **os.environ,
        "PATH": os.pathsep.join(tools),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        # Plug-ins that happen to be installed warn, and a warning is an error to the tests.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }


def run_for(command: list[str], log: Path, limit: float, env: dict[str, str]) -> tuple[str, int]:
    """Runs it with all that it starts in a group of its own. Returns what went wrong, and the status."""
    with log.open("wb") as output:
        output.write(f"{shlex.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command,
            cwd=ROOT / "tests",
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"still running after {limit:g} s", -signal.SIGKILL
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has left behind, too
            process.wait()
    if status < 0:
        return f"ended by {signal.Signals(-status).name}", status
    return (f"exit status {status}" if status else ""), status


def run_stage(stage: Stage, settings: Settings) -> Outcome:
    begin = time.perf_counter()
    log = stage.file(settings, ".log")
    try:
        command = stage.command(settings, stage)
    except Skip as reason:
        outcome = Outcome(stage.name, "skipped", 0.0, "", [str(reason)])
        write_json(stage.file(settings, ".json"), vars(outcome))
        return outcome
    wrong, status = run_for(command, log, stage.limit, environment(settings))
    try:
        found = stage.read(settings, stage)
    except Exception as error:  # a file that was cut off
        found = Found("", [f"its results cannot be read: {type(error).__name__}: {error}"])
    problems = [*([wrong] if wrong else []), *found.problems]
    seconds = round(time.perf_counter() - begin, 1)
    outcome = Outcome(stage.name, "failed" if problems else "passed", seconds, found.headline, problems)
    content: dict[str, Any] = {**vars(outcome), "exit_status": status, **found.details}
    write_json(stage.file(settings, ".json"), content)
    if problems:
        print(f"\n-- {log}")
        print("\n".join(log.read_text(errors="replace").splitlines()[-25:]), flush=True)
    return outcome


def main(argv: list[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    parser = argparse.ArgumentParser(prog="python -m on_gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "report" / "gpu", help="folder for results")
    parser.add_argument("--backend", choices=["cuda", "cuda-on-cpu"], default="cuda")
    parser.add_argument("--stages", default="", help="letters, such as c,d; default: all")
    parser.add_argument("--small", action="store_true", help="less of everything")
    arguments = parser.parse_args(argv)
    letters = set(arguments.stages.replace(",", " ").split())
    known = {stage.letter for stage in stages}
    if not letters <= known:
        parser.error(f"--stages must be among {', '.join(sorted(known))}, got {arguments.stages!r}")
    settings = Settings(
        python=sys.executable,
        out=arguments.out.resolve(),
        site=ROOT / "build" / "gpu" / arguments.backend,
        backend=arguments.backend,
        small=arguments.small,
    )
    settings.out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for stage in stages:
        if letters and stage.letter not in letters:
            continue
        print(f"{stage.name} ...", flush=True)
        outcomes.append(run_stage(stage, settings))
        print(outcomes[-1].row(), flush=True)
        write_json(settings.out / "summary.json", [vars(outcome) for outcome in outcomes])
    print(f"\n{'stage':14} {'':8} {'':9}  headline")
    for outcome in outcomes:
        print(outcome.row())
    print(f"results in {settings.out}")
    return int(any(outcome.status == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
