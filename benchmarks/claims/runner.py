"""Runs a claim: many small trainings in a pool of processes, then tables, a verdict and a picture.

A claim is one file of this folder, whose last line makes its :class:`Claim`; its name stands in ``NAMES`` of
``__main__.py``. It says what there is to train (``jobs``), trains one such job (``run``, a pure function of
the job, so that any process may do it at any time), and makes of all the runs what is shown (``summarise``,
``draw``). ``cyclic.py`` is one to begin with, ``tasks.py`` has the models, the training and the choosing.

Everything else is here. Each finished job is a line of a file beside the results, so that a run that was
killed goes on with the jobs it lacks. The results are a JSON file (every run, tables, verdict), the tables in
Markdown, and a PNG.

What a clock or the machine decides is kept apart from what the seeds decide: a job returns both, and the JSON
holds the former under "measured" alone.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch

import fastlr
from fastlr import data
from fastlr._files import write_text
from fastlr._training import one_thread

Job: TypeAlias = dict[
    str, Any
]  # parameters that JSON can hold; "seed" is the one that differs within a policy
Rows: TypeAlias = list[list[str]]  # of a table, under a row of headings
Verdict = Literal["holds", "holds partly", "does not hold here"]


@dataclass(frozen=True)
class Setting:
    """What all jobs of a claim are run with.

    Attributes:
        data: the data set; None: of a claim that needs none.
        folder: of its files, see :func:`fastlr.data.load`.
        seeds: runs of each policy.
        scale: factor on all numbers of updates.
        quick: small grids, which show that all of it works rather than what is true.
        device: that models and data are on.
    """

    data: str | None
    folder: str | None = None
    seeds: int = 10
    scale: float = 1.0
    quick: bool = False
    device: str = "cpu"

    def updates(self, full: float) -> int:
        """A number of updates, scaled."""
        return max(40, round(full * self.scale))


QUICK: dict[str, Any] = {"seeds": 2, "scale": 0.25, "quick": True}


class Result(NamedTuple):
    """What a job returns, for JSON. figures: what its parameters decide; measured: seconds, bytes."""

    figures: dict[str, Any]
    measured: dict[str, Any]


class Run(NamedTuple):
    """A finished job."""

    job: Job
    figures: dict[str, Any]
    measured: dict[str, Any]


class Statement(NamedTuple):
    """A part of a claim, and whether the figures bear it out."""

    text: str
    holds: bool


@dataclass(frozen=True)
class Table:
    """title, rows under a row of headings, and a caption. measured: it holds times, which no seed decides."""

    title: str
    rows: Rows
    note: str = ""
    measured: bool = False


@dataclass(frozen=True)
class Summary:
    """What the runs say: tables, and the statements that the verdict is made of. animated: whether there is a
    GIF beside the picture."""

    tables: list[Table]
    statements: list[Statement]
    notes: list[str] = field(default_factory=list)
    animated: bool = False

    @property
    def verdict(self) -> Verdict:
        """All statements hold, or some, or none."""
        held = [statement.holds for statement in self.statements]
        return "holds" if all(held) else "holds partly" if any(held) else "does not hold here"

    @property
    def listed(self) -> str:
        """The statements in Markdown, and whether each is borne out."""
        return "\n".join(f"- {'yes' if s.holds else 'no'}: {s.text}" for s in self.statements)


class Claim(Protocol):
    """A claim of a paper.

    Attributes:
        name: on the command line and of the files.
        title: the claim in a sentence.
        paper: where it is from.
        paper_says: the paper's own figures.
        rule: in words, when it holds; ``summarise()`` is the same as code.
        data: data sets it can be shown on, the usual one first; empty: it needs none.
    """

    name: str
    title: str
    paper: str
    paper_says: str
    rule: str
    data: tuple[str, ...]

    def jobs(self, setting: Setting) -> list[Job]:
        """All that there is to run, no two alike."""

    def run(self, setting: Setting, job: Job) -> Result:
        """Runs one; the result depends on nothing but the arguments."""

    def summarise(self, setting: Setting, runs: Sequence[Run]) -> Summary:
        """Tables and statements of all the jobs' runs, which come in the jobs' order."""

    def draw(self, setting: Setting, runs: Sequence[Run], path: Path) -> None:
        """Saves the picture; ``path`` ends in .png, and others may be saved beside it."""


def load(name: str) -> Claim:
    """The claim of a file of this folder."""
    claim: Claim = importlib.import_module(f"benchmarks.claims.{name}").claim
    return claim


# -- running jobs --------------------------------------------------------------------------------------

Submit: TypeAlias = Callable[[str, Setting, list[Job]], Iterable[tuple[int, Result]]]


@contextmanager
def pool(workers: int) -> Iterator[Submit]:
    """Runs jobs in so many processes, of one thread each; 0: in this one. Yields results as they come."""
    if workers == 0:
        yield lambda name, setting, jobs: ((i, _work(name, setting, job)) for i, job in enumerate(jobs))
        return
    context = multiprocessing.get_context("spawn")  # forked processes cannot use a GPU
    executor = ProcessPoolExecutor(workers, context, _begin)

    def submit(name: str, setting: Setting, jobs: list[Job]) -> Iterator[tuple[int, Result]]:
        futures = {executor.submit(_work, name, setting, job): i for i, job in enumerate(jobs)}
        for future in as_completed(futures):
            yield futures[future], future.result()

    try:
        yield submit
    finally:
        executor.shutdown(cancel_futures=True)


def _begin() -> None:
    """Prepares a worker, which ends when its parent is no more, killed or not."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(name: str, setting: Setting, job: Job) -> Result:
    with one_thread():
        try:
            return load(name).run(setting, job)
        except Exception as error:
            raise RuntimeError(f"{name}, job {job}: {error}") from error


