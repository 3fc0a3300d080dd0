"""Chance: what any other criterion has to beat."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from edgeprune.criteria import GroupView

NEEDS: str | None = None


def score(views: Sequence[GroupView], *, seed: int = 0) -> Tensor:
    """Uniform random numbers in [0, 1), the same each time for the same group and seed.

    views:   only the first one's name is read.
    returns: (units,).
    source:  the baseline of Mittal et al., WACV 2018, arXiv:1801.10447.
    """
    # hash() of a string differs from one process to the next.
    generator = torch.Generator().manual_seed(seed + zlib.crc32(views[0].parameter.encode()))
    return torch.rand(len(views[0].weight), generator=generator)
