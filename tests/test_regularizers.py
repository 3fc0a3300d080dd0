"""One battery for every regularizer: on a real net it brings units to zero, which can be cut without loss."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits import Digits, digits
from torch import Tensor, nn

from edgeprune.compact import compact_model
from edgeprune.core.errors import DataError, ModelError, RecordError, UnknownMember, UsageError
from edgeprune.core.family import configure, list_members, load_member
from edgeprune.core.records import Graph, Precision
from edgeprune.load import ArrayBatches
from edgeprune.plan import keep_units
from edgeprune.recover import evaluate_accuracy, recover_accuracy
from edgeprune.regularizers._ranks import Ranking, Schedule, rise
from edgeprune.regularizers._units import UnitGroup, live_units, unit_groups
from edgeprune.score import score_groups
from edgeprune.trace import trace_graph

torch.set_num_threads(1)
MEMBERS = list_members("regularizers")
STRONG = {
    "directional": "strength=0.8",
    "greg": "ratio=0.5",
    "group_lasso": "strength=0.1",
    "increg": "ratio=0.5",
    "network_slimming": "strength=0.8",
    "spp": "ratio=0.5",
}
"""What brings units to zero within the few steps of a test; trainings are longer and need less."""
INPUTS = (torch.zeros(2, 1, 8, 8),)


class Net(nn.Module):
    """A residual sum, a depthwise convolution and a flatten, batch norms everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.depth, self.depth_norm = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12)
        self.outer, self.outer_norm = nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        y = torch.relu(self.depth_norm(self.depth(torch.relu(self.inner_norm(self.inner(x))))))
        return self.head(torch.relu(x + self.outer_norm(self.outer(y))).flatten(1))


@cache
def trained() -> tuple[nn.Module, Graph]:
    torch.manual_seed(0)
    net = Net().eval()
    recover_accuracy(net, digits(), epochs=3, lr=0.05, autocast=False)
    return net, trace_graph(net, INPUTS)


@cache
def regularized(name: str) -> tuple[nn.Module, Any]:
    net, graph = trained()
    model = copy.deepcopy(net)
    chosen = f"{name}:{STRONG[name]}"
    return model, recover_accuracy(model, digits(), epochs=6, lr=0.05, autocast=False, regularizer=chosen, graph=graph)


def norms_of(model: nn.Module, graph: Graph) -> dict[str, Tensor]:
    return {group.name: group.norms() for group in unit_groups(model, graph)}


