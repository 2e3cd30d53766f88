"""Beside what else PyTorch has: compilers, functional calls, swaps, hooks, averages, profiles."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import fastlr

PAGE = Path(__file__).parent.parent / "docs" / "with_torch.md"
INPUTS = torch.randn(6, 8, 4, generator=torch.Generator().manual_seed(1))
SCHEDULE = fastlr.Cosine(0.1, 0.0, 20)

pytestmark = [
    # Dynamo looks at the gradients of what it traces, and says so itself where warnings are errors.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # Inductor, as it is imported.
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _one_thread_and_a_new_compiler() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2))


def trained_by(model: torch.nn.Module) -> fastlr.FusedOptimizer:
    return fastlr.FusedAdamW(model.parameters(), lr=SCHEDULE, max_grad_norm=0.1, ema_decay=0.75)


def backward(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    loss = model(x).square().mean()
    loss.backward()
    return loss


def train_step(model: torch.nn.Module, opt: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    loss = backward(model, x)
    opt.step()
    opt.zero_grad()
    return loss


def all_of(model: torch.nn.Module, opt: fastlr.FusedOptimizer) -> list[torch.Tensor]:
    parameters = list(model.parameters())
    return [*parameters, *(value for p in parameters for _, value in sorted(opt.state[p].items()))]


def plainly_trained() -> tuple[torch.nn.Module, fastlr.FusedOptimizer]:
    model = network()
    opt = trained_by(model)
    for x in INPUTS:
        train_step(model, opt, x)
    return model, opt


# -- torch.compile -------------------------------------------------------------------------------------------


def around_the_model(model: Any, opt: Any, compiled: Callable[..., Any]) -> Callable[[torch.Tensor], Any]:
    module = compiled(model)
    return lambda x: train_step(module, opt, x)


def around_the_training_step(model: Any, opt: Any, compiled: Any) -> Callable[[torch.Tensor], Any]:
    step = compiled(train_step)
    return lambda x: step(model, opt, x)


def around_the_step(model: Any, opt: Any, compiled: Any) -> Callable[[torch.Tensor], Any]:
    step = compiled(opt.step)

    def run(x: torch.Tensor) -> None:
        backward(model, x)
        step()
        opt.zero_grad()

    return run


@pytest.mark.parametrize("backend_of_dynamo", ["eager", "aot_eager"])
@pytest.mark.parametrize("around", [around_the_model, around_the_training_step, around_the_step])
def test_compiled_training_has_the_same_bits_and_compiles_once(around: Any, backend_of_dynamo: str) -> None:
    model = network()
    opt = trained_by(model)
    step = around(model, opt, lambda f: torch.compile(f, backend=backend_of_dynamo))
    for x in INPUTS[:2]:
        step(x)
    with torch.compiler.set_stance("fail_on_recompile"):  # though the rate changes at every step
        for x in INPUTS[2:]:
            step(x)
    expected = plainly_trained()
    assert opt.clock() == expected[1].clock() == (6, 0)
    assert_same(all_of(*expected), all_of(model, opt))


@pytest.mark.repetition
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_changes_the_gradients_at_most(mode: str) -> None:
    """Its own arithmetic is not PyTorch's; the step's is the same inside and outside of what it compiles."""
    ends = []
    for whole in (True, False):
        model = network()
        opt = trained_by(model)
        step = torch.compile(train_step if whole else backward, mode=mode)
        for x in INPUTS:
            if whole:
                step(model, opt, x)
            else:
                step(model, x)
                opt.step()
                opt.zero_grad()
        assert opt.clock() == (6, 0)
        ends.append(all_of(model, opt))
        torch._dynamo.reset()
    assert_same(*ends)
    for end, plain in zip(ends[0], all_of(*plainly_trained()), strict=True):
        torch.testing.assert_close(end, plain, rtol=1e-4, atol=1e-6)


def test_a_compiled_step_takes_closures_and_cleans_up_after_errors() -> None:
    model, twin = network(), network()
    opt, other = trained_by(model), trained_by(twin)

    def closure_of(module: torch.nn.Module) -> Callable[[], Any]:
        def closure() -> torch.Tensor:
            module.zero_grad()
            return backward(module, INPUTS[0])

        return closure

    step = torch.compile(opt.step, backend="eager")
    assert [step(closure_of(model)) for _ in range(3)] == [other.step(closure_of(twin)) for _ in range(3)]
    assert_same(twin.parameters(), model.parameters())

    opt.grad_scale = torch.tensor(2.0)  # as GradScaler leaves it
    opt.param_groups[0]["weight_decay"] = -1.0
    with pytest.raises(ValueError, match="weight_decay"):
        step()
    assert not hasattr(opt, "grad_scale")


# -- functional calls, parametrizations and swaps ------------------------------------------------------------


def test_gradients_of_functional_calls() -> None:
    model = network()
    opt = trained_by(model)

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.func.functional_call(model, parameters, (x,))
        return out.square().mean()

    for x in INPUTS:
        values = {name: p.detach() for name, p in model.named_parameters()}
        gradients = torch.func.grad(loss)(values, x)
        for name, p in model.named_parameters():
            p.grad = gradients[name]
        opt.step()
    assert_same(all_of(*plainly_trained()), all_of(model, opt))
    without = torch.func.functional_call(model, opt.averaged_state_dict(model), (INPUTS[0],))
    with opt.averaged_weights():
        assert torch.equal(model(INPUTS[0]), without)


def pair_of(make: Callable[[], torch.nn.Module]) -> list[tuple[torch.nn.Module, torch.optim.Optimizer]]:
    """The same model twice: under torch's optimizer, and under ours."""
    pairs: list[tuple[torch.nn.Module, torch.optim.Optimizer]] = []
    for kind in (torch.optim.SGD, fastlr.FusedSGD):
        torch.manual_seed(0)
        model = make()
        more = {"foreach": False} if kind is torch.optim.SGD else {}
        pairs.append((model, kind(model.parameters(), lr=0.1, momentum=0.9, **more)))
    return pairs


