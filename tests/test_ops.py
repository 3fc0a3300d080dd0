"""Every operator family: sliced = masked for random kept units, and the rules' own promises."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from exactness import LIMIT, random_keep, randomise, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from small_nets import NETS, Chain, Standardised
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.core.family import list_members
from edgeprune.core.records import Graph
from edgeprune.core.units import Units
from edgeprune.graphs.slice import mask_model, slice_model
from edgeprune.ops import Call, NoRule, Value, load_rules
from edgeprune.ops.reshape import factorise
from edgeprune.trace import trace_graph

torch.set_num_threads(1)
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@cache
def _traced(name: str) -> tuple[nn.Module, Graph]:
    torch.manual_seed(0)
    module = randomise(NETS[name]())
    return module, trace_graph(module, (IMAGES[:1],))


@pytest.mark.parametrize("name", NETS)
def test_half_of_every_group(name: str) -> None:
    module, graph = _traced(name)
    assert graph.prunable, "the net shows nothing"
    assert not graph.unsupported
    keep = {group.name: np.arange(group.units)[1::2] for group in graph.prunable if group.units > 1}
    with torch.no_grad():
        ours = slice_model(module, (IMAGES[:1],), graph, keep).eval()(IMAGES)
        assert relative_error(ours, mask_model(module, graph, keep)(IMAGES)) < LIMIT
        for group, kept in keep.items():
            alone = mask_model(module, graph, {group: kept})(IMAGES)
            assert relative_error(module(IMAGES), alone) > LIMIT, f"removing {group} changed nothing"


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(sorted(NETS)), st.integers(0, 2**32 - 1))
def test_any_units_of_all_groups(name: str, seed: int) -> None:
    module, graph = _traced(name)
    keep = random_keep(graph, np.random.default_rng(seed), least=0.0)
    with torch.no_grad():
        ours = slice_model(module, (IMAGES[:1],), graph, keep).eval()(IMAGES)
        assert relative_error(ours, mask_model(module, graph, keep)(IMAGES)) < LIMIT


@pytest.mark.parametrize("name", NETS)
def test_one_unit_of_every_group_still_runs(name: str) -> None:
    module, graph = _traced(name)
    keep = {group.name: np.array([group.units - 1]) for group in graph.prunable}
    compact = slice_model(module, (IMAGES[:1],), graph, keep).eval()
    with torch.no_grad():
        assert relative_error(compact(IMAGES), mask_model(module, graph, keep)(IMAGES)) < LIMIT


def test_expected_units() -> None:
    units = {name: {g.name: g.units for g in _traced(name)[1].prunable} for name in NETS}
    assert units["depthwise"] == {"stem": 8, "middle.2": 6}
    assert units["grouped"] == {"stem": 4, "middle.0": 2, "middle.2": 2}
    assert units["pixel_shuffle"]["middle.0"] == 4
    assert units["group_norm"]["stem"] == 4
    assert units["fixed_shuffle"] == {"stem": 6}
    assert units["heads"]["middle.qkv"] == 4
    assert units["gated"]["middle.0"] == 6
    assert units["one_head"]["middle.qkv"] == units["written_one_head"]["middle.q"] == 12
    assert sorted(units["einsum_heads"].values()) == [3, 12, 12]  # heads, stem, projection
    assert units["response_norm"]["middle.0"] == 12
    assert units["lstm"]["middle.layer"] == units["gru"]["middle.layer"] == 7
    assert units["outlook"]["middle.0"] == 6
    assert units["written_in_place"] == {"stem": 8}
    assert units["standardised"] == {"stem": 8, "middle.0": 4, "middle.2": 2}
    assert units["chunks"] == {"stem": 8, "middle.inner": 12, "middle.outer": 6}


class Custom(nn.Module):
    """An operator over channels given as a function."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.cumsum(1), "cumsum"),
        (lambda x: x.softmax(1), "softmax"),
        (lambda x: x - (x + 1).mean(1, keepdim=True), "mean"),
        (lambda x: x.flip(1), "reordered"),
        (lambda x: x / (x - 1).norm(dim=1, keepdim=True), "norm"),
        (lambda x: x / x.norm(dim=1, p=0, keepdim=True), "norm"),
        (lambda x: x * x.sigmoid().sum(1, keepdim=True), "sum"),
        (lambda x: x * x.max(), "max"),
        (lambda x: functional.local_response_norm(x, 3), ""),
        (lambda x: x[:, [3, 1, 0, 2, 7, 6, 5, 4]], "indexed"),
        (lambda x: x.sort(1)[0], "no rule for operator 'sort'"),
        (lambda x: x[:, ::2].repeat(1, 2, 1, 1), "sliced with a step"),
        (lambda x: torch.einsum("bchw,bdhw->bchw", x + 1, x + 2), "is summed"),
        (lambda x: torch.einsum("...chw,...chw->...chw", x, x), "no rule for operator 'einsum'"),
        (lambda x: ((x.exp().flatten(2) @ x.exp().flatten(2).transpose(1, 2)) @ x.exp().flatten(2)).view_as(x), ""),
        (lambda x: functional.pad(x, (0, 0, 0, 0, 1, 1), mode="circular")[:, 1:-1], ""),
    ],
)
def test_channels_that_mix_are_frozen(function: object, reason: str) -> None:
    module = randomise(Chain(8, Custom(function), 8))
    graph = trace_graph(module, (IMAGES,))
    (stem,) = (group for group in graph.groups if group.name == "stem")
    assert stem.frozen_because is not None
    assert reason in stem.frozen_because


