"""The smaller model: removed units cut out of weights and graph, and how it is kept on disk."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save as serialise
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from edgeprune.compensation.batch_norm import match_batch_norm, reestimate_batch_norm
from edgeprune.compensation.least_squares import compensate
from edgeprune.core.errors import ModelError
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import Graph, Plan
from edgeprune.core.store import write_atomic
from edgeprune.graphs.capture import Inputs, capture, evaluating, export_program
from edgeprune.graphs.lift import lift
from edgeprune.graphs.ports import PORTS, get_ports
from edgeprune.graphs.slice import (
    Keep,
    dropped_by,
    parameter_slices,
    removed_units,
    replace_tensors,
    slice_captured,
    slice_model,
)

Batches = Iterable[tuple[Any, Tensor]]
TOLERANCE = 1e-4
"""Largest difference between two forms of one float32 model, relative to the largest output."""


def compact_model(module: nn.Module, inputs: Inputs, graph: Graph, keep: Keep, *, in_place: bool = False) -> nn.Module:
    """Cut the removed units out of a model.

    inputs: example tensors, as for `trace_graph`. keep: kept units per group, ascending.
    in_place: slice `module` itself, so that the user's own classes stay; for models whose code takes
        no channel count from anything but its layers.
    returns: a new trainable module under the same state-dict keys, or `module` when in place.
    raises: RecordError when the graph or the kept units do not fit the model; ModelError when the
        model's own code does not run on fewer channels.
    """
    if in_place and (dropped := dropped_by(graph, keep)):
        raise ModelError(
            f"the model cannot be sliced in place: its own code computes {dropped[0].name}, which is dropped whole; "
            "use the lifted form (in_place=False)"
        )
    lifted = slice_model(module, inputs, graph, keep)
    if not in_place:
        return lifted
    trial = copy.deepcopy(module)
    _slice_layers(trial, graph, keep)
    if (why := _difference(trial, lifted, inputs)) is not None:
        raise ModelError(
            f"the model cannot be sliced in place: {why}{_written_sizes(graph, keep)}; "
            "use the lifted form (in_place=False), which patches these numbers"
        )
    _slice_layers(module, graph, keep)
    return module


class Assembler:
    """Makes the nets of many plans of one model; its export, half of the work of making one, is done once.

    inputs: example tensors, as for `trace_graph`. graph: of the model.
    raises: ModelError when torch.export rejects the model.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, graph: Graph) -> None:
        self._graph, self._captured = graph, capture(model, inputs)

    @classmethod
    def of(cls, captured: fx.GraphModule, graph: Graph) -> Self:
        """Of a model that `capture` was called for; it is not changed."""
        made = cls.__new__(cls)
        made._graph, made._captured = graph, captured
        return made

    def assemble(self, plan: Plan, calibration: Batches | None, *, progress: Progress = silent) -> nn.Module:
        """The smaller model; with calibration batches the layers that read removed channels are refitted.

        Refitted outputs match the dense model's, so what its batch norms compute still holds, and only how they say it
        is brought up to date: with other statistics for the same scales accuracy would be lost. Where nothing could be
        refitted the statistics are taken anew.

        raises: RecordError when the plan is of another model.
        """
        smaller = slice_captured(copy.deepcopy(self._captured), self._graph, plan.keep)
        if calibration is not None:
            dense = lift(copy.deepcopy(self._captured))
            if compensate(smaller, dense, self._graph, plan.keep, calibration, lifted=True, progress=progress):
                match_batch_norm(smaller, calibration)
            else:
                reestimate_batch_norm(smaller, calibration)
        return smaller.eval()


def compact_and_compensate(
    model: nn.Module,
    inputs: Inputs,
    graph: Graph,
    plan: Plan,
    calibration: Batches | None,
    *,
    progress: Progress = silent,
) -> nn.Module:
    """The net of one plan; see `Assembler`, which makes several for little more."""
    return Assembler(model, inputs, graph).assemble(plan, calibration, progress=progress)


