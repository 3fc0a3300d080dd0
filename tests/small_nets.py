"""Nets that show one way in which channels hang together each, small enough to export in a moment."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class OptionABlock(nn.Module):
    """Basic block whose shortcut drops pixels and pads channels (He et al. 2016, option A)."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer)
        self.conv2, self.bn2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        self.stride, self.padding = stride, (outer - inner) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return functional.relu(x + y)


class ResNet20(nn.Module):
    """ResNet-20 for CIFAR: three stages of three blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16)
        self.layer2 = self._stage(16, 32)
        self.layer3 = self._stage(32, 64)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(inner: int, outer: int) -> nn.Sequential:
        first = OptionABlock(inner, outer, 1 if inner == outer else 2)
        return nn.Sequential(first, OptionABlock(outer, outer, 1), OptionABlock(outer, outer, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(functional.avg_pool2d(x, x.shape[3]).view(x.shape[0], -1))


class PreActivationBlock(nn.Module):
    """Pre-activation block with a 1x1 shortcut where the shape changes."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inner), nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(outer), nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inner, outer, 1, stride, bias=False) if inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(x))
        x = x if self.shortcut is None else self.shortcut(y)
        return x + self.conv2(functional.relu(self.bn2(self.conv1(y))))


class WideResNet(nn.Module):
    """WRN-16-2 for CIFAR."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        sizes = [(16, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
        self.groups = nn.Sequential(*(PreActivationBlock(*size) for size in sizes))
        self.bn, self.linear = nn.BatchNorm2d(128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(functional.relu(self.bn(self.groups(self.conv1(x)))).mean((2, 3)))


class Chain(nn.Module):
    """A 3x3 stem, what is to be shown, and a head that reads every position."""

    def __init__(self, width: int, middle: nn.Module, out: int, space: int = 8) -> None:
        super().__init__()
        self.stem, self.middle = nn.Conv2d(3, width, 3, padding=1), middle
        self.head = nn.Linear(out * space * space, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(functional.silu(self.stem(x))).flatten(1))


class Shuffle(nn.Module):
    """Channel shuffle as ShuffleNet writes it."""

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return x.view(batch, channels, height, width)


class FixedShuffle(nn.Module):
    """Channel shuffle with the channel count written out."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 2, 6, 8, 8).transpose(1, 2).reshape(-1, 12, 8, 8)


class SkipAndCut(nn.Module):
    """Concat, chunk, slice and pad of channels in one block."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(12, 6, 1), nn.Conv2d(12, 10, 3, padding=1)
        self.third = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.left(x), self.right(x)], 1)
        a, b = both.chunk(2, 1)
        c = both[:, 2:-6]
        wide = functional.pad(self.third(torch.cat([a, b], 1)), (0, 0, 0, 0, 3, 1))
        return wide + functional.pad(c, (0, 0, 0, 0, 2, 2), value=0.7)


class SqueezeExcite(nn.Module):
    """A gate per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, 4), nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.up(functional.relu(self.down(functional.adaptive_avg_pool2d(x, 1).flatten(1))))
        return x * torch.sigmoid(gate)[:, :, None, None] + 1.0


class Upsampled(nn.Module):
    """A U-turn: down, up by interpolation, joined with what went past."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 10, 3, 2, 1), nn.Conv2d(10, 7, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        low = functional.max_pool2d(functional.hardswish(self.down(x)), 2)
        return torch.cat([x, functional.interpolate(self.up(low), scale_factor=4.0, mode="bilinear")], 1)


class Heads(nn.Module):
    """Self-attention over pixels with explicit heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        batch, count, width = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(mixed.transpose(1, 2).reshape(batch, count, width)).transpose(1, 2)


