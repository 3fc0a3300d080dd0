"""score: importance per unit, and loss curves that say what they measured."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits import images
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.core.errors import DataError, UnknownMember, UsageError
from edgeprune.core.family import list_members, load_member
from edgeprune.core.records import Graph, Importance
from edgeprune.core.store import read_record, write_record
from edgeprune.graphs.slice import mask_model
from edgeprune.load import ArrayBatches
from edgeprune.recover import recover_accuracy
from edgeprune.score import curve_widths, score_groups
from edgeprune.trace import trace_graph

torch.set_num_threads(1)


class Digits:
    """Real handwritten digits (scikit-learn), training and calibration batches."""

    calibration: Any
    test = None

    def __init__(self) -> None:
        x, y = images(shuffled=False)
        self.train = ArrayBatches(x[:800], y[:800], batch=50, shuffle=True)
        self.calibration = ArrayBatches(x[800:928], y[800:928], batch=50)


class Net(nn.Module):
    """Two convolutions, a residual sum and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.inner = nn.Conv2d(12, 16, 3, padding=1)
        self.outer = nn.Conv2d(16, 12, 3, padding=1)
        self.linear = nn.Linear(12 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(torch.relu(self.norm(self.stem(x))), 2)
        x = x + self.outer(torch.relu(self.inner(x)))
        return self.linear(x.flatten(1))


INPUTS = (torch.zeros(2, 1, 8, 8),)


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


@pytest.fixture(scope="module")
def net(digits: Digits) -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    recover_accuracy(model, digits, epochs=3, lr=0.05, autocast=False)
    return model.eval()


@pytest.fixture(scope="module")
def graph(net: nn.Module) -> Graph:
    return trace_graph(net, INPUTS)


def loss_of(model: nn.Module, digits: Digits) -> float:
    batches = list(digits.calibration)
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    with torch.no_grad():
        return float(functional.cross_entropy(model.eval()(x), y))


def test_every_prunable_group_is_scored_and_the_model_left_alone(net: nn.Module, graph: Graph, digits: Digits) -> None:
    before = copy.deepcopy(net.state_dict())
    importance = score_groups(net, INPUTS, graph, digits.calibration)
    assert importance.scores.keys() == importance.curves.keys() == {group.name for group in graph.prunable}
    assert importance.graph_sha256 == graph.model_sha256
    for group in graph.prunable:
        assert importance.scores[group.name].shape == (group.units,)
        assert np.isfinite(importance.scores[group.name]).all()
        curve = importance.curves[group.name]
        assert (np.diff(curve.widths) > 0).all() and curve.widths[-1] == group.units
        assert curve.loss[-1] == importance.dense_loss
    assert importance.dense_loss == pytest.approx(loss_of(net, digits), rel=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_an_importance_survives_its_file(net: nn.Module, graph: Graph, digits: Digits, tmp_path: Path) -> None:
    importance = score_groups(net, INPUTS, graph, digits.calibration, examples=64, levels=2)
    write_record(tmp_path / "importance.json", importance)
    again = read_record(Importance, tmp_path / "importance.json")
    for name, curve in importance.curves.items():
        assert np.array_equal(again.curves[name].loss, curve.loss)
        assert np.array_equal(again.scores[name], importance.scores[name])


def test_a_curve_without_compensation_is_the_masked_models_loss(net: nn.Module, graph: Graph, digits: Digits) -> None:
    importance = score_groups(net, INPUTS, graph, digits.calibration, compensate=False)
    for group in graph.prunable:
        order = np.argsort(importance.scores[group.name], kind="stable")
        curve = importance.curves[group.name]
        for width, loss in zip(curve.widths, curve.loss, strict=True):
            keep = np.sort(order[group.units - width :])
            assert loss == pytest.approx(loss_of(mask_model(net, graph, {group.name: keep}), digits), rel=1e-4)


def test_compensation_lowers_the_curves(net: nn.Module, graph: Graph, digits: Digits) -> None:
    plain = score_groups(net, INPUTS, graph, digits.calibration, compensate=False)
    repaired = score_groups(net, INPUTS, graph, digits.calibration)
    for name, curve in plain.curves.items():
        assert repaired.curves[name].loss.mean() < curve.loss.mean()


def test_taylor_is_the_mean_over_batches_of_the_squared_change(net: nn.Module, graph: Graph, digits: Digits) -> None:
    importance = score_groups(net, INPUTS, graph, digits.calibration, criterion="taylor", curves=False)
    x = torch.cat([x for x, _ in digits.calibration])
    y = torch.cat([y for _, y in digits.calibration])
    model, squares = copy.deepcopy(net), []
    group = next(group for group in graph.prunable if group.name == "inner")
    for inputs, targets in zip(x.split(16), y.split(16), strict=True):
        model.zero_grad()
        functional.cross_entropy(model(inputs), targets).backward()
        out = (model.inner.weight * model.inner.weight.grad).sum((1, 2, 3)) + model.inner.bias * model.inner.bias.grad
        squares.append((out + (model.outer.weight * model.outer.weight.grad).sum((0, 2, 3))).square())
    assert importance.dense_loss is None and not importance.curves
    assert group.units == 16
    assert np.allclose(importance.scores["inner"], torch.stack(squares).mean(0).detach().numpy(), rtol=1e-3)


MEASURING = [name for name in list_members("criteria") if load_member("criteria", name).NEEDS is not None]


@pytest.mark.parametrize("name", MEASURING)
def test_losing_what_a_criterion_ranks_lowest_beats_losing_the_highest(
    name: str, net: nn.Module, graph: Graph, digits: Digits
) -> None:
    scores = score_groups(net, INPUTS, graph, digits.calibration, criterion=name, curves=False).scores
    lost = {}
    for sign in (1, -1):
        keep = {g.name: np.sort(np.argsort(sign * scores[g.name])[g.units // 3 :]) for g in graph.prunable}
        lost[sign] = loss_of(mask_model(net, graph, keep), digits)
    assert lost[1] < 0.8 * lost[-1]


def test_magnitude_needs_no_data(net: nn.Module, graph: Graph) -> None:
    importance = score_groups(net, INPUTS, graph, None, criterion="magnitude", options="p=1", curves=False)
    assert importance.criterion == "magnitude:p=1"
    assert (importance.scores["inner"] > 0).all()


def test_a_killed_scoring_resumes_where_it_stopped(
    net: nn.Module, graph: Graph, digits: Digits, tmp_path: Path
) -> None:
    path = tmp_path / "importance.jsonl"
    whole = score_groups(net, INPUTS, graph, digits.calibration, examples=64)

    def kill(what: str, done: int, total: int) -> None:
        if what == "score: loss curves" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_groups(net, INPUTS, graph, digits.calibration, examples=64, checkpoint=path, progress=kill)
    assert len(path.read_text().splitlines()) == 1
    with path.open("a") as file:
        file.write('{"half a li')
    again = score_groups(net, INPUTS, graph, digits.calibration, examples=64, checkpoint=path)
    assert len(path.read_text().splitlines()) == len(graph.prunable)
    for name, curve in whole.curves.items():
        assert np.allclose(again.curves[name].loss, curve.loss, rtol=1e-6)
    score_groups(net, INPUTS, graph, digits.calibration, examples=64, checkpoint=path, criterion="magnitude")
    assert len(path.read_text().splitlines()) == 2 * len(graph.prunable), "another criterion's curves were taken over"


def test_curves_are_the_same_wherever_they_are_measured_and_a_kill_loses_none(digits: Digits, tmp_path: Path) -> None:
    """In workers that cannot import the model's class, of which one layer is none of torch's plain ones."""

    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 8, 3, padding=1, padding_mode="circular", bias=False)
            self.norm = nn.BatchNorm2d(8)
            self.around = nn.Conv2d(8, 8, 3, padding=1)
            self.inner = nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular")
            self.outer = nn.Conv2d(12, 8, 3, padding=1)
            self.linear = nn.Linear(8 * 16, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.around(functional.max_pool2d(torch.relu(self.norm(self.stem(x))), 2)))
            return self.linear((x + self.outer(torch.relu(self.inner(x)))).flatten(1))

    torch.manual_seed(0)
    net, path = Local().eval(), tmp_path / "importance.jsonl"
    graph = trace_graph(net, INPUTS)
    assert graph.branches
    with torch.no_grad():
        net.linear.weight *= 20  # so that it is sure of something
        calibration = [(x, net(x).argmax(1)) for x, _ in digits.calibration]
    measure = partial(
        score_groups, net, INPUTS, graph, calibration, criterion="magnitude", levels=3, depth=True
    )  # fmt: skip
    here = measure()

    def kill(what: str, done: int, total: int) -> None:
        if what == "score: loss curves" and done == 1:
            raise KeyboardInterrupt

    def look(what: str, done: int, total: int) -> None:
        written = len(path.read_text().splitlines())
        assert written == done + (len(graph.prunable) if what == "score: branches" else 0), "kept until later"

    with pytest.raises(KeyboardInterrupt):
        measure(checkpoint=path, progress=kill)
    found = measure(checkpoint=path, progress=look, executor="processes:workers=2")
    names = [each.name for each in (*graph.prunable, *graph.branches)]
    assert len(path.read_text().splitlines()) == len(names)
    assert list(found.curves) == list(here.curves) == names
    for name in names:
        assert np.array_equal(found.curves[name].widths, here.curves[name].widths)
        assert np.allclose(found.curves[name].loss, here.curves[name].loss, rtol=1e-4)
    with pytest.raises(UsageError, match="not an option of processes"):
        score_groups(net, INPUTS, graph, None, executor="processes:size=2")


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "needs calibration data with labels"),
        ([], "empty"),
        ([(torch.zeros(4, 1, 8, 8), None)], "the targets are NoneType"),
        ([(torch.zeros(4, 1, 8, 8), torch.zeros(4))], "the targets are torch.float32"),
        ([(torch.zeros(4, 1, 9, 8), torch.zeros(4, dtype=torch.int64))], r"\[\[1, 9, 8\]\].*\[\[1, 8, 8\]\]"),
        ([(torch.zeros(4, 1, 8, 8), torch.full((4,), 10))], "label 10, the model only 10 classes"),
        (
            [(torch.full((4, 1, 8, 8), float("nan")), torch.zeros(4, dtype=torch.int64))],
            "outputs on the calibration data are not finite",
        ),
    ],
)
def test_data_that_cannot_score_says_why(net: nn.Module, graph: Graph, calibration: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        score_groups(net, INPUTS, graph, calibration)


def test_a_loss_that_is_not_finite_is_named(net: nn.Module, graph: Graph) -> None:
    calibration = [(torch.full((4, 1, 8, 8), float("nan")), torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(DataError, match="loss is nan"):
        score_groups(net, INPUTS, graph, calibration, criterion="taylor")


def test_one_class_only_still_scores(net: nn.Module, graph: Graph, digits: Digits) -> None:
    x, _ = next(iter(digits.calibration))
    importance = score_groups(net, INPUTS, graph, [(x, torch.zeros(len(x), dtype=torch.int64))], levels=2)
    assert all(np.isfinite(curve.loss).all() for curve in importance.curves.values())


def test_unknown_criteria_and_options_are_refused(net: nn.Module, graph: Graph, digits: Digits) -> None:
    with pytest.raises(UnknownMember, match="known: "):
        score_groups(net, INPUTS, graph, digits.calibration, criterion="nonsense")
    with pytest.raises(UsageError, match="not an option"):
        score_groups(net, INPUTS, graph, digits.calibration, options="p=1")


def test_curves_are_measured_at_even_parts_and_the_narrowest_width() -> None:
    assert curve_widths(64, 1, 4) == [4, 16, 32, 48]
    assert curve_widths(24, 8, 4) == [8, 16]
    assert curve_widths(1, 1, 4) == []
    assert curve_widths(3, 1, 4) == [1, 2]
    assert curve_widths(128, 1, 8) == [8, 16, 32, 48, 64, 80, 96, 112]
