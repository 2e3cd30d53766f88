"""A few steps of everything on the device, beside the same steps on the CPU: bits compared."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from helpers import assert_same, parameters, set_gradients

import fastlr
from fastlr import FusedSGD, Schedule

from . import report
from .device import Device, open_device

Model = list[torch.nn.Parameter]
Make = Callable[[Model], FusedSGD]

TYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
)

# Of each update rule: what makes its optimizer, and options that between them take every branch.
RULES: dict[str, tuple[Callable[..., FusedSGD], dict[str, dict[str, Any]]]] = {
    "sgd": (
        fastlr.FusedSGD,
        {
            "plain": {},
            "weight decay": {"weight_decay": 0.01},
            "momentum": {"momentum": 0.9},
            "dampening": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
            "nesterov": {"momentum": 0.95, "nesterov": True, "weight_decay": 0.01},
            "maximize": {"momentum": 0.7, "maximize": True},
            "wide momentum": {"momentum": 0.9, "nesterov": True, "momentum_dtype": torch.float32},
        },
    ),
}
CYCLE: dict[str, Any] = {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3, "mode": "triangular2"}


def cyclic(model: Model) -> FusedSGD:
    return fastlr.FusedCyclicSGD(model, **CYCLE, cycle_momentum=True, weight_decay=1e-3)


def model_on(device: torch.device, dtype: torch.dtype) -> Model:
    """Sizes around vectors and chunks, a misaligned view, one with gaps."""
    model = parameters([(), (0,), (7,), (33, 5), (8192,), (9001,)], dtype, device=device)
    for p, cut in zip(
        parameters([(70,), (40, 6)], dtype, seed=1, device=device), ("odd", "gaps"), strict=True
    ):
        model.append(torch.nn.Parameter(p.detach()[1:] if cut == "odd" else p.detach()[::2, 1::2]))
    return model


class Pair:
    """A model with its optimizer on the device, and the same on the CPU."""

    def __init__(self, device: Device, make: Make, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.twin = model_on(device.device, dtype), model_on(torch.device("cpu"), dtype)
        self.optimizer = make(self.model)
        with device.on_cpu():
            self.reference = make(self.twin)

    def gradients(self, step: int, scale: float = 1.0) -> None:
        """New values in the gradients that there are, or new gradients."""
        set_gradients(step, self.twin, scale=scale)
        for p, q in zip(self.model, self.twin, strict=True):
            if p.grad is None:
                p.grad = torch.empty_like(p)
            p.grad.copy_(q.grad)

    def step(self, step: int) -> None:
        self.gradients(step)
        self.optimizer.step()
        self.reference.step()

    def compare(self) -> None:
        assert_same(self.twin, self.model)
        for p, q in zip(self.model, self.twin, strict=True):
            for name, expected in self.reference.state.get(q, {}).items():
                assert_same([expected], [self.optimizer.state[p][name]])
        assert self.optimizer.sync() == self.reference.clock()
        for ours, theirs in zip(self.optimizer.param_groups, self.reference.param_groups, strict=True):
            assert ours["lr"] == theirs["lr"], (ours["lr"], theirs["lr"])


# -- schedules -----------------------------------------------------------------------------------

# Of each kind: a schedule in samples, and whether a device's values are the host's to the bit.
SCHEDULES: dict[str, tuple[Schedule, bool]] = {
    "constant": (fastlr.Constant(0.1, unit="sample"), True),
    "line": (fastlr.LinearRamp(0.0, 0.1, 700, unit="sample"), True),
    "cosine": (fastlr.Cosine(0.1, 0.0, 700, unit="sample"), True),
    "restarts": (fastlr.CosineWarmRestarts(0.1, 0.0, 50, 2, unit="sample"), True),
    "polynomial": (fastlr.Polynomial(0.1, 0.0, 700, 0.9, unit="sample"), False),
    "time-based": (fastlr.TimeBased(0.1, 1e-3, unit="sample"), True),
    "exponential": (fastlr.Exponential(0.1, 0.99, unit="sample"), True),
    "step decay": (fastlr.StepDecay(0.1, 30, 0.7, unit="sample"), True),
    "multi-step": (fastlr.MultiStep(0.1, [100, 300], 0.3, unit="sample"), True),
    "triangular": (fastlr.Triangular(0.01, 0.1, 33, 57, unit="sample"), True),
    "triangular2": (fastlr.Triangular2(0.01, 0.1, 33, unit="sample"), True),
    "geometric": (fastlr.Triangular(0.001, 0.1, 33, interpolation="geometric", unit="sample"), False),
    "parabolic": (fastlr.Triangular(0.01, 0.1, 33, interpolation="parabolic", unit="sample"), True),
    "sinusoidal": (fastlr.Triangular(0.01, 0.1, 33, interpolation="sinusoidal", unit="sample"), True),
    "exp_range": (fastlr.ExpRange(0.01, 0.1, 33, gamma=0.999, unit="sample"), False),
    "exp_range, both": (fastlr.ExpRange(0.01, 0.1, 33, gamma=0.999, decay_base=True, unit="sample"), False),
    "one-cycle": (fastlr.OneCycle(0.1, 700, unit="sample"), True),
    "table": (fastlr.Tabulated(lambda t: 0.1 / (t + 1) ** 0.5, 700, unit="sample"), True),
}
MOST_ULPS = 4  # apart, where a device's own pow() is in a value


def values_on(device: Device, schedule: Schedule, clocks: list[int]) -> np.ndarray[Any, Any]:
    """A schedule's values as the device has them: what a step subtracts from zero where g = -1."""
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64, device=device.device))
    p.grad = -torch.ones_like(p)
    optimizer = fastlr.FusedSGD([p], lr=schedule)
    found = torch.empty(len(clocks), dtype=torch.float64, device=device.device)
    now = 0
    for i, clock in enumerate(clocks):
        optimizer.advance_samples(clock - now)
        now = clock
        optimizer.step()
        found[i].copy_(p.detach()[0])
        p.detach().zero_()
    return found.cpu().numpy()


