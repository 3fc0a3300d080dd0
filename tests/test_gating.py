"""One battery for every way of gating: masking a batch is skipping one by one, in PyTorch, in the file, and on disk."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from digits import digits
from onnx import TensorProto, helper, numpy_helper
from small_nets import ResNet20, WideResNet
from torch import Tensor, nn
from zoo import torchvision_models

from edgeprune.compact import save_compact
from edgeprune.core.describe import describe_gates, summary
from edgeprune.core.effort import Effort
from edgeprune.core.errors import ModelError, RecordError, UnknownMember, UsageError
from edgeprune.core.family import list_members
from edgeprune.core.records import Budget, Cost, Gate, Gated, ModelSpec, Precision, RecoverResult, Report, Target
from edgeprune.core.store import read_record, write_record
from edgeprune.device.runtimes.onnxruntime import Model
from edgeprune.device.session import Session, open_session
from edgeprune.export import export_model
from edgeprune.formats._onnx_choices import sink_choices
from edgeprune.formats._onnx_kernels import all_nodes
from edgeprune.gate import gate_model, settle_gates
from edgeprune.gating import find_gates, load_gating
from edgeprune.graphs.branches import drop_branches
from edgeprune.graphs.capture import capture
from edgeprune.graphs.choices import Decisions, count_runs
from edgeprune.graphs.lift import lift
from edgeprune.graphs.ports import get_ports
from edgeprune.inspect import inspect_file
from edgeprune.load import load_model
from edgeprune.recover import evaluate_accuracy, recover_accuracy
from edgeprune.trace import trace_graph
from edgeprune.validate import check_branches, collect_examples, validate_artifact

torch.set_num_threads(1)
CHOSEN = {
    "block_skip": ("rate=0.7",),
    "early_exit": ("at=0.4,rate=0.5,hidden=0", "at=0.3 0.7,rate=0.6,hidden=16"),
}
ALL = [f"{name}:{options}" for name in list_members("gating") for options in CHOSEN[name]]
ONE = (torch.zeros(1, 1, 8, 8),)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner, self.inner_norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.outer, self.outer_norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.outer_norm(self.outer(torch.relu_(self.inner_norm(self.inner(x)))))
        y += x  # as torchvision writes it
        return torch.relu_(y)


class Net(nn.Module):
    """Three residual blocks, the last behind a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), Block(8), Block(8)
        self.down, self.third, self.head = nn.Conv2d(8, 16, 3, 2, 1), Block(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(torch.relu(self.stem(x))))
        return self.head(self.third(torch.relu(self.down(x))).mean((2, 3)))


@cache
def dense() -> nn.Module:
    torch.manual_seed(0)
    net = Net().eval()
    recover_accuracy(net, digits(), epochs=6, lr=0.1, autocast=False)
    return net


@cache
def gated(chosen: str) -> tuple[nn.Module, RecoverResult, Gated]:
    net = gate_model(dense(), ONE, chosen)
    result = recover_accuracy(net, digits(), teacher=dense(), epochs=12, lr=0.05, autocast=False, gating=chosen)
    return net, result, settle_gates(net, ONE, digits().train, chosen)


def images() -> Tensor:
    return torch.cat([inputs for inputs, _ in digits().test])


