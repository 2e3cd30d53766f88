"""PyTorch's own table of optimizer tests, driving ours: every configuration, every scheduler, every error.

What is particular to an optimizer (its configurations, the schedulers that it is tried with, what it refuses)
stands in ``torch.testing._internal.common_optimizers``; a new rule joins by a line of RULES. The oracle is
PyTorch's plain loop, to the bit, with its square roots rounded correctly (rule_table.py); one test takes
the loop as it is. For PyTorch's test of sparse gradients, see test_tensors.py: they are errors here.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers import assert_same, parameters, set_gradients, twins
from rule_table import taking_exact_roots
from torch.optim import lr_scheduler

import fastlr

pytest.importorskip("expecttest", reason="PyTorch's test code, which only its own tests need, imports it")


def imported() -> Any:
    """PyTorch's table. Its import changes PyTorch for all tests of a process, which is put back."""
    scripted = (torch._C.ScriptFunction, torch._C.ScriptMethod)
    calls = [kind.__call__ for kind in scripted]
    with warnings.catch_warnings():
        from torch.testing._internal import common_optimizers
    for kind, call in zip(scripted, calls, strict=True):
        kind.__call__ = call  # type: ignore[method-assign]
    setattr(torch.backends, "__allow_nonbracketed_mutation_flag", True)
    return common_optimizers


TABLE = imported()
pytestmark = pytest.mark.usefixtures("backend")


class Rule(NamedTuple):
    fused: type[fastlr.FusedOptimizer]
    torch: type[torch.optim.Optimizer]

    @property
    def info(self) -> Any:
        return next(info for info in TABLE.optim_db if info.optim_cls is self.torch)


RULES = [
    Rule(fastlr.FusedSGD, torch.optim.SGD),
    Rule(fastlr.FusedAdam, torch.optim.Adam),
    Rule(fastlr.FusedAdamW, torch.optim.AdamW),
    Rule(fastlr.FusedRMSprop, torch.optim.RMSprop),
    Rule(fastlr.FusedAdagrad, torch.optim.Adagrad),
    Rule(fastlr.FusedAdadelta, torch.optim.Adadelta),
]

# What PyTorch has no optimizer for.
OWN = {fastlr.FusedLion}
# What of PyTorch's configurations does not exist here, by description.
_NUMBER = "a rate is a number or a schedule, which CUDA graphs follow without a tensor"
LEFT_OUT = {"tensor lr": _NUMBER, "Tensor lr": _NUMBER}
# Errors that are raised in other words, by description.
_ONE_PASS = (ValueError, "foreach must be False or None, got True: every step updates all parameters in one")
OTHER_WORDS: dict[str, tuple[type[Exception], str]] = {
    "Tensor lr must be 1-element": (TypeError, "lr of parameter group 0 must be a number or a fastlr"),
    "momentum should be between 0 and 1": (ValueError, r"momentum of parameter group 0 must be in \[0, 1\)"),
    "beta1 should be between 0 and 1": (
        ValueError,
        r"beta1 of parameter group 0 must be in \[0, 1\), got 1\.0",
    ),
    "rho should be between 0 and 1": (
        ValueError,
        r"rho of parameter group 0 must be in \[0, 1\], got 1\.1; above 1 the averages of squares grow",
    ),
    "weight_decay should > 0": (
        ValueError,
        "weight_decay of parameter group 0 must be finite and >= 0, got -1",
    ),
    "lr_decay must be bigger than 0": (
        ValueError,
        r"lr_decay of parameter group 0 must be finite and >= 0, got -0\.5",
    ),
    "betas must be either both floats or both Tensors": (
        TypeError,
        "beta[12] of parameter group 0 must be a number or a fastlr schedule, got tensor",
    ),
    "lr as Tensor doesn't work with foreach & not capturable": _ONE_PASS,
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True": _ONE_PASS,
}


class Case(NamedTuple):
    rule: Rule
    options: dict[str, Any]

    def build(self, ours: Any, theirs: Any) -> tuple[Any, Any]:
        """Ours, and PyTorch's with correctly rounded roots."""
        reference = self.rule.torch(theirs, **copy.deepcopy(self.options), foreach=False)
        return self.rule.fused(ours, **copy.deepcopy(self.options)), taking_exact_roots(reference)


CASES = [
    pytest.param(Case(rule, given.kwargs), id=f"{rule.torch.__name__}-{given.desc.replace(' ', '-')}")
    for rule in RULES
    for given in rule.info.optim_inputs_func(device="cpu")
    if given.desc not in LEFT_OUT
]
every_case = pytest.mark.parametrize("case", CASES)
SHAPES = [(10, 5), (10,), (3, 4, 5), ()]


def test_what_is_left_out_is_still_there() -> None:
    described = [given.desc for rule in RULES for given in rule.info.optim_inputs_func(device="cpu")]
    errors = {
        given.optimizer_error_input.desc
        for rule in RULES
        for given in rule.info.optim_error_inputs_func("cpu", torch.float32)
    }
    assert set(LEFT_OUT) <= set(described)
    assert set(OTHER_WORDS) <= errors
    assert len(CASES) + sum(name in LEFT_OUT for name in described) == len(described)


