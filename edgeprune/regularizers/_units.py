"""The units of a group in the parameters that are being trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from edgeprune.core.errors import RecordError, UsageError
from edgeprune.core.records import Graph, Group, IntArray


@dataclass(frozen=True, slots=True)
class Part:
    """Where the units lie in one tensor: index (units, k) along an axis. op: what reads the tensor."""

    name: str
    tensor: Tensor
    axis: int
    index: Tensor
    op: str

    def spread(self, values: Tensor, elsewhere: float) -> Tensor:
        """(units,) values on the tensor's axis, to be multiplied or added with it; `elsewhere` at other positions."""
        line = self.tensor.new_full((self.tensor.shape[self.axis],), elsewhere)
        line[self.index.flatten()] = values.to(line).repeat_interleave(self.index.shape[1])
        return line.view([-1 if axis == self.axis else 1 for axis in range(self.tensor.ndim)])

    def sums(self, tensor: Tensor) -> Tensor:
        """(units,) sums over everything of a unit in a tensor of the same shape."""
        return tensor.movedim(self.axis, 0).flatten(1).sum(dim=1)[self.index].sum(dim=1) if tensor.ndim > 1 else (
            tensor[self.index].sum(dim=1))  # fmt: skip


class UnitGroup:
    """One group: every operation is on whole units, in all parameters that go with them.

    entries: numbers that go with one unit. buffers: running statistics, which no operation here changes.
    """

    def __init__(self, group: Group, tensors: Mapping[str, Tensor], ops: Mapping[str, str]) -> None:
        self.name, self.units, self.step = group.name, group.units, group.step
        parts = [
            Part(m.parameter, t := tensors[m.parameter], m.axis, torch.from_numpy(m.index).to(t.device),
                 ops.get(m.parameter, ""))
            for m in group.members
            if m.parameter in tensors
        ]  # fmt: skip
        self.parts = [part for part in parts if isinstance(part.tensor, nn.Parameter) and part.tensor.requires_grad]
        self.buffers = [part for part in parts if not isinstance(part.tensor, nn.Parameter)]
        self.entries = sum(
            part.tensor.numel() // part.tensor.shape[part.axis] * part.index.shape[1] for part in self.parts
        )

    def most(self, ratio: float) -> int:
        """Units that may go for a ratio in [0, 1) of them, on the group's step, at least one step kept."""
        kept = max(self.step, int(np.ceil(self.units * (1 - ratio) / self.step - 1e-9)) * self.step)
        return max(self.units - kept, 0)

    @torch.no_grad()
    def norms(self, p: int = 2, of: Mapping[str, Tensor] | None = None) -> Tensor:
        """(units,) norm over all that goes with a unit, of the parameters or of tensors by their names."""
        tensors = [part.tensor if of is None else of[part.name] for part in self.parts]
        sums = [part.sums(t.detach().abs().pow(p)) for part, t in zip(self.parts, tensors, strict=True)]
        return torch.stack(sums).sum(dim=0).pow(1 / p)

    @torch.no_grad()
    def scale(self, factors: Tensor) -> None:
        """Multiply everything of each unit by its factor, (units,)."""
        for part in self.parts:
            part.tensor.mul_(part.spread(factors, 1.0))

    @torch.no_grad()
    def decay(self, strength: Tensor) -> None:
        """Add strength x weight to the gradients: the gradient of half strength times the squared norm."""
        for part in self.parts:
            if part.tensor.grad is not None:
                part.tensor.grad.add_(part.spread(strength, 0.0) * part.tensor)

    @torch.no_grad()
    def mute(self, out: Tensor) -> None:
        """Clear the gradients of the units whose entry of `out`, (units,), is 1."""
        for part in self.parts:
            if part.tensor.grad is not None:
                part.tensor.grad.mul_(part.spread(1 - out, 1.0))


def unit_groups(module: nn.Module, graph: Graph) -> list[UnitGroup]:
    """The prunable groups of a model. raises: RecordError when the graph is of another model."""
    tensors: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    shapes = {parameter.name: parameter.shape for parameter in graph.parameters}
    for name, tensor in tensors.items():
        if name in shapes and tuple(tensor.shape) != tuple(shapes[name]):
            raise RecordError(
                f"'{name}' has shape {list(tensor.shape)}, in the graph {list(shapes[name])}; trace again"
            )
    ops = {parameter: node.op for node in graph.nodes for parameter in node.parameters}
    groups = [UnitGroup(group, tensors, ops) for group in graph.prunable]
    if missing := [group.name for group in groups if not group.parts]:
        raise RecordError(f"the model has no trainable parameters for the groups {', '.join(missing)}; trace it again")
    return groups


def live_units(module: nn.Module, graph: Graph) -> dict[str, IntArray]:
    """Per group with zero units those that are not, ascending, as many as the group's step asks for.

    Cutting a model to them changes nothing of its output but rounding.
    """
    found = {}
    for group in unit_groups(module, graph):
        norms = group.norms().cpu().numpy()
        live = int((norms > 0).sum())
        keep = max(-(-live // group.step), 1) * group.step
        if keep < group.units:
            found[group.name] = np.sort(np.argsort(-norms, kind="stable")[:keep]).astype(np.int64)
    return found


def check_share(name: str, **shares: float) -> None:
    """raises: UsageError for an option outside (0, 1)."""
    for option, value in shares.items():
        if not 0 < value < 1:
            raise UsageError(f"{name}: {option}={value} must be above 0 and below 1")


def check_positive(name: str, **values: float) -> None:
    """raises: UsageError for an option that is not above 0."""
    for option, value in values.items():
        if not value > 0:
            raise UsageError(f"{name}: {option}={value} must be above 0")