def check_schedule(device: Device, schedule: Schedule, exact: bool, small: bool) -> str:
    last = min(schedule.duration or 5000, 5000)
    clocks = sorted({*range(0, last, 97 if small else 11), last - 2, last - 1, last})
    found = values_on(device, schedule, clocks)
    expected = np.array([schedule._native.value(clock) for clock in clocks])
    ulps = np.abs(found - expected) / np.spacing(np.maximum(np.abs(expected), np.finfo(float).tiny))
    worst = int(np.argmax(ulps))
    text = f"{ulps[worst]:g} ulp at {clocks[worst]}, {np.count_nonzero(ulps)} of {len(clocks)} differ"
    assert ulps[worst] <= (0 if exact else MOST_ULPS), text
    return text


# -- checks --------------------------------------------------------------------------------------


def check_updates(device: Device, make: Make, dtype: torch.dtype) -> None:
    pair = Pair(device, make, dtype)
    for step in range(4):
        pair.step(step)
    pair.compare()


def check_cycle(device: Device) -> None:
    pair = Pair(device, cyclic)
    for step in range(14):
        pair.step(step)
    pair.compare()


def check_graph(device: Device) -> None:
    """Three steps before the capture, then replays."""
    pair = Pair(device, cyclic)
    pair.gradients(0)
    replay = device.capture(pair.optimizer.step)
    for _ in range(100):
        replay()
    for _ in range(103):
        pair.reference.step()
    pair.compare()
    pair.optimizer.set_schedule(lr=0.0)
    before = [p.detach().clone() for p in pair.model]
    replay()
    assert_same(before, pair.model)
    assert pair.optimizer.sync().updates == 104


def check_skipped_steps(device: Device) -> None:
    pair = Pair(device, cyclic)
    for step, (found_inf, scale) in enumerate([(0.0, 4.0), (1.0, 4.0), (0.0, 2.0), (1.0, 1.0), (0.0, 8.0)]):
        pair.gradients(step, scale)
        pair.optimizer.found_inf = torch.tensor(found_inf, device=device.device)
        pair.optimizer.grad_scale = torch.tensor(scale, device=device.device)
        pair.optimizer.step()
        assert pair.optimizer.last_step_skipped == bool(found_inf)
        if not found_inf:
            pair.reference.grad_scale = torch.tensor(scale)
            pair.reference.step()
            del pair.reference.grad_scale
    pair.compare()


