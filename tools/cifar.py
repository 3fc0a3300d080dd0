"""CIFAR-10 as JPEG files and two nets for it: what the benchmarks on real images share.

The folder comes from `--data`, else $EDGEPRUNE_DATA, else ../shared/data beside the repository.
Decoded images are cached under $XDG_CACHE_HOME/edgeprune (a few hundred MB), never in the repository.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ACCURACY = {"resnet20": 0.890, "wrn16_2": 0.883}
"""Top-1 of the checkpoints on the 5 000 test images, from the data's own notes."""


def find_data(given: Path | None = None) -> Path | None:
    """The folder with the images and checkpoints, or None where there is none."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    named = os.environ.get("EDGEPRUNE_DATA")
    folders = [given] if given else [Path(named)] if named else [beside]
    return next((folder for folder in folders if (folder / "cifar10-test.npz").is_file()), None)


def make_parser(text: str) -> argparse.ArgumentParser:
    """What every benchmark on these images takes."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="folder with cifar10-*.npz (default: $EDGEPRUNE_DATA, ../shared/data)"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of training on this machine")
    return parser


def read_options(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Path]:
    """The options and the folder of the data; ends the program where there is none, and says so."""
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = find_data(options.data)
    if folder is None:
        print("no cifar10-test.npz in --data, $EDGEPRUNE_DATA or ../shared/data: nothing to measure")
        print("RESULT " + json.dumps({"aims": {}, "skipped": "no data"}))
        raise SystemExit(0)
    return options, folder


def log(text: str) -> None:
    """A line for whoever watches."""
    print(text, file=sys.stderr, flush=True)


def show(what: str, done: int, total: int) -> None:
    """Progress as one line that is overwritten, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r{what} {done}/{total}   ", end="", file=sys.stderr, flush=True)


# --- images --------------------------------------------------------------------------------------


def read_images(path: Path) -> tuple[Tensor, Tensor]:
    """All images (n, 3, 32, 32) uint8 and labels (n,) int64 of one archive; decoded once, then cached."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "edgeprune"
    stamp = hashlib.sha256(f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}".encode()).hexdigest()
    cached = folder / f"{path.stem}-{stamp[:12]}.npz"
    if cached.is_file():
        with np.load(cached, allow_pickle=False) as file:
            return torch.from_numpy(file["x"]), torch.from_numpy(file["y"])
    x, y = _decode(path)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = cached.with_suffix(f".{os.getpid()}.npz")
    np.savez(temporary, x=x, y=y)
    os.replace(temporary, cached)
    return torch.from_numpy(x), torch.from_numpy(y)


def _decode(path: Path) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    with np.load(path, allow_pickle=False) as file:
        jpeg, offsets, y = file["jpeg"].tobytes(), file["offsets"], file["label"].astype(np.int64)
    x = np.empty((len(y), 3, 32, 32), np.uint8)
    for index in range(len(y)):
        with Image.open(io.BytesIO(jpeg[offsets[index] : offsets[index + 1]])) as image:
            x[index] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    return x, y


class Images:
    """Normalised batches; with `augment`, shuffled, cropped and flipped by torch's global generator."""

    def __init__(self, x: Tensor, y: Tensor, batch: int = 128, augment: bool = False) -> None:
        self.x, self.y, self.batch, self.augment = x, y, batch, augment
        self.padded = functional.pad(x, (4, 4, 4, 4)) if augment else x

    def __len__(self) -> int:
        return -(-len(self.y) // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.y)) if self.augment else torch.arange(len(self.y))
        for start in range(0, len(order), self.batch):
            picked = order[start : start + self.batch]
            images = _crop_and_flip(self.padded[picked]) if self.augment else self.x[picked]
            yield normalise(images), self.y[picked]


def _crop_and_flip(padded: Tensor) -> Tensor:
    """A random 32x32 window of each padded image, half of them mirrored."""
    count = len(padded)
    top, left = torch.randint(0, 9, (2, count))
    flip = torch.rand(count) < 0.5
    rows = top[:, None] + torch.arange(32)
    columns = left[:, None] + torch.arange(32)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    index = torch.arange(count)[:, None, None, None]
    return padded[index, torch.arange(3)[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def normalise(images: Tensor) -> Tensor:
    """Bytes (n, 3, h, w) to the range the checkpoints were trained on."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


class Cifar:
    """Training (augmented), calibration (the first 512 training images, plain) and test batches."""

    def __init__(self, folder: Path, *, train: int = 50_000, test: int = 5_000, calibration: int = 512) -> None:
        x, y = read_images(folder / "cifar10-train.npz")
        test_x, test_y = read_images(folder / "cifar10-test.npz")
        self.train = Images(x[:train], y[:train], augment=True)
        self.calibration = Images(x[:calibration], y[:calibration], batch=64)
        self.test = Images(test_x[:test], test_y[:test], batch=256)


# --- nets ----------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut drops every other pixel and pads channels with zeros (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return functional.relu(y + x)


class ResNet20(nn.Module):
    """ResNet-20 for CIFAR (He et al., CVPR 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        for stage in (1, 2, 3):
            blocks = [
                BasicBlock(widths[stage - 1] if block == 0 else widths[stage], widths[stage],
                           2 if block == 0 and stage > 1 else 1)
                for block in range(3)
            ]  # fmt: skip
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class PreActivationBlock(nn.Module):
    """Batch norm and ReLU before each 3x3 convolution; a 1x1 shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        activated = functional.relu(self.bn1(x))
        y = self.conv2(functional.relu(self.bn2(self.conv1(activated))))
        return y + (x if self.shortcut is None else self.shortcut(activated))


class WRN16x2(nn.Module):
    """WRN-16-2 (Zagoruyko & Komodakis, BMVC 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        shapes = [(16, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
        self.groups = nn.Sequential(*(PreActivationBlock(*shape) for shape in shapes))
        self.bn = nn.BatchNorm2d(128)
        self.linear = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(functional.relu(self.bn(self.groups(self.conv1(x)))).mean((2, 3)))


NETS = {"resnet20": ResNet20, "wrn16_2": WRN16x2}


def load_net(name: str, folder: Path) -> nn.Module:
    """A pretrained net in eval mode."""
    net = NETS[name]()
    net.load_state_dict(load_file(folder / f"{name}.safetensors"))
    return net.eval()
