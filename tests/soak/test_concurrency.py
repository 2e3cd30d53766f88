"""Threads, forked and spawned processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import assert_same, parameters, set_gradients
from native import toolchain

import fastlr

SHARED = 40_000  # elements: a step is shared between threads from 16,384 on


def optimizer_of(model: list[torch.nn.Parameter]) -> fastlr.FusedSGD:
    return fastlr.FusedSGD(model, lr=fastlr.Cosine(0.1, 0.0, 500), momentum=0.9, nesterov=True)


def trained(model: list[torch.nn.Parameter], steps: int) -> fastlr.FusedSGD:
    optimizer = optimizer_of(model)
    for step in range(steps):
        set_gradients(step, model)
        optimizer.step()
    return optimizer


def in_threads(*work: Callable[[], object]) -> None:
    """Begun at the same moment; raises what one of them raises."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(work))

    def run(function: Callable[[], object]) -> None:
        barrier.wait()
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_each_thread_with_an_optimizer_of_its_own(threads: int, soak: bool) -> None:
    steps = 300 if soak else 20
    shapes = [(SHARED,), (17,), (3, 5)]
    expected = parameters(shapes)
    trained(expected, steps)
    models = [parameters(shapes) for _ in range(2)]
    in_threads(*(lambda model=model: trained(model, steps) for model in models))
    for model in models:
        assert_same(expected, model)


def test_a_shared_optimizer_refuses_a_second_step_at_a_time(soak: bool) -> None:
    """Whichever thread steps, each update is whole; the other is told."""
    torch.set_num_threads(1)  # so that a step is long
    model, twin = parameters([(2_000_000,), (5,)]), parameters([(2_000_000,), (5,)])
    set_gradients(0, model, twin)
    optimizer, alone = optimizer_of(model), optimizer_of(twin)
    applied, refused = [], []

    def work() -> None:
        # On until one was refused, as a busy machine may run the threads one after the other.
        while len(applied) < (100 if soak else 10) or (not refused and len(applied) < 5000):
            try:
                optimizer.step()
            except RuntimeError as error:  # noqa: PERF203
                refused.append(str(error))
            else:
                applied.append(1)

    in_threads(work, work)
    print(f"{len(applied)} steps applied, {len(refused)} refused")
    assert refused
    assert all("step() is already running on this optimizer" in message for message in refused)
    assert optimizer.clock().updates == len(applied)
    for _ in applied:
        alone.step()
    assert_same(twin, model)
    assert optimizer.param_groups[0]["lr"] == alone.param_groups[0]["lr"]


# A step with threads, a fork, a step of the child; prints the child's weights' digest and its own.
FORK = """
import os, sys
import torch, fastlr

torch.set_num_threads(2)
measure = sys.argv[1] == "measured"
torch.manual_seed(0)
model = [torch.nn.Parameter(torch.randn(40_000)), torch.nn.Parameter(torch.randn(7))]
optimizer = fastlr.FusedSGD(model, lr=fastlr.Cosine(0.1, 0.0, 50), momentum=0.9)
optimizer.measure_grad_norm = measure
for p in model:
    p.grad = torch.randn(p.shape)
(model[0] + 1).sin().sum()  # PyTorch's own threads
optimizer.step()


def step():
    for _ in range(3):
        optimizer.step()
    digest = hash(tuple(model[0].tolist())), hash(tuple(model[1].tolist()))
    print(digest, optimizer.clock().updates, optimizer.last_grad_norm, flush=True)


pid = os.fork()
if pid == 0:
    step()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
step()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("norm", ["plain", "measured"])
def test_a_forked_process_steps_on(norm: str, soak: bool) -> None:
    """Where PyTorch's own operations would wait forever for threads that are not there."""
    if norm == "measured" and not soak:
        pytest.skip("only with --soak")
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", FORK, norm],
        cwd=toolchain.TESTS,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail("the forked process hangs")
    assert process.returncode == 0
    child, parent = output.splitlines()
    assert child == parent


def step_in_another_process(model: list[torch.nn.Parameter], optimizer: fastlr.FusedSGD, path: Path) -> None:
    """To be called in a process of its own, with what it got by pickle."""
    assert all(a is b for a, b in zip(model, optimizer.param_groups[0]["params"], strict=True))
    for step in range(4, 6):
        set_gradients(step, model)
        optimizer.step()
    torch.save({"weights": [p.detach() for p in model], "optimizer": optimizer.state_dict()}, path)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_an_optimizer_goes_to_another_process(method: str, tmp_path: Path, soak: bool) -> None:
    if method == "forkserver" and not soak:
        pytest.skip("only with --soak")
    model, twin = parameters([(SHARED,), (5,)]), parameters([(SHARED,), (5,)])
    optimizer, alone = trained(model, 4), trained(twin, 4)
    for p in model:
        p.grad = None
    before = [p.detach().clone() for p in model]
    context = torch.multiprocessing.get_context(method)
    process = context.Process(target=step_in_another_process, args=(model, optimizer, tmp_path / "end.pt"))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 0
    for step in range(4, 6):
        set_gradients(step, twin)
        alone.step()
    end = torch.load(tmp_path / "end.pt", weights_only=True)
    assert_same(twin, end["weights"])
    state = alone.state_dict()
    assert end["optimizer"]["param_groups"] == state["param_groups"]
    for key, entry in state["state"].items():
        assert torch.equal(entry["momentum_buffer"], end["optimizer"]["state"][key]["momentum_buffer"])
    # Weights are shared memory, as torch.multiprocessing has it; the clock is each process's own.
    assert optimizer.clock().updates == 4
    assert_same(twin, model)
    assert not all(torch.equal(a, b) for a, b in zip(before, model, strict=True))
