"""search: weights of loss curves are learnt from whole nets, and only kept where they lose less in truth."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import synthetic_profile
from torch import nn

from edgeprune.compact import Assembler
from edgeprune.core.budget import make_budget
from edgeprune.core.closed_loop import next_request
from edgeprune.core.cost import predict_cost
from edgeprune.core.errors import DataError, UsageError
from edgeprune.core.records import Budget, Cost, CurveTrial, Importance, LossCurve, Plan
from edgeprune.core.store import read_lines
from edgeprune.executors.here import Here
from edgeprune.plan import choose_widths, level_losses
from edgeprune.score import score_groups
from edgeprune.search import Views, divergence, outputs_of, scatter_weights, search_curves, split_examples, weigh_curves
from edgeprune.trace import trace_graph

torch.set_num_threads(1)
WIDTHS = (4, 8, 12, 16)
GROUPS = ("a", "b", "c", "d", "e")
MOST_UNITS = 50
FITTING = np.array(
    [
        levels
        for levels in itertools.product(range(len(WIDTHS)), repeat=len(GROUPS))
        if sum(WIDTHS[level] for level in levels) <= MOST_UNITS
    ]
)


def importance() -> Importance:
    """Five groups of 16 units whose curves all look alike."""
    curve = LossCurve(widths=np.array(WIDTHS, np.int64), loss=np.array([1.4, 0.9, 0.6, 0.5]))
    return Importance(
        criterion="taylor", graph_sha256="0" * 64, scores={name: np.ones(16) for name in GROUPS}, dense_loss=0.5,
        curves=dict.fromkeys(GROUPS, curve),
    )  # fmt: skip


def rise(weighed: Importance, name: str, width: int) -> float:
    curve = weighed.curves[name]
    return float(np.interp(width, curve.widths, curve.loss) - curve.loss[-1])


def choose(weighed: Importance, near: Mapping[str, int] | None = None) -> Plan:
    """The widths of least summed loss with at most MOST_UNITS units, by brute force; near others within one level."""
    losses_of = level_losses(weighed, dict.fromkeys(GROUPS, np.array(WIDTHS)))
    if weighed.found:
        losses_of = {name: loss + 100 * (np.array(WIDTHS) < weighed.found[name]) for name, loss in losses_of.items()}
    rises = [losses_of[name] for name in GROUPS]
    middle = [WIDTHS.index((near or {}).get(name, WIDTHS[1])) for name in GROUPS]
    offered = FITTING[(np.abs(FITTING - middle) <= (1 if near else len(WIDTHS))).all(axis=1)]
    losses = sum(rises[v][offered[:, v]] for v in range(len(GROUPS)))
    best = [WIDTHS[level] for level in offered[int(np.argmin(losses))]]
    return Plan(
        graph_sha256="0" * 64, budget=Budget(latency_s=1.0), widths=dict(zip(GROUPS, best, strict=True)), keep={},
        predicted=Cost(), solver="brute_force", status="optimal", gap=0.0, loss=0.0,
    )  # fmt: skip


class Judges(Here):
    """A pool of as many as are asked for that works in this process; the last of its items is done first."""

    def __init__(self, judge: Callable[[Plan], float], size: int = 1) -> None:
        super().__init__(lambda work: work, judge)
        self.size = size

    def run(self, items: Sequence[Plan]) -> Iterator[tuple[int, float]]:
        assert len(items) <= self.size
        for place, loss in super().run(items[::-1]):
            yield len(items) - 1 - place, loss


def truth(weights: tuple[float, ...], together: float = 0.0) -> Callable[[Plan], float]:
    """A net that loses each group's curve times a weight, and more for neighbours that are both cut."""

    def judge(plan: Plan) -> float:
        alone = [w * rise(importance(), n, plan.widths[n]) for n, w in zip(GROUPS, weights, strict=True)]
        return 0.01 + sum(alone) + together * sum(a * b for a, b in itertools.pairwise(alone))

    return judge


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("weights", [(6, 1, 1, 1, 0.2), (0.3, 3, 0.3, 3, 0.3), (0.2, 0.2, 1, 5, 5)])
def test_weights_come_close_to_the_best_there_are(weights: tuple[float, ...], seed: int) -> None:
    judge = truth(weights, together=0.5)
    start = judge(choose(importance()))
    reached = judge(choose(weigh_curves(importance(), choose, Judges(judge), trials=24, seed=seed)))
    plan = choose(importance())
    everything = ({name: WIDTHS[v] for name, v in zip(GROUPS, levels, strict=True)} for levels in FITTING)
    best = min(judge(replace(plan, widths=widths)) for widths in everything)
    assert best <= reached < start
    assert reached - best <= 0.25 * (start - best)


