"""Validation on a real session with this machine as the board: numbers, checks, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from edgeprune.core.effort import Effort
from edgeprune.core.errors import AgentError, DataError, RecordError
from edgeprune.core.records import Accuracy, Artifact, Budget, Cost, FloatArray, Quantity, Report, Target, TensorInfo
from edgeprune.core.stats import pooled_ratio, turn_ratios
from edgeprune.core.store import read_record, sha256_file, write_record
from edgeprune.device.session import Session, open_session
from edgeprune.validate import MOST_ROUNDS, Examples, collect_examples, validate_artifact

torch.set_num_threads(1)
CLASSES, SIZE = 5, 16
PREDICTED = Cost(
    latency_s=Quantity(median=1e-4, low=9e-5, high=1.1e-4), peak_memory_bytes=70_000, artifact_bytes=6_000,
    parameters=1_000, macs=2_000,
)  # fmt: skip


class Net(nn.Module):
    """Two convolutions and a classifier; `width` decides what it takes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.second(self.first(image).relu()).relu().mean((2, 3)))


def save_onnx(net: Net, path: Path) -> Artifact:
    """The same network written node by node: this file tests validation, not the exporter."""
    nodes = [
        helper.make_node("Conv", ["image", "first.weight", "first.bias"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "second.weight", "second.bias"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("GlobalAveragePool", ["d"], ["e"]),
        helper.make_node("Flatten", ["e"], ["f"]),
        helper.make_node("Gemm", ["f", "head.weight", "head.bias"], ["scores"], transB=1),
    ]
    weights = [numpy_helper.from_array(value.numpy(force=True), name) for name, value in net.state_dict().items()]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, SIZE, SIZE])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, CLASSES])
    graph = helper.make_graph(nodes, "net", [image], [scores], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return Artifact(
        path=str(path), format="onnx", dtype="float32", sha256=sha256_file(path), bytes=path.stat().st_size,
        inputs=(TensorInfo(name="image", shape=(1, 3, SIZE, SIZE), dtype="float32"),),
        outputs=(TensorInfo(name="scores", shape=(1, CLASSES), dtype="float32"),),
        graph_sha256="a" * 64, tools={"torch": str(torch.__version__)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    target = Target(name="here", transport="local", workdir=str(tmp_path_factory.mktemp("board")))
    with open_session(target) as opened:
        yield opened


@pytest.fixture(scope="module")
def nets() -> dict[str, Net]:
    return {"dense": Net(64).eval(), "compact": Net(8).eval()}


@pytest.fixture(scope="module")
def artifacts(nets: dict[str, Net], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("artifacts")
    return {name: save_onnx(net, folder / f"{name}.onnx") for name, net in nets.items()}


@pytest.fixture(scope="module")
def examples(nets: dict[str, Net], artifacts: dict[str, Artifact]) -> Examples:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(50, 3, SIZE, SIZE, generator=generator)
    with torch.no_grad():
        targets = nets["compact"](images).argmax(1)
    targets[:10] = (targets[:10] + 1) % CLASSES
    batches = [(images[i : i + 16], targets[i : i + 16]) for i in range(0, 50, 16)]
    return collect_examples(nets["compact"], batches, artifacts["compact"], limit=40)


BRIEF = Effort(rounds=1, repeats=2, seconds=0.03, precision=None)


def validate(
    session: Session, artifacts: dict[str, Artifact], examples: Examples, budget: Budget, **options: object
) -> Report:
    defaults = {"effort": BRIEF, "predicted": PREDICTED, "dense": artifacts["dense"]}
    return validate_artifact(
        artifacts["compact"], session, examples=examples, budget=budget, **{**defaults, **options}
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(session: Session, artifacts: dict[str, Artifact], examples: Examples) -> Report:
    budget = Budget(latency_s=10.0, peak_memory_bytes=2**30, artifact_bytes=20_000)
    return validate(
        session, artifacts, examples, budget, dense_counts=Cost(parameters=9, macs=99),
        accuracy=Accuracy(dense=0.9, after_recovery=0.8), provenance={"plan_sha256": "p"},
    )  # fmt: skip


def test_examples_are_the_first_ones_with_the_modules_outputs(examples: Examples, nets: dict[str, Net]) -> None:
    assert len(examples) == 40
    assert examples.targets is not None and examples.targets.shape == (40,)
    with torch.no_grad():
        expected = nets["compact"](torch.from_numpy(examples.inputs["image"])).numpy()
    np.testing.assert_allclose(examples.reference[0], expected, rtol=1e-4, atol=1e-6)


def test_examples_that_do_not_fit(nets: dict[str, Net], artifacts: dict[str, Artifact]) -> None:
    with pytest.raises(DataError, match="no examples"):
        collect_examples(nets["compact"], [], artifacts["compact"])
    image = torch.zeros(1, 3, SIZE, SIZE)
    with pytest.raises(DataError, match="2 inputs"):
        collect_examples(nets["compact"], [((image, image), torch.zeros(1))], artifacts["compact"])
    regression = collect_examples(nets["compact"], [(image, torch.zeros(1, 3))], artifacts["compact"])
    assert regression.targets is None


def test_everything_is_measured(report: Report, artifacts: dict[str, Artifact], session: Session) -> None:
    for cost, artifact in ((report.dense, artifacts["dense"]), (report.compact, artifacts["compact"])):
        assert cost.latency_s is not None
        assert 0 < cost.latency_s.low <= cost.latency_s.median <= cost.latency_s.high
        assert cost.artifact_bytes == artifact.bytes == Path(artifact.path).stat().st_size
        assert cost.peak_memory_bytes is None or cost.peak_memory_bytes >= 0
    assert report.compact.latency_s is not None and report.dense.latency_s is not None
    assert report.compact.latency_s.median < report.dense.latency_s.median
    assert (report.dense.macs, report.compact.macs, report.compact.parameters) == (99, 2_000, 1_000)
    assert {name: len(rounds) for name, rounds in report.samples.items()} == {"dense": 2, "compact": 2}
    assert report.conditions.runtime == "onnxruntime"
    assert (report.target, report.artifact_sha256) == ("here", artifacts["compact"].sha256)
    assert {"torch", "plan_sha256", "dense_sha256", "graph_sha256", "test_sha256"} <= report.provenance.keys()


def test_outputs_agree_with_the_host(report: Report) -> None:
    assert report.numeric_error is not None
    assert report.numeric_error.max_relative < 1e-4
    assert report.numeric_error.top1_agreement == 1
    assert report.numeric_error.examples == 40
    assert report.accuracy == Accuracy(dense=0.9, after_recovery=0.8, on_board=0.75)


def test_checks(report: Report, artifacts: dict[str, Artifact]) -> None:
    checks = {check.name: check for check in report.checks}
    assert list(checks) == ["latency (median)", "peak memory", "artifact size", "numeric error", "top-1 agreement"]
    latency = checks["latency (median)"]
    assert report.compact.latency_s is not None
    assert (latency.predicted, latency.measured) == (1e-4, report.compact.latency_s.median)
    assert (latency.limit, latency.unit, latency.passed) == (10.0, "s", True)
    assert "unused" in latency.note
    assert checks["artifact size"].measured == artifacts["compact"].bytes
    assert report.passed or report.compact.peak_memory_bytes is None


def test_report_is_read_back_as_it_was_written(report: Report, tmp_path: Path) -> None:
    write_record(tmp_path / "report.json", report)
    assert read_record(Report, tmp_path / "report.json") == report


def test_budgets_that_are_not_met_are_values(
    session: Session, artifacts: dict[str, Artifact], examples: Examples
) -> None:
    budget = Budget(latency_s=1e-9, artifact_bytes=10, energy_j=1.0, statistic="p95")
    missed = validate(session, artifacts, examples, budget)
    checks = {check.name: check for check in missed.checks}
    assert not missed.passed
    assert [checks[name].passed for name in ("latency (p95)", "artifact size", "energy")] == [False] * 3
    assert checks["energy"].measured is None and "cannot measure" in checks["energy"].note
    assert checks["numeric error"].passed


def test_relative_latency_is_of_the_dense_model_in_the_same_rounds(
    session: Session, artifacts: dict[str, Artifact], examples: Examples
) -> None:
    relative = validate(session, artifacts, examples, Budget(latency_s=1e-9, latency_share=0.9))
    assert relative.compact.latency_s is not None
    share = pooled_ratio(ratios(relative)).median
    assert relative.budget.latency_s == pytest.approx(0.9 * relative.compact.latency_s.median / share)
    assert relative.checks[0].limit == relative.budget.latency_s
    assert relative.checks[0].predicted == pytest.approx(1e-4 * relative.budget.latency_s / 1e-9)
    assert "times as long as while it was profiled" in relative.checks[0].note
    assert relative.checks[0].passed == (share <= 0.9)
    assert relative.checks[0].passed


def test_undecided_latency_is_measured_longer(
    session: Session, artifacts: dict[str, Artifact], examples: Examples, report: Report
) -> None:
    """The same file as dense and compact under a ratio of 1: the limit is the measurement itself."""
    same = {"dense": artifacts["compact"], "compact": artifacts["compact"]}
    undecided = validate(session, same, examples, Budget(latency_s=1.0, latency_share=1.0))
    share = pooled_ratio(ratios(undecided))  # as validation decides it
    assert len(undecided.samples["compact"]) == MOST_ROUNDS * 2 or not share.low <= 1.0 <= share.high


def ratios(report: Report) -> list[FloatArray]:
    """Compact over dense latency, turn by turn of each round."""
    pairs = zip(report.samples["compact"], report.samples["dense"], strict=True)
    return [turn_ratios(compact, dense) for compact, dense in pairs]


def test_other_outputs_are_seen(session: Session, artifacts: dict[str, Artifact], examples: Examples) -> None:
    wrong = replace(examples, reference=(-examples.reference[0],))
    checks = {check.name: check for check in validate(session, artifacts, wrong, Budget()).checks}
    assert [check.passed for check in checks.values()] == [False, False]
    assert checks["numeric error"].measured == pytest.approx(2, rel=1e-3)
    flat = replace(examples, reference=(examples.reference[0][:, :2],))
    with pytest.raises(AgentError, match="shapes"):
        validate(session, artifacts, flat, Budget())


def test_outputs_that_are_not_numbers_fail_the_check(
    session: Session, nets: dict[str, Net], artifacts: dict[str, Artifact], examples: Examples, tmp_path: Path
) -> None:
    net = Net(8).eval()
    with torch.no_grad():
        net.head.bias[0] = float("nan")
    broken = validate(session, {**artifacts, "compact": save_onnx(net, tmp_path / "nan.onnx")}, examples, Budget())
    assert broken.numeric_error is None
    assert not broken.passed
    assert "NaN" in broken.checks[0].note
    write_record(tmp_path / "report.json", broken)


@pytest.mark.parametrize("which", ["dense", "compact"])
def test_altered_artifacts_are_refused(
    session: Session, artifacts: dict[str, Artifact], examples: Examples, tmp_path: Path, which: str
) -> None:
    path = tmp_path / "altered.onnx"
    path.write_bytes(Path(artifacts[which].path).read_bytes() + b"\0")
    with pytest.raises(RecordError, match="altered"):
        validate(session, {**artifacts, which: replace(artifacts[which], path=str(path))}, examples, Budget())
    path.unlink()
    with pytest.raises(RecordError, match="cannot read"):
        validate(session, {**artifacts, which: replace(artifacts[which], path=str(path))}, examples, Budget())


def test_an_artifact_that_does_not_run_is_an_error(
    session: Session, artifacts: dict[str, Artifact], examples: Examples, tmp_path: Path
) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no model")
    broken = replace(artifacts["compact"], path=str(path), sha256=sha256_file(path))
    with pytest.raises(AgentError, match="outputs of the compact model failed"):
        validate(session, {**artifacts, "compact": broken}, examples, Budget())


def test_nothing_of_ours_stays_on_the_board(report: Report, session: Session) -> None:
    assert report.samples
    left = [file.name for file in Path(session.target.workdir).rglob("*") if file.suffix in (".onnx", ".npz")]
    assert left == []
