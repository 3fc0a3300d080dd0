"""Which precision a board runs best: timed on a real runtime, and what int8 slows down or breaks stays in float32."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeprune.core.effort import Effort
from edgeprune.core.errors import AgentError, UsageError
from edgeprune.core.records import FLOAT32, Precision, PrecisionTrial, Quantity
from edgeprune.device.session import Session, open_session
from edgeprune.device.targets import read_target
from edgeprune.formats import onnx as format
from edgeprune.graphs.fake_quantize import ActivationQuantizer, simulate_int8
from edgeprune.load import ArrayBatches
from edgeprune.precisions import (
    Judge,
    leave_broken_in_float,
    leave_in_float,
    slower_operations,
    train_in_8_bits,
    try_precisions,
    worth_planning,
)
from edgeprune.trace import trace_graph

torch.set_num_threads(1)
REPOSITORY = Path(__file__).parent.parent
BRIEF = Effort(rounds=2, repeats=1, seconds=0.02, precision=None, samples=3, profiled_runs=3)
U8 = Precision(dtype="int8", activations="uint8")
CLASSES = 8


class Net(nn.Module):
    """Two layers and a depthwise one that reads what a channel of `loud` times the others' size shares with them."""

    def __init__(self, loud: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point, self.head = nn.Conv2d(16, 32, 1), nn.Linear(32, CLASSES)
        with torch.no_grad():
            self.stem.weight[0] *= loud
            self.stem.bias[0] *= loud
            self.depthwise.weight[0] /= loud
            # So that outputs differ from image to image by more than int8 rounds.
            self.head.weight *= 20

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.stem(x))))
        return self.head(torch.relu(self.point(x)).mean((2, 3)))


def judge_of(net: nn.Module) -> Judge:
    """Images whose labels are what the float model says, so that its accuracy is 1."""
    images = torch.randn(192, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    images += 2 * torch.randn(192, 3, 1, 1, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        scores = net.eval()(images)
        scores -= scores.mean(0)
        net.head.bias -= net(images).mean(0)  # every class is somebody's
    batches = ArrayBatches(images, scores.argmax(1), batch=64)
    inputs = (images[:1],)
    return Judge(
        inputs=inputs, graph=trace_graph(net, inputs), format="onnx", calibration=[(images.numpy(),)], batches=batches
    )


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    local = read_target(REPOSITORY / "targets" / "localhost.toml")
    with open_session(replace(local, workdir=str(tmp_path_factory.mktemp("board")), python=sys.executable)) as opened:
        yield opened


def node_of(judge: Judge, layer: str) -> str:
    return next(node.name for node in judge.graph.nodes if f"{layer}.weight" in node.parameters)


def test_a_layer_that_int8_breaks_stays_in_float() -> None:
    net = Net(loud=1000.0)
    judge = judge_of(net)
    assert judge.accuracy(net, FLOAT32) == 1
    assert judge.accuracy(net, U8) < 0.8
    mixed = leave_broken_in_float(net, U8, judge, tolerance=0.01)
    assert node_of(judge, "depthwise") in mixed.float_nodes
    assert mixed.name == "int8-uint8-mixed"
    assert judge.accuracy(net, mixed) > 0.9
    assert leave_broken_in_float(net, U8, judge, tolerance=1.0) == U8, "what is tolerated is left alone"


def test_int8_that_breaks_nothing_stays_whole() -> None:
    net = Net()
    judge = judge_of(net)
    assert leave_broken_in_float(net, U8, judge, tolerance=0.1) == U8


def test_simulated_operations_can_be_taken_back_one_by_one() -> None:
    net = Net().eval()
    judge = judge_of(net)
    images = judge.batches.inputs[:16]  # type: ignore[attr-defined]
    simulated = simulate_int8(net, judge.inputs, U8, [(images,)])
    assert set(simulated.operations) <= {node.name for node in judge.graph.nodes}
    assert {node_of(judge, layer) for layer in ("stem", "depthwise", "point", "head")} <= set(simulated.operations)
    with torch.no_grad():
        exact, rounded = net(images), simulated(images)
        assert not torch.equal(exact, rounded)
        with simulated.in_float(simulated.operations):
            torch.testing.assert_close(simulated(images), exact, rtol=1e-5, atol=1e-5)
        with simulated.in_float([node_of(judge, "depthwise")]):
            assert not torch.equal(simulated(images), exact), "what the layer before writes still has 8 bits"
        pair = (node_of(judge, "stem"), node_of(judge, "depthwise"))
        assert pair in simulated.neighbours and pair[:1] in simulated.neighbours
        assert torch.equal(simulated(images), rounded), "all of it is back"


def test_symmetric_rounding_mirrors() -> None:
    """As with a zero point of 0: what x becomes, -x becomes with the other sign, up to the larger end of the range."""
    x = torch.linspace(-0.5, 2, 101)
    for activations, mirrors in (("symmetric", True), ("int8", False)):
        quantizer = ActivationQuantizer(activations)
        rounded = quantizer(x)
        assert (rounded - x).abs().max() <= 2 / 127 / 2 + 1e-6
        quantizer.eval()
        assert torch.equal(quantizer(-x), -rounded) == mirrors


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([("a", 1.0), ("b", 1.0)], [("a", 0.5), ("b", 2.0)], "b"),
        ([("a", 1.0), ("b", 1.0)], [("a", 0.5), ("b", 1.05)], ""),
        ([("ab", 1.0), ("c", 1.0)], [("a", 0.5), ("bc", 2.0)], "abc"),
        ([("a", 1.0), ("b", 1.0), ("c", 1.0)], [("ab", 1.0), ("c", 3.0)], "c"),
        ([("a", 1.0), ("b", 0.001)], [("a", 0.5), ("b", 0.002)], ""),
    ],
    ids=["one", "noise", "kernels that overlap", "fused", "hardly counts"],
)
def test_which_operations_int8_slows(before: Any, after: Any, expected: str) -> None:
    sides = [[(frozenset(nodes), seconds) for nodes, seconds in side] for side in (before, after)]
    assert slower_operations(*sides) == frozenset(expected)


