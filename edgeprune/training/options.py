"""What a recovery cannot be asked for, found before anything long starts."""

from __future__ import annotations

import math

from edgeprune.core.errors import UsageError

PRUNED, SCRATCH = "pruned", "scratch"
"""Where training starts from: the weights that are left, or new ones."""
EPOCHS, MACS = "epochs", "macs"
"""What a training from scratch is given: the epochs said, or the arithmetic that these take the dense model."""


def check_options(
    *,
    start: str = PRUNED,
    budget: str = EPOCHS,
    ema: float = 0.0,
    label_smoothing: float = 0.0,
    mixup: float = 0.0,
    features: float = 0.0,
    taught: bool = True,
    match_outputs: bool = False,
    regularizer: str | None = None,
    pattern: str | None = None,
    gating: str | None = None,
    in_8_bits: bool = False,
    processes: int = 1,
) -> None:
    """raises: UsageError for a value out of its range, and for what does not go together.

    taught: whether there is a dense model to learn from. processes: how many train together.
    """
    if start not in (PRUNED, SCRATCH):
        raise UsageError(f"start = '{start}': training starts from '{PRUNED}' weights or from '{SCRATCH}'")
    if budget not in (EPOCHS, MACS):
        raise UsageError(f"budget = '{budget}': a training from scratch is given '{EPOCHS}' or '{MACS}'")
    for name, value in (("ema", ema), ("label_smoothing", label_smoothing)):
        if not 0 <= value < 1:
            raise UsageError(f"{name} = {value}: it must be at least 0, which is off, and below 1")
    for name, value in (("mixup", mixup), ("features", features)):
        if not 0 <= value < math.inf:
            raise UsageError(f"{name} = {value}: it must be a number of at least 0, which is off")
    if budget == MACS and start != SCRATCH:
        raise UsageError(f"budget = '{MACS}' is for start = '{SCRATCH}': other training takes the epochs that you say")
    if match_outputs and not taught:
        raise UsageError("there are no outputs to match: give the dense model as the teacher")
    if features and not taught:
        raise UsageError("features are learnt from the dense model: give it as the teacher (distil = true)")
    if match_outputs and start == SCRATCH:
        raise UsageError(
            f"start = '{SCRATCH}' needs labels: outputs are matched with the statistics that batch norms have, and new "
            "weights have none"
        )
    if match_outputs and label_smoothing:
        raise UsageError("label_smoothing needs labels, and outputs are matched without")
    if regularizer is not None and in_8_bits:
        raise UsageError("a regularizer trains in float32 only")
    if regularizer is not None and pattern is not None:
        raise UsageError("a regularizer and a pattern do not go together: train with one, then with the other")
    more = regularizer or pattern or in_8_bits or match_outputs or label_smoothing or mixup or features
    if gating is not None and more:
        raise UsageError(
            "gates are trained by themselves: with plain labels, without a regularizer or pattern, and in float32"
        )
    asked = {"a regularizer": regularizer, "a pattern": pattern, "gates": gating, "simulated 8 bits": in_8_bits}
    beside = next((name for name, value in asked.items() if value), None)
    if beside is not None and start == SCRATCH:
        raise UsageError(f"start = '{SCRATCH}' does not go with {beside}, which goes on from trained weights")
    if beside is not None and ema:
        raise UsageError(f"ema does not go with {beside}: an average of weights is not what it makes of them")
    if beside is not None and processes > 1:
        raise UsageError(f"several processes do not train {beside}: start it by itself")
