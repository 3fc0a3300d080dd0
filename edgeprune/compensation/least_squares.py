"""Least-squares repair of a compact model from unlabelled calibration examples.

In the order of the graph, each convolution and linear layer is fitted so that its output equals the
dense model's output at the same place, given the inputs that the compact model really has there; so
a layer also corrects the errors of those before it. Layer by layer this is the update of channel
pruning (He et al., ICCV 2017, arXiv:1707.06168) and, per input channel, the OBS step with
H = XᵀX (Frantar and Alistarh, NeurIPS 2022, arXiv:2208.11580). Ours: damping towards the sliced
weights, targets at the residual sum, and the intercept of a layer without bias kept in its batch norm.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from edgeprune.compensation._rows import CHUNK_BYTES, MAX_FEATURES, Layer, by_group, count_positions, is_plain, unfold
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import Graph, IntArray
from edgeprune.graphs.capture import capture
from edgeprune.graphs.lift import lift

GRAM_OPERATIONS = 1e11
"""Positions are sub-sampled so that one layer's Gram matrix costs about this many multiplications."""
MEMORY_BYTES = 1 << 30
"""Live activations in both models, at most."""
ROUNDING = 1e-10
"""A residual this small beside the output, both squared, is rounding: fitting it would only add noise."""

Keep = Mapping[str, IntArray]


