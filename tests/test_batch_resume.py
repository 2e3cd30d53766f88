"""A run that is saved, killed and started again ends as one that was not, to the bit."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlr

# As the example of docs/growing.md: what is saved is all that it takes. The samples are augmented at random
# in worker processes, and the model has dropout.
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


# -- the guide's recipe ------------------------------------------------------------------------------------

N, EPOCHS = 26, 3
X = torch.randn(N, 5, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (N,), generator=torch.Generator().manual_seed(2))

MODELS: dict[str, Callable[[], list[torch.nn.Module]]] = {
    "plain": lambda: [],
    "dropout": lambda: [torch.nn.Dropout(0.5)],
    "batch norm": lambda: [torch.nn.BatchNorm1d(8)],
    "both": lambda: [torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5)],
}


class Run:
    """All that the guide's example makes and saves."""

    def __init__(self, layers: str, tail: str, workers: int, seed: int) -> None:
        # Updates of 4 samples lie across the first epoch's end, updates of 12 across the second's.
        plan = fastlr.BatchPlan.from_phases(
            [(0, 4), (36 / N, 12)], dataset_size=N, epochs=EPOCHS, lr=0.1, momentum=0.9, tail=tail
        )
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(5, 8), *MODELS[layers](), torch.nn.Tanh(), torch.nn.Linear(8, 3)
        )
        self.optimizer = fastlr.FusedSGD(self.model.parameters(), lr=plan.lr, momentum=plan.momentum)
        data = torch.utils.data.TensorDataset(X, Y)
        self.batches = fastlr.GrowingLoader(data, plan, 3, num_workers=workers).bind(self.optimizer)

    def checkpoint(self) -> bytes:
        file = io.BytesIO()
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "batches": self.batches.state_dict(),
                "rng": torch.get_rng_state(),
            },
            file,
        )
        return file.getvalue()

    def load(self, file: bytes) -> None:
        checkpoint = torch.load(io.BytesIO(file), weights_only=True)
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.batches.load_state_dict(checkpoint["batches"])
        torch.set_rng_state(checkpoint["rng"])

    def train(self) -> tuple[list[bytes], list[bytes], list[int]]:
        """Checkpoints after each epoch and after each update, and the epochs."""
        after_epochs, after_updates, epochs = [], [], []
        for epoch in self.batches.epochs():
            epochs.append(epoch.index)
            for batch in epoch:
                x, y = batch.to("cpu").data
                with batch.sync(self.model):
                    (torch.nn.functional.cross_entropy(self.model(x), y) * batch.weight).backward()
                if batch.ends_update:
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    after_updates.append(self.checkpoint())
            after_epochs.append(self.checkpoint())
        return after_epochs, after_updates, epochs

    def trained(self) -> list[torch.Tensor]:
        """All that training changed: weights, buffers, momenta."""
        momenta = [entry["momentum_buffer"] for entry in self.optimizer.state.values()]
        return [*self.model.state_dict().values(), *momenta]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("tail", ["carry", "keep", "drop"])
@pytest.mark.parametrize("layers", MODELS)
def test_the_guides_recipe_resumes_to_the_bit(layers: str, tail: str, workers: int) -> None:
    torch.set_num_threads(1)
    whole = Run(layers, tail, workers, seed=0)
    after_epochs, after_updates, epochs = whole.train()
    assert epochs == list(range(EPOCHS))
    places: list[Any] = [(file, epochs[k + 1 :]) for k, file in enumerate(after_epochs)]
    if not workers:
        places += [(file, None) for file in after_updates]
    for file, left in places:
        resumed = Run(layers, tail, workers, seed=1)
        resumed.load(file)
        _, _, ran = resumed.train()
        assert left is None or ran == left
        pairs = zip(whole.trained(), resumed.trained(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
