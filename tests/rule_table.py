"""The update rules that tests run over: one entry each, beside what it is compared with."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import reference
import torch
from helpers import assert_same
from torch.utils._python_dispatch import TorchDispatchMode

import fastlr


class Rule(NamedTuple):
    """A rule.

    Attributes:
        fused: its optimizer here.
        torch: the one that it equals, with torch's constructor.
        oracle: one update in float64 NumPy, see ``reference.py``.
        lr: a rate at which a few dozen updates move parameters of size 1 noticeably.
        full: options with which all of its state is live, and weight decay.
        cases: option combinations by name.
        drives: for each option that a schedule can drive, one that does.
        counts: whether there is a ``step`` in its state.
    """

    fused: type[fastlr.FusedOptimizer]
    torch: type[torch.optim.Optimizer]
    oracle: Callable[..., Any]
    lr: float
    full: dict[str, Any]
    cases: dict[str, dict[str, Any]]
    drives: dict[str, fastlr.Schedule]
    counts: bool = True

    def make(self, model: Iterable[Any], **options: Any) -> Any:
        return self.fused(model, **{"lr": self.lr, **options})

    def make_torch(self, model: Iterable[Any], **options: Any) -> torch.optim.Optimizer:
        """What :meth:`make` is compared with; its step takes roots that are rounded correctly."""
        return taking_exact_roots(self.torch(model, **{"lr": self.lr, "foreach": False, **options}))


class Lion(torch.optim.Optimizer):
    """PyTorch has none: the authors' algorithm 2 in its words, but that the sign of a NaN is one.

    https://github.com/google/automl/blob/master/lion/lion_pytorch.py
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, {**defaults, "foreach": foreach})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = -p.grad if group["maximize"] else p.grad
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                m = self.state[p]["exp_avg"]
                p.mul_(1 - lr * group["weight_decay"])
                u = m.mul(beta1).add_(g, alpha=1 - beta1)
                p.add_(torch.where(u.isnan(), u, u.sign()), alpha=-lr)
                m.mul_(beta2).add_(g, alpha=1 - beta2)


class SGD(torch.optim.SGD):
    """torch's, with a decay that may be decoupled: AdamW's, done before the rest."""

    def __init__(self, params: Any, *args: Any, decoupled_weight_decay: bool = False, **options: Any) -> None:
        super().__init__(params, *args, **options)
        for group in self.param_groups:
            group.setdefault("decoupled_weight_decay", decoupled_weight_decay)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            if not group["decoupled_weight_decay"]:
                continue
            for p in group["params"]:
                if p.grad is not None and group["weight_decay"] != 0.0:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
            group["weight_decay"] = 0.0
        super().step()
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay


def exact_root(x: torch.Tensor) -> torch.Tensor:
    """As IEEE 754 has it: PyTorch's from MKL are off by one unit in the last place for some numbers, how many
    and in how small a tensor depends on the CPU."""
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.asarray(np.sqrt(x.detach().numpy())))


class ExactRoots(TorchDispatchMode):
    """All square roots are exact_root()."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.ops.aten.sqrt.default, torch.ops.aten.sqrt_.default):
            return func(*args, **(kwargs or {}))
        root = exact_root(args[0])
        return args[0].copy_(root) if func is torch.ops.aten.sqrt_.default else root


@contextmanager
def exact_methods() -> Iterator[None]:
    """Those of tensors' methods are, which torch's plain loops call. By ExactRoots all other operations would
    become slower too."""
    torch.Tensor.sqrt = exact_root  # type: ignore[method-assign]
    torch.Tensor.sqrt_ = lambda x: x.copy_(exact_root(x))  # type: ignore[method-assign]
    try:
        yield
    finally:
        del torch.Tensor.sqrt, torch.Tensor.sqrt_  # what they inherit is theirs again


def taking_exact_roots(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer, whose steps do from now on."""
    step = type(optimizer).step

    def exact(*args: Any, **kwargs: Any) -> Any:
        with exact_methods():
            return step(*args, **kwargs)

    optimizer.step = types.MethodType(exact, optimizer)  # a method, as torch's schedulers wrap it
    return optimizer


