"""The layers of a model whose weights can be zero in places, as matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from edgeprune.core.errors import UsageError

LEAST_WEIGHTS = 256
"""Smaller layers stay dense: nothing is won by them, and much may be lost."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution or linear layer. transposed: its weight is (in, out, ...) instead of (out, in, ...)."""

    weight: nn.Parameter
    transposed: bool = False

    def matrix(self, tensor: Tensor | None = None) -> Tensor:
        """(out, places, in) of the weight, or of a tensor of its shape."""
        given = self.weight.detach() if tensor is None else tensor
        given = given.transpose(0, 1) if self.transposed else given
        return given.movedim(1, -1).reshape(given.shape[0], -1, given.shape[1])

    def shaped(self, matrix: Tensor) -> Tensor:
        """The tensor, of the weight's shape, whose matrix it is."""
        shape = self.weight.transpose(0, 1).shape if self.transposed else self.weight.shape
        tensor = matrix.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
        return (tensor.transpose(0, 1) if self.transposed else tensor).contiguous()


def find_layers(module: nn.Module, chosen: Sequence[str]) -> tuple[dict[str, Layer], dict[str, str]]:
    """Convolutions and linear layers by the key of their weight; of others among them, why they stay dense.

    chosen: shell patterns of paths. raises: UsageError for one that names no layer.
    """
    layers: dict[str, Layer] = {}
    skipped: dict[str, str] = {}
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    candidates = {path: layer for path, layer in module.named_modules() if isinstance(layer, kinds)}
    if unknown := [name for name in chosen if not any(fnmatchcase(path, name) for path in candidates)]:
        raise UsageError(f"layers: '{unknown[0]}' names no convolution or linear layer of the model")
    for path, layer in candidates.items():
        key = f"{path}.weight" if path else "weight"
        transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
        weight = layer._parameters.get("weight")
        groups = getattr(layer, "groups", 1)
        if not any(fnmatchcase(path, name) for name in chosen):
            skipped[key] = "not chosen"
        elif weight is None:
            skipped[key] = "its weight is computed when it runs"
        elif groups > 1 and layer.in_channels == groups:
            skipped[key] = "depthwise: one input channel a filter"
        elif groups > 1 and transposed:
            skipped[key] = "transposed and grouped"
        elif weight.numel() < LEAST_WEIGHTS:
            skipped[key] = f"small: {weight.numel()} weights, fewer than {LEAST_WEIGHTS}"
        elif any(weight is other.weight for other in layers.values()):
            skipped[key] = "shares the weight of another layer"
        else:
            layers[key] = Layer(weight, transposed)
    return layers, skipped
