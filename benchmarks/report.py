"""What `step.py`, `pipeline.py` and `make gpu` measured, as tables of the README and of docs/performance.md.

    python benchmarks/report.py [--write]

Figures are those of benchmarks/results. With --write the tables between
the marks of both files are written anew; without, they are printed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import gpu_report

from fastlr.bench.rules import FORMS, RULES

HERE = Path(__file__).parent
STEP, PIPELINE = HERE / "results" / "step.json", HERE / "results" / "pipeline.json"
PERFORMANCE = HERE.parent / "docs" / "performance.md"
FILES = {"beside torch": HERE.parent / "README.md", "steps": PERFORMANCE, "whole updates": PERFORMANCE}
THREADS = 2

# What the README shows: steps on a CPU where either is ahead, and on a GPU, eager and captured.
ON_CPU = (
    ("sgd", "161 tensors of 64"),
    ("sgd", "ResNet-50"),
    ("adamw", "GPT-2 small"),
    ("adagrad", "GPT-2 small"),
    ("rmsprop", "ResNet-50"),
)
STEP_ALONE, WHOLE = "step", "clip, average"  # cases of pipeline.py
WHOLE_ON_CPU = (("whole", "adamw", "ResNet-50"), ("clip, average", "sgd", "161 tensors of 64"))
ON_GPU = (
    (STEP_ALONE, "adamw", "GPT-2 small"),
    (STEP_ALONE, "adamw", "ResNet-50"),
    (STEP_ALONE, "rmsprop", "ResNet-50"),
    (WHOLE, "adamw", "GPT-2 small"),
    (WHOLE, "adamw", "161 tensors of 64"),
)


class Beside(NamedTuple):
    """A step's time, and torch's fastest form of it: microseconds, and the ratio of their rounds.

    Attributes:
        limit: what a loop with the same reads and writes and no arithmetic takes, as a part of the step's
            time; None where memory decides nothing.
    """

    ours: float
    theirs: float
    ratio: float
    form: str
    limit: float | None


def beside(result: dict[str, Any]) -> Beside:
    times = result["times"]
    form = min((name for name in FORMS if name in times), key=lambda name: times[name]["ratio"])
    limit = times["traffic"]["ratio"] if "traffic" in times else None
    return Beside(times["fastlr"]["us"], times[form]["us"], times[form]["ratio"], form, limit)


def measured() -> dict[tuple[str, str, str], Beside]:
    """By rule, parameters, and whether gradients are warm or fresh."""
    results = json.loads(STEP.read_text("utf-8"))["results"]
    return {(r["rule"], r["set"], r["gradients"]): beside(r) for r in results if r["threads"] == THREADS}


def time_of(us: float) -> str:
    if us < 1000:
        return f"{us:.0f} µs"
    return f"{us / 1000:.{2 if us < 10_000 else 1}f} ms"


def on_gpu() -> tuple[str, dict[tuple[str, str, str], dict[str, dict[str, float]]]]:
    """The first GPU that there are results of, and its times by case, rule and parameters."""
    for path in sorted(gpu_report.RESULTS.glob("*/d-speed.json")):
        if gpu_report.is_result(path):
            figures = json.loads(path.read_text("utf-8"))["figures"]
            return figures["gpu"], {(r["case"], r["rule"], r["set"]): r["times"] for r in figures["results"]}
    return "a GPU", {}


def beside_torch() -> str:
    """The README's table."""
    steps, (gpu, on_it) = measured(), on_gpu()
    lines = ["| a step of | fastlr | torch, its fastest form | made by |", "|---|---|---|---|"]
    for rule, name in ON_CPU:
        found = steps[rule, name, "warm"]
        lines.append(
            f"| {RULES[rule].theirs.__name__}, {name}, two cores | {time_of(found.ours)} | "
            f"{time_of(found.theirs)} ({found.form}), {found.ratio:.2f}x | [`step.py`](benchmarks/step.py) |"
        )
    whole = {(r["case"], r["rule"], r["set"]): r["times"] for r in pipeline()["results"]}
    for case, rule, name in WHOLE_ON_CPU:
        times = whole[case, rule, name]
        form = min((n for n in times if n.startswith("torch")), key=lambda n: times[n]["ratio"])
        in_short = form.removeprefix("torch").lstrip(" .")
        what = ", ".join((*(("scaler",) if case == "whole" else ()), "clipping and average"))
        lines.append(
            f"| {RULES[rule].theirs.__name__}, {what}, {name}, two cores | "
            f"{time_of(times['fastlr']['us'])} | "
            f"{time_of(times[form]['us'])} ({in_short}), {times[form]['ratio']:.2f}x | "
            "[`pipeline.py`](benchmarks/pipeline.py) |"
        )
    for form, in_words in (("", gpu), (", graph", f"{gpu}, CUDA graph")):
        for case, rule, name in ON_GPU:
            times = on_it.get((case, rule, name), {})
            cells = ["not measured", "not measured"]
            if f"fastlr{form}" in times:
                ours, theirs = (times[f"{who}{form}"]["us"] for who in ("fastlr", "torch fused"))
                cells = [time_of(ours), f"{time_of(theirs)} (fused), {theirs / ours:.2f}x"]
            elif form:
                continue
            of = RULES[rule].theirs.__name__ + (", clipping and average" if case == WHOLE else "")
            title = f"{of}, {name}, {in_words}"
            lines.append(f"| {title} | {' | '.join(cells)} | [`make gpu`](benchmarks/gpu_step.py) |")
    return "\n".join(lines)