LR = fastlr.Triangular2(0.001, 0.05, 3, 4)
DECAY = fastlr.LinearRamp(0.2, 0.0, 20)
BETA1 = fastlr.Triangular(0.3, 0.9, 5, inverted=True)  # on both sides of 0.5, where lerp turns round
BETA2 = fastlr.Tabulated([0.99, 0.9, 0.999, 0.5] * 20)
MOMENTUM = fastlr.Triangular(0.1, 0.9, 5)

ADAM = {
    "plain": {},
    "weight_decay": {"weight_decay": 0.1},
    "amsgrad": {"amsgrad": True},
    "low-betas": {"betas": (0.3, 0.5)},
    "betas-of-0": {"betas": (0.0, 0.0)},
    "beta1-of-0.5": {"betas": (0.5, 0.25), "amsgrad": True},
    "maximize": {"maximize": True, "eps": 1e-3},
    "all": {"weight_decay": 0.1, "amsgrad": True, "maximize": True, "betas": (0.7, 0.9), "eps": 1e-2},
}
DRIVES_ADAM: dict[str, fastlr.Schedule] = {"lr": LR, "beta1": BETA1, "beta2": BETA2, "weight_decay": DECAY}

# Adam of PyTorch 2.6 has AdamW's decay nowhere but in AdamW.
ADAM_DECOUPLES = "decoupled_weight_decay" in inspect.signature(torch.optim.Adam).parameters
DECOUPLED = {"decoupled": {"decoupled_weight_decay": True, "weight_decay": 0.1}} if ADAM_DECOUPLES else {}
NOT_DECOUPLED = "this PyTorch's Adam has no decoupled_weight_decay"

RULES = {
    "SGD": Rule(
        fastlr.FusedSGD, SGD, reference.sgd, 0.05,
        {"momentum": 0.9, "weight_decay": 0.1},
        {
            "plain": {},
            "momentum": {"momentum": 0.9},
            "dampening": {"momentum": 0.7, "dampening": -0.5, "weight_decay": 0.1},
            "all": {"momentum": 0.95, "nesterov": True, "weight_decay": 0.1, "maximize": True},
            "decoupled": {"momentum": 0.9, "weight_decay": 0.1, "decoupled_weight_decay": True},
        },
        {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY},
        counts=False,
    ),
    "Adam": Rule(
        fastlr.FusedAdam, torch.optim.Adam, reference.adam, 0.01,
        {"amsgrad": True, "weight_decay": 0.1},
        {
            **ADAM,
            **DECOUPLED,
            "eps-of-0": {"eps": 0.0},
        },
        DRIVES_ADAM,
    ),
    "AdamW": Rule(
        fastlr.FusedAdamW, torch.optim.AdamW, reference.adamw, 0.01,
        {"amsgrad": True, "weight_decay": 0.1},
        {**ADAM, "no-weight_decay": {"weight_decay": 0.0}},
        DRIVES_ADAM,
    ),
    "RMSprop": Rule(
        fastlr.FusedRMSprop, torch.optim.RMSprop, reference.rmsprop, 0.01,
        {"momentum": 0.9, "centered": True, "weight_decay": 0.1},
        {
            "plain": {},
            "weight_decay": {"weight_decay": 0.1},
            "momentum": {"momentum": 0.9},
            "centered": {"centered": True},
            "low-alpha": {"alpha": 0.4, "centered": True, "eps": 1e-3},
            "alpha-of-0": {"alpha": 0.0},
            "alpha-of-0.5": {"alpha": 0.5, "centered": True, "momentum": 0.5},
            "all": {
                "momentum": 0.9, "centered": True, "weight_decay": 0.1, "maximize": True, "eps": 1e-2,
                "alpha": 0.9,
            },
        },
        {
            "lr": LR, "alpha": fastlr.Triangular(0.3, 0.99, 5), "momentum": MOMENTUM, "weight_decay": DECAY,
        },
    ),
    "Adagrad": Rule(
        fastlr.FusedAdagrad, torch.optim.Adagrad, reference.adagrad, 0.05,
        {"lr_decay": 0.01, "initial_accumulator_value": 0.125, "weight_decay": 0.1},
        {
            "plain": {},
            "weight_decay": {"weight_decay": 0.1},
            "lr_decay": {"lr_decay": 0.1},
            "initial_accumulator_value": {"initial_accumulator_value": 0.5},
            "all": {
                "lr_decay": 0.01, "initial_accumulator_value": 0.1, "weight_decay": 0.1, "maximize": True,
                "eps": 1e-2,
            },
        },
        {"lr": LR, "weight_decay": DECAY},
    ),
    "Adadelta": Rule(
        fastlr.FusedAdadelta, torch.optim.Adadelta, reference.adadelta, 1.0,
        {"weight_decay": 0.1},
        {
            "plain": {},
            "weight_decay": {"weight_decay": 0.1},
            "rho-of-0": {"rho": 0.0},
            "rho-of-1": {"rho": 1.0},
            "all": {"rho": 0.5, "weight_decay": 0.1, "maximize": True, "eps": 1e-2},
        },
        {"lr": LR, "rho": fastlr.Triangular(0.3, 0.99, 5), "weight_decay": DECAY},
    ),
    "Lion": Rule(
        fastlr.FusedLion, Lion, reference.lion, 0.01,
        {"weight_decay": 0.1},
        {
            "plain": {},
            "weight_decay": {"weight_decay": 0.1},
            "low-betas": {"betas": (0.3, 0.5)},
            "betas-of-0": {"betas": (0.0, 0.0)},
            "all": {"betas": (0.95, 0.98), "weight_decay": 0.1, "maximize": True},
        },
        DRIVES_ADAM,
        counts=False,
    ),
}  # fmt: skip

