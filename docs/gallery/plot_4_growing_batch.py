"""
Growing the batch
=================

A plan turns a schedule whose rate falls into batches that grow: the noise of the gradient goes the same way,
in fewer updates.
"""

import math

import torch

import fastlr

falling = fastlr.MultiStep(0.05, [4, 8, 10], 0.2, unit="epoch")
common = {"batch_size": 8, "dataset_size": 1600, "epochs": 12, "momentum": 0.9, "max_batch_size": 200}
plan = fastlr.BatchPlan.from_schedule(falling, **common)
print(plan)
figure = plan.plot()

# %%
# Both ways, on three spirals, from the same weights:
torch.manual_seed(0)
angle, arm = torch.rand(1600) * 1.5 * math.pi, torch.randint(0, 3, (1600,))
turned = angle + arm * 2 * math.pi / 3
x = torch.stack([angle * turned.cos(), angle * turned.sin()], dim=1) / 3 + torch.randn(1600, 2) * 0.1
dataset = torch.utils.data.TensorDataset(x, arm)

for mode in ("decay", "increase"):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
    plan = fastlr.BatchPlan.from_schedule(falling, mode=mode, **common)
    optimizer = fastlr.FusedSGD(model.parameters(), lr=plan.lr, momentum=plan.momentum)
    for batch in fastlr.GrowingLoader(dataset, plan, seed=0).bind(optimizer):
        inputs, targets = batch.data
        (torch.nn.functional.cross_entropy(model(inputs), targets) * batch.weight).backward()
        if batch.ends_update:
            optimizer.step()
            optimizer.zero_grad()
    accuracy = (model(x).argmax(dim=1) == arm).double().mean()
    print(f"{mode}: accuracy {accuracy:.1%} after {optimizer.clock().updates:,} updates")
