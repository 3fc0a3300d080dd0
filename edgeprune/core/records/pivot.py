"""Layers that became diagonal blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgeprune.core.records.costs import Quantity


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBlocks:
    """One layer that runs in blocks.

    groups: how many blocks. gathered: whether it reads its inputs in an order of its own, which costs an operation.
    kept_share: of what its weights contribute to its output (squared weights times squared inputs) that the blocks
    hold. loss: what the net loses with this layer alone in blocks. latency_s, whole_latency_s: of the layer on the
    board, in blocks and as it was. None where that was not measured.
    """

    groups: int
    gathered: bool
    kept_share: float
    loss: float | None = None
    latency_s: float | None = None
    whole_latency_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pivoted:
    """Which layers of a model run in diagonal blocks.

    layers, skipped: by path; why others stay whole. permuted: groups whose channels have another order now.
    macs, whole_macs: multiplications of the model and of the one that it was. latency_share: of its latency on the
    board, measured in turns. limit_share: what that was to be.
    """

    layers: dict[str, LayerBlocks]
    skipped: dict[str, str]
    permuted: tuple[str, ...] = field(default_factory=tuple)
    macs: int
    whole_macs: int
    latency_share: Quantity | None = None
    limit_share: float | None = None
