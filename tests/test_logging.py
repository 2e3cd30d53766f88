"""Range tests and settings in TensorBoard, in what works like a run of W&B, and in Lightning's loggers."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision_without_cuda  # noqa: F401  # which Lightning imports

import fastlr
from fastlr.integrations.logging import hparams, log_range_test
from fastlr.optim._groups import OF_ALL_GROUPS

LRS = np.geomspace(1e-4, 10, 50)
LOSSES = 2 + np.log10(LRS / 0.1) ** 2 / 4
ACCURACIES = np.where(np.arange(50) % 5 == 0, 1 - LOSSES / 8, np.nan)
FOUND = fastlr.RangeTestResult(LRS, LOSSES, ACCURACIES, metric_name="top1")
READINGS = {name: getattr(FOUND, name) for name in ("base_lr", "max_lr", "onset", "steepest")}

tensorboards = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard.*")


def accumulated(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return events.Reload()


@tensorboards
def test_tensorboard_gets_curve_readings_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        log_range_test(writer, FOUND, step=7)
    events = accumulated(tmp_path)

    def scalars(tag: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in events.Scalars(f"range_test/{tag}")]

    assert [step for step, _ in scalars("loss")] == list(range(50))
    assert [value for _, value in scalars("loss")] == LOSSES.astype(np.float32).tolist()
    assert [value for _, value in scalars("lr")] == LRS.astype(np.float32).tolist()
    assert scalars("top1") == [(step, np.float32(ACCURACIES[step])) for step in range(0, 50, 5)]
    for name, value in READINGS.items():
        assert scalars(name) == [(7, pytest.approx(value, rel=1e-6))]
    (image,) = events.Images("range_test/figure")
    assert image.step == 7
    assert image.encoded_image_string.startswith(b"\x89PNG")
    (summary,) = events.Tensors("range_test/summary/text_summary")
    assert summary.tensor_proto.string_val[0].decode().split() == FOUND.summary().split()


@tensorboards
def test_tensorboard_takes_settings_as_hyperparameters(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from torch.utils.tensorboard import SummaryWriter

    optimizer = fastlr.FusedSGD([torch.zeros(2)], lr=fastlr.Cosine(0.1, 0.0, 100))
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_hparams(hparams(optimizer), {"accuracy": 0.9}, run_name=".")
    assert "accuracy" in accumulated(tmp_path).Tags()["scalars"]


class Run:
    """What wandb.init() returns, as far as it is used."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def log(self, entries: dict[str, Any], **options: Any) -> None:
        self.logged.append((entries, options))


class TheirImage(tuple[Any]):
    def __new__(cls, figure: Any) -> TheirImage:
        return super().__new__(cls, (figure,))


class TheirTable:
    def __init__(self, columns: list[str], data: list[list[float]]) -> None:
        self.columns, self.data = columns, data


def test_a_run_gets_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    plain = Run()
    log_range_test(plain, FOUND, "found", step=3)
    ((entries, options),) = plain.logged
    assert options == {"step": 3}
    assert isinstance(entries["found/figure"], Figure)
    assert {name: entries[f"found/{name}"] for name in READINGS} == READINGS
    # The package that a run is from has its own forms, as wandb.
    package = types.ModuleType("a_tracker")
    package.Image, package.Table = TheirImage, TheirTable  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_tracker", package)
    theirs = type("Run", (Run,), {"__module__": "a_tracker.runs"})()
    log_range_test(theirs, FOUND)
    ((entries, options),) = theirs.logged
    assert options == {}
    assert isinstance(entries["range_test/figure"], TheirImage)
    table = entries["range_test/curve"]
    assert table.columns == ["lr", "loss", "top1"]
    assert [row[:2] for row in table.data] == np.stack([LRS, LOSSES], 1).tolist()


def test_nothing_else_is_logged_to() -> None:
    with pytest.raises(TypeError, match=r"cannot be logged to 'runs' \(str\); give a SummaryWriter"):
        log_range_test("runs", FOUND, figure=False)
    with pytest.raises(TypeError, match=r"found must be a range test's result, got None"):
        log_range_test(Run(), None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step must be an integer >= 0, got -1"):
        log_range_test(Run(), FOUND, step=-1, figure=False)


@tensorboards
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")
def test_lightnings_loggers_are_logged_to(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    loggers = pytest.importorskip("lightning.pytorch.loggers", reason="lightning is not installed")
    logger = loggers.TensorBoardLogger(tmp_path, name="run", version=0)
    log_range_test(logger, FOUND, figure=False)
    logger.log_hyperparams(hparams(fastlr.FusedSGD([torch.zeros(2)], lr=fastlr.Cosine(0.1, 0.0, 100))))
    logger.finalize("success")
    events = accumulated(tmp_path / "run" / "version_0")
    assert len(events.Scalars("range_test/loss")) == 50
    assert events.Tags()["images"] == []


def test_settings_are_numbers_and_text() -> None:
    groups = [{"params": [torch.zeros(2)]}, {"params": [torch.zeros(3)], "lr": 0.5, "betas": (0.8, 0.99)}]
    lr, beta1 = fastlr.Cosine(0.1, 0.0, 100), fastlr.Triangular(0.85, 0.95, 10, inverted=True)
    optimizer = fastlr.FusedAdamW(
        groups, lr=lr, betas=(beta1, 0.99), weight_decay=0.05, ema_decay=0.999, max_grad_norm=2.0
    )
    settings = hparams(optimizer)
    assert all(isinstance(value, (bool, int, float, str)) for value in settings.values())
    assert settings["optimizer"] == "FusedAdamW"
    assert (settings["lr"], settings["group1/lr"]) == (repr(lr), 0.5)
    assert (settings["beta1"], settings["beta2"]) == (repr(beta1), 0.99)
    assert settings["group1/beta1"] == 0.8
    assert (settings["weight_decay"], settings["ema_decay"]) == (0.05, 0.999)
    assert (settings["max_grad_norm"], settings["nonfinite"]) == (2.0, "skip")
    assert settings.keys() >= set(OF_ALL_GROUPS)
    assert not settings.keys() & {"group1/weight_decay", "group1/beta2", "betas"}
    assert not any(name.endswith(("_schedule", "_start")) for name in settings)
    assert not settings.keys() & {"updates", "samples", "clock_unit", "fresh", "params"}
    optimizer.step()
    assert hparams(optimizer) == settings  # and not where a run stands


def test_settings_of_torchs_optimizers() -> None:
    settings = hparams(torch.optim.AdamW([torch.zeros(2)], lr=torch.tensor(0.25), betas=(0.9, 0.95)))
    assert (settings["optimizer"], settings["lr"], settings["beta2"]) == ("AdamW", 0.25, 0.95)
    with pytest.raises(TypeError, match=r"optimizer must be a torch optimizer, got 0\.1"):
        hparams(0.1)  # type: ignore[arg-type]


@tensorboards
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    page = Path(__file__).parent.parent / "docs" / "frameworks" / "logging.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    batches = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(8)]
    names = {
        "fastlr": fastlr,
        "model": torch.nn.Linear(4, 3),
        "loss_fn": torch.nn.functional.cross_entropy,
        "loader": batches,
    }
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
