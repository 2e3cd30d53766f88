"""Whole trainings on the device: range test, growing batches, autocast with GradScaler, a compiled model."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from helpers import assert_same

import fastlr

from . import report
from .device import Device, open_device

SAMPLES = 512
Make = Callable[[Iterable[torch.nn.Parameter]], fastlr.FusedOptimizer]


def cyclic_sgd(params: Iterable[torch.nn.Parameter]) -> fastlr.FusedOptimizer:
    return fastlr.FusedCyclicSGD(params, 0.01, 0.1, 20, momentum=0.9)


def scheduled_adamw(params: Iterable[torch.nn.Parameter]) -> fastlr.FusedOptimizer:
    """eps is above the rounding errors that a bias before a BatchNorm has for gradients."""
    lr, beta1 = fastlr.one_cycle(max_lr=0.01, total_steps=120)
    return fastlr.FusedAdamW(params, lr=lr, betas=(beta1, 0.999), eps=1e-4, weight_decay=0.05)


MAKES: dict[str, Make] = {"FusedCyclicSGD": cyclic_sgd, "FusedAdamW": scheduled_adamw}


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Two clouds that a small network can tell apart, and the labels."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(2, (SAMPLES,), generator=generator)
    x = torch.randn(SAMPLES, 16, generator=generator) + y[:, None] * 0.7
    return x, y


def network(device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(16, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU(), torch.nn.Linear(64, 2)
    ).to(device)


def loss_of(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(x), y)


def check_range_test(device: Device, make: Make) -> str:
    x, y = data()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 32, shuffle=True)
    model = network(device.device)
    before = copy.deepcopy(model.state_dict())
    optimizer = make(model.parameters())
    found = fastlr.range_test(
        model,
        optimizer,
        torch.nn.functional.cross_entropy,
        loader,
        start_lr=1e-4,
        end_lr=10.0,
        num_steps=120,
        progress=False,
    )
    assert_same(before.values(), model.state_dict().values())
    assert optimizer.sync() == (0, 0)
    assert found, found.reason
    return f"{found.base_lr:.2g} to {found.max_lr:.2g}"


def check_growing_batches(device: Device, pinned: bool) -> str:
    x, y = data()
    plan = fastlr.BatchPlan.from_schedule(
        fastlr.MultiStep(0.1, [2, 4], 0.5, unit="epoch"), batch_size=16, dataset_size=SAMPLES, epochs=6
    )

    def train(where: torch.device) -> tuple[torch.nn.Module, fastlr.FusedSGD]:
        model = network(where)
        optimizer = fastlr.FusedSGD(model.parameters(), lr=plan.lr, momentum=plan.momentum)
        loader = fastlr.GrowingLoader(
            torch.utils.data.TensorDataset(x, y), plan, micro_batch_size=32, pin_memory=pinned, num_workers=2
        ).bind(optimizer)
        for epoch in loader.epochs():
            for batch in epoch:
                a, b = batch.to(where, non_blocking=True).data
                (loss_of(model, a, b) * batch.weight).backward()
                if batch.ends_update:
                    optimizer.step()
                    optimizer.zero_grad()
        return model, optimizer

    model, optimizer = train(device.device)
    with device.on_cpu():
        twin, reference = train(torch.device("cpu"))
    assert optimizer.sync() == reference.clock() == (plan.total_updates, 6 * SAMPLES)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=2e-2, atol=2e-2)  # other kernels, 168 updates
    return f"{plan.total_updates} updates"


def check_autocast(device: Device, make: Make) -> str:
    x, y = (t.to(device.device) for t in data())
    model = network(device.device)
    optimizer = make(model.parameters())
    kind = device.device.type
    scaler = torch.amp.GradScaler(kind, init_scale=2.0**40, growth_interval=30)
    begin = float(loss_of(model, x, y))
    skipped = 0
    for _ in range(80):
        with torch.autocast(kind, torch.float16 if kind == "cuda" else torch.bfloat16):
            loss = loss_of(model, x, y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        skipped += optimizer.last_step_skipped
    end = float(loss_of(model, x, y))
    assert optimizer.sync().updates == 80 - skipped
    assert end < 0.8 * begin, (begin, end)
    if kind == "cuda":
        assert skipped > 0
    return f"loss {begin:.2f} to {end:.2f}, {skipped} steps skipped"


def check_compiled_model(device: Device, make: Make) -> str:
    """Around the model; the step stays outside, as PyTorch's own optimizers do."""
    x, y = (t.to(device.device) for t in data())
    options: dict[str, Any] = (
        {"mode": "reduce-overhead"} if device.device.type == "cuda" else {"backend": "eager"}
    )
    losses = []
    for compiled in (False, True):
        model = network(device.device)
        forward = torch.compile(model, **options) if compiled else model
        optimizer = make(model.parameters())
        for _ in range(20):
            loss_of(forward, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss_of(model, x, y)))
        assert optimizer.sync().updates == 20
    assert abs(losses[0] - losses[1]) < 0.02 * losses[0], losses
    return f"loss {losses[0]:.4f}, compiled {losses[1]:.4f}"


