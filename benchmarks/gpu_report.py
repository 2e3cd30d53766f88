"""What `make gpu` measured on each GPU, as the tables of docs/performance.md and of benchmarks/README.md.

    python benchmarks/gpu_report.py [--write]

Results are kept as the stages wrote them, in benchmarks/results/gpu/<GPU>/<stage>.json. With --write the
tables between the marks of both files are written anew; without, they are printed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fastlr.bench.rules import RULES

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gpu"
FILES = {"summary": HERE.parent / "docs" / "performance.md", "all": HERE / "README.md"}
MARKS = ("<!-- gpu results: begin -->", "<!-- gpu results: end -->")
NOT_MEASURED = "GPU: not measured. `make gpu` on a machine with one measures it."


def stage(folder: Path, name: str) -> dict[str, Any]:
    """A stage's file, or nothing."""
    path = folder / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def is_result(path: Path) -> bool:
    """Whether a folder's d-speed.json was measured on a GPU, and wholly."""
    found = json.loads(path.read_text())
    figures = found.get("figures", {})
    measured = {(result["case"], result["set"]) for result in figures.get("results", [])}
    wholly = {("step", "GPT-2 small"), ("whole", "GPT-2 small")}
    return found["status"] == "passed" and figures.get("backend") == "cuda" and measured > wholly


def machine(folder: Path) -> str:
    found = stage(folder, "d-speed")["figures"]
    return f"{found['gpu']}, PyTorch {found['torch']}, Python {found['python']}"


def rows(folder: Path) -> list[tuple[str, str, dict[str, dict[str, float]]]]:
    """What is updated, each rule's sets, and their contenders' times."""
    results = sorted(
        stage(folder, "d-speed")["figures"]["results"], key=lambda r: list(RULES).index(r["rule"])
    )
    return [(r["case"], f"{RULES[r['rule']].theirs.__name__}, {r['set']}", r["times"]) for r in results]


def microseconds(us: float) -> str:
    return f"{us:.1f} µs" if us < 100 else f"{us:,.0f} µs"


# What the cases of the summary are called.
SUMMARY = {
    "step": "step and schedule",
    "clip, average": "clipping by norm, step, average of the weights, schedule",
    "whole": "the same with a GradScaler, which no graph can have",
}
CAPTURED = ("fastlr, graph", "torch fused, graph")


def summary(folder: Path) -> str:
    """Eager steps and captured ones beside torch's of the same kind, of SGD and AdamW."""
    lines = [
        f"On an {machine(folder)}: medians of a whole step and their ratios, all in turn in one run.",
    ]
    for case, told in SUMMARY.items():
        lines += [
            "",
            f"| {told} | fastlr | torch fused | | fastlr, CUDA graph | torch fused, CUDA graph | |",
            "|---|---|---|---|---|---|---|",
        ]
        for of_case, name, times in rows(folder):
            if of_case != case or "in one tensor" in name:
                continue
            us = {contender: times[contender]["us"] for contender in times}
            cells = [name]
            for ours, theirs in (("fastlr", "torch fused"), CAPTURED):
                measured = ours in us
                cells += [microseconds(us[ours]), microseconds(us[theirs])] if measured else ["", ""]
                cells.append(f"{us[theirs] / us[ours]:.2f}x" if measured else "")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def everything(folder: Path) -> str:
    """All contenders, and what the other stages said."""
    contenders = list(dict.fromkeys(name for *_, times in rows(folder) for name in times))
    lines = [
        f"### {machine(folder)}",
        "",
        "Microseconds a step on the device; in brackets those of the host.",
        "",
    ]
    lines += [
        f"| parameters | {' | '.join(contenders)} | graph beside the copy |",
        "|---" * (len(contenders) + 2) + "|",
    ]
    for case, name, times in rows(folder):
        cells = [
            f"{times[c]['us']:,.1f} ({times[c]['host_us']:,.1f})" if c in times else "" for c in contenders
        ]
        # A captured step and the copy, both without the host.
        both = "copy" in times and "fastlr, graph" in times
        share = f"{times['copy']['us'] / times['fastlr, graph']['us']:.0%}" if both else ""
        lines.append(f"| {case}: {name} | {' | '.join(cells)} | {share} |")
    lines += ["", "| stage | | seconds | |", "|---|---|---|---|"]
    for row in json.loads((folder / "summary.json").read_text()):
        if row["stage"] != "d-speed":
            lines.append(f"| {row['stage']} | {row['status']} | {row['seconds']:.0f} | {row['headline']} |")
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """What belongs between the marks of each of FILES."""
    folders = sorted(path.parent for path in RESULTS.glob("*/d-speed.json") if is_result(path))
    if not folders:
        return dict.fromkeys(FILES, NOT_MEASURED)
    return {
        "summary": "\n\n".join(summary(folder) for folder in folders),
        "all": "\n\n".join(everything(folder) for folder in folders),
    }


def around(path: Path, marks: tuple[str, str]) -> tuple[str, str, str]:
    """A page up to a table's first mark, the table, and the page from its second mark on."""
    before, rest = path.read_text("utf-8").split(marks[0])
    table, after = rest.split(marks[1])
    return before, table.strip(), after


def between_marks(name: str) -> str:
    """What the table's file has."""
    return around(FILES[name], MARKS)[1]


def tell(pages: dict[str, tuple[Path, tuple[str, str]]], tables: dict[str, str], title: str) -> None:
    """The command: prints the tables, or writes each between its marks on its page."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--write", action="store_true", help="into the pages, instead of printing")
    arguments = parser.parse_args()
    for name, table in tables.items():
        if not arguments.write:
            print(table, end="\n\n")
            continue
        path, marks = pages[name]
        before, _, after = around(path, marks)
        path.write_text(f"{before}{marks[0]}\n{table}\n{marks[1]}{after}", "utf-8")


if __name__ == "__main__":
    tell({name: (path, MARKS) for name, path in FILES.items()}, tables(), __doc__.split("\n")[0])
