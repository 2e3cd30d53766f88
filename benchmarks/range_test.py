"""Do the bounds that the range test finds train as well as bounds picked by hand?

Each seed has its own labels, weights and order of batches; its range test validates on a sixth of the
training set. The pairs picked by hand are a series of round rates, with the lower bound a tenth and a quarter
of the upper one; the best of them is chosen by the very test accuracy shown, which favours it. All train
the same number of updates with triangular2, four cycles.

    python benchmarks/range_test.py [--data digits fashion-mnist] [--seeds 5] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import json
from itertools import chain, islice, repeat
from pathlib import Path
from statistics import mean

import torch

import fastlr
from fastlr import data
from fastlr._files import write_text

# Hidden units, batch size, updates, and the part of the training labels that is drawn anew.
TASKS = {"digits": (32, 8, 1500, 0.2), "fashion-mnist": (64, 64, 2000, 0.0)}
BY_HAND = [(top / ratio, top) for top in (0.005, 0.01, 0.02, 0.05, 0.1) for ratio in (10, 4)]
CYCLES = 4
cross_entropy = torch.nn.functional.cross_entropy


def make_model(dataset: data.Dataset, hidden: int, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(dataset.x_train.shape[1], hidden),
        torch.nn.ReLU(),
        torch.nn.Linear(hidden, dataset.classes),
    )


def find(dataset: data.Dataset, task: str, seed: int) -> fastlr.RangeTestResult:
    hidden, batch_size, _, _ = TASKS[task]
    x, y, held_out = dataset.x_train, dataset.y_train, len(dataset.x_train) // 6
    model = make_model(dataset, hidden, seed)
    return fastlr.range_test(
        model,
        fastlr.FusedSGD(model.parameters(), momentum=0.9),
        cross_entropy,
        data.Batches(x[held_out:], y[held_out:], batch_size, seed=seed),
        data.Batches(x[:held_out], y[:held_out], 500),
        num_steps=400,
        val_every=5,
        progress=False,
    )


def accuracy(dataset: data.Dataset, task: str, bounds: tuple[float, float], seed: int) -> float:
    hidden, batch_size, updates, _ = TASKS[task]
    model = make_model(dataset, hidden, seed)
    half_cycle = updates // (2 * CYCLES)
    optimizer = fastlr.FusedCyclicSGD(
        model.parameters(), *bounds, step_size_up=half_cycle, mode="triangular2", momentum=0.9
    )
    batches = data.Batches(dataset.x_train, dataset.y_train, batch_size, seed=seed)
    for x, y in islice(chain.from_iterable(repeat(batches)), updates):
        cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return float((model(dataset.x_test).argmax(1) == dataset.y_test).double().mean())


def compare(task: str, seeds: int) -> dict[str, object]:
    sets = [data.load(task, label_noise=TASKS[task][3], seed=seed) for seed in range(seeds)]
    found = [find(dataset, task, seed).bounds()[0] for seed, dataset in enumerate(sets)]
    tested = [accuracy(d, task, found[seed], seed) for seed, d in enumerate(sets)]
    by_hand = {
        f"{low:g} to {high:g}": [accuracy(d, task, (low, high), seed) for seed, d in enumerate(sets)]
        for low, high in BY_HAND
    }
    best = max(by_hand, key=lambda name: mean(by_hand[name]))
    return {
        "bounds found": found,
        "accuracy with them": tested,
        "accuracy with bounds picked by hand": by_hand,
        "best picked by hand": best,
        "points between them": 100 * (mean(tested) - mean(by_hand[best])),
    }


def table(results: dict[str, dict[str, object]]) -> str:
    rows = ["| data | bounds | max_lr | test accuracy |", "|---|---|---|---|"]
    for task, result in results.items():
        tops = [top for _, top in result["bounds found"]]
        tested = 100 * mean(result["accuracy with them"])
        rows.append(f"| {task} | range test | {min(tops):.2g} to {max(tops):.2g} | {tested:.2f} % |")
        for name, runs in result["accuracy with bounds picked by hand"].items():
            best = ", the best of these" if name == result["best picked by hand"] else ""
            rows.append(f"| {task} | by hand, {name}{best} | {name.split()[-1]} | {100 * mean(runs):.2f} % |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {task: compare(task, arguments.seeds) for task in arguments.data}
    text = table(results)
    print(text)
    for task, result in results.items():
        print(f"{task}: range test {result['points between them']:+.2f} points from the best picked by hand")
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_text(arguments.out / "range_test.md", text)
    content = {"torch": torch.__version__, "fastlr": fastlr.__version__, "results": results}
    write_text(arguments.out / "range_test.json", json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
