"""Residual branches dropped whole: found, cut, costed, planned."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from exactness import LIMIT, random_keep, randomise, relative_error
from small_nets import ResNet20, WideResNet
from synthetic import synthetic_importance, synthetic_profile
from torch import Tensor, fx, nn
from torch.nn import functional
from zoo import timm_model, torchvision_models

from edgeprune.compact import compact_model
from edgeprune.compensation.least_squares import compensate
from edgeprune.core.branches import dropped_branches
from edgeprune.core.budget import make_budget
from edgeprune.core.cost import live_bytes, predict_cost, predict_latency
from edgeprune.core.effort import Effort
from edgeprune.core.errors import ModelError, RecordError, UsageError
from edgeprune.core.family import list_members, load_member
from edgeprune.core.problem import costs_of
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import Branch, Budget, Graph, Importance, LossCurve, Plan, Profile, WidthRules
from edgeprune.core.rules import apply_rules
from edgeprune.device.session import open_session
from edgeprune.device.targets import read_target
from edgeprune.executors.here import Here
from edgeprune.graphs.capture import capture
from edgeprune.graphs.slice import mask_model, slice_captured
from edgeprune.on_board import plan_on_board
from edgeprune.plan import build_problem, choose_widths
from edgeprune.profile import profile_target, read_profile
from edgeprune.score import score_groups
from edgeprune.search import Views, weigh_curves
from edgeprune.trace import trace_captured, trace_graph

torch.set_num_threads(1)


class Block(nn.Module):
    """Pre-activation without statistics: x + conv(relu(conv(relu(x)))), or a bottleneck of three."""

    def __init__(self, width: int, inner: tuple[int, ...]) -> None:
        super().__init__()
        sizes = (width, *inner, width)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            y = layer(functional.relu(y))
        return x + y


class Net(nn.Module):
    """Two blocks, of two layers and of three, between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 10)
        self.first, self.second = Block(16, (24,)), Block(16, (8, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.relu(self.second(self.first(self.stem(x)))).mean((2, 3)))


def _resnet() -> nn.Module:
    return torchvision_models().ResNet(torchvision_models().resnet.BasicBlock, [2, 1, 1, 1])


def _mobilenet() -> nn.Module:
    return torchvision_models().MobileNetV2(inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 3, 2]])


def _vit() -> nn.Module:
    return torchvision_models().VisionTransformer(32, 8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128)


def _convnext() -> nn.Module:
    return timm_model("convnext_atto", depths=(1, 1, 1, 1), dims=(16, 24, 32, 40))


# name -> (builder, input size, names of the branches: some, or how many)
NETS: dict[str, tuple[Callable[[], nn.Module], int, set[str], int]] = {
    "small": (Net, 8, {"first", "second"}, 2),
    "resnet20_option_a": (ResNet20, 32, {"layer1.0", "layer2.0", "layer3.2"}, 9),
    "wrn16_2": (WideResNet, 32, {"groups.0", "groups.1"}, 6),
    "resnet": (_resnet, 32, {"layer1.0", "layer2.0", "layer4.0"}, 5),
    "mobilenet_v2": (_mobilenet, 32, {"features.3.conv", "features.6.conv"}, 3),
    "vit": (_vit, 32, {"encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"}, 4),
    "timm_convnext": (_convnext, 32, {"stages.0.blocks.0"}, 4),
}