CASES = [(rule, case) for rule, entry in RULES.items() for case in entry.cases]

with_rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
with_counting_rules = pytest.mark.parametrize(
    "rule", [rule for rule in RULES.values() if rule.counts], ids=[n for n, r in RULES.items() if r.counts]
)
with_cases = pytest.mark.parametrize(
    ("rule", "options"),
    [(RULES[rule], RULES[rule].cases[case]) for rule, case in CASES],
    ids=[f"{rule}-{case}" for rule, case in CASES],
)


def states(optimizer: torch.optim.Optimizer, model: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Every tensor of state that the optimizers of one rule share, in one order."""
    found = []
    for p in model:
        entry = optimizer.state.get(p, {})
        found += [value for name, value in sorted(entry.items()) if isinstance(value, torch.Tensor)]
    return found


def slots(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> dict[str, torch.Tensor]:
    """A parameter's tensors of state that are as large as it is."""
    return {name: value for name, value in optimizer.state[p].items() if name != "step"}


def drive(group: dict[str, Any], schedules: dict[str, fastlr.Schedule], clock: int) -> None:
    """Sets by hand what schedules would."""
    for name, schedule in schedules.items():
        value = schedule._native.value(clock)
        if name.startswith("beta"):
            betas = list(group["betas"])
            betas[int(name[-1]) - 1] = value
            group["betas"] = tuple(betas)
        else:
            group[name] = value


def close_on_devices(rule: Rule, backend: str) -> bool:
    """A GPU's powers of betas, and its schedules' powers, may differ in the last bit from the host's."""
    return backend == "cuda" and rule.counts


def assert_same_run(
    rule: Rule,
    expected: tuple[torch.optim.Optimizer, list[torch.nn.Parameter]],
    actual: tuple[torch.optim.Optimizer, list[torch.nn.Parameter]],
    close: bool = False,
) -> None:
    """Parameters and all state, ``step`` too."""
    (theirs, their_model), (ours, our_model) = expected, actual
    assert_same(their_model, our_model, close)
    for p, q in zip(their_model, our_model, strict=True):
        mine, other = (o.state.get(x, {}) for o, x in ((ours, q), (theirs, p)))
        left_out = set() if rule.counts else {"step"}  # which a device keeps
        names = {name for name, value in other.items() if value is not None} - left_out
        assert set(mine) - left_out == names
        assert_same([other[name] for name in names], [mine[name] for name in names], close)