class Finished:
    """The runs that are done, in a file of one line each; a line that a kill has cut short does not count.

    The first line says what they were made with. A file made with anything else is begun anew, but not before
    there is a run to write: what fails at once takes nothing away.
    """

    def __init__(self, path: Path, made_with: dict[str, Any]) -> None:
        self.path = path
        self._first = json.dumps(made_with)
        self._runs: dict[str, Run] = {}
        self._begun = False
        lines = path.read_text("utf-8", errors="replace").split("\n") if path.exists() else []
        if lines and lines[0] == self._first:
            for line in lines[1:-1]:  # what follows the last line break is cut short, or empty
                with suppress(ValueError, TypeError):  # damaged ones do not count
                    run = Run(**json.loads(line))
                    self._runs[_key(run.job)] = run

    def __contains__(self, job: Job) -> bool:
        return _key(job) in self._runs

    def of(self, jobs: Iterable[Job]) -> list[Run]:
        return [self._runs[_key(job)] for job in jobs]

    def add(self, run: Run) -> None:
        if not self._begun:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = (self._first, *map(_line, self._runs.values()))
            write_text(self.path, "".join(f"{line}\n" for line in kept))
            self._begun = True
        line = _line(run)
        self._runs[_key(run.job)] = Run(**json.loads(line))  # as it would be read from the file
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


def _key(job: Job) -> str:
    return json.dumps(job, sort_keys=True)


def _line(run: Run) -> str:
    return json.dumps(run._asdict(), allow_nan=False)


def _made_with(claim: Claim, setting: Setting) -> dict[str, Any]:
    """What decides a job's figures, besides its parameters."""
    module = importlib.import_module(type(claim).__module__)
    package = Path(fastlr.__file__).parent
    sources = [
        *(Path(str(source)) for source in (module.__file__, __file__, fastlr._core.__file__)),
        Path(__file__).with_name("tasks.py"),
        *sorted(package.rglob("*.py")),
    ]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    return {
        "setting": asdict(setting),
        "data": None if setting.data is None else _data_digest(setting.data, setting.folder),
        "torch": torch.__version__,
        "fastlr": fastlr.__version__,
        "source": digest[:16],
    }


@lru_cache(maxsize=4)
def _data_digest(name: str, folder: str | None) -> str:
    found = data.load(name, folder)  # type: ignore[arg-type]
    digest = hashlib.sha256()
    for tensor in (found.x_train, found.y_train, found.x_test, found.y_test):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


# -- a whole claim -------------------------------------------------------------------------------------


def stem(claim: Claim, setting: Setting) -> str:
    """What its files are called."""
    return claim.name if setting.data is None else f"{claim.name}-{setting.data}"


def _results(claim: Claim, data: str | None, out: Path) -> Path:
    return out / f"{stem(claim, Setting(data))}.json"


def finished_path(claim: Claim, setting: Setting, out: Path) -> Path:
    """Where the runs of a setting are kept until all are done."""
    of_setting = hashlib.sha256(json.dumps(asdict(setting)).encode()).hexdigest()[:8]
    return out / f".{stem(claim, setting)}-{of_setting}.jsonl"


def run_claim(
    claim: Claim,
    setting: Setting,
    out: Path,
    submit: Submit,
    stage: Callable[[str, int], Callable[[], object]],
) -> Summary:
    """Runs the jobs that are not done yet, and writes the results.

    Args:
        claim: to run.
        setting: to run it with.
        out: folder to write to.
        submit: of :func:`pool`.
        stage: of :func:`fastlr._progress.progress`.
    """
    begin = time.perf_counter()
    jobs = claim.jobs(setting)
    finished = Finished(finished_path(claim, setting, out), _made_with(claim, setting))
    left = [job for job in jobs if job not in finished]
    advance = stage(claim.name, len(left))
    for i, result in submit(claim.name, setting, left):
        finished.add(Run(left[i], *result))
        advance()
    runs = finished.of(jobs)
    seconds = time.perf_counter() - begin
    machine = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "fastlr": fastlr.__version__,
    }
    return write(claim, setting, runs, out, {**machine, "jobs": len(left), "seconds": round(seconds, 1)})


def redraw(claim: Claim, setting: Setting, out: Path) -> Summary:
    """Makes tables, verdict and picture of the runs in the JSON file anew."""
    setting, runs, made = read(_results(claim, setting.data, out))
    return write(claim, setting, runs, out, made)