@pytest.mark.parametrize("name", NETS)
def test_without_branches_as_with_zeros_in_their_place(name: str) -> None:
    """Equal to the sum with zeros on that side, to the masked model, and in all counts to a trace of itself."""
    build, size, some, count = NETS[name]
    torch.manual_seed(0)
    module, x = randomise(build()), torch.randn(2, 3, size, size)
    captured = capture(module, (x,))
    graph = trace_captured(captured, len(x))
    assert len(graph.branches) == count
    assert some <= {branch.name for branch in graph.branches}
    rng = np.random.default_rng(1)
    dropped = [branch for branch in graph.branches if rng.random() < 0.6]
    keep = random_keep(graph, rng) | {branch.name: np.zeros(0, np.int64) for branch in dropped}
    masked = mask_model(module, graph, keep)
    zeroed = _with_zeros(copy.deepcopy(captured), dropped)
    zeroed.load_state_dict(masked.state_dict(), strict=False)
    smaller = slice_captured(captured, graph, keep).eval()
    with torch.no_grad():
        assert relative_error(smaller(x), masked(x)) < LIMIT
        assert relative_error(smaller(x), zeroed(x)) < LIMIT
    gone = {parameter for branch in dropped for parameter in branch.parameters}
    left = set(module.state_dict()) - set(smaller.state_dict())
    assert gone and gone <= left
    assert all(key in gone or key.endswith("num_batches_tracked") for key in left)
    # What is predicted of it is what is found in it.
    widths = {key: len(kept) for key, kept in keep.items()}
    again = trace_graph(smaller, (x,))
    predicted, found = predict_cost(graph, widths), predict_cost(again, {})
    assert (predicted.parameters, predicted.macs) == (found.parameters, found.macs)
    assert predicted.peak_memory_bytes == found.peak_memory_bytes
    assert live_bytes(graph, widths) == live_bytes(again, {})
    assert predicted.parameters == sum(p.numel() for p in smaller.parameters())


def _with_zeros(captured: fx.GraphModule, dropped: list[Branch]) -> fx.GraphModule:
    """Each branch times zero: what dropping it means."""
    nodes = {node.name: node for node in captured.graph.nodes}
    for branch in dropped:
        (end,) = (node for node in nodes[branch.total].args if node.name in branch.nodes)
        with captured.graph.inserting_after(end):
            nothing = captured.graph.call_function(torch.ops.aten.mul.Tensor, (end, 0.0))
        nodes[branch.total].replace_input_with(end, nothing)
    captured.recompile()
    return captured


class Several(nn.Module):
    """Sums that are no residual blocks, each for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.convs = nn.Conv2d(3, 8, 3, padding=1), nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(6))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        inner = self.convs[0](x)
        x = x + inner
        x = x * inner.mean()  # the branch is read once more
        x = self.convs[1](x) + self.convs[2](x)  # neither side is the lesser
        x = x + torch.sigmoid(self.convs[3](x))  # zeros would not be nothing
        x = x + self.convs[4](functional.relu_(x.transpose(2, 3)))  # what it reads is written over
        x = x + functional.relu(x)  # nothing to save
        return self.head((x + self.convs[5](x).mean((2, 3), keepdim=True)).mean((2, 3)))  # of another shape


def test_what_is_no_branch() -> None:
    assert trace_graph(Several().eval(), (torch.randn(1, 3, 8, 8),)).branches == ()


def test_what_writes_over_its_input_leaves_the_shortcut_alone() -> None:
    """An activation in place behind the sum must not change what the sum's other side is read for later."""

    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = functional.relu_(x + self.inner(x))
            return self.head(torch.cat([x, y], 1))

    torch.manual_seed(0)
    module, x = Kept().eval(), torch.randn(2, 3, 6, 6)
    graph = trace_graph(module, (x,))
    keep = {"inner": np.zeros(0, np.int64)}
    assert [branch.name for branch in graph.branches] == ["inner"]
    with torch.no_grad():
        smaller = compact_model(module, (x,), graph, keep)
        assert relative_error(smaller(x), mask_model(module, graph, keep)(x)) < LIMIT


def test_rules_keep_branches() -> None:
    graph = trace_graph(Net().eval(), (torch.randn(1, 3, 8, 8),))

    def left(**rules: tuple[str, ...]) -> list[str]:
        return [branch.name for branch in apply_rules(graph, WidthRules(**rules)).branches]

    assert left() == ["first", "second"]
    assert left(freeze=("first.layers.1",)) == ["second"]
    assert left(only=("second",)) == ["second"]
    assert left(only=("second.layers.0",)) == []


def test_refusals() -> None:
    module, x = Net().eval(), torch.randn(1, 3, 8, 8)
    graph = trace_graph(module, (x,))
    with pytest.raises(RecordError, match="branch 'first' is one unit"):
        compact_model(module, (x,), graph, {"first": np.array([1])})
    with pytest.raises(ModelError, match=r"in place.*first.*in_place=False"):
        compact_model(module, (x,), graph, {"first": np.zeros(0, np.int64)}, in_place=True)
    with pytest.raises(UsageError, match="loss curves"):
        score_groups(module, (x,), graph, None, criterion="magnitude", curves=False, depth=True)
    keep = {"first": np.zeros(1, np.int64)}
    assert set(compact_model(module, (x,), graph, keep).state_dict()) == set(module.state_dict())


