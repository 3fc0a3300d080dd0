"""What a user says about widths, down to the plan."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from small_nets import NETS
from synthetic import synthetic_importance, synthetic_profile
from torch import nn

from edgeprune.core.budget import make_budget
from edgeprune.core.cost import predict_cost
from edgeprune.core.describe import describe_graph
from edgeprune.core.errors import UsageError
from edgeprune.core.problem import is_feasible, losses_of
from edgeprune.core.records import Graph, WidthRules
from edgeprune.core.rules import apply_rules
from edgeprune.plan import build_problem, choose_widths
from edgeprune.tables.design import design_configurations
from edgeprune.trace import trace_graph

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def graph() -> Graph:
    net = nn.Sequential()
    for name, width, inner in (("stem", 24, 3), ("body", 40, 24), ("neck", 6, 40)):
        net.add_module(name, nn.Sequential(nn.Conv2d(inner, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()))
    net.add_module("head", nn.Conv2d(6, 5, 1))
    return trace_graph(net, (torch.randn(1, 3, 8, 8),))


def _prunable(graph: Graph, **rules: object) -> dict[str, tuple[int, int]]:
    return {g.name: (g.step, g.least) for g in apply_rules(graph, WidthRules(**rules)).prunable}  # type: ignore[arg-type]


def test_without_rules_nothing_changes(graph: Graph) -> None:
    assert apply_rules(graph, WidthRules()) == graph
    assert _prunable(graph) == {"stem.0": (1, 1), "body.0": (1, 1), "neck.0": (1, 1)}


def test_patterns_name_groups_modules_and_what_holds_them(graph: Graph) -> None:
    assert _prunable(graph, freeze=("stem",)).keys() == {"body.0", "neck.0"}
    assert _prunable(graph, freeze=("stem.1",)).keys() == {"body.0", "neck.0"}, "its batch norm makes the channels too"
    assert _prunable(graph, freeze=("*e*",)).keys() == {"body.0"}
    assert _prunable(graph, only=("b*", "neck.0")).keys() == {"body.0", "neck.0"}
    assert _prunable(graph, only=("b*", "neck"), freeze=("neck",)).keys() == {"body.0"}
    ruled = {g.name: g.frozen_because for g in apply_rules(graph, WidthRules(freeze=("stem",), only=("body",))).groups}
    assert ruled["stem.0"] == "is frozen by 'stem'" and ruled["neck.0"] == "is not among body"
    assert ruled["head"] == "is a model output", "the first reason stays"


def test_a_pattern_that_matches_nothing_is_an_error(graph: Graph) -> None:
    for rules in (WidthRules(freeze=("bodi",)), WidthRules(only=("stem", "x*"))):
        with pytest.raises(UsageError, match=r"no group of channels matches '(bodi|x\*)'.*stem\.0, body\.0, neck\.0"):
            apply_rules(graph, rules)
    with pytest.raises(UsageError, match="at least 1"):
        apply_rules(graph, WidthRules(step=0))


def test_step_and_least_width_count_channels_not_units() -> None:
    heads = trace_graph(NETS["heads"](), (torch.randn(1, 3, 8, 8),))  # four heads of three channels
    assert _prunable(heads, step=6)["middle.qkv"] == (2, 1)
    assert _prunable(heads, least=10)["middle.qkv"] == (1, 2), "one head makes 9 channels of queries, keys, values"
    grouped = trace_graph(NETS["grouped"](), (torch.randn(1, 3, 8, 8),))  # two parts of four channels
    assert _prunable(grouped, step=4)["stem"] == (2, 1)


def test_a_group_that_can_only_keep_all_is_frozen_and_says_why(graph: Graph) -> None:
    ruled = {g.name: g for g in apply_rules(graph, WidthRules(step=8)).groups}
    assert ruled["neck.0"].frozen_because == "has 6 units, which the step 8 and the least width 1 all keep"
    assert ruled["body.0"].step == 8 and ruled["body.0"].frozen_because is None


def test_plans_and_profiles_keep_to_them(graph: Graph) -> None:
    ruled = apply_rules(graph, WidthRules(freeze=("neck",), step=8, least=16))
    profile, importance = synthetic_profile(graph), synthetic_importance(graph)
    budget = make_budget(predict_cost(graph, {}, profile), size="0.55x")
    plan = choose_widths(ruled, profile, importance, budget, compare=("uniform",))
    assert plan.widths["stem.0"] in (16, 24) and plan.widths["body.0"] in range(16, 41, 8)
    assert plan.widths["stem.0"] < 24 or plan.widths["body.0"] < 40
    assert plan.widths.get("neck.0", 6) == 6 and "neck.0" not in plan.keep
    free = choose_widths(graph, profile, importance, budget, compare=())
    assert any(width % 8 or width < 16 for width in free.widths.values()), "the rules made no difference"
    for configuration in design_configurations(ruled, 12, 4):
        assert configuration.widths["neck.0"] == 6
        assert all(configuration.widths[g.name] >= 16 for g in ruled.prunable)
        assert all(configuration.widths[g.name] % 8 == 0 for g in ruled.prunable)


def test_tied_groups_keep_as_many_units_each() -> None:
    """The best of all plans in which they do, by brute force, and each keeps its own units."""
    torch.manual_seed(0)
    net = nn.Sequential()
    for name, width, inner in (("a", 8, 3), ("b", 8, 8), ("c", 12, 8), ("d", 8, 12)):
        net.add_module(name, nn.Sequential(nn.Conv2d(inner, width, 3, padding=1), nn.ReLU()))
    net.add_module("head", nn.Conv2d(8, 5, 1))
    graph = trace_graph(net, (torch.randn(1, 3, 8, 8),))
    profile, importance = synthetic_profile(graph, tile=2), synthetic_importance(graph)
    budget = make_budget(predict_cost(graph, {}, profile), size="0.85x")
    tied = apply_rules(graph, WidthRules(tie=("[abd]",)))
    assert [group.tie for group in tied.prunable] == ["[abd]", "[abd]", None, "[abd]"]
    free_problem, problem = (build_problem(each, profile, importance, budget, levels=6) for each in (graph, tied))
    assert [choice.names for choice in problem.choices] == [("a.0", "b.0", "d.0"), ("c.0",)]
    plans = [choose_widths(each, profile, importance, budget, levels=6, compare=()) for each in (graph, tied)]
    widths = plans[1].widths
    assert widths["a.0"] == widths["b.0"] == widths["d.0"] < 8 and widths.keys() == {"a.0", "b.0", "c.0", "d.0"}
    assert len({plans[0].widths[name] for name in ("a.0", "b.0", "d.0")}) > 1, "tying made no difference"
    assert not all(np.array_equal(plans[1].keep["a.0"], plans[1].keep[name]) for name in ("b.0", "d.0"))
    levels = np.array(list(itertools.product(*(range(len(choice.widths)) for choice in free_problem.choices))))
    sizes = np.stack([choice.widths[levels[:, v]] for v, choice in enumerate(free_problem.choices)], axis=1)
    alike = levels[(sizes[:, 0] == sizes[:, 1]) & (sizes[:, 0] == sizes[:, 3])]
    alike = alike[is_feasible(free_problem, alike)]
    assert plans[1].loss == pytest.approx(losses_of(free_problem, alike).min())
    assert plans[1].loss > plans[0].loss


def test_ties_that_cannot_be_are_refused(graph: Graph) -> None:
    for pattern, named in (("stem", r"stem\.0 \(24\)"), ("*", r"stem\.0 \(24\), body\.0 \(40\)"), ("head", "none")):
        with pytest.raises(UsageError, match=f"cannot tie widths.*{named}"):
            apply_rules(graph, WidthRules(tie=(pattern,)))


def test_the_tree_shows_modules_sizes_and_reasons(graph: Graph) -> None:
    text = describe_graph(apply_rules(graph, WidthRules(freeze=("neck",), least=9)))
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    body = next(line for line in text.splitlines() if line.startswith("body"))
    macs, parameters = 8 * 8 * (24 * 40 + 40 * 6) * 9, 24 * 40 * 9 + 3 * 40 + 40 * 6 * 9
    assert body.split() == ["body.0", "40", "1", "691", "k", "10.9", "k", "at", "least", "9"]
    assert (macs, parameters) == (691200, 10920)
    assert lines["neck.0"].endswith("frozen: is frozen by 'neck'") and lines["head"].endswith("is a model output")
    assert np.isclose(
        float(text.rsplit("; ", 1)[1].split("%")[0]) / 100,
        1 - 6 * 5 / (3 * 24 * 9 + 24 * 40 * 9 + 40 * 6 * 9 + 30),
        atol=1e-3,
    )
    assert "2 groups can be pruned" in text


def test_modules_of_a_block_stand_under_it() -> None:
    lines = describe_graph(trace_graph(NETS["skip_and_cut"](), (torch.randn(1, 3, 8, 8),))).splitlines()
    at = next(i for i, line in enumerate(lines) if line.split() == ["middle"])
    assert lines[at + 1].startswith("  ") and not lines[at].startswith(" ")