def test_unknown_operator_is_named_and_freezes_both_sides() -> None:
    module = randomise(Chain(8, nn.Sequential(Custom(lambda x: x.sort(2)[0]), nn.Conv2d(8, 8, 1)), 8))
    graph = trace_graph(module, (IMAGES,))
    assert graph.unsupported == (("sort", "sort"),)
    assert {g.name for g in graph.prunable} == {"middle.1"}
    keep = {"middle.1": np.arange(3)}
    with torch.no_grad():
        ours = slice_model(module, (IMAGES,), graph, keep).eval()(IMAGES)
        assert relative_error(ours, mask_model(module, graph, keep)(IMAGES)) < LIMIT


def test_layer_norm_is_inexact_and_freed_on_demand() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.inner = nn.LayerNorm(12), nn.Linear(12, 20)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    module = randomise(Chain(12, Last(), 20))
    frozen = {g.name: g for g in trace_graph(module, (IMAGES,)).groups}["stem"]
    assert "layer_norm" in (frozen.frozen_because or "")
    assert frozen.inexact_because is not None
    graph = trace_graph(module, (IMAGES,), allow_inexact=True)
    freed = {g.name: g for g in graph.groups}["stem"]
    assert freed.frozen_because is None
    assert freed.inexact_because == frozen.inexact_because
    compact = slice_model(module, (IMAGES,), graph, {"stem": np.arange(7)})
    assert compact.get_submodule("middle.norm").normalized_shape == (7,)
    assert compact.eval()(IMAGES).shape == (3, 5)


def test_a_standardised_weight_needs_zeros_where_its_inputs_went() -> None:
    middle = nn.Sequential(nn.Sigmoid(), Standardised(12, 8, 3), nn.SiLU(), Standardised(8, 6, 1))
    graph = trace_graph(randomise(Chain(12, middle, 6)), (IMAGES,))
    groups = {g.name: g for g in graph.groups}
    assert "is multiplied and summed" in (groups["stem"].frozen_because or "")
    assert set(groups) >= {"middle.1", "middle.3"} and groups["middle.1"].frozen_because is None
    roles = {(member.parameter, member.role) for member in groups["middle.1"].members}
    assert {("middle.1.weight", "out"), ("middle.3.weight", "in")} <= roles


@pytest.mark.parametrize("shift", [0, 1])
def test_statistics_over_channels_are_exact_where_removed_ones_are_zero(shift: int) -> None:
    def normalised(x: Tensor) -> Tensor:
        tokens = (x + shift).flatten(2).transpose(1, 2) if shift else x.flatten(2).transpose(1, 2)
        return functional.batch_norm(tokens, None, None, training=True).transpose(1, 2).view_as(x)

    module = randomise(Chain(8, Custom(normalised), 8))
    graph = trace_graph(module, (IMAGES,))
    (stem,) = (group for group in graph.groups if group.name == "stem")
    if shift:
        assert "normalised over" in (stem.inexact_because or "")
        return
    keep = {"stem": np.array([0, 2, 7])}
    with torch.no_grad():
        ours = slice_model(module, (IMAGES,), graph, keep).eval()(IMAGES)
        assert relative_error(ours, mask_model(module, graph, keep)(IMAGES)) < LIMIT


