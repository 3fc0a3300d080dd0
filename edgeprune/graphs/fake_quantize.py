"""What int8 does to a model, simulated in float32 so that it can be trained against.

Weights per output channel and symmetric, activations per tensor with ranges that follow a moving average. Rounding
passes gradients straight through; what is clipped gets none.
source: Jacob et al., CVPR 2018, arXiv:1712.05877, sec. 3; Krishnamoorthi 2018, arXiv:1806.08342, sec. 3 and 4.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from edgeprune.core.errors import ModelError
from edgeprune.core.records import Precision
from edgeprune.graphs.capture import Inputs, capture, operator_name
from edgeprune.graphs.lift import lift

MOMENTUM = 0.01
"""Weight of a batch's own range in the moving average."""
WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)
READERS = frozenset({"add", "mul", "cat", "avg_pool2d", "adaptive_avg_pool2d", "mean", "matmul", "bmm", "linear"})
"""Operations beside the layers that read numbers of 8 bits in an int8 artifact; add_, mul_ count as these."""


class ActivationQuantizer(nn.Module):
    """Rounds a tensor to the 256 values between the ends of its range, which always holds 0.

    In training mode the range follows the tensor's. low, high: scalars, infinite until something was seen.
    """

    def __init__(self, activations: str) -> None:
        super().__init__()
        self.least, self.most = (0, 255) if activations == "uint8" else (-128, 127)
        self.register_buffer("low", torch.tensor(torch.inf))
        self.register_buffer("high", torch.tensor(-torch.inf))
        self.low: Tensor
        self.high: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """A float tensor of any shape -> the same shape."""
        if self.training:
            self._follow(x.detach())
        if not bool(torch.isfinite(self.low)):
            return x
        scale = ((self.high - self.low) / (self.most - self.least)).clamp(min=1e-12)
        zero = (self.least - self.low / scale).round().clamp(self.least, self.most).to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(x.float(), scale, zero, self.least, self.most)

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        low, high = x.min().float().clamp(max=0), x.max().float().clamp(min=0)
        if bool(torch.isfinite(self.low)):
            self.low.lerp_(low, MOMENTUM)
            self.high.lerp_(high, MOMENTUM)
        elif bool(torch.isfinite(low) & torch.isfinite(high)):
            self.low.copy_(low)
            self.high.copy_(high)


class WeightQuantizer(nn.Module):
    """Rounds each output channel of a weight to the 255 values between its largest magnitudes."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, weight: Tensor) -> Tensor:
        """A weight -> the same shape."""
        others = [place for place in range(weight.ndim) if place != self.axis]
        scale = (weight.detach().float().abs().amax(others) / 127).clamp(min=1e-12)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight.float(), scale, zero, self.axis, -127, 127)


def simulate_int8(module: nn.Module, inputs: Inputs, precision: Precision, batches: Iterable[Inputs]) -> nn.Module:
    """A module that computes as `module` would with numbers of 8 bits, and whose parameters are the same tensors.

    Training it trains `module`, which keeps its structure; nothing has to be removed afterwards. Batch norms keep
    their statistics while it trains: an artifact has them folded into the weights. Because a channel's scale
    drops out of symmetric rounding per channel, rounding before the fold or after it is the same.
    inputs: example tensors. batches: inputs from which the ranges start.
    raises: ModelError for a model that cannot be captured, or an unknown node in `precision.float_nodes`.
    """
    captured = capture(module, inputs)
    layers = {node.name: node for node in captured.graph.nodes if node.op == "call_function"}
    if unknown := [name for name in precision.float_nodes if name not in layers]:
        raise ModelError(f"the model has no node '{unknown[0]}' to leave in float32; `edgeprune trace` lists its nodes")
    paths = {
        str(argument.target).rpartition(".")[0]
        for name in precision.float_nodes
        for argument in layers[name].all_input_nodes
        if argument.op == "get_attr"
    }
    simulated = lift(captured)
    for node in list(simulated.graph.nodes):
        _quantize_inputs(simulated, node, precision, paths)
    for path, layer in list(simulated.named_modules()):
        if isinstance(layer, WEIGHTED) and path not in paths:
            axis = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
            parametrize.register_parametrization(layer, "weight", WeightQuantizer(axis))
    simulated.recompile()
    result = _Simulated(simulated)
    result.train()
    with torch.no_grad():
        for batch in batches:
            result(*batch)
    return result.eval()


class _Simulated(nn.Module):
    """A graph in training mode whose batch norms stay in evaluation mode."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *inputs: Tensor) -> Tensor:
        """The graph's own."""
        output: Tensor = self.graph(*inputs)
        return output

    def train(self, mode: bool = True) -> _Simulated:
        """See nn.Module."""
        super().train(mode)
        for part in self.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
        return self


def _quantize_inputs(graph: fx.GraphModule, node: fx.Node, precision: Precision, floats: set[str]) -> None:
    """Round what an operation reads, one quantizer per tensor."""
    if not _reads_integers(graph, node) or node.target in floats or node.name in precision.float_nodes:
        return
    for source in list(node.all_input_nodes):
        if source.op == "get_attr" or (source.op == "call_module" and str(source.target).startswith("quantizer_")):
            continue
        name = f"quantizer_{source.name}"
        known = next((user for user in source.users if user.target == name), None)
        if known is None:
            graph.add_submodule(name, ActivationQuantizer(precision.activations))
            with graph.graph.inserting_after(source):
                known = graph.graph.call_module(name, (source,))
        node.replace_input_with(source, known)


def _reads_integers(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(graph.get_submodule(str(node.target)), WEIGHTED)
    return node.op == "call_function" and operator_name(node) in READERS
