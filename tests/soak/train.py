"""A training as docs/growing.md shows it, which goes on from its checkpoint where there is one.

Run by test_kills.py: ``train.py folder cyclic|plan|adamw workers``.
"""

import os
import sys

import torch

import fastlr

folder, kind, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
path = f"{folder}/checkpoint.pt"

torch.manual_seed(0)
inputs, targets = torch.randn(96, 6), torch.randint(0, 3, (96,))
dataset = torch.utils.data.TensorDataset(inputs, targets)
model = torch.nn.Sequential(
    torch.nn.Linear(6, 256),
    torch.nn.BatchNorm1d(256),
    torch.nn.ReLU(),
    torch.nn.Dropout(0.3),
    torch.nn.Linear(256, 256),
    torch.nn.ReLU(),
    torch.nn.Linear(256, 3),
)
plan = fastlr.BatchPlan.from_schedule(
    fastlr.StepDecay(0.1, every=2, gamma=0.5, unit="epoch"),
    batch_size=8,
    dataset_size=len(dataset),
    epochs=6,
    momentum=0.9,
    max_batch_size=20,
    scaling="sqrt" if kind == "adamw" else "linear",
)
if kind == "cyclic":
    optimizer = fastlr.FusedCyclicSGD(
        model.parameters(), 0.01, 0.1, step_size_up=7, mode="triangular2", cycle_momentum=True
    )
elif kind == "adamw":
    optimizer = fastlr.FusedAdamW(
        model.parameters(), lr=plan.lr * 0.05, betas=(plan.momentum, 0.99), amsgrad=True
    )
else:
    optimizer = fastlr.FusedSGD(model.parameters(), lr=plan.lr, momentum=plan.momentum, weight_decay=1e-4)
batches = fastlr.GrowingLoader(dataset, plan, micro_batch_size=8, seed=0, num_workers=workers).bind(optimizer)


def state():
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "batches": batches.state_dict(),
        "rng": torch.get_rng_state(),
    }


if os.path.exists(path):
    checkpoint = torch.load(path, weights_only=True)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    batches.load_state_dict(checkpoint["batches"])
    torch.set_rng_state(checkpoint["rng"])

for epoch in batches.epochs():
    for batch in epoch:
        x, y = batch.data
        (torch.nn.functional.cross_entropy(model(x), y) * batch.weight).backward()
        if batch.ends_update:
            optimizer.step()
            optimizer.zero_grad()
            if optimizer.clock().updates % 3 == 0:
                torch.save(state(), f"{path}.new")
                os.replace(f"{path}.new", path)

torch.save({**state(), "clock": tuple(optimizer.clock())}, f"{folder}/end.pt")
