"""One battery for every criterion, on groups of real nets; then each against a value computed another way."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from small_nets import NETS, Chain
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.core.errors import DataError, ModelError, UnknownMember, UsageError
from edgeprune.core.family import configure, list_members, load_member
from edgeprune.core.records import Graph, Group, Member
from edgeprune.criteria import GroupView, LayerView, _readers
from edgeprune.graphs.slice import mask_model
from edgeprune.score import group_views, score_groups
from edgeprune.statistics import Batch, _layers, curvature
from edgeprune.trace import trace_graph

torch.set_num_threads(1)
MEMBERS = list_members("criteria")
SUMMED = [name for name in MEMBERS if load_member("criteria", name).NEEDS in ("gram", "kfac")]
"""Criteria that read second moments."""
BLIND = {"random"}
"""Criteria that do not look at the units."""
INPUTS = (torch.zeros(2, 3, 8, 8),)


class Coupled(nn.Module):
    """Residual sum, concat, depthwise and grouped convolution, batch norms everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)
        self.outer, self.outer_norm = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depth, self.depth_norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.side, self.side_norm = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.head = nn.Linear(16 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = x + self.outer_norm(self.outer(torch.relu(self.inner_norm(self.inner(x)))))
        deep = torch.relu(self.depth_norm(self.depth(x)))
        side = torch.relu(self.side_norm(self.side(deep)))
        return self.head(functional.adaptive_avg_pool2d(torch.cat([deep, side], 1), 2).flatten(1))


@cache
def coupled() -> tuple[nn.Module, Graph]:
    torch.manual_seed(0)
    net = Coupled().eval()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.3)
            nn.init.normal_(layer.running_mean, std=0.1)
    (x,), y = examples()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(30):  # near a minimum the loss curves upwards, as a criterion may assume
        optimizer.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return net, trace_graph(net, INPUTS)


