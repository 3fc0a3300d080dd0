"""The property everything rests on: the sliced model computes what the masked one does."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from edgeprune.core.records import Graph, IntArray

LIMIT = 1e-4
"""Largest difference, relative to the largest output, in float32."""


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics, scales and heads as training would leave them: none zero, one or alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
                if name == "running_var" or (tensor.ndim == 1 and name == "weight") or name == "layer_scale":
                    tensor.uniform_(0.5, 1.5, generator=generator)
                elif name == "running_mean" or (tensor.ndim == 1 and tensor.is_floating_point()):
                    tensor.uniform_(-0.5, 0.5, generator=generator)
                elif isinstance(tensor, nn.Parameter) and not tensor.any():
                    tensor.normal_(std=0.05, generator=generator)
    return module.eval()


def random_keep(graph: Graph, rng: np.random.Generator, least: float = 0.5) -> dict[str, IntArray]:
    """Random kept units of every prunable group, at least a share `least` and one."""
    keep = {}
    for group in graph.prunable:
        count = int(rng.integers(max(1, int(np.ceil(group.units * least))), group.units + 1))
        keep[group.name] = np.sort(rng.choice(group.units, count, replace=False))
    return keep


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Largest absolute difference over the largest absolute output."""
    assert ours.shape == reference.shape
    return float((ours - reference).abs().max() / reference.abs().max())
