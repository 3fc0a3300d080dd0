"""The smaller model: removed units cut out of weights and graph."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from edgeprune.core.errors import ModelError
from edgeprune.core.records import Graph
from edgeprune.graphs.capture import Inputs
from edgeprune.graphs.slice import Keep, slice_model


def compact_model(module: nn.Module, inputs: Inputs, graph: Graph, keep: Keep) -> nn.Module:
    return slice_model(module, inputs, graph, keep)
