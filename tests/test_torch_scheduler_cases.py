"""The schedulers that PyTorch's tests of them make, with its two groups, moved over at several positions.

Each case has the groups, the arguments and the number of epochs of one of PyTorch's tests of learning-rate
schedulers. What is expected is what torch's own pair does that simply goes on. Where there is a schedule that
one would write by hand, it says the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch.optim import lr_scheduler as S
from torch.optim import swa_utils

import fastlr
from fastlr import Constant, Cosine, LinearRamp, MultiStep, OneCycle, Schedule, StepDecay

pytestmark = [
    # Copies do not know that their optimizer was stepped; and deprecated arguments, which are what is tested.
    pytest.mark.filterwarnings("ignore:Seems like `optimizer.step:UserWarning"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning"),
    pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning"),
]

Optimizer = torch.optim.Optimizer
Make = Callable[[Optimizer], Any]
Ours = Callable[[float], Schedule]

# Of the peak, where a rate is a tensor of float32 that torch multiplies from epoch to epoch.
OF_TENSORS = 3e-6


def two_groups() -> Optimizer:
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    return torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": torch.tensor(0.5)}], lr=0.05)


def two_of_adam() -> Optimizer:
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    return torch.optim.Adam([{"params": [a]}, {"params": [b], "lr": 0.5}], lr=0.05)


def two_rates(first: float, second: float) -> Callable[[], Optimizer]:
    def make() -> Optimizer:
        optimizer = two_groups()
        for group, rate in zip(optimizer.param_groups, (first, second), strict=True):
            group["lr"] = rate
        return optimizer

    return make


def one_of_a_tensor(rate: float) -> Callable[[], Optimizer]:
    return lambda: torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=torch.tensor(rate))


def resumed(make: Callable[[], Optimizer], initial: float) -> Callable[[], Optimizer]:
    """With what a scheduler needs that is made with a ``last_epoch``."""

    def made() -> Optimizer:
        optimizer = make()
        for group in optimizer.param_groups:
            group["initial_lr"] = initial
        return optimizer

    return made


class Case(NamedTuple):
    """A scheduler of torch's, or several that are stepped in turn.

    Attributes:
        makes: them.
        epochs: that PyTorch's test runs.
        ours: the schedule that one would write, of a group's first rate.
        tolerance: of the peak, where rates are floats.
        optimizer: makes it.
        first: its tick before the first step.
    """

    makes: Make | tuple[Make, ...]
    epochs: int = 10
    ours: Ours | None = None
    tolerance: float = 1e-12
    optimizer: Callable[[], Optimizer] = two_groups
    first: int = 0


def sequence(*makes: Make, milestones: list[int]) -> Make:
    return lambda o: S.SequentialLR(o, [make(o) for make in makes], milestones)


def chain(*makes: Make) -> Make:
    return lambda o: S.ChainedScheduler([make(o) for make in makes])


def exponential(gamma: float) -> Make:
    return lambda o: S.ExponentialLR(o, gamma)


def step(size: int, gamma: float = 0.1) -> Make:
    return lambda o: S.StepLR(o, step_size=size, gamma=gamma)


def multi_step(*milestones: int) -> Make:
    return lambda o: S.MultiStepLR(o, list(milestones), gamma=0.1)


def constant(factor: float, ticks: int = 5) -> Make:
    return lambda o: S.ConstantLR(o, factor, ticks)


def linear(start: float, ticks: int, end: float = 1.0) -> Make:
    return lambda o: S.LinearLR(o, start, end, ticks)


def cosine(ticks: int, low: float = 1e-10) -> Make:
    return lambda o: S.CosineAnnealingLR(o, ticks, low)


def restarts(first: int, mult: int, low: float = 1e-10) -> Make:
    return lambda o: S.CosineAnnealingWarmRestarts(o, first, mult, low)


def cyclic(*sizes: int, base: Any = 0.1, top: Any = 0.5, **others: Any) -> Make:
    """Torch's tests go from 1 to 5, of the momentum too, which has to be below 1 here: all is a tenth."""
    others.setdefault("cycle_momentum", True)
    if others["cycle_momentum"]:
        others |= {"base_momentum": base, "max_momentum": top}
    return lambda o: S.CyclicLR(o, base, top, *sizes, **others)


def one_cycle(**others: Any) -> Make:
    """As well with a tenth of the momentum, and less."""
    how = {"max_lr": 25, "total_steps": 10, "final_div_factor": 2, "base_momentum": 0.04, **others}
    return lambda o: S.OneCycleLR(o, max_momentum=0.88, **how)