def test_every_rule_is_in_the_table() -> None:
    own = {fastlr.FusedOptimizer, fastlr.optim.cyclic.CyclicOptimizer}
    public = {kind for kind in map(fastlr.optim.__dict__.get, fastlr.optim.__all__) if isinstance(kind, type)}
    fused = {kind for kind in public - own if issubclass(kind, fastlr.FusedOptimizer)}
    cyclic = {kind for kind in fused if issubclass(kind, fastlr.optim.cyclic.CyclicOptimizer)}
    assert fused - cyclic - OWN == {rule.fused for rule in RULES}


# -- steps ------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_steps_are_those_of_the_loop(case: Case, dtype: torch.dtype) -> None:
    ours, theirs = twins(SHAPES, dtype)
    fused, reference = case.build(ours, theirs)
    for step in range(7):
        set_gradients(step, ours, theirs)
        if step in (1, 4):
            ours[2].grad = theirs[2].grad = None
        fused.step()
        reference.step()
    assert_same(theirs, ours)


def test_the_roots_of_bias_corrections_are_pythons() -> None:
    """PyTorch takes them by ``x ** 0.5``, which is not always the correctly rounded root."""
    beta2 = next(b for b in torch.linspace(0.1, 0.9, 9999).tolist() if (1 - b) ** 0.5 != math.sqrt(1 - b))
    ours, theirs = twins([(33,)], torch.float64)
    fused, reference = Case(RULES[1], {"betas": (0.9, beta2)}).build(ours, theirs)
    set_gradients(0, ours, theirs)
    fused.step()
    reference.step()
    assert_same(theirs, ours, close=ours[0].is_cuda)


# How far an update may be from one with PyTorch's roots as they are, in units in the last place of the
# parameter and of what is added to it: one for the root, see csrc/rules/adam.h, one for rounding it on.
UNITS = 2


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_update_is_pytorchs_with_its_roots_as_they_are(case: Case, dtype: torch.dtype) -> None:
    ours, theirs = twins([(4099,)], dtype)
    fused = case.rule.fused(ours, **case.options)
    reference = case.rule.torch(theirs, **case.options, foreach=False)
    for step in range(5):
        before = theirs[0].detach().clone()
        ours[0].data.copy_(before)
        set_gradients(step, ours, theirs)
        fused.step()
        reference.step()
        after = theirs[0].detach()
        size = (after - before).abs() + before.abs()
        apart = (after - ours[0].detach().cpu()).abs()
        assert bool((apart <= UNITS * torch.finfo(dtype).eps * size).all())


@every_case
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_parameters_are_pairs_of_reals(case: Case, dtype: torch.dtype) -> None:
    ours, theirs = twins(SHAPES, dtype)
    real = [torch.nn.Parameter(torch.view_as_real(p.detach())) for p in theirs]
    fused, reference = case.build(ours, real)
    for step in range(4):
        set_gradients(step, ours)
        for p, pair in zip(ours, real, strict=True):
            pair.grad = torch.view_as_real(p.grad).clone()
        fused.step()
        reference.step()
    assert_same(real, [torch.view_as_real(p.detach()) for p in ours])


@every_case
def test_parameter_groups_and_names(case: Case) -> None:
    ours, theirs = twins(SHAPES)

    def groups(model: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
        named = [(f"p{i}", p) for i, p in enumerate(model)]
        return [{"params": named[:1], "lr": 0.03}, {"params": named[1:3], "weight_decay": 0.25},
                {"params": iter(named[3:])}]  # fmt: skip

    fused, reference = case.build(groups(ours), groups(theirs))
    for mine, other in zip(fused.param_groups, reference.param_groups, strict=True):
        assert mine["param_names"] == other["param_names"]
    for step in range(4):
        set_gradients(step, ours, theirs)
        fused.step()
        reference.step()
    assert_same(theirs, ours)


@every_case
def test_a_closure_is_called_as_in_the_loop(case: Case) -> None:
    ours, theirs = twins([(6, 3), (6,)])
    pairs = zip(case.build(ours, theirs), (ours, theirs), strict=True)

    def run(optimizer: Any, model: list[torch.nn.Parameter]) -> list[float]:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = (model[0].mv(torch.ones(3)) + model[1]).square().sum()
            loss.backward()
            return loss

        return [optimizer.step(closure).item() for _ in range(5)]

    one, other = (run(*pair) for pair in pairs)
    assert one == other


@every_case
def test_no_gradients_and_zero_gradients(case: Case) -> None:
    ours, theirs = twins(SHAPES)
    fused, reference = case.build(ours, theirs)
    before = [p.detach().clone() for p in ours]
    fused.step()
    reference.step()
    assert_same(before, [p.detach() for p in ours])
    assert not fused.state
    for step in range(3):
        set_gradients(step, ours, theirs, scale=0.0)
        fused.step()
        reference.step()
    assert_same(theirs, ours)


# -- schedulers -------------------------------------------------------------------------------------

Schedulers = list[Callable[[torch.optim.Optimizer], Any]]


def has_momentum(optimizer: torch.optim.Optimizer) -> bool:
    """Whether there is one that CyclicLR and OneCycleLR can cycle; in Adam that is the first of its betas."""
    group = optimizer.param_groups[0]
    return "betas" in group or group.get("momentum", 0) != 0


# One of each that PyTorch has; the ones that its table of an optimizer names come on top.
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 6], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.25, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, 1e-3, 1e-2, 3, mode="triangular2", cycle_momentum=has_momentum(o)
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12, cycle_momentum=has_momentum(o)),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
}
ON_TOP = [
    pytest.param(case.values[0], schedulers, id=f"{case.id}-{name}")
    for case in CASES
    for name, schedulers in (
        *((name, [make]) for name, make in SCHEDULERS.items()),
        *((f"table-{i}", made) for i, made in enumerate(case.values[0].rule.info.scheduler_inputs)),
    )
]


