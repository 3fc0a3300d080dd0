"""Zeros in weights of unchanged shape."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSparsity:
    """One layer that has a pattern: how many weights, how many of them zero.

    kept_share: of the magnitude that the weights had before the pattern was put on them; None where that is not known.
    """

    weights: int
    zeros: int
    kept_share: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparsity:
    """Which weights of a model are zero.

    pattern: `name:option=value,...`. layers: by the state-dict key of their weight. skipped: of other convolutions and
    linear layers, why they stay dense. permuted: groups whose units have another order now.
    weights, zeros: of all convolutions and linear layers, skipped ones too.
    """

    pattern: str
    layers: dict[str, LayerSparsity]
    skipped: dict[str, str]
    weights: int
    zeros: int
    permuted: tuple[str, ...] = field(default_factory=tuple)

    @property
    def share(self) -> float:
        """Of all these weights, those that are zero, in [0, 1]."""
        return self.zeros / self.weights if self.weights else 0.0
