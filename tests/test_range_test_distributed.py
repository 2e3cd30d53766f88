"""Two processes under torchrun: averaged losses, one stopping update, one answer, nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="two processes talk through gloo",
)

# What each rank runs. Its data differ from the other's.
RANK = """
import json, sys
import torch, fastlr

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.manual_seed(0)
x = torch.randn(2, 64, 6)[rank]
y = (x.sum(1) > 0).long()
batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]
held_out = [(x[: 16 * (rank + 1)], y[: 16 * (rank + 1)])]  # more on rank 1
ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(6, 2))
cross_entropy = torch.nn.functional.cross_entropy


def run(loss_fn=cross_entropy, scaler=None, **options):
    own = []

    def counted(output, target):
        loss = loss_fn(output, target, len(own)) if loss_fn is not cross_entropy else loss_fn(output, target)
        own.append(loss.item())
        return loss

    opt = fastlr.FusedSGD(ddp.parameters(), momentum=0.9)
    before = [p.detach().clone() for p in ddp.parameters()]
    found = fastlr.range_test(
        ddp, opt, counted, batches, held_out, num_steps=60, scaler=scaler, progress=False,
        **{"end_lr": 1.0, "val_every": 5, **options},
    )
    assert all(torch.equal(a, b) for a, b in zip(before, ddp.parameters()))
    accuracies = [None if a != a else a for a in found.accuracies.tolist()]
    return {
        "own": own, "losses": found.losses.tolist(), "stopped": found.stopped, "max_lr": found.max_lr,
        "reason": found.reason, "accuracies": accuracies,
    }


def bad_on_rank_1(output, target, call):
    loss = cross_entropy(output, target)
    return loss * float("nan") if rank == 1 and call == 20 else loss


def skipped_on_rank_1(output, target, call):
    loss = cross_entropy(output, target)
    return loss + (output.sum() * torch.inf).nan_to_num(0, 0, 0) if rank == 1 and call >= 20 else loss


def trained(tested):
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    model = torch.nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
    opt = fastlr.FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(2):
        for x, y in batches:
            opt.zero_grad(set_to_none=False)
            cross_entropy(model(x), y).backward()
            opt.step()
        if tested and epoch == 0:
            fastlr.range_test(model, opt, cross_entropy, batches, num_steps=20, accumulate=2, progress=False)
    return {name: value.tolist() for name, value in net.state_dict().items()}


assert trained(True) == trained(False)
results = {
    "plain": run(),
    "accumulated": run(accumulate=2),
    "nan": run(bad_on_rank_1),
    "diverging": run(end_lr=1e6),
    "skipping": run(skipped_on_rank_1, torch.amp.GradScaler("cpu", init_scale=8.0)),
    "repeated": run(repeats=3),
}
json.dump(results, open(f"{sys.argv[1]}/{rank}.json", "w"))
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "rank.py", str(folder)], cwd=folder, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


CASES = ("plain", "accumulated", "nan", "diverging", "skipping", "repeated")


@pytest.mark.parametrize("case", CASES)
def test_every_rank_gets_the_same_curve_and_answer(ranks, case):
    first, second = (dict(rank[case]) for rank in ranks)
    own = first.pop("own"), second.pop("own")
    assert first == second
    assert len(own[0]) == len(own[1])  # the same number of updates, or one would wait for the other
    assert own[0] != own[1]


def test_losses_are_averaged_over_the_ranks(ranks):
    own = np.mean([rank["plain"]["own"] for rank in ranks], 0)
    np.testing.assert_allclose(ranks[0]["plain"]["losses"], own, rtol=1e-6)
    own = np.mean([rank["accumulated"]["own"] for rank in ranks], 0).reshape(-1, 2).mean(1)
    np.testing.assert_allclose(ranks[0]["accumulated"]["losses"], own, rtol=1e-6)


def test_accuracies_are_averaged_over_all_samples(ranks):
    measured = [a for a in ranks[0]["plain"]["accuracies"] if a is not None]
    assert len(measured) == 12
    np.testing.assert_allclose(np.array(measured) * 48, np.round(np.array(measured) * 48), atol=1e-6)
    assert max(measured) > 0.9


def test_what_one_rank_meets_stops_all(ranks):
    assert len(ranks[0]["nan"]["losses"]) == 20
    assert "nan" in ranks[0]["nan"]["stopped"]
    assert "diverged" in ranks[0]["diverging"]["stopped"]
    assert len(ranks[0]["skipping"]["losses"]) == 20
    assert "10 updates in a row" in ranks[0]["skipping"]["stopped"]