@torch.no_grad()
def compensate(
    compact: nn.Module,
    dense: nn.Module,
    graph: Graph,
    keep: Keep,
    batches: Iterable[tuple[Any, Tensor]],
    *,
    cut: Container[str] = (),
    damping: float = 1e-2,
    seed: int = 0,
    lifted: bool = False,
    progress: Progress = silent,
) -> list[str]:
    """Fit every layer that the removal reaches, in place.

    compact: the lifted, sliced GraphModule; its modules have the dense model's names.
    keep:    per pruned group the kept units, ascending; none of a dropped branch.
    batches: (inputs, targets); targets unused. All their live activations are held at once, in both models: of more
             examples than MEMORY_BYTES hold the first are used.
    cut:     paths of layers that lost weights in another way, such as convolutions that became grouped ones.
    lifted:  `dense` comes from `graphs.lift` and takes the batches' size; its export, which takes seconds, is spared.
    damping: > 0, share of the mean squared input added to the diagonal; pulls towards the sliced weight.
    returns: names of the fitted layers. A layer whose system cannot be solved, or whose fit is no
             better, stays as it was.
    """
    inputs = [tuple(x) if isinstance(x, tuple | list) else (x,) for x, _ in batches]
    if not inputs or not isinstance(compact, fx.GraphModule):
        return []
    reference = dense if lifted else lift(capture(dense, inputs[0]))
    assert isinstance(reference, fx.GraphModule)
    training = compact.training
    compact.eval()
    reference.eval()
    one = tuple(tensor[:1] for tensor in inputs[0])
    inputs = _first_examples(inputs, MEMORY_BYTES // max(_live_bytes(compact, one) + _live_bytes(reference, one), 1))
    ours, theirs = _Walk(compact, inputs), _Walk(reference, inputs)
    generator = torch.Generator().manual_seed(seed)
    calls, order, left = _calls(compact), _layers(reference), set(_layers(compact))
    first_lost = next((n for n, name in enumerate(order) if name not in left), len(order))
    fitted = []
    for done, (name, node) in enumerate(calls.items()):
        progress("compensate", done, len(calls))
        layer = compact.get_submodule(name)
        assert isinstance(layer, Layer)
        ours.advance(node)
        if not ours.changed:
            lost = name in cut or _lost_inputs(graph, keep, f"{name}.weight")
            ours.changed = lost or name in order[first_lost:]
        kept = _kept_positions(graph, keep, f"{name}.weight")
        if not ours.changed or (twin := theirs.find(name)) is None or len(kept) != layer.weight.shape[0]:
            continue
        target = _Target(ours, theirs, node, twin, kept, axis=-1 if isinstance(layer, nn.Linear) else 1)
        if _fit(layer, ours.values(node.args[0]), target, damping, generator):
            fitted.append(name)
    compact.train(training)
    return fitted


def _live_bytes(module: fx.GraphModule, inputs: tuple[Tensor, ...]) -> int:
    """Most bytes of activations that are alive at once."""

    class Counter(fx.Interpreter):
        most = 0

        def run_node(self, node: fx.Node) -> Any:
            value = super().run_node(node)
            alive = pytree.tree_leaves([value, list(self.env.values())])
            self.most = max(self.most, sum(x.nbytes for x in alive if isinstance(x, Tensor)))
            return value

    counter = Counter(module)
    counter.run(*inputs)
    return counter.most


def _first_examples(inputs: Sequence[tuple[Tensor, ...]], most: int) -> list[tuple[Tensor, ...]]:
    """The first batches, the last of them cut, of at most so many examples, and at least one."""
    kept: list[tuple[Tensor, ...]] = []
    left = max(most, 1)
    for tensors in inputs:
        if left <= 0:
            break
        kept.append(tuple(tensor[:left] for tensor in tensors))
        left -= len(tensors[0])
    return kept


def _layers(module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_module"]


def _calls(module: fx.GraphModule) -> dict[str, fx.Node]:
    """Layers that can be fitted, by name, in order; one that is called twice has no single target."""
    calls: dict[str, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), Layer):
            calls.setdefault(str(node.target), []).append(node)
    once = {name: nodes[0] for name, nodes in calls.items() if len(nodes) == 1}
    return {name: node for name, node in once.items() if is_plain(module.get_submodule(name))}


def _lost_inputs(graph: Graph, keep: Keep, parameter: str) -> bool:
    return any(
        member.parameter == parameter and member.role == "in" and len(keep.get(group.name, member.index)) < group.units
        for group in graph.groups
        for member in group.members
    )


def _kept_positions(graph: Graph, keep: Keep, parameter: str, axis: int = 0) -> Tensor:
    """Positions along a parameter's axis that the compact model still has."""
    size = next((p.shape[axis] for p in graph.parameters if p.name == parameter), 0)
    kept = np.ones(size, dtype=bool)
    for group in graph.groups:
        for member in group.members:
            if member.parameter == parameter and member.axis == axis and group.name in keep:
                removed = np.setdiff1d(np.arange(group.units), keep[group.name])
                kept[member.index[removed].ravel()] = False
    return torch.from_numpy(np.flatnonzero(kept))


class _Walk:
    """A GraphModule executed node by node over all batches at once; values go when last used."""

    def __init__(self, module: fx.GraphModule, inputs: Sequence[tuple[Tensor, ...]]) -> None:
        self.module, self.changed = module, False
        self.nodes = list(module.graph.nodes)
        self.position = 0
        self.runs = [fx.Interpreter(module, garbage_collect_values=True) for _ in inputs]
        for run, tensors in zip(self.runs, inputs, strict=True):
            run.args_iter = iter(tensors)

    def advance(self, until: fx.Node) -> None:
        """Execute everything before `until`."""
        while self.nodes[self.position] is not until:
            node = self.nodes[self.position]
            for run in self.runs:
                run.env[node] = run.run_node(node)
                for unused in run.user_to_last_uses.get(node, []):
                    del run.env[unused]
            self.position += 1

    def reach(self, node: fx.Node) -> list[Tensor]:
        """The values of `node`, executing up to and with it if that is still to do."""
        if node not in self.runs[0].env:
            self.advance(node.next)
        return self.values(node)

    def has(self, node: Any) -> bool:
        """Whether the node's values are at hand."""
        return isinstance(node, fx.Node) and node in self.runs[0].env

    def values(self, node: Any) -> list[Tensor]:
        """Per batch, the value of a node that is at hand."""
        return [run.env[node] for run in self.runs]

    def find(self, name: str) -> fx.Node | None:
        """The call of the module `name`, if it is still ahead."""
        ahead = self.nodes[self.position :]
        return next((node for node in ahead if node.op == "call_module" and node.target == name), None)


class _Target:
    """What a layer's output should be, batch by batch: the dense model's, restricted to kept channels.

    Where the layer's output goes through nothing but a batch norm into a residual sum whose other
    side is already known, the target is the dense sum less the compact model's other side, so that
    the layer also makes up for errors on the shortcut.
    """

    def __init__(self, ours: _Walk, theirs: _Walk, node: fx.Node, twin: fx.Node, kept: Tensor, *, axis: int) -> None:
        self.kept, self.axis = kept, axis
        self.layer_output = theirs.reach(twin)
        self.norm = _only_user(ours.module, node, nn.BatchNorm1d | nn.BatchNorm2d)
        if axis == -1 and self.layer_output[0].ndim > 2:
            self.norm = None  # its channels are another axis than the layer's
        after, twin_after = (node, twin) if self.norm is None else (next(iter(node.users)), next(iter(twin.users)))
        total, twin_total = _only_sum(after), _only_sum(twin_after)
        self.sums: list[Tensor] | None = None
        if total is not None and twin_total is not None and self._can_invert():
            others = [argument for argument in total.args[:2] if argument is not after]
            if len(others) == 1 and ours.has(others[0]):
                self.others = ours.values(others[0])
                sums = theirs.reach(twin_total)
                fits = all(other.shape[axis:][:1] in (sum_.shape[axis:][:1], (len(kept),))
                           for sum_, other in zip(sums, self.others, strict=True))  # fmt: skip
                self.sums = sums if fits else None

    def _can_invert(self) -> bool:
        """Whether the norm's scale is far enough from 0 to divide by."""
        if self.norm is None:
            return True
        scale = self._scale().abs()
        return bool((scale > 1e-3 * scale.max()).all())

    def _scale(self) -> Tensor:
        assert self.norm is not None and self.norm.running_var is not None
        weight = torch.ones_like(self.norm.running_var) if self.norm.weight is None else self.norm.weight
        scale: Tensor = weight / (self.norm.running_var + self.norm.eps).sqrt()
        return scale

    def batch(self, index: int) -> Tensor:
        """The target of one batch, channels on the axis where the layer has them."""
        if self.sums is None:
            return self.layer_output[index].index_select(self.axis, self.kept)
        wanted = self.sums[index].index_select(self.axis, self.kept).sub(self.others[index])
        if self.norm is None:
            return wanted
        shape = [1, -1] + [1] * (wanted.ndim - 2)
        assert self.norm.running_mean is not None
        if self.norm.bias is not None:
            wanted = wanted - self.norm.bias.view(shape)
        mean: Tensor = self.norm.running_mean.view(shape)
        return wanted / self._scale().view(shape) + mean


def _only_user(module: fx.GraphModule, node: fx.Node, kind: Any) -> Any:
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_module":
        return None
    layer = module.get_submodule(str(users[0].target))
    usable = isinstance(layer, kind) and layer.running_mean is not None
    return layer if usable else None


def _only_sum(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_function" or len(users[0].args) < 2 or users[0].kwargs:
        return None
    name = getattr(users[0].target, "__name__", "")
    return users[0] if name.split(".")[0] in ("add", "add_", "iadd") else None


# --- one layer -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Sums:
    """Sums over positions, per convolution group: XᵀX (G, d, d), XᵀR (G, d, o), |R|² and |Y|²."""

    gram: Tensor
    cross: Tensor
    residual: float = 0.0
    output: float = 0.0
    count: int = 0


def _fit(layer: Layer, inputs: Sequence[Tensor], target: _Target, damping: float, generator: torch.Generator) -> bool:
    """Ridge regression of the layer's residual on its inputs, from the sliced weights; True when improved."""
    groups = layer.groups if not isinstance(layer, nn.Linear) else 1
    sliced = layer.weight.detach().reshape(groups, layer.weight.shape[0] // groups, -1).double()
    features = sliced.shape[2]
    intercept = layer.bias is not None or target.norm is not None
    positions = sum(count_positions(layer, x) for x in inputs)
    if features > MAX_FEATURES or positions < 2:
        return False
    share = min(1.0, max(4.0 * features, GRAM_OPERATIONS / features**2) / positions)
    size = features + intercept
    sums = _Sums(
        torch.zeros(groups, size, size, dtype=torch.float64),
        torch.zeros(groups, size, sliced.shape[1], dtype=torch.float64),
    )
    for x, y in _samples(layer, inputs, target, share, generator):
        if intercept:
            x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], dim=2)
        residual = y - _predict(layer, x, sliced.float())
        sums.gram += (x.transpose(1, 2) @ x).double()
        sums.cross += (x.transpose(1, 2) @ residual).double()
        sums.residual += float(residual.square().sum())
        sums.output += float(y.square().sum())
        sums.count += x.shape[1]
    change = _solve(sums, damping, intercept)
    if change is None:
        return False
    weight = sliced + change[:, :features].transpose(1, 2)
    layer.weight.copy_(weight.reshape(layer.weight.shape))
    if intercept:
        offset = change[:, features].reshape(-1)
        if layer.bias is not None:
            layer.bias += offset.to(layer.bias)
        else:
            target.norm.running_mean -= offset.to(target.norm.running_mean)
    return True


def _predict(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    outputs = x[..., : weight.shape[2]] @ weight.transpose(1, 2)
    if layer.bias is not None:
        outputs = outputs + layer.bias.reshape(len(weight), 1, -1)
    return outputs


def _solve(sums: _Sums, damping: float, intercept: bool) -> Tensor | None:
    """The change of weights that lowers the residual most; None when there is none to be had."""
    gram, cross = sums.gram, sums.cross
    if not bool(torch.isfinite(gram).all() and torch.isfinite(cross).all()):
        return None
    if sums.residual <= ROUNDING * sums.output:
        return None
    diagonal = gram.diagonal(dim1=1, dim2=2)
    features = diagonal.shape[1] - intercept
    damping = damping * (1 + features / sums.count)  # few rows say little about many features
    mean = diagonal[:, :features].mean(dim=1, keepdim=True).clamp_min(1e-12)
    strength = damping * mean.expand(-1, diagonal.shape[1]).clone()
    if intercept:
        strength[:, features] = 1e-9 * sums.count  # the intercept needs no damping, only a pivot
    for attempt in range(4):
        damped = gram + torch.diag_embed(strength * 10.0**attempt)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed.any()):
            change = torch.cholesky_solve(cross, factor)
            gain = 2 * (change * cross).sum() - (change * (gram @ change)).sum()
            if bool(torch.isfinite(change).all()) and float(gain) > 0:
                return change
    return None


def _samples(
    layer: Layer, inputs: Sequence[Tensor], target: _Target, share: float, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of the regression in chunks: inputs (G, rows, d), wanted outputs (G, rows, outputs/G)."""
    for index, x in enumerate(inputs):
        y = target.batch(index)
        per_example = count_positions(layer, x[:1]) * layer.weight[0].numel() * 4
        if not isinstance(layer, nn.Linear):
            per_example *= layer.groups
        step = max(1, CHUNK_BYTES // max(1, per_example))
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            rows, wanted = unfold(layer, x[part]), by_group(layer, y[part])
            if share < 1:
                chosen = torch.rand(rows.shape[1], generator=generator) < share
                rows, wanted = rows[:, chosen], wanted[:, chosen]
            if rows.shape[1]:
                yield rows, wanted
