"""A few steps of everything on the device, beside the same steps on the CPU: bits compared."""

from __future__ import annotations

import functools
import io
import itertools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from helpers import assert_same, parameters, set_gradients
from rule_table import RULES, Rule

import fastlr
from fastlr import FusedOptimizer, Schedule

from . import report
from .device import Device, open_device

Model = list[torch.nn.Parameter]
Make = Callable[[Model], FusedOptimizer]

TYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
)
HALF_TYPES = (torch.bfloat16, torch.float16)

CYCLE: dict[str, Any] = {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3, "mode": "triangular2"}


def cyclic(model: Model) -> FusedOptimizer:
    return fastlr.FusedCyclicSGD(model, **CYCLE, cycle_momentum=True, weight_decay=1e-3)


def counting(model: Model) -> FusedOptimizer:
    """Of a rule that counts each parameter's updates, with state in three slots."""
    decay = fastlr.Triangular(0.01, 0.1, 4)
    return fastlr.FusedCyclicAdamW(model, **CYCLE, cycle_momentum=True, weight_decay=decay, amsgrad=True)


def clipping(model: Model) -> FusedOptimizer:
    """The norm in a launch of its own, which the next one waits for."""
    return fastlr.FusedAdamW(model, lr=fastlr.Triangular2(0.01, 0.1, 3), max_grad_norm=1.0)


def everything(model: Model) -> FusedOptimizer:
    """Every stage that float32 parameters can have, with a schedule where one may be."""
    return fastlr.FusedAdamW(
        model,
        lr=fastlr.Triangular2(0.01, 0.1, 3),
        max_grad_norm=1.0,
        max_grad_value=0.5,
        ema_decay=fastlr.LinearRamp(0.5, 0.99, 20),
        ema_warmup=True,
        cautious=True,
        weight_decay=0.05,
    )


MAKES: dict[str, Make] = {
    "FusedCyclicSGD": cyclic,
    "FusedCyclicAdamW": counting,
    "FusedAdamW, clipping": clipping,
    "FusedAdamW, all stages": everything,
}
# Of half types.
HALF: dict[str, dict[str, Any]] = {
    "master weights": {"master_weights": True},
    "master weights, all stages": {
        **{"master_weights": True, "max_grad_norm": 1.0, "max_grad_value": 0.5, "ema_decay": 0.9},
        **{"cautious": True, "weight_decay": 0.05},
    },
    "stochastic rounding": {"stochastic_rounding": True, "rounding_seed": 7, "max_grad_norm": 1.0},
}


def cases_of(rule: Rule) -> dict[str, dict[str, Any]]:
    return {**rule.cases, "wide state": {**rule.full, "state_dtype": torch.float32}}


def missing_rules() -> set[str]:
    """The optimizers that neither stand in the table of rules nor are one of those in other words."""
    public = {getattr(fastlr, name) for name in fastlr.optim.__all__}
    fused = {kind for kind in public if isinstance(kind, type) and issubclass(kind, FusedOptimizer)} - {
        FusedOptimizer
    }
    in_table = {rule.fused for rule in RULES.values()}
    return {kind.__name__ for kind in fused if not in_table & set(kind.__mro__)}


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
        # A device takes powers of betas more precisely than the host's library: one in fifty has another last
        # bit, in double precision, which rounding to float32 hides.
        doubles = dtype in (torch.float64, torch.complex128)
        self.close = device.name == "cuda" and doubles and self.optimizer._rule == "adam"

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
        self.assert_same(self.twin, self.model)
        for p, q in zip(self.model, self.twin, strict=True):
            state = self.reference.state.get(q, {})
            self.assert_same(state.values(), [self.optimizer.state[p][name] for name in state])
        assert self.optimizer.sync() == self.reference.clock()
        for ours, theirs in zip(self.optimizer.param_groups, self.reference.param_groups, strict=True):
            different = {key: (ours[key], theirs[key]) for key in theirs if key != "params"}
            different = {key: both for key, both in different.items() if both[0] != both[1]}
            assert not different, different

    def assert_same(self, expected: Iterable[torch.Tensor], actual: Iterable[torch.Tensor]) -> None:
        assert_same(map(as_reals, expected), map(as_reals, actual), self.close)


