"""Two real processes of DeepSpeed on CPUs: every stage trains as torch's optimizer and as a plain loop."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlr.integrations.deepspeed import initialize

pytest.importorskip("deepspeed", reason="deepspeed is not installed")

# What each rank runs. DeepSpeed warns of what it calls in PyTorch, and prints much.
PROGRAM = """
    import copy
    import os
    import sys

    import deepspeed
    import torch
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
    from pages import run_page
    from rule_table import taking_exact_roots

    import fastlr
    from fastlr.integrations.deepspeed import initialize

    out = sys.argv[1]
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    lr = fastlr.Triangular2(0.001, 0.02, step_size_up=3)
    generator = torch.Generator().manual_seed(1)
    DATA = [  # of every rank's micro-batches
        (torch.randn(world, 4, 6, generator=generator), torch.randint(0, 3, (world, 4), generator=generator))
        for _ in range(12)
    ]


    def make_model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))


    def groups(model):
        weights = [p for p in model.parameters() if p.ndim > 1]
        biases = [p for p in model.parameters() if p.ndim == 1]
        return [{"params": weights}, {"params": biases, "weight_decay": 0.0}]


    def make_optimizer(model, lr):
        return fastlr.FusedAdamW(groups(model), lr=lr, weight_decay=0.1, ema_decay=0.5)


    def engine_of(case, kind, model, **config):
        stage, half = case
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage},
            "bf16": {"enabled": half},
            **config,
        }
        if kind == "torch":
            opt = taking_exact_roots(
                torch.optim.AdamW(groups(model), lr=1.0, weight_decay=0.1, foreach=False)
            )
            return opt, deepspeed.initialize(
                model=model, optimizer=opt, config=config,
                lr_scheduler=lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lr),
            )[0]
        opt = make_optimizer(model, 0.5 if kind == "fixed" else lr)
        opt.max_grad_norm = 1.0 if kind == "clips" else None
        return opt, initialize(model=model, optimizer=opt, config=config)[0]


    def loss_of(model, x, y, dtype):
        return torch.nn.functional.cross_entropy(model(x.to(dtype)).float(), y)


    def train(engine, data):
        rates = []
        for x, y in data:
            dtype = next(engine.module.parameters()).dtype
            engine.backward(loss_of(engine, x[rank], y[rank], dtype))
            engine.step()
            rates.append(engine.get_lr())
        return rates[1::2]


    def weights(model):
        full = [safe_get_full_fp32_param(p) for p in model.parameters()]
        kept = [p.detach() if q is None else q for p, q in zip(model.parameters(), full, strict=True)]
        return torch.cat([p.detach().float().flatten() for p in kept]).clone()


    def averages(model):
        return torch.cat([safe_get_full_optimizer_state(p, "ema").flatten() for p in model.parameters()])


    def plain(half):
        # The same training without DeepSpeed, in one process; masters in float32 with models in bfloat16.
        master = make_model()
        opt = make_optimizer(master, lr)
        dtype = torch.bfloat16 if half else torch.float32
        for k in range(0, len(DATA), 2):
            model = copy.deepcopy(master).to(dtype)
            for x, y in DATA[k : k + 2]:
                for r in range(world):
                    (loss_of(model, x[r], y[r], dtype) / (2 * world)).backward()
            for p, q in zip(master.parameters(), model.parameters(), strict=True):
                p.grad = q.grad.float()
            opt.step()
        averaged = torch.cat([opt.state[p]["ema"].flatten() for p in master.parameters()])
        return torch.cat([p.to(dtype).detach().float().flatten() for p in master.parameters()]), averaged


    record = {"plain": {half: plain(half) for half in (False, True)}, "rates": [lr(k) for k in range(1, 7)]}
    for case in [(stage, half) for stage in range(4) for half in (False, True)]:
        entry = record[case] = {}
        for kind in ("fastlr", "torch"):
            model = make_model()
            opt, engine = engine_of(case, kind, model, gradient_clipping=0.3)
            if kind == "fastlr":
                entry["clock at the start"] = tuple(opt.clock())
            entry[f"{kind} rates"] = train(engine, DATA)
            entry[f"{kind} clipped"] = weights(model)
        entry["torch clock"] = [int(state["step"]) for state in opt.state.values()]
        model = make_model()
        opt, engine = engine_of(case, "fastlr", model)
        train(engine, DATA[:6])
        folder = f"{out}/{case[0]}-{case[1]}"
        engine.save_checkpoint(folder)
        train(engine, DATA[6:])
        entry["fastlr"], entry["clock"] = weights(model), tuple(opt.clock())
        if case[0] == 3:
            entry["averages"] = averages(model)
        model = make_model()
        opt, engine = engine_of(case, "fixed", model)
        engine.load_checkpoint(folder)
        entry["clock of the file"] = tuple(opt.clock())
        train(engine, DATA[6:])
        entry["resumed"] = weights(model)

        warmup = {"type": "WarmupLR", "params": {"warmup_num_steps": 3}}
        try:
            train(engine_of(case, "fastlr", make_model(), scheduler=warmup)[1], DATA)
        except RuntimeError as error:
            entry["two owners"] = str(error)
        try:
            engine_of(case, "clips", make_model())
        except ValueError as error:
            entry["own clipping"] = str(error)
    for stage in range(4):  # in float16, where DeepSpeed's scale makes the first updates overflow
        scaled = {"enabled": True, "initial_scale_power": 20}
        opt, engine = engine_of((stage, False), "fastlr", make_model(), fp16=scaled)
        train(engine, DATA)
        rate = opt.param_groups[1]["lr"]
        record["float16", stage] = opt.clock().updates, engine.skipped_steps, rate, lr(opt.clock().updates)

    loader = [(torch.randn(16, 4), torch.randint(0, 3, (16,))) for _ in range(4)]
    names = {"loss_fn": torch.nn.functional.cross_entropy, "loader": loader}
    page = run_page("frameworks/deepspeed.md", model=torch.nn.Linear(4, 3), **names)
    record["page"] = tuple(page["optimizer"].clock()), page["engine"].get_lr(), page["lr"](2)
    torch.save(record, f"{out}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)
"""

CASES = [(stage, half) for stage in range(4) for half in (False, True)]
with_cases = pytest.mark.parametrize(
    "case", CASES, ids=[f"ZeRO {stage} in {'bfloat16' if half else 'float32'}" for stage, half in CASES]
)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    program = folder / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(program), str(folder)]
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@with_cases
def test_the_clock_counts_updates(records: list[dict[Any, Any]], case: Any) -> None:
    for record in records:
        entry = record[case]
        assert entry["clock at the start"] == (0, 0)
        assert entry["clock"] == (6, 0)
        assert entry["clock of the file"] == (3, 0)
        assert entry["fastlr rates"] == [[rate, rate] for rate in record["rates"]]


@with_cases
def test_clipped_runs_are_those_of_torchs_optimizer(records: list[dict[Any, Any]], case: Any) -> None:
    for record in records:
        entry = record[case]
        if case == (0, True):  # where torch's takes the first step for an update
            assert set(entry["torch clock"]) == {7}
            assert not torch.equal(entry["fastlr clipped"], entry["torch clipped"])
        else:
            assert entry["torch rates"] == entry["fastlr rates"]
            assert torch.equal(entry["fastlr clipped"], entry["torch clipped"])
        assert not torch.allclose(entry["fastlr clipped"], entry["fastlr"], rtol=1e-3)
    assert torch.equal(*(record[case]["fastlr clipped"] for record in records))


@with_cases
def test_runs_are_those_of_a_plain_loop(records: list[dict[Any, Any]], case: Any) -> None:
    for record in records:
        half = case[1]
        rtol, atol = (0.05, 0.005) if half else (1e-5, 1e-6)  # gradients are added up in another order
        weights, averages = record["plain"][half]
        torch.testing.assert_close(record[case]["fastlr"], weights, rtol=rtol, atol=atol)
        if case[0] == 3:
            torch.testing.assert_close(record[case]["averages"], averages, rtol=rtol, atol=atol)


@with_cases
def test_a_run_resumes_to_the_bit(records: list[dict[Any, Any]], case: Any) -> None:
    for record in records:
        assert torch.equal(record[case]["fastlr"], record[case]["resumed"])


@with_cases
def test_own_clipping_is_refused_where_gradients_are_shared_out(
    records: list[dict[Any, Any]], case: Any
) -> None:
    for record in records:
        error = record[case].get("own clipping")
        if case[0] == 0:
            assert error is None
        else:
            assert error is not None
            assert f"max_grad_norm must be None under ZeRO, got 1.0 at stage {case[0]}" in error


@with_cases
def test_deepspeeds_own_scheduler_is_noticed(records: list[dict[Any, Any]], case: Any) -> None:
    for record in records:
        assert "a schedule owns it" in record[case]["two owners"]


@pytest.mark.parametrize("stage", range(4))
def test_the_clock_counts_no_update_that_overflows(records: list[dict[Any, Any]], stage: int) -> None:
    for record in records:
        updates, skipped, rate, expected = record["float16", stage]
        assert updates + skipped == 6
        assert (skipped > 0) == (stage > 0)  # without ZeRO its scale begins lower
        assert rate == expected


def test_the_page_runs(records: list[dict[Any, Any]]) -> None:
    for record in records:
        clock, rate, expected = record["page"]
        assert clock == (2, 0)
        assert rate == [expected]


def test_other_optimizers_are_left_to_deepspeed() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"must be a fastlr optimizer, got SGD; .*deepspeed.initialize"):
        initialize(model=model, optimizer=torch.optim.SGD(model.parameters()), config={})
