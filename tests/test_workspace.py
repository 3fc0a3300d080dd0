"""XNNPACK's workspace: what shares a place, how it is laid out, and what LiteRT takes in fact."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_nets import NETS
from torch import nn

from edgeprune.core.cost import activation_bytes
from edgeprune.core.records import Conditions, Graph
from edgeprune.core.workspace import Value, lay_out, share_values, take_turns, workspace_bytes
from edgeprune.trace import trace_graph

DEVICE = Path(__file__).parent.parent / "edgeprune" / "device"


def _graph(module: nn.Module, size: int = 8) -> Graph:
    return trace_graph(module.eval(), (torch.zeros(1, 3, size, size),), allow_inexact=True)


def _rounded(size: int) -> int:
    """With 16 bytes behind it, to a multiple of 64."""
    return -(-(size + 16) // 64) * 64


class Block(nn.Module):
    """A residual block, whose addition needs three images at once, and a hard-swish behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = nn.functional.hardswish(x + self.inner(x))
        return self.head(x.mean((2, 3)))


def test_a_residual_block_by_hand() -> None:
    """x, inner(x) and their sum at once, each 8 x 8 x 8 float32 with 16 bytes behind it, rounded up to 64."""
    graph = _graph(Block())
    image = _rounded(4 * 8 * 8 * 8)
    inputs_and_outputs = _rounded(4 * 3 * 8 * 8) + _rounded(4 * 10)
    assert workspace_bytes(graph, {}) == 3 * image + inputs_and_outputs
    (wide,) = [group.name for group in graph.prunable if group.units == 8]
    assert workspace_bytes(graph, {wide: 4}) == 3 * _rounded(4 * 4 * 8 * 8) + inputs_and_outputs


class Strided(nn.Module):
    """A slice with a stride, which XNNPACK cannot do, between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x))[:, :, ::2]).mean((2, 3))


def test_what_changes_hands_by_hand() -> None:
    """The arena holds the input, what the slice reads and what it gives; the workspace the second image."""
    graph = _graph(Strided())
    turns = take_turns(graph, share_values(graph))
    slices = [node.name for node in graph.nodes if node.op == "slice" and node.attributes["step"] == 2]
    assert [turns[name] for name in slices] == [1] and sorted(set(turns.values())) == [0, 1, 2]
    arena = _rounded(4 * 3 * 8 * 8) + _rounded(4 * 8 * 8 * 8) + _rounded(4 * 8 * 4 * 8) + _rounded(4 * 16)
    assert workspace_bytes(graph, {}) == arena + _rounded(4 * 16 * 4 * 8)


def test_what_shares_a_place() -> None:
    graph = _graph(Block())
    owners = share_values(graph)
    by_op = {node.op.removesuffix("_"): owners[node.name] for node in graph.nodes}
    convolutions = [node.name for node in graph.nodes if node.op == "conv2d"]
    assert by_op["batch_norm"] == by_op["relu"] == convolutions[0], "folded, and done by the convolution"
    assert by_op["hardswish"] == by_op["add"] not in convolutions, "written over the sum, which is a new image"
    assert by_op["input"] == graph.nodes[0].name


@pytest.mark.parametrize("name", sorted(NETS))
def test_never_less_than_what_is_alive(name: str) -> None:
    """For every net of the battery, at full width and the least one."""
    graph = _graph(NETS[name]())
    owners = share_values(graph)
    assert set(owners.values()) <= set(owners)
    assert all(owners[owner] == owner for owner in owners.values())
    least = {group.name: group.step for group in graph.prunable}
    largest = max(torch.Size(node.out_shape).numel() for node in graph.nodes if node.out_shape)
    assert workspace_bytes(graph, {}) >= 4 * largest
    assert workspace_bytes(graph, least) <= workspace_bytes(graph, {})


values = st.builds(
    lambda size, born, lives: Value(size, born, born + lives), st.integers(1, 40), st.integers(0, 9), st.integers(0, 6)
)


@given(st.lists(values, max_size=12))
def test_nothing_overlaps(each: list[Value]) -> None:
    places = lay_out(each)
    spans = list(zip(each, places, strict=True))
    for number, (one, start) in enumerate(spans):
        for other, begins in spans[:number]:
            if one.born <= other.dies and other.born <= one.dies:
                assert start + one.size <= begins or begins + other.size <= start
    alive = max((sum(v.size for v in each if v.born <= at <= v.dies) for at in range(20)), default=0)
    assert alive <= max((start + value.size for value, start in spans), default=0) <= sum(v.size for v in each)


def test_the_smallest_gap_is_taken() -> None:
    """By hand: of the gaps of 4 and 3 between what is alive, the value of 3 goes into the second."""
    each = [Value(9, 0, 9), Value(8, 5, 9), Value(7, 0, 9), Value(4, 0, 3), Value(3, 4, 4)]
    assert lay_out(each) == [0, 9, 17, 9, 9]
    assert lay_out([Value(5, 0, 1), Value(5, 1, 2), Value(5, 2, 3)]) == [0, 5, 0]


def test_the_runtime_decides() -> None:
    graph = _graph(Block())
    tflite = Conditions(
        board="linux", arch="x86_64", cpu="", runtime="tflite:delegate=xnnpack", runtime_version="2.3.0"
    )
    assert activation_bytes(graph, {}, tflite) == workspace_bytes(graph, {})
    assert activation_bytes(graph, {}, None) != workspace_bytes(graph, {})


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the kernel does not tell what a run writes")
def test_what_litert_takes(tmp_path: Path) -> None:
    """The same classifier at two sizes: the larger one takes more by what is predicted, to 3 %."""
    pytest.importorskip("ai_edge_litert", reason="pip install 'edgeprune[tflite]'")
    from tflite_files import write_classifier

    for file in ("agent.py", "by_input.py", "energy.py", "measure.py", "warm_up.py"):
        shutil.copy(DEVICE / file, tmp_path)
    shutil.copy(DEVICE / "runtimes" / "tflite.py", tmp_path / "runtime.py")
    taken, predicted = [], []
    for side in (64, 320):
        write_classifier(path := tmp_path / f"{side}.tflite", side=side)
        step = {"step": {"artifact": str(path), "inputs": None}, "spec": {"threads": 1, "options": {}}}
        done = subprocess.run(
            [sys.executable, str(tmp_path / "measure.py"), json.dumps(step)],
            capture_output=True, text=True, check=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"},
        )  # fmt: skip
        taken.append(json.loads(done.stdout.rsplit("@@edgeprune@@")[-1])["activation_bytes"])
        net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                            nn.Linear(6, 5))  # fmt: skip
        predicted.append(workspace_bytes(_graph(net, side), {}))
    assert taken[1] - taken[0] == pytest.approx(predicted[1] - predicted[0], rel=0.03)
