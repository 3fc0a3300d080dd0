"""What int8 does to a model, simulated in float32 so that it can be trained against.

Weights per output channel and symmetric, activations per tensor with ranges that follow a moving average. Rounding
passes gradients straight through; what is clipped gets none.
source: Jacob et al., CVPR 2018, arXiv:1712.05877, sec. 3; Krishnamoorthi 2018, arXiv:1806.08342, sec. 3 and 4.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

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
        self.enabled = True
        self.symmetric = activations == "symmetric"
        self.least, self.most = (0, 255) if activations == "uint8" else (-127 if self.symmetric else -128, 127)
        self.register_buffer("low", torch.tensor(torch.inf))
        self.register_buffer("high", torch.tensor(-torch.inf))
        self.low: Tensor
        self.high: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """A float tensor of any shape -> the same shape."""
        if self.training:
            self._follow(x.detach())
        if not self.enabled or not bool(torch.isfinite(self.low)):
            return x
        high = torch.maximum(self.high, -self.low) if self.symmetric else self.high
        low = -high if self.symmetric else self.low
        scale = ((high - low) / (self.most - self.least)).clamp(min=1e-12)
        zero = (self.least - low / scale).round().clamp(self.least, self.most).to(torch.int32)
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
        self.enabled, self.axis = True, axis

    def forward(self, weight: Tensor) -> Tensor:
        """A weight -> the same shape."""
        if not self.enabled:
            return weight
        others = [place for place in range(weight.ndim) if place != self.axis]
        scale = (weight.detach().float().abs().amax(others) / 127).clamp(min=1e-12)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight.float(), scale, zero, self.axis, -127, 127)


QUANTIZER = "quantizer_"
Quantizer = ActivationQuantizer | WeightQuantizer


def simulate_int8(module: nn.Module, inputs: Inputs, precision: Precision, batches: Iterable[Inputs]) -> Simulated:
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
    # A layer's calls get other names when it is lifted; they keep their order.
    calls: dict[str, list[str]] = {}
    for name, node in layers.items():
        for path in dict.fromkeys(str(x.target).rpartition(".")[0] for x in node.all_input_nodes if x.op == "get_attr"):
            calls.setdefault(path, []).append(name)
    floats = {path for path, names in calls.items() if set(names) & set(precision.float_nodes)}
    simulated = lift(captured)
    names: dict[fx.Node, str] = {}
    touching: dict[Quantizer, set[str]] = {}
    weights: dict[str, WeightQuantizer] = {}
    for node in list(simulated.graph.nodes):
        path = str(node.target)
        name = calls[path].pop(0) if node.op == "call_module" and path in calls else node.name
        if not _reads_integers(simulated, node) or path in floats or name in precision.float_nodes:
            continue
        names[node] = name
        rounded: list[Quantizer] = [*_quantize_inputs(simulated, node, precision.activations)]
        if node.op == "call_module":
            layer = simulated.get_submodule(path)
            if path not in weights:
                axis = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
                weights[path] = WeightQuantizer(axis)
                parametrize.register_parametrization(layer, "weight", weights[path])
            rounded.append(weights[path])
        for quantizer in rounded:
            touching.setdefault(quantizer, set()).add(name)
    for node in simulated.graph.nodes:
        if str(node.target).startswith(QUANTIZER):
            written = simulated.get_submodule(str(node.target))
            assert isinstance(written, ActivationQuantizer)
            touching[written] |= _writers(node, names)
    simulated.recompile()
    result = Simulated(simulated, touching, tuple(names.values()))
    result.train()
    with torch.no_grad():
        for batch in batches:
            result(*batch)
    return result.eval()


class Simulated(nn.Module):
    """A graph with simulated rounding; in training mode its batch norms stay in evaluation mode.

    operations: the graph's nodes that compute with numbers of 8 bits, in the order of execution.
    """

    def __init__(
        self, graph: fx.GraphModule, touching: Mapping[Quantizer, Collection[str]], operations: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.graph = graph
        self._touching = {quantizer: frozenset(names) for quantizer, names in touching.items()}
        self.operations = operations

    @property
    def neighbours(self) -> tuple[tuple[str, ...], ...]:
        """Every set of operations that have to be in float together for one tensor not to be rounded."""
        order = {name: place for place, name in enumerate(self.operations)}
        found = (tuple(sorted(names, key=order.__getitem__)) for names in self._touching.values())
        return tuple(dict.fromkeys(found))

    @contextmanager
    def in_float(self, operations: Iterable[str]) -> Iterator[None]:
        """Without the rounding of their weights, and of what none but them write and read: others pass on 8 bits."""
        among = frozenset(operations)
        silenced = [quantizer for quantizer, names in self._touching.items() if names <= among]
        for quantizer in silenced:
            quantizer.enabled = False
        try:
            yield
        finally:
            for quantizer in silenced:
                quantizer.enabled = True

    def forward(self, *inputs: Tensor) -> Tensor:
        """The graph's own."""
        output: Tensor = self.graph(*inputs)
        return output

    def train(self, mode: bool = True) -> Simulated:
        """See nn.Module."""
        super().train(mode)
        for part in self.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
        return self


def _writers(node: fx.Node, names: Mapping[fx.Node, str]) -> set[str]:
    """The operations whose results a node reads, possibly through others that pass numbers of 8 bits on."""
    found: set[str] = set()
    queue, seen = list(node.all_input_nodes), set()
    while queue:
        source = queue.pop()
        if source in names:
            found.add(names[source])
        elif source not in seen:
            seen.add(source)
            queue.extend(source.all_input_nodes)
    return found


def _quantize_inputs(graph: fx.GraphModule, node: fx.Node, activations: str) -> list[ActivationQuantizer]:
    """Round what an operation reads, one quantizer per tensor. returns: these."""
    found: list[ActivationQuantizer] = []
    for source in list(node.all_input_nodes):
        if source.op == "get_attr":
            continue
        name = f"{QUANTIZER}{source.name}"
        known = next((user for user in source.users if user.target == name), None)
        if known is None:
            graph.add_submodule(name, ActivationQuantizer(activations))
            with graph.graph.inserting_after(source):
                known = graph.graph.call_module(name, (source,))
        node.replace_input_with(source, known)
        quantizer = graph.get_submodule(str(known.target))
        assert isinstance(quantizer, ActivationQuantizer)
        found.append(quantizer)
    return found


def _reads_integers(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(graph.get_submodule(str(node.target)), WEIGHTED)
    return node.op == "call_function" and operator_name(node) in READERS