def test_curves_that_are_right_stay_as_they_are() -> None:
    given = importance()
    assert weigh_curves(given, choose, Judges(truth((1, 1, 1, 1, 1))), trials=12) is given
    assert weigh_curves(given, choose, Judges(truth((9, 1, 1, 1, 1))), trials=1) is given


def test_no_widths_are_judged_twice_and_time_ends_the_search() -> None:
    judged: list[tuple[int, ...]] = []
    judge = truth((6, 1, 1, 1, 0.2))

    def count(plan: Plan) -> float:
        judged.append(tuple(plan.widths.values()))
        return judge(plan)

    weigh_curves(importance(), choose, Judges(count), trials=16)
    assert 1 < len(judged) <= 16 and len(set(judged)) == len(judged)
    judged.clear()
    weigh_curves(importance(), choose, Judges(count), trials=16, seconds=0.0)
    assert len(judged) == 1


def test_a_killed_search_goes_on_and_ends_alike(tmp_path: Path) -> None:
    judge = truth((6, 1, 1, 1, 0.2), together=0.5)
    calls = itertools.count()

    def killed(plan: Plan) -> float:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return judge(plan)

    whole = weigh_curves(importance(), choose, Judges(judge), trials=12)
    path = tmp_path / "search.jsonl"
    with pytest.raises(KeyboardInterrupt):
        weigh_curves(importance(), choose, Judges(killed), trials=12, checkpoint=path)
    assert len(path.read_text().splitlines()) == 4
    again = weigh_curves(importance(), choose, Judges(killed), trials=12, checkpoint=path)
    assert next(calls) - 5 <= 12 - 4  # what was judged before the kill was not judged again
    for name in GROUPS:
        assert np.array_equal(again.curves[name].loss, whole.curves[name].loss)
    other = replace(importance(), dense_loss=0.4)  # trials of other curves are not taken
    seen: list[Plan] = []
    weigh_curves(
        importance(),
        choose,
        Judges(lambda plan: seen.append(plan) or judge(plan)),
        trials=1,
        judged_with=False,
        checkpoint=path,
    )  # nor of nets that were judged in another way
    assert len(seen) == 1
    seen.clear()
    weigh_curves(other, choose, Judges(lambda plan: seen.append(plan) or judge(plan)), trials=1, checkpoint=path)
    assert len(seen) == 1


def test_several_judges_take_as_many_nets_at_a_time(tmp_path: Path) -> None:
    """Each time all that can be drawn before the next is known, and the same ones whoever is ready first."""
    judge = truth((6, 1, 1, 1, 0.2), together=0.5)
    rounds: list[list[dict[str, int]]] = []

    class Watched(Judges):
        def run(self, items: Sequence[Plan]) -> Iterator[tuple[int, float]]:
            rounds.append([plan.widths for plan in items])
            return super().run(items)

    found = weigh_curves(importance(), choose, Watched(judge, size=5), trials=12)
    sizes = [len(each) for each in rounds]
    assert sizes[0] < sizes[1] == 5 and sum(sizes) <= 12, "first the views alone: nothing is known yet"
    everything = [tuple(widths.values()) for each in rounds for widths in each]
    assert len(set(everything)) == len(everything)
    assert judge(choose(found)) == min(judge(replace(choose(importance()), widths=w)) for r in rounds for w in r)
    path, calls = tmp_path / "search.jsonl", itertools.count()

    def killed(plan: Plan) -> float:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return judge(plan)

    with pytest.raises(KeyboardInterrupt):
        weigh_curves(importance(), choose, Judges(killed, size=5), trials=12, checkpoint=path)
    assert len(path.read_text().splitlines()) == 4
    again = weigh_curves(importance(), choose, Judges(killed, size=5), trials=12, checkpoint=path)
    assert next(calls) == sum(sizes) + 1, "what was judged before the kill was judged again"
    assert again.found == found.found
    assert all(np.array_equal(again.curves[name].loss, found.curves[name].loss) for name in GROUPS)
    assert len(path.read_text().splitlines()) == sum(sizes)


def test_views_agree_on_how_much_is_lost_and_not_on_where() -> None:
    """Half way down all lose the same in sum; of a branch only its curve knows."""
    branch = LossCurve(widths=np.arange(2), loss=np.array([0.8, 0.5]))
    given = replace(importance(), curves={**importance().curves, "branch": branch})
    other = replace(importance(), scores={name: np.arange(16.0) * (name == "a") for name in GROUPS}, curves={})
    views = Views.of(given, [other])
    half = dict.fromkeys(GROUPS, 8)
    without, dropped = views.explain(half), views.explain({**half, "branch": 0})
    assert without.sum(axis=1) == pytest.approx([5 * 0.4] * 3, rel=0.01)
    assert dropped.sum(axis=1) == pytest.approx([5 * 0.4 + 0.3] * 3, rel=0.01)
    curves, magnitudes, even = (dict(zip(views.names, each, strict=True)) for each in without)
    assert magnitudes["a"] == pytest.approx(2.0, rel=0.01) and magnitudes["b"] == pytest.approx(0.0, abs=1e-3)
    assert len({round(even[name], 9) for name in GROUPS}) == 1 and curves["a"] == pytest.approx(0.4, rel=0.01)
    mixed = views.mix(views.alone(0) + 2 * views.alone(1))
    assert rise(mixed, "a", 8) == pytest.approx(0.4 + 2 * 2.0, rel=0.01)
    assert rise(mixed, "b", 8) == pytest.approx(0.4, rel=0.01)