def test_every_scheduler_of_pytorch_is_tried() -> None:
    theirs = set(lr_scheduler.__all__) - {"LRScheduler"}  # the base class
    assert theirs <= set(SCHEDULERS)


@pytest.mark.parametrize(("case", "schedulers"), ON_TOP)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.. before .optimizer.step..:UserWarning")
# PyTorch 2.6's SequentialLR gives it.
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
def test_schedulers_on_top(case: Case, schedulers: Schedulers) -> None:
    ours, theirs = twins([(10, 5), (10,)])
    optimizers = case.build(ours, theirs)
    made = [[make(optimizer) for make in schedulers] for optimizer in optimizers]
    for step in range(12):
        set_gradients(step, ours, theirs)
        for optimizer, attached in zip(optimizers, made, strict=True):
            optimizer.step()
            for scheduler in attached:
                if step == 11:
                    continue  # OneCycleLR has no rate after its last step
                if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                    scheduler.step(1.0 / (1 + min(step, 3)))
                else:
                    scheduler.step()
        one, other = (optimizer.param_groups[0] for optimizer in optimizers)
        for name in ("lr", "momentum", "betas"):
            assert one.get(name) == other.get(name)
    assert_same(theirs, ours)


# -- errors -----------------------------------------------------------------------------------------

ERRORS = [
    pytest.param(
        rule, given, id=f"{rule.torch.__name__}-{given.optimizer_error_input.desc.replace(' ', '-')}"
    )
    for rule in RULES
    for given in rule.info.optim_error_inputs_func("cpu", torch.float32)
]


@pytest.mark.parametrize(("rule", "given"), ERRORS)
def test_errors(rule: Rule, given: Any) -> None:
    wrong = given.optimizer_error_input
    kind, message = OTHER_WORDS.get(wrong.desc, (given.error_type, given.error_regex))
    params = parameters([(1, 1)]) if wrong.params is None else wrong.params
    assert given.error_on is TABLE.OptimizerErrorEnum.CONSTRUCTION_ERROR
    if issubclass(kind, Warning):
        with pytest.warns(kind, match=message):
            rule.fused(params, **wrong.kwargs)
    else:
        with pytest.raises(kind, match=message):
            rule.fused(params, **wrong.kwargs)


# -- state_dict -------------------------------------------------------------------------------------


def trained(case: Case, steps: int = 3) -> tuple[Any, list[torch.nn.Parameter]]:
    model = parameters(SHAPES)
    optimizer = case.rule.fused(model, **case.options)
    for step in range(steps):
        set_gradients(step, model)
        optimizer.step()
    return optimizer, model


@every_case
def test_state_dicts_are_deterministic_and_load_with_weights_only(case: Case) -> None:
    (one, model), (other, twin) = trained(case), trained(case)
    assert str(one.state_dict()) == str(other.state_dict())
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    resumed = case.rule.fused(twin, **case.options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert str(resumed.state_dict()) == str(one.state_dict())
    for step in range(3, 6):
        set_gradients(step, model, twin)
        one.step()
        resumed.step()
    assert_same(model, twin)


@every_case
def test_older_state_dicts_load(case: Case) -> None:
    optimizer, _ = trained(case)
    older = copy.deepcopy(optimizer.state_dict())
    for flag in case.rule.info.not_og_supported_flags:
        for group in older["param_groups"]:
            group.pop(flag, None)
    optimizer.load_state_dict(older)
    for group in optimizer.param_groups:
        assert group["maximize"] == case.options.get("maximize", False)
    set_gradients(3, optimizer.param_groups[0]["params"])
    optimizer.step()


@every_case
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_copies_have_all_public_attributes(case: Case, clone: Callable[[Any], Any]) -> None:
    optimizer, _ = trained(case)
    copied = clone(optimizer)
    public = {name for name in dir(optimizer) if not name.startswith("_")}
    assert {name for name in dir(copied) if not name.startswith("_")} == public
    assert str(copied.state_dict()) == str(optimizer.state_dict())


@every_case
def test_hooks_of_state_dicts_are_called_in_order(case: Case) -> None:
    optimizer, _ = trained(case)
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda _, saved: calls.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: calls.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["save", "saved", "load", "loaded"]
