"""accelerate: as torch's optimizer and scheduler under it, and growing batches shared out once."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same
from pages import run_page
from rule_table import RULES, assert_same_run

import fastlr

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

from accelerate.data_loader import prepare_data_loader  # noqa: E402
from accelerate.state import PartialState  # noqa: E402

BATCHES, SIZE, ACCUMULATE, LIMIT = 20, 4, 2, 0.05
UPDATES = BATCHES // ACCUMULATE
POLICY = fastlr.LinearRamp(0.0, 0.05, 3).then(fastlr.Cosine(0.05, 0.0, UPDATES - 3), at=3)
ADAMW = RULES["AdamW"]

pytestmark = pytest.mark.usefixtures("_accelerate_state")


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 16), torch.nn.Dropout(0.1), torch.nn.Tanh(), torch.nn.Linear(16, 3)
    )


def by_fastlr(model: torch.nn.Module) -> tuple[Any, Any]:
    opt = fastlr.FusedAdamW(model.parameters(), lr=POLICY)
    return opt, fastlr.integrations.ReadOnlyScheduler(opt)


def by_torch(model: torch.nn.Module) -> tuple[Any, Any]:
    opt = ADAMW.make_torch(model.parameters(), lr=1.0)
    return opt, torch.optim.lr_scheduler.LambdaLR(opt, lambda update: POLICY(update))


class Run:
    """Accumulates, clips, steps and logs in accelerate's words."""

    def __init__(self, make: Any, mixed_precision: str = "no") -> None:
        self.accelerator = accelerate.Accelerator(
            cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=ACCUMULATE
        )
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(BATCHES * SIZE, 6, generator=generator)
        data = torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long())
        loader = torch.utils.data.DataLoader(
            data, SIZE, shuffle=True, generator=torch.Generator().manual_seed(2)
        )
        self.model = make_model()
        opt, scheduler = make(self.model)
        self.model, self.opt, self.loader, self.scheduler = self.accelerator.prepare(
            self.model, opt, loader, scheduler
        )
        self.logged: list[float] = []

    def fit(
        self, *, skip: int = 0, abort_at: int | None = None, save_at: tuple[int, Path] | None = None
    ) -> Run:
        loader = self.accelerator.skip_first_batches(self.loader, skip) if skip else self.loader
        for index, (x, y) in enumerate(loader, start=skip):
            if save_at is not None and index == save_at[0]:
                self.accelerator.save_state(str(save_at[1]))
            if index == abort_at:
                raise KeyboardInterrupt
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(torch.nn.functional.cross_entropy(self.model(x), y))
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), LIMIT)
                self.opt.step()
                if self.accelerator.sync_gradients:
                    self.logged += self.scheduler.get_last_lr()
                self.scheduler.step()
                self.opt.zero_grad()
        return self


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_it_trains_and_logs_as_torchs_do(mixed_precision: str) -> None:
    ours, theirs = (Run(make, mixed_precision).fit() for make in (by_fastlr, by_torch))
    assert ours.logged == theirs.logged == POLICY.values(0, UPDATES).tolist()
    assert ours.opt.optimizer.clock() == (UPDATES, 0)
    assert_same_run(
        ADAMW,
        (theirs.opt.optimizer, list(theirs.model.parameters())),
        (ours.opt.optimizer, list(ours.model.parameters())),
    )


def test_an_aborted_run_is_resumed_to_the_bit(tmp_path: Path) -> None:
    """With shuffled data and dropout, at a rate in the middle of its decay."""
    whole = Run(by_fastlr).fit()
    with pytest.raises(KeyboardInterrupt):
        Run(by_fastlr).fit(save_at=(12, tmp_path), abort_at=15)
    resumed = Run(by_fastlr)
    resumed.accelerator.load_state(str(tmp_path))
    assert resumed.scheduler.get_last_lr() == [POLICY(6)]
    resumed.fit(skip=12)
    assert resumed.logged == whole.logged[6:]
    assert resumed.opt.optimizer.clock() == (UPDATES, 0)
    assert_same(whole.model.parameters(), resumed.model.parameters())


def test_a_prepared_scheduler_is_stepped_by_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the page says: torch's runs ahead, ours stays where the optimizer is."""
    ours, theirs = Run(by_fastlr), Run(by_torch)
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 2)
    for run in (ours, theirs):
        for _ in range(2):
            run.model(torch.ones(1, 6)).sum().backward()
            run.opt.step()
            run.scheduler.step()
    assert theirs.scheduler.get_last_lr() == [POLICY(4)]
    assert ours.scheduler.get_last_lr() == [POLICY(2)]


# -- growing batches -----------------------------------------------------------------------------------

PLAN = fastlr.BatchPlan.from_phases([(0, 4), (1, 8)], dataset_size=16, epochs=2, lr=0.1)


def plain_loader(rank: int, world_size: int) -> Any:
    sampler = fastlr.GrowingBatchSampler(PLAN, shuffle=False, rank=rank, world_size=world_size)
    return torch.utils.data.DataLoader(torch.arange(16), batch_sampler=sampler)