def test_a_search_finds_what_the_curves_do_not_say() -> None:
    """The truth is the summed scores of another criterion, which is a view: its plan is the second that is judged."""
    scores = {name: np.arange(16.0) ** (2 * n) for n, name in enumerate(GROUPS)}
    other = replace(importance(), scores=scores, curves={})
    truth = level_losses(other, dict.fromkeys(GROUPS, np.array(WIDTHS)))

    def judge(plan: Plan) -> float:
        return 0.01 + sum(float(truth[name][WIDTHS.index(plan.widths[name])]) for name in GROUPS)

    everything = [{name: WIDTHS[v] for name, v in zip(GROUPS, levels, strict=True)} for levels in FITTING]
    best = min(judge(replace(choose(importance()), widths=widths)) for widths in everything)
    assert judge(choose(weigh_curves(importance(), choose, Judges(judge), beside=[other], trials=2))) == pytest.approx(
        best
    )
    assert judge(choose(importance())) > 2 * best


def test_what_cannot_be_weighed_is_refused() -> None:
    with pytest.raises(DataError, match="needs them"):
        weigh_curves(replace(importance(), curves={}), choose, Judges(truth((1,) * 5)))
    with pytest.raises(DataError, match="not finite"):
        weigh_curves(importance(), choose, Judges(lambda plan: float("nan")))


def test_scattered_weights_give_neighbours() -> None:
    plans = [choose(scatter_weights(importance(), seed)).widths for seed in range(6)]
    assert len({tuple(widths.values()) for widths in plans}) > 2
    same = [scatter_weights(importance(), 3).curves["a"].loss for _ in range(2)]
    assert np.array_equal(*same)


def test_examples_are_split_and_never_shared() -> None:
    x = torch.arange(100.0)[:, None]
    batches = [(x[i : i + 30], torch.arange(i, min(i + 30, 100))) for i in range(0, 100, 30)]
    (fit,), (judge,) = split_examples(batches)
    assert len(fit[1]) == len(judge[1]) == 50
    (few,), (rest,) = split_examples([(torch.zeros(400, 1), torch.arange(400))])
    assert (len(few[1]), len(rest[1])) == (128, 272)
    assert not set(fit[1].tolist()) & set(judge[1].tolist())
    assert torch.equal(fit[0][0][:, 0].long(), fit[1])
    with pytest.raises(DataError, match="two calibration examples"):
        split_examples([(x[:1], torch.zeros(1))])


def test_divergence_is_none_of_equal_outputs_and_needs_no_classifier() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert divergence([logits], [logits]) == pytest.approx(0.0, abs=1e-12)
    assert divergence([logits + 3], [logits]) == pytest.approx(0.0, abs=1e-12)  # the softmax is the same
    p, q = logits.softmax(1), torch.full((2, 3), 1 / 3)
    by_hand = float((p * (p / q).log()).sum(1).mean())
    assert divergence([torch.zeros(2, 3)], [logits]) == pytest.approx(by_hand)
    image = torch.randn(2, 1, 4, 4)
    assert divergence([torch.full_like(image, float(image.mean()))], [image]) == pytest.approx(1.0)