# --- scores and plans ----------------------------------------------------------------------------


def test_the_loss_without_a_branch_is_the_masked_models() -> None:
    torch.manual_seed(1)
    module, x = Net().eval(), torch.randn(1, 3, 8, 8)
    graph = trace_graph(module, (x,))
    images, labels = torch.randn(32, 3, 8, 8), torch.randint(0, 10, (32,))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    importance = score_groups(module, (x,), graph, [(images, labels)], criterion="magnitude", levels=2, depth=True)
    for branch in graph.branches:
        curve = importance.curves[branch.name]
        masked = mask_model(module, graph, {branch.name: np.zeros(0, np.int64)})
        with torch.no_grad():
            assert curve.loss[0] == pytest.approx(float(functional.cross_entropy(masked(images), labels)), rel=1e-5)
        assert curve.widths.tolist() == [0, 1] and curve.loss[1] == importance.dense_loss
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    without = score_groups(module, (x,), graph, [(images, labels)], criterion="magnitude", levels=2)
    assert without.curves.keys() == importance.curves.keys() - {"first", "second"}


def test_a_killed_scoring_keeps_what_it_knows_of_branches(tmp_path: Path) -> None:
    torch.manual_seed(1)
    module, x = Net().eval(), torch.randn(1, 3, 8, 8)
    graph = trace_graph(module, (x,))
    batches = [(torch.randn(32, 3, 8, 8), torch.randint(0, 10, (32,)))]
    path = tmp_path / "importance.jsonl"

    def score(progress: Progress = silent, depth: bool = True) -> Importance:
        return score_groups(
            module, (x,), graph, batches, criterion="magnitude", levels=2, depth=depth, checkpoint=path,
            progress=progress,
        )  # fmt: skip

    def kill(what: str, done: int, total: int) -> None:
        if what == "score: branches" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(kill)
    known = len(graph.prunable) + 1
    assert len(path.read_text().splitlines()) == known
    whole = score()
    assert len(path.read_text().splitlines()) == known + len(graph.branches) - 1
    assert whole.curves.keys() == {each.name for each in (*graph.prunable, *graph.branches)}
    assert score(depth=False).curves.keys() == {group.name for group in graph.prunable}


@cache
def setting() -> tuple[Graph, Profile, Importance]:
    """The small net with a stem that costs something, and losses that make the first branch cheap to drop."""
    graph = trace_graph(Net().eval(), (torch.randn(1, 3, 16, 16),))
    importance = synthetic_importance(graph)
    curves = {
        name: LossCurve(widths=np.arange(2), loss=np.array([0.5 + rise, 0.5]))
        for name, rise in (("first", 0.05), ("second", 0.4))
    }
    return graph, synthetic_profile(graph, tile=4), replace(importance, curves={**importance.curves, **curves})


def plan(solver: str = "milp", levels: int = 4, **shares: str) -> Plan:
    graph, profile, importance = setting()
    budget = make_budget(predict_cost(graph, {}, profile), **shares)  # type: ignore[arg-type]
    return choose_widths(graph, profile, importance, budget, solver=solver, compare=(), levels=levels)


