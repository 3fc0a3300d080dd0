"""At most N of every M neighbouring input channels at each place of a filter: 2:4 is what sparse tensor cores take
(Mishra et al., 2021, arXiv:2104.08378)."""

from __future__ import annotations

import torch

from edgeprune.core.errors import UsageError
from edgeprune.core.records import Graph, IntArray
from edgeprune.patterns import Layer, Layers, Masks, Pattern
from edgeprune.patterns._permutation import better_orders
from edgeprune.patterns._training import Remembered, Sparsifier, check_choice

TRAININGS = ("hold", "sr_ste")


def make(
    *, layers: str = "*", n: int = 2, m: int = 4, permute: bool = True, training: str = "hold", decay: float = 2e-4
) -> Pattern:
    """The N largest of every M are kept.

    n, m:     1 <= n < m.
    permute:  first look for orders of channels that keep more magnitude (Pool & Yu, NeurIPS 2021); the layers that
              make the channels take the same order, so the dense model computes what it did.
    training: `hold`: zeros at once, which stay; `sr_ste`: masks follow dense weights (Zhou et al., ICLR 2021).
    decay:    >= 0, of sr_ste, of weights that are masked.
    raises:   UsageError.
    """
    if not 1 <= n < m:
        raise UsageError(f"n_m: n={n},m={m}: n of m weights are kept, so n is at least 1 and less than m, as n=2,m=4")
    if not decay >= 0:
        raise UsageError(f"n_m: decay={decay} must be 0 or more")
    check_choice("n_m", "training", training, TRAININGS)
    return _NM(layers, n, m, permute, training, decay)


class _NM(Pattern):
    def __init__(self, layers: str, n: int, m: int, permute: bool, training: str, decay: float) -> None:
        super().__init__(layers)
        self.n, self.m, self.permute, self.training, self.decay = n, m, permute, training, decay

    def refuses(self, layer: Layer) -> str | None:
        channels = layer.matrix().shape[2]
        return f"{channels} input channels are not divisible by {self.m}" if channels % self.m else None

    def masks(self, layers: Layers) -> Masks:
        found = {}
        for name, layer in layers.items():
            groups = layer.matrix().abs().unflatten(2, (-1, self.m))
            kept = torch.zeros_like(groups, dtype=torch.bool)
            kept.scatter_(3, groups.argsort(dim=3, descending=True, stable=True)[..., : self.n], True)
            found[name] = layer.shaped(kept.flatten(2))
        return found

    def orders(self, layers: Layers, graph: Graph) -> dict[str, IntArray]:
        return better_orders(layers, graph, self.n, self.m) if self.permute else {}

    def sparsifier(self, layers: Layers, steps: int) -> Sparsifier:
        if self.training == "sr_ste":
            return Remembered(layers, self.masks, steps, decay=self.decay)
        return super().sparsifier(layers, steps)