def examples(count: int = 24, classes: int = 5, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    return (x,), torch.randint(0, classes, (count,), generator=generator)


def views_of(name: str, net: nn.Module, graph: Graph, batch: Batch | None = None) -> dict[str, list[GroupView]]:
    """Per prunable group the first views that a criterion is given."""
    need = load_member("criteria", name).NEEDS
    fill: Any = lambda _: {}  # noqa: E731 the same shape as what a statistic gives
    if need is not None:
        fill = next(load_member("statistics", need).collect(copy.deepcopy(net), graph, [batch or examples()]))
    tensors = dict(net.named_parameters())
    return {group.name: group_views(group, graph, tensors, fill) for group in graph.prunable}


@cache
def coupled_views(name: str) -> dict[str, list[GroupView]]:
    return views_of(name, *coupled())


def permuted(view: GroupView, order: Tensor) -> GroupView:
    rows = {
        field: value[order]
        for field in ("weight", "gradient", "curvature", "activation", "activation_gradient")
        if (value := getattr(view, field)) is not None
    }
    layer = None if view.layer is None else replace(view.layer, positions=view.layer.positions[order])
    return replace(view, **rows, layer=layer)


@pytest.mark.parametrize("name", MEMBERS)
class TestEveryCriterion:
    def test_gives_one_finite_score_per_unit_and_changes_nothing(self, name: str) -> None:
        score = load_member("criteria", name).score
        before = copy.deepcopy(coupled()[0].state_dict())
        for group, views in coupled_views(name).items():
            scores = score(views)
            assert scores.shape == (len(views[0].weight),), group
            assert bool(torch.isfinite(scores).all()) and bool((scores >= 0).all()), group
            assert len(scores.unique()) > 1, group
            assert torch.equal(score(views), scores), "not the same the second time"
        assert all(torch.equal(value, before[key]) for key, value in coupled()[0].state_dict().items())

    def test_says_what_it_needs(self, name: str) -> None:
        member = load_member("criteria", name)
        views = next(iter(coupled_views(name).values()))
        bare = [
            GroupView(parameter=v.parameter, axis=v.axis, role=v.role, extents=v.extents, weight=v.weight, op=v.op)
            for v in views
        ]
        if member.NEEDS is None:
            member.score(bare)
        else:
            assert member.NEEDS in list_members("statistics")
            with pytest.raises(DataError, match=r"calibration data"):
                member.score(bare)

    def test_a_dead_unit_matters_least(self, name: str) -> None:
        if name in BLIND:
            pytest.skip("does not look at the units")
        net, graph = coupled()
        for group in graph.prunable:
            dead = mask_model(net, graph, {group.name: np.setdiff1d(np.arange(group.units), [2])})
            for batch_norm in (m for m in dead.modules() if isinstance(m, nn.BatchNorm2d)):
                batch_norm.running_var.clamp_(min=0.1)  # masked too; 1/sqrt(eps) would blow up rounding
            scores = load_member("criteria", name).score(views_of(name, dead, graph)[group.name])
            assert bool((scores[2] <= scores).all()) and scores[2] < scores.max(), group.name

    def test_follows_the_order_of_the_units(self, name: str) -> None:
        if name in BLIND:
            pytest.skip("does not look at the units")
        score = load_member("criteria", name).score
        for views in coupled_views(name).values():
            order = torch.randperm(len(views[0].weight), generator=torch.Generator().manual_seed(1))
            shuffled = score([permuted(view, order) for view in views])
            assert torch.allclose(shuffled, score(views)[order], rtol=1e-4)

    def test_rejects_options_it_does_not_have(self, name: str) -> None:
        with pytest.raises(UsageError, match="not an option"):
            configure(load_member("criteria", name).score, "no_such_option=1")

    def test_scores_a_model_twice_alike_and_leaves_it_alone(self, name: str) -> None:
        net, graph = coupled()
        (x,), y = examples(20)
        flags = [parameter.requires_grad for parameter in net.parameters()]
        first, second = (
            score_groups(net, INPUTS, graph, [(x[:12], y[:12]), (x[12:], y[12:])], criterion=name, curves=False)
            for _ in range(2)
        )
        for group in graph.prunable:
            assert np.array_equal(first.scores[group.name], second.scores[group.name])
        assert all(parameter.grad is None for parameter in net.parameters())
        assert [parameter.requires_grad for parameter in net.parameters()] == flags
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in net.modules())

    def test_says_when_labels_are_missing_and_goes_on_where_it_needs_none(self, name: str) -> None:
        net, graph = coupled()
        calibration = [(examples(8)[0][0], None)]
        need = load_member("criteria", name).NEEDS
        if need is not None and load_member("statistics", need).LABELS:
            with pytest.raises(DataError, match="needs a whole-number label"):
                score_groups(net, INPUTS, graph, calibration, criterion=name, curves=False)
            return
        scores = score_groups(net, INPUTS, graph, calibration, criterion=name, curves=False).scores
        assert all(np.isfinite(scores[group.name]).all() for group in graph.prunable)
        with pytest.raises(DataError, match="no loss curves"):
            score_groups(net, INPUTS, graph, calibration, criterion=name)

    def test_one_example_of_one_class_is_enough_for_finite_scores(self, name: str) -> None:
        net, graph = coupled()
        calibration = [(torch.ones(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64))]
        scores = score_groups(net, INPUTS, graph, calibration, criterion=name, curves=False).scores
        assert all(np.isfinite(scores[group.name]).all() for group in graph.prunable)

    def test_a_model_that_gives_nan_is_an_error_and_no_score(self, name: str) -> None:
        net, graph = coupled()
        broken = copy.deepcopy(net)
        with torch.no_grad():
            broken.get_submodule("stem").weight.fill_(float("nan"))
        if name in ("random", "bn_scale"):
            pytest.skip("reads neither the broken weights nor outputs")
        with pytest.raises(DataError, match=r"finite|nan"):
            score_groups(broken, INPUTS, graph, [examples(8)], criterion=name, curves=False)


def test_an_unknown_criterion_lists_the_known() -> None:
    with pytest.raises(UnknownMember, match=r"magnitude.*taylor"):
        load_member("criteria", "nonsense")


# --- one by one ----------------------------------------------------------------------------------


def view(weight: Any, **more: Any) -> GroupView:
    given: dict[str, Any] = {"parameter": "a.weight", "axis": 0, "role": "out", "extents": (), "op": "conv2d", **more}
    return GroupView(weight=torch.as_tensor(weight), **given)


def score_of(name: str) -> Callable[..., Tensor]:
    return load_member("criteria", name).score  # type: ignore[no-any-return]


def test_magnitude_is_the_norm() -> None:
    given, score = [view([[3.0, -4.0], [1.0, 0.0]])], score_of("magnitude")
    assert score(given, p=1.0, normalise=False).tolist() == [7.0, 1.0]
    assert score(given, p=2.0, normalise=False).tolist() == [5.0, 1.0]
    assert torch.allclose(score(given, p=2.0), torch.tensor([5 / 3, 1 / 3]))
    assert configure(score, "p=1,normalise=false")(given).tolist() == [7.0, 1.0]


@pytest.mark.parametrize(("name", "p"), [("magnitude", 0.0), ("fpgm", 0.5), ("activation", -1.0)])
def test_what_is_no_norm_is_refused(name: str, p: float) -> None:
    with pytest.raises(UsageError, match="not a norm"):
        score_of(name)(coupled_views(name)["stem"], p=p)


