"""Diagonal blocks: the search against brute force, blocks against masks on real nets, and plans on a real runtime."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from exactness import LIMIT, random_keep, randomise, relative_error
from small_nets import ResNet20, Shared, WideResNet
from torch import Tensor, nn
from zoo import timm_model, torchvision_models

from edgeprune.compact import compact_model, save_compact
from edgeprune.core.cost import count_macs
from edgeprune.core.describe import describe_pivoted
from edgeprune.core.effort import Effort
from edgeprune.core.errors import ModelError, UsageError
from edgeprune.core.records import FloatArray, ModelSpec, Pivoted, Quantity
from edgeprune.core.store import read_record, write_record
from edgeprune.device.session import Session, open_session
from edgeprune.device.targets import read_target
from edgeprune.export import export_model
from edgeprune.graphs.blocks import Mass, find_orders, kept_share, own_columns
from edgeprune.graphs.permute import movable_groups, permute_units
from edgeprune.graphs.pivot import Blocks, block_mask
from edgeprune.graphs.slice import mask_model
from edgeprune.load import load_model
from edgeprune.pivot import _close_loop, _worthwhile, pivot_model, plan_pivot
from edgeprune.trace import trace_graph

torch.set_num_threads(1)
REPOSITORY = Path(__file__).parent.parent
BRIEF = Effort(rounds=2, repeats=2, seconds=0.02, precision=None, samples=3, profiled_runs=3)


class Chain(nn.Module):
    """Three convolutions in a row, so that two groups of channels are free."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.middle, self.last = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.Conv2d(width, 2 * width, 1)
        self.head = nn.Linear(2 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.middle(torch.relu(self.norm(self.first(x)))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "chain": (Chain, 8),
    "resnet20": (ResNet20, 16),
    "wrn16_2": (WideResNet, 16),
    "resnet18": (lambda: torchvision_models().resnet18(weights=None, num_classes=10), 32),
    "densenet": (lambda: timm_model("densenet121", num_classes=10, block_config=(2, 2)), 32),
    "mobilenet_v2": (lambda: torchvision_models().mobilenet_v2(weights=None, num_classes=10, width_mult=0.25), 32),
    "regnet_y_400mf": (lambda: torchvision_models().regnet_y_400mf(weights=None, num_classes=10), 32),
}
CASES = [*((name, False) for name in NETS), ("resnet20", True)]


@cache
def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(NETS[name][0]())


def inputs(name: str, count: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    side = NETS[name][1]
    return (torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed)),)


@cache
def pivoted(name: str, groups: int, gather: bool) -> tuple[nn.Module, Pivoted]:
    return pivot_model(net(name), inputs(name), groups=groups, gather=gather)


