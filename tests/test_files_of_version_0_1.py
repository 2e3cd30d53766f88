"""Checkpoints that version 0.1 wrote, which lie in files/version_0_1.pt.

That version's ``state_dict()`` made them, of runs of five updates. Beside each stand the weights of then, and
what four further updates made of them, with the rates of these: by that version's schedules and, for the
update itself, ``torch.optim.SGD``, to which its step was equal bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same
from torch.distributed.checkpoint import state_dict as dcp

import fastlr

FILE = Path(__file__).parent / "files" / "version_0_1.pt"
DONE, LATER = 5, 4

Weights = list[torch.nn.Parameter]


@pytest.fixture(scope="module")
def runs() -> dict[str, Any]:
    return torch.load(FILE, weights_only=True)


# What a script of today would make to go on, with other values than the files'.
MADE: dict[str, Callable[[Weights], fastlr.FusedOptimizer]] = {
    "sgd": lambda ps: fastlr.FusedSGD([{"params": ps[:1]}, {"params": ps[1:]}], lr=0.3, nesterov=False),
    "cyclic": lambda ps: fastlr.FusedCyclicSGD(ps, base_lr=0.5, max_lr=0.7, step_size_up=9),
    "samples": lambda ps: fastlr.FusedSGD(ps, lr=fastlr.Constant(0.3), momentum=0.5),
    "halves": lambda ps: fastlr.FusedSGD(ps, lr=0.3),
}


def at_the_file(run: dict[str, Any]) -> Weights:
    return [torch.nn.Parameter(weight.clone()) for weight in run["weights"]]


def set_gradients(parameters: Weights, update: int) -> None:
    drawn = torch.Generator().manual_seed(update)
    for place, p in enumerate(parameters):
        gradient = torch.randn(p.shape, generator=drawn).to(p.dtype)
        p.grad = None if place == 2 else gradient


def check_goes_on(name: str, run: dict[str, Any], parameters: Weights, opt: fastlr.FusedOptimizer) -> None:
    assert opt.clock() == (DONE, 2 * DONE if name == "samples" else 0)
    for update in range(DONE, DONE + LATER):
        set_gradients(parameters, update)
        opt.step()
        if name == "samples":
            opt.advance_samples(2)
        assert [[group["lr"], group["momentum"]] for group in opt.param_groups] == run["rates"][update - DONE]
    assert_same(parameters, run["later"])


@pytest.mark.parametrize("name", MADE)
def test_a_run_goes_on(name: str, runs: dict[str, Any]) -> None:
    run = runs[name]
    before = copy.deepcopy(run["optimizer"])
    parameters = at_the_file(run)
    opt = MADE[name](parameters)
    keys = {key for group in opt.param_groups for key in group} | {"name", "lr_scale"}
    opt.load_state_dict(run["optimizer"])
    assert str(run["optimizer"]) == str(before)
    assert {key for group in opt.param_groups for key in group} <= keys
    again = copy.deepcopy(opt.state_dict())
    check_goes_on(name, run, parameters, opt)
    parameters = at_the_file(run)  # and from a file of today's that was made of it
    opt = MADE[name](parameters)
    opt.load_state_dict(again)
    check_goes_on(name, run, parameters, opt)


def test_what_a_file_holds_is_read(runs: dict[str, Any]) -> None:
    opt = MADE["sgd"](at_the_file(runs["sgd"]))
    opt.load_state_dict(runs["sgd"]["optimizer"])
    body, rest = opt.param_groups
    per_epoch = fastlr.MultiStep(0.1, [3, 6], 0.5, unit="epoch")
    assert body["lr_schedule"] == per_epoch.in_updates(2)
    assert body["momentum_schedule"] == fastlr.Triangular(0.8, 0.9, 4, inverted=True)
    assert (body["name"], body["lr_scale"], body["nesterov"]) == ("body", 0.5, True)
    assert rest["lr_schedule"] == fastlr.LinearRamp(0.01, 0.1, 3).then(2.0 * fastlr.Cosine(0.05, 0.001, 9))
    assert (rest["momentum_schedule"], rest["momentum"], rest["weight_decay"]) == (None, 0.5, 0.0)
    halves = at_the_file(runs["halves"])
    opt = MADE["halves"](halves)
    opt.load_state_dict(runs["halves"]["optimizer"])
    assert opt.param_groups[0]["state_dtype"] is torch.float32
    assert opt.state[halves[0]]["momentum_buffer"].dtype is torch.float32
    assert halves[2] not in opt.state  # it has never been updated


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7),
    reason="this PyTorch's helpers want a state of every parameter",
)
def test_the_distributed_helpers_read_it(runs: dict[str, Any]) -> None:
    run = runs["samples"]
    model = torch.nn.ParameterList(at_the_file(run))
    parameters = [*model.parameters()]
    opt = MADE["samples"](parameters)
    names = [name for name, _ in model.named_parameters()]
    file = copy.deepcopy(run["optimizer"])
    file["state"] = {names[place]: entry for place, entry in file["state"].items()}
    file["param_groups"][0]["params"] = names
    options = dcp.StateDictOptions(strict=False)  # a parameter that was never updated has no state
    dcp.set_optimizer_state_dict(model, opt, file, options=options)
    check_goes_on("samples", run, parameters, opt)


@pytest.mark.filterwarnings("ignore:torch.optim.lr_scheduler has nothing:UserWarning")
def test_it_moves_to_torch(runs: dict[str, Any]) -> None:
    run = runs["cyclic"]
    parameters = at_the_file(run)
    opt = MADE["cyclic"](parameters)
    opt.load_state_dict(run["optimizer"])
    optimizer, scheduler = opt.to_torch(foreach=False)
    assert type(scheduler) is torch.optim.lr_scheduler.CyclicLR
    for update in range(DONE, DONE + LATER):
        set_gradients(parameters, update)
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close([p.detach() for p in parameters], run["later"], rtol=1e-6, atol=1e-7)
