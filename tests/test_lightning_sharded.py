"""Lightning's ModelParallelStrategy (FSDP2) on two processes: torch's weights, and a resume in the middle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import FSDP2_ON_CPU

pytest.importorskip("lightning", reason="needs Lightning")
pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="two processes talk through gloo",
)

# What both processes run, the second started by Lightning: training at one go, in two parts, and by torch.
SCRIPT = """
import sys
import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

import fastlr

SCHEDULE = fastlr.Cosine(0.02, 0.0, 40)
FOLDER = sys.argv[1]


class Module(lightning.LightningModule):
    def __init__(self, fused):
        super().__init__()
        torch.manual_seed(0)
        self.fused, self.rates = fused, []
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3))

    def configure_model(self):
        for module in (self.net[0], self.net[2], self.net):
            fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, _):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        if self.fused:
            return fastlr.FusedAdamW(self.parameters(), lr=SCHEDULE, max_grad_norm=0.25)
        return torch.optim.AdamW(self.parameters(), lr=0.1, foreach=False)

    def on_before_optimizer_step(self, optimizer):
        if not self.fused:
            torch.nn.utils.clip_grad_norm_(self.parameters(), 0.25)
            optimizer.param_groups[0]["lr"] = SCHEDULE(self.global_step)


def fit(fused, epochs, load=None, save=None):
    module = Module(fused)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=FOLDER,
    )
    generator = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(
        torch.randn(64, 6, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8), ckpt_path=load)
    if save:
        trainer.save_checkpoint(save)
    if fused:
        assert trainer.optimizers[0].clock().updates == 4 * epochs
    return [p.full_tensor().detach() for p in module.parameters()]


torch.set_num_threads(1)
whole = fit(True, 3)
by_torch = fit(False, 3)
fit(True, 2, save=FOLDER + "/checkpoint")
resumed = fit(True, 3, load=FOLDER + "/checkpoint")
for a, b, c in zip(whole, by_torch, resumed):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert torch.equal(a, c)
torch.save(True, f"{FOLDER}/done-{torch.distributed.get_rank()}")
"""


@pytest.mark.skipif(not FSDP2_ON_CPU, reason="this PyTorch's FSDP2 does not run on CPUs")
def test_sharded_training_and_resume(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment: dict[str, Any] = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, script, tmp_path], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert all((tmp_path / f"done-{rank}").exists() for rank in range(2)), ran.stderr