def test_taylor_is_exact_where_the_loss_is_linear() -> None:
    weight, factor = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    (weight * factor).sum().backward()
    given = [view(weight.detach(), gradient=weight.grad)]
    change = (weight.detach() * factor).sum(dim=1)
    assert torch.allclose(score_of("taylor")(given), change.square())
    assert torch.allclose(score_of("taylor")(given, absolute=True), change.abs())


def test_random_depends_on_the_seed_and_the_group_alone() -> None:
    score, many = score_of("random"), torch.zeros(2000, 1)
    drawn = score([view(many)])
    assert torch.equal(drawn, score([view(many + 1)]))
    assert not torch.equal(drawn, score([view(many)], seed=1))
    assert not torch.equal(drawn, score([view(many, parameter="b.weight")]))
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.05) and float(drawn.var()) == pytest.approx(1 / 12, rel=0.1)


def test_bn_scale_sums_the_norms_of_a_residual_sum() -> None:
    net, graph = coupled()
    scores = score_groups(net, INPUTS, graph, None, criterion="bn_scale", curves=False).scores
    assert np.allclose(scores["inner"], net.get_submodule("inner_norm").weight.detach().abs())
    stem = next(group for group in graph.prunable if group.name == "stem")
    expected = np.zeros(stem.units)
    for name in ("stem_norm", "outer_norm", "depth_norm"):
        index = next(m.index for m in stem.members if m.parameter == f"{name}.weight")
        expected += net.get_submodule(name).weight.detach().abs().numpy()[index].sum(axis=1)
    assert np.allclose(scores["stem"], expected)


def test_bn_scale_says_which_group_has_no_batch_norm() -> None:
    net = Chain(6, nn.Identity(), 6).eval()
    with pytest.raises(ModelError, match=r"'stem\.weight': no batch norm"):
        score_groups(net, INPUTS, trace_graph(net, INPUTS), None, criterion="bn_scale", curves=False)


def test_fpgm_is_the_distance_to_all_others() -> None:
    line = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    score = score_of("fpgm")
    assert torch.allclose(score([view(line)]), torch.tensor([4.0, 3.0, 5.0]) / 4)
    reader = view(torch.randn(3, 7), role="in")
    assert torch.equal(score([view(line), reader]), score([view(line)])), "only filters are compared"
    assert torch.allclose(score([view(10 * line), view(line)]), 2 * score([view(line)])), "layers count alike"
    corner = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 0.0]])
    assert torch.allclose(score([view(corner)], p=1.0), torch.tensor([10.0, 11.0, 7.0]) / (28 / 3))


def test_lamp_is_the_share_among_those_as_large() -> None:
    squares = torch.tensor([3.0, 1.0, 2.0])
    assert torch.allclose(score_of("lamp")([view(squares.sqrt()[:, None])]), torch.tensor([1.0, 1 / 6, 2 / 5]))
    equal = score_of("lamp")([view(torch.tensor([[1.0], [1.0], [2.0]]))])
    assert torch.allclose(equal, torch.tensor([1 / 6, 1 / 6, 1.0]))


