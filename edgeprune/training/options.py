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
    beside: str | None = None,
) -> None:
    """raises: UsageError for a value out of its range, and for what does not go together.

    taught: whether there is a dense model to learn from. beside: what the training is for beside accuracy, as a
        message names it: `"a pattern"`; None.
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
    if features and not taught:
        raise UsageError("features are learnt from the dense model: give it as the teacher (distil = true)")
    if match_outputs and start == SCRATCH:
        raise UsageError(
            f"start = '{SCRATCH}' needs labels: outputs are matched with the statistics that batch norms have, and new "
            "weights have none"
        )
    if match_outputs and label_smoothing:
        raise UsageError("label_smoothing needs labels, and outputs are matched without")
    if beside is not None and start == SCRATCH:
        raise UsageError(f"start = '{SCRATCH}' does not go with {beside}, which goes on from trained weights")
    if beside is not None and ema:
        raise UsageError(f"ema does not go with {beside}: an average of weights is not what it makes of them")
