"""Peak memory of real models in the real runtime against what `core/arena.py` says they take."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from edgeprune.core.arena import channel_block, peak_memory_bytes
from edgeprune.core.records import Step, Target
from edgeprune.device.session import open_session
from edgeprune.formats.onnx import make_resizer
from edgeprune.trace import trace_graph

BASE_LIMIT = 128 * 1024
"""What a process takes besides the arena once it runs is less than this."""


class Net(nn.Module):
    """A residual block whose shortcut is a convolution, one that is depthwise, one whose shortcut is cut and padded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.first = nn.Conv2d(32, 64, 3, padding=1)
        self.second = nn.Conv2d(64, 64, 3, padding=1)
        self.beside = nn.Conv2d(32, 64, 1)
        self.expand = nn.Conv2d(64, 160, 1)
        self.depthwise = nn.Conv2d(160, 160, 3, padding=1, groups=160)
        self.project = nn.Conv2d(160, 64, 1)
        self.down = nn.Conv2d(64, 96, 3, stride=2, padding=1)
        self.head = nn.Linear(96, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(functional.relu(self.norm(self.stem(x))), 2)
        x = functional.relu(self.second(functional.relu(self.first(x))) + self.beside(x))
        x = x + self.project(functional.relu6(self.depthwise(functional.relu6(self.expand(x)))))
        x = functional.relu(self.down(x) + functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 32)))
        out: torch.Tensor = self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return out


@pytest.mark.skipif(platform.machine() != "x86_64", reason="channels in blocks are what the runtime does on x86")
def test_memory_of_real_models(tmp_path: Path) -> None:
    """At widths of all kinds the process grows by what the arena takes, and a little that is always the same."""
    torch.manual_seed(0)
    module, inputs = Net().eval(), (torch.randn(1, 3, 192, 192),)
    graph = trace_graph(module, inputs)
    resizer = make_resizer(module, inputs, graph)
    resizer.write_weights(tmp_path / "weights.bin")
    files = {"weights.bin": tmp_path / "weights.bin"}
    sweep: dict[str, dict[str, int]] = {}
    for number, share in enumerate((1.0, 0.5, 0.75, 0.25)):
        # Whole blocks of every processor; neighbouring groups get different shares.
        widths = {
            group.name: max(16, int(group.units * (share if place % 2 else 1.0)) // 16 * 16)
            for place, group in enumerate(graph.prunable)
        }
        sweep[f"net-{number}.onnx"] = graph.units | (widths if share < 1 else {})
    for name, widths in sweep.items():
        files[name] = tmp_path / name
        resizer.write_structure(widths, files[name], "weights.bin")
    target = Target(name="here", transport="local", workdir=str(tmp_path / "board"))
    with open_session(target, space="memory") as session:
        session.push(files)
        results = session.run([Step(key=name, kind="memory", artifact=name) for name in sweep], job="memory")
        block = channel_block(session.facts.arch, session.facts.cpu)
    measured = {result.key: result.activation_bytes for result in results}
    base: float | None = None
    for name, widths in sweep.items():
        taken, predicted = measured[name], peak_memory_bytes(graph, widths, block)
        assert taken is not None, "this machine cannot reset a process's peak"
        base = taken - predicted if base is None else base
        assert 0 <= base < BASE_LIMIT
        assert taken == pytest.approx(predicted + base, rel=0.05), (name, predicted)
    assert len({peak_memory_bytes(graph, widths, block) for widths in sweep.values()}) == len(sweep)