class WrittenAttention(nn.Module):
    """Self-attention written out, by a product or by einsum, over normalised queries and keys or plain ones."""

    def __init__(self, width: int, heads: int, form: str) -> None:
        super().__init__()
        self.heads, self.form = heads, form
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.table, self.scale = nn.Parameter(torch.randn(10, heads)), nn.Parameter(torch.rand(heads, 1, 1) + 0.5)
        self.register_buffer("places", torch.arange(64 * 64).reshape(64, 64) % 10, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        batch, count, width = tokens.shape
        q = self.q(tokens).reshape(batch, count, self.heads, -1).transpose(1, 2)
        k, v = self.kv(tokens).reshape(batch, count, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if self.form == "cosine":
            scores = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).transpose(-2, -1) * self.scale
        elif self.form == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
        else:
            scores = (q * self.scale) @ k.transpose(-2, -1) * 0.3
        weights = (scores + self.table[self.places].permute(2, 0, 1)).softmax(-1)
        mixed = torch.einsum("bhij,bhjd->bihd", weights, v) if self.form == "einsum" else (weights @ v).transpose(1, 2)
        return self.proj(mixed.reshape(batch, count, width)).transpose(1, 2)


class ResponseNorm(nn.Module):
    """Global response normalisation (ConvNeXt V2): each channel against the mean of all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(dim=(2, 3), keepdim=True)
        share = size / (size.mean(dim=1, keepdim=True) + 1e-6)
        return x + torch.addcmul(self.bias.view(1, -1, 1, 1), self.weight.view(1, -1, 1, 1), x * share)


class Recurrent(nn.Module):
    """A recurrent layer over the rows of an image, and its last hidden state as a gate."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.out = layer, nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        rows, state = self.layer(x.mean(2).transpose(1, 2))
        last = (state[0] if isinstance(state, tuple) else state)[-1]
        return self.out(rows).transpose(1, 2)[:, :, None] + x[:, :6] * last.tanh().mean(1)[:, None, None, None]


class Outlook(nn.Module):
    """Patches cut out, weighted and put together again."""

    def forward(self, x: Tensor) -> Tensor:
        patches = functional.unfold(x, 3, padding=1)
        return functional.fold(patches * patches.relu().mean(2, keepdim=True), (8, 8), 3, padding=1)


class Shared(nn.Module):
    """One depthwise layer under two names, one convolution used twice, and a linear that shares the other's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.second, self.point = self.first, nn.Conv2d(8, 8, 1)
        self.left, self.right = nn.Linear(8, 6), nn.Linear(8, 6)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(functional.relu(self.point(self.first(x))))
        x = (self.point(x) + x).permute(0, 2, 3, 1)
        return (self.left(x) * self.right(x + 1)).permute(0, 3, 1, 2)


class Gram(nn.Module):
    """Attention among channels (cross-covariance)."""

    def forward(self, x: Tensor) -> Tensor:
        flat = functional.normalize(x.flatten(2), dim=-1)
        return (flat @ flat.transpose(1, 2) @ x.flatten(2)).view_as(x)


class Written(nn.Module):
    """A view of the channels is written to in place, so that what was removed is not zero any more."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x).flatten(2), self.k(x).flatten(2)
        q[:, :, 4:] += 1
        k[:, :, :4].add_(2)
        return (q.transpose(1, 2) @ k).mean(2).view(-1, 1, 8, 8) * x


class Standardised(nn.Conv2d):
    """Weights that are standardised over their inputs at run time, as in NFNets."""

    def __init__(self, inner: int, outer: int, kernel: int, groups: int = 1) -> None:
        super().__init__(inner, outer, kernel, padding=kernel // 2, groups=groups)
        self.gain = nn.Parameter(torch.ones(outer, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        flat, gain = self.weight.reshape(1, self.out_channels, -1), (self.gain * 0.3).view(-1)
        weight = functional.batch_norm(flat, None, None, gain, training=True, momentum=0.0, eps=1e-6)
        return self._conv_forward(x, weight.reshape_as(self.weight), self.bias)


class Chunks(nn.Module):
    """Two halves of the batch, one after the other, as RAFT takes its two images."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.chunk(self.inner(torch.cat([x, 2 * x])), 2)
        return self.outer(left * right.sigmoid())


def _seq(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


NETS: dict[str, Callable[[], nn.Module]] = {
    "depthwise": lambda: Chain(8, _seq(nn.Conv2d(8, 16, 3, padding=1, groups=8), nn.PReLU(16), nn.Conv2d(16, 6, 1)), 6),
    "grouped": lambda: Chain(
        8, _seq(nn.Conv2d(8, 12, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(12, 6, 1, groups=3)), 6
    ),
    "transposed": lambda: Chain(
        6, _seq(nn.ConvTranspose2d(6, 9, 2, 2), nn.ELU(), nn.ConvTranspose2d(9, 6, 2, 2, groups=3)), 6, 32
    ),
    "depthwise_transposed": lambda: Chain(6, _seq(nn.ConvTranspose2d(6, 6, 2, 2, groups=6), nn.Tanh()), 6, 16),
    "pixel_shuffle": lambda: Chain(6, _seq(nn.Conv2d(6, 16, 1), nn.PixelShuffle(2), nn.Conv2d(4, 3, 1)), 3, 16),
    "pixel_unshuffle": lambda: Chain(6, _seq(nn.PixelUnshuffle(2), nn.Conv2d(24, 3, 1)), 3, 4),
    "channel_shuffle": lambda: Chain(
        12, _seq(nn.Conv2d(12, 12, 1, groups=2), Shuffle(), nn.Conv2d(12, 12, 1, groups=2), nn.ChannelShuffle(3)), 12
    ),
    "fixed_shuffle": lambda: Chain(12, FixedShuffle(), 12),
    "group_norm": lambda: Chain(12, _seq(nn.GroupNorm(4, 12), nn.Sigmoid(), nn.Conv2d(12, 6, 1)), 6),
    "instance_norm": lambda: Chain(8, _seq(nn.InstanceNorm2d(8, affine=True), nn.GELU()), 8),
    "skip_and_cut": lambda: Chain(12, SkipAndCut(), 12),
    "squeeze_excite": lambda: Chain(8, SqueezeExcite(8), 8),
    "upsampled": lambda: Chain(8, Upsampled(8), 15),
    "heads": lambda: Chain(12, Heads(12, 4), 12),
    "one_head": lambda: Chain(12, Heads(12, 1), 12),
    "written_heads": lambda: Chain(12, WrittenAttention(12, 4, "plain"), 12),
    "written_one_head": lambda: Chain(12, WrittenAttention(12, 1, "plain"), 12),
    "einsum_heads": lambda: Chain(12, WrittenAttention(12, 3, "einsum"), 12),
    "cosine_one_head": lambda: Chain(12, WrittenAttention(12, 1, "cosine"), 12),
    "response_norm": lambda: Chain(8, _seq(nn.Conv2d(8, 12, 1), nn.GELU(), ResponseNorm(12), nn.Conv2d(12, 6, 1)), 6),
    "lstm": lambda: Chain(8, Recurrent(nn.LSTM(8, 7, 2, batch_first=True, bidirectional=True), 14), 6),
    "gru": lambda: Chain(8, Recurrent(nn.GRU(8, 7, batch_first=True), 7), 6),
    "outlook": lambda: Chain(8, _seq(nn.Conv2d(8, 6, 1), Outlook(), nn.Conv2d(6, 4, 1)), 4),
    "gram": lambda: Chain(8, Gram(), 8),
    "shared": lambda: Chain(8, Shared(), 6),
    "written_in_place": lambda: Chain(8, Written(), 8),
    "standardised": lambda: Chain(8, _seq(Standardised(8, 12, 3), nn.SiLU(), Standardised(12, 6, 3, groups=3)), 6),
    "chunks": lambda: Chain(8, Chunks(), 6),
    "gated": lambda: Chain(8, _seq(nn.Conv2d(8, 12, 1), nn.GLU(1), nn.Dropout(0.3)), 6),
}
"""Each reads (batch, 3, 8, 8)."""
