"""Does growing the batch reach what decaying the rate reaches, in fewer updates?

A network with one hidden layer is trained on Fashion-MNIST by plans of one and the same noise scale:
the rate is decayed, the batch is grown in its place, or grown once and then the rate decayed; and the batch
is grown from a raised start. The rate falls by a factor of five at 30, 60 and 80 % of the run, as in
Smith et al., arXiv 1711.00489. Each plan is trained once for each seed, from the same initial weights.

    python benchmarks/batch_growth.py [--epochs 20] [--seeds 3] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch

import fastlr
from fastlr import data
from fastlr._files import write_text
from fastlr._statistics import compared, spread
from fastlr.plotting import save

BATCH_SIZE, LR, MOMENTUM = 32, 0.02, 0.9
CAP = 3200  # a twentieth of the data set; larger ones make the last phase a handful of updates
PLANS: dict[str, dict[str, Any]] = {
    "decay": {"mode": "decay"},
    "hybrid": {"mode": "hybrid"},
    "increase": {"mode": "increase", "max_batch_size": CAP},
    "raised rate": {"mode": "increase", "max_batch_size": CAP, "lr_scale": 5.0},
}


class InMemory(torch.utils.data.Dataset[Any]):
    """A data set whose samples are taken many at a time."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[indices], self.y[indices]


def collated(batch: Any) -> Any:
    return batch


def make_plan(name: str, dataset: data.Dataset, epochs: int) -> fastlr.BatchPlan:
    drops = [round(part * epochs) for part in (0.3, 0.6, 0.8)]
    return fastlr.BatchPlan.from_schedule(
        fastlr.MultiStep(LR, drops, 0.2, unit="epoch"),
        batch_size=BATCH_SIZE,
        dataset_size=len(dataset.x_train),
        epochs=epochs,
        momentum=MOMENTUM,
        **PLANS[name],
    )


def train(plan: fastlr.BatchPlan, dataset: data.Dataset, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(dataset.x_train.shape[1], 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, dataset.classes),
    )
    opt = fastlr.FusedSGD(model.parameters(), lr=plan.lr, momentum=plan.momentum, weight_decay=5e-4)
    samples = InMemory(dataset.x_train, dataset.y_train)
    loader = fastlr.GrowingLoader(samples, plan, seed=seed, seed_samples=False, collate_fn=collated).bind(opt)
    updates, accuracies = [], []
    for epoch in loader.epochs():
        for batch in epoch:
            x, y = batch.data
            (torch.nn.functional.cross_entropy(model(x), y) * batch.weight).backward()
            if batch.ends_update:
                opt.step()
                opt.zero_grad()
        with torch.no_grad():
            right = model(dataset.x_test).argmax(1) == dataset.y_test
        updates.append(opt.clock().updates)
        accuracies.append(float(right.double().mean()))
    return {"seed": seed, "updates": updates, "accuracies": accuracies}


def summary(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    rows = [["plan", "batches", "lr", "updates", "final accuracy", "against decay"]]
    for name, result in results.items():
        runs, plan = result["runs"], result["plan"]
        finals = [100 * run["accuracies"][-1] for run in runs]
        decay = [100 * run["accuracies"][-1] for run in results["decay"]["runs"]]
        against = "" if name == "decay" else compared(finals, decay).interval(2)
        rows.append(
            [
                name,
                ", ".join(f"{size:,}" for size in dict.fromkeys(plan["batch_sizes"])),
                ", ".join(f"{rate:.3g}" for rate in dict.fromkeys(plan["rates"])),
                f"{plan['updates']:,}",
                spread([value / 100 for value in finals], 2),
                against,
            ]
        )
    return rows


def table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    colors = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained", facecolor="white")
    panels = figure.subplots(1, 2, sharey=True)
    lowest = 100.0
    for color, (name, result) in zip(colors, results.items(), strict=True):
        runs = 100 * torch.tensor([run["accuracies"] for run in result["runs"]], dtype=torch.float64)
        mean, updates = runs.mean(0), result["runs"][0]["updates"]
        lowest = min(lowest, float(mean[1:].min()))
        epochs = range(1, len(mean) + 1)
        label = f"{name}: {updates[-1]:,} updates"
        for axes, x in zip(panels, (epochs, updates), strict=True):
            axes.plot(x, mean, color=color, label=label, linewidth=1.8, marker=".")
            if len(runs) > 1:
                deviation = runs.std(0)
                axes.fill_between(x, mean - deviation, mean + deviation, color=color, alpha=0.13, linewidth=0)
    panels[0].set_ylabel("test accuracy (%)")
    panels[0].set_xlabel("epochs")
    panels[0].set_ylim(bottom=lowest - 0.5)
    panels[0].xaxis.get_major_locator().set_params(integer=True)
    panels[1].set_xscale("log")
    panels[1].set_xlabel("updates (log scale)")
    figure.legend(*panels[1].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=4)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#e5e7eb", linewidth=0.7)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", choices=("fashion-mnist", "digits"), default="fashion-mnist")
    parser.add_argument("--data-path", help="folder of Fashion-MNIST's four idx files")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a second thread costs such a small model more than it brings

    dataset = data.load(arguments.data, arguments.data_path)
    results: dict[str, Any] = {}
    for name in PLANS:
        plan = make_plan(name, dataset, arguments.epochs)
        print(f"\n{name}\n{plan}", flush=True)
        shown = {
            "batch_sizes": plan.batch_sizes,
            "rates": [phase.lr for phase in plan.phases],
            "updates": plan.total_updates,
        }
        runs = [train(plan, dataset, seed) for seed in range(arguments.seeds)]
        results[name] = {"plan": shown, "runs": runs}
        assert all(run["updates"][-1] == plan.total_updates for run in runs)
    rows = summary(results)
    print("\n" + table(rows))

    arguments.out.mkdir(parents=True, exist_ok=True)
    setting = {
        "data": arguments.data,
        "machine": f"{platform.machine()}, one thread",
        "torch": torch.__version__,
        "fastlr": fastlr.__version__,
    }
    report = {"setting": setting, "table": rows, "results": results}
    write_text(arguments.out / "batch_growth.json", json.dumps(report, indent=1) + "\n")
    draw(results, arguments.out / "batch_growth.png")


if __name__ == "__main__":
    main()
