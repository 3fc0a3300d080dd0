"""Transforms: a model rewritten before it is traced, with the same output and new channels to prune.

`[prune] transform = "kfe"` loads `transforms/kfe.py`. A member is a module with four functions; the first
three change the model in place:

    rewrite(model, batches, *, options) -> Rewritten: layers in their new form.
    rebuild(model, layers): the same structure without data, which a state dict of the rewritten model fits.
    restore(model, layers): layers of the original shape again, with the same output; also after pruning.
    unpaid_layers(graph, widths, profile) -> layers whose new form, at these widths, saves nothing.

What a layer becomes stands at the layer's own path, so that its new parameters are `PATH.*`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from torch import nn

from edgeprune.core.records import Graph, Profile, Rewritten
from edgeprune.statistics import Batch


class Transform(Protocol):
    """What a member module is."""

    def rewrite(self, model: nn.Module, batches: Iterable[Batch]) -> Rewritten:
        """Layers in their new form. raises: DataError; UsageError for options that fit nothing."""
        ...

    def rebuild(self, model: nn.Module, layers: Sequence[str]) -> None:
        """The structure that `rewrite` gave these layers."""
        ...

    def restore(self, model: nn.Module, layers: Iterable[str]) -> None:
        """The original form of these layers, in the user's own module or in a compacted one."""
        ...

    def unpaid_layers(self, graph: Graph, widths: Mapping[str, int], profile: Profile | None) -> list[str]:
        """Priced by the profile's tables where there is one, else by parameters."""
        ...