@cache
def exported(chosen: str, folder: Path) -> Path:
    path = folder / "model.onnx"
    export_model(gated(chosen)[0], ONE, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gating")


# --- the battery ---------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", ALL)
def test_gates_that_are_not_trained_change_nothing(chosen: str) -> None:
    before = {key: value.clone() for key, value in dense().state_dict().items()}
    net = gate_model(dense(), ONE, chosen)
    assert torch.equal(net(images()), dense()(images()))
    assert {key: net.state_dict()[key].shape for key in before} == {key: value.shape for key, value in before.items()}
    assert set(get_ports(net).gates) == set(find_gates(net)) != set()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert all(torch.equal(value, dense().state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize("chosen", ALL)
def test_a_training_meets_the_rate_and_keeps_the_accuracy(chosen: str) -> None:
    net, result, record = gated(chosen)
    rate = float(dict(item.split("=") for item in chosen.partition(":")[2].split(","))["rate"])
    gates = record.gates
    if chosen.startswith("block_skip"):
        share = sum(gate.share for gate in gates.values())
        assert abs(sum(gate.share * gate.runs for gate in gates.values()) / share - rate) <= 0.05
    else:
        assert abs(1 - min(gate.runs for gate in gates.values()) - rate) <= 0.05
    assert record.macs_share == pytest.approx(1 - sum(g.share * (1 - g.runs) for g in gates.values()))
    assert 0.2 < record.macs_share < 0.95 and record.examples == 800
    assert set(record.collapsed) < set(gates), "some gate decides"
    assert evaluate_accuracy(net, digits().test) >= evaluate_accuracy(dense(), digits().test) - 0.1
    assert len(result.losses) == 12 and not result.note


@pytest.mark.parametrize("chosen", ALL)
def test_masking_a_batch_is_deciding_one_by_one(chosen: str) -> None:
    net, batch = gated(chosen)[0], images()[:64]
    with torch.no_grad():
        alone = torch.cat([net(image[None]) for image in batch])
        assert torch.allclose(net(batch), alone, atol=1e-4)


@pytest.mark.parametrize("chosen", ALL)
def test_the_file_computes_the_same_and_leaves_out_what_is_skipped(chosen: str, tmp_path: Path) -> None:
    net, batch = gated(chosen)[0], images()[:60]
    path = exported(chosen, tmp_path)
    model = onnx.load(path)
    assert sum(node.op_type == "If" for node in all_nodes(model.graph)) == len(get_ports(net).gates)
    assert not any(node.op_type == "Where" for node in all_nodes(model.graph))
    board = Model(str(path), 1, str(tmp_path / "profile"))
    name = next(iter(board.inputs))
    with torch.no_grad():
        expected = net(batch).numpy()
    for image, wanted in zip(batch, expected, strict=True):
        np.testing.assert_allclose(board.run({name: image[None].numpy()})[0][0], wanted, atol=1e-4)
    # What the runtime executed, against what the gates say.
    layers = [sum(op in ("Conv", "FusedConv") for _, op, _ in kernels) for _, kernels in board.end_profile()]
    decisions = Decisions(net, ONE)
    decided = [decisions.count([(image[None], None)]) for image in batch]
    of_state = {tuple(each.values()) for each in decided}
    assert len(of_state) > 1, "both branches of some gate are taken"
    for state in of_state:
        counts = {n for n, each in zip(layers, decided, strict=True) if tuple(each.values()) == state}
        assert len(counts) == 1
    costs = [sum(gated(chosen)[2].gates[name].share * ran for name, ran in each.items()) for each in decided]
    assert layers[int(np.argmin(costs))] < layers[int(np.argmax(costs))]


@pytest.mark.parametrize("chosen", ALL)
def test_it_is_the_same_after_saving_and_loading(chosen: str, tmp_path: Path) -> None:
    net = gated(chosen)[0]
    save_compact(net, ONE, tmp_path, name="gated")
    again = load_model(ModelSpec(file="gated.pt2"), tmp_path)
    assert torch.equal(again(images()), net(images()))
    assert get_ports(again).gates == get_ports(net).gates
    assert again.state_dict().keys() >= dense().state_dict().keys()
    batches = [(images(), None)]
    assert count_runs(again, ONE, batches) == count_runs(net, ONE, batches)
    export_model(again, ONE, tmp_path / "again.onnx")
    branches = [node for node in all_nodes(onnx.load(tmp_path / "again.onnx").graph) if node.op_type == "If"]
    assert len(branches) == len(get_ports(net).gates)
    with pytest.raises(ModelError, match="gates already"):
        gate_model(again, ONE, chosen)
    with pytest.raises(ModelError, match="make them anew"):
        settle_gates(again, ONE, digits().train, chosen)


@pytest.mark.parametrize("chosen", [ALL[0], ALL[-1]])
def test_a_training_that_is_interrupted_ends_like_any_other(chosen: str, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def interrupt(what: str, done: int, total: int) -> None:
        if done == total // 2 + 3:
            raise Stop

    settings = {"teacher": dense(), "epochs": 2, "lr": 0.05, "autocast": False, "gating": chosen}
    whole, cut = (gate_model(dense(), ONE, chosen) for _ in range(2))
    recover_accuracy(whole, digits(), **settings)
    with pytest.raises(Stop):
        recover_accuracy(cut, digits(), **settings, checkpoint=tmp_path / "c", progress=interrupt)
    again = gate_model(dense(), ONE, chosen)
    recover_accuracy(again, digits(), **settings, checkpoint=tmp_path / "c")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in whole.state_dict().items())


@pytest.mark.parametrize("chosen", [ALL[0], ALL[-1]])
def test_the_board_times_every_input(chosen: str, tmp_path: Path) -> None:
    net, rate = gated(chosen)[0], gated(chosen)[2]
    files = {name: export_model(model, ONE, tmp_path / f"{name}.onnx") for name, model in
             (("dense", dense()), ("gated", net))}  # fmt: skip
    examples = collect_examples(net, digits().test, files["gated"], limit=40)
    runs = count_runs(net, ONE, [(images()[:40], None)])
    assert {name: ran.mean() for name, ran in examples.gates.items()} == runs
    assert examples.gates.keys() == rate.gates.keys()
    effort = Effort(rounds=1, repeats=2, seconds=0.01, precision=None)
    target = Target(name="here", transport="local", workdir=str(tmp_path / "board"))

    def check(session: Session, budget: Budget) -> Report:
        return validate_artifact(
            files["gated"], session, dense=files["dense"], examples=examples, budget=budget, predicted=Cost(),
            effort=effort,
        )  # fmt: skip

    with open_session(target) as session:
        report = check(session, Budget(latency_s=1.0))
        worst = check(session, Budget(latency_s=1e-9, statistic="worst"))
        share = check(session, Budget(latency_s=1.0, latency_share=1e3, statistic="p95"))
    found = report.distribution
    assert found is not None and found.gates == runs and report.numeric_error is not None
    latencies = np.array(found.latencies_s)
    assert len(latencies) == 40 and (latencies > 0).all()
    assert found.mean_s == pytest.approx(latencies.mean()) and latencies.min() <= found.worst_s <= latencies.max()
    ways = np.stack([*examples.gates.values()], axis=1)
    alike = [(ways == way).all(axis=1) for way in ways]
    assert found.worst_share == max(np.median(np.array(found.shares)[each]) for each in alike)
    assert report.compact.latency_s is not None and report.compact.latency_s.median == found.mean_s
    assert found.mean_share == pytest.approx(np.mean(found.shares))
    assert all(len(samples.values) == 40 for rounds in report.samples.values() for samples in rounds)
    assert {c.name: c.passed for c in report.checks}["latency (mean)"] and report.passed
    checks = {c.name: c for c in worst.checks}
    assert worst.distribution is not None and not checks["latency (worst)"].passed
    assert checks["latency (worst)"].measured == worst.distribution.worst_s
    assert {c.name: c.passed for c in share.checks}["latency (p95)"]
    write_record(tmp_path / "report.json", report)
    assert read_record(Report, tmp_path / "report.json") == report
    text = summary(tmp_path, report)
    assert "latency over 40 inputs: mean" in text and "gates ran: " in text


# --- what each member does -----------------------------------------------------------------------


def test_gates_that_always_decide_the_same_are_named() -> None:
    net = gate_model(dense(), ONE, "block_skip:rate=0.5")
    gates = find_gates(net)
    with torch.no_grad():
        gates["first.gate"].decide.bias.fill_(50.0)
        gates["second.gate"].decide.bias.fill_(-50.0)
    runs = count_runs(net, ONE, digits().test)
    record = Gated(
        gating="block_skip:rate=0.5", examples=300,
        gates={name: Gate(share=gates[name].share, runs=runs[name]) for name in get_ports(net).gates},
    )  # fmt: skip
    assert record.collapsed == {"first.gate": "always on", "second.gate": "always off", "third.gate": "always on"}
    text = describe_gates(record)
    assert "3 of 3 gates decide the same for every example" in text and "second.gate (always off)" in text


def test_a_record_reads_back(tmp_path: Path) -> None:
    record = gated(ALL[0])[2]
    write_record(tmp_path / "gating.json", record)
    assert read_record(Gated, tmp_path / "gating.json") == record


def test_an_exit_keeps_to_a_tolerance() -> None:
    chosen = "early_exit:at=0.4,tolerance=0.02"
    net = gate_model(dense(), ONE, chosen)
    recover_accuracy(net, digits(), epochs=3, lr=0.05, autocast=False, gating=chosen)
    calibration = list(digits().test)
    record = settle_gates(net, ONE, calibration, chosen)
    (exit_,) = find_gates(net).values()
    early = evaluate_accuracy(net, calibration)
    exit_.threshold.fill_(2.0)
    assert min(gate.runs for gate in record.gates.values()) < 1
    assert early >= evaluate_accuracy(net, calibration) - 0.02 - 1e-9


def test_exits_that_are_trained_alone_leave_the_model_as_it_is(tmp_path: Path) -> None:
    """Weights, batch-norm statistics, and that a later training has gradients for all of it again."""
    chosen = "early_exit:at=0.5,tolerance=0.01,alone=true"
    before = {key: value.clone() for key, value in dense().state_dict().items()}
    net = gate_model(dense(), ONE, chosen)
    untrained = {key: value.clone() for key, value in net.state_dict().items() if key not in before}
    recover_accuracy(net, digits(), epochs=6, lr=0.05, gating=chosen, checkpoint=tmp_path / "c")
    after = net.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not all(torch.equal(after[key], value) for key, value in untrained.items())
    assert all(parameter.requires_grad for parameter in net.parameters())
    record = settle_gates(net, ONE, digits().test, chosen)
    assert min(gate.runs for gate in record.gates.values()) < 0.9  # some do leave
    assert evaluate_accuracy(net, digits().test) >= evaluate_accuracy(dense(), digits().test) - 0.01 - 1e-9


ALONE = "early_exit:at=0.3 0.7,hidden=8,alone=true"


class Cut:
    """Training batches that break off, as a kill would, after so many of them."""

    def __init__(self, after: float) -> None:
        self.left, self.looked = after, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in digits().train:
            if self.looked >= self.left:
                raise KeyboardInterrupt
            self.looked += 1
            yield batch


def train_alone(checkpoint: Path | None, epochs: int = 2, after: float = math.inf, **options: Any) -> tuple[Any, ...]:
    net, batches = gate_model(dense(), ONE, ALONE), Cut(after)
    data = SimpleNamespace(train=batches, test=digits().test)
    result = recover_accuracy(net, data, epochs=epochs, gating=ALONE, checkpoint=checkpoint, **options)
    return net.state_dict(), result, batches.looked


@pytest.mark.parametrize("broken_in", ["first look", "second look", "learning"])
def test_exits_trained_alone_go_on_where_they_were_killed(tmp_path: Path, broken_in: str) -> None:
    length, path = len(list(digits().train)), tmp_path / "gates.safetensors"
    whole, result, looked = train_alone(None)
    assert looked == 2 * length and len(result.losses) > 2 and result.losses[-1] < result.losses[0]

    def interrupt(doing: str, done: int, total: int) -> None:
        if broken_in == "learning" and doing == "gates: learn" and done == total // 2:
            raise KeyboardInterrupt

    after = {"first look": length - 1, "second look": length + 2}.get(broken_in, math.inf)
    with pytest.raises(KeyboardInterrupt):
        train_alone(path, after=after, progress=interrupt)
    assert path.exists() == (broken_in != "first look")
    again, resumed, more = train_alone(path)
    assert resumed == result and more == {"first look": 2, "second look": 1}.get(broken_in, 0) * length
    assert all(torch.equal(again[key], value) for key, value in whole.items())
    done, the_same, none = train_alone(path)
    assert (the_same, none) == (result, 0) and all(torch.equal(done[key], value) for key, value in whole.items())
    assert train_alone(path, epochs=1)[2] == length  # of another training


def test_what_exits_see_is_kept_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune.gating._alone.KEPT_BYTES", 2 * 10_000)
    _, result, looked = train_alone(None)
    assert 2 <= looked < len(list(digits().train)) and not result.note


def test_a_training_of_exits_that_diverges_is_undone_and_a_damaged_checkpoint_refused(tmp_path: Path) -> None:
    untrained = gate_model(dense(), ONE, ALONE).state_dict()
    weights, result, _ = train_alone(tmp_path / "gates", lr=1e20)
    assert "diverged" in result.note and math.isfinite(result.accuracy_after)
    assert all(torch.equal(weights[key], value) for key, value in untrained.items() if key.endswith("weight"))
    data = (tmp_path / "gates").read_bytes()
    (tmp_path / "gates").write_bytes(data[: len(data) // 2])
    with pytest.raises(RecordError, match="damaged"):
        train_alone(tmp_path / "gates")


def test_exits_after_submodules_and_by_share() -> None:
    after = gate_model(dense(), ONE, "early_exit:after=first second")
    assert get_ports(after).gates == ("second.exit", "first.exit")
    shares = {name: gate.share for name, gate in find_gates(after).items()}
    first = find_gates(gate_model(dense(), ONE, "early_exit:after=first"))["first.exit"].share
    assert sum(shares.values()) == pytest.approx(first)
    with pytest.raises(ModelError, match=r"no place for an exit after 'fifth'; there are some in .*first"):
        gate_model(dense(), ONE, "early_exit:after=fifth")


def test_what_lies_behind_an_exit_does_not_run_once_an_input_left() -> None:
    net = gate_model(dense(), ONE, "early_exit:at=0.3 0.7")
    for gate in find_gates(net).values():
        gate.threshold.fill_(0.0)
    assert set(count_runs(net, ONE, digits().test).values()) == {0.0}
    outer = get_ports(net).gates[-1]
    find_gates(net)[outer].threshold.fill_(2.0)
    runs = count_runs(net, ONE, digits().test)
    assert runs.pop(outer) == 1.0 and set(runs.values()) == {0.0}


class Plain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def test_models_without_a_place_are_refused() -> None:
    with pytest.raises(ModelError, match=r"no residual branch to skip .*early_exit"):
        gate_model(Plain(), ONE, "block_skip:rate=0.5")
    with pytest.raises(ModelError, match="those there are: first, second, third"):
        gate_model(dense(), ONE, "block_skip:branches=layer*")
    with pytest.raises(ModelError, match="classifier with one output"):
        gate_model(Image(), ONE, "early_exit:at=0.5")


@pytest.mark.parametrize(
    "chosen, message",
    [
        ("block_skip:rate=1.5", "between 0 and 1"),
        ("block_skip:strength=0", "above 0"),
        ("block_skip:ratio=0.5", "not an option of block_skip"),
        ("early_exit:at=half", "must be shares"),
        ("early_exit:at=0.2 1.0", "between 0 and 1"),
        ("early_exit:rate=1", "rate=1.0"),
    ],
)
def test_options_that_cannot_be_right(chosen: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_gating(chosen)
    with pytest.raises(UnknownMember, match="known: block_skip, early_exit"):
        load_gating("magic")


def test_formats_and_runtimes_without_branches_are_refused(tmp_path: Path) -> None:
    net = gated(ALL[0])[0]
    with pytest.raises(UsageError, match=r"no branches: nothing would be skipped; use \.onnx"):
        export_model(net, ONE, tmp_path / "model.tflite", format="tflite")
    with pytest.raises(ModelError, match="decide for one input at a time"):
        export_model(net, (torch.zeros(2, 1, 8, 8),), tmp_path / "model.onnx")
    check_branches("onnxruntime")
    for runtime in ("tflite", "tflite:delegate=gpu", "tensorrt"):
        with pytest.raises(UsageError, match=r"need a runtime that executes `If`"):
            check_branches(runtime)


def test_float16_weights_have_branches_too(tmp_path: Path) -> None:
    net = gated(ALL[0])[0]
    artifact = export_model(net, ONE, tmp_path / "model.onnx", precision=Precision(dtype="float16"))
    found = [node.op_type for node in all_nodes(onnx.load(artifact.path).graph)]
    assert artifact.dtype == "float16" and found.count("If") == len(get_ports(net).gates)


def test_a_model_that_chooses_by_itself_is_refused() -> None:
    class Chooses(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x.amax((1, 2, 3))[:, None] > 0.5, super().forward(x), torch.zeros(len(x), 10))

    with pytest.raises(ModelError, match="itself chooses"):
        gate_model(Chooses(), ONE, ALL[0])


def test_what_lies_in_branches_is_inspected(tmp_path: Path) -> None:
    net = gated(ALL[0])[0]
    export_model(net, ONE, tmp_path / "gated.onnx")
    export_model(dense(), ONE, tmp_path / "dense.onnx")
    with_gates, without = (inspect_file(tmp_path / f"{name}.onnx") for name in ("gated", "dense"))
    convolutions = [[each for each in found.operations if each.op == "Conv"] for found in (with_gates, without)]
    assert [sum(each.macs or 0 for each in found) for found in convolutions] == [
        sum(each.macs or 0 for each in convolutions[1])
    ] * 2
    assert with_gates.weights["float32"][0] >= without.weights["float32"][0]


def test_gates_are_trained_by_themselves() -> None:
    net = gate_model(dense(), ONE, ALL[0])
    with pytest.raises(UsageError, match="by themselves"):
        recover_accuracy(net, digits(), epochs=1, gating=ALL[0], pattern="n_m:n=2,m=4")
    with pytest.raises(UsageError, match="no gates to train"):
        recover_accuracy(copy.deepcopy(dense()), digits(), epochs=1, gating=ALL[0])


# --- real models ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, branches", [("ResNet20", 9), ("WideResNet", 6), pytest.param("mobilenet_v2", 10, marks=pytest.mark.long)]
)
def test_real_nets_get_gates_and_branches(name: str, branches: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = {"ResNet20": ResNet20, "WideResNet": WideResNet}
    net = (own[name]() if name in own else getattr(torchvision_models(), name)()).eval()
    one = (torch.randn(1, 3, 32, 32),)
    skipping = gate_model(net, one, "block_skip:rate=0.5")
    assert len(get_ports(skipping).gates) == branches
    assert torch.equal(skipping(one[0]), net(one[0]))
    leaving = gate_model(net, one, "early_exit:at=0.5")
    assert torch.equal(leaving(one[0]), net(one[0]))
    assert abs(next(iter(find_gates(leaving).values())).share - 0.5) < 0.15
    graph = trace_graph(net, one)
    closed = graph.branches[::2]
    with torch.no_grad():
        for branch in closed:
            find_gates(skipping)[f"{branch.name}.gate"].decide.bias.fill_(-50.0)
    dropped = capture(copy.deepcopy(net), one)
    drop_branches(dropped, graph, closed)
    torch.testing.assert_close(skipping(one[0]), lift(dropped).eval()(*one))
    artifact = export_model(skipping, one, tmp_path / "model.onnx")
    model = onnx.load(artifact.path)
    assert sum(node.op_type == "If" for node in all_nodes(model.graph)) == branches


# --- the surgery ---------------------------------------------------------------------------------


def choice(
    then: list[onnx.NodeProto], otherwise: list[onnx.NodeProto], outputs: tuple[str, ...] = ("y",)
) -> onnx.ModelProto:
    """`x` through `Where(c, a, b)`; weights are called `w...`."""
    nodes = [*then, *otherwise, helper.make_node("Where", ["c", "a", "b"], ["y"])]
    names = {name for node in nodes for name in node.input if name.startswith("w")}
    weights = [
        numpy_helper.from_array(np.full((3, 3), i + 1.0, np.float32), name) for i, name in enumerate(sorted(names))
    ]
    values = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for node in nodes for name in node.output
    }
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [1, 1])
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3]), condition],
        [values[name] for name in outputs], weights, value_info=[v for n, v in values.items() if n not in outputs],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def node(op: str, inputs: list[str], output: str) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], output)


