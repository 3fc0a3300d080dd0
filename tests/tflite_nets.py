"""Small nets of the kinds that TFLite runs on phones, and their conversion in a process of its own.

python tests/tflite_nets.py FOLDER NAME...   writes NAME-WIDTH[-int8|-dynamic].tflite; needs litert-torch
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

SIDE = 32


class Residual(nn.Module):
    """A basic block as in ResNet, with a 1x1 shortcut where the shape changes."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer)
        self.conv2, self.bn2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))
        self.same, self.relu = inner == outer and stride == 1, nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.same else self.shortcut(x)))


class Gate(nn.Module):
    """Squeeze and excitation as in MobileNetV3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pool, self.fc1, self.fc2 = nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, 8, 1), nn.Conv2d(8, width, 1)
        self.relu, self.gate = nn.ReLU(), nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.relu(self.fc1(self.pool(x)))))


class Inverted(nn.Module):
    """An inverted residual as in MobileNetV2 and V3."""

    def __init__(
        self, inner: int, outer: int, wide: int, stride: int, act: Callable[[], nn.Module], gate: bool
    ) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(inner, wide, 1, bias=False), nn.BatchNorm2d(wide), act())
        depthwise = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(wide), act())
        self.gate = Gate(wide) if gate else nn.Identity()
        self.project = nn.Sequential(nn.Conv2d(wide, outer, 1, bias=False), nn.BatchNorm2d(outer))
        self.same = inner == outer and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.gate(self.depthwise(self.expand(x))))
        return x + y if self.same else y


class Branches(nn.Module):
    """Two ways past each other, of which one has a depthwise convolution first, and their concatenation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width), nn.Conv2d(width, 12, 1))
        self.two = nn.Sequential(
            nn.Conv2d(width, 20, 1), nn.ReLU(), nn.Conv2d(20, 20, 3, padding=1, groups=20), nn.Conv2d(20, 4, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.two(x)], 1)


def _net(width: float, first: int, act: Callable[[], nn.Module], body: Sequence[nn.Module], last: int) -> nn.Module:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(last, 10)]
    stem = nn.Sequential(nn.Conv2d(3, first, 3, 2, 1, bias=False), nn.BatchNorm2d(first), act())
    return nn.Sequential(stem, *body, *head)


def resnet(width: float = 1.0) -> nn.Module:
    a, b = int(8 * width), int(16 * width)
    pool = nn.MaxPool2d(3, 2, 1)
    return _net(width, a, nn.ReLU, [pool, Residual(a, a, 1), Residual(a, b, 2), Residual(b, b, 1)], b)


def mobilenet_v2(width: float = 1.0) -> nn.Module:
    a, b, c = int(8 * width), int(24 * width), int(12 * width)
    return _net(width, a, nn.ReLU6, [Inverted(a, c, b, 2, nn.ReLU6, False), Inverted(c, c, b, 1, nn.ReLU6, False)], c)


def mobilenet_v3(width: float = 1.0) -> nn.Module:
    a, b, c = int(8 * width), int(24 * width), int(12 * width)
    body = [Inverted(a, c, b, 2, nn.Hardswish, True), Inverted(c, c, b, 1, nn.Hardswish, True)]
    return _net(width, a, nn.Hardswish, body, c)


def branches(width: float = 1.0) -> nn.Module:
    a = int(8 * width)
    return _net(width, a, nn.ReLU, [Branches(a), nn.Conv2d(16, 8, 1), Branches(8)], 16)


NETS: dict[str, Callable[[float], nn.Module]] = {
    "resnet": resnet,
    "mobilenet_v2": mobilenet_v2,
    "mobilenet_v3": mobilenet_v3,
    "branches": branches,
}


def make_net(name: str, width: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name](width).eval()


def convert_nets(folder: Path, names: Sequence[str], widths: Sequence[float] = (1.0,)) -> None:
    """Write the nets' files in a process of its own: the converter takes long to import and prints a lot."""
    argv = [sys.executable, __file__, str(folder), *names, *map(str, widths)]
    subprocess.run(argv, check=True, capture_output=True)


def _convert(folder: Path, name: str, width: float) -> None:
    import litert_torch
    import numpy as np
    from ai_edge_quantizer import quantizer, recipe

    path = folder / f"{name}-{width:g}.tflite"
    module = litert_torch.to_channel_last_io(make_net(name, width), args=[0]).eval()
    litert_torch.convert(module, (torch.rand(1, SIDE, SIDE, 3),)).export(str(path))
    dynamic = quantizer.Quantizer(str(path), recipe.dynamic_wi8_afp32())
    dynamic.quantize().export_model(str(path.with_name(f"{path.stem}-dynamic.tflite")))
    static = quantizer.Quantizer(str(path), recipe.static_wi8_ai8())
    data = np.random.default_rng(0).standard_normal((4, 1, SIDE, SIDE, 3)).astype(np.float32)
    ranges = static.calibrate({"serving_default": [{"args_0": x} for x in data]})
    static.quantize(ranges).export_model(str(path.with_name(f"{path.stem}-int8.tflite")))


if __name__ == "__main__":
    target, arguments = Path(sys.argv[1]), sys.argv[2:]
    for wanted in (argument for argument in arguments if argument in NETS):
        for factor in (float(argument) for argument in arguments if argument not in NETS):
            _convert(target, wanted, factor)
