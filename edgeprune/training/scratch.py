"""Training from nothing: new weights for a shape, and how long. The baselines that pruning has to beat.

source: Liu et al., Rethinking the Value of Network Pruning, ICLR 2019, arXiv:1810.05270: scratch-E trains the small net
as many epochs as the large one, scratch-B with as much arithmetic.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from edgeprune.core.cost import count_macs
from edgeprune.core.errors import ModelError
from edgeprune.core.records import Graph


@torch.no_grad()
def draw_weights(module: nn.Module, seed: int) -> None:
    """Give every layer new weights, in place, as PyTorch gives a new layer of its kind; batch norms forget.

    seed: of the global generator, whose state is restored.
    raises: ModelError, with the module as it was, when a parameter belongs to no layer that draws its own
        (`reset_parameters`), such as a class token.
    """
    before = {key: value.clone() for key, value in module.state_dict().items()}
    for parameter in module.parameters():
        parameter.fill_(math.nan)  # what nobody draws stays so
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in module.modules():
            if callable(reset := getattr(layer, "reset_parameters", None)):
                reset()
    left = [name for name, parameter in module.named_parameters() if bool(parameter.isnan().any())]
    if left:
        module.load_state_dict(before)
        raise ModelError(
            f"no layer draws new weights for {', '.join(left[:5])}{' and more' if len(left) > 5 else ''}; start from "
            "the pruned weights, or draw all weights yourself and recover that model"
        )


def epochs_of_equal_work(epochs: int, dense: Graph, smaller: Graph) -> int:
    """Epochs in which the smaller net does as much arithmetic as the dense one in `epochs`, rounded (scratch-B)."""
    theirs, ours = (count_macs(graph, {}) for graph in (dense, smaller))
    return round(epochs * theirs / max(ours, 1))