def with_old_file(o: Optimizer) -> Any:
    """OneCycleLR as it comes out of a file of PyTorch before 2.1."""
    scheduler = one_cycle()(o)
    del scheduler._anneal_func_type
    state = scheduler.state_dict()
    state["anneal_func"] = S.OneCycleLR._annealing_cos
    scheduler.load_state_dict(state)
    return scheduler


def to_constant(first: Schedule, ticks: int, then: float) -> Schedule:
    return first.then(Constant(then), at=ticks)


def three_in_sequence(lr: float) -> Schedule:
    exponential_part = fastlr.Exponential(lr, 0.8)
    return Constant(0.1 * lr).then(exponential_part, at=3).then(StepDecay(lr, 2, 0.1), at=6)


def written_cyclic(kind: Any, *sizes: int, **others: Any) -> Ours:
    return lambda lr: kind(0.1, 0.5, *sizes, **others)


def written_one_cycle(anneal_strategy: Any = "cos") -> Ours:
    return lambda lr: OneCycle(25, 10, anneal_strategy=anneal_strategy, final_div_factor=2)


TENTHS = [i / 10 for i in range(1, 10)]
CASES: dict[str, Case] = {
    "step": Case(step(3), ours=lambda lr: StepDecay(lr, 3, 0.1)),
    "step, closed form": Case(step(3), 20, lambda lr: StepDecay(lr, 3, 0.1)),
    "step, resumed": Case(
        lambda o: S.StepLR(o, 3, 0.1, last_epoch=10), 35, None, 1e-12, resumed(two_groups, 0.01), 11
    ),
    "multi-step": Case(multi_step(2, 5, 9), ours=lambda lr: MultiStep(lr, [2, 5, 9], 0.1)),
    "multi-step, closed form": Case(multi_step(2, 5, 9), 20, lambda lr: MultiStep(lr, [2, 5, 9], 0.1)),
    "constant": Case(constant(0.5), ours=lambda lr: to_constant(Constant(lr / 2), 5, lr)),
    "constant, closed form": Case(
        constant(1 / 3, 4), 20, lambda lr: to_constant(Constant(lr * (1 / 3)), 4, lr)
    ),
    "linear": Case(linear(0.5, 4), ours=lambda lr: to_constant(LinearRamp(lr / 2, lr, 4), 4, lr)),
    "linear to less": Case(
        linear(0.25, 4, 0.6), ours=lambda lr: to_constant(LinearRamp(lr / 4, lr * 0.6, 4), 4, lr * 0.6)
    ),
    "linear, closed form": Case(
        linear(1 / 3, 4, 0.7),
        20,
        lambda lr: to_constant(LinearRamp(lr * (1 / 3), lr * 0.7, 4), 4, lr * 0.7),
    ),
    "exponential": Case(exponential(0.9), ours=lambda lr: fastlr.Exponential(lr, 0.9)),
    "exponential, closed form": Case(exponential(0.9), 20, lambda lr: fastlr.Exponential(lr, 0.9)),
    "polynomial": Case(
        lambda o: S.PolynomialLR(o, 5, 0.9),
        ours=lambda lr: to_constant(fastlr.Polynomial(lr, 0, 5, 0.9), 5, 0),
    ),
    "polynomial, closed form": Case(
        lambda o: S.PolynomialLR(o, power=0.9),
        20,
        lambda lr: to_constant(fastlr.Polynomial(lr, 0, 5, 0.9), 5, 0),
    ),
    "cosine": Case(cosine(10), 10, lambda lr: Cosine(lr, 1e-10, 10), 1e-11),
    "cosine, closed form": Case(
        cosine(5),
        20,
        lambda lr: fastlr.Triangular(1e-10, lr, 5, interpolation="sinusoidal", inverted=True),
        1e-11,
    ),
    "cosine to more": Case(cosine(5, 0.1), 10, None, 1e-11),
    # as when a run was continued after its first epoch
    "cosine, resumed": Case(
        lambda o: S.CosineAnnealingLR(o, 5, 0.1, last_epoch=0), 10, None, 1e-11, resumed(two_groups, 0.05), 1
    ),
    "sequence of two": Case(
        sequence(exponential(0.8), step(4), milestones=[3]),
        19,
        lambda lr: fastlr.Exponential(lr, 0.8).then(StepDecay(lr, 4, 0.1), at=3),
    ),
    "sequence of a constant": Case(
        sequence(constant(0.1, 3), exponential(0.9), milestones=[3]),
        13,
        lambda lr: Constant(0.1 * lr).then(fastlr.Exponential(lr, 0.9), at=3),
    ),
    "sequence of three": Case(
        sequence(constant(0.1, 3), exponential(0.8), step(2), milestones=[3, 6]), 12, three_in_sequence
    ),
    "sequence of constants": Case(
        sequence(constant(1.0), constant(0.1), milestones=[10]),
        12,
        lambda lr: Constant(lr).then(Constant(0.1 * lr), at=10),
    ),
    "sequence of a chain": Case(
        sequence(chain(linear(0.1, 5), constant(0.1)), constant(0.5), milestones=[5]), 10
    ),
    "sequence of a ramp and a decay": Case(
        sequence(linear(0.5, 5, 0.1), exponential(0.9), milestones=[5]),
        10,
        lambda lr: LinearRamp(lr / 2, 0.1 * lr, 5).then(fastlr.Exponential(lr, 0.9), at=5),
    ),
    "sequence of ramps": Case(
        sequence(linear(0.1, 4, 0.8), linear(0.8, 4, 0.1), milestones=[4]),
        8,
        lambda lr: LinearRamp(0.1 * lr, 0.8 * lr, 4).then(LinearRamp(0.8 * lr, 0.1 * lr, 4), at=4),
        1e-12,
        one_of_a_tensor(2.0),
    ),
    "chain of one": Case(chain(step(3)), ours=lambda lr: StepDecay(lr, 3, 0.1)),
    "chain of a ramp": Case(
        chain(linear(0.4, 3)), ours=lambda lr: to_constant(LinearRamp(0.4 * lr, lr, 3), 3, lr)
    ),
    "chain of two": Case(
        chain(linear(0.4, 3), multi_step(4, 8, 10)),
        10,
        lambda lr: LinearRamp(0.4 * lr, lr, 3).then(MultiStep(lr, [1, 5, 7], 0.1), at=3),
    ),
    "chain of three": Case(chain(exponential(0.9), constant(0.2, 4), step(3)), 9),
    "chain of a polynomial": Case(chain(lambda o: S.PolynomialLR(o, 5, 0.9), constant(0.1))),
    # Several of one optimizer, each stepped by the loop.
    "step and multi-step": Case((step(3), multi_step(2, 5, 9))),
    "step and exponential": Case((step(3), exponential(0.9))),
    "multi-step and exponential": Case((multi_step(2, 5, 9), exponential(0.9))),
    "linear and exponential": Case((linear(0.4, 4, 0.9), exponential(0.9))),
    "step and constant": Case((step(3), constant(0.4, 4))),
    "multi-step and linear": Case((multi_step(2, 5, 9), linear(0.4, 4))),
    "cosine and step": Case((cosine(10), step(3)), tolerance=1e-11),
    "cosine and multi-step": Case((cosine(10), multi_step(2, 5, 9)), tolerance=1e-11),
    "linear and cosine": Case((linear(0.4, 4), cosine(10)), tolerance=1e-11),
    "cosine and exponential": Case((cosine(10), exponential(0.1)), tolerance=1e-11),
    # CyclicLR
    "triangular": Case(cyclic(4), 11, written_cyclic(fastlr.Triangular, 4), 0),
    "triangular, the rate alone": Case(
        cyclic(4, cycle_momentum=False), 11, written_cyclic(fastlr.Triangular, 4), 0
    ),
    "triangular2": Case(cyclic(4, mode="triangular2"), 22, written_cyclic(fastlr.Triangular2, 4), 0),
    "exp_range": Case(
        cyclic(4, mode="exp_range", gamma=0.9), 13, written_cyclic(fastlr.ExpRange, 4, gamma=0.9), 0
    ),
    "triangular by groups": Case(cyclic(4, base=[0.1, 0.2], top=[0.5, 0.6]), 11, tolerance=0),
    "triangular2 by groups": Case(
        cyclic(4, base=[0.1, 0.3], top=[0.5, 0.7], mode="triangular2"), 22, tolerance=0
    ),
    "exp_range by groups": Case(
        cyclic(4, base=[0.1, 0.5], top=[0.5, 0.9], mode="exp_range", gamma=0.9), 13, tolerance=0
    ),
    "triangular with a slow way down": Case(cyclic(4, 6), 11, written_cyclic(fastlr.Triangular, 4, 6), 0),
    "triangular2 with a slow way down": Case(
        cyclic(2, 6, base=[0.1, 0.3], top=[0.5, 0.7], mode="triangular2"), 24, tolerance=0
    ),
    "exp_range with a slow way down": Case(
        cyclic(2, 6, mode="exp_range", gamma=0.9), 13, written_cyclic(fastlr.ExpRange, 2, 6, gamma=0.9), 0
    ),
    "triangular with Adam": Case(
        cyclic(4, cycle_momentum=False), 11, written_cyclic(fastlr.Triangular, 4), 0, two_of_adam
    ),
    "triangular with Adam's beta1": Case(lambda o: S.CyclicLR(o, 1, 5), 20, None, 0, two_of_adam),
    "a function that scales cycles": Case(
        lambda o: S.CyclicLR(o, 1, 5, 4, cycle_momentum=False, scale_fn=lambda cycle: 0.5), 20, None, 0
    ),
    "a function that scales ticks": Case(
        lambda o: S.CyclicLR(
            o, 0.1, 0.5, 4, scale_fn=lambda tick: 0.9**tick, scale_mode="iterations", cycle_momentum=False
        ),
        20,
        written_cyclic(fastlr.ExpRange, 4, gamma=0.9),
        0,
    ),
    # OneCycleLR
    "one cycle, linear": Case(
        one_cycle(anneal_strategy="linear"), 10, written_one_cycle(anneal_strategy="linear"), 1e-15
    ),
    "one cycle, linear, in three phases": Case(
        one_cycle(anneal_strategy="linear", pct_start=0.4, final_div_factor=4, three_phase=True),
        10,
        lambda lr: OneCycle(25, 10, 0.4, "linear", 25, 4, three_phase=True),
        1e-15,
    ),
    "one cycle": Case(one_cycle(), 10, written_one_cycle(), 1e-15),
    "one cycle of an old file": Case(with_old_file, 10, written_one_cycle(), 1e-15),
    "one cycle with Adam": Case(one_cycle(anneal_strategy="linear"), 10, None, 1e-15, two_of_adam),
    # functions
    "lambda": Case(
        lambda o: S.LambdaLR(o, [lambda tick: 0.9**tick, lambda tick: 0.8**tick]),
        10,
        lambda lr: fastlr.Tabulated([lr * 0.9**tick for tick in range(10)]),
        0,
        two_rates(0.05, 0.4),
    ),
    "multiplicative": Case(
        lambda o: S.MultiplicativeLR(o, [lambda tick: 0.9, lambda tick: 0.8]),
        10,
        lambda lr: fastlr.Exponential(lr, 0.9),
        1e-12,
        two_rates(0.05, 0.4),
    ),
    "lambda of tens": Case(lambda o: S.LambdaLR(o, lambda tick: tick // 10), 25, None, 0),
    # At the edge of what torch takes, beside its tests.
    "linear of no length": Case(linear(0.3, 0), ours=lambda lr: Constant(lr * 0.3)),
    "polynomial of no length": Case(lambda o: S.PolynomialLR(o, 0), ours=Constant),
    "milestones at zero and before": Case(
        multi_step(0, 0, -1, 3), ours=lambda lr: MultiStep(lr, [0, 0, 3], 0.1)
    ),
    "milestones before zero": Case(multi_step(-5, -1), ours=Constant),
    "exponential that grows": Case(exponential(1.3), ours=lambda lr: fastlr.Exponential(lr, 1.3)),
    "exponential that ends at once": Case(exponential(0.0)),
    "steps of a negative length": Case(step(-3)),
    "cosine of a negative length": Case(cosine(-5), tolerance=1e-11),
    "cosine of one tick": Case(cosine(1, 0.0), tolerance=1e-11),
    "sequence that begins with its second": Case(
        sequence(constant(0.5), step(3), milestones=[0]), ours=lambda lr: StepDecay(lr, 3, 0.1)
    ),
    "sequence with a part of no length": Case(
        sequence(constant(0.5), step(3), exponential(0.9), milestones=[4, 4]),
        ours=lambda lr: Constant(lr / 2).then(fastlr.Exponential(lr, 0.9), at=4),
    ),
    "cycles of half a tick": Case(
        lambda o: S.CyclicLR(o, 0.01, 0.1, 0.5, 0.25, cycle_momentum=False), tolerance=0
    ),
    # CosineAnnealingWarmRestarts
    **{
        f"restarts, {mult}-fold": Case(
            restarts(10, mult),
            100,
            lambda lr, mult=mult: fastlr.CosineWarmRestarts(lr, 1e-10, 10, mult),
            1e-15,
        )
        for mult in (1, 2, 4)
    },
}


def values(optimizer: Optimizer) -> list[dict[str, float]]:
    """What schedulers drive, of each group."""
    return [
        {
            "lr": float(group["lr"]),
            "momentum": float(group["betas"][0] if "betas" in group else group["momentum"]),
        }
        for group in optimizer.param_groups
    ]


class Running:
    """A case as torch runs it: the optimizer steps, and then each scheduler."""

    def __init__(self, case: Case) -> None:
        self.optimizer = case.optimizer()
        makes = case.makes if isinstance(case.makes, tuple) else (case.makes,)
        self.schedulers = [make(self.optimizer) for make in makes]

    def step(self, ticks: int) -> None:
        for _ in range(ticks):
            self.optimizer.step()
            for scheduler in self.schedulers:
                scheduler.step()

    def fused(self, updates_per_tick: int, horizon: int) -> fastlr.FusedOptimizer:
        one = self.schedulers[0]
        if len(self.schedulers) > 1:
            one = S.ChainedScheduler(self.schedulers, self.optimizer)
        return fastlr.fuse(self.optimizer, one, updates_per_tick=updates_per_tick, horizon=horizon)


def seen(case: Case) -> list[list[dict[str, float]]]:
    """What torch does, epoch for epoch."""
    running = Running(case)
    rows = [values(running.optimizer)]
    for _ in range(case.epochs - 1):
        running.step(1)
        rows.append(values(running.optimizer))
    return rows


def keeps_initial_rates() -> bool:
    optimizer = one_of_a_tensor(1.0)()
    sequence(exponential(0.5), exponential(0.5), milestones=[1])(optimizer)
    return optimizer.param_groups[0]["initial_lr"] is not optimizer.param_groups[0]["lr"]


# PyTorch 2.6's sequences put a tensor's initial rate itself where their parts write, and go back to what is
# left there; and they begin with the first part even where the second stands at 0.
GONE_BACK_TO = ("of two", "of three", "of a chain", "of a ramp and a decay", "of ramps")
OLD_SEQUENCES = () if keeps_initial_rates() else tuple(f"sequence {what}" for what in GONE_BACK_TO)
OLD_WRITTEN = ("sequence of ramps", "sequence that begins with its second") if OLD_SEQUENCES else ()


@pytest.mark.parametrize("name", CASES)
def test_cases_go_on_from_several_epochs(name: str) -> None:
    if name in OLD_SEQUENCES:
        pytest.skip("this PyTorch writes over a tensor's initial rate")
    case = CASES[name]
    expected = seen(case)
    peak = max(row["lr"] for rows in expected for row in rows)
    tensors = [isinstance(group["lr"], torch.Tensor) for group in case.optimizer().param_groups]
    for now, updates in ((0, 1), (1, 1), (case.epochs // 2, 3), (case.epochs - 2, 1)):
        running = Running(case)
        running.step(now)
        left = values(running.optimizer)
        end = case.first + case.epochs
        fused = running.fused(updates, updates * end)
        assert values(running.optimizer) == left
        assert fused.clock().updates == updates * (case.first + now)
        for tick in range(now, case.epochs):
            for ours, theirs, tensor in zip(values(fused), expected[tick], tensors, strict=True):
                near = OF_TENSORS if tensor else case.tolerance
                assert abs(ours["lr"] - theirs["lr"]) <= near * peak, (now, tick)
                assert ours["momentum"] == pytest.approx(theirs["momentum"], abs=1e-15), (now, tick)
            for _ in range(updates):
                fused.step()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.ours is not None])
def test_what_one_would_write_says_the_same(name: str) -> None:
    if name in OLD_WRITTEN:
        pytest.skip("this PyTorch's sequence goes another way")
    case = CASES[name]
    expected = [row[0]["lr"] for row in seen(case)]
    assert case.ours is not None
    written = case.ours(float(case.optimizer().param_groups[0]["lr"])).values(0, case.epochs)
    tensor = isinstance(case.optimizer().param_groups[0]["lr"], torch.Tensor)
    tolerance = OF_TENSORS if tensor else max(case.tolerance, 1e-15)
    assert abs(written - expected).max() <= tolerance * max(expected)


# -- epochs that are told to the scheduler -----------------------------------------------------------------


def told(make: Make, epochs: list[float]) -> tuple[Optimizer, Any]:
    optimizer = two_groups()
    scheduler = make(optimizer)
    for epoch in epochs:
        optimizer.step()
        scheduler.step(epoch)
    return optimizer, scheduler


def check_goes_on(optimizer: Optimizer, scheduler: Any, ticks: int, horizon: int | None = None) -> None:
    went_on, other = copy.deepcopy((optimizer, scheduler))
    fused = fastlr.fuse(optimizer, scheduler, updates_per_tick=1, horizon=horizon)
    assert fused.clock().updates == other.last_epoch
    for tick in range(ticks):
        peak = max(float(group["initial_lr"]) for group in went_on.param_groups)
        for ours, theirs in zip(values(fused), values(went_on), strict=True):
            assert abs(ours["lr"] - theirs["lr"]) <= OF_TENSORS * peak, tick
        went_on.step()
        other.step()
        fused.step()


@pytest.mark.parametrize(
    "make",
    [step(2), exponential(0.9), constant(1 / 3), linear(1 / 3, 5), lambda o: S.PolynomialLR(o, power=0.9)],
    ids=["step", "exponential", "constant", "linear", "polynomial"],
)
def test_an_epoch_that_is_told_over_and_over(make: Make) -> None:
    check_goes_on(*told(make, [2.0] * 10), 8)
    check_goes_on(*told(make, [0, 1, 2, 3, 4]), 8)
    check_goes_on(*told(make, [7, 3, 0]), 8)


def test_an_epoch_before_the_first_is_refused() -> None:
    for make in (
        step(3),
        linear(0.5, 4),
        cosine(10),
        lambda o: S.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    ):
        for epoch in (-1, -2):
            optimizer, scheduler = told(make, [epoch])
            with pytest.raises(
                ValueError, match=f"stands at {epoch}, before its first tick.* scheduler.step"
            ):
                fastlr.fuse(optimizer, scheduler, updates_per_tick=1, horizon=20)


def test_restarts_that_are_told_epochs() -> None:
    for mult, epochs in (
        (1, [0, 1, 2, 3, 4, 5, 12, 27, 3, 4, 5, 6, 13]),
        (2, [0, 1, 2, 3, 4, 5, 25, 32, 33, 34, 80, 81, 3]),
    ):
        for done in range(1, len(epochs) + 1):
            check_goes_on(*told(restarts(10, mult), [*map(float, epochs[:done])]), 8)
    for epochs in ([0, 0.1], [0, 0.1, 1.3], [17.5], [*TENTHS], [0, 30.5]):
        with pytest.raises(ValueError, match="was called with a part of an epoch"):
            fastlr.fuse(*told(restarts(10, 3), epochs), updates_per_tick=1)
    check_goes_on(*told(restarts(10, 3), [0.1, 0.3, 31.5, 50]), 8)  # it is whole again


def test_restarts_whose_place_somebody_has_written() -> None:
    optimizer = two_groups()
    scheduler = restarts(4, 1)(optimizer)
    for place in (7, 8, 9):
        scheduler.T_cur = place
        optimizer.step()
        scheduler.step()
        with pytest.raises(ValueError, match="horizon must be given with CosineAnnealingWarmRestarts"):
            fastlr.fuse(optimizer, scheduler, updates_per_tick=1)
    check_goes_on(optimizer, scheduler, 15, horizon=20)


def test_a_cosine_that_a_cycle_follows() -> None:
    """Two schedulers of one optimizer, of which the loop steps now the one, now the other."""
    for position in (0, 7, 19, 22, 25, 38):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.5)
        first = S.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.1)
        second = S.CyclicLR(optimizer, 0.1, 0.3, step_size_up=1, step_size_down=3)
        for epoch in range(position):
            optimizer.step()
            (first if epoch <= 20 else second).step()
        check_goes_on(optimizer, first if position <= 20 else second, 21 - position if position <= 20 else 15)