def read(path: Path) -> tuple[Setting, list[Run], dict[str, Any]]:
    """What a JSON file was made of: the setting, the runs, and what they were made with."""
    content = json.loads(path.read_text("utf-8"))
    measured = content["measured"]
    runs = [Run(**run, measured=m) for run, m in zip(content["runs"], measured["runs"], strict=True)]
    return Setting(**content["setting"]), runs, measured["made"]


DOCS = """# What the papers claim, shown here

One section a claim: the rule by which it holds, which code applies to the figures; what the paper says;
what came out. Where a rule or a setting was changed after figures had been seen, the section says so.
Intervals are over the seeds, which decide labels, initial weights and the order of the batches; the test set
is one. Papers' figures are those of the papers' own settings, which are larger.

The page is made from the files in [benchmarks/results/claims](../benchmarks/results/claims) by
`python -m benchmarks.claims --docs`. `make claims` runs everything anew, `make claims QUICK=1` a small form.
"""


def write_docs(claims: Iterable[Claim], results: Path, path: Path) -> None:
    """Makes the page of all claims, on all data sets that there are results of.

    Raises:
        ValueError: there are none of one of them, or they are a quick run's.
    """
    pictures = Path(os.path.relpath(results, path.parent)).as_posix()
    rows, pages = [["claim", "data", "here"]], []
    for claim in claims:
        names = [name for name in claim.data or (None,) if _results(claim, name, results).exists()]
        if not names:
            raise ValueError(f"no results of {claim.name} in {results}")
        for name in names:
            setting, runs, _ = read(_results(claim, name, results))
            if setting.quick:
                raise ValueError(f"the results of {claim.name} in {results} are those of a quick run")
            summary = claim.summarise(setting, runs)
            rows.append([claim.title, name or "", summary.verdict])
            pages.append(page(claim, setting, summary, f"{pictures}/"))
    write_text(path, "\n".join([DOCS, markdown(rows) + "\n", *pages]))


def write(claim: Claim, setting: Setting, runs: list[Run], out: Path, made: dict[str, Any]) -> Summary:
    """Writes the JSON file, the tables and the picture."""
    summary = claim.summarise(setting, runs)
    content = {
        "claim": claim.name,
        "title": claim.title,
        "paper": claim.paper,
        "paper says": claim.paper_says,
        "rule": claim.rule,
        "setting": asdict(setting),
        "verdict": summary.verdict,
        "statements": [statement._asdict() for statement in summary.statements],
        "notes": summary.notes,
        "tables": [asdict(table) for table in summary.tables if not table.measured],
        "runs": [{"job": run.job, "figures": run.figures} for run in runs],
        "measured": {
            "made": made,
            "tables": [asdict(table) for table in summary.tables if table.measured],
            "runs": [run.measured for run in runs],
        },
    }
    path = out / stem(claim, setting)
    write_text(path.with_suffix(".json"), _json(content))
    write_text(path.with_suffix(".md"), page(claim, setting, summary))
    claim.draw(setting, runs, path.with_suffix(".png"))
    return summary


def _json(content: dict[str, Any]) -> str:
    """Its entries, and those of its lists, a line each."""

    def lines(value: Any) -> str:
        if not isinstance(value, list):
            return json.dumps(value, allow_nan=False)
        return "[\n" + ",\n".join(json.dumps(entry, allow_nan=False) for entry in value) + "\n]"

    return (
        "{\n" + ",\n".join(f"{json.dumps(key)}: {lines(value)}" for key, value in content.items()) + "\n}\n"
    )


def page(claim: Claim, setting: Setting, summary: Summary, pictures: str = "") -> str:
    """A claim's section in Markdown: what the paper says, what came out, and how to run it again.

    pictures: where they lie, seen from the page.
    """
    usual = Setting(setting.data, **(QUICK if setting.quick else {}))
    command = f"python -m benchmarks.claims {claim.name}"
    command += "" if setting.data is None else f" --data {setting.data}"
    command += " --quick" if setting.quick else ""
    for name in ("folder", "seeds", "device"):
        if getattr(setting, name) != getattr(usual, name):
            command += f" --{name} {getattr(setting, name)}"
    lines = [
        f"## {claim.title}" + ("" if setting.data is None else f": {setting.data}"),
        f"**{summary.verdict.capitalize()}.** {claim.rule}",
        *(["A quick run, which shows that all of it works and no more."] if setting.quick else []),
        summary.listed,
        f"The paper: {claim.paper_says} ({claim.paper})",
        *(
            f"![{claim.title}]({pictures}{stem(claim, setting)}.{kind})"
            for kind in (("png", "gif") if summary.animated else ("png",))
        ),
        *summary.notes,
    ]
    for table in summary.tables:
        lines += [f"**{table.title}**", markdown(table.rows), *([table.note] if table.note else [])]
    return "\n\n".join([*lines, f"    {command}"]) + "\n"


def markdown(rows: Rows) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)
