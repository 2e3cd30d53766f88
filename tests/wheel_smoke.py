"""Whether an installed fastlr works: ``python tests/wheel_smoke.py``, with nothing but what its wheel needs.

`make wheel` runs it in an empty environment without a compiler, and cibuildwheel for each wheel.
"""

from __future__ import annotations

import copy
import importlib.metadata
import sys
import tempfile
from pathlib import Path

import torch

import fastlr


def is_the_installed_one() -> None:
    """It is not the checkout's package that answers, and all say the same version."""
    package = Path(fastlr.__file__).parent
    checkout = Path(__file__).parents[1] / "fastlr"
    assert package != checkout, f"this is the checkout at {checkout}; run it with another fastlr installed"
    assert fastlr.__version__ == importlib.metadata.version("fastlr") == fastlr.build_info()["version"]


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(20, 67), torch.nn.Tanh(), torch.nn.Linear(67, 3))


def losses(net: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: object = None) -> list[float]:
    """Those of eight updates."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for _ in range(8):
        x = torch.randn(32, 20, generator=draw)
        loss = net(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()  # type: ignore[attr-defined]
        found.append(loss.item())
    return found


def updates_as_torch_does() -> None:
    """Two rules beside PyTorch's: a scheduled SGD, and AdamW.

    Close, not equal, as it has to hold on processors for which PyTorch has no fma.
    """
    ours, theirs = model(), model()
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.9)
    cyclic = torch.optim.lr_scheduler.CyclicLR(sgd, 0.01, 0.1, step_size_up=3, cycle_momentum=False)
    fused: torch.optim.Optimizer = fastlr.FusedCyclicSGD(
        ours.parameters(), base_lr=0.01, max_lr=0.1, step_size_up=3, momentum=0.9
    )
    torch.testing.assert_close(losses(ours, fused), losses(theirs, sgd, cyclic))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    assert fused.clock().updates == 8  # type: ignore[attr-defined]

    ours, theirs = model(), model()
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.05)
    fused = fastlr.FusedAdamW(ours.parameters(), lr=1e-3, weight_decay=0.05)
    torch.testing.assert_close(losses(ours, fused), losses(theirs, adamw))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def checkpoints() -> None:
    """What was saved goes on to the same bits."""
    net = model()
    optimizer = fastlr.FusedAdamW(net.parameters(), lr=fastlr.Cosine(1e-3, 0.0, 20))
    losses(net, optimizer)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.pt"
        torch.save(optimizer.state_dict(), path)
        state = torch.load(path, weights_only=True)
    twin = copy.deepcopy(net)
    resumed = fastlr.FusedAdamW(twin.parameters(), lr=fastlr.Cosine(1e-3, 0.0, 20))
    resumed.load_state_dict(state)
    assert losses(net, optimizer) == losses(twin, resumed)


def tests_a_range() -> None:
    """A range test finds bounds, and leaves the model as it was."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(256, 20, generator=draw)
    y = (x @ torch.randn(20, 3, generator=draw)).argmax(1)
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32)
    net = model()
    before = copy.deepcopy(net.state_dict())
    found = fastlr.range_test(
        net,
        fastlr.FusedSGD(net.parameters(), lr=0.1, momentum=0.9),
        torch.nn.functional.cross_entropy,
        batches,
        start_lr=1e-4,
        end_lr=10.0,
        num_steps=60,
        progress=False,
    )
    assert found, found.reason
    assert 1e-4 <= found.base_lr < found.max_lr <= 10.0
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def main() -> int:
    for check in (is_the_installed_one, updates_as_torch_does, checkpoints, tests_a_range):
        check()
    info = fastlr.build_info()
    print(f"fastlr {info['version']} works with PyTorch {info['torch']} and Python {sys.version.split()[0]}:")
    for name in ("compiler", "simd_level", "threads", "openmp_runtime", "tensor_access", "cuda_status"):
        print(f"  {name}: {info[name]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