def test_the_problem_costs_what_predict_cost_says() -> None:
    """With and without each branch; every row, and what cannot be costs more than the limit."""
    graph, profile, importance = setting()
    budget = make_budget(predict_cost(graph, {}, profile), latency="0.5x", size="0.5x", memory="0.5x")
    problem = build_problem(graph, profile, importance, budget, levels=4)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        levels = [int(rng.integers(len(choice.widths))) for choice in problem.choices]
        widths = {c.name: int(c.widths[level]) for c, level in zip(problem.choices, levels, strict=True)}
        seen.add((widths["first"], widths["second"]))
        costs = dict.fromkeys(("latency_s", "artifact_bytes", "peak_memory_bytes"), 0.0)
        for row, value in zip(problem.rows, costs_of(problem, levels), strict=True):
            costs[row.quantity] = max(costs[row.quantity], float(value))
        predicted = predict_cost(graph, widths, profile)
        assert predicted.latency_s is not None
        assert costs["latency_s"] == pytest.approx(predicted.latency_s.median, rel=1e-6)
        assert costs["artifact_bytes"] == pytest.approx(predicted.artifact_bytes)
        assert costs["peak_memory_bytes"] == pytest.approx(live_bytes(graph, widths))
    assert seen == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_kernels_of_a_dropped_branch_cost_nothing() -> None:
    """What is left is the profile of the model without it, kernel by kernel."""
    graph, profile, _ = setting()
    inside = {"conv2d_1", "conv2d_2"}
    assert inside <= {kernel.name for kernel in profile.kernels}
    rest = replace(profile, kernels=tuple(k for k in profile.kernels if k.name not in inside))
    assert predict_latency(graph, {"first": 0}, profile) == pytest.approx(predict_latency(graph, {}, rest))
    narrow = {"stem": 8, "second.layers.0": 4}
    assert predict_latency(graph, {**narrow, "first": 0}, profile) == pytest.approx(
        predict_latency(graph, narrow, rest)
    )


@pytest.mark.parametrize(
    "shares", [{"latency": "0.6x"}, {"size": "0.5x"}, {"latency": "0.5x", "size": "0.6x", "memory": "0.8x"}]
)
def test_plans_are_those_of_brute_force(shares: dict[str, str]) -> None:
    best = plan("brute_force", **shares)
    for name in ("milp", "dp"):
        found = plan(name, **shares)
        assert found.status == "optimal"
        assert found.loss == pytest.approx(best.loss, rel=2e-4)
    assert best.widths.get("first") == 0  # it saves more than its loss
    assert len(best.keep["first"]) == 0


@pytest.mark.parametrize("solver", list_members("solvers"))
def test_every_solver_knows_branches(solver: str) -> None:
    """Whatever it finds is within the budget and says of each branch that it is dropped, or nothing."""
    graph, profile, _ = setting()
    found = plan(solver, latency="0.7x")
    assert found.predicted.latency_s is not None and found.budget.latency_s is not None
    assert found.predicted.latency_s.median <= found.budget.latency_s * (1 + 1e-6)
    assert predict_latency(graph, found.widths, profile) == pytest.approx(found.predicted.latency_s.median)
    assert {found.widths.get(branch.name, 0) for branch in graph.branches} == {0}
    if solver == "uniform":
        assert not graph.branches or not {branch.name for branch in graph.branches} & found.widths.keys()


def test_without_need_nothing_is_dropped() -> None:
    found = plan(latency="1.2x")
    assert found.keep == {} and found.loss == pytest.approx(0.0, abs=1e-12)
    assert not {"first", "second"} & found.widths.keys()


def test_a_budget_that_widths_alone_cannot_meet_drops_a_branch() -> None:
    graph, profile, importance = setting()
    least = {group.name: 1 for group in graph.prunable}
    floor = predict_latency(graph, least, profile)
    budget = make_budget(predict_cost(graph, {}, profile), latency=f"{0.97 * floor * 1e3} ms")
    found = choose_widths(graph, profile, importance, budget, compare=())
    assert 0 in found.widths.values()


def test_a_search_learns_what_dropping_a_branch_costs_in_truth() -> None:
    """A branch that costs eight times what was measured alone is dropped no more."""
    graph, profile, importance = setting()
    budget = make_budget(predict_cost(graph, {}, profile), latency="0.6x")
    views = Views.of(importance)

    def choose(weighed: Importance, near: Mapping[str, int] | None = None) -> Plan:
        return choose_widths(graph, profile, weighed, budget, compare=(), levels=4, near=near)

    def judge(plan: Plan) -> float:
        by_curves = views.explain(plan.widths)[0]
        return 0.01 + float(sum(by_curves)) + 7 * float(by_curves[views.names.index("first")])

    weighed = weigh_curves(importance, choose, Here(lambda work: work, judge), trials=12)
    before, after = choose(importance), choose(weighed)
    assert "first" in before.widths and "first" not in after.widths
    assert after.widths == weighed.found, "branches that stay, too"
    assert judge(after) < judge(before)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["onnx", pytest.param("tflite", marks=pytest.mark.long)])