def test_a_real_net_loses_no_more_than_by_its_plain_curves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(24, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    ).eval()  # fmt: skip
    x = torch.randn(96, 3, 8, 8)
    batches = [(x[i : i + 32], net(x[i : i + 32]).argmax(1)) for i in range(0, 96, 32)]
    inputs = (x[:1],)
    graph = trace_graph(net, inputs)
    profile = replace(synthetic_profile(graph, tile=4), overhead_s=1e-6)
    scored = score_groups(net, inputs, graph, batches, criterion="magnitude", levels=3)
    budget = make_budget(predict_cost(graph, {}, profile), latency="0.6x")
    fitting, judging = split_examples(batches)
    wanted = outputs_of(net, judging)

    first = replace(budget, latency_s=next_request((), budget))  # as the loop on the board asks

    def plan_of(given: Importance) -> Plan:
        return choose_widths(graph, profile, given, first, solver="greedy", compare=())

    nets = Assembler(net, inputs, graph)

    def judge(plan: Plan) -> float:
        return divergence(outputs_of(nets.assemble(plan, fitting), judging), wanted)

    path = tmp_path / "search.jsonl"
    settings = {"trials": 6, "solver": "greedy", "checkpoint": path}
    weighed = search_curves(net, inputs, graph, profile, scored, budget, batches, **settings)
    assert judge(plan_of(weighed)) <= judge(plan_of(scored))
    best = min(read_lines(path, CurveTrial), key=lambda trial: trial.loss)
    assert plan_of(weighed).widths == best.widths, "what the board is asked for first was judged"
    judged = path.read_text().splitlines()
    assert 3 <= len(judged) <= 6
    again = search_curves(net, inputs, graph, profile, scored, budget, batches, **settings)
    assert path.read_text().splitlines() == judged, "a net was judged once more"
    assert all(np.array_equal(again.curves[name].loss, weighed.curves[name].loss) for name in scored.curves)
    elsewhere = tmp_path / "elsewhere.jsonl"
    settings |= {"checkpoint": elsewhere, "executor": "processes:workers=1"}
    there = search_curves(net, inputs, graph, profile, scored, budget, batches, **settings)
    ours, theirs = ({tuple(t.widths.values()): t.loss for t in read_lines(p, CurveTrial)} for p in (path, elsewhere))
    assert list(ours)[:3] == list(theirs)[:3], "the views' own plans; what is drawn then depends on every digit"
    assert all(loss == pytest.approx(theirs.get(widths, loss), rel=1e-3) for widths, loss in ours.items())
    assert there.found and judge(plan_of(there)) == pytest.approx(min(theirs.values()), rel=1e-3)
    with pytest.raises(UsageError, match="unknown executors 'nowhere'"):
        search_curves(net, inputs, graph, profile, scored, budget, batches, executor="nowhere")
    with pytest.raises(DataError, match="needs loss curves"):
        search_curves(net, inputs, graph, profile, replace(scored, curves={}), budget, batches)
    assert predict_cost(graph, plan_of(weighed).widths, profile).latency_s.median <= budget.latency_s


def test_the_later_nets_are_near_the_best_and_the_best_is_found_again() -> None:
    """Neighbours that are cut together lose more than any weights of single groups say."""
    judge = truth((1.0, 2.0, 0.7, 1.5, 1.0), together=4.0)
    asked: list[tuple[Mapping[str, int] | None, dict[str, int]]] = []

    def watched(given: Importance, near: Mapping[str, int] | None = None) -> Plan:
        plan = choose(given, near)
        asked.append((near, plan.widths))
        return plan

    losses: list[float] = []

    def count(plan: Plan) -> float:
        losses.append(judge(plan))
        return losses[-1]

    weighed = weigh_curves(importance(), watched, Judges(count), trials=20)
    places = [near is not None for near, _ in asked]
    assert places == sorted(places) and any(places) and not places[0], "first everywhere, then near the best"
    for near, widths in asked:
        assert all(near is None or abs(WIDTHS.index(widths[n]) - WIDTHS.index(near[n])) <= 1 for n in GROUPS)
    assert min(losses) < losses[0]
    assert judge(choose(weighed)) == min(losses) and choose(weighed).widths == weighed.found
    assert scatter_weights(weighed, 0).found == {}, "a neighbour is another net"


def test_a_plan_keeps_to_what_a_search_found_as_far_as_the_budget_allows() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip
    graph = trace_graph(net, (torch.randn(1, 3, 8, 8),))
    profile = replace(synthetic_profile(graph, tile=1), overhead_s=1e-6)
    one, two, three = (group.name for group in graph.prunable)
    scored = score_groups(net, (torch.randn(1, 3, 8, 8),), graph, None, criterion="magnitude", curves=False)
    curve = LossCurve(widths=np.array([1, 8, 16]), loss=np.array([1.0, 0.3, 0.0]))
    scored = replace(scored, curves=dict.fromkeys((one, two, three), curve), dense_loss=0.0)
    found = {one: 16, two: 5, three: 12}  # no plan by these curves, which are all alike
    cost = predict_cost(graph, found, profile).latency_s
    assert cost is not None
    budget = Budget(latency_s=1.0001 * cost.median)
    free = choose_widths(graph, profile, scored, budget)
    kept = choose_widths(graph, profile, replace(scored, found=found), budget)
    assert free.widths != found and kept.widths == found
    assert kept.loss > free.loss and kept.loss < 3.0, "what it costs to leave them is no loss"
    less = choose_widths(
        graph, profile, replace(scored, found=found), replace(budget, latency_s=0.97 * cost.median)
    ).widths
    assert sum(less[name] < found[name] for name in found) == 1
    near = choose_widths(graph, profile, scored, budget, near=found, reach=1).widths
    assert all(abs(near[name] - found[name]) <= 1 for name in found)