def steps() -> str:
    """SGD's step with its times, and every rule's ratio."""
    found, machine = measured(), json.loads(STEP.read_text("utf-8"))
    sets = list(dict.fromkeys(name for _, name, _ in found))
    rules = list(dict.fromkeys(rule for rule, _, _ in found))
    lines = [
        f"On two cores of an {machine['processor']} with PyTorch {machine['torch']}, SGD:",
        "",
        "| parameters | fastlr | torch fused + CyclicLR | warm | fresh gradients |",
        "|---|---|---|---|---|",
    ]
    for name in sets:
        warm, fresh = found["sgd", name, "warm"], found["sgd", name, "fresh"]
        lines.append(
            f"| {name} | {time_of(warm.ours)} | {time_of(warm.theirs)} | {warm.ratio:.2f}x | "
            f"{fresh.ratio:.2f}x |"
        )
    for gradients in ("warm", "fresh"):
        lines += [
            "",
            f"Every rule over {gradients} gradients: how many times longer the fastest form of torch's takes "
            "that there is, fused or not.",
            "",
            f"| parameters | {' | '.join(RULES[rule].theirs.__name__ for rule in rules)} |",
            "|---" * (len(rules) + 1) + "|",
        ]
        lines += [
            f"| {name} | {' | '.join(f'{found[rule, name, gradients].ratio:.2f}x' for rule in rules)} |"
            for name in sets
        ]
    limits = {name: [found[rule, name, "warm"].limit for rule in rules] for name in sets}
    lines += ["", "The limit, over warm gradients, as a part of fastlr's time:", ""]
    lines += [f"| parameters | {' | '.join(RULES[rule].theirs.__name__ for rule in rules)} |"]
    lines += ["|---" * (len(rules) + 1) + "|"]
    lines += [
        f"| {name} | {' | '.join(f'{limit:.0%}' for limit in those if limit is not None)} |"
        for name, those in limits.items()
        if None not in those
    ]
    return "\n".join(lines)


def pipeline() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(PIPELINE.read_text("utf-8"))
    return content


def whole_updates() -> str:
    """How many times longer torch's fastest pieces take, and compiled ones, for each part of the update."""
    content = pipeline()
    results = {(r["rule"], r["case"], r["set"]): r["times"] for r in content["results"]}
    rules, cases, sets = (list(dict.fromkeys(key[place] for key in results)) for place in range(3))
    lines = [f"On two cores of an {content['processor']} with PyTorch {content['torch']}:"]
    for rule in rules:
        lines += [
            "",
            f"| {RULES[rule].theirs.__name__} | {' | '.join(cases)} |",
            "|---" * (len(cases) + 1) + "|",
        ]
        for name in sets:
            cells = []
            for case in cases:
                times = results[rule, case, name]
                best = min(found["ratio"] for form, found in times.items() if form.startswith("torch "))
                limit = f" ({times['limit']['ratio']:.0%})" if "limit" in times else ""
                compiled = times.get("torch.compile")
                also = f", compiled {compiled['ratio']:.2f}x" if compiled else ""
                cells.append(f"{time_of(times['fastlr']['us'])}, {best:.2f}x{also}{limit}")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """What belongs between the marks of each of FILES."""
    return {"beside torch": beside_torch(), "steps": steps(), "whole updates": whole_updates()}


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def between_marks(name: str) -> str:
    """What the table's file has."""
    return gpu_report.around(FILES[name], marks(name))[1]


if __name__ == "__main__":
    pages = {name: (path, marks(name)) for name, path in FILES.items()}
    gpu_report.tell(pages, tables(), __doc__.split("\n")[0])
