"""The demo's model and data: WRN-16-2 on scikit-learn's handwritten digits, upscaled to 32x32.

The stages are 32, 64 and 128 channels wide, so that half the latency is reachable on a runtime that
computes channels in blocks of 16. Everything is made here: nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.core.errors import UsageError
from edgeprune.core.progress import Progress, silent

CLASSES = tuple(str(digit) for digit in range(10))
RUN_FILE = """\
# Written by `edgeprune demo`; `edgeprune run {name}` runs it again.
[model]
factory = "edgeprune.demo:wrn16_2"
weights = "dense.safetensors"
inputs = [[1, 1, 32, 32]]
[data]
source = "edgeprune.demo:digits"
[target]
name = "embedded"
threads = 1
[budget]
latency = "{latency}"
[profile]
configurations = 16
held_out = 4
[search]
trials = 6
contenders = ["curves", "magnitude"]
[recover]
epochs = 4
[output]
dir = "."
"""


class PreActivationBlock(nn.Module):
    """A residual block that normalises before it convolves (Zagoruyko & Komodakis 2016, fig. 1a)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut = (
            nn.Conv2d(channels_in, channels, 1, stride, bias=False) if (channels_in, stride) != (channels, 1) else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Residual block: x (n, c_in, h, w) -> (n, c, h / stride, w / stride)."""
        activated = functional.relu(self.bn1(x))
        residual: Tensor = self.conv2(functional.relu(self.bn2(self.conv1(activated))))
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(activated)
        return residual + shortcut


class WideResNet(nn.Module):
    """WRN-16-2 for 32x32 images (Zagoruyko & Komodakis, BMVC 2016, arXiv:1605.07146)."""

    def __init__(self, channels_in: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, 16, 3, 1, 1, bias=False)
        blocks = []
        previous = 16
        for stage, channels in enumerate((32, 64, 128)):
            for depth in range(2):
                blocks.append(PreActivationBlock(previous, channels, 2 if stage and not depth else 1))
                previous = channels
        self.groups = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(previous)
        self.linear = nn.Linear(previous, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, c, 32, 32) -> logits (n, classes)."""
        x = functional.relu(self.bn(self.groups(self.conv1(x))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def wrn16_2() -> nn.Module:
    """The demo's network, untrained: 691 000 parameters, 101 million multiply-adds."""
    return WideResNet()


@dataclass(frozen=True)
class Batches:
    """Batches of (images, labels) that can be gone through any number of times.

    shift: largest random translation in pixels; > 0 also shuffles, anew on each pass. Both draw from
        torch's global generator, so that a resumed training sees what the uninterrupted one would.
    """

    images: Tensor
    labels: Tensor
    size: int = 64
    shift: int = 0

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(self.images))
        if self.shift:
            order = torch.randperm(len(self.images))
        for chosen in order.split(self.size):
            images = self.images[chosen]
            if self.shift:
                down, right = torch.randint(0, 2 * self.shift + 1, (2,)).tolist()
                padded = functional.pad(images, [self.shift] * 4)
                images = padded[..., down : down + images.shape[2], right : right + images.shape[3]]
            yield images, self.labels[chosen]


@dataclass(frozen=True)
class Digits:
    """The 1 797 digits in three disjoint parts."""

    train: Batches
    calibration: Batches
    test: Batches
    labels: tuple[str, ...] = CLASSES
    preprocessing: dict[str, object] = field(
        default_factory=lambda: {"scale": 1 / 16, "mean": [0.3], "std": [0.35], "resize": [32, 32], "channels": "gray"}
    )


def digits() -> Digits:
    """scikit-learn's digits, bilinearly upscaled to 32x32 and normalised: 1 181 train, 256 calibration, 360 test.

    raises: UsageError when scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise UsageError("the demo's data needs scikit-learn: pip install 'edgeprune[demo]'") from error
    raw = load_digits()
    small = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16
    images = (functional.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False) - 0.3) / 0.35
    labels = torch.tensor(raw.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, calibration, train = order.split([360, 256, len(order) - 616])
    return Digits(
        train=Batches(images[train], labels[train], shift=3),
        calibration=Batches(images[calibration], labels[calibration]),
        test=Batches(images[test], labels[test], size=360),
    )


def train_dense(epochs: int = 6, seed: int = 0, progress: Progress = silent) -> nn.Module:
    """Train the demo's network from scratch.

    epochs: passes over 1 181 images. returns: the trained network in evaluation mode.
    """
    torch.manual_seed(seed)
    model, data = wrn16_2(), digits()
    steps = epochs * len(data.train)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=0.1, total_steps=steps)
    done = 0
    for _ in range(epochs):
        for images, labels in data.train:
            loss = functional.cross_entropy(model(images), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            done += 1
            progress("training the dense model", done, steps)
    return model.eval()


def write_demo(directory: Path, latency: str = "0.5x", progress: Progress = silent) -> Path:
    """Train the dense model and write a run file beside its weights.

    returns: the run file; what is already there is kept, so that a killed demo goes on.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights, run_file = directory / "dense.safetensors", directory / "edgeprune.toml"
    if not weights.exists():
        model = train_dense(progress=progress)
        partial = weights.with_suffix(".partial")
        save_file(model.state_dict(), partial)
        partial.rename(weights)
    run_file.write_text(RUN_FILE.format(name=run_file, latency=latency), encoding="utf-8")
    return run_file
