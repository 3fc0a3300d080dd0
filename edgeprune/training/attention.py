"""Attention transfer: a model learns where a dense one looks, whatever their numbers of channels.

Of the paper (Zagoruyko and Komodakis, ICLR 2017, arXiv:1612.03928, section 3.1): the map of an activation is the sum of
its squares over the channels, the maps of both models are brought to norm 1, and their squared difference is what the
authors' code minimises. Ours: the layers are found, the last that both models have at each resolution (the paper takes
the ends of a residual net's stages); squares are summed over a map, not averaged, so that a weight means the same at
every resolution.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.core.errors import UsageError


def shared_layers(module: nn.Module, teacher: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[str, ...]:
    """Paths of the layers whose maps are compared: the last of each resolution that both models have.

    inputs: a batch for both. raises: UsageError where they share no layer with maps (n, c, h, w) of one size.
    """
    ours, theirs = (_map_sizes(each, inputs) for each in (module, teacher))
    last = {size: name for name, size in theirs.items() if ours.get(name) == size}
    if not last:
        raise UsageError(
            "features: the model and the dense one share no layer, by its path, that gives images (n, c, h, w) of one "
            "size; set features = 0"
        )
    return tuple(last.values())


def _map_sizes(module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, tuple[int, ...]]:
    """(h, w) of every layer's output that is an image of more than one place, in the order of the calls."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), watch(module, [name for name, _ in module.named_modules() if name]) as seen:
            module(*inputs)
    finally:
        module.train(training)
    images = {name: out.shape for name, out in seen.items() if out.ndim == 4 and len(out) == len(inputs[0])}
    return {name: tuple(shape[2:]) for name, shape in images.items() if prod(shape[2:]) > 1}


@contextmanager
def watch(module: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Outputs of layers by their paths, once the module has run; of several calls the last."""
    seen: dict[str, Tensor] = {}

    def note(name: str, output: object) -> None:
        if isinstance(output, Tensor):
            seen.pop(name, None)  # its place is that of the last call
            seen[name] = output

    handles = [
        module.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: note(name, output))
        for name in layers
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def attention_loss(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Tensor:
    """Squared distance between the maps of two models, mean over the batch, sum over the layers; in [0, 2] for each.

    ours, theirs: activations (n, c, h, w) by layer; channels may differ.
    """
    distances = [(_attention(ours[name]) - _attention(theirs[name])).square().sum(dim=1).mean() for name in theirs]
    return torch.stack(distances).sum()


def _attention(activation: Tensor) -> Tensor:
    return functional.normalize(activation.float().square().sum(dim=1).flatten(1), dim=1)