def test_files_without_a_branch(name: str, tmp_path: Path) -> None:
    """The resizer's file computes what the compact model does, with weights of its own and nothing of the branch."""
    if name == "tflite":
        pytest.importorskip("litert_torch")
    torch.manual_seed(0)
    module, x = randomise(Net()), torch.randn(1, 3, 8, 8)
    graph, member, file = trace_graph(module, (x,)), load_member("formats", name), tmp_path / "timed"
    resizer = member.make_resizer(module, (x,), graph)
    assert type(resizer).__name__ == "ExactResizer"
    resizer.write_structure({"first": 0, "second.layers.0": 5}, file, "weights.bin")
    smaller = compact_model(module, (x,), graph, {"first": np.zeros(0, np.int64), "second.layers.0": np.arange(5)})
    (ours,) = member.run(file, [x.numpy()])
    with torch.no_grad():
        assert relative_error(torch.from_numpy(ours), smaller.eval()(x)) < LIMIT
    resizer.write_model({}, tmp_path / "dense")
    saved = (tmp_path / "dense").stat().st_size - file.stat().st_size
    assert saved > 4 * sum(p.numel() for p in module.first.parameters())


def test_what_follows_a_dropped_branch_makes_up_for_it() -> None:
    """Least squares of the layers behind it brings the outputs nearer to the dense model's."""
    torch.manual_seed(0)
    module, images = randomise(Net()), torch.randn(64, 3, 8, 8)
    graph = trace_graph(module, (images[:1],))
    keep = {"first": np.zeros(0, np.int64)}
    smaller = compact_model(module, (images[:1],), graph, keep).eval()
    with torch.no_grad():
        before = (smaller(images) - module(images)).square().mean()
        fitted = compensate(smaller, module, graph, keep, [(images, torch.zeros(64))])
        assert fitted == ["second.layers.0", "second.layers.1", "second.layers.2", "head"]
        assert (smaller(images) - module(images)).square().mean() < 0.5 * before


# --- on a board ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_loop_on_a_board_drops_a_branch(tmp_path: Path) -> None:
    """A latency that no widths reach; the model is measured without its branches, and the tables stay as they were."""
    torch.manual_seed(0)
    module, x = Net().eval(), torch.randn(1, 3, 32, 32)
    graph = trace_graph(module, (x,))
    _, _, importance = setting()
    path, effort = tmp_path / "profile.jsonl", Effort(rounds=2, repeats=2, seconds=0.02, precision=None)
    local = read_target(Path(__file__).parents[1] / "targets" / "localhost.toml")
    with open_session(replace(local, workdir=str(tmp_path / "board"), python=sys.executable)) as session:
        profile = profile_target(
            module, (x,), graph, session, path=path, configurations=12, held_out=0, error=None, effort=effort
        )
        least = predict_latency(graph, {group.name: 1 for group in graph.prunable}, profile)
        budget = Budget(latency_s=0.9 * least)
        found = plan_on_board(
            module, (x,), graph, profile, replace(importance, graph_sha256=graph.model_sha256), budget, session, path,
            effort=effort, max_rounds=3,
        )  # fmt: skip
    assert dropped_branches(graph, found.widths)
    chosen = next(turn for turn in found.rounds if turn.widths == found.widths)
    assert chosen.measured.median < 1.25 * budget.latency_s  # that it ends closer is what quiet machines show
    measured = read_profile(path, graph)
    without = [item for item in measured.measurements if not all(item.widths.values())]
    assert without and not any(item.kernels for item in without)
    lines = path.read_text().splitlines()
    whole = [line for line in lines if 0 not in (json.loads(line)["record"].get("widths") or {}).values()]
    assert len(whole) == len(lines) - len(without)
    (tmp_path / "whole.jsonl").write_text("\n".join(whole) + "\n")
    tables = read_profile(tmp_path / "whole.jsonl", graph).tables
    assert [table.latency_s.tolist() for table in measured.tables] == [table.latency_s.tolist() for table in tables]
    smaller = compact_model(module, (x,), graph, found.keep)
    assert sum(p.numel() for p in smaller.parameters()) == found.predicted.parameters
