"""Set weights to zero in a pattern, without changing any shape, and say what is zero."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from edgeprune.core.errors import ModelError
from edgeprune.core.records import Graph, LayerSparsity, Sparsity
from edgeprune.graphs.capture import Inputs
from edgeprune.graphs.permute import permute_units, same_outputs
from edgeprune.graphs.slice import named_tensors
from edgeprune.patterns import load_pattern, select_layers


@torch.no_grad()
def sparsify_model(module: nn.Module, pattern: str, *, before: nn.Module | None = None) -> Sparsity:
    """Zero weights in place, at once; a model that has the pattern already stays as it is.

    pattern: a member of `patterns/` and its options (`n_m:n=2,m=4`). before: the dense model, where `module` has been
        trained since; tells what share of its magnitude is left.
    returns: what is zero, layer by layer, and which layers stay dense and why.
    raises:  UsageError; ModelError when no layer can have the pattern.
    """
    chosen = load_pattern(pattern)
    layers, skipped = select_layers(module, chosen)
    if not layers:
        reasons = "; ".join(f"{name}: {why}" for name, why in skipped.items())
        raise ModelError(f"no layer of the model can have the pattern {pattern}{': ' if reasons else ''}{reasons}")
    dense = named_tensors(module if before is None else before)
    found = {}
    for name, mask in chosen.masks(layers).items():
        weight, given = layers[name].weight, dense[name].detach().abs().double()
        weight.masked_fill_(~mask, 0.0)
        zeros = int((weight == 0).sum())
        share = float(given[weight != 0].sum() / given.sum()) if given.any() else None
        found[name] = LayerSparsity(weights=weight.numel(), zeros=zeros, kept_share=share)
    left = [named_tensors(module)[name] for name in skipped if name in named_tensors(module)]
    return Sparsity(
        pattern=pattern,
        layers=found,
        skipped=skipped,
        weights=sum(each.weights for each in found.values()) + sum(tensor.numel() for tensor in left),
        zeros=sum(each.zeros for each in found.values()) + sum(int((tensor == 0).sum()) for tensor in left),
    )


def order_channels(module: nn.Module, inputs: Inputs, graph: Graph, pattern: str) -> tuple[str, ...]:
    """Reorder channels in place, where the pattern then keeps more of the weights; the output stays.

    inputs: example tensors. graph: traced from `module`. returns: the groups that have another order now.
    raises: UsageError; RecordError for the graph of another model.
    """
    chosen = load_pattern(pattern)
    orders = chosen.orders(select_layers(module, chosen)[0], graph)
    permuted = []
    for name, order in orders.items():
        trial = copy.deepcopy(module)
        permute_units(trial, graph, {name: order})
        # What the trace does not know of, such as code that picks channels by number, shows here.
        if same_outputs(module, trial, inputs):
            permute_units(module, graph, {name: order})
            permuted.append(name)
    return tuple(permuted)


def prepare_pattern(module: nn.Module, inputs: Inputs, graph: Graph, pattern: str) -> Sparsity:
    """`order_channels`, then `sparsify_model`. returns: its record."""
    permuted = order_channels(module, inputs, graph, pattern)
    return replace(sparsify_model(module, pattern), permuted=permuted)