@pytest.mark.parametrize("name", MEMBERS)
class TestEveryRegularizer:
    def test_brings_units_to_zero_while_the_net_still_learns(self, name: str) -> None:
        net, graph = trained()
        model, result = regularized(name)
        before, after = norms_of(net, graph), norms_of(model, graph)
        assert result.zeroed and not result.note and all(np.isfinite(result.losses))
        for group, norms in after.items():
            assert result.zeroed.get(group, 0) == int((norms == 0).sum())
            assert bool(torch.isfinite(norms).all()) and norms.max() > 0.05 * before[group].max()
        assert sum(result.zeroed.values()) >= 4, "too few to speak of"
        assert result.accuracy_after is not None and result.accuracy_after > 0.8

    def test_zero_units_are_cut_without_loss(self, name: str) -> None:
        _, graph = trained()
        model, result = regularized(name)
        keep = live_units(model, graph)
        assert {group.name: group.units - len(keep[group.name]) for group in graph.prunable if group.name in keep} == (
            result.zeroed
        )
        smaller = compact_model(model, INPUTS, graph, keep).eval()
        assert sum(p.numel() for p in smaller.parameters()) < 0.9 * sum(p.numel() for p in model.parameters())
        x = torch.cat([x for x, _ in digits().test])
        with torch.no_grad():
            assert torch.allclose(smaller(x), model(x), rtol=1e-4, atol=1e-4)
        assert evaluate_accuracy(smaller, digits().test) == result.accuracy_after

    def test_a_plan_of_as_many_units_keeps_the_live_ones(self, name: str) -> None:
        _, graph = trained()
        model, _ = regularized(name)
        keep = live_units(model, graph)
        for criterion in ("magnitude", "lamp"):
            importance = score_groups(model, INPUTS, graph, None, criterion=criterion, curves=False)
            planned = keep_units(importance, {group: len(units) for group, units in keep.items()}, graph)
            assert planned.keys() == keep.keys()
            assert all(np.array_equal(planned[group], units) for group, units in keep.items())

    def test_a_killed_training_resumes_to_the_same_weights(self, name: str, tmp_path: Path) -> None:
        net, graph = trained()
        whole, path = copy.deepcopy(net), tmp_path / "checkpoint"
        settings: dict[str, Any] = {
            "epochs": 3, "lr": 0.05, "autocast": False, "regularizer": f"{name}:{STRONG[name]}", "graph": graph,
        }  # fmt: skip
        result = recover_accuracy(whole, digits(), **settings)

        def kill(_: str, done: int, __: int) -> None:
            if done == 23:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            recover_accuracy(copy.deepcopy(net), digits(), checkpoint=path, progress=kill, **settings)
        resumed = copy.deepcopy(net)
        assert recover_accuracy(resumed, digits(), checkpoint=path, **settings) == result
        for key, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[key]), key

    def test_rejects_options_out_of_range_and_unknown_ones(self, name: str) -> None:
        groups = unit_groups(*trained())
        make = load_member("regularizers", name).make
        options = {"ratio": "1.0"} if "ratio" in STRONG[name] else {"strength": "-1.0"}
        for option, value in options.items():
            with pytest.raises(UsageError, match=f"{option}={value}"):
                configure(make, f"{option}={value}")(groups, 10)
        with pytest.raises(UsageError, match="not an option"):
            configure(make, "no_such_option=1")

    def test_one_step_of_training_is_enough_to_run(self, name: str) -> None:
        net, graph = trained()
        short = Digits()
        short.train = ArrayBatches(short.train.inputs[:10], short.train.targets[:10], batch=10)
        result = recover_accuracy(
            copy.deepcopy(net), short, epochs=1, lr=0.01, autocast=False, regularizer=name, graph=graph
        )
        assert np.isfinite(result.losses).all()


def toy() -> tuple[nn.Module, list[UnitGroup]]:
    """4 hidden units, whose filters and readers are (u + 1) x ones."""
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.arange(1.0, 5.0)[:, None].expand(4, 3))
        net[1].weight.copy_(torch.arange(1.0, 5.0)[None].expand(2, 4))
    return net, unit_groups(net, trace_graph(net, (torch.zeros(2, 3),)))


def test_a_units_norm_is_over_all_that_goes_with_it() -> None:
    net, (group,) = toy()
    assert group.entries == 5
    assert torch.allclose(group.norms(), torch.arange(1.0, 5.0) * 5**0.5)
    assert torch.allclose(group.norms(p=1), torch.arange(1.0, 5.0) * 5)
    group.scale(torch.tensor([1.0, 0.0, 2.0, 1.0]))
    assert net[0].weight[:, 0].tolist() == [1.0, 0.0, 6.0, 4.0] and net[1].weight[0].tolist() == [1.0, 0.0, 6.0, 4.0]
    net[0].weight.grad, net[1].weight.grad = torch.zeros(4, 3), torch.ones(2, 4)
    group.decay(torch.tensor([0.0, 1.0, 0.5, 0.0]))
    assert net[0].weight.grad[:, 0].tolist() == [0.0, 0.0, 3.0, 0.0]
    group.mute(torch.tensor([1.0, 0.0, 0.0, 1.0]))
    assert net[1].weight.grad[0].tolist() == [0.0, 1.0, 4.0, 0.0]