def test_every_rule_is_listed_once() -> None:
    rules = load_rules()
    assert {"conv2d", "linear", "add", "cat", "view", "pad", "mean", "max_pool2d", "upsample_nearest2d"} <= rules.keys()
    assert list_members("ops") == [
        "attention", "concat", "conv", "einsum", "elementwise", "linear", "norm", "pad", "pooling", "recurrent",
        "resample", "reshape", "unfold",
    ]  # fmt: skip


def _call(**options: object) -> Call:
    return Call(node="n", op="op", arguments={}, places={}, out_shapes=[()], units=Units(), **options)  # type: ignore[arg-type]


def test_a_size_that_is_computed_freezes() -> None:
    call = _call()
    call.arguments, call.places = {"size": [-1, object(), 4]}, {"size": 1}
    ids = call.units.fresh(4)
    call.lower("size", ids, 0)
    assert not call.units.frozen() and not call.lowered
    call.lower("size", ids, 2)
    assert call.lowered[0][0] == (1, 2)
    call.lower("size", ids[:1], 1)
    assert set(call.units.frozen()) == {0}


def test_a_branch_that_the_data_decides_freezes_what_it_reads() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.mean() > 0, lambda y: y.relu(), lambda y: y.sin(), (x,))

    module = randomise(Chain(8, nn.Sequential(Branching(), nn.Conv2d(8, 8, 1)), 8))
    graph = trace_graph(module, (IMAGES,))
    assert {op for op, _ in graph.unsupported} == {"cond"}
    assert {group.name for group in graph.prunable} == {"middle.1"}
    keep = {"middle.1": np.array([0, 5])}
    with torch.no_grad():
        ours = slice_model(module, (IMAGES,), graph, keep).eval()(IMAGES)
        assert relative_error(ours, mask_model(module, graph, keep)(IMAGES)) < LIMIT


@pytest.mark.parametrize(
    "bounds", [(-1.0, 6.0), (None, 0.0), (0.5, 6.0), (-2.0, -1.0), (torch.zeros(8, 1, 1), None)], ids=str
)
def test_a_clamp_keeps_zeros_where_its_bounds_hold_zero(bounds: tuple[float | None, float | None]) -> None:
    module = randomise(Chain(8, Custom(lambda x: x * x.clamp(*bounds).sum(1, keepdim=True)), 8))
    (stem,) = (group for group in trace_graph(module, (IMAGES,)).groups if group.name == "stem")
    low, high = bounds
    keeps = not isinstance(low, Tensor) and (low or 0) <= 0 <= (high or 0)
    assert (stem.frozen_because is None) == keeps


def test_axes_of_unlike_length_have_no_rule() -> None:
    call = _call()
    with pytest.raises(NoRule):
        call.tie(call.units.fresh(2), call.units.fresh(3))


def test_contraction_with_a_computed_weight_freezes_both() -> None:
    call = _call()
    left, right = call.units.fresh(3), call.units.fresh(3)
    call.contract(left, "", Value(shape=(3, 2), axes=(right, None)), 0)
    assert set(call.units.frozen()) == {0, 1, 2}


@given(st.lists(st.integers(1, 6), max_size=5), st.lists(st.integers(1, 6), max_size=5))
def test_factorisation_multiplies_back(left: list[int], right: list[int]) -> None:
    inner, outer = tuple(left), tuple(right)
    try:
        runs = list(factorise(inner, outer))
    except NoRule:
        assert np.prod(inner) != np.prod(outer)
        return
    if np.prod(inner) == np.prod(outer):
        assert sorted(a for run, _ in runs for a in run) == [a for a, n in enumerate(inner) if n != 1]
        assert sorted(a for _, run in runs for a in run) == [a for a, n in enumerate(outer) if n != 1]
    for run_in, run_out in runs:
        assert np.prod([inner[a] for a in run_in]) == np.prod([outer[a] for a in run_out])
