"""A run that is killed in mid-epoch and started again ends as one that was not, to the bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import torch

# As the README's example: what is saved is all that it takes. The samples are augmented at random in worker
# processes, and the model has dropout.
PROGRAM = """
    import json, os, random, sys, time

    import numpy as np
    import torch

    import fastlr

    folder, slow = sys.argv[1], sys.argv[2] == "slow"
    path = f"{folder}/checkpoint.pt"
    torch.set_num_threads(1)


    class Augmented(torch.utils.data.Dataset):
        def __len__(self):
            return 50

        def __getitem__(self, k):
            noise = torch.rand(6) + np.random.rand() + random.random()
            return torch.full((6,), k / 50) + 0.1 * noise, k % 3, k


    plan = fastlr.BatchPlan.from_schedule(
        fastlr.MultiStep(0.1, [1, 2], 0.5, unit="epoch"),
        batch_size=8, dataset_size=50, epochs=3, momentum=0.9, max_batch_size=24,
    )
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 3))
    opt = fastlr.FusedSGD(model.parameters(), lr=plan.lr, momentum=plan.momentum)
    loader = fastlr.GrowingLoader(Augmented(), plan, micro_batch_size=4, num_workers=2).bind(opt)
    if os.path.exists(path):
        checkpoint = torch.load(path, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        opt.load_state_dict(checkpoint["optimizer"])
        loader.load_state_dict(checkpoint["loader"])
        torch.set_rng_state(checkpoint["rng"])

    log = open(f"{folder}/log", "a", buffering=1)
    for epoch in loader.epochs():
        for batch in epoch:
            x, y, index = batch.data
            log.write(json.dumps([batch.position, batch.epoch, index.tolist(), x.tolist()]) + "\\n")
            if slow and batch.position > 60 and not batch.starts_update:
                print("there", flush=True)
                time.sleep(60)
            loss = torch.nn.functional.cross_entropy(model(x), y) * batch.weight
            loss.backward()
            if batch.ends_update:
                opt.step()
                opt.zero_grad()
                if opt.clock().updates % 2 == 0:
                    torch.save(
                        {
                            "model": model.state_dict(),
                            "optimizer": opt.state_dict(),
                            "loader": loader.state_dict(),
                            "rng": torch.get_rng_state(),
                        },
                        path + ".new",
                    )
                    os.replace(path + ".new", path)
    torch.save([p.detach() for p in model.parameters()], f"{folder}/weights.pt")
"""


def start(folder: Path, speed: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    program = folder / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    command = [sys.executable, str(program), str(folder), speed]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder)


def finish(folder: Path) -> list[list]:
    with start(folder, "fast") as process:
        assert process.wait(timeout=240) == 0
    return [json.loads(line) for line in (folder / "log").read_text().splitlines()]


def test_killed_and_resumed_is_uninterrupted(tmp_path: Path) -> None:
    whole = finish(tmp_path / "whole")

    folder = tmp_path / "killed"
    with start(folder, "slow") as process:
        assert process.stdout.readline() == "there\n"  # in the middle of an update, and of an epoch
        process.send_signal(signal.SIGKILL)
    before = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    (folder / "log").unlink()
    samples = torch.load(folder / "checkpoint.pt", weights_only=True)["loader"]["samples"]
    assert 0 < samples < 150
    assert samples % 50 != 0
    after = finish(folder)

    # The same samples in the same order with the same augmentation.
    assert [entry for entry in before if entry[0] < samples] + after == whole
    assert after[0][0] == samples <= before[-1][0]
    weights, expected = (torch.load(f / "weights.pt") for f in (folder, tmp_path / "whole"))
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