def test_the_step_of_a_group_bounds_how_many_may_go() -> None:
    _, (group,) = toy()
    assert [group.most(ratio) for ratio in (0.1, 0.25, 0.5, 0.74, 0.99)] == [0, 1, 2, 2, 3]
    group.step = 2
    assert [group.most(ratio) for ratio in (0.25, 0.5, 0.99)] == [0, 2, 2]


def test_group_lasso_is_the_proximal_step() -> None:
    """arg min over v of (v - w)² / 2 + rate x strength x sqrt(k) x |v|, by hand for each unit."""
    net, groups = toy()
    load_member("regularizers", "group_lasso").make(groups, 1, strength=1.5).after_step(1.0)
    shorter = 1.5 * 5**0.5
    expected = [max(1 - shorter / (u * 5**0.5), 0) * u for u in (1, 2, 3, 4)]
    assert net[0].weight[:, 0].tolist() == pytest.approx(expected)
    assert expected[0] == 0 and groups[0].norms()[0] == 0


def test_directional_thresholds_what_the_steps_add_up_to() -> None:
    net, groups = toy()
    member = load_member("regularizers", "directional").make(groups, 9, strength=2.0, power=0.6)
    rate, dual = 0.5, np.arange(1.0, 5.0)
    for step in (1, 2, 3):
        member.before_forward()
        with torch.no_grad():
            for layer in net:
                layer.weight.sub_(0.1)  # a step of the optimiser, the same for every weight
        member.after_step(rate)
        dual = dual - 0.1
        threshold = 2.0 * rate**1.1 * step**0.6
        expected = np.maximum(1 - threshold / np.abs(dual), 0) * dual
        assert net[0].weight[:, 0].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert expected[0] == 0 < dual[0]


def test_network_slimming_shrinks_scales_then_shifts_then_all() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1)).eval()
    groups = unit_groups(net, trace_graph(net, INPUTS))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([0.5, -2.0, 1.0]))
        net[1].bias.copy_(torch.tensor([0.75, 0.25, 0.0]))
    member = load_member("regularizers", "network_slimming").make(groups, 9, strength=1.0)
    member.after_step(0.5)
    assert net[1].weight.tolist() == [0.0, -1.5, 0.5] and net[1].bias.tolist() == [0.25, 0.25, 0.0]
    assert groups[0].norms()[0] > 0, "it still gives on a constant"
    member.after_step(0.5)
    assert net[1].weight.tolist() == [0.0, -1.0, 0.0] and net[1].bias.tolist() == [0.0, 0.25, 0.0]
    assert (groups[0].norms() == 0).tolist() == [True, False, True]
    assert not net[0].weight[0].any() and not net[3].weight[:, 2].any()


def test_network_slimming_needs_a_batch_norm() -> None:
    with pytest.raises(ModelError, match="group_lasso"):
        load_member("regularizers", "network_slimming").make(toy()[1], 9)


def test_the_rise_of_increg_and_spp_has_the_shape_of_the_paper() -> None:
    """1 at rank 0, u = ¼ at the inflection, 0 at the rank that is to go last, symmetric about the inflection."""
    missing = 12
    alpha = np.log(2 / 0.25) / missing
    inflection = -np.log(0.25) / alpha
    ranks = torch.tensor([0.0, inflection, missing, 2 * inflection, inflection - 1, inflection + 1])
    values = rise(ranks, missing)
    assert values[:4].tolist() == pytest.approx([1.0, 0.25, 0.0, 0.5 - 1.0], abs=1e-5)
    assert float(values[4] + values[5]) == pytest.approx(0.5, abs=1e-5)
    assert bool((rise(torch.arange(40.0), missing).diff() < 0).all())


def test_the_lowest_go_first_and_no_more_than_wanted() -> None:
    _, (group,) = toy()
    ranking = Ranking(group, 0.5)
    for _ in range(200):
        ranking.advance(0.05)
        assert int((ranking.going >= 1).sum()) <= 2 and bool((ranking.going >= 0).all())
    assert ranking.kept.tolist() == [0.0, 0.0, 1.0, 1.0] and ranking.going[3] == 0


