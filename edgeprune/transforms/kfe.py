"""Layers in the Kronecker-factored eigenbasis of their Fisher (EigenDamage: Wang et al., ICML 2019, arXiv:1905.05934).

Over its channels a layer's Fisher is about A ⊗ G, with A = E[a aᵀ] of what it reads and G = E[g gᵀ] of the
loss gradient at its output (K-FAC), summed over positions. With their eigenvectors

    A = Q_a Λ_a Q_aᵀ,   G = Q_g Λ_g Q_gᵀ,   W = Q_g W* Q_aᵀ:   1x1 (Q_aᵀ) · kxk (W*) · 1x1 (Q_g).

In this basis the Fisher of W* is about diagonal, so that rows and columns of W* are independent and can go one
by one: between the three layers there are two groups of channels, which `eigen_damage` scores. The layer's own
inputs and outputs stay, and what reads and writes them.

From the paper: factors over channels rather than patches, labels drawn from the model, no form that saves
nothing, and turning the basis of a pruned layer again without a second pair of 1x1 layers. Ours: which
layers are worth it, prices from latency tables, and all of it on an ordinary model of three layers.
"""

from __future__ import annotations

import copy
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, fx, nn

from edgeprune.compensation._rows import MAX_FEATURES, Layer, by_group, is_plain
from edgeprune.core.cost import kernel_latency, kernel_sizes
from edgeprune.core.errors import DataError, ModelError, UsageError
from edgeprune.core.records import Graph, Kernel, Profile, Rewritten
from edgeprune.criteria.eigen_damage import CORE, OUT, PARTS
from edgeprune.statistics import Batch
from edgeprune.statistics.kfac import sum_factors


def rewrite(model: nn.Module, batches: Iterable[Batch], *, layers: str = "", share: float = 0.5) -> Rewritten:
    """Split layers into three and turn them into their eigenbasis, in place.

    A layer that is split already, pruned or not, is only turned: its outer layers take up the new rotations.

    batches: (inputs, labels) of a classifier; the labels are not used.
    layers:  shell patterns of paths, separated by spaces; without any, all layers that are worth it: those
             that are smaller than before once this `share` of either kind of their new channels is left.
    returns: all layers in the new form, and why others are not.
    raises:  DataError without examples, or where outputs or gradients are not finite; UsageError when a
             pattern fits no convolution or linear layer.
    """
    before = split_layers(model)
    chosen, skipped = _choose(model, layers.split(), share)
    rebuild(model, chosen)
    probe = _probe(model)
    cores = {path: _parts(probe, path)[1] for path in (*before, *chosen)}
    factors, examples = sum_factors(probe, cores, batches, _channels)
    if not examples:
        raise DataError("the eigenbasis needs calibration examples; give the data source a .calibration")
    for path, sums in factors.items():
        if sums.inputs.ndim and sums.outputs.ndim:
            _turn(_parts(model, path), _eigenvectors(sums.inputs[0], path), _eigenvectors(sums.outputs[0], path))
        elif path in chosen:
            restore(model, [path])
            skipped[path] = "does not run on the calibration examples, or gets no gradient"
    kept = [path for path in chosen if path not in skipped]
    return Rewritten(transform="kfe", layers=(*before, *kept), skipped=skipped)


def rebuild(model: nn.Module, layers: Sequence[str]) -> None:
    """Split layers in place, between two rotations that do nothing yet."""
    for path in layers:
        _put(model, path, _split(model.get_submodule(path)))


def restore(model: nn.Module, layers: Iterable[str]) -> None:
    """Multiply the three layers out to one of the original shape, in place; of lower rank when it was pruned.

    model:  the user's own, or a compacted one.
    raises: ModelError when there are no three layers, or other things than the three in a row read them.
    """
    for path in layers:
        parts = _parts(model, path)
        calls = _calls(model.graph, path) if isinstance(model, fx.GraphModule) else []
        _put(model, path, _merge(*parts))
        for chain in calls:
            first, last = chain[0], chain[-1]
            with last.graph.inserting_before(last):
                last.replace_all_uses_with(last.graph.call_module(path, first.args))
            for node in reversed(chain):
                node.graph.erase_node(node)
    if isinstance(model, fx.GraphModule):
        model.graph.lint()
        model.recompile()


def unpaid_layers(graph: Graph, widths: Mapping[str, int], profile: Profile | None = None) -> list[str]:
    """Layers whose three parts, at these widths, cost no less than one of the original shape: see `savings`."""
    return [path for path, saved in savings(graph, widths, profile).items() if saved <= 0]


