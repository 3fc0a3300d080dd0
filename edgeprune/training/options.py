"""What a recovery cannot be asked for, found before anything long starts."""

from __future__ import annotations

from edgeprune.core.errors import UsageError

PRUNED, SCRATCH = "pruned", "scratch"
"""Where training starts from: the weights that are left, or new ones."""
EPOCHS, MACS = "epochs", "macs"
"""What a training from scratch is given: the epochs said, or the arithmetic that these take the dense model."""


def check_options(
    *, start: str = PRUNED, budget: str = EPOCHS, match_outputs: bool = False, beside: str | None = None
) -> None:
    """raises: UsageError for a value out of its range, and for what does not go together.

    beside: what the training is for beside accuracy, as a message names it: `"a pattern"`; None.
    """
    if start not in (PRUNED, SCRATCH):
        raise UsageError(f"start = '{start}': training starts from '{PRUNED}' weights or from '{SCRATCH}'")
    if budget not in (EPOCHS, MACS):
        raise UsageError(f"budget = '{budget}': a training from scratch is given '{EPOCHS}' or '{MACS}'")
    if budget == MACS and start != SCRATCH:
        raise UsageError(f"budget = '{MACS}' is for start = '{SCRATCH}': other training takes the epochs that you say")
    if start == SCRATCH and match_outputs:
        raise UsageError(
            f"start = '{SCRATCH}' needs labels: outputs are matched with the statistics that batch norms have, and new "
            "weights have none"
        )
    if start == SCRATCH and beside is not None:
        raise UsageError(f"start = '{SCRATCH}' does not go with {beside}, which goes on from trained weights")
