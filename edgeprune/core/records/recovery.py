"""What decides a training, and what it did."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgeprune.core.records.model import Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoverSettings:
    """What decides the outcome of a recovery, so that a checkpoint of another one is not resumed."""

    epochs: int
    lr: float
    momentum: float
    weight_decay: float
    distil_weight: float
    temperature: float
    seed: int
    precision: Precision | None = None
    regularizer: str | None = None
    pattern: str | None = None
    match_outputs: bool = False
    gating: str | None = None
    start: str = "pruned"
    ema: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    features: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoverResult:
    """What training did.

    accuracy_before, accuracy_after: top-1 on the test batches, None without them.
    difference_before, difference_after: from outputs that were matched, as a share of their power; None otherwise.
    losses: mean training loss of each epoch. epochs: how many were trained.
    autocast: in bfloat16. channels_last: with images laid out so in memory.
    note: why training stopped early or was undone, or "".
    zeroed: units that a regularizer has brought to zero, per group that has any; weights of a pattern, per layer.
    """

    accuracy_before: float | None = None
    accuracy_after: float | None = None
    difference_before: float | None = None
    difference_after: float | None = None
    losses: tuple[float, ...]
    epochs: int
    autocast: bool
    channels_last: bool = False
    note: str = ""
    zeroed: dict[str, int] = field(default_factory=dict)