def test_on_a_board(session: Session, tmp_path: Path) -> None:
    """Both kinds of int8 are timed; what is left in float are nodes of the graph; nothing stays on the board."""
    net = Net(loud=1000.0)
    judge = judge_of(net)
    trials = try_precisions(net, judge.inputs, session, "int8", effort=BRIEF)
    assert {trial.precision.activations for trial in trials} == {"int8", "uint8"}
    assert [trial.latency_share.median for trial in trials] == sorted(t.latency_share.median for t in trials)
    resizer = format.make_resizer(net, judge.inputs, judge.graph, precision=trials[0].precision)
    mixed = leave_in_float(
        net, judge.inputs, judge.graph, session, trials[0], resizer, judge, tolerance=0.01, effort=BRIEF
    )
    assert node_of(judge, "depthwise") in mixed.precision.float_nodes
    assert set(mixed.precision.float_nodes) <= {node.name for node in judge.graph.nodes}
    assert 0 < mixed.latency_share.low <= mixed.latency_share.high < np.inf
    left = list(Path(session.target.workdir or "").rglob("*.onnx"))
    assert left == []
    with pytest.raises(UsageError, match="cannot be int4; known: float32, float16, dynamic, int8"):
        try_precisions(net, judge.inputs, session, "int4", effort=BRIEF)


def test_files_do_not_stay_on_the_board_when_the_run_fails(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    judge = judge_of(net)

    def fail(*_: Any, **__: Any) -> Any:
        raise AgentError("the board is too hot")

    with monkeypatch.context() as patched:
        patched.setattr(session, "run", fail)
        with pytest.raises(AgentError, match="too hot"):
            try_precisions(net, judge.inputs, session, "float16", effort=BRIEF)
    assert list(Path(session.target.workdir or "").rglob("*.onnx")) == []


def test_what_auto_weighs() -> None:
    def trial(precision: Precision, low: float, high: float) -> PrecisionTrial:
        share = Quantity(median=(low + high) / 2, low=low, high=high)
        return PrecisionTrial(precision=precision, latency_share=share)

    slow, fast = trial(U8, 1.05, 1.1), trial(U8, 0.4, 0.5)
    assert worth_planning([slow], latency_only=True) == (FLOAT32,)
    assert worth_planning([slow], latency_only=False) == (FLOAT32, U8), "smaller all the same"
    assert worth_planning([fast, slow], latency_only=True) == (FLOAT32, U8)


def test_training_for_8_bits_is_judged_by_the_artifact(tmp_path: Path) -> None:
    """Kept where the artifact gains, undone where it does not, and not begun where nothing is lost."""
    net = Net(loud=300.0)
    judge = judge_of(net)

    class Data:
        train = judge.batches
        test = None

    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    said = train_in_8_bits(net, U8, judge, Data(), tolerance=1.0, epochs=2, lr=0.01)
    assert "no training needed" in said
    said = train_in_8_bits(net, U8, judge, Data(), tolerance=0.0, epochs=1, lr=1e-12)
    assert said.endswith("undone") and all(torch.equal(weights[n], t) for n, t in net.state_dict().items())
    with torch.no_grad():
        net.head.weight.mul_(0)
    before = judge.accuracy(net, U8)
    said = train_in_8_bits(net, U8, judge, Data(), tolerance=-1.0, epochs=6, lr=0.01)
    assert said.endswith("kept") and judge.accuracy(net, U8) > before + 0.1