def test_fisher_is_the_square_of_each_examples_slope_by_a_gate() -> None:
    """One gate per unit in front of all that reads the group: two branches, one of them grouped, and a flatten."""
    net, graph = coupled()
    (x,), y = examples(7)
    stem = next(group for group in graph.prunable if group.name == "stem")
    gates = torch.ones(stem.units, requires_grad=True)

    def gated(layer: str, channel_of: Tensor) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
            return arguments[0] * gates[channel_of][:, None, None]

        return net.get_submodule(layer).register_forward_pre_hook(hook)

    unit_of = torch.empty(8, dtype=torch.int64)
    for unit, channels in enumerate(next(m.index for m in stem.members if m.parameter == "stem.weight")):
        unit_of[channels] = unit
    # The head reads 8 channels of this group and 8 of another, 4 places each.
    places = unit_of.repeat_interleave(4)

    def gate_head(_: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
        return arguments[0] * torch.cat([gates[places], torch.ones(32)])

    hooks = [gated("inner", unit_of), gated("side", unit_of)]
    hooks.append(net.get_submodule("head").register_forward_pre_hook(gate_head))
    try:
        slopes = [
            torch.autograd.grad(functional.cross_entropy(net(x[n : n + 1]), y[n : n + 1]), gates)[0] for n in range(7)
        ]
    finally:
        for hook in hooks:
            hook.remove()
    expected = 0.5 * torch.stack(slopes).square().mean(dim=0)
    scores = score_groups(net, INPUTS, graph, [(x, y)], criterion="fisher", curves=False).scores["stem"]
    assert np.allclose(scores, expected, rtol=1e-4)


def test_activation_is_the_norm_and_the_share_of_what_is_not_zero() -> None:
    active = torch.tensor([[[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], [[1.0, 1.0, 1.0, -1.0], [2.0, 2.0, 2.0, 2.0]]])
    given, score = [view(torch.ones(2, 1), role="in", activation=active)], score_of("activation")
    assert torch.allclose(score(given), torch.tensor([1.25, 1.5]))
    assert torch.allclose(score(given, p=1.0), torch.tensor([0.875, 1.5]))
    assert torch.allclose(score(given, apoz=True), torch.tensor([0.25, 1.0]))


def test_activation_reads_behind_norm_and_relu() -> None:
    net, graph = coupled()
    (x,), y = examples(64)  # two full batches
    with torch.no_grad():
        stem = torch.relu(net.get_submodule("stem_norm")(net.get_submodule("stem")(x)))
        read = torch.relu(net.get_submodule("inner_norm")(net.get_submodule("inner")(stem)))
    norms, shares = read.square().mean((2, 3)).sqrt().mean(0), (read > 0).float().mean((0, 2, 3))
    for options, expected in (("", norms), ("apoz=true", shares)):
        scores = score_groups(net, INPUTS, graph, [(x, y)], criterion="activation", options=options, curves=False)
        assert np.allclose(scores.scores["inner"], expected, rtol=1e-5)


class TwoLinear(nn.Module):
    """Without anything in between, so that the loss' Hessian in one layer's weights is exactly its Fisher."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@cache
def two_linear() -> tuple[nn.Module, Graph, tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    net = TwoLinear().eval()
    return net, trace_graph(net, (torch.zeros(2, 3),)), (torch.randn(4, 3), torch.tensor([0, 2, 1, 2]))


def exact_hessian(net: nn.Module, name: str, x: Tensor, y: Tensor) -> Tensor:
    """Of the mean loss in one parameter, (entries, entries), by differentiating twice."""
    others = {key: value.detach() for key, value in net.named_parameters()}

    def loss(weight: Tensor) -> Tensor:
        return functional.cross_entropy(torch.func.functional_call(net, {**others, name: weight}, (x,)), y)

    return torch.func.hessian(loss)(others[name]).reshape(others[name].numel(), -1)


def exact_diagonal(net: nn.Module, name: str, x: Tensor, y: Tensor) -> Tensor:
    return exact_hessian(net, name, x, y).diagonal().reshape(net.get_parameter(name).shape)


def exact_obd() -> Tensor:
    net, _, (x, y) = two_linear()
    w = dict(net.named_parameters())
    rises = {name: 0.5 * exact_diagonal(net, name, x, y) * w[name].detach().square() for name in w}
    return rises["first.weight"].sum(1) + rises["first.bias"] + rises["second.weight"].sum(0)


def test_c_obd_is_the_explicit_hessians_diagonal_of_a_linear_net() -> None:
    net, graph, (x, _) = two_linear()
    collect = load_member("statistics", "example_gradient").collect
    model, tensors, total = copy.deepcopy(net), dict(net.named_parameters()), torch.zeros(4)
    repeats = 200
    for fill in collect(model, graph, [((x[n % 4, None],), None) for n in range(4 * repeats)], most=4 * repeats):
        total += score_of("c_obd")(group_views(graph.prunable[0], graph, tensors, fill)).detach() / (4 * repeats)
    assert torch.allclose(total, exact_obd(), rtol=0.2)


def only(member: Member) -> Graph:
    """A graph of one group with one member."""
    group = Group(name="g", units=len(member.index), members=(member,))
    return Graph(model_sha256="", inputs=(), outputs=(), nodes=(), parameters=(), groups=(group,))


def test_hessian_is_half_the_explicit_diagonal_times_the_squares() -> None:
    net, graph, (x, y) = two_linear()
    tensors = dict(net.named_parameters())
    views = [
        replace(v, curvature=v.weight**2 * exact_diagonal(net, v.parameter, x, y).movedim(v.axis, 0).reshape(4, -1))
        for v in group_views(graph.prunable[0], graph, tensors, lambda _: {})
    ]
    assert torch.allclose(score_of("hessian")(views), exact_obd())


def test_curvature_is_the_explicit_diagonal_up_to_the_noise_of_the_probes() -> None:
    net, graph, (x, y) = two_linear()
    batches: list[Batch] = [((x[:3],), y[:3]), ((x[3:],), y[3:])]
    probes = 300
    for member in graph.prunable[0].members:
        fill = next(curvature.collect(copy.deepcopy(net), only(member), batches, probes=probes))
        weight = net.get_parameter(member.parameter).detach()
        exact = exact_hessian(net, member.parameter, x, y) * weight.flatten() * weight.flatten()[:, None]
        diagonal = exact.diagonal().reshape(weight.shape).movedim(member.axis, 0).reshape(4, -1)
        # An estimate's variance is the sum of squares of the rest of its row, per probe.
        noise = (exact - exact.diagonal().diag()).norm(dim=1).max() / math.sqrt(probes)
        assert torch.allclose(fill(member)["curvature"], diagonal, rtol=0, atol=6 * float(noise)), member.parameter
        assert 6 * float(noise) < float(diagonal.abs().max()), "the test would see nothing"


def test_curvature_is_exact_where_the_hessian_is_diagonal() -> None:
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 2, bias=False)).eval()
    member = Member(parameter="0.weight", axis=0, index=np.array([[0]]))
    x, y = torch.tensor([[0.7], [-1.2]]), torch.tensor([0, 1])
    fill = next(curvature.collect(net, only(member), [((x[:1],), y[:1]), ((x[1:],), y[1:])], probes=1))
    expected = exact_diagonal(net, "0.weight", x, y) * net.get_parameter("0.weight") ** 2
    assert torch.allclose(fill(member)["curvature"], expected)


def test_hessian_counts_a_falling_loss_as_nothing() -> None:
    given = [view([[9.0, 9.0], [9.0, 9.0]], curvature=torch.tensor([[1.0, -2.0], [3.0, -1.0]]))]
    assert score_of("hessian")(given).tolist() == [0.0, 1.0]


def random_moments(size: int, seed: int) -> Tensor:
    x = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / len(x)


@pytest.mark.parametrize("role", ["out", "in"])
def test_kronecker_criteria_against_the_explicit_product(role: str) -> None:
    """Units of two rows, or two columns, of a weight (4, 6): F is 24 x 24."""
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, s = random_moments(6, 1), random_moments(4, 2)
    positions = torch.tensor([[0, 3], [1, 2]]) if role == "out" else torch.tensor([[0, 5], [2, 1], [3, 4]])
    layer = LayerView(weight=weight[None], inputs=a[None], outputs=s[None], positions=positions)
    given = [view(torch.zeros(len(positions), 1), role=role, layer=layer)]
    fisher = torch.kron(s, a)
    inverse = fisher.inverse()
    for unit, where in enumerate(positions):
        grid = torch.arange(24).reshape(4, 6)
        flat = (grid[where] if role == "out" else grid[:, where]).flatten()
        theta = weight.flatten()[flat]
        obd = 0.5 * theta @ fisher[flat][:, flat] @ theta
        obs = 0.5 * theta @ inverse[flat][:, flat].inverse() @ theta
        single = 0.5 * (theta.square() / inverse.diagonal()[flat]).sum()
        assert score_of("kron_obd")(given)[unit] == pytest.approx(float(obd))
        assert score_of("kron_obs")(given, damping=1e-13)[unit] == pytest.approx(float(obs))
        assert score_of("c_obs")(given, damping=1e-13)[unit] == pytest.approx(float(single))
        assert obs <= obd


def test_kronecker_criteria_keep_the_groups_of_a_convolution_apart() -> None:
    """Depthwise: channel i has its own 1 x 1 outputs and d x d inputs, so F is block-diagonal."""
    weight = torch.randn(3, 1, 4, dtype=torch.float64)
    a = torch.stack([random_moments(4, seed) for seed in range(3)])
    s = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).reshape(3, 1, 1)
    layer = LayerView(weight=weight, inputs=a, outputs=s, positions=torch.arange(3)[:, None])
    given = [view(torch.zeros(3, 1), layer=layer)]
    expected = torch.stack([0.5 * s[i, 0, 0] * weight[i, 0] @ a[i] @ weight[i, 0] for i in range(3)])
    assert torch.allclose(score_of("kron_obd")(given), expected)
    assert torch.allclose(score_of("kron_obs")(given, damping=1e-13), expected), "nothing else can make up for it"


def test_kronecker_factors_are_the_moments_of_inputs_and_drawn_gradients() -> None:
    net, graph, (x, _) = two_linear()
    batches: list[Batch] = [((x.repeat(4, 1),), None)] * 250
    fill = next(load_member("statistics", "kfac").collect(copy.deepcopy(net), graph, batches))
    second = next(m for m in graph.prunable[0].members if m.parameter == "second.weight")
    layer = fill(second)["layer"]
    with torch.no_grad():
        hidden = net.get_submodule("first")(x).double()
        p = net(x).double().softmax(1)
    ones = torch.cat([hidden, torch.ones(4, 1, dtype=torch.float64)], 1)
    assert torch.allclose(layer.inputs[0], ones.T @ ones / 4, rtol=1e-4, atol=1e-6)
    exact = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    assert torch.allclose(layer.outputs[0], exact, atol=0.02)
    assert torch.equal(layer.weight[0, :, :4].float(), net.get_submodule("second").weight)


def test_kronecker_factors_of_a_convolution_sum_over_places() -> None:
    net, graph = coupled()
    batch = examples(3)
    fill = next(load_member("statistics", "kfac").collect(copy.deepcopy(net), graph, [batch]))
    stem = next(group for group in graph.prunable if group.name == "stem")
    layer = fill(next(m for m in stem.members if m.parameter == "stem.weight"))["layer"]
    patches = functional.unfold(batch[0][0].double(), 3, padding=1)
    assert torch.allclose(layer.inputs[0], torch.einsum("nat,nbt->ab", patches, patches) / 3, rtol=1e-5, atol=1e-5)
    depth = fill(next(m for m in stem.members if m.parameter == "depth.weight"))["layer"]
    assert depth.weight.shape == (8, 1, 10) and depth.inputs.shape == (8, 10, 10) and depth.outputs.shape == (8, 1, 1)


def refit_error(weight: Tensor, moments: Tensor, gone: list[int]) -> float:
    """Least tr((V - W) H (V - W)ᵀ) with V's columns `gone` zero, solved at once."""
    kept = [j for j in range(weight.shape[1]) if j not in gone]
    change = torch.linalg.solve(moments[kept][:, kept], moments[kept][:, gone] @ weight[:, gone].T).T
    new = torch.zeros_like(weight)
    new[:, kept] = weight[:, kept] + change
    return float(((new - weight) @ moments * (new - weight)).sum())


def test_reconstruction_goes_greedily_by_the_error_of_a_refit() -> None:
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    moments = random_moments(8, 4)
    positions = torch.tensor([[0, 1], [2, 3], [4, 5], [7, 6]])
    layer = LayerView(weight=weight[None], inputs=moments[None], outputs=None, positions=positions)
    scores = score_of("reconstruction")([view(torch.zeros(4, 1), role="in", layer=layer)], damping=1e-13)
    energy = float((weight @ moments * weight).sum())
    order = scores.argsort().tolist()
    gone: list[int] = []
    for removed in range(4):
        rest = {u: refit_error(weight, moments, gone + positions[u].tolist()) for u in order[removed:]}
        assert min(rest, key=lambda u: rest[u]) == order[removed]
        gone += positions[order[removed]].tolist()
        total = rest[order[removed]] / energy
        assert float(scores.sort().values[: removed + 1].sum()) >= total - 1e-9
        if removed == 0 or bool((scores.sort().values[: removed + 1].diff() > 1e-5).all()):
            assert float(scores.sort().values[: removed + 1].sum()) == pytest.approx(total, rel=1e-4)
    assert total == pytest.approx(1.0)
    pairs = {pair: refit_error(weight, moments, positions[list(pair)].flatten().tolist())
             for pair in combinations(range(4), 2)}  # fmt: skip
    assert pairs[tuple(sorted(order[:2]))] <= 1.5 * min(pairs.values())


def test_reconstruction_adds_up_the_groups_of_a_convolution() -> None:
    """A unit is one column in each of two groups, which have weights and inputs of their own."""
    weight = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = torch.stack([random_moments(4, seed) for seed in (1, 2)])
    layer = LayerView(weight=weight, inputs=moments, outputs=None, positions=torch.arange(4)[:, None])
    scores = score_of("reconstruction")([view(torch.zeros(4, 1), role="in", layer=layer)], damping=1e-13)
    energy = float((weight @ moments * weight).sum())
    alone = [sum(refit_error(weight[g], moments[g], [unit]) for g in (0, 1)) / energy for unit in range(4)]
    assert int(scores.argmin()) == int(np.argmin(alone)) and float(scores.min()) == pytest.approx(min(alone))


def test_reconstruction_spares_nothing_that_another_unit_repeats() -> None:
    """Of two equal inputs one is free; once it is gone the other is not."""
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat([x, x[:, :1]], 1)
    layer = LayerView(weight=torch.ones(1, 2, 4, dtype=torch.float64), inputs=(x.T @ x)[None], outputs=None,
                      positions=torch.arange(4)[:, None])  # fmt: skip
    scores = score_of("reconstruction")([view(torch.zeros(4, 1), role="in", layer=layer)], damping=1e-9)
    assert sorted([int(scores.argsort()[0]), int(scores[[0, 3]].argmax()) * 3]) == [0, 3]
    assert scores.min() < 1e-6 and scores[[0, 3]].max() > 0.1


def test_surgeon_weighs_what_a_refit_leaves_by_the_outputs_factor() -> None:
    """Greedily, and its sums are the loss of removing units together: half of tr(F_o D F_i Dᵀ) of the best refit."""
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    moments, outputs = random_moments(8, 4), random_moments(5, 6)
    positions = torch.tensor([[0, 1], [2, 3], [4, 5], [7, 6]])
    layer = LayerView(weight=weight[None], inputs=moments[None], outputs=outputs[None], positions=positions)

    def lost(gone: list[int], factor: Tensor) -> float:
        kept = [j for j in range(8) if j not in gone]
        change = -weight.clone()
        change[:, kept] = torch.linalg.solve(moments[kept][:, kept], moments[kept][:, gone] @ weight[:, gone].T).T
        return 0.5 * float((factor * (change @ moments @ change.T)).sum())

    for even in (0.0, 0.3, 1.0):
        factor = (1 - even) * outputs + even * outputs.diagonal().mean() * torch.eye(5, dtype=torch.float64)
        given = [view(torch.zeros(4, 1), role="in", layer=layer)]
        scores = score_of("surgeon")(given, damping=1e-13, even=even)
        order = scores.argsort().tolist()
        gone: list[int] = []
        for removed in range(4):
            rest = {u: lost(gone + positions[u].tolist(), factor) for u in order[removed:]}
            assert min(rest, key=lambda u: rest[u]) == order[removed]
            gone += positions[order[removed]].tolist()
            if bool((scores.sort().values[: removed + 1].diff() > 1e-5).all()):
                total = float(scores.sort().values[: removed + 1].sum())
                assert total == pytest.approx(rest[order[removed]], rel=1e-4)


@pytest.mark.parametrize("name", ["reconstruction", "surgeon"])
def test_removals_that_are_carried_out_together_score_as_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grouped convolution with a bias, whose column is no unit's, and another reader."""
    weight = torch.randn(2, 3, 13, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grouped = LayerView(
        weight=weight, inputs=torch.stack([random_moments(13, seed) for seed in (1, 2)]),
        outputs=torch.stack([random_moments(3, seed) for seed in (3, 4)]),
        positions=torch.arange(12).flip(0).reshape(6, 2),
    )  # fmt: skip
    plain = LayerView(
        weight=weight[:1, :, :6], inputs=random_moments(6, 5)[None], outputs=random_moments(3, 6)[None],
        positions=torch.arange(6)[:, None],
    )  # fmt: skip
    given = [view(torch.zeros(6, 1), role="in", layer=layer) for layer in (grouped, plain)]
    found = []
    for columns in (1, 3, 1000):
        monkeypatch.setattr(_readers, "HELD_BACK", columns)
        found.append(score_of(name)(given))
    assert len(found[0].unique()) == 6
    assert torch.allclose(found[0], found[1], rtol=1e-9) and torch.allclose(found[0], found[2], rtol=1e-9)


def test_surgeon_reads_the_layers_behind_a_group_alone() -> None:
    """What a unit's own layer computes is gone with it."""
    layer = LayerView(
        weight=torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        inputs=random_moments(4, 1)[None], outputs=random_moments(3, 2)[None], positions=torch.arange(4)[:, None],
    )  # fmt: skip
    reader = view(torch.zeros(4, 1), role="in", layer=layer)
    own = view(torch.zeros(4, 1), role="out", layer=replace(layer, weight=10 * layer.weight))
    assert torch.equal(score_of("surgeon")([own, reader]), score_of("surgeon")([reader]))
    with pytest.raises(DataError, match="use another criterion"):
        score_of("surgeon")([own])


@pytest.mark.parametrize(("name", "dampings"), [("reconstruction", 1), ("surgeon", 1), ("kron_obs", 1), ("c_obs", 2)])
def test_fewer_examples_than_channels_need_the_damping(name: str, dampings: int) -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low = (x.T @ x)[None]
    layer = LayerView(weight=torch.randn(1, 8, 8, dtype=torch.float64), inputs=low, outputs=low.clone(),
                      positions=torch.arange(8)[:, None])  # fmt: skip
    given = [view(torch.zeros(8, 1), role="in", layer=layer)]
    assert bool(torch.isfinite(score_of(name)(given)).all())
    with pytest.raises(UsageError, match="larger one"):
        score_of(name)(given, damping=0.0)


@pytest.mark.parametrize("net", ["squeeze_excite", "heads", "grouped", "channel_shuffle", "pixel_shuffle"])
def test_groups_of_every_shape_are_scored(net: str) -> None:
    """Gates, attention heads, grouped readers, units of several channels, maps that are flattened."""
    torch.manual_seed(0)
    model = NETS[net]().eval()
    graph = trace_graph(model, INPUTS)
    for name in set(MEMBERS) - {"bn_scale"}:
        scores = score_groups(model, INPUTS, graph, [examples(16)], criterion=name, curves=False).scores
        assert scores.keys() == {group.name for group in graph.prunable}
        assert all(math.isfinite(value) and value >= 0 for each in scores.values() for value in each), name


def test_a_group_that_no_watched_layer_reads_is_named() -> None:
    """Transposed convolutions are no matrix products of unfolded inputs."""
    torch.manual_seed(0)
    model = NETS["transposed"]().eval()
    graph = trace_graph(model, INPUTS)
    with pytest.raises(DataError, match=r"'stem\.weight'.*use another criterion"):
        score_groups(model, INPUTS, graph, [examples(4)], criterion="reconstruction", curves=False)
    score_groups(model, INPUTS, graph, [examples(4)], criterion="fisher", curves=False)


def test_with_curves_a_group_that_no_watched_layer_reads_is_ordered_by_magnitude() -> None:
    torch.manual_seed(0)
    model = NETS["transposed"]().eval()
    graph = trace_graph(model, INPUTS)
    found = score_groups(model, INPUTS, graph, [examples(4)], criterion="surgeon")
    assert found.by_magnitude and set(found.by_magnitude) < set(found.scores)
    magnitudes = score_groups(model, INPUTS, graph, None, criterion="magnitude", curves=False)
    for name in found.scores:
        assert np.array_equal(found.scores[name], magnitudes.scores[name]) == (name in found.by_magnitude)
    assert found.curves.keys() == found.scores.keys()
    assert not score_groups(model, INPUTS, graph, [examples(4)], criterion="fisher").by_magnitude


@pytest.mark.parametrize("name", SUMMED)
def test_groups_scored_in_several_passes_score_as_in_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, graph = coupled()
    statistic = load_member("statistics", load_member("criteria", name).NEEDS)
    batches = [examples(20)]
    whole = score_groups(net, INPUTS, graph, batches, criterion=name, curves=False)
    assert statistic.split(net, graph) == [replace(graph, groups=graph.prunable)]
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(_layers, "MOMENT_BYTES", 1)
    parts = statistic.split(net, graph)
    assert [part.groups for part in parts] == [(group,) for group in graph.prunable] and len(parts) > 2
    apart = score_groups(
        net, INPUTS, graph, batches, criterion=name, curves=False,
        progress=lambda _, done, total: seen.append((done, total)),
    )  # fmt: skip
    assert list(apart.scores) == list(whole.scores)
    assert all(np.array_equal(apart.scores[group], whole.scores[group]) for group in whole.scores)
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] == len(parts) * math.ceil(20 / statistic.BATCH)


@pytest.mark.parametrize(
    ("name", "numbers", "parts"),
    [("kfac", 167, 1), ("kfac", 166, 2), ("kfac", 127, 2), ("kfac", 126, 3), ("gram", 77, 1), ("gram", 41, 2)],
)
def test_passes_are_as_few_as_the_memory_allows(
    name: str, numbers: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four linear layers 3-4-5-6-2: 9 + 16, 16 + 25, 25 + 36 and 36 + 4 numbers; gram has the 16, 25 and 36 alone."""
    net = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise((3, 4, 5, 6, 2))))
    graph = trace_graph(net, (torch.zeros(2, 3),))
    monkeypatch.setattr(_layers, "MOMENT_BYTES", 8 * numbers)
    found = load_member("statistics", name).split(net, graph)
    assert len(found) == parts and sum((part.groups for part in found), ()) == graph.prunable


@pytest.mark.parametrize("name", list_members("statistics"))
def test_every_statistic_is_read_by_a_criterion_and_fills_views(name: str) -> None:
    net, graph = coupled()
    member = load_member("statistics", name)
    assert name in {load_member("criteria", criterion).NEEDS for criterion in MEMBERS}
    (x,), y = examples(4)
    batches: list[Batch] = [((x[:2],), y[:2] if member.LABELS else None), ((x[2:],), y[2:] if member.LABELS else None)]
    fills = list(member.collect(copy.deepcopy(net), graph, batches))
    maps = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    again = member.collect(maps, trace_graph(maps, INPUTS), batches)
    with pytest.raises(DataError, match="need a classifier") if member.CLASSIFIER else nullcontext():
        assert next(again)
    assert len(fills) in (1, len(batches)) and member.BATCH >= 1
    trained = dict(net.named_parameters())
    members = [each for group in graph.prunable for each in group.members if each.parameter in trained]
    fields = {field for each in members for field in fills[-1](each)}
    assert fields and fields <= set(GroupView.__dataclass_fields__)
