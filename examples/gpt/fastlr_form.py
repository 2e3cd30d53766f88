"""A GPT: AdamW in two groups, warm-up and cosine, clipping, accumulation, bfloat16 on GPUs.

With --data FILE of uint16 tokens; without, it learns a toy language.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import fastlr


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, length: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.places[: tokens.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)


def make_tokens(file: str | None) -> torch.Tensor:
    if file is not None:
        return torch.from_numpy(np.memmap(file, np.uint16, "r").astype(np.int64))
    tokens = [1, 2]  # each follows from the two before, but for some noise
    for noise in torch.randint(0, 16, (4000,)).tolist():
        tokens.append((3 * tokens[-1] + tokens[-2] + max(noise - 14, 0)) % 32)
    return torch.tensor(tokens)


def main(arguments: list[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", help="a file of uint16 tokens")
    parser.add_argument("--vocabulary", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--warmup-iterations", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--min-lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--grad-clip", type=float, default=1.0)
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    tokens = make_tokens(args.data)
    model = GPT(args.vocabulary, args.length, args.layers, args.width, args.heads).to(args.device)

    def get_batch() -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(len(tokens) - args.length, (args.batch_size, 1))
        rows = tokens[starts + torch.arange(args.length + 1)].to(args.device)
        return rows[:, :-1], rows[:, 1:]

    warmup = fastlr.LinearRamp(args.lr / (args.warmup_iterations + 1), args.lr, args.warmup_iterations)
    lr = warmup.then(fastlr.Cosine(args.lr, args.min_lr, args.iterations - args.warmup_iterations))

    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = fastlr.FusedAdamW(groups, lr=lr, betas=(0.9, 0.95), max_grad_norm=args.grad_clip)

    for it in range(args.iterations):
        mean = 0.0
        for _ in range(args.accumulate):
            x, y = get_batch()
            with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
                loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / args.accumulate
            loss.backward()
            mean += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        if it % 10 == 9:
            print(f"iteration {it}: loss {mean:.3f}, gradient norm {optimizer.last_grad_norm:.3f}")
    return {"weights": model.state_dict()}


if __name__ == "__main__":
    main()
