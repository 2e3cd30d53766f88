"""Growing batches under DDP, FSDP1 and FSDP2, on two and four ranks: the run of one process, and resumed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_pool import Case, needs_gloo, outcomes
from strategies import FSDP2_ON_CPU, STRATEGIES, WHOLE, new_model, whole, zero
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule

import fastlr

pytestmark = needs_gloo

N = 77  # odd, so that no epoch divides by the ranks; four still get a sample each of what is left of one
STOP = 12  # updates, in the middle of the second epoch


def dataset() -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 5, generator=generator, dtype=torch.float64)
    targets, tokens = (torch.randint(*ends, (N,), generator=generator) for ends in ((0, 3), (1, 9)))
    return torch.utils.data.TensorDataset(x, targets, torch.arange(N), tokens)


class Run:
    """A run, or the part of one that a world of ranks does.

    Args:
        strategy: None: one process, whoever else there is.
        tokens: whether the loss averages over these, not over samples.
        share: whether ZeroRedundancyOptimizer gives each rank a share of the parameters to update.
    """

    def __init__(self, strategy: str | None, tokens: bool = False, share: bool = False) -> None:
        self.plan = fastlr.BatchPlan.from_schedule(
            fastlr.MultiStep(0.1, [1, 2], 0.5, unit="epoch"),
            batch_size=8, dataset_size=N, epochs=3, momentum=0.9, max_batch_size=24,
        )  # fmt: skip
        self.model = new_model() if strategy is None else STRATEGIES[strategy].wrap(new_model())
        options = {"lr": self.plan.lr, "momentum": self.plan.momentum}
        if share:
            self.opt = zero(self.model, fastlr.FusedSGD, **options)
        else:
            self.opt = fastlr.FusedSGD(self.model.parameters(), **options)
        place = {"rank": 0, "world_size": 1} if strategy is None else {}
        count = (lambda data: data[3].sum()) if tokens else None
        self.loader = fastlr.GrowingLoader(dataset(), self.plan, 2, count=count, **place)
        self.loader.bind(self.opt)
        self.tokens = tokens
        self.taken: list[tuple[int, int, float, list[int]]] = []  # of each micro-batch
        self.updates: list[tuple[int, int]] = []

    def go_on(self, stop: int | None = None) -> Run:
        for epoch in self.loader.epochs():
            for batch in epoch:
                x, target, index, tokens = batch.data
                self.taken.append((batch.position, batch.epoch, batch.weight, index.tolist()))
                with batch.sync(self.model):
                    losses = torch.nn.functional.cross_entropy(self.model(x), target, reduction="none")
                    mean = (losses * tokens).sum() / tokens.sum() if self.tokens else losses.mean()
                    (mean * batch.weight).backward()
                if isinstance(self.model, FSDPModule):  # else gradients are there before the exchange too
                    assert batch.ends_update or all(p.grad is None for p in self.model.parameters())
                if batch.ends_update:
                    self.opt.step()
                    self.opt.zero_grad()
                    self.updates.append((batch.position, batch.global_batch))
                    if len(self.updates) == stop:
                        return self
        return self

    def save(self, path: Path) -> None:
        state = {
            "model": whole(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.opt, options=WHOLE),
            "loader": self.loader.state_dict(),
        }
        if dist.get_rank() == 0:
            torch.save(state, path)
        dist.barrier()

    def load(self, path: Path, strategy: str) -> Run:
        """A file of whatever strategy and however many ranks."""
        state = torch.load(path, weights_only=True)
        inner = new_model(1)
        inner.load_state_dict(state["model"])
        self.model = STRATEGIES[strategy].wrap(inner)
        self.opt = fastlr.FusedSGD(self.model.parameters(), lr=self.plan.lr, momentum=self.plan.momentum)
        set_optimizer_state_dict(self.model, self.opt, state["optimizer"], options=WHOLE)
        self.loader.load_state_dict(state["loader"])
        self.loader.bind(self.opt)
        return self


def by_update(taken: list[list[Any]]) -> dict[int, list[tuple[int, int]]]:
    """What the ranks took for each update, in epochs and samples, and that its weights are right."""
    found: dict[int, list[tuple[int, int]]] = {}
    weights: dict[int, float] = {}
    for rank in taken:
        for position, epoch, weight, indices in rank:
            found.setdefault(position, []).extend((epoch, index) for index in indices)
            weights[position] = weights.get(position, 0.0) + weight / len(taken)  # as DDP and FSDP average
    assert all(abs(weight - 1.0) < 1e-12 for weight in weights.values())
    return {position: sorted(samples) for position, samples in found.items()}


def everybodys(own: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


@functools.cache
def alone(tokens: bool) -> Run:
    return Run(None, tokens).go_on()


def assert_as_alone(run: Run, first: int = 0) -> None:
    """The updates from ``first`` on have taken what one process takes, and led to its weights."""
    single = alone(run.tokens)
    assert len({size for _, size in single.updates}) > 3
    taken = everybodys(run.taken)
    assert all(updates == single.updates[first:] for updates in everybodys(run.updates))
    assert len({len(rank) for rank in taken}) == 1  # micro-batches: none waits for another rank
    samples = by_update([single.taken])
    assert by_update(taken) == {position: samples[position] for position, _ in single.updates[first:]}
    assert getattr(run.opt, "optim", run.opt).clock() == single.opt.clock()
    assert run.opt.param_groups[0]["lr"] == single.opt.param_groups[0]["lr"]
    found = whole(run.model)
    for name, value in whole(single.model).items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14)


def grows(folder: Path, strategy: str, **options: bool) -> None:
    assert_as_alone(Run(strategy, **options).go_on())


def begins(folder: Path, strategy: str) -> None:
    run = Run(strategy).go_on(STOP)
    run.save(folder / f"{strategy}-{dist.get_world_size()}.pt")


def ends(folder: Path, strategy: str, began: int) -> None:
    run = Run(strategy).load(folder / f"{strategy}-{began}.pt", strategy)
    assert run.opt.clock().updates == STOP
    assert_as_alone(run.go_on(), STOP)


def noise_scale_refuses(folder: Path) -> None:
    run = Run("fsdp1-flat")
    with pytest.raises(ValueError, match="FullyShardedDataParallel"):
        fastlr.GradientNoiseScale(run.opt)
    with pytest.raises(ValueError, match="FullyShardedDataParallel"):
        fastlr.GradientNoiseScale(run.model.parameters())


def noise_scale_finds_no_gradients(folder: Path) -> None:
    """Of FSDP2, before ranks exchange them: it measures nothing, rather than zeros."""
    run = Run("fsdp2")
    noise = fastlr.GradientNoiseScale(run.opt)
    batch = next(iter(run.loader))
    assert not batch.ends_update
    with batch.sync(run.model):
        (run.model(batch.data[0]).square().mean() * batch.weight).backward()
    with pytest.raises(RuntimeError, match=r"FSDP2 \(fully_shard\) keeps them"):
        noise.observe(batch)


CHANGING = [name for name in STRATEGIES if name != "ddp-bucket-view"]
CASES = {
    **{f"{strategy}-begins-on-2": Case(2, begins, {"strategy": strategy}) for strategy in CHANGING},
    **{
        f"{strategy}-on-2": Case(2, grows, {"strategy": strategy})
        for strategy in STRATEGIES
        if not strategy.startswith("ddp")  # which test_batch_distributed.py goes through
    },
    "zero-on-2": Case(2, grows, {"strategy": "ddp", "share": True}),
    "noise-scale-refuses": Case(2, noise_scale_refuses),
    **({"noise-scale-finds-none": Case(2, noise_scale_finds_no_gradients)} if FSDP2_ON_CPU else {}),
    **{f"{strategy}-on-2-then-4": Case(4, ends, {"strategy": strategy, "began": 2}) for strategy in CHANGING},
    **{
        f"{strategy}-on-4": Case(4, grows, {"strategy": strategy})
        for strategy in STRATEGIES
        if strategy != "ddp-bucket-view"
    },
    **{
        f"{strategy}-tokens-on-4": Case(4, grows, {"strategy": strategy, "tokens": True})
        for strategy in ("ddp", "fsdp1-flat")
    },
    **{f"{strategy}-begins-on-4": Case(4, begins, {"strategy": strategy}) for strategy in CHANGING},
    **{f"{strategy}-on-4-then-2": Case(2, ends, {"strategy": strategy, "began": 4}) for strategy in CHANGING},
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return outcomes(CASES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_on_ranks(told: dict[str, str], case: str) -> None:
    if told[case]:
        pytest.fail(told[case], pytrace=False)
