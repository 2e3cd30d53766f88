"""Two real processes: the same counts everywhere, no sample twice, and the gradients of one process."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)

# What each rank runs; `world_size` 1 is the same program alone.
PROGRAM = """
    import os
    import sys

    import torch
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import TensorDataset

    import fastlr

    world, out = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank() if world > 1 else 0

    N = 39  # odd, so that no epoch divides by the ranks
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (N,), generator=generator)
    weights = torch.randint(1, 9, (N,), generator=generator)
    data = TensorDataset(x, y, torch.arange(N), weights)


    def train(plan, record, count=None, noise_by=None):
        torch.manual_seed(1)
        inner = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
        model = DistributedDataParallel(inner) if world > 1 else inner
        opt = fastlr.FusedSGD(model.parameters(), lr=plan.lr, momentum=plan.momentum)
        loader = fastlr.GrowingLoader(data, plan, 2, count=count).bind(opt)
        noise = fastlr.GradientNoiseScale(model.parameters())
        if noise_by == "hook":
            noise.attach(model)
        taken = 0
        for epoch in loader.epochs():
            assert len(epoch) > 0
            for batch in epoch:
                features, target, index, weight = batch.data
                with batch.sync(model):
                    losses = torch.nn.functional.cross_entropy(model(features), target, reduction="none")
                    if count is None:
                        loss = losses.mean()
                    else:
                        loss = (losses * weight).sum() / weight.sum()
                    (loss * batch.weight).backward()
                if noise_by:
                    noise.observe(batch)
                taken += batch.samples
                record["samples"].append((opt.clock().samples, batch.epoch, index.tolist()))
                if world > 1 and not batch.ends_update:
                    # Not reduced yet: the ranks' gradients differ.
                    mine = next(model.parameters()).grad.clone()
                    total = mine.clone()
                    torch.distributed.all_reduce(total)
                    assert not torch.equal(total / world, mine)
                if batch.ends_update:
                    record["updates"].append((batch.position, batch.global_batch, taken))
                    taken = 0
                    opt.step()
                    opt.zero_grad()
                    if count is not None:
                        record["tokens"].append(loader.tokens)
        assert opt.clock().samples == plan.total_samples
        return torch.nn.utils.parameters_to_vector(inner.parameters()).detach(), noise


    records = {}
    for tail in ("carry", "keep", "drop"):
        plan = fastlr.BatchPlan.from_schedule(
            fastlr.MultiStep(0.1, [1, 2], 0.5, unit="epoch"),
            batch_size=4, dataset_size=N, epochs=3, momentum=0.9, max_batch_size=12, tail=tail,
        )
        records[tail] = record = {"updates": [], "samples": [], "tokens": []}
        record["plain"], noise = train(plan, record, noise_by="micro-batches")
        record["noise"] = noise.state_dict()
        hook = "hook" if world > 1 else None
        record["counted"], noise = train(plan, record, count=lambda batch: batch[3].sum(), noise_by=hook)
        record["hooked"] = noise.state_dict()
    if world > 1:
        loader = fastlr.GrowingLoader(data, plan, 2, seed=rank)
        try:
            next(iter(loader))
        except RuntimeError as error:
            assert "the ranks' loaders differ in plan, micro_batch_size, seed" in str(error)
        else:
            raise AssertionError("ranks with seeds of their own would take samples twice")
        loader = fastlr.GrowingLoader(data, plan, 2, count=lambda batch: None if rank else len(batch[0]))
        try:
            next(iter(loader))
        except ValueError as error:
            assert "count(data) must be" in str(error)
        else:
            raise AssertionError("a count that is wrong on one rank leaves no other one waiting")
    torch.save(records, f"{out}/{world}-{rank}.pt")
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    # All is checked and saved. An interpreter that shuts down was once aborted by a thread of PyTorch's.
    os._exit(0)
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What two ranks of torchrun and one process alone recorded."""
    folder = tmp_path_factory.mktemp("ranks")
    program = folder / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for world, launcher in ((1, []), (2, torchrun)):
        command = [sys.executable, *launcher, str(program), str(world), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
        assert done.returncode == 0, done.stderr[-4000:]
    return {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}


@pytest.mark.parametrize("tail", ["carry", "keep", "drop"])
def test_two_ranks_train_as_one_process(records: dict[str, dict], tail: str) -> None:
    ranks, alone = [records["2-0"][tail], records["2-1"][tail]], records["1-0"][tail]
    # The same updates; the same number of samples on both ranks, but for one more in an odd tail.
    updates = [rank["updates"] for rank in ranks]
    assert len(updates[0]) == len(updates[1]) == len(alone["updates"])
    for first, second, single in zip(*updates, alone["updates"], strict=True):
        assert first[:2] == second[:2] == single[:2]
        assert first[2] + second[2] == single[1]
        assert first[2] - second[2] == single[1] % 2

    # No sample twice, none forgotten: update by update the ranks have what one process has.
    def by_update(records: list[dict]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for record in records:
            for at, _, indices in record["samples"]:
                found.setdefault(at, []).extend(indices)
        return {at: sorted(indices) for at, indices in found.items()}

    assert by_update(ranks) == by_update([alone])
    assert len({len(rank["samples"]) for rank in ranks}) == 1
    assert ranks[0]["tokens"] == ranks[1]["tokens"] == alone["tokens"] != []
    # The same gradients, hence the same weights, on both ranks and alone.
    for name in ("plain", "counted"):
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], alone[name], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(alone["plain"], alone["counted"])
    # What was measured is the same on every rank; alone it comes from updates of two or more micro-batches.
    assert ranks[0]["noise"] == ranks[1]["noise"]
    assert ranks[0]["hooked"] == ranks[1]["hooked"]
    full = [update for update in alone["updates"][: len(alone["updates"]) // 2] if update[1] in (4, 8, 12)]
    assert ranks[0]["hooked"]["observations"] == len(full)
    assert alone["noise"]["observations"] == len(full)
    assert 0 < ranks[0]["noise"]["observations"] < len(full)  # at 4 samples a rank has one micro-batch
