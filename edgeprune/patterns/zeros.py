"""What is zero stays zero: for a model that something else made sparse."""

from __future__ import annotations

from edgeprune.patterns import Layers, Masks, Pattern


def make(*, layers: str = "*") -> Pattern:
    """The weights that are not zero are kept."""
    return _Zeros(layers)


class _Zeros(Pattern):
    def masks(self, layers: Layers) -> Masks:
        return {name: layer.weight.detach() != 0 for name, layer in layers.items()}
