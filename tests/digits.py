"""Real handwritten digits (scikit-learn), for tests that train."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from edgeprune.load import ArrayBatches


@cache
def _load() -> tuple[torch.Tensor, torch.Tensor]:
    sklearn = pytest.importorskip("sklearn.datasets", reason="real digits come with scikit-learn")
    bunch = sklearn.load_digits()
    return torch.from_numpy(bunch.images).float()[:, None] / 16, torch.from_numpy(bunch.target).long()


def images(*, shuffled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """All 1 797, (n, 1, 8, 8) in [0, 1], and their classes; as scikit-learn has them, or in another, fixed order.

    A copy for each caller: some tests break their images.
    """
    x, y = _load()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(y), generator=generator) if shuffled else torch.arange(len(y))
    return x[order], y[order]


class Digits:
    """800 to train on, 300 to test on, (n, 1, 8, 8) in [0, 1]."""

    calibration = None

    def __init__(self) -> None:
        x, y = images(shuffled=False)
        self.train = ArrayBatches(x[:800], y[:800], batch=50, shuffle=True)
        self.test = ArrayBatches(x[800:1100], y[800:1100])


@cache
def digits() -> Digits:
    """The same ones for all tests of a process."""
    return Digits()
