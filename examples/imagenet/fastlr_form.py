"""Image classification: SGD with warm-up and cosine, averaged weights, mixed precision, resume.

With --data FOLDER --arch resnet50, which needs torchvision; without them it trains a toy.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fastlr


def make_model(arch: str) -> nn.Module:
    if arch != "tiny":
        from torchvision.models import get_model

        return get_model(arch)
    layers: list[nn.Module] = []
    for channels, width in ((3, 16), (16, 32)):
        layers += [nn.Conv2d(channels, width, 3, stride=2, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))


def make_datasets(folder: str | None) -> tuple[Dataset, Dataset]:
    if folder is None:  # noise with a bright quarter, which is the class
        labels = torch.randint(0, 4, (320,))
        images = torch.randn(320, 3, 16, 16)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[:, label // 2 * 8 :, label % 2 * 8 :][:, :8, :8] += 0.5
        return TensorDataset(images[:256], labels[:256]), TensorDataset(images[256:], labels[256:])
    from torchvision import datasets, transforms

    scale = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    train = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), *scale]
    val = [transforms.Resize(256), transforms.CenterCrop(224), *scale]
    return (
        datasets.ImageFolder(f"{folder}/train", transforms.Compose(train)),
        datasets.ImageFolder(f"{folder}/val", transforms.Compose(val)),
    )


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader, device: str) -> float:
    model.eval()
    right = [model(x.to(device)).argmax(1) == y.to(device) for x, y in loader]
    return torch.cat(right).float().mean().item()


def main(arguments: list[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", help="a folder with train/ and val/")
    parser.add_argument("--arch", default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--warmup-epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--ema-decay", type=float, default=0.95)
    parser.add_argument("--checkpoint", help="file to write after each epoch")
    parser.add_argument("--resume", help="file to go on from")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    device = args.device
    half = torch.float16 if device == "cuda" else torch.bfloat16
    train, val = make_datasets(args.data)
    loader = DataLoader(train, args.batch_size, shuffle=True, num_workers=args.workers, drop_last=True)
    val_loader = DataLoader(val, args.batch_size, num_workers=args.workers)
    model = make_model(args.arch).to(device)
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)

    warmup = fastlr.LinearRamp(0.1 * args.lr, args.lr, args.warmup_epochs, unit="epoch")
    cosine = fastlr.Cosine(args.lr, 0.0, args.epochs - args.warmup_epochs, unit="epoch")
    optimizer = fastlr.FusedSGD(
        model.parameters(),
        lr=warmup.then(cosine),
        momentum=0.9,
        nesterov=True,
        weight_decay=args.weight_decay,
        ema_decay=args.ema_decay,
    )
    scaler = fastlr.GradScaler(device)

    first_epoch = 0
    if args.resume:
        checkpoint = torch.load(args.resume, map_location=device)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        first_epoch = checkpoint["epoch"] + 1

    for epoch in range(first_epoch, args.epochs):
        torch.manual_seed(epoch)  # a resumed run sees what it would have seen
        model.train()
        for x, y in loader:
            with torch.autocast(device, half):
                loss = loss_fn(model(x.to(device)), y.to(device))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.advance_epoch()
        with optimizer.averaged_weights():
            averaged = accuracy(model, val_loader, device)
        print(f"epoch {epoch}: accuracy {accuracy(model, val_loader, device):.3f}, averaged {averaged:.3f}")
        if args.checkpoint:
            checkpoint = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "epoch": epoch,
            }
            torch.save(checkpoint, args.checkpoint)
    return {"weights": model.state_dict(), "averages": optimizer.averaged_state_dict(model)}


if __name__ == "__main__":
    main()