class Symmetric(torch.nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w.triu() + w.triu(1).T


def test_parametrizations_before_and_after_the_optimizer_is_made() -> None:
    pairs = pair_of(lambda: torch.nn.Sequential(weight_norm(torch.nn.Linear(4, 4)), torch.nn.Linear(4, 4)))
    for model, opt in pairs:
        later = model[1]
        for step, x in enumerate(INPUTS):
            if step == 2:
                parametrize.register_parametrization(later, "weight", Symmetric())
            if step == 4:
                parametrize.remove_parametrizations(later, "weight")
            with parametrize.cached():
                train_step(model, opt, x)
    assert_same(pairs[0][0].parameters(), pairs[1][0].parameters())
    before = [p.detach().clone() for p in pairs[1][0].parameters()]
    train_step(*pairs[1], INPUTS[0])
    assert all(not torch.equal(a, b) for a, b in zip(before, pairs[1][0].parameters(), strict=True))


def test_swapped_tensors() -> None:
    pairs = pair_of(lambda: torch.nn.Linear(4, 4))
    for model, opt in pairs:
        for step, x in enumerate(INPUTS):
            if step == 3:
                torch.utils.swap_tensors(model.weight, torch.nn.Parameter(model.weight.detach() * 2))
            train_step(model, opt, x)
    assert_same(pairs[0][0].parameters(), pairs[1][0].parameters())


def test_parameters_that_are_swapped_to_another_type() -> None:
    pairs = pair_of(lambda: torch.nn.Linear(4, 4))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for model, opt in pairs:
            for step, x in enumerate(INPUTS):
                if step == 3:
                    model.double()
                    for state in opt.state.values():
                        state["momentum_buffer"] = state["momentum_buffer"].double()
                if step == 4:
                    model.load_state_dict(copy.deepcopy(model.state_dict()))
                train_step(model, opt, x.to(model.weight.dtype))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_same(pairs[0][0].parameters(), pairs[1][0].parameters())


# -- an optimizer in the backward pass -----------------------------------------------------------------------


def test_one_optimizer_a_parameter_in_the_backward_pass() -> None:
    def made(parameters: Any) -> fastlr.FusedOptimizer:
        return fastlr.FusedAdamW(parameters, lr=SCHEDULE, ema_decay=0.75)

    model, twin = network(), network()
    optimizers = {p: made([p]) for p in model.parameters()}

    def step(p: torch.Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    together = made(twin.parameters())
    for x in INPUTS:
        backward(model, x)
        train_step(twin, together, x)
    assert all(p.grad is None for p in model.parameters())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert optimizers[p].clock() == together.clock()
        assert_same([q, *together.state[q].values()], [p, *optimizers[p].state[p].values()])


# -- torch.optim.swa_utils -----------------------------------------------------------------------------------


def test_averages_are_those_of_swa_utils() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.BatchNorm1d(9), torch.nn.Linear(9, 2))
    opt = fastlr.FusedAdamW(model.parameters(), lr=SCHEDULE, ema_decay=0.75)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    averaged.update_parameters(model)  # begins as the weights are, as ours
    for x in INPUTS:
        train_step(model, opt, x)
        averaged.update_parameters(model)
    ours = copy.deepcopy(model)
    opt.copy_averages_to(ours)
    assert_same(averaged.module.parameters(), ours.parameters())
    for module in (averaged, ours):
        update_bn(INPUTS, module)
    assert_same(averaged.module.buffers(), ours.buffers())
    assert not torch.equal(ours[1].running_mean, model[1].running_mean)


@pytest.mark.parametrize(("strategy", "ramp"), [("cos", fastlr.Cosine), ("linear", fastlr.LinearRamp)])
def test_swalr_is_a_schedule(strategy: Any, ramp: Any) -> None:
    opt = fastlr.FusedSGD(network().parameters(), lr=SCHEDULE)
    swalr = SWALR(opt, swa_lr=0.05, anneal_epochs=3, anneal_strategy=strategy)
    opt.step()
    swalr.step()
    with pytest.raises(RuntimeError, match="a schedule owns it"):
        opt.step()

    theirs = torch.optim.SGD(network().parameters(), lr=0.1)
    swalr = SWALR(theirs, swa_lr=0.05, anneal_epochs=3, anneal_strategy=strategy)
    lr = ramp(0.1, 0.05, 3).then(fastlr.Constant(0.05))
    opt = fastlr.FusedSGD(network().parameters(), lr=lr)
    for _ in range(6):
        assert opt.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12)
        theirs.step()
        swalr.step()
        opt.step()


# -- profiles ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_steps_have_their_names_in_profiles(compiled: bool) -> None:
    model = network()
    for kind in (fastlr.FusedAdamW, fastlr.FusedLion):
        opt = kind(model.parameters(), lr=0.1)
        step = torch.compile(opt.step, backend="eager") if compiled else opt.step
        backward(model, INPUTS[0])
        with torch.autograd.profiler.profile() as profile:
            step()
            opt.zero_grad()
        names = [event.key for event in profile.key_averages()]
        assert names.count(f"Optimizer.step#{kind.__name__}.step") == 1
        assert names.count(f"Optimizer.zero_grad#{kind.__name__}.zero_grad") == 1


def test_the_page_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    model = network()
    names: dict[str, Any] = {
        "torch": torch,
        "fastlr": fastlr,
        "model": model,
        "loss_fn": torch.nn.functional.mse_loss,
        "loader": [(x, torch.zeros(8, 2)) for x in INPUTS[:2]],
    }
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    backward(model, INPUTS[0])
    assert [opt.clock() for opt in names["optimizers"].values()] == [(1, 0)] * 4
