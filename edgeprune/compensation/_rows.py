"""Convolutions and linear layers as matrix products: rows of unfolded inputs, one per output position."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

Layer = nn.Conv1d | nn.Conv2d | nn.Linear
CHUNK_BYTES = 64 << 20
"""Unfolded inputs in memory at a time."""
MAX_FEATURES = 8192
"""Layers with more inputs per output and more positions than this stay as sliced."""


def is_plain(layer: nn.Module) -> bool:
    """Whether the layer is a linear map of unfolded inputs that can be fitted here."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def count_positions(layer: Layer, x: Tensor) -> int:
    """How many output positions a layer has for these inputs, over all examples."""
    if isinstance(layer, nn.Linear):
        return x.numel() // x.shape[-1]
    size = len(x) if x.ndim == len(layer.kernel_size) + 2 else 1
    for axis, length in enumerate(x.shape[-len(layer.kernel_size) :]):
        span = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
        size *= (length + 2 * int(layer.padding[axis]) - span) // layer.stride[axis] + 1
    return size


def unfold(layer: Layer, x: Tensor) -> Tensor:
    """What the layer multiplies its weights with: (G, positions, d)."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    pairs = [layer.kernel_size, layer.dilation, layer.padding, layer.stride]
    if isinstance(layer, nn.Conv1d):
        x = x.unsqueeze(2)
        pairs = [(neutral, *pair) for neutral, pair in zip((1, 1, 0, 1), pairs, strict=True)]
    return by_group(layer, functional.unfold(x, *pairs))  # type: ignore[arg-type]


def by_group(layer: Layer, y: Tensor) -> Tensor:
    """Channels-first values (n, G·c, places...) or rows (..., c) as (G, positions, c)."""
    if isinstance(layer, nn.Linear):
        return y.reshape(1, -1, y.shape[-1])
    y = y.flatten(2).reshape(len(y), layer.groups, -1, y[0, 0].numel())
    return y.permute(1, 0, 3, 2).reshape(layer.groups, -1, y.shape[2])