def savings(graph: Graph, widths: Mapping[str, int], profile: Profile | None = None) -> dict[str, float]:
    """What each layer costs less in its three parts, at these widths, than as one of the original shape.

    graph:   of the rewritten model. widths: of its groups; what is not named is whole.
    profile: the tables of its kernels price the parts, and the table of the middle one, which does the
             original layer's work, prices that.
    returns: seconds; parameters without a profile, and for layers whose kernels it does not tell apart.
    """
    parameters = {parameter.name: parameter for parameter in graph.parameters}
    tables = {table.signature: table for table in profile.tables} if profile is not None else {}
    kernels = _kernels_by_weight(graph, profile)
    found = {}
    for path in (name.removesuffix(f".{CORE}.weight") for name in parameters if name.endswith(f".{CORE}.weight")):
        weights = [f"{path}.{part}.weight" for part in PARTS]
        if not parameters.keys() >= set(weights):
            continue
        if kernels.keys() >= set(weights):
            parts = [kernels[weight] for weight in weights]
            ends = [kernel_sizes(part, widths, graph.units) for part in parts]
            split = sum(kernel_latency(tables[p.signature], *sizes) for p, sizes in zip(parts, ends, strict=True))
            found[path] = kernel_latency(tables[parts[1].signature], ends[0][0], ends[2][1]) - split
        else:
            first, core, last = ([e.size(widths, graph.units) for e in parameters[name].extents] for name in weights)
            found[path] = math.prod([last[0], first[1], *core[2:]]) - sum(map(math.prod, (first, core, last)))
    return found


def split_layers(model: nn.Module) -> list[str]:
    """Paths of what consists of the three layers already."""
    return [path for path, module in model.named_modules() if set(dict(module.named_children())) == set(PARTS)]


# --- which layers --------------------------------------------------------------------------------


def break_even(weight: Tensor) -> float:
    """The share s of either kind of new channels at which the three layers have as many parameters as the one.

    s (i² + o²) + s² i o t = i o t for i inputs, o outputs and t taps.
    """
    outputs, inputs = weight.shape[:2]
    whole, rotations = weight.numel(), inputs**2 + outputs**2
    return (math.hypot(rotations, 2 * whole) - rotations) / (2 * whole)


def _choose(model: nn.Module, patterns: Sequence[str], share: float) -> tuple[list[str], dict[str, str]]:
    """Paths to split, and of the others why not."""
    split = split_layers(model)
    parts = {f"{path}.{part}" for path in split for part in PARTS}
    layers = {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear) and path not in parts
    }
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in (*layers, *split)):
            raise UsageError(f"no convolution or linear layer is called '{pattern}'; there are {', '.join(layers)}")
    chosen, skipped = [], {}
    twice = _used_twice(model)
    for path, layer in layers.items():
        if patterns and not any(fnmatchcase(path, pattern) for pattern in patterns):
            continue
        reason = "is the whole model" if not path else _why_not(layer, twice)
        if reason is None and not patterns and (left := break_even(layer.weight)) < share:
            reason = f"would be smaller only with less than {left:.0%} of its new channels left"
        if reason is None:
            chosen.append(path)
        else:
            skipped[path] = reason
    return chosen, skipped


def _why_not(layer: nn.Module, twice: set[int]) -> str | None:
    """What keeps a layer from being split, or None."""
    if type(layer) not in (nn.Conv1d, nn.Conv2d, nn.Linear):
        return f"is a {type(layer).__name__}, not a plain Conv1d, Conv2d or Linear"
    if "weight" not in layer._parameters:
        return "has a weight that is computed from others"
    assert isinstance(layer, Layer)
    if not isinstance(layer, nn.Linear) and layer.groups > 1:
        return "is a grouped convolution"
    if not is_plain(layer):
        return "pads with something else than a number of zeros"
    if twice & {id(layer), id(layer.weight)}:
        return "is used, or its weight is, under two names"
    if max(len(layer.weight), layer.weight[0].numel()) > MAX_FEATURES:
        return "has more inputs or outputs than second moments are taken of"
    return None


def _used_twice(model: nn.Module) -> set[int]:
    """Identities of modules and parameters that the model has under two names."""
    found = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    found.update(id(tensor) for module in model.modules() for tensor in module._parameters.values())
    return {identity for identity, count in found.items() if count > 1 and identity != id(None)}


def _kernels_by_weight(graph: Graph, profile: Profile | None) -> dict[str, Kernel]:
    """What executes each weight."""
    weights = {node.name: node.parameters[0] for node in graph.nodes if node.parameters}
    kernels = profile.kernels if profile is not None else ()
    return {weights[node]: kernel for kernel in kernels for node in kernel.nodes if node in weights}


# --- the three layers ----------------------------------------------------------------------------


