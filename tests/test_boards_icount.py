"""What only a board without noise can show: latencies are asserted here, and nowhere else.

The board counts instructions, so that a run takes the same time every time. The short tests run in CI, those
marked slow in `make board-test`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import bench_sparse
import digit_nets
import pytest
import torch
from boards.__main__ import write_target
from boards.cache import CannotBuild
from boards.icount import IcountBoard
from loopback.models import write_model
from safetensors.torch import save_file
from torch import nn

from edgeprune.core.budget import make_budget
from edgeprune.core.effort import EFFORTS, NOISELESS
from edgeprune.core.family import load_member
from edgeprune.core.records import Plan, PrecisionChoice, Report, Step, Target
from edgeprune.core.runfile import read_run_file
from edgeprune.core.stats import median
from edgeprune.core.store import read_record
from edgeprune.device.session import open_session
from edgeprune.export import export_model
from edgeprune.on_board import dense_cost, plan_on_board
from edgeprune.pipeline import run_pipeline
from edgeprune.profile import profile_target
from edgeprune.recover import recover_accuracy
from edgeprune.score import score_groups
from edgeprune.sparsify import sparsify_model
from edgeprune.trace import trace_graph

pytestmark = [pytest.mark.device, pytest.mark.board]
REPEATS = 1e-3
"""Latencies of one artifact agree to this share, whatever the host is doing."""


@pytest.fixture(scope="module")
def icount() -> Iterator[tuple[IcountBoard, Target]]:
    board = IcountBoard()
    with ExitStack() as stack:
        try:
            target = stack.enter_context(board)
        except CannotBuild as reason:
            pytest.skip(str(reason))
        yield board, target


def latencies(target: Target, models: dict[str, Path], job: str) -> dict[str, float]:
    """Median seconds of each model, in an agent of its own."""
    with open_session(target, space="latencies") as session:
        session.push({f"{name}.onnx": path for name, path in models.items()})
        steps = [Step(key=name, kind="time", artifact=f"{name}.onnx", seconds=0.01, min_samples=7) for name in models]
        results = session.run(steps, job=job)
    assert [result.error for result in results] == [None] * len(models)
    return {result.key: median(result.samples.values) for result in results if result.samples is not None}


def test_latency_repeats_and_ranks(icount: tuple[IcountBoard, Target], tmp_path: Path) -> None:
    """One artifact, two agents and a power cut in between: the same latency. One channel more: slower."""
    board, target = icount
    models = {str(width): write_model(tmp_path / f"{width}.onnx", channels=width) for width in (8, 9, 16)}
    first = latencies(target, models, "first")
    board.reboot()
    second = latencies(target, models, "second")
    assert second == pytest.approx(first, rel=REPEATS)
    assert first["8"] < first["9"] < first["16"]
    assert first["9"] / first["8"] > 1 + 2 * REPEATS


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.conv2(torch.relu(self.conv1(x))))


def residual_net() -> nn.Module:
    """3.1 million multiply-adds at 16x16."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 40, 3, stride=2, padding=1), nn.ReLU(), Block(40),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 4),
    )  # fmt: skip


