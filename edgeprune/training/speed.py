"""In which precision, and with which layout in memory, a model trains fastest on this machine."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable

from torch import Tensor, nn

from edgeprune.training.batch import lay_out

HOPELESS = 5.0
"""bfloat16 whose first step on a processor takes this many times the quickest step in float32 is given up."""


def fastest_way(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    loss_of: Callable[[nn.Module, tuple[Tensor, ...], bool], Tensor],
    steps: int = 3,
) -> tuple[bool, bool]:
    """Whether in bfloat16, and whether channels last: a few steps of each on a copy of a module in its mode.

    The second fastest step counts. On a processor bfloat16 that is far behind after its first is not tried again:
    without instructions for it, it takes many times as long. On an accelerator a first step may load kernels.

    loss_of: of the copy, for inputs, in bfloat16 or not.
    """
    images = any(tensor.ndim == 4 for tensor in inputs)
    ways = list(itertools.product((False, True), (False, True) if images else (False,)))
    times: dict[tuple[bool, bool], list[float]] = {way: [] for way in ways}
    trial = copy.deepcopy(module)
    for _ in range(steps):
        for autocast, channels_last in ways:
            start = time.perf_counter()
            loss = loss_of(trial, lay_out(inputs, channels_last), autocast)
            loss.backward()
            float(loss.detach())  # waits for an accelerator
            times[autocast, channels_last].append(time.perf_counter() - start)
        if inputs[0].device.type == "cpu":
            quickest = min(min(found) for (autocast, _), found in times.items() if not autocast)
            ways = [way for way in ways if not way[0] or min(times[way]) < HOPELESS * quickest]
    return min(ways, key=lambda way: sorted(times[way])[1])
