"""
The range test
==============

The rate rises with every update until training breaks down. What the curve says are the bounds of a
cyclic rate, and the model is afterwards what it was before.
"""

import math

import torch

import fastlr

torch.manual_seed(0)
angle, arm = torch.rand(4000) * 1.5 * math.pi, torch.randint(0, 3, (4000,))
turned = angle + arm * 2 * math.pi / 3
x = torch.stack([angle * turned.cos(), angle * turned.sin()], dim=1) / 3 + torch.randn(4000, 2) * 0.1
data = torch.utils.data.TensorDataset(x, arm)  # three spirals
train, held_out = torch.utils.data.random_split(data, [3200, 800])
loader = torch.utils.data.DataLoader(train, batch_size=16, shuffle=True)
val_loader = torch.utils.data.DataLoader(held_out, batch_size=200)

model = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU())
model.append(torch.nn.Linear(64, 3))
optimizer = fastlr.FusedSGD(model.parameters(), momentum=0.9)
found = fastlr.range_test(
    model,
    optimizer,
    torch.nn.functional.cross_entropy,
    loader,
    val_loader,
    start_lr=1e-5,
    end_lr=10.0,
    num_steps=400,
    val_every=5,
    progress=False,
)
figure = found.plot()

# %%
# In words, and as a schedule:
print(found.summary())
optimizer.set_schedule(found.triangular2(step_size_up=4 * len(loader)))
print(optimizer.param_groups[0]["lr"])