def _parts(model: nn.Module, path: str) -> tuple[Layer, Layer, Layer]:
    """raises: ModelError."""
    try:
        first, core, last = (model.get_submodule(f"{path}.{part}") for part in PARTS)
    except AttributeError as error:
        raise ModelError(f"'{path}' is not in its eigenbasis; it has no {', '.join(PARTS)}") from error
    assert isinstance(first, Layer) and isinstance(core, Layer) and isinstance(last, Layer)
    return first, core, last


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _split(layer: nn.Module) -> nn.Sequential:
    assert isinstance(layer, Layer)
    spatial = [1] * (layer.weight.ndim - 2)
    outputs, inputs = (torch.eye(size).reshape(size, size, *spatial) for size in layer.weight.shape[:2])
    parts = (
        _make(layer, inputs, None, pointwise=True),
        _make(layer, layer.weight, None),
        _make(layer, outputs, layer.bias, pointwise=True),
    )
    return nn.Sequential(OrderedDict(zip(PARTS, parts, strict=True))).train(layer.training)


@torch.no_grad()
def _merge(first: Layer, core: Layer, last: Layer) -> Layer:
    weight = torch.einsum("po,oi...,ic->pc...", _matrix(last), core.weight.double(), _matrix(first))
    bias = last.bias
    if core.bias is not None:
        shift = _matrix(last) @ core.bias.double()
        bias = shift if bias is None else shift + bias
    return _make(core, weight, bias)


def _make(like: Layer, weight: Tensor, bias: Tensor | None, *, pointwise: bool = False) -> Layer:
    """A layer of the same kind around copies of other tensors; pointwise: without its window and stride."""
    outputs, inputs = weight.shape[:2]
    layer: Layer
    if isinstance(like, nn.Linear):
        layer = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    elif pointwise:
        layer = type(like)(inputs, outputs, 1, bias=bias is not None, device="meta")
    else:
        layer = type(like)(
            inputs, outputs, like.kernel_size, like.stride, like.padding, like.dilation,  # type: ignore[arg-type]
            bias=bias is not None, device="meta",
        )  # fmt: skip
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            value = tensor.detach().to(like.weight).clone(memory_format=torch.contiguous_format)
            setattr(layer, name, nn.Parameter(value, requires_grad=like.weight.requires_grad))
    return layer.train(like.training)


@torch.no_grad()
def _turn(parts: tuple[Layer, Layer, Layer], inputs: Tensor, outputs: Tensor) -> None:
    """Change the basis between the three layers in place; inputs, outputs: orthogonal matrices."""
    first, core, last = parts
    values = (
        inputs.T @ _matrix(first),
        torch.einsum("op,oi...,iq->pq...", outputs, core.weight.double(), inputs),
        _matrix(last) @ outputs,
    )
    for layer, value in zip(parts, values, strict=True):
        layer.weight.copy_(value.reshape(layer.weight.shape))


def _matrix(layer: Layer) -> Tensor:
    """The weight of a pointwise layer, (outputs, inputs), in float64."""
    return layer.weight.detach().double().flatten(1)


def _calls(graph: fx.Graph, path: str) -> list[list[fx.Node]]:
    """The calls of the three layers, in order, once per use. raises: ModelError."""
    chains = []
    for last in [node for node in graph.nodes if node.op == "call_module" and node.target == f"{path}.{OUT}"]:
        chain = [last]
        while len(chain) < len(PARTS) and isinstance(source := chain[0].args[0], fx.Node):
            chain.insert(0, source)
        if [node.target for node in chain] != [f"{path}.{part}" for part in PARTS] or any(
            len(node.users) != 1 for node in chain[:-1]
        ):
            raise ModelError(f"the three layers of '{path}' do not follow one another; it cannot be restored")
        chains.append(chain)
    return chains


# --- their second moments ------------------------------------------------------------------------


def _probe(model: nn.Module) -> nn.Module:
    """A copy in evaluation whose gradients reach everything."""
    probe = copy.deepcopy(model).eval()
    for parameter in probe.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return probe


def _channels(layer: Layer, x: Tensor) -> Tensor:
    """a aᵀ over channels, (1, c, c), summed over positions and examples."""
    rows = by_group(layer, x)
    return (rows.transpose(1, 2) @ rows).double()


def _eigenvectors(moments: Tensor, path: str) -> Tensor:
    """In columns, of the largest eigenvalue first. raises: DataError."""
    if not bool(torch.isfinite(moments).all()):
        raise DataError(f"the second moments of '{path}' are not finite; check weights and calibration data")
    vectors: Tensor = torch.linalg.eigh(moments).eigenvectors
    return vectors.flip(1)