# -- tensors of the caller's -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        step(30),
        multi_step(30, 80),
        constant(1 / 3),
        exponential(0.9),
        cosine(10, 0.0),
        restarts(20, 1, 0.0),
        lambda o: S.LambdaLR(o, lambda tick: tick // 10),
        lambda o: S.MultiplicativeLR(o, lambda tick: 0.95),
        lambda o: S.CyclicLR(o, o.param_groups[0]["lr"], torch.tensor(0.2), base_momentum=torch.tensor(0.8)),
        lambda o: S.OneCycleLR(o, o.param_groups[0]["lr"], 40, max_momentum=torch.tensor(0.95)),
    ],
    ids=[
        *("step", "multi-step", "constant", "exponential", "cosine", "restarts", "lambda"),
        *("multiplicative", "cyclic", "one-cycle"),
    ],
)
def test_a_tensor_of_the_callers_is_not_the_fused_optimizers(make: Make) -> None:
    rate = torch.tensor(0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=rate)
    scheduler = make(optimizer)
    optimizer.step()
    scheduler.step()
    fused = fastlr.fuse(optimizer, scheduler, updates_per_tick=1, horizon=30)
    before = values(fused)
    there = copy.deepcopy(fused)
    rate.mul_(0.1)
    assert values(fused) == before
    fused.step()
    there.step()
    assert values(fused) == values(there)


