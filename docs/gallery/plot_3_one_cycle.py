"""
One cycle
=========

``one_cycle`` makes a pair: the rate rises and falls, the momentum goes against it. The optimizer's step
moves both.
"""

import math

import torch

import fastlr

lr, momentum = fastlr.one_cycle(max_lr=0.2, total_steps=600)
figure = lr.plot()

# %%
figure = momentum.plot()

# %%
# A training of three spirals with it. What is logged is read before the step: the rate of that update.
torch.manual_seed(0)
angle, arm = torch.rand(3200) * 1.5 * math.pi, torch.randint(0, 3, (3200,))
turned = angle + arm * 2 * math.pi / 3
x = torch.stack([angle * turned.cos(), angle * turned.sin()], dim=1) / 3 + torch.randn(3200, 2) * 0.1
model = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
optimizer = fastlr.FusedSGD(model.parameters(), lr=lr, momentum=momentum, nesterov=True)

for update in range(600):
    chosen = torch.randint(0, 3200, (32,))
    loss = torch.nn.functional.cross_entropy(model(x[chosen]), arm[chosen])
    if update % 100 == 0 or update == 599:
        group = optimizer.param_groups[0]
        print(f"{update:3}: lr {group['lr']:.4f}, momentum {group['momentum']:.3f}, loss {loss:.3f}")
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

accuracy = (model(x).argmax(dim=1) == arm).double().mean()
print(f"accuracy {accuracy:.1%} after {optimizer.clock().updates} updates")
