"""What is planned against the artifact as it is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import synthetic_importance, synthetic_profile
from torch import nn

from edgeprune.compact import compact_model
from edgeprune.core.budget import make_budget
from edgeprune.core.cost import predict_cost
from edgeprune.core.records import FLOAT32, Precision
from edgeprune.export import export_model
from edgeprune.formats import onnx as format
from edgeprune.on_board import choose_written
from edgeprune.trace import trace_graph

torch.set_num_threads(1)
INPUTS = (torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)),)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 40, 3), nn.ReLU(),
        nn.Conv2d(40, 40, 3, groups=40), nn.ReLU(), nn.Conv2d(40, 64, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(64, 10),
    ).eval()  # fmt: skip


@pytest.mark.parametrize(
    "precision", [FLOAT32, Precision(dtype="dynamic"), Precision(dtype="int8")], ids=lambda p: p.name
)
def test_a_size_budget_is_met_by_the_file(precision: Precision, tmp_path: Path) -> None:
    """To the byte, labels and all, in every precision; and nearly used up."""
    module = net()
    graph = trace_graph(module, INPUTS)
    calibration = [(np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32),)]
    labels = tuple(f"class {number}" for number in range(10))

    def export(model: nn.Module, name: str):
        return export_model(
            model, INPUTS, tmp_path / name, precision=precision, calibration=calibration, labels=labels, graph=graph
        )

    dense = export(module, "dense.onnx")
    resizer = format.make_resizer(module, INPUTS, graph, precision=precision)
    resizer.dense_bytes += dense.metadata_bytes
    assert resizer.dense_bytes == pytest.approx(dense.bytes, abs=200)
    profile = replace(synthetic_profile(graph), dense_bytes=resizer.dense_bytes, precision=precision)
    budget = make_budget(predict_cost(graph, {}, profile), size=f"{int(0.5 * dense.bytes)}B")
    plan = choose_written(graph, profile, synthetic_importance(graph), budget, resizer)
    assert plan.budget == budget
    compact = export(compact_model(module, INPUTS, graph, plan.keep), "compact.onnx")
    assert budget.artifact_bytes is not None
    assert compact.bytes == pytest.approx(plan.predicted.artifact_bytes, abs=200)
    assert 0.9 * budget.artifact_bytes <= compact.bytes <= budget.artifact_bytes
