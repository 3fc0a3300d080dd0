"""A small net that reads real digits, and the digits, for runs whose outcome is to be judged by accuracy."""

from __future__ import annotations

import torch
from digits import images
from torch import nn
from torch.nn import functional

from edgeprune.load import ArrayBatches


def net() -> nn.Sequential:
    """For (n, 1, 16, 16)."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.Conv2d(24, 40, 3, stride=2, padding=1), nn.BatchNorm2d(40), nn.ReLU()),
        *(nn.Conv2d(40, 40, 3, padding=1), nn.BatchNorm2d(40), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10)),
    )


class Source:
    """1 000 digits to train on, 400 that decide, the rest to test on; at twice their size."""

    labels = tuple("0123456789")

    def __init__(self) -> None:
        x, y = images(shuffled=True)
        x = functional.interpolate(x, scale_factor=2.0)
        self.train = ArrayBatches(x[:1000], y[:1000], batch=50, shuffle=True)
        self.calibration = ArrayBatches(x[1000:1400], y[1000:1400], batch=50)
        self.test = ArrayBatches(x[1400:], y[1400:], batch=50)
