"""Shapes of the parameters of well-known networks, without the networks."""

from __future__ import annotations

from itertools import pairwise

Shape = tuple[int, ...]


def mlp() -> list[Shape]:
    """784-128-64-10, 6 tensors."""
    widths = [784, 128, 64, 10]
    return [s for i, o in pairwise(widths) for s in ((o, i), (o,))]


def _batch_norm(channels: int) -> list[Shape]:
    return [(channels,), (channels,)]


def _resnet(blocks: list[int], *, bottleneck: bool) -> list[Shape]:
    """He et al., arXiv 1512.03385, table 1; without biases of convolutions."""
    expansion = 4 if bottleneck else 1
    shapes: list[Shape] = [(64, 3, 7, 7), *_batch_norm(64)]
    inputs = 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        for block in range(count):
            kernels = [(inputs, 1), (width, 3), (width, 1)] if bottleneck else [(inputs, 3), (width, 3)]
            for k, (channels, size) in enumerate(kernels):
                out = width * expansion if k == len(kernels) - 1 else width
                shapes += [(out, channels, size, size), *_batch_norm(out)]
            if block == 0 and (stage > 0 or bottleneck):
                shapes += [(width * expansion, inputs, 1, 1), *_batch_norm(width * expansion)]
            inputs = width * expansion
    return [*shapes, (1000, inputs), (1000,)]


def resnet18() -> list[Shape]:
    """62 tensors, 11.7 M."""
    return _resnet([2, 2, 2, 2], bottleneck=False)


def resnet50() -> list[Shape]:
    """161 tensors, 25.6 M."""
    return _resnet([3, 4, 6, 3], bottleneck=True)


def gpt2_small() -> list[Shape]:
    """148 tensors, 124 M; the output layer shares the embedding."""
    width = 768
    layer: list[Shape] = [
        *_batch_norm(width),
        (width, 3 * width),
        (3 * width,),
        (width, width),
        (width,),
        *_batch_norm(width),
        (width, 4 * width),
        (4 * width,),
        (4 * width, width),
        (width,),
    ]
    return [(50257, width), (1024, width), *(layer * 12), *_batch_norm(width)]


PARAMETER_SETS: dict[str, list[Shape]] = {
    "1,000 tensors of 64": [(64,)] * 1000,
    "161 tensors of 64": [(64,)] * 161,
    "MLP, 6 tensors": mlp(),
    "ResNet-18": resnet18(),
    "ResNet-50": resnet50(),
    "GPT-2 small": gpt2_small(),
}