def check_whole_step_in_a_graph(device: Device, make: Make) -> str:
    """Forward, backward and update, captured once."""
    x, y = (t.to(device.device) for t in data())
    model, twin = network(device.device), network(device.device)
    optimizer = make(model.parameters())
    reference = make(twin.parameters())

    def run(net: torch.nn.Module, opt: fastlr.FusedOptimizer) -> None:
        opt.zero_grad(set_to_none=False)
        loss_of(net, x, y).backward()
        opt.step()

    replay = device.capture(lambda: run(model, optimizer))
    for _ in range(30):
        replay()
    for _ in range(33):
        run(twin, reference)
    assert optimizer.sync() == reference.sync() == (33, 0)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-3)
    return f"rate {optimizer.param_groups[0]['lr']:.4g}"


def check_synchronisations(device: Device, make: Make) -> str:
    """None in a step, with a scaler or without, nor in what belongs to a loop."""
    x, y = (t.to(device.device) for t in data())
    model = network(device.device)
    optimizer = make(model.parameters())
    optimizer.measure_grad_norm = True
    scaler = torch.amp.GradScaler(device.device.type)

    def loop() -> None:
        scaler.scale(loss_of(model, x, y)).backward()
        optimizer.found_inf = torch.zeros((), device=device.device)
        optimizer.grad_scale = scaler._scale
        optimizer.step()
        del optimizer.found_inf, optimizer.grad_scale
        optimizer.step()
        optimizer.advance_samples(SAMPLES)
        optimizer.zero_grad()

    for _ in range(2):
        loop()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            loop()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.sync() == (10, 5 * SAMPLES)
    return "none in 6 steps"


def main() -> int:
    options = report.arguments(__doc__).parse_args()
    made = report.Report(options.result)
    device = open_device(options.backend)
    on_gpu = device.name == "cuda"
    checks: dict[str, Callable[[], object]] = {
        "growing batches": lambda: check_growing_batches(device, pinned=on_gpu),
    }
    for name, make in MAKES.items():
        checks |= {
            f"a range test, {name}": lambda make=make: check_range_test(device, make),
            f"autocast with GradScaler, {name}": lambda make=make: check_autocast(device, make),
        }
        if on_gpu:  # these need PyTorch's streams
            checks |= {
                f"synchronisations, {name}": lambda make=make: check_synchronisations(device, make),
                f"forward, backward and update in one graph, {name}": (
                    lambda make=make: check_whole_step_in_a_graph(device, make)
                ),
            }
        checks[f"a compiled model, {name}"] = lambda make=make: check_compiled_model(device, make)
    for name, check in checks.items():
        made.check(name, check)
    return made.finish()


if __name__ == "__main__":
    sys.exit(main())
