"""Launches every kernel a few times and compares nothing: what a sanitizer or a profiler watches."""

from __future__ import annotations

import gc
import itertools
import sys

import torch
from helpers import parameters, set_gradients

import fastlr

from . import report
from .device import Device, open_device
from .smoke import CYCLE, cyclic, model_on

# Storage types of parameter and momentum, None: the parameter's.
KERNELS = [
    (torch.float32, None),
    (torch.float64, None),
    (torch.float64, torch.float32),
    (torch.bfloat16, None),
    (torch.bfloat16, torch.float32),
    (torch.float16, None),
    (torch.float16, torch.float32),
]


def of_a_type(device: Device, dtype: torch.dtype, momentum_dtype: torch.dtype | None, many: int) -> None:
    """Dense, misaligned and strided tensors, more than the small arguments take, norm and skipped step."""
    model = model_on(device.device, dtype) + parameters([(9,)] * many, dtype, device=device.device)
    optimizer = fastlr.FusedCyclicSGD(
        model, **CYCLE, cycle_momentum=True, momentum_dtype=momentum_dtype, weight_decay=0.01
    )
    for step, measure in enumerate((False, True, True)):
        set_gradients(step, model)
        optimizer.measure_grad_norm = measure
        optimizer.step()
    optimizer.found_inf = torch.ones((), device=device.device)
    optimizer.grad_scale = torch.full((), 4.0, device=device.device)
    optimizer.step()
    optimizer.advance_samples(3)
    optimizer.sync()


def graph_without_its_optimizer(device: Device) -> None:
    """What a captured graph refers to outlives the optimizer, the scaler's tensors and the parameters."""
    model = model_on(device.device, torch.float32)
    optimizer = cyclic(model)
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


def main() -> int:
    parser = report.arguments(__doc__)
    parser.add_argument("--large", type=int, metavar="ELEMENTS", help="a large float32 tensor only")
    options = parser.parse_args()
    device = open_device(options.backend)
    if options.large:
        large(device, options.large)
        return 0
    made = report.Report(options.result)
    counts = (0,) if options.small else (0, 500)
    for (dtype, momentum_dtype), many in itertools.product(KERNELS, counts):
        made.check(
            f"{dtype}, momentum {momentum_dtype or dtype}, {many} more",
            lambda d=dtype, m=momentum_dtype, n=many: of_a_type(device, d, m, n),
        )
    made.check("a graph without its optimizer", lambda: graph_without_its_optimizer(device))
    if options.backend == "cuda":
        torch.cuda.synchronize()
    return made.finish()


if __name__ == "__main__":
    sys.exit(main())
