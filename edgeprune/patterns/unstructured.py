"""Single weights, the smallest first (Han et al., NIPS 2015, arXiv:1506.02626)."""

from __future__ import annotations

from edgeprune.patterns import Layers, Masks, Pattern
from edgeprune.patterns._magnitude import SCOPES, check_sparsity, keep_largest
from edgeprune.patterns._training import Gradual, Regrown, Remembered, Sparsifier, check_choice

TRAININGS = ("hold", "gradual", "regrow", "surgery")


def make(*, layers: str = "*", sparsity: float = 0.8, scope: str = "layer", training: str = "hold") -> Pattern:
    """The weights of largest magnitude are kept.

    sparsity: in (0, 1), share of the weights that are zero.
    scope:    `layer`: of each layer; `global`: of all together, at least a hundredth of each kept.
    training: `hold`: zeros at once, which stay; `gradual`: along a cubic (Zhu & Gupta, 2017); `regrow`: connections
              move to where the gradient is largest (RigL, 2020); `surgery`: masked weights are trained on and may come
              back (Guo et al., 2016).
    raises:   UsageError.
    """
    check_sparsity("unstructured", sparsity)
    check_choice("unstructured", "scope", scope, SCOPES)
    check_choice("unstructured", "training", training, TRAININGS)
    return _Unstructured(layers, sparsity, scope, training)


class _Unstructured(Pattern):
    def __init__(self, layers: str, sparsity: float, scope: str, training: str) -> None:
        super().__init__(layers)
        self.sparsity, self.scope, self.training = sparsity, scope, training

    def masks(self, layers: Layers) -> Masks:
        return self.masks_at(layers, 1.0)

    def masks_at(self, layers: Layers, share: float) -> Masks:
        sizes = {name: layer.weight.detach().abs() for name, layer in layers.items()}
        return keep_largest(sizes, self.sparsity * share, self.scope)

    def sparsifier(self, layers: Layers, steps: int) -> Sparsifier:
        if self.training == "gradual":
            return Gradual(layers, self.masks, steps, self.masks_at)
        if self.training == "regrow":
            return Regrown(layers, self.masks, steps)
        if self.training == "surgery":
            return Remembered(layers, self.masks, steps, loyal=True)
        return super().sparsifier(layers, steps)
