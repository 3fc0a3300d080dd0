"""Diagonal of the Hessian by Hutchinson's estimator (Yao et al., AAAI 2021, arXiv:2006.00719)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from edgeprune.core.errors import ModelError
from edgeprune.core.records import Graph, Member
from edgeprune.statistics import Batch, Fill
from edgeprune.statistics._layers import rows
from edgeprune.statistics._losses import cross_entropy, finite

LABELS = True
CLASSIFIER = True
BATCH = 8
"""Small, for many probes: the noise falls with their number in all, the cost rises with probes x examples."""
PROBES = 4
"""Random vectors per batch; a few dozen in all are too few, their noise hides the order of the units."""


def collect(model: nn.Module, graph: Graph, batches: Iterable[Batch], *, probes: int = PROBES) -> Iterator[Fill]:
    """curvature: (units, k), diagonal of the Hessian of all examples' mean loss by relative changes of weights; once.

    That is w² times the usual diagonal: the mean of v ⊙ Hv over v = w ⊙ random signs, in place of the signs
    alone (ours: it takes fewer probes). It is exact where H is diagonal; the error of an entry falls
    with 1/sqrt(probes x batches) and is as large as the rest of its row.

    raises: ModelError when an operation of the model has no second derivative.
    """
    names = {member.parameter for group in graph.prunable for member in group.members}
    parameters = {name: value for name, value in model.named_parameters() if name in names and value.requires_grad}
    sums = {name: torch.zeros_like(value) for name, value in parameters.items()}
    generator, examples = torch.Generator().manual_seed(0), 0
    for inputs, targets in batches:
        assert targets is not None
        with sdpa_kernel(SDPBackend.MATH):  # the fused forms of attention have no second derivative
            loss = finite(cross_entropy(model, inputs, targets, "sum"))
        examples += len(targets)
        slopes = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, materialize_grads=True)
        for _ in range(probes):
            changes = [
                (torch.randint(0, 2, value.shape, generator=generator).to(value) * 2 - 1) * value.detach()
                for value in parameters.values()
            ]
            try:
                products = torch.autograd.grad(
                    slopes, list(parameters.values()), changes, retain_graph=True, materialize_grads=True
                )
            except RuntimeError as error:
                raise ModelError(
                    f"an operation of the model has no second derivative ({error}); "
                    "use another criterion, such as taylor"
                ) from error
            for total, change, product in zip(sums.values(), changes, products, strict=True):
                total += change * product / probes

    def fill(member: Member) -> dict[str, Tensor]:
        return {"curvature": rows(sums[member.parameter] / examples, member.axis, member.index)}

    yield fill
