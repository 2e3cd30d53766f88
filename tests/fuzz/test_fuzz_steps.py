"""Any run of a fused optimizer is that of PyTorch's own with the schedules' values."""

from __future__ import annotations

import pytest
import torch

from fastlr.optim._groups import STAGE_DEFAULTS
from fuzz import seeds
from fuzz.stages import WRONG
from fuzz.steps import Run

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*holds its last value:UserWarning", "ignore:the file has no clock:UserWarning"
)


@pytest.mark.parametrize("seed", seeds(42))
def test_a_run_is_pytorchs_whatever_happens_between_its_steps(seed: int, backend: str) -> None:
    run = Run(seed, backend)
    try:
        run.go()
    except BaseException as error:
        error.add_note("\n".join(run.log)) if hasattr(error, "add_note") else print(*run.log, sep="\n")
        raise


def test_the_options_of_every_optimizer_are_of_many_kinds() -> None:
    runs = [Run(seed) for seed in range(60)]
    averaging = [group.averaging for run in runs for group in run.groups]
    assert {type(drawn.decay) for drawn in averaging} == {type(None), float, tuple}
    assert {(drawn.warmup, drawn.dtype) for drawn in averaging} == {
        (warmup, dtype) for warmup in (False, True) for dtype in (None, torch.float32)
    }
    limits = [run.limits for run in runs]
    assert {drawn.max_grad_norm is None for drawn in limits} == {False, True}
    assert {drawn.nonfinite for drawn in limits} == {"skip", "raise"}
    stagings = [group.staging for run in runs for group in run.groups]
    kept = {(drawn.master_weights, drawn.stochastic_rounding) for drawn in stagings}
    assert kept == {(False, False), (True, False), (False, True)}
    assert {drawn.cautious for drawn in stagings} == {False, True}
    bounds = {drawn.max_grad_value for drawn in stagings}
    assert {bound is None for bound in bounds} == {False, True}
    assert len({drawn.rounding_seed for drawn in stagings}) > 3
    assert {*averaging[0].given(), *stagings[0].given()} == WRONG.keys() == STAGE_DEFAULTS.keys()


def test_runs_move_to_torch_and_back() -> None:
    runs = [run for run in map(Run, range(30)) if run.moves]
    for run in runs:
        run.go()
    assert sum(run.moved for run in runs) > 5
