"""Whole tiles of the matrix (out, places x in), the smallest first (Gray et al., 2017; Narang et al., 2017,
arXiv:1711.02782)."""

from __future__ import annotations

from edgeprune.core.errors import UsageError
from edgeprune.patterns import Layer, Layers, Masks, Pattern
from edgeprune.patterns._magnitude import SCOPES, check_sparsity, keep_largest
from edgeprune.patterns._training import Gradual, Sparsifier, check_choice

TRAININGS = ("hold", "gradual")


def make(
    *, layers: str = "*", rows: int = 1, columns: int = 4, sparsity: float = 0.5, scope: str = "layer",
    training: str = "hold",
) -> Pattern:  # fmt: skip
    """Tiles of the largest root mean square are kept.

    rows:     >= 1, neighbouring filters of a tile. columns: >= 1, its neighbouring input channels, at one place of the
              kernel.
    sparsity: in (0, 1), share of the tiles that are zero. scope, training: as of `unstructured`.
    raises:   UsageError.
    """
    if rows < 1 or columns < 1 or rows * columns < 2:
        raise UsageError(f"block: rows={rows},columns={columns}: a tile has at least two weights, as rows=1,columns=4")
    check_sparsity("block", sparsity)
    check_choice("block", "scope", scope, SCOPES)
    check_choice("block", "training", training, TRAININGS)
    return _Block(layers, rows, columns, sparsity, scope, training)


class _Block(Pattern):
    def __init__(self, layers: str, rows: int, columns: int, sparsity: float, scope: str, training: str) -> None:
        super().__init__(layers)
        self.rows, self.columns = rows, columns
        self.sparsity, self.scope, self.training = sparsity, scope, training

    def refuses(self, layer: Layer) -> str | None:
        out, _, channels = layer.matrix().shape
        if out % self.rows:
            return f"{out} filters are not divisible by {self.rows}"
        return f"{channels} input channels are not divisible by {self.columns}" if channels % self.columns else None

    def masks(self, layers: Layers) -> Masks:
        return self.masks_at(layers, 1.0)

    def masks_at(self, layers: Layers, share: float) -> Masks:
        scores = {}
        for name, layer in layers.items():
            out, places, channels = (matrix := layer.matrix()).shape
            tiles = matrix.reshape(out // self.rows, self.rows, places, channels // self.columns, self.columns)
            scores[name] = tiles.square().mean(dim=(1, 4))
        kept = keep_largest(scores, self.sparsity * share, self.scope)
        return {
            name: layers[name].shaped(tiles.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 2))
            for name, tiles in kept.items()
        }

    def sparsifier(self, layers: Layers, steps: int) -> Sparsifier:
        if self.training == "gradual":
            return Gradual(layers, self.masks, steps, self.masks_at)
        return super().sparsifier(layers, steps)
