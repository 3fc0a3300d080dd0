"""Which entries are the smallest, in each layer or over all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edgeprune.core.errors import UsageError

SCOPES = ("layer", "global")
LEAST_KEPT = 0.01
"""Of a layer, where all compete: one that loses everything passes nothing on."""


def keep_largest(scores: Mapping[str, Tensor], sparsity: float, scope: str) -> dict[str, Tensor]:
    """Per layer a bool tensor like its scores, True for what stays when a share `sparsity` of the entries goes."""
    if scope == "layer":
        return {name: _largest(score, round((1 - sparsity) * score.numel())) for name, score in scores.items()}
    safe = {name: _largest(score, max(1, int(LEAST_KEPT * score.numel()))) for name, score in scores.items()}
    flat = [score.masked_fill(safe[name], torch.inf).flatten() for name, score in scores.items()]
    together = torch.cat(flat) if flat else torch.empty(0)
    kept = _largest(together, round((1 - sparsity) * together.numel())).split([len(part) for part in flat])
    return {name: part.view_as(scores[name]) for name, part in zip(scores, kept, strict=True)}


def _largest(scores: Tensor, count: int) -> Tensor:
    flat = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    flat[scores.flatten().argsort(descending=True, stable=True)[: max(count, 1)]] = True
    return flat.view_as(scores)


def check_sparsity(pattern: str, sparsity: float) -> None:
    """raises: UsageError outside of (0, 1)."""
    if not 0 < sparsity < 1:
        raise UsageError(f"{pattern}: sparsity={sparsity} must be above 0 and below 1")