@pytest.mark.parametrize(
    "options",
    [{}, {"even_batches": False}, {"split_batches": True}],
    ids=["even", "uneven", "split"],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_sampler_with_ranks_is_not_shared_out_once_more(rank: int, options: dict[str, Any]) -> None:
    """What prepare() does with a DataLoader in each of two processes."""
    PartialState(cpu=True)
    with pytest.raises(RuntimeError, match=rf"what rank {rank} of 2 takes.*pass it a fastlr\.GrowingLoader"):
        prepare_data_loader(plain_loader(rank, 2), num_processes=2, process_index=rank, **options)


def test_a_sampler_of_one_process_is_prepared() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    loader = plain_loader(0, 1)
    read = [batch.tolist() for batch in accelerator.prepare(loader)]
    assert read == [batch.tolist() for batch in loader]
    assert sum(map(len, read)) == 32
    assert not hasattr(loader.batch_sampler, "batch_size")


def grown(
    folder: Path, *, save_at: int | None = None, abort_at: int | None = None, resume: bool = False
) -> Any:
    """Trains on growing batches, or on what is left of them."""
    accelerator = accelerate.Accelerator(cpu=True)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 1))
    opt = fastlr.FusedSGD(model.parameters(), lr=PLAN.lr, momentum=0.9)
    loader = fastlr.GrowingLoader(torch.linspace(0.1, 1.0, 16)[:, None], PLAN, micro_batch_size=4)
    model, opt, prepared = accelerator.prepare(model, opt, loader)
    assert prepared is loader.bind(opt)
    accelerator.register_for_checkpointing(loader)
    if resume:
        accelerator.load_state(str(folder))
    for batch in loader:
        loss = (model(batch.to(accelerator.device).data) - 1).square().mean()
        accelerator.backward(loss * batch.weight)
        if batch.ends_update:
            opt.step()
            opt.zero_grad()
            if opt.optimizer.clock().updates == save_at:
                accelerator.save_state(str(folder))
            if opt.optimizer.clock().updates == abort_at:
                raise KeyboardInterrupt
    assert opt.optimizer.clock() == (PLAN.total_updates, 32)
    return model


@pytest.mark.parametrize("save_at", [2, 5], ids=["in the first epoch", "in the second"])
def test_a_growing_loader_is_left_as_it_is_and_resumes(tmp_path: Path, save_at: int) -> None:
    whole = grown(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        grown(tmp_path, save_at=save_at, abort_at=save_at + (save_at < 5))
    assert_same(whole.parameters(), grown(tmp_path, resume=True).parameters())


PROGRAM = """
    import sys

    import accelerate
    import pytest
    import torch

    import fastlr

    out = sys.argv[1]
    torch.set_num_threads(1)
    accelerator = accelerate.Accelerator(cpu=True)
    plan = fastlr.BatchPlan.from_phases([(0, 4), (1, 8)], dataset_size=16, epochs=2, lr=0.1)
    data = torch.linspace(0.1, 1.0, 16, dtype=torch.float64)[:, None]

    sampled = torch.utils.data.DataLoader(data, batch_sampler=fastlr.GrowingBatchSampler(plan))
    if accelerator.num_processes > 1:
        with pytest.raises(RuntimeError, match=r"of 2 takes.*fastlr\\.GrowingLoader"):
            accelerator.prepare(sampled)

    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1).double()
    opt = fastlr.FusedSGD(model.parameters(), lr=plan.lr)
    loader = fastlr.GrowingLoader(data, plan, micro_batch_size=2)
    model, opt, scheduler = accelerator.prepare(model, opt, fastlr.integrations.ReadOnlyScheduler(opt))
    loader.bind(opt)
    for batch in accelerator.prepare(loader):
        with batch.sync(model):
            loss = (model(batch.to(accelerator.device).data) - 1).square().mean()
            accelerator.backward(loss * batch.weight)
        if batch.ends_update:
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            opt.step()
            scheduler.step()
            opt.zero_grad()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.save((accelerator.num_processes, weights, list(opt.optimizer.clock())),
               f"{out}/{accelerator.process_index}.pt")
    accelerator.end_training()
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_two_processes_grow_batches_as_one(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for world, launcher in ((1, []), (2, torchrun)):
        (out := tmp_path / str(world)).mkdir()
        command = [sys.executable, *launcher, str(tmp_path / "program.py"), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    alone = torch.load(tmp_path / "1" / "0.pt", weights_only=True)
    ranks = [torch.load(tmp_path / "2" / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert [ran for ran, *_ in (alone, *ranks)] == [1, 2, 2]
    assert alone[2] == ranks[0][2] == ranks[1][2] == [PLAN.total_updates, 32]
    assert torch.equal(ranks[0][1], ranks[1][1])
    torch.testing.assert_close(ranks[0][1], alone[1], rtol=1e-12, atol=1e-12)


# -- the page --------------------------------------------------------------------------------------------


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = torch.utils.data.TensorDataset(torch.randn(32, 6), torch.randint(0, 3, (32,)))
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    names = run_page(
        "frameworks/accelerate.md",
        model=make_model(),
        loader=loader,
        loss_fn=torch.nn.functional.cross_entropy,
    )
    assert names["batches"].samples == 64
