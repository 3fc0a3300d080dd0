"""Patterns: which weights are zero while every layer keeps its shape.

`edgeprune sparsify --pattern n_m:n=2,m=4` loads `patterns/n_m.py`. A member is a module with

    make(*, layers, options) -> Pattern

where `layers` are shell patterns of layers, separated by spaces. A pattern gives one mask per layer, and says how
a training keeps to it. Weights are seen as the matrix (out, places x in): a place is a position of the kernel, and
neighbours in a row are input channels. That is the order in which TFLite stores them, and the axis along which
TensorRT's 2:4 sparsity counts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from edgeprune.core.family import configure, load_member
from edgeprune.core.records import Graph, IntArray
from edgeprune.patterns._layers import Layer as Layer
from edgeprune.patterns._layers import find_layers
from edgeprune.patterns._training import Sparsifier

Layers = Mapping[str, Layer]
Masks = dict[str, Tensor]


class Pattern(ABC):
    """Which weights are kept. A member gives `masks`, and overrides what it needs of the rest.

    layers: shell patterns of the layers that it is for.
    """

    def __init__(self, layers: str) -> None:
        self.layers = layers.split()

    def refuses(self, layer: Layer) -> str | None:
        """Why a layer of a fitting kind cannot have the pattern, or None."""
        del layer
        return None

    @abstractmethod
    def masks(self, layers: Layers) -> Masks:
        """A bool tensor of each weight's shape: True is kept. Of weights that have the pattern: their own."""

    def orders(self, layers: Layers, graph: Graph) -> dict[str, IntArray]:
        """Other orders of the units of groups, (units,) each, that lose less to the pattern and change nothing else."""
        del layers, graph
        return {}

    def sparsifier(self, layers: Layers, steps: int) -> Sparsifier:
        """What keeps to the pattern in a training of so many steps."""
        del steps
        return Sparsifier(layers, self.masks)


def load_pattern(chosen: str) -> Pattern:
    """The member of `name:option=value,...`. raises: UsageError."""
    name, _, options = chosen.partition(":")
    made: Pattern = configure(load_member("patterns", name).make, options)()
    return made


def select_layers(module: nn.Module, pattern: Pattern) -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers that get a pattern, by the state-dict key of their weight; why others do not, by theirs."""
    found, skipped = find_layers(module, pattern.layers)
    for name in list(found):
        if (reason := pattern.refuses(found[name])) is not None:
            skipped[name] = reason
            del found[name]
    return found, skipped


def load_sparsifier(chosen: str, module: nn.Module, steps: int) -> Sparsifier:
    """What keeps a model, which is about to be trained, to a pattern. raises: UsageError."""
    pattern = load_pattern(chosen)
    return pattern.sparsifier(select_layers(module, pattern)[0], steps)
