"""The training scripts of examples/: both forms end with the same weights, and the page shows both."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rule_table import ExactRoots

import fastlr

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = ("imagenet", "gpt", "detector", "ppo")
FORMS = ("torch_form", "fastlr_form")

# So small that each run takes a second or two.
ARGUMENTS = {
    "imagenet": ["--device=cpu", "--epochs=4", "--batch-size=64"],
    # Of gradients whose norms are on both sides of the limit.
    "gpt": ["--device=cpu", "--iterations=30", "--grad-clip=0.35", "--accumulate=3"],
    "detector": ["--device=cpu", "--epochs=5", "--images=128"],
    "ppo": ["--device=cpu", "--iterations=12"],
}


def module_at(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, form: str, *more: str) -> dict[str, Any]:
    """What an example's main returns. PyTorch's generator stays as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would wait for each other most of the time
    try:
        with torch.random.fork_rng(devices=[]):
            return module_at(EXAMPLES / name / f"{form}.py").main([*ARGUMENTS[name], *more])
    finally:
        torch.set_num_threads(threads)


def assert_equal(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0)


def exactly(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Torch's optimizer with correctly rounded roots, and with a rate of float64 where it is a tensor."""

    class Exact(kind):  # type: ignore[misc, valid-type]
        def __init__(self, params: Any, lr: Any, **options: Any) -> None:
            super().__init__(params, lr.double() if isinstance(lr, torch.Tensor) else lr, **options)

        def step(self, closure: None = None) -> None:
            rates = [group["lr"] for group in self.param_groups]
            for group in self.param_groups:
                group["lr"] = float(group["lr"])
            with ExactRoots():
                super().step()
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    return Exact


@pytest.fixture
def exact_torch(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Takes away what fastlr rounds otherwise than PyTorch: roots, norms, and rates that are float32 tensors.

    Returns the factors by which gradients get clipped.
    """
    factors = []

    def clip_in_double(parameters: Any, max_norm: float) -> torch.Tensor:
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()
        factors.append(min(1.0, max_norm / (float(norm) + 1e-6)))
        for g in gradients:
            g.mul_(factors[-1])
        return norm

    monkeypatch.setattr(torch.optim, "Adam", exactly(torch.optim.Adam))
    monkeypatch.setattr(torch.optim, "AdamW", exactly(torch.optim.AdamW))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_in_double)
    return factors


def saving_each_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    save: Callable[..., None] = torch.save
    monkeypatch.setattr(torch, "save", lambda what, path: save(what, f"{path}-{what['epoch']}"))


@pytest.mark.filterwarnings(
    "ignore:The epoch parameter in:UserWarning"
)  # SequentialLR of PyTorch 2.6 gives it
def test_imagenet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit: weights, averages, accuracies, and what a run ends with that goes on from a checkpoint."""
    saving_each_epoch(monkeypatch)
    runs, printed = [], []
    for form in FORMS:
        file = f"{tmp_path / form}"
        for option in (f"--checkpoint={file}", f"--resume={file}-1"):
            runs.append(run("imagenet", form, option))
            printed.append(capsys.readouterr().out.splitlines())
    for other in runs[1:]:
        assert_equal(other, runs[0])
    assert len(printed[0]) == 4
    assert printed == [printed[0], printed[0][2:]] * 2
    weights, averages = (runs[0][name]["0.weight"] for name in ("weights", "averages"))
    assert not torch.equal(weights, averages)


def test_detector() -> None:
    """Bit for bit, each group through a schedule of its own, and momentum with them."""
    assert_equal(run("detector", "fastlr_form"), run("detector", "torch_form"))


@pytest.mark.parametrize("name", ["gpt", "ppo"])
def test_bit_for_bit_but_for_what_is_rounded_otherwise(name: str, exact_torch: list[float]) -> None:
    assert_equal(run(name, "fastlr_form"), run(name, "torch_form"))
    assert min(exact_torch) < max(exact_torch) == 1.0


@pytest.mark.parametrize("name", ["gpt", "ppo"])
def test_near_pytorch_as_it_is(name: str) -> None:
    """Weights of about 1, of which an update moves each by some thousandths, end nearer than a hundred
    thousandth: what a unit in the last place of a root, a norm or a rate grows to."""
    fused, torchs = (run(name, form)["weights"] for form in reversed(FORMS))
    torch.testing.assert_close(fused, torchs, rtol=0.0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")
@pytest.mark.skipif(not fastlr.build_info()["cuda"], reason="this build of fastlr has no CUDA kernels")
def test_ppo_in_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph)))
    fused, torchs = (run("ppo", form, "--device=cuda", "--iterations=4")["weights"] for form in FORMS)
    assert len(replays) == 2 * (4 * 16 - 2)
    torch.testing.assert_close(fused, torchs, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_form_is_short_and_the_other_but_for_the_optimizer(name: str) -> None:
    torchs, fused = ((EXAMPLES / name / f"{form}.py").read_text("utf-8") for form in FORMS)
    assert len(torchs.splitlines()) < 150 > len(fused.splitlines())
    assert len(fused.splitlines()) <= len(torchs.splitlines())
    assert "scheduler" not in fused
    assert "torch.optim" not in fused


def test_the_page_shows_what_the_files_differ_by() -> None:
    diffs = module_at(EXAMPLES / "diffs.py")
    text = diffs.PAGE.read_text("utf-8")
    assert tuple(re.findall(r"<!-- changes: (\w+) -->", text)) == NAMES
    assert diffs.page() == text, "python examples/diffs.py writes it anew"