# -- checkpoints -------------------------------------------------------------------------------------------

# What a file does not say all of is made by a function.
FILES: dict[str, tuple[Make, bool]] = {
    "lambda": (lambda o: S.LambdaLR(o, lambda tick: tick // 10), True),
    "multiplicative": (lambda o: S.MultiplicativeLR(o, lambda tick: 0.95), True),
    "step": (step(30), False),
    "multi-step": (multi_step(30, 80), False),
    "constant": (S.ConstantLR, False),
    "linear": (S.LinearLR, False),
    "exponential": (exponential(0.9), False),
    "polynomial": (S.PolynomialLR, False),
    "cosine": (cosine(10), False),
    "chain": (chain(S.ConstantLR, S.ConstantLR), True),
    "sequence": (sequence(S.ConstantLR, S.ConstantLR, milestones=[2]), True),
    "cyclic": (lambda o: S.CyclicLR(o, 0.01, 0.1, mode="triangular2"), False),
    "one-cycle": (lambda o: S.OneCycleLR(o, 0.01, 10, anneal_strategy="linear"), False),
    "one-cycle of an old version": (with_old_file, False),
    "restarts": (restarts(20, 1), False),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_the_schedulers_are_loaded(name: str) -> None:
    make, needs_function = FILES[name]
    optimizer = two_groups()
    scheduler = make(optimizer)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    loaded = fastlr.FusedSGD([{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(2)], lr=0.3)
    loaded.load_torch(
        optimizer.state_dict(),
        scheduler.state_dict(),
        scheduler=make if needs_function else type(scheduler),
        updates_per_tick=1,
        horizon=20,
    )
    for _ in range(7):
        for ours, theirs in zip(values(loaded), values(optimizer), strict=True):
            assert ours == pytest.approx(theirs, rel=OF_TENSORS, abs=1e-15)
        optimizer.step()
        scheduler.step()
        loaded.step()


@pytest.mark.parametrize(
    "name", [name for name in FILES if "old" not in name and name not in ("chain", "sequence")]
)
def test_a_scheduler_that_is_made_anew_for_a_loaded_optimizer(name: str) -> None:
    """With ``last_epoch=0``, after the first epoch."""
    make, _ = FILES[name]
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    scheduler = make(optimizer)
    optimizer.step()
    scheduler.step()
    anew = torch.optim.AdamW([parameter])
    anew.load_state_dict(optimizer.state_dict())
    known = {
        "step": lambda o: S.StepLR(o, 30, last_epoch=0),
        "multi-step": lambda o: S.MultiStepLR(o, [30, 80], last_epoch=0),
        "constant": lambda o: S.ConstantLR(o, last_epoch=0),
        "linear": lambda o: S.LinearLR(o, last_epoch=0),
        "exponential": lambda o: S.ExponentialLR(o, 0.9, last_epoch=0),
        "polynomial": lambda o: S.PolynomialLR(o, last_epoch=0),
        "cosine": lambda o: S.CosineAnnealingLR(o, 10, 1e-10, last_epoch=0),
        "restarts": lambda o: S.CosineAnnealingWarmRestarts(o, 20, 1, 1e-10, last_epoch=0),
        "cyclic": lambda o: S.CyclicLR(o, 0.01, 0.1, mode="triangular2", last_epoch=0),
        "one-cycle": lambda o: S.OneCycleLR(o, 0.01, 10, anneal_strategy="linear", last_epoch=0),
        "lambda": lambda o: S.LambdaLR(o, lambda tick: tick // 10, last_epoch=0),
        "multiplicative": lambda o: S.MultiplicativeLR(o, lambda tick: 0.95, last_epoch=0),
    }
    check_goes_on(anew, known[name](anew), 8, horizon=12)


# -- what follows a metric, and what is refused ------------------------------------------------------------

PLATEAUS: dict[str, tuple[dict[str, Any], list[float], tuple[Make, Ours] | None]] = {
    "in absolute terms": (
        {"threshold_mode": "abs", "threshold": 0.01, "patience": 5, "cooldown": 5},
        [10 - i * 0.0167 for i in range(20)],
        None,
    ),
    "too slow": (
        {"patience": 5, "threshold_mode": "abs", "threshold": 0.1},
        [10 - i * 0.0165 for i in range(22)],
        None,
    ),
    "upwards": (
        {"mode": "max", "patience": 5, "cooldown": 5, "threshold_mode": "abs"},
        [-0.8] * 2 + [-0.234] * 20,
        None,
    ),
    "upwards, fast": (
        {"mode": "max", "patience": 3, "threshold": 0.1},
        [1.5 * 1.025**i for i in range(20)],
        None,
    ),
    "upwards, too slow": (
        {"mode": "max", "patience": 5, "cooldown": 5, "threshold": 0.1},
        [1.5 * 1.005**i for i in range(20)],
        None,
    ),
    "fast": ({"threshold": 0.1}, [1.5 * 0.85**i for i in range(20)], None),
    "one fall": ({"threshold": 0.1, "patience": 5, "cooldown": 5}, [1] * 7 + [0.6] + [0.5] * 12, None),
    "least rates": (
        {"mode": "max", "min_lr": [0.4, 0.3], "threshold": 0.1, "patience": 5, "cooldown": 5},
        [1.5 * 1.005**i for i in range(20)],
        None,
    ),
    "and steps": (
        {"threshold_mode": "abs", "threshold": 0.01, "patience": 5, "cooldown": 5},
        [10 - i * 0.0167 for i in range(10)],
        (step(3), lambda lr: StepDecay(lr, 3, 0.1)),
    ),
    "and milestones": (
        {"threshold_mode": "abs", "threshold": 0.1, "patience": 5},
        [10 - i * 0.0165 for i in range(22)],
        (multi_step(3, 8, 12), lambda lr: MultiStep(lr, [3, 8, 12], 0.1)),
    ),
    "and an exponential": (
        {"mode": "max", "patience": 5, "cooldown": 5, "threshold_mode": "abs"},
        [-0.8] * 2 + [-0.234] * 20,
        (exponential(0.1), lambda lr: fastlr.Exponential(lr, 0.1)),
    ),
    "and a cosine": (
        {"mode": "max", "patience": 3, "threshold": 0.1},
        [1.5 * 1.025**i for i in range(10)],
        (cosine(10), lambda lr: Cosine(lr, 1e-10, 10)),
    ),
    "and a ramp": (
        {"threshold_mode": "abs", "threshold": 0.1, "patience": 5},
        [10 - i * 0.0165 for i in range(22)],
        (linear(0.4, 4), lambda lr: to_constant(LinearRamp(0.4 * lr, lr, 4), 4, lr)),
    ),
}


@pytest.mark.parametrize("name", PLATEAUS)
def test_what_a_metric_reduces(name: str) -> None:
    """Torch's scheduler of metrics beside ``scale_lr()`` where that one has reduced the rate."""
    arguments, metrics, beside = PLATEAUS[name]
    optimizer = two_rates(0.5, 0.5)()
    plateau = S.ReduceLROnPlateau(optimizer, **arguments)
    schedulers = [] if beside is None else [beside[0](optimizer)]
    with pytest.raises(ValueError, match="ReduceLROnPlateau follows a metric"):
        fastlr.fuse(optimizer, plateau, updates_per_tick=1)
    rate = 0.5 if beside is None else beside[1](0.5)
    fused = fastlr.FusedSGD([{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(2)], lr=rate)
    for metric in metrics:
        optimizer.step()
        fused.step()
        for scheduler in schedulers:
            scheduler.step()
        before = [row["lr"] for row in values(optimizer)]
        plateau.step(metric)
        for place, (old, row) in enumerate(zip(before, values(optimizer), strict=True)):
            if row["lr"] != old:
                fused.scale_lr(row["lr"] / old, group=place)
        for ours, theirs in zip(values(fused), values(optimizer), strict=True):
            assert ours["lr"] == pytest.approx(theirs["lr"], rel=1e-11, abs=1e-20)


def test_a_momentum_that_grows_without_bound_is_refused() -> None:
    """As torch's tests cycle it, from 1 to 5 and from 1 to 22."""
    for make in (
        lambda o: S.CyclicLR(o, 1, 5, 4, base_momentum=1, max_momentum=5),
        lambda o: S.OneCycleLR(o, 25, total_steps=10, base_momentum=1, max_momentum=22),
    ):
        for optimizer in (two_groups(), two_of_adam()):
            scheduler = make(optimizer)
            before = copy.deepcopy(scheduler.state_dict())
            with pytest.raises(ValueError, match=r"(momentum|beta1) of .*parameter group 0 must .* 1"):
                fastlr.fuse(optimizer, scheduler, updates_per_tick=1)
            assert scheduler.state_dict() == before
            optimizer.step()
            scheduler.step()


def test_averaging_rates_are_refused() -> None:
    for how in (
        {"anneal_epochs": 1},
        {"anneal_epochs": 5},
        {"anneal_epochs": 4, "anneal_strategy": "linear"},
    ):
        optimizer = two_groups()
        with pytest.raises(ValueError, match="SWALR leaves its rate to another"):
            fastlr.fuse(optimizer, swa_utils.SWALR(optimizer, swa_lr=0.01, **how), updates_per_tick=1)
