"""One layer stands in for its own removed inputs: the OBS step over input channels, for loss curves.

Needs only the layer's inputs, so the Gram matrix is collected once and serves every width
(Frantar and Alistarh, NeurIPS 2022, arXiv:2208.11580; ZipLM, NeurIPS 2023, arXiv:2302.04089).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgeprune.compensation._rows import CHUNK_BYTES, MAX_FEATURES, Layer, count_positions, unfold


def collect_gram(layer: Layer, x: Tensor) -> Tensor | None:
    """XᵀX per convolution group (G, d, d), in float64, of a layer's unfolded inputs; a column of ones for a bias.

    Positions are thinned out evenly to 16 a feature, more tell little; the sums are scaled up accordingly.
    None when it would be larger than MAX_FEATURES on a side.
    """
    features, groups = layer.weight[0].numel(), 1 if isinstance(layer, nn.Linear) else layer.groups
    if features > MAX_FEATURES:
        return None
    size = features + (layer.bias is not None)
    gram = torch.zeros(groups, size, size, dtype=torch.float64)
    per_example = count_positions(layer, x[:1])
    stride = max(1, len(x) * per_example // (16 * features))
    step = max(1, CHUNK_BYTES // max(1, per_example * features * groups * 4))
    for start in range(0, len(x), step):
        rows = unfold(layer, x[start : start + step])
        positions = rows.shape[1]
        # A stride that shares a factor with the image's width would always meet the same columns.
        rows = rows[:, torch.arange(0, positions, stride | 1)]
        if layer.bias is not None:
            rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2)
        gram.add_(rows.transpose(1, 2) @ rows, alpha=positions / rows.shape[1])
    return gram


def explain_removed(layer: Layer, gram: Tensor, removed: Tensor, damping: float) -> None:
    """Let the remaining inputs of a layer stand in for removed input channels, in place.

    With X = [X_k X_r] the change of the kept weights is (X_kᵀX_k + λ)⁻¹ X_kᵀX_r W_r; a system that
    cannot be solved changes nothing. The removed weights are left for the caller to clear.

    gram: (d, d) of a layer without groups, from `collect_gram`, summed over batches.
    removed: positions along weight axis 1.
    """
    kept = torch.ones(layer.weight.shape[1], dtype=torch.bool)
    kept[removed] = False
    explain_masked(layer, gram, kept.expand(len(layer.weight), -1), damping)


def explain_masked(layer: Layer, gram: Tensor, kept: Tensor, damping: float) -> None:
    """As `explain_removed`, where each output has inputs of its own that it keeps.

    kept: bool (outputs, inputs). Outputs that keep the same inputs are solved together.
    """
    taps = layer.weight[0, 0].numel()
    matrix = layer.weight.detach().reshape(len(layer.weight), -1).double()
    if layer.bias is not None:
        matrix = torch.cat([matrix, layer.bias.detach().double()[:, None]], dim=1)
    for pattern in kept.unique(dim=0):
        rows = (kept == pattern).all(dim=1)
        there = torch.ones(len(gram), dtype=torch.bool)
        there[: taps * len(pattern)] = pattern.repeat_interleave(taps)
        change = _stand_in(gram, there, matrix[rows], damping)
        if change is not None:
            matrix[rows] += change
    features = layer.weight[0].numel()
    layer.weight.copy_(matrix[:, :features].reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(matrix[:, features])


def _stand_in(gram: Tensor, kept: Tensor, rows: Tensor, damping: float) -> Tensor | None:
    """The change of (rows, d) of which the features `kept` (d,) take over what the others did; None if unsolvable."""
    gone = ~kept
    block = gram[kept][:, kept]
    strength = damping * block.diagonal().mean().clamp_min(1e-12)
    factor, failed = torch.linalg.cholesky_ex(block + strength * torch.eye(len(block), dtype=block.dtype))
    if bool(failed) or not bool(kept.any()):
        return None
    found = torch.cholesky_solve(gram[kept][:, gone] @ rows[:, gone].T, factor)
    if not bool(torch.isfinite(found).all()):
        return None
    change = torch.zeros_like(rows)
    change[:, kept] = found.T
    return change