def compute(model: onnx.ModelProto) -> list[np.ndarray]:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    x = np.array([[1.0, -2.0, 3.0]], np.float32)
    return [v for c in (True, False) for v in session.run(None, {"x": x, "c": np.array([[c]])})]


@pytest.mark.parametrize(
    "then, otherwise, outputs, made, outside",
    [
        ([node("MatMul", ["x", "w1"], "a")], [node("MatMul", ["x", "w2"], "b")], ("y",), 1, set()),
        # the other side is a value that something else reads
        ([node("MatMul", ["x", "w1"], "b1"), node("Add", ["b1", "x"], "a")], [node("Relu", ["x"], "b")], ("y", "b"), 1,
         {"b"}),
        # what both sides need stays outside
        ([node("MatMul", ["x", "w1"], "s"), node("MatMul", ["s", "w2"], "a")], [node("Relu", ["s"], "b")], ("y",), 1,
         {"s"}),
        # a weight that both read is in the graph itself
        ([node("MatMul", ["x", "w1"], "a")], [node("MatMul", ["x", "w1"], "m"), node("Relu", ["m"], "b")], ("y",), 1,
         set()),
        # nothing that is worth a branch
        ([node("Relu", ["x"], "a")], [node("Neg", ["x"], "b")], ("y",), 0, {"a", "b"}),
    ],
)  # fmt: skip
def test_only_what_one_side_needs_goes_into_a_branch(
    then: list[onnx.NodeProto], otherwise: list[onnx.NodeProto], outputs: tuple[str, ...], made: int, outside: set[str]
) -> None:
    model = choice(then, otherwise, outputs)
    expected = compute(model)
    assert sink_choices(model) == made
    for mine, theirs in zip(compute(model), expected, strict=True):
        np.testing.assert_allclose(mine, theirs)
    assert {name for n in model.graph.node for name in n.output if n.op_type not in ("If", "Where")} == outside


def test_a_choice_in_a_choice_is_a_branch_in_a_branch() -> None:
    inner = [
        node("MatMul", ["x", "w1"], "a1"),
        node("Where", ["c", "a1", "x"], "a2"),
        node("MatMul", ["a2", "w2"], "a"),
    ]
    model = choice(inner, [node("Relu", ["x"], "b")])
    expected = compute(model)
    assert sink_choices(model) == 2
    assert [n.op_type for n in model.graph.node] == ["If"]
    for mine, theirs in zip(compute(model), expected, strict=True):
        np.testing.assert_allclose(mine, theirs)


def test_choices_of_a_batch_stay(tmp_path: Path) -> None:
    model = choice([node("MatMul", ["x", "w1"], "a")], [node("Relu", ["x"], "b")])
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_value = 4
    assert sink_choices(model) == 0
