"""Launches every kernel a few times and compares nothing: what a sanitizer or a profiler watches."""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Iterable
from typing import Any

import torch
from helpers import parameters, set_gradients

import fastlr

from . import report
from .device import Device, open_device
from .smoke import CYCLE, MAKES, Make, Model, model_on

# Storage types of parameter and state, None: the parameter's.
KERNELS = [
    (torch.float32, None),
    (torch.float64, None),
    (torch.float64, torch.float32),
    (torch.bfloat16, None),
    (torch.bfloat16, torch.float32),
    (torch.float16, None),
    (torch.float16, torch.float32),
]


def optimizers() -> dict[str, type[fastlr.FusedOptimizer]]:
    """Of each native rule, one; found among the public classes, so that a new rule is here by itself."""
    found: dict[str, type[fastlr.FusedOptimizer]] = {}
    for name in fastlr.optim.__all__:
        kind = getattr(fastlr, name)
        if hasattr(kind, "_rule") and not issubclass(kind, fastlr.optim.cyclic.CyclicOptimizer):
            found.setdefault(kind._rule, kind)
    return found


def options_of(kind: type[fastlr.FusedOptimizer]) -> list[dict[str, Any]]:
    """Options for each set of state that the rule's updates work on, the largest set last."""
    optimizer = kind(parameters([(1,)]))
    group, options = optimizer.param_groups[0], optimizer._options
    free = [o for o in options.all if o.tuple is None and o.name not in ("lr", "weight_decay", *kind._fixed)]
    choices = [(False, True) if o.flag else dict.fromkeys((group[o.name], 0.5)) for o in free]
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for values in itertools.product(*choices):
        given = {option.name: value for option, value in zip(free, values, strict=True)}
        try:
            checked = options.checked({**group, **given}, "")
        except ValueError:
            continue  # two of them do not go together
        live = optimizer._plan.live_slots(options.numbers(checked))
        found.setdefault(tuple(live), given)
    return [found[live] for live in sorted(found, key=len)]


def many_small(count: int, dtype: torch.dtype, device: torch.device) -> Model:
    """So many parameters with gradients, of two tensors: few launches make them."""
    values, gradients = (torch.full((9 * count,), 0.5, dtype=dtype, device=device) for _ in range(2))
    model = [torch.nn.Parameter(part) for part in values.split(9)]
    for p, gradient in zip(model, gradients.split(9), strict=True):
        p.grad = gradient
    return model


def of_a_type(device: Device, make: Make, dtype: torch.dtype, many: int) -> None:
    """Dense, misaligned and strided tensors, more than the small arguments take, norm and skipped step."""
    model = model_on(device.device, dtype)
    optimizer = make(model + many_small(many, dtype, device.device))
    for step, measure in enumerate((False, True, True)):
        set_gradients(step, model)
        if step == 1:
            model[3].grad = None  # from now on it has an age of its own
        optimizer.measure_grad_norm = measure
        optimizer.step()
    optimizer.found_inf = torch.ones((), device=device.device)
    optimizer.grad_scale = torch.full((), 4.0, device=device.device)
    optimizer.step()
    optimizer.max_grad_norm = 1.0
    optimizer.step()
    optimizer.advance_samples(3)
    optimizer.sync()


def graph_without_its_optimizer(device: Device, make: Make) -> None:
    """What a captured graph refers to outlives the optimizer, the scaler's tensors and the parameters."""
    model = model_on(device.device, torch.float32)
    optimizer = make(model)
    optimizer.found_inf = torch.zeros((), device=device.device)
    optimizer.grad_scale = torch.full((), 2.0, device=device.device)
    set_gradients(0, model)
    gradients = [p.grad for p in model]
    replay = device.capture(optimizer.step)
    del optimizer, model
    gc.collect()
    if device.name == "cuda":
        torch.cuda.empty_cache()
    for _ in range(3):
        replay()
    del gradients


def large(device: Device, elements: int) -> None:
    """For a profiler: float32 with momentum, as most of a large network is."""
    (p,) = parameters([(elements,)], device=device.device)
    p.grad = torch.ones_like(p)
    optimizer = fastlr.FusedCyclicSGD([p], **CYCLE, momentum=0.9, weight_decay=5e-4)
    for _ in range(5):
        optimizer.step()
    optimizer.sync()


def everything(small: bool) -> Iterable[tuple[str, Make, torch.dtype, int]]:
    """What to check: its name, what makes the optimizer, the parameters' type, how many more there are."""
    lr, decay = fastlr.Triangular2(0.01, 0.1, 3), fastlr.LinearRamp(0.01, 0.0, 10)
    for rule, kind in optimizers().items():
        choices = options_of(kind)
        for (dtype, state_dtype), options in itertools.product(KERNELS, choices):
            state = {"state_dtype": state_dtype, **options}

            def make(model: Model, kind: Any = kind, state: dict[str, Any] = state) -> fastlr.FusedOptimizer:
                made: fastlr.FusedOptimizer = kind(model, lr=lr, weight_decay=decay, **state)
                return made

            told = ", ".join(f"{name}={value}" for name, value in options.items())
            # Kernels with large arguments differ in nothing but those, so that one set of state will do.
            for many in (0,) if small or options is not choices[-1] else (0, 500):
                yield f"{rule}, {dtype}, state {state_dtype or dtype}, {told}, {many} more", make, dtype, many


def main() -> int:
    parser = report.arguments(__doc__)
    parser.add_argument("--large", type=int, metavar="ELEMENTS", help="a large float32 tensor only")
    options = parser.parse_args()
    device = open_device(options.backend)
    if options.large:
        large(device, options.large)
        return 0
    made = report.Report(options.result)
    for name, make, dtype, many in everything(options.small):
        made.check(name, lambda make=make, dtype=dtype, many=many: of_a_type(device, make, dtype, many))
    for name, make in MAKES.items():
        made.check(f"a graph without its {name}", lambda make=make: graph_without_its_optimizer(device, make))
    if options.backend == "cuda":
        torch.cuda.synchronize()
    return made.finish()


if __name__ == "__main__":
    sys.exit(main())