def save_compact(module: nn.Module, inputs: Inputs, directory: Path, *, name: str = "compact") -> None:
    """Write `NAME.pt2` (program with a free batch size) and `NAME.safetensors` (state dict), atomically.

    raises: ModelError from torch.export; UsageError when the folder cannot be written.
    """
    file = io.BytesIO()
    ports = replace(get_ports(module), shapes=tuple(tuple(tensor.shape) for tensor in inputs))
    torch.export.save(export_program(module, inputs), file, extra_files={PORTS: ports.to_json()})
    state = {key: tensor.detach().clone().contiguous() for key, tensor in module.state_dict().items()}
    write_atomic(directory / f"{name}.safetensors", serialise(state))
    write_atomic(directory / f"{name}.pt2", file.getvalue())


def _slice_layers(module: nn.Module, graph: Graph, keep: Keep) -> None:
    """Slice parameters where they stand and correct what their layers say of them."""
    removed = removed_units(graph, keep)
    slices = parameter_slices(graph, removed)
    replace_tensors(module, slices)
    nodes = {node.name: node for node in graph.nodes}
    for group in graph.groups:
        for constant in group.constants if group.name in removed else ():
            node = nodes[constant.node]
            if node.parameters and (node.op.startswith("conv") or node.op == "group_norm"):
                layer = module.get_submodule(node.parameters[0].rpartition(".")[0])
                name = "num_groups" if node.op == "group_norm" else "groups"
                setattr(layer, name, getattr(layer, name) - int(constant.count[removed[group.name]].sum()))
    for path in {key.rpartition(".")[0] for key in slices}:
        _describe(module.get_submodule(path))


def _describe(layer: nn.Module) -> None:
    """Set a layer's sizes from its weight."""
    weight = getattr(layer, "weight", None)
    if isinstance(layer, nn.modules.conv._ConvNd):
        ours, others = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
        layer.in_channels, layer.out_channels = (ours, others) if layer.transposed else (others, ours)
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.modules.batchnorm._NormBase):
        sizes = [t.shape[0] for t in (layer.weight, layer.running_mean) if t is not None]
        layer.num_features = sizes[0]
    elif isinstance(layer, nn.GroupNorm):
        layer.num_channels = layer.weight.shape[0]
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = tuple(layer.weight.shape)
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = layer.weight.shape[0]
    elif isinstance(layer, nn.Embedding) and weight is not None:
        layer.num_embeddings, layer.embedding_dim = weight.shape


def _difference(trial: nn.Module, lifted: nn.Module, inputs: Inputs) -> str | None:
    """Why the two do not compute the same on noise of the inputs' shape, or None when they do."""
    noise = tuple(torch.randn_like(x) if x.is_floating_point() else x for x in inputs)
    with evaluating(trial), evaluating(lifted), torch.no_grad():
        try:
            outputs = pytree.tree_leaves(trial(*noise))
        except Exception as error:  # whatever the user's code raises on fewer channels
            return f"its code does not run on fewer channels ({str(error).splitlines()[0] if str(error) else error!r})"
        for ours, reference in zip(outputs, pytree.tree_leaves(lifted(*noise)), strict=True):
            limit = TOLERANCE * max(float(reference.abs().max()), 1e-6)
            if ours.shape != reference.shape or float((ours - reference).abs().max()) > limit:
                return "its code computes something else on fewer channels"
    return None


def _written_sizes(graph: Graph, keep: Keep) -> str:
    """Operators whose arguments would have to change, with the modules they stand in."""
    removed, nodes = removed_units(graph, keep), {node.name: node for node in graph.nodes}
    found = {
        f"{nodes[c.node].op} in '{nodes[c.node].path or 'the model'}'"
        for group in graph.groups
        for c in group.constants
        if group.name in removed and not nodes[c.node].parameters
    }
    return f"; channel counts stand in {', '.join(sorted(found)[:5])}" if found else ""
