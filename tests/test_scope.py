"""scope: parts of models whose whole forward cannot be exported, pruned and back in place."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from exactness import LIMIT, random_keep, randomise, relative_error
from torch import Tensor, nn
from zoo import torchvision_models

from edgeprune.compact import compact_model
from edgeprune.core.errors import DataError, ModelError, UsageError
from edgeprune.core.records import ModelSpec, Report
from edgeprune.core.runfile import read_run_file
from edgeprune.graphs.slice import mask_model
from edgeprune.load import Data, load_model
from edgeprune.pipeline import run_pipeline
from edgeprune.recover import recover_accuracy
from edgeprune.scope import enter_scope, put_back, scope_batches, scope_data
from edgeprune.score import score_groups
from edgeprune.trace import trace_graph

torch.set_num_threads(1)
IMAGE = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Detector(nn.Module):
    """What it finds depends on the values: no exporter can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2, padding=1),
            nn.ReLU(), nn.Conv2d(16, 8, 1),
        )  # fmt: skip
        self.head = nn.Conv2d(8, 5, 1)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.head(self.body(x / 2 + 1)).flatten(2)
        found = scores[:, 0] > scores[:, 0].mean()
        return torch.stack([each[:, mask].sum(1) if int(mask.sum()) > 3 else each.mean(1)
                            for each, mask in zip(scores, found, strict=True)])  # fmt: skip


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Detector())


def test_the_whole_cannot_be_traced_but_its_body_is_pruned_exactly(model: nn.Module) -> None:
    with pytest.raises(ModelError):
        trace_graph(model, (IMAGE,))
    body, inputs = enter_scope(model, "body", (IMAGE,))
    assert body is model.body and torch.equal(inputs[0], IMAGE / 2 + 1)
    graph = trace_graph(body, inputs)
    assert {group.name for group in graph.prunable} == {"0", "3"}
    keep = random_keep(graph, np.random.default_rng(1))
    masked = copy.deepcopy(model)
    masked.body = mask_model(body, graph, keep)
    put_back(model, "body", compact_model(body, inputs, graph, keep).eval(), (IMAGE,))
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in masked.parameters())
    with torch.no_grad():
        assert relative_error(model(IMAGE), masked(IMAGE)) < LIMIT


def test_in_place_nothing_has_to_be_put_back(model: nn.Module) -> None:
    body, inputs = enter_scope(model, "body", (IMAGE,))
    graph = trace_graph(body, inputs)
    keep = random_keep(graph, np.random.default_rng(2))
    masked = copy.deepcopy(model)
    masked.body = mask_model(body, graph, keep)
    assert compact_model(body, inputs, graph, keep, in_place=True) is model.body
    with torch.no_grad():
        assert relative_error(model(IMAGE), masked(IMAGE)) < LIMIT


def test_calibration_goes_through_the_model(model: nn.Module) -> None:
    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(3)
        for _ in range(2):
            yield torch.randn(4, 3, 16, 16, generator=generator), torch.zeros(4, dtype=torch.long)

    seen = scope_batches(model, "body", batches())
    for (x, targets), (inputs, kept) in zip(batches(), seen, strict=True):
        assert torch.equal(inputs[0], x / 2 + 1) and torch.equal(targets, kept)
    body, inputs = enter_scope(model, "body", (IMAGE,))
    graph = trace_graph(body, inputs)
    scored = score_groups(body, inputs, graph, seen, criterion="reconstruction", curves=False)
    assert all((scores > 0).any() for scores in scored.scores.values())
    with pytest.raises(DataError, match="no batches"):
        scope_batches(model, "body", [])


def test_what_is_no_scope_is_refused(model: nn.Module) -> None:
    for path, why in (("bodi", "it has body, head, unused"), ("", "scope is empty"), ("unused", "does not call")):
        with pytest.raises(ModelError, match=why):
            enter_scope(model, path, (IMAGE,))
    with pytest.raises(ModelError, match="does not run on these inputs: RuntimeError"):
        enter_scope(model, "head", (torch.randn(1, 4, 8, 8),))
    assert not any(part._forward_pre_hooks for part in model.modules())
    state = model.state_dict()
    with pytest.raises(ModelError, match="prune it in place"):
        put_back(model, "head", nn.Conv2d(3, 5, 1), (IMAGE,))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Detector()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x=x)

    with pytest.raises(ModelError, match="is called with x=; a scope takes tensors by position"):
        enter_scope(Named(), "inner", (IMAGE,))


