"""After Ctrl-C at any place of a call, the call was made or it was not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import parameters, set_gradients

import fastlr
from soak.interrupts import chosen, interrupted, places

SHAPES = [(3,), (8, 5), (), (129,)]


class Subject:
    """An optimizer in mid-run: two groups on schedules of both clocks, one of which has no momentum yet."""

    def __init__(self, steps: int = 2, **options: Any) -> None:
        self.model = parameters(SHAPES)
        self.optimizer = fastlr.FusedSGD(
            [
                {"params": self.model[:2], "lr": fastlr.Cosine(0.1, 0.0, 50)},
                {"params": self.model[2:], "lr": fastlr.LinearRamp(0.2, 0.0, 500, unit="sample")},
            ],
            momentum=fastlr.LinearRamp(0.5, 0.9, 20),
            **options,
        )
        for step in range(steps):
            set_gradients(step, self.model)
            self.optimizer.step()
            self.optimizer.advance_samples(7)
        set_gradients(steps, self.model)

    def state(self) -> list[Any]:
        """Everything that a step changes, to be compared bit for bit."""
        optimizer = self.optimizer
        state = [
            [p.detach().clone() for p in self.model],
            [p._version for p in self.model],
            optimizer.clock(),
        ]
        for group in optimizer.param_groups:
            state.append({k: v for k, v in group.items() if k != "params"})
        state.append([dict(optimizer.state[p]) if p in optimizer.state else None for p in self.model])
        state.append(set(map(id, optimizer.state)) <= set(map(id, self.model)))
        state.append(len(optimizer._optimizer_state_dict_post_hooks))
        state.append(len(optimizer._optimizer_load_state_dict_pre_hooks))
        return clone(state)


def clone(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: clone(v) for k, v in value.items()}
    return [clone(v) for v in value] if isinstance(value, list) else value


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def hooked(subject: Subject) -> Subject:
    for register in (subject.optimizer.register_step_pre_hook, subject.optimizer.register_step_post_hook):
        register(lambda *_: None)
    return subject


def measuring(subject: Subject) -> Subject:
    subject.optimizer.measure_grad_norm = True
    return subject


def step(subject: Subject) -> None:
    subject.optimizer.step()


def scaled_step(subject: Subject) -> None:
    subject.optimizer.grad_scale, subject.optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    subject.optimizer.step()


def state_dict(subject: Subject) -> None:
    subject.optimizer.state_dict()


OTHER = Subject(steps=4).optimizer.state_dict()


def load(subject: Subject) -> None:
    subject.optimizer.load_state_dict(OTHER)


def set_schedule(subject: Subject) -> None:
    subject.optimizer.set_schedule(
        fastlr.Cosine(0.3, 0.1, 40), momentum=fastlr.LinearRamp(0.9, 0.5, 30), start="zero"
    )


CASES: dict[str, tuple[Callable[[], Subject], Callable[[Subject], None]]] = {
    "first step": (lambda: Subject(steps=0), step),
    "step": (Subject, step),
    "hooked first step": (lambda: hooked(Subject(steps=0)), step),
    "measured step": (lambda: measuring(Subject(steps=0)), step),
    "step with GradScaler": (Subject, scaled_step),
    "state_dict": (Subject, state_dict),
    "load_state_dict": (Subject, load),
    "load_state_dict into a new one": (lambda: Subject(steps=0), load),
    "set_schedule": (Subject, set_schedule),
    "set_schedule of a group": (Subject, lambda s: s.optimizer.set_schedule(0.5, momentum=0.1, group=1)),
    "set_clock": (Subject, lambda s: s.optimizer.set_clock(updates=9, samples=99)),
    "advance_samples": (Subject, lambda s: s.optimizer.advance_samples(5)),
}


@pytest.mark.parametrize(("make", "call"), CASES.values(), ids=CASES.keys())
def test_a_call_is_made_or_it_is_not(
    make: Callable[[], Subject], call: Callable[[Subject], None], soak: bool
) -> None:
    whole = make()
    before = whole.state()
    call(whole)
    after = whole.state()
    set_gradients(99, whole.model)
    whole.optimizer.step()
    next_after = whole.state()
    unhurt = make()
    set_gradients(99, unhurt.model)
    unhurt.optimizer.step()
    next_before = unhurt.state()

    counted = make()
    count = places(lambda: call(counted))
    assert count >= 5
    outcomes = set()
    for place in chosen(count, 10_000 if soak else 40, seed=0):
        subject = make()
        raised = interrupted(lambda s=subject: call(s), place)
        # Hooks of a call that was stopped may be there until the next one.
        found = subject.state()[:-2]
        made = same(found, after[:-2])
        assert made or (raised and same(found, before[:-2])), f"half a call after place {place} of {count}"
        outcomes.add(made or same(before, after))
        subject.optimizer.state_dict()
        if call is load:
            call(subject)
            assert same(subject.state()[2:], after[2:]), f"not loaded again after place {place} of {count}"
            continue
        # Up to its third place, in front of everything, a step is GradScaler's own.
        assert place < 3 or not hasattr(subject.optimizer, "grad_scale")
        vars(subject.optimizer).pop("grad_scale", None)
        vars(subject.optimizer).pop("found_inf", None)
        set_gradients(99, subject.model)
        subject.optimizer.step()
        assert same(subject.state(), next_after if made else next_before), f"place {place} of {count}"
    assert soak is False or True in outcomes
