"""ReadOnlyScheduler says what torch's schedulers say, and stands where they stand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import parameters, set_gradients, through_file
from torch.optim.lr_scheduler import ChainedScheduler, ExponentialLR, LambdaLR, SequentialLR

import fastlr
from fastlr.integrations import ReadOnlyScheduler

POLICY = fastlr.LinearRamp(0.0, 0.4, 3).then(fastlr.Cosine(0.4, 0.0, 9), at=3)


def ours(lr: Any = POLICY) -> tuple[Any, ReadOnlyScheduler]:
    optimizer = fastlr.FusedSGD(parameters([(3,)]), lr=lr)
    return optimizer, ReadOnlyScheduler(optimizer)


def torchs() -> tuple[Any, LambdaLR]:
    optimizer = torch.optim.SGD(parameters([(3,)]), lr=1.0)
    return optimizer, LambdaLR(optimizer, lambda update: POLICY(update))


def step(optimizer: Any) -> None:
    set_gradients(0, optimizer.param_groups[0]["params"])
    optimizer.step()


def test_it_says_what_a_torch_scheduler_says_at_any_moment() -> None:
    said = []
    for optimizer, scheduler in (ours(), torchs()):
        rates = [scheduler.get_last_lr()]
        for _ in range(12):
            step(optimizer)
            rates.append(scheduler.get_last_lr())  # here the Trainer reads it: what the update used
            scheduler.step()
            rates.append(scheduler.get_last_lr())
        said.append((rates, scheduler.last_epoch, scheduler._step_count))
    assert said[0] == said[1]


def test_get_lr_is_of_the_next_update() -> None:
    optimizer, scheduler = ours()
    step(optimizer)
    assert scheduler.get_lr() == [POLICY(1)] != scheduler.get_last_lr()
    tensor = torch.tensor(0.5)
    other = ReadOnlyScheduler(torch.optim.SGD(parameters([(3,)]), lr=tensor))
    tensor.fill_(0.25)
    assert (other.get_last_lr(), other.get_lr()) == ([0.5], [0.25])  # a copy, as torch's


def test_its_state_goes_through_a_file_in_the_middle() -> None:
    optimizer, scheduler = ours()
    for _ in range(3):
        step(optimizer)
        scheduler.step()
    step(optimizer)  # and not yet the scheduler's
    saved = through_file({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})
    resumed, its_scheduler = ours(lr=0.1)
    resumed.load_state_dict(saved["optimizer"])
    its_scheduler.load_state_dict(saved["scheduler"])
    assert its_scheduler.get_last_lr() == scheduler.get_last_lr() == [POLICY(3)]
    assert its_scheduler.state_dict() == scheduler.state_dict()
    for pair in ((optimizer, scheduler), (resumed, its_scheduler)):
        pair[1].step()
    assert its_scheduler.get_last_lr() == scheduler.get_last_lr() == [POLICY(4)]


def test_a_torch_schedulers_state_is_taken() -> None:
    theirs, scheduler = torchs()
    for _ in range(4):
        step(theirs)
        scheduler.step()
    _, reader = ours()
    reader.load_state_dict(scheduler.state_dict())
    assert (reader.last_epoch, reader._step_count, reader.get_last_lr()) == (4, 5, [POLICY(4)])
    assert "lr_lambdas" not in vars(reader)
    joined = SequentialLR(theirs, [ExponentialLR(theirs, 0.5), ExponentialLR(theirs, 0.5)], [3])
    joined.step()
    reader.load_state_dict(joined.state_dict())  # which has no _step_count
    assert (reader.last_epoch, reader._step_count, reader.get_last_lr()) == (1, 2, joined.get_last_lr())


def test_a_torch_scheduler_takes_its_state() -> None:
    optimizer, scheduler = ours()
    for _ in range(4):
        step(optimizer)
        scheduler.step()
    saved = through_file(scheduler.state_dict())
    theirs = torch.optim.SGD(parameters([(3,)]), lr=0.4)
    decay = torch.optim.lr_scheduler.StepLR(theirs, 5, 0.5)
    decay.load_state_dict(saved)
    assert (decay.last_epoch, decay.get_last_lr()) == (4, [POLICY(4)])
    step(theirs)
    decay.step()
    assert decay.get_last_lr() == [0.2]
    with pytest.raises(KeyError, match="lr_lambdas"):
        torchs()[1].load_state_dict(saved)


def test_a_state_without_the_last_rates_is_taken() -> None:
    optimizer, scheduler = ours()
    step(optimizer)
    scheduler.load_state_dict({"last_epoch": 1, "_step_count": 2})  # of version 0.1
    assert scheduler.get_last_lr() == [POLICY(1)]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "must have last_epoch, got nothing"),
        ({"_last_lr": [0.1]}, "must have last_epoch, got _last_lr; of a ChainedScheduler's"),
        ({"last_epoch": "4"}, "last_epoch must be an integer >= -1, got '4'"),
        ({"last_epoch": 4, "_step_count": -1}, "_step_count must be an integer >= 0, got -1"),
        ({"last_epoch": 4, "_last_lr": [0.1, 0.2]}, r"rates of 1 parameter groups, got \[0.1, 0.2\]"),
        ({"last_epoch": 4, "_last_lr": 0.1}, "rates of 1 parameter groups, got 0.1"),
        ({"last_epoch": 4, "_last_lr": ["a"]}, "group 0 in _last_lr must be a finite number, got 'a'"),
        (None, "must have last_epoch, got None"),
    ],
)
def test_a_damaged_state_is_refused_whole(state: Any, message: str) -> None:
    _, scheduler = ours()
    before = scheduler.state_dict()
    with pytest.raises(ValueError, match=message):
        scheduler.load_state_dict(state)
    assert scheduler.state_dict() == before


def test_a_part_of_an_epoch_is_told_and_comes_back_from_a_file() -> None:
    _, scheduler = ours()
    scheduler.step(2.5)  # as CosineAnnealingWarmRestarts is called in the loop over batches
    _, resumed = ours()
    resumed.load_state_dict(through_file(scheduler.state_dict()))
    assert resumed.last_epoch == scheduler.last_epoch == 2


def test_sequential_refuses_it_before_anything_is_written() -> None:
    optimizer, scheduler = ours()
    for others in ([], [ExponentialLR(optimizer, 0.5)]):  # which gives groups an initial_lr
        before = [dict(group) for group in optimizer.param_groups]
        with pytest.raises(TypeError, match=r"lr=a\.then\(b, at=\.\.\.\)"):
            SequentialLR(optimizer, [*others, scheduler], [2] * len(others))
        assert [dict(group) for group in optimizer.param_groups] == before


def test_a_chain_of_it_is_harmless() -> None:
    optimizer, scheduler = ours()
    chain = ChainedScheduler([scheduler, ReadOnlyScheduler(optimizer)], optimizer)
    for update in range(5):
        assert chain.get_last_lr() == scheduler.get_last_lr() == [POLICY(update)]
        step(optimizer)
        chain.step()
    saved = through_file(chain.state_dict())
    _, other = ours()
    again = ChainedScheduler([other, ReadOnlyScheduler(other.optimizer)])
    again.load_state_dict(saved)
    assert again.get_last_lr() == other.get_last_lr() == [POLICY(5)]


def test_a_chain_with_a_scheduler_that_writes_is_stopped_at_the_step() -> None:
    optimizer, scheduler = ours(lr=fastlr.Constant(0.5))
    chain = ChainedScheduler([scheduler, ExponentialLR(optimizer, 0.5)], optimizer)
    step(optimizer)
    chain.step()
    with pytest.raises(RuntimeError, match=r"lr of parameter group 0 was set to 0\.25 by something else"):
        optimizer.step()