SCOPED = """
[model]
factory = "nets.py:detector"
inputs = [[1, 3, 24, 24]]
scope = "body"
[data]
source = "nets.py:source"
[target]
name = "embedded"
effort = "quick"
[budget]
size = "0.6x"
[profile]
configurations = 4
held_out = 1
[prune]
criterion = "CRITERION"
curves = false
compensate = COMPENSATE
[recover]
epochs = EPOCHS
distil = DISTIL
[output]
dir = "run"
"""
NETS = """
import torch
from torch import nn

class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 48, 3, stride=2, padding=1),
            nn.ReLU(), nn.Conv2d(48, 8, 1),
        )
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        scores = self.head(self.body(x / 2 + 1)).flatten(2)
        return scores[:, :, scores.amax((0, 1)) > 0]

def detector():
    torch.manual_seed(0)
    return Detector()

class Source:
    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(96, 3, 24, 24, generator=generator)
        y = torch.zeros(96, 4)  # boxes, say
        self.calibration = [(self.x[start : start + 8], y[start : start + 8]) for start in range(0, 64, 8)]
        self.test = [(self.x[64:], y[64:])]
        self.train = self.calibration

def source():
    return Source()
"""


def _scoped(
    folder: Path, criterion: str = "reconstruction", epochs: int = 0, distil: str = "true", compensate: str = "true"
) -> Report:
    (folder / "nets.py").write_text(NETS)
    text = SCOPED.replace("CRITERION", criterion).replace("EPOCHS", str(epochs)).replace("DISTIL", distil)
    text = text.replace("COMPENSATE", compensate)
    (folder / "edgeprune.toml").write_text(text)
    return run_pipeline(read_run_file(folder / "edgeprune.toml"), folder)


@pytest.mark.parametrize("criterion", ["taylor", "surgeon"])
def test_a_run_of_a_scope_says_what_it_cannot_do(criterion: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no labels.*criterion = .reconstruction") as caught:
        _scoped(tmp_path, criterion, 3)
    assert not (tmp_path / "run" / "graph.json").exists()
    assert "curves" not in str(caught.value), "what is right already is not asked for"
    with pytest.raises(UsageError, match=r"\[recover\] distil = true"):
        _scoped(tmp_path, epochs=3, distil="false")


@pytest.mark.slow
def test_a_whole_run_prunes_a_scope_which_goes_back_into_its_model(tmp_path: Path) -> None:
    pytest.importorskip("asyncssh")
    report = _scoped(tmp_path, epochs=8, compensate="false")
    assert all(check.passed for check in report.checks if check.name in ("artifact size", "numeric error"))
    assert report.compact.artifact_bytes <= 0.6 * report.dense.artifact_bytes
    assert report.accuracy.dense is None and report.accuracy.after_recovery is None
    log = (tmp_path / "run" / "run.log").read_text()
    found = re.search(r"outputs differ from the dense ones by (\S+) before and (\S+) after", log)
    assert found is not None and 0 < float(found[2]) < float(found[1])
    model = load_model(ModelSpec(factory="nets.py:detector"), tmp_path)
    small = load_model(ModelSpec(file="run/recovered.pt2"), tmp_path)
    images = torch.randn(2, 3, 24, 24)
    body, (seen, *_) = enter_scope(model, "body", (images,))
    with torch.no_grad():
        dense, ours = body(seen), small(seen)
        put_back(model, "body", small, (images,))
        assert model(images).shape[:2] == (2, 5)
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(p.numel() for p in body.parameters())
    assert float((ours - dense).norm() / (dense - dense.mean()).norm()) < 0.9, "it learnt the dense outputs"


@pytest.mark.slow
def test_a_detector_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision_models()
    from torchvision.models import detection

    # Its compiled operators may be missing beside another build of torch; which boxes overlap does not matter here.
    monkeypatch.setattr(detection.ssd.box_ops, "batched_nms", lambda boxes, *_: torch.arange(min(len(boxes), 5)))
    torch.manual_seed(0)
    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5).eval()
    model.transform.fixed_size = (96, 96)
    randomise(model.backbone)
    images = torch.rand(1, 3, 96, 96)
    body, inputs = enter_scope(model, "backbone", (images,))
    graph = trace_graph(body, inputs)
    assert len(graph.prunable) > 10
    rng = np.random.default_rng(0)
    keep = random_keep(graph, rng)
    masked = mask_model(body, graph, keep)
    small = compact_model(body, inputs, graph, keep).eval()
    with torch.no_grad():
        for ours, theirs in zip(small(*inputs).values(), masked(*inputs).values(), strict=True):
            assert relative_error(ours, theirs) < LIMIT
    batches = [(torch.rand(4, 3, 96, 96), torch.zeros(4)) for _ in range(5)]
    seen = scope_data(model, "backbone", Data(calibration=batches[:4], test=batches[4:]))
    result = recover_accuracy(small, seen, teacher=body, match_outputs=True, epochs=3, lr=0.1, autocast=False)
    assert result.difference_before is not None and result.difference_after is not None
    assert result.difference_after < 0.8 * result.difference_before, "no labels, and yet nearer on other images"
    put_back(model, "backbone", small, (images,))
    with torch.no_grad():
        assert model(images)[0].keys() == {"boxes", "scores", "labels"}