def as_reals(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


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
# Those that drive each rule's rate.
DRIVING = ("triangular2", "cosine", "table")
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


def check_driven(device: Device, rule: Rule, kind: Schedule, dtype: torch.dtype) -> None:
    """A schedule on every option that can have one: the rate's in samples, the others' in updates."""
    pair = Pair(device, lambda model: rule.make(model, **rule.full), dtype)
    for optimizer in (pair.optimizer, pair.reference):
        optimizer.set_schedule(**{**rule.drives, "lr": kind})
    for step in range(8):
        pair.step(step)
        for optimizer in (pair.optimizer, pair.reference):
            optimizer.advance_samples(29)
    pair.compare()


def check_ages(device: Device, rule: Rule) -> None:
    """Parameters that begin late and miss updates, next to others; a skipped update counts for none."""
    pair = Pair(device, lambda model: rule.make(model, **rule.full))
    for step in range(9):
        pair.gradients(step)
        for place, (p, q) in enumerate(zip(pair.model, pair.twin, strict=True)):
            if step < place % 4 or (step + place) % 5 == 0:
                p.grad = q.grad = None
        if step in (0, 4):
            pair.optimizer.found_inf = torch.ones((), device=device.device)
            pair.optimizer.step()
            del pair.optimizer.found_inf
            assert pair.optimizer.last_step_skipped
            continue
        pair.optimizer.step()
        pair.reference.step()
    pair.compare()
    if rule.counts:
        ages = {float(state["step"]) for state in pair.reference.state.values()}
        assert len(ages) > 2, ages


def check_cycle(device: Device, make: Make, dtype: torch.dtype = torch.float32) -> None:
    pair = Pair(device, make, dtype)
    for step in range(14):
        pair.step(step)
    pair.compare()


def check_graph(device: Device, make: Make, dtype: torch.dtype = torch.float32) -> None:
    """Three steps before the capture, then replays."""
    pair = Pair(device, make, dtype)
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


def check_skipped_steps(device: Device, make: Make) -> None:
    pair = Pair(device, make)
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


def check_norm(device: Device, make: Make, dtype: torch.dtype) -> float:
    pair = Pair(device, make, dtype)
    pair.optimizer.measure_grad_norm = pair.reference.measure_grad_norm = True
    for step in range(3):
        pair.step(step)
        ours, theirs = pair.optimizer.last_grad_norm, pair.reference.last_grad_norm
        assert ours == theirs, (ours, theirs)
    pair.compare()
    assert ours is not None
    return ours


def check_side_streams(device: Device, make: Make) -> None:
    pair = Pair(device, make)
    for step in range(6):
        pair.gradients(step)
        with device.side_stream():
            pair.optimizer.step()
        pair.reference.step()
    pair.compare()


def check_many_tensors(device: Device, make: Make, count: int) -> None:
    """More than one table of arguments holds."""
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


def check_checkpoint(device: Device, make: Make) -> None:
    pair = Pair(device, make)
    for step in range(3):
        pair.step(step)
    file = io.BytesIO()
    torch.save(pair.optimizer.state_dict(), file)
    file.seek(0)
    pair.optimizer = make(pair.model)
    pair.optimizer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    for step in range(3, 8):
        pair.step(step)
    pair.compare()


def main() -> int:
    options = report.arguments(__doc__).parse_args()
    made = report.Report(options.result)
    device = open_device(options.backend)
    small: bool = options.small
    types = TYPES[:1] if small else TYPES

    def check(name: str, function: Callable[..., object], *arguments: Any) -> None:
        made.check(name, lambda: function(device, *arguments))

    def check_all_rules(_: Device) -> None:
        assert not missing_rules(), f"not in the table of rules: {missing_rules()}"

    check("every rule", check_all_rules)
    for name, rule in RULES.items():
        for case, options_of_case in cases_of(rule).items():
            for dtype in types:
                make = functools.partial(rule.make, **options_of_case)
                check(f"{name}, {case}, {str(dtype)[6:]}", check_updates, make, dtype)
        for kind in DRIVING[:1] if small else DRIVING:
            for dtype in types[:3]:
                schedule, _ = SCHEDULES[kind]
                check(f"{name}, driven by {kind}, {str(dtype)[6:]}", check_driven, rule, schedule, dtype)
        check(f"{name}, parameters of several ages", check_ages, rule)
        check(f"{name}, the gradients' norm", check_norm, rule.make, torch.float32)
    for kind, (schedule, exact) in SCHEDULES.items():
        check(f"schedule: {kind}", check_schedule, schedule, exact, small)
    for name, make in MAKES.items():
        check(f"{name}, a cycle of rate and momentum", check_cycle, make)
        check(f"{name}, a CUDA graph, replayed 100 times", check_graph, make)
        check(f"{name}, skipped steps", check_skipped_steps, make)
        check(f"{name}, steps on side streams", check_side_streams, make)
        check(f"{name}, a checkpoint", check_checkpoint, make)
        for count in (481,) if small else (481, 4001):
            check(f"{name}, {count} tensors", check_many_tensors, make, count)
    for dtype in types:
        check(f"the gradients' norm, {str(dtype)[6:]}", check_norm, cyclic, dtype)
    for (name, options_of_case), dtype in itertools.product(HALF.items(), HALF_TYPES):
        if dtype is torch.bfloat16 or "stochastic_rounding" not in options_of_case:
            make = functools.partial(
                fastlr.FusedAdamW, lr=fastlr.Triangular2(0.01, 0.1, 3), **options_of_case
            )
            for function in (check_cycle, check_graph):
                told = "a cycle" if function is check_cycle else "a CUDA graph"
                check(f"{name}, {str(dtype)[6:]}, {told}", function, make, dtype)
    check("the same schedule from a later clock", check_same_schedule_later)
    return made.finish()


if __name__ == "__main__":
    sys.exit(main())