def output(module: nn.Module, x: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(module).eval()(*x)


# --- the search ----------------------------------------------------------------------------------


def hidden_blocks(size: int, parts: int, seed: int = 0) -> tuple[FloatArray, FloatArray]:
    """Diagonal blocks, and the same with rows and columns in random orders."""
    rng = np.random.default_rng(seed)
    block = np.arange(size) * parts // size
    share = np.where(block[:, None] == block[None], rng.uniform(1, 2, (size, size)), 0.0)
    share /= share.sum()
    return share, share[rng.permutation(size)][:, rng.permutation(size)]


def test_the_own_order_of_columns_is_the_best_one() -> None:
    share = np.random.default_rng(0).random((6, 6))
    best = max(kept_share(share[:, list(order)], 3) for order in itertools.permutations(range(6)))
    assert kept_share(share[:, own_columns(share, 3)], 3) == pytest.approx(best)


@pytest.mark.parametrize("parts", [2, 4])
def test_blocks_that_were_hidden_by_a_permutation_are_found(parts: int) -> None:
    torch.manual_seed(0)
    model, x = Chain(16), torch.randn(1, 3, 8, 8)
    graph = trace_graph(model, (x,))
    _, shuffled = hidden_blocks(16, parts)
    orders = find_orders({"middle.weight": Mass(shuffled, (parts,))}, graph.prunable, restarts=8)
    assert set(orders) == {"first", "middle"}
    found = shuffled[orders["middle"]][:, orders["first"]]
    assert kept_share(found, parts) == pytest.approx(1.0)


def test_the_search_never_loses_to_the_order_that_there_is() -> None:
    graph = trace_graph(net("resnet20"), inputs("resnet20"))
    free, rng = movable_groups(net("resnet20"), inputs("resnet20"), graph), np.random.default_rng(0)
    for parts in ((2,), (4,), (2, 4)):
        shares = {}
        for parameter in graph.parameters:
            if len(parameter.shape) == 4 and parameter.shape[1] % 4 == 0:
                # What the order keeps already is almost all there is.
                mask = np.kron(np.eye(4), np.ones((parameter.shape[0] // 4, parameter.shape[1] // 4)))
                share = 20 * mask + rng.random(parameter.shape[:2])
                shares[parameter.name] = Mass(share / share.sum(), parts)
        orders = find_orders(shares, free, restarts=1)
        trial = copy.deepcopy(net("resnet20"))
        tensors = dict(trial.named_parameters())
        with torch.no_grad():
            for name, mass in shares.items():
                tensors[name].copy_(torch.from_numpy(mass.share)[..., None, None].expand_as(tensors[name]))
        permute_units(trial, graph, orders)
        after = sum(
            kept_share(tensors[name].detach()[:, :, 0, 0].double().numpy(), n) for name in shares for n in parts
        )
        assert after >= sum(kept_share(mass.share, n) for mass in shares.values() for n in parts) - 1e-5


def test_a_group_that_one_layer_reads_and_writes_is_ordered_too() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.turn, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head((x + self.turn(x)).mean((2, 3)))

    graph = trace_graph(Loop(), (torch.randn(1, 3, 4, 4),))
    block, order = np.arange(8) * 2 // 8, np.random.default_rng(3).permutation(8)
    share = (block[:, None] == block[None]).astype(float)[order][:, order] / 32
    found = find_orders({"turn.weight": Mass(share, (2,))}, graph.prunable, restarts=8)
    assert list(found) == ["stem"]
    assert kept_share(share[found["stem"]][:, found["stem"]], 2) > kept_share(share, 2)


# --- blocks on real nets -------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "gather"), CASES)
class TestEveryNet:
    def test_computes_what_the_model_does_with_zeros_outside_of_its_blocks(self, name: str, gather: bool) -> None:
        before, x = copy.deepcopy(net(name).state_dict()), inputs(name, seed=3)
        model, record = pivoted(name, 2, gather)
        assert record.layers and record.macs < record.whole_macs
        assert any(layer.gathered for layer in record.layers.values()) == gather
        assert all(torch.equal(value, net(name).state_dict()[key]) for key, value in before.items())
        assert count_macs(trace_graph(model, x), {}) == record.macs
        dense = densified(model, record)
        assert relative_error(output(model, x), output(dense, x)) < LIMIT
        ours = {k: tuple(v.shape) for k, v in dense.state_dict().items() if not k.endswith(".gather")}
        assert ours == {key: tuple(value.shape) for key, value in before.items()}
        kept = sum(int((dense.get_submodule(path).weight != 0).sum()) for path in record.layers)
        assert kept <= sum(net(name).get_submodule(path).weight.numel() for path in record.layers) // 2

    def test_layers_that_stay_whole_say_why(self, name: str, gather: bool) -> None:
        _, record = pivoted(name, 2, gather)
        layers = [n for n, m in net(name).named_modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear)]
        assert sorted(layers) == sorted([*record.layers, *record.skipped])
        for path, reason in record.skipped.items():
            layer = net(name).get_submodule(path)
            if isinstance(layer, nn.Linear):
                assert "linear" in reason
            else:
                assert ("depthwise" if layer.groups == layer.in_channels else
                        "groups" if layer.groups > 1 else "blocks do not divide") in reason  # fmt: skip


@pytest.mark.parametrize("gather", [False, True])
def test_a_model_whose_weights_lie_in_hidden_blocks_computes_what_it_did(gather: bool) -> None:
    torch.manual_seed(0)
    model, x = randomise(Chain(16)), torch.randn(2, 3, 8, 8)
    _, shuffled = hidden_blocks(16, 4, seed=2)
    with torch.no_grad():
        model.middle.weight.mul_(torch.from_numpy(shuffled > 0)[..., None, None])
    found, record = pivot_model(model, (x,), groups=4, layers=["middle"], gather=gather)
    assert record.layers["middle"].kept_share == pytest.approx(1) and record.permuted
    assert found.get_submodule("middle").groups == 4
    assert relative_error(output(found, (x,)), output(model, (x,))) < LIMIT


def densified(model: nn.Module, record: Pivoted) -> nn.Module:
    """The same model with whole layers, zero outside of their blocks: what blocks must compute."""
    whole = copy.deepcopy(model)
    for path, layer in record.layers.items():
        conv = whole.get_submodule(path)
        inputs_of, per_block = conv.in_channels, conv.out_channels // layer.groups
        weight = torch.zeros(conv.out_channels, inputs_of, *conv.weight.shape[2:])
        for number in range(layer.groups):
            rows = slice(number * per_block, (number + 1) * per_block)
            size = inputs_of // layer.groups
            weight[rows, number * size : (number + 1) * size] = conv.weight[rows].detach()
        conv.weight, conv.groups = nn.Parameter(weight), 1
    return whole


def test_a_mask_is_what_a_gathered_block_reads() -> None:
    weight = torch.ones(4, 4, 1, 1)
    mask = block_mask(weight, Blocks(2, np.array([3, 1, 0, 2])))[:, :, 0, 0]
    assert mask[:2].nonzero()[:, 1].tolist() == [1, 3, 1, 3] and mask[2:].nonzero()[:, 1].tolist() == [0, 2, 0, 2]


def test_one_order_serves_a_whole_residual_stream() -> None:
    _, record = pivoted("resnet18", 2, False)
    graph = trace_graph(net("resnet18"), inputs("resnet18"))
    stream = next(group for group in graph.groups if group.name == "conv1")
    assert {m.parameter for m in stream.members} > {"layer1.0.conv1.weight", "layer1.1.conv2.weight", "bn1.weight"}
    assert "conv1" in record.permuted


def test_ordering_keeps_more_than_the_order_that_there_is() -> None:
    _, record = pivoted("wrn16_2", 4, False)
    assert np.mean([layer.kept_share for layer in record.layers.values()]) > 0.26
    _, gathered = pivoted("wrn16_2", 4, True)
    for path, layer in record.layers.items():
        assert gathered.layers[path].kept_share >= layer.kept_share - 1e-9


def test_least_squares_bring_the_output_nearer() -> None:
    batches = [(inputs("resnet20", 32, seed)[0], torch.zeros(32)) for seed in (1, 2)]
    x, errors = inputs("resnet20", 32, 9), {}
    for refit in (False, True):
        model, _ = pivot_model(net("resnet20"), inputs("resnet20"), batches, groups=2, refit=refit)
        errors[refit] = float((output(model, x) - output(net("resnet20"), x)).square().mean())
    assert errors[True] < 0.7 * errors[False]


def test_the_result_is_pruned_saved_and_exported_like_any_model(tmp_path: Path) -> None:
    model, record = pivoted("resnet20", 4, False)
    x = inputs("resnet20")
    graph = trace_graph(model, x)
    keep = random_keep(graph, np.random.default_rng(0))
    smaller = compact_model(model, x, graph, keep)
    assert relative_error(output(smaller, x), output(mask_model(model, graph, keep), x)) < LIMIT
    assert {smaller.get_submodule(path).groups for path in record.layers} == {4}
    for name, gather in (("chain", False), ("resnet20", True)):
        saved, x = pivoted(name, 2, gather)[0], inputs(name)
        save_compact(saved, x, tmp_path, name=name)
        again = load_model(ModelSpec(file=f"{name}.pt2", inputs=(tuple(x[0].shape),)), tmp_path)
        assert relative_error(output(again, x), output(saved, x)) < LIMIT
        export_model(saved, x, tmp_path / f"{name}.onnx")  # checks its outputs
    write_record(tmp_path / "pivoted.json", record)
    assert read_record(Pivoted, tmp_path / "pivoted.json") == record


def test_a_record_says_what_came_of_it() -> None:
    _, record = pivoted("chain", 2, False)
    measured = replace(record, latency_share=Quantity(median=0.744, low=0.731, high=0.763), limit_share=0.8)
    text = describe_pivoted(measured)
    assert "0.744 [0.731, 0.763] of the latency" in text and "(asked for: 0.800)" in text
    assert "whole: has 3 inputs" in text and "middle" in text


def test_the_same_seed_gives_the_same_model() -> None:
    first, second = (pivot_model(net("chain"), inputs("chain"), groups=2)[0].state_dict() for _ in range(2))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_wrong_requests_are_refused() -> None:
    model, x = net("chain"), inputs("chain")
    with pytest.raises(UsageError, match="numbers of 2 or more"):
        pivot_model(model, x, groups=1)
    with pytest.raises(UsageError, match="no layer is called 'nothing'"):
        pivot_model(model, x, layers=["nothing"])
    with pytest.raises(ModelError, match=r"in diagonal blocks.*head is a linear layer.*7 blocks do not divide"):
        pivot_model(model, x, groups=7)
    with pytest.raises(ModelError, match="is used twice"):
        pivot_model(Shared(), (torch.randn(1, 8, 8, 8),), groups=2)


def test_layers_can_be_chosen() -> None:
    _, record = pivot_model(net("chain"), inputs("chain"), groups=2, layers=["mid*"])
    assert list(record.layers) == ["middle"] and record.skipped["last"] == "was not chosen"


# --- plans ---------------------------------------------------------------------------------------


class FakeBoard:
    """A board on which blocks save what they save in MACs, and a whole net takes 7 % of its layers' time more."""

    whole_s = 1.0

    def __init__(self, layers: int, overhead: float = 1.07) -> None:
        self.layers, self.overhead, self.measured = layers, overhead, []

    def seconds(self, path: str, blocks: Blocks | None) -> float:
        del path
        whole = 0.8 / self.layers
        return whole if blocks is None else whole / blocks.groups * (1 if blocks.columns is None else 1.2)

    def measure(self, chosen: dict[str, Blocks]) -> Quantity:
        seconds = 0.2 + sum(self.seconds(str(n), chosen.get(str(n))) for n in range(self.layers))
        share = seconds * self.overhead if chosen else 1.0
        self.measured.append(share)
        return Quantity(median=share, low=share, high=share)


@pytest.mark.parametrize("solver", ["milp", "dp"])
@pytest.mark.parametrize("limit", [0.5, 0.7, 0.9])
def test_the_loop_ends_just_within_the_limit_that_the_board_measures(solver: str, limit: float) -> None:
    board, rng = FakeBoard(12), np.random.default_rng(0)
    choices = {}
    for n in range(board.layers):
        losses = np.sort(rng.random(4)).tolist()
        forms = [Blocks(2, rng.permutation(8)), Blocks(2), Blocks(4), Blocks(8)]
        choices[str(n)] = _worthwhile(board, str(n), forms, losses)
        assert len(choices[str(n)]) == 5 and choices[str(n)][-1].blocks is None
    chosen, share = _close_loop(board, choices, limit, solver)
    assert 0.94 * limit <= share.median <= limit
    loss = sum(option.loss for n in choices for option in choices[n] if option.blocks is chosen.get(n))
    assert loss < sum(options[0].loss for options in choices.values())


def test_no_form_is_offered_that_another_beats() -> None:
    board = FakeBoard(1)
    slower = [Blocks(2), Blocks(4), Blocks(8, np.arange(8))]
    options = _worthwhile(board, "0", slower, [0.5, 0.2, 0.9])
    assert [None if each.blocks is None else each.blocks.groups for each in options] == [8, 4, None]
    assert _close_loop(board, {"0": options}, 0.01, "milp")[0] == {"0": slower[2]}, "the fastest, where nothing fits"


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    local = read_target(REPOSITORY / "targets" / "localhost.toml")
    with open_session(replace(local, workdir=str(tmp_path_factory.mktemp("board")), python=sys.executable)) as opened:
        yield opened


@pytest.mark.slow
def test_a_plan_prices_blocks_on_a_board(session: Session) -> None:
    torch.manual_seed(0)
    model, x = randomise(Chain(64)), torch.randn(1, 3, 16, 16)
    batches = [(torch.randn(64, 3, 16, 16), torch.zeros(64))]
    fastest, record = plan_pivot(model, (x,), batches, session, latency="0.01x", groups=(2,), effort=BRIEF)
    assert set(record.layers) | set(record.skipped) == {"first", "middle", "last", "head"}
    assert record.latency_share is not None and record.limit_share == pytest.approx(0.01)
    for layer in record.layers.values():
        assert layer.latency_s is not None and layer.whole_latency_s is not None and layer.loss is not None
        assert 0 < layer.latency_s < layer.whole_latency_s and layer.loss >= 0
    assert output(fastest, (x,)).shape == output(model, (x,)).shape
    assert (record.macs < record.whole_macs) == bool(record.layers)


def test_what_no_board_gains_by_stays_whole() -> None:
    board = FakeBoard(2)
    board.seconds = lambda path, blocks: 0.4 if blocks is None else 0.5  # type: ignore[method-assign]
    choices = {path: _worthwhile(board, path, [Blocks(2), Blocks(4)], [0.1, 0.2]) for path in "01"}  # type: ignore[arg-type]
    assert all(len(options) == 1 for options in choices.values())
    assert _close_loop(board, choices, 0.5, "milp")[0] == {}  # type: ignore[arg-type]
