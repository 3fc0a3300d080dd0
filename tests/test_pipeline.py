"""The whole pipeline on an embedded SSH board: finished, killed, resumed, interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgeprune.core.closed_loop import best_round
from edgeprune.core.records import Bracket, Graph, Plan, PlanRound, Quantity, Report
from edgeprune.core.store import read_record

pytest.importorskip("asyncssh")

NETS = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), Block(64), nn.Conv2d(64, 96, 3, stride=2, padding=1), nn.ReLU(),
        Block(96), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 4),
    )


class Source:
    labels = ("a", "b", "c", "d")

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.y = torch.randint(0, 4, (96,), generator=generator)
        self.x = torch.randn(96, 3, 24, 24, generator=generator) + self.y[:, None, None, None] - 1.5
        self.train = self.batches(0, 64, 4)
        self.calibration = self.batches(0, 64, 32)
        self.test = self.batches(64, 96, 32)

    def batches(self, start, stop, size):
        return [(self.x[i : i + size], self.y[i : i + size]) for i in range(start, stop, size)]


def source():
    return Source()
"""
RUN_FILE = """
[model]
factory = "nets.py:net"
inputs = [[1, 3, 24, 24]]
[data]
source = "nets.py:source"
[target]
name = "embedded"
effort = "quick"
[budget]
latency = "0.7x"
[profile]
configurations = 8
held_out = 2
[prune]
levels = 6
[search]
trials = 3
contenders = ["curves", "magnitude"]
[recover]
epochs = 2
[output]
dir = "run"
"""
FILES = {"graph.json", "profile.jsonl", "importance.json", "search.jsonl", "plan.json", "tournament.json",
         "compact.pt2", "compact.safetensors", "recovered.pt2", "recovered.safetensors", "model.onnx",
         "report.json", "report.html", "bundle.zip", "run.log"}  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "nets.py").write_text(NETS)
    (folder / "edgeprune.toml").write_text(RUN_FILE)
    return folder


def start(folder: Path) -> subprocess.Popen[str]:
    """`edgeprune run` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "edgeprune", "run", "--json"], cwd=folder, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(file: Path, process: subprocess.Popen[str], seconds: float = 600.0) -> None:
    """Until the file is there; fails when the process ends before."""
    deadline = time.monotonic() + seconds
    while not file.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{file} did not appear"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.device
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_and_interrupted_ends_like_any_other(project: Path) -> None:
    run = project / "run"
    for awaited in ("profile-float32.jsonl", "importance.json", "compact.pt2"):
        process = start(project)
        wait_for(run / awaited, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    measured = (run / "profile.jsonl").read_bytes()
    process = start(project)
    wait_for(run / "model.onnx", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "goes on from there" in errors

    process = start(project)
    output, errors = process.communicate(timeout=600)
    report = read_record(Report, run / "report.json")
    # Whether the budget is met within a percent is the machine's noise; that the exit code says so is ours.
    assert process.returncode == (0 if report.passed else 1), errors
    assert {path.name for path in run.iterdir()} >= FILES
    assert not [path.name for path in run.iterdir() if path.name.startswith(".") and path.name != ".lock"]
    assert (run / "profile.jsonl").read_bytes().startswith(measured), "measurements were lost or made twice"
    assert json.loads(output)["artifact_sha256"] == report.artifact_sha256

    graph, plan = read_record(Graph, run / "graph.json"), read_record(Plan, run / "plan.json")
    assert plan.rounds
    bracket = read_record(Bracket, run / "tournament.json")
    assert {heat.contender for heat in bracket.rungs[0]} == {"curves", "magnitude"} == bracket.latency_s.keys()
    winner = "plan-float32.json" if bracket.winner == "curves" else f"plan-float32-{bracket.winner}.json"
    assert read_record(Plan, run / winner).widths == plan.widths
    assert "The tournament" in (run / "report.html").read_text()
    assert all(1 <= width <= graph.units[name] for name, width in plan.widths.items())
    assert report.compact.parameters is not None
    assert report.dense.parameters is not None
    assert report.compact.parameters < report.dense.parameters
    by_name = {check.name: check for check in report.checks}
    assert by_name["numeric error"].passed
    assert report.accuracy.after_recovery is not None

    process = start(project)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == (0 if report.passed else 1), errors
    assert read_record(Report, run / "report.json") == report
    last = (run / "run.log").read_text().splitlines()[-5:]
    assert all("already done" in line for line in last), last


@pytest.mark.parametrize(
    ("measured", "best"),
    [((1.2, 0.9, 0.99, 1.01), 2), ((0.98, 0.999, 0.9), 0), ((0.999, 0.8), 0), ((1.3, 1.1), 1), ((0.5,), 0)],
)
def test_the_loop_keeps_the_slowest_plan_within_the_budget(measured: tuple[float, ...], best: int) -> None:
    rounds = [
        PlanRound(asked_s=1.0, predicted_s=1.0, measured=Quantity(median=m, low=m, high=m), widths={}) for m in measured
    ]
    assert best_round(rounds, 1.0) == best
