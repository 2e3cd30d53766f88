"""A one-stage detector in three groups, each warmed up batch by batch as YOLO's recipe has it.

Biases come down from a high rate while the others rise from 0, and momentum rises. It finds squares in noise.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastlr


class Detector(nn.Module):
    """For each cell of 4 x 4 pixels: whether an object's center is there, where in it, and how large."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, width, stride in ((1, 16, 2), (16, 32, 2), (32, 32, 1)):
            layers += [nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.SiLU()]
        self.backbone = nn.Sequential(*layers)
        self.head = nn.Conv2d(32, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))


def make_images(count: int) -> TensorDataset:
    """Noise with a square each, and what the detector is to say: (4, 8, 8)."""
    images, targets = torch.randn(count, 1, 32, 32), torch.zeros(count, 4, 8, 8)
    sizes, centers = torch.randint(3, 7, (count,)).tolist(), torch.randint(6, 26, (count, 2)).tolist()
    for image, target, size, (y, x) in zip(images, targets, sizes, centers, strict=True):
        image[0, y - size // 2 :, x - size // 2 :][:size, :size] += 2.0
        target[:, y // 4, x // 4] = torch.tensor([1.0, y % 4 / 4, x % 4 / 4, size / 8])
    return TensorDataset(images, targets)


def loss_of(found: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    there = target[:, :1]
    objectness = F.binary_cross_entropy_with_logits(found[:, :1], there, pos_weight=there.new_tensor(32.0))
    boxes = ((found[:, 1:].sigmoid() - target[:, 1:]).abs() * there).sum() / there.sum()
    return objectness + boxes


def main(arguments: list[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr0", type=float, default=0.01, help="after the warm-up")
    parser.add_argument("--lrf", type=float, default=0.01, help="what becomes of it")
    parser.add_argument("--momentum", type=float, default=0.937)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--warmup-epochs", type=int, default=3)
    parser.add_argument("--warmup-momentum", type=float, default=0.8)
    parser.add_argument("--warmup-bias-lr", type=float, default=0.1)
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    loader = DataLoader(make_images(args.images), args.batch_size, shuffle=True)
    model = Detector().to(args.device)

    weights, norms, biases = [], [], []
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            norm = isinstance(module, nn.BatchNorm2d)
            (biases if name == "bias" else norms if norm else weights).append(p)
    nb = len(loader)
    nw = args.warmup_epochs * nb

    decay = fastlr.LinearRamp(args.lr0, args.lr0 * args.lrf, args.epochs, unit="epoch").in_updates(nb)

    def warmed_up(start: float) -> fastlr.Schedule:
        ramp = fastlr.Tabulated(lambda ni: np.interp(ni, [0, nw], [start, decay(ni)]), nw)
        return ramp.then(fastlr.schedules.Shifted(decay, nw))

    groups = [
        {"params": biases, "lr": warmed_up(args.warmup_bias_lr)},
        {"params": norms, "lr": warmed_up(0.0)},
        {"params": weights, "lr": warmed_up(0.0), "weight_decay": args.weight_decay},
    ]
    momentum = fastlr.LinearRamp(args.warmup_momentum, args.momentum, nw).then(fastlr.Constant(args.momentum))
    optimizer = fastlr.FusedSGD(groups, momentum=momentum, nesterov=True)

    for epoch in range(args.epochs):
        total = 0.0
        for x, y in loader:
            loss = loss_of(model(x.to(args.device)), y.to(args.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        print(f"epoch {epoch}: loss {total / nb:.3f}")
    return {"weights": model.state_dict()}


if __name__ == "__main__":
    main()