@pytest.mark.parametrize("steps", [1, 7, 100, 3000])
def test_a_schedule_ends_with_what_was_wanted_after_its_share(steps: int) -> None:
    _, (group,) = toy()
    schedule = Schedule([group], steps, 0.5, 0.6)
    early = 0
    for step in range(steps):
        schedule.advance()
        if step + 1 < schedule.pruning:
            early = int((schedule.rankings[0].kept == 0).sum())
    assert schedule.rankings[0].kept.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert steps < 100 or early >= 1, "all of it was left to the end"


def test_greg_takes_those_that_were_least_at_the_start() -> None:
    net, groups = toy()
    member = load_member("regularizers", "greg").make(groups, 10, ratio=0.5, share=0.4, ceiling=2.0)
    for step in range(1, 5):
        net[0].weight.grad, net[1].weight.grad = torch.zeros(4, 3), torch.zeros(2, 4)
        member.after_backward()
        assert net[0].weight.grad[:, 0].tolist() == pytest.approx([0.5 * step, 1.0 * step, 0.0, 0.0])
        member.after_step(0.1)
    assert (groups[0].norms() == 0).tolist() == [True, True, False, False]


def test_spp_leaves_units_out_of_a_step_and_brings_them_back() -> None:
    torch.manual_seed(0)
    net, graph = copy.deepcopy(trained()[0]).train(), trained()[1]
    member = load_member("regularizers", "spp").make(unit_groups(net, graph), 1000, ratio=0.5)
    for ranking in member.schedule.rankings:
        ranking.going[:] = 0.4
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    x, y = next(iter(digits().train))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    member.before_forward()
    absent = {group.name: out.bool() for group, out in zip(member.groups, member.out, strict=True)}
    assert any(out.any() for out in absent.values()) and not all(out.all() for out in absent.values())
    for group in member.groups:
        assert ((group.norms() == 0) == absent[group.name]).all()
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(x), y).backward()
    member.after_backward()
    optimizer.step()
    member.after_step(0.1)
    after, changed = net.state_dict(), 0
    for group in member.groups:
        for part in (*group.parts, *group.buffers):
            old, new = before[part.name].movedim(part.axis, 0), after[part.name].movedim(part.axis, 0)
            for unit in range(group.units):
                same = torch.equal(old[part.index[unit]], new[part.index[unit]])
                assert same or not absent[group.name][unit], (part.name, unit)
                changed += not same
    assert changed > 0


def test_what_a_regularizer_cannot_do_without(tmp_path: Path) -> None:
    net, graph = trained()
    model = copy.deepcopy(net)
    with pytest.raises(UsageError, match="needs the model's graph"):
        recover_accuracy(model, digits(), epochs=1, regularizer="greg")
    with pytest.raises(UsageError, match="float32 only"):
        recover_accuracy(model, digits(), regularizer="greg", graph=graph, precision=Precision(dtype="int8"))
    with pytest.raises(UnknownMember, match="group_lasso"):
        recover_accuracy(model, digits(), regularizer="nonsense", graph=graph)
    with pytest.raises(RecordError, match="trace"):
        recover_accuracy(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits(), regularizer="greg", graph=graph)
    endless = Digits()
    endless.train = iter(endless.train)  # type: ignore[assignment]
    with pytest.raises(DataError, match="with a length"):
        recover_accuracy(model, endless, regularizer="greg", graph=graph)


def test_a_loss_that_becomes_nan_gives_the_last_epoch_back() -> None:
    net, graph = trained()
    model, broken = copy.deepcopy(net), Digits()
    broken.train.inputs[:] = float("nan")
    result = recover_accuracy(model, broken, epochs=1, autocast=False, regularizer="spp", graph=graph)
    assert "diverged" in result.note
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in model.state_dict().items())