def plain_net() -> nn.Module:
    """2.5 million multiply-adds at 16x16."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 48, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 4),
    )  # fmt: skip


def separable_net() -> nn.Module:
    """Depthwise and pointwise layers: 1.3 million multiply-adds at 16x16."""

    def pair(inside: int, outside: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inside, inside, 3, padding=1, groups=inside), nn.ReLU(), nn.Conv2d(inside, outside, 1), nn.ReLU(),
        ]  # fmt: skip

    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), *pair(24, 40), *pair(40, 56), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(56, 4),
    )  # fmt: skip


def measured_shares(
    target: Target, net: nn.Module, folder: Path, wanted: Sequence[float], configurations: int = 10
) -> list[tuple[float, str | None]]:
    """Plans for budgets that are shares of the dense latency: what is measured of each budget; why no finer step."""
    torch.manual_seed(0)
    net, inputs, path = net.eval(), (torch.randn(1, 3, 16, 16),), folder / "profile.jsonl"
    graph = trace_graph(net, inputs)
    importance = score_groups(net, inputs, graph, None, criterion="magnitude", curves=False)
    resizer = load_member("formats", "onnx").make_resizer(net, inputs, graph)
    shares = []
    with open_session(target, space=str(folder)) as session:
        profile = profile_target(
            net,
            inputs,
            graph,
            session,
            path=path,
            configurations=configurations,
            held_out=2,
            effort=NOISELESS,
            resizer=resizer,
        )
        assert profile.held_out is not None and profile.held_out.mean < 0.03
        for share in wanted:
            budget = make_budget(dense_cost(graph, profile), latency=f"{share}x")
            plan = plan_on_board(
                net, inputs, graph, profile, importance, budget, session, path, effort=NOISELESS, resizer=resizer
            )
            chosen = next(turn for turn in plan.rounds if turn.widths == plan.widths)
            assert budget.latency_s is not None
            shares.append((chosen.measured.median / budget.latency_s, plan.finer_step))
    return shares


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_budget_is_met_closely_and_tables_predict(icount: tuple[IcountBoard, Target], tmp_path: Path) -> None:
    """A profile of a small net, a plan, and the planned net on the board: 0.97 to 1.00 of the budget."""
    ((share, _),) = measured_shares(icount[1], residual_net(), tmp_path, [0.6], configurations=6)
    assert 0.97 <= share <= 1.0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("net", [residual_net, plain_net, separable_net])
def test_budgets_of_every_size_are_met_closely(
    net: Callable[[], nn.Module], icount: tuple[IcountBoard, Target], tmp_path: Path
) -> None:
    """Nets this small run out of widths at the smallest budget: there the plan has to say so."""
    shares = measured_shares(icount[1], net(), tmp_path, [0.8, 0.6, 0.4])
    assert all(share <= 1.0 for share, _ in shares), shares
    assert all(share >= 0.97 or (share >= 0.9 and said and "nothing was found" in said) for share, said in shares), (
        shares
    )


NETS = """
import torch
from torch import nn


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 40, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(40, 40, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 4),
    )


class Source:
    labels = ("a", "b", "c", "d")

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        y = torch.randint(0, 4, (64,), generator=generator)
        x = torch.randn(64, 3, 16, 16, generator=generator) + y[:, None, None, None] - 1.5
        self.train = self.calibration = [(x[:48], y[:48])]
        self.test = [(x[48:], y[48:])]


def source():
    return Source()
