"""Models that are written in unusual ways: pruned exactly, or frozen, or refused in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from exactness import random_keep, randomise, relative_error
from small_nets import Chain
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.core.errors import ModelError
from edgeprune.graphs.capture import capture
from edgeprune.graphs.slice import mask_model, slice_captured
from edgeprune.trace import trace_captured, trace_graph

torch.set_num_threads(1)
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Written(nn.Module):
    """A function of itself and its input; tensors among what it holds are buffers, or parameters if they are."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **held: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in held.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _slimmed(self: Any, x: Tensor) -> Tensor:
    """One layer at two widths."""
    wide = self.layer(x)
    narrow = functional.conv2d(wide[:, :4], self.layer.weight[:6, :4], self.layer.bias[:6])
    return torch.cat([wide, narrow], 1)


def _doubled(_: Any, x: Tensor) -> Tensor:
    x.mul_(2)
    return x + 1


def _found(_: Any, x: Tensor) -> Tensor:
    return x.index_select(1, (x.mean((0, 2, 3)) > -100).nonzero().squeeze(1))


def _views() -> nn.Module:
    """A parameter that is a view of another one's memory."""
    whole, part = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
    part.weight = nn.Parameter(whole.weight.data[2:6])
    return nn.Sequential(whole, nn.ReLU(), part)


class ChangesItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Chain(8, nn.Conv2d(8, 6, 1), 6)

    def forward(self, x: Tensor) -> Tensor:
        x.add_(1)
        return self.inner(x)


# name -> (builder, groups that must be prunable)
NETS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "one layer at two widths": (lambda: Chain(8, Written(_slimmed, layer=nn.Conv2d(8, 8, 1)), 14), {"middle.layer"}),
    "one layer, twice in a row": (lambda: Chain(8, nn.Sequential(*[nn.Conv2d(8, 8, 1)] * 2), 8), {"stem"}),
    "a norm for two widths": (
        lambda: Chain(
            8, Written(lambda s, x: s.norm(s.conv(s.norm(x))), norm=nn.InstanceNorm2d(12), conv=nn.Conv2d(8, 12, 1)), 12
        ),
        {"stem", "middle.conv"},
    ),
    "a buffer as the weight": (
        lambda: Chain(8, Written(lambda s, x: functional.conv2d(x, s.kernel), kernel=torch.randn(6, 8, 1, 1)), 6),
        {"stem", "middle"},
    ),
    "written in place": (lambda: Chain(8, Written(_doubled), 8), {"stem"}),
    "the input written in place": (ChangesItsInput, {"inner.stem", "inner.middle"}),
    "a view of another parameter": (lambda: Chain(8, _views(), 4), {"stem", "middle.0", "middle.2"}),
    "no channels in front": (lambda: Chain(8, Written(lambda _, x: torch.cat([x[:, :0], x], 1)), 8), {"stem"}),
    "as many channels as are found": (lambda: Chain(8, Written(_found), 8), set()),
    "as many values as are found": (lambda: Chain(8, Written(lambda _, x: x + x[x > 0].sum()), 8), set()),
    "a Fourier transform": (
        lambda: Chain(
            8,
            Written(
                lambda s, x: torch.fft.ifft2(torch.fft.fft2(x) * s.filter).real,
                filter=nn.Parameter(torch.randn(8, 8, 8, dtype=torch.complex64)),
            ),
            8,
        ),
        set(),
    ),
    "half precision": (lambda: Chain(8, nn.Conv2d(8, 6, 1), 6).half(), {"stem", "middle"}),
}


@pytest.mark.parametrize("name", NETS)
def test_unusual_is_exact_or_frozen(name: str) -> None:
    build, prunable = NETS[name]
    torch.manual_seed(0)
    module = randomise(build())
    kind = next(module.parameters()).dtype
    captured = capture(module, (IMAGES.to(kind).clone(),))
    graph = trace_captured(captured, len(IMAGES))
    assert {group.name for group in graph.prunable} >= prunable and bool(graph.prunable) == bool(prunable)
    assert prunable or graph.unsupported, "what freezes everything is named"
    keep = random_keep(graph, np.random.default_rng(1))
    with torch.no_grad():
        ours = slice_captured(captured, graph, keep).eval()(IMAGES.to(kind).clone())
        masked = mask_model(module, graph, keep)(IMAGES.to(kind).clone())
    assert relative_error(ours, masked) < (1e-4 if kind == torch.float32 else 5e-3)


def _control_flow() -> nn.Module:
    return Chain(8, Written(lambda _, x: x if x.sum() > 0 else -x), 8)


def _counted() -> nn.Module:
    return Chain(8, Written(lambda _, x: x * len([v for v in x.flatten(1)[:, 0].tolist() if v > 0])), 8)


def _no_outputs() -> nn.Module:
    return Chain(8, nn.Sequential(nn.Conv2d(8, 0, 1), nn.Conv2d(0, 6, 1)), 6)


def _quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(Chain(8, nn.Identity(), 8), {nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (_control_flow, r"test_unusual_models\.py:\d+: .*x\.sum\(\) > 0.*--scope"),
        (_counted, r"test_unusual_models\.py:\d+: .*tolist\(\).*--scope"),
        (_no_outputs, r"does not accept inputs of shape \(3, 3, 8, 8\): .*\[0, 8, 1, 1\]"),
        (_quantised, r"'head' is quantised \(Linear\); give the model in float32"),
    ],
)
def test_refusals_say_what_and_where(build: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        trace_graph(build().eval(), (IMAGES,))
