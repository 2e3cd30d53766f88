"""``torch.optim.lr_scheduler.ReduceLROnPlateau`` with its defaults, on top of a schedule.

The rate is multiplied by 0.1 once more than 10 epochs in a row have not made the loss 0.01 % smaller than the
smallest so far. The factors that were applied stand in the optimizer's checkpoint, with its schedule.
"""

from __future__ import annotations

import math

import torch

import fastlr


class Plateau:
    """What the training loop's own checkpoint keeps of it is ``vars(plateau)``."""

    def __init__(self) -> None:
        self.best, self.bad_epochs = math.inf, 0

    def step(self, opt: fastlr.FusedOptimizer, loss: float) -> None:
        if loss < self.best * (1.0 - 1e-4):
            self.best, self.bad_epochs = loss, 0
            return
        self.bad_epochs += 1
        if self.bad_epochs > 10:
            self.bad_epochs = 0
            for place, group in enumerate(opt.param_groups):
                if group["lr"] - 0.1 * group["lr"] > 1e-8:  # its eps
                    opt.scale_lr(0.1, group=place)


def main() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(256, 8), torch.randn(256, 1)
    model = torch.nn.Linear(8, 1)
    warm_up = fastlr.LinearRamp(0.0, 0.5, 50).then(fastlr.Constant(0.5))
    opt, plateau = fastlr.FusedSGD(model.parameters(), lr=warm_up, momentum=0.9), Plateau()
    for epoch in range(1, 61):
        for rows in torch.arange(256).split(64):
            opt.zero_grad()
            torch.nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
            opt.step()
        with torch.no_grad():
            loss = torch.nn.functional.mse_loss(model(x), y).item()
        plateau.step(opt, loss)
        if epoch % 10 == 0:
            print(f"epoch {epoch}: loss {loss:.4f}, lr {opt.param_groups[0]['lr']:.4f}")


if __name__ == "__main__":
    main()