"""
RUN_FILE = """
[model]
factory = "nets.py:net"
inputs = [[1, 3, 16, 16]]
[data]
source = "nets.py:source"
[target]
name = "icount"
effort = "quick"
[budget]
latency = "0.6x"
[profile]
configurations = 10
held_out = 2
[prune]
levels = 8
[recover]
epochs = 1
[output]
dir = "run"
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_pipeline_meets_its_budget(icount: tuple[IcountBoard, Target], tmp_path: Path) -> None:
    """`edgeprune run` from the model to the bundle, on a board of the inventory: exit 0, every check passed."""
    write_target(icount[1], tmp_path / "targets" / "icount.toml")
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "edgeprune.toml").write_text(RUN_FILE)
    done = subprocess.run(
        [sys.executable, "-m", "edgeprune", "run", "--json"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = read_record(Report, tmp_path / "run" / "report.json")
    assert report.passed and json.loads(done.stdout)["artifact_sha256"] == report.artifact_sha256
    assert (tmp_path / "run" / "bundle.zip").is_file()


OF_DIGITS = {
    'factory = "nets.py:net"': 'factory = "digit_nets:net"\nweights = "net.safetensors"',
    "[[1, 3, 16, 16]]": "[[1, 1, 16, 16]]",
    "nets.py:source": "digit_nets:Source",
    "0.6x": "0.4x",
    "configurations = 10": "configurations = 6",
}


def run_on(cpu: str, format: str, dtype: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    """A whole run with a net that reads digits, to 0.4 of its latency on a board of its own; every check passed."""
    if format == "tflite":
        pytest.importorskip("litert_torch", reason="TFLite files need edgeprune[tflite]")
    monkeypatch.setitem(EFFORTS, "quick", NOISELESS)
    monkeypatch.chdir(folder)
    net = digit_nets.net()
    recover_accuracy(net, digit_nets.Source(), epochs=8, lr=0.05, autocast=False)
    save_file(net.state_dict(), folder / "net.safetensors")
    run_file = RUN_FILE
    for other, ours in OF_DIGITS.items():
        run_file = run_file.replace(other, ours)
    (folder / "edgeprune.toml").write_text(run_file + f'[export]\nformat = "{format}"\ndtype = "{dtype}"\n')
    with ExitStack() as stack:
        try:
            write_target(stack.enter_context(IcountBoard(cpu=cpu)), folder / "targets" / "icount.toml")
        except CannotBuild as reason:
            pytest.skip(str(reason))
        report = run_pipeline(read_run_file(folder / "edgeprune.toml"), folder)
    assert report.passed, [check for check in report.checks if not check.passed]
    return report


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("cpu", ["cortex-a72", "cortex-a76"])
@pytest.mark.parametrize("format", ["onnx", "tflite"])
def test_eight_bits_meet_their_budget(format: str, cpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dtype = "int8"`: planned, stored and measured in 8 bits."""
    report = run_on(cpu, format, "int8", tmp_path, monkeypatch)
    (latency,) = [check for check in report.checks if check.name.startswith("latency")]
    assert latency.measured is not None and latency.limit is not None
    assert 0.8 <= latency.measured / latency.limit <= 1.0
    assert read_record(Plan, tmp_path / "run" / "plan.json").precision.dtype == "int8"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("cpu", "dot_product"), [("cortex-a72", False), ("cortex-a76", True)])
@pytest.mark.parametrize("format", ["onnx", "tflite"])
def test_auto_weighs_what_int8_gains_there(
    format: str, cpu: str, dot_product: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dtype = "auto"`: what int8 gains is measured; where that is much, its plan keeps more and wins by accuracy.

    The a76 has the int8 dot product, the a72 has not: there LiteRT gains by 8 bits in some layers only.
    """
    run_on(cpu, format, "auto", tmp_path, monkeypatch)
    choice = read_record(PrecisionChoice, tmp_path / "run" / "precision.json")
    assert (choice.trials[0].latency_share.high < 0.6) == dot_product
    plans = [read_record(Plan, tmp_path / "run" / f"plan-{precision.name}.json") for precision, _ in choice.candidates]
    assert [plan.precision.dtype for plan in plans] == ["float32", "int8"]
    kept = [plan.predicted.parameters for plan in plans]
    assert kept[1] > kept[0] if choice.trials[0].latency_share.high < 0.8 else kept[1] > 0.9 * kept[0]
    accuracies = {precision.name: accuracy for precision, accuracy in choice.candidates}
    assert accuracies[choice.chosen.name] == max(accuracies.values())
    if dot_product:
        assert choice.chosen.dtype == "int8" and len(set(accuracies.values())) == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_zeros_that_are_not_stored_take_fewer_instructions(icount: tuple[IcountBoard, Target], tmp_path: Path) -> None:
    """LiteRT on arm64 has kernels that skip the zeros of pointwise layers, and uses them when a file asks for it."""
    pytest.importorskip("litert_torch", reason="TFLite files need edgeprune[tflite]")
    side = bench_sparse.POINTWISE_SIDE  # at 32 x 32 the sparse kernels are the slower ones
    net, inputs = bench_sparse.pointwise_net(), (torch.zeros(1, 3, side, side),)
    sparsify_model(net, "unstructured:sparsity=0.9,layers=*.3")
    bench_sparse.settle(net)
    files = {}
    for name, sparse in (("stored", False), ("left-out", True)):
        files[f"{name}.tflite"] = tmp_path / f"{name}.tflite"
        export_model(net, inputs, files[f"{name}.tflite"], format="tflite", sparse=sparse)
    with open_session(replace(icount[1], runtime="tflite"), space="sparse") as session:
        session.push(files)
        steps = [Step(key=f"{kind} {name}", kind=kind, artifact=name, seconds=0.0, runs=2, min_samples=1, steady=True)
                 for name in files for kind in ("time", "kernels")]  # fmt: skip
        results = {result.key: result for result in session.run(steps, job="sparse")}
    assert not [result.error for result in results.values() if result.error]
    times = {name: median(results[f"time {name}"].samples.values) for name in files}
    assert times["left-out.tflite"] < 0.7 * times["stored.tflite"]
    kernels = {name: [kernel.op for kernel in results[f"kernels {name}"].kernels] for name in files}
    assert sum("SPMM" in op for op in kernels["left-out.tflite"]) == 10
    assert not any("SPMM" in op for op in kernels["stored.tflite"])