def check_norm(device: Device, dtype: torch.dtype) -> float:
    pair = Pair(device, cyclic, dtype)
    pair.optimizer.measure_grad_norm = pair.reference.measure_grad_norm = True
    for step in range(3):
        pair.step(step)
        ours, theirs = pair.optimizer.last_grad_norm, pair.reference.last_grad_norm
        assert ours == theirs, (ours, theirs)
    pair.compare()
    assert ours is not None
    return ours


def check_side_streams(device: Device) -> None:
    pair = Pair(device, cyclic)
    for step in range(6):
        pair.gradients(step)
        with device.side_stream():
            pair.optimizer.step()
        pair.reference.step()
    pair.compare()


def check_many_tensors(device: Device, count: int) -> None:
    """More than one table of arguments holds."""
    make: Make = lambda model: fastlr.FusedCyclicSGD(model, **CYCLE, momentum=0.9)  # noqa: E731
    model, twin = (parameters([(5,)] * count, device=d) for d in (device.device, torch.device("cpu")))
    optimizer = make(model)
    with device.on_cpu():
        reference = make(twin)
    for step in range(3):
        set_gradients(step, model, twin)
        optimizer.step()
        reference.step()
    assert_same(twin, model)
    assert optimizer.sync() == reference.clock()


def check_same_schedule_later(device: Device) -> None:
    """Its zero is another, for the rate and for the momentum."""
    lr, momentum = fastlr.Triangular(0.01, 0.1, 5), fastlr.Triangular(0.8, 0.95, 4, inverted=True)
    pair = Pair(device, lambda model: fastlr.FusedSGD(model, lr=lr, momentum=momentum))
    for step in range(3):
        pair.step(step)
    for optimizer in (pair.optimizer, pair.reference):
        optimizer.set_schedule(lr=lr)
    for step in range(3, 6):
        pair.step(step)
    for optimizer in (pair.optimizer, pair.reference):
        optimizer.set_schedule(momentum=momentum)
    for step in range(6, 9):
        pair.step(step)
    pair.compare()


def check_checkpoint(device: Device) -> None:
    pair = Pair(device, cyclic)
    for step in range(3):
        pair.step(step)
    file = io.BytesIO()
    torch.save(pair.optimizer.state_dict(), file)
    file.seek(0)
    pair.optimizer = cyclic(pair.model)
    pair.optimizer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    for step in range(3, 8):
        pair.step(step)
    pair.compare()


def main() -> int:
    options = report.arguments(__doc__).parse_args()
    made = report.Report(options.result)
    device = open_device(options.backend)
    small: bool = options.small
    for rule, (kind, cases) in RULES.items():
        for case, keywords in cases.items():
            for dtype in TYPES[:1] if small else TYPES:
                made.check(
                    f"{rule}, {case}, {str(dtype)[6:]}",
                    lambda kind=kind, keywords=keywords, dtype=dtype: check_updates(
                        device, lambda model: kind(model, lr=0.1, **keywords), dtype
                    ),
                )
    for name, (schedule, exact) in SCHEDULES.items():
        made.check(
            f"schedule: {name}",
            lambda schedule=schedule, exact=exact: check_schedule(device, schedule, exact, small),
        )
    made.check("a cycle of rate and momentum", lambda: check_cycle(device))
    made.check("a CUDA graph, replayed 100 times", lambda: check_graph(device))
    made.check("skipped steps", lambda: check_skipped_steps(device))
    for dtype in TYPES[:1] if small else TYPES:
        made.check(f"the gradients' norm, {str(dtype)[6:]}", lambda dtype=dtype: check_norm(device, dtype))
    made.check("steps on side streams", lambda: check_side_streams(device))
    for count in (481,) if small else (481, 4001):
        made.check(f"{count} tensors", lambda count=count: check_many_tensors(device, count))
    made.check("the same schedule from a later clock", lambda: check_same_schedule_later(device))
    made.check("a checkpoint", lambda: check_checkpoint(device))
    return made.finish()


if __name__ == "__main__":
    sys.exit(main())
