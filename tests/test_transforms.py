"""One battery for every transform, on real nets; then the eigenbasis against values computed another way."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from exactness import LIMIT, random_keep, randomise, relative_error
from small_nets import Chain, ResNet20, Shared, WideResNet
from synthetic import synthetic_importance, synthetic_profile
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.compact import compact_model
from edgeprune.core.cost import count_parameters
from edgeprune.core.errors import DataError, ModelError, UnknownMember, UsageError
from edgeprune.core.family import list_members, load_member
from edgeprune.core.progress import silent
from edgeprune.core.records import Budget, Graph, Kernel, Profile, Rewritten
from edgeprune.core.runfile import RunFile
from edgeprune.core.runfolder import RunFolder
from edgeprune.core.store import read_record
from edgeprune.export import export_model
from edgeprune.graphs.slice import mask_model
from edgeprune.load import Data
from edgeprune.pipeline import Stages, weights_digest
from edgeprune.plan import choose_widths
from edgeprune.recover import evaluate_accuracy
from edgeprune.run_checks import check_run_file
from edgeprune.score import score_groups
from edgeprune.statistics import kfac
from edgeprune.trace import trace_graph
from edgeprune.transform import inner_groups, restore_layers, settle_plan, transform_model
from edgeprune.transforms import kfe

torch.set_num_threads(1)
MEMBERS = list_members("transforms")


class Mixed(nn.Module):
    """Strided, biased and 1x1 convolutions, a residual sum, Conv1d, a linear layer on tokens; and what stays."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, 2, 1), nn.BatchNorm2d(12)
        self.inner, self.outer = nn.Conv2d(12, 16, (3, 1), padding=(1, 0), bias=False), nn.Conv2d(16, 12, 3, padding=1)
        self.depth, self.point = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 14, 1)
        self.rows = nn.Conv1d(14, 10, 3, padding=2, dilation=2)
        self.tokens, self.head = nn.Linear(10, 30), nn.Linear(30, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.outer(torch.relu(self.inner(x)))
        x = torch.relu(self.point(self.depth(x)))
        x = torch.relu(self.rows(x.mean(3))).transpose(1, 2)
        return self.head(torch.relu(self.tokens(x)).mean(1))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mixed": (Mixed, (3, 16, 16)),
    "resnet20": (ResNet20, (3, 32, 32)),
    "wrn16_2": (WideResNet, (3, 32, 32)),
}
ALL = {"kfe": "layers=*"}
"""Options with which a transform rewrites all that it can, worth it or not."""


@cache
def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(NETS[name][0]())


def inputs(name: str, count: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    return (torch.randn(count, *NETS[name][1], generator=torch.Generator().manual_seed(seed)),)


@cache
def transformed(transform: str, name: str, options: str = "") -> tuple[nn.Module, Rewritten]:
    calibration = [(inputs(name, 8, seed)[0], None) for seed in (1, 2)]
    return transform_model(net(name), calibration, transform=transform, options=options)


@cache
def graph_of(transform: str, name: str) -> Graph:
    return trace_graph(transformed(transform, name)[0], inputs(name))


def output(module: nn.Module, x: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(module).eval()(*x)


@pytest.mark.parametrize("transform", MEMBERS)
class TestEveryTransform:
    @pytest.mark.parametrize("name", NETS)
    def test_leaves_the_output_and_the_model_it_was_given_as_they_were(self, transform: str, name: str) -> None:
        before, x = copy.deepcopy(net(name).state_dict()), inputs(name, seed=3)
        for options in ("", ALL[transform]):
            model, rewritten = transformed(transform, name, options)
            assert relative_error(output(model, x), output(net(name), x)) < 1e-5
            assert rewritten.transform == transform and len(rewritten.layers) >= 3
            assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())
        assert all(torch.equal(value, before[key]) for key, value in net(name).state_dict().items())

    def test_training_goes_on_and_what_was_frozen_stays_frozen(self, transform: str) -> None:
        model = copy.deepcopy(net("mixed")).train()
        model.get_submodule("tokens").requires_grad_(False)
        new, rewritten = transform_model(
            model, [(inputs("mixed", 8)[0], None)], transform=transform, options="layers=*"
        )
        assert all(module.training for module in new.modules()) and "tokens" in rewritten.layers
        assert all(
            parameter.requires_grad != name.startswith("tokens.") and parameter.grad is None
            for name, parameter in new.named_parameters()
        )
        (x,), y = inputs("mixed", 32), torch.arange(32) % 5
        optimizer = torch.optim.SGD([p for p in new.parameters() if p.requires_grad], lr=0.02)
        losses = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = functional.cross_entropy(new(x), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]
        for path in set(rewritten.layers) - {"tokens"}:
            for name, parameter in new.get_submodule(path).named_parameters():
                assert parameter.grad is not None and bool(parameter.grad.any()), f"{path}.{name}"

    def test_the_groups_are_those_from_before_and_new_ones_that_can_be_pruned(self, transform: str) -> None:
        _, rewritten = transformed(transform, "mixed")
        graph, before = graph_of(transform, "mixed"), trace_graph(net("mixed"), inputs("mixed"))
        new = inner_groups(graph, rewritten.layers)
        assert len(new) >= len(rewritten.layers)
        assert all(group.frozen_because is None for group in graph.groups if group.name in new)
        old = sorted((group.units, group.frozen_because or "") for group in graph.groups if group.name not in new)
        assert old == sorted((group.units, group.frozen_because or "") for group in before.groups)

    @pytest.mark.parametrize("name", ["mixed", "resnet20"])
    def test_compacts_exactly_and_restores_after_it(self, transform: str, name: str) -> None:
        (model, rewritten), graph, x = transformed(transform, name), graph_of(transform, name), inputs(name, 3, 5)
        keep = random_keep(graph, np.random.default_rng(1))
        smaller = compact_model(model, inputs(name), graph, keep).eval()
        expected = output(mask_model(model, graph, keep), x)
        assert relative_error(output(smaller, x), expected) < LIMIT
        restore_layers(smaller, rewritten.layers, transform)
        assert relative_error(output(smaller, x), expected) < LIMIT
        assert {key for key in smaller.state_dict() if key.endswith("weight")} == {
            key for key in net(name).state_dict() if key.endswith("weight")
        }

    def test_a_sliced_copy_of_the_users_own_module_is_restored_too(self, transform: str) -> None:
        (model, rewritten), graph, x = transformed(transform, "mixed"), graph_of(transform, "mixed"), inputs("mixed")
        keep, own = random_keep(graph, np.random.default_rng(2)), copy.deepcopy(model)
        compact_model(own, x, graph, keep, in_place=True)
        expected = output(own, x)
        assert type(restore_layers(own, rewritten.layers, transform)) is Mixed
        assert relative_error(output(own, x), expected) < LIMIT

    def test_restored_before_pruning_it_is_the_model_it_was(self, transform: str) -> None:
        model, rewritten = transformed(transform, "resnet20")
        back = restore_layers(copy.deepcopy(model), rewritten.layers, transform)
        state = net("resnet20").state_dict()
        assert list(back.state_dict()) == list(state)
        for key, value in back.state_dict().items():
            assert torch.allclose(value, state[key], rtol=1e-4, atol=1e-6), key

    def test_exports_with_parity_once_compacted(self, transform: str, tmp_path: Path) -> None:
        model, graph, x = transformed(transform, "mixed")[0], graph_of(transform, "mixed"), inputs("mixed")
        keep = random_keep(graph, np.random.default_rng(3))
        smaller = compact_model(model, x, graph, keep).eval()
        export_model(smaller, x, tmp_path / "m.onnx", graph=graph)
        (got,) = load_member("formats", "onnx").run(tmp_path / "m.onnx", [x[0].numpy()])
        assert relative_error(torch.from_numpy(got), output(smaller, x)) < LIMIT

    def test_its_structure_can_be_made_again_for_its_weights(self, transform: str) -> None:
        model, rewritten = transformed(transform, "mixed")
        again = copy.deepcopy(net("mixed"))
        load_member("transforms", transform).rebuild(again, rewritten.layers)
        assert torch.allclose(output(again, inputs("mixed")), output(net("mixed"), inputs("mixed")), atol=1e-5)
        again.load_state_dict(model.state_dict())
        assert torch.equal(output(again, inputs("mixed")), output(model, inputs("mixed")))

    def test_two_runs_are_alike(self, transform: str) -> None:
        (model, _), calibration = transformed(transform, "mixed"), [(inputs("mixed", 8, s)[0], None) for s in (1, 2)]
        again = transform_model(net("mixed"), calibration, transform=transform)[0]
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())

    def test_bad_input_is_refused_with_a_reason(self, transform: str) -> None:
        good = [(inputs("mixed")[0], None)]
        for calibration in (None, []):
            with pytest.raises(DataError, match=r"calibration"):
                transform_model(net("mixed"), calibration, transform=transform)
        with pytest.raises(DataError, match="not finite"):
            transform_model(net("mixed"), [(inputs("mixed")[0] * float("nan"), None)], transform=transform)
        with pytest.raises(DataError, match=r"does not run on calibration inputs of shape \[\(2, 1, 16, 16\)\]"):
            transform_model(net("mixed"), [(inputs("mixed")[0][:, :1], None)], transform=transform)
        with pytest.raises(UsageError, match="not an option"):
            transform_model(net("mixed"), good, transform=transform, options="no_such_option=1")
        with pytest.raises(DataError, match=r"classifier"):
            transform_model(nn.Sequential(net("mixed"), nn.Unflatten(1, (5, 1))), good, transform=transform)
        with pytest.raises(ModelError, match=r"no layer.*grouped convolution"):
            transform_model(nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
                            good, transform=transform)  # fmt: skip


def test_an_unknown_transform_lists_the_known() -> None:
    with pytest.raises(UnknownMember, match=r"kfe"):
        transform_model(net("mixed"), [(inputs("mixed")[0], None)], transform="nonsense")


# --- which layers --------------------------------------------------------------------------------


def test_layers_are_chosen_by_what_they_would_save() -> None:
    assert kfe.break_even(torch.zeros(64, 64, 3, 3)) == pytest.approx((-2 + 328**0.5) / 18)
    assert kfe.break_even(torch.zeros(10, 10)) == pytest.approx(2**0.5 - 1)
    share = kfe.break_even(torch.zeros(50, 30, 5))
    assert 30 * 30 * share + 50 * 50 * share + 30 * 50 * 5 * share**2 == pytest.approx(50 * 30 * 5)
    _, rewritten = transformed("kfe", "mixed")
    assert rewritten.layers == ("stem", "inner", "outer", "rows")
    assert rewritten.skipped == {
        "depth": "is a grouped convolution",
        "point": "would be smaller only with less than 41% of its new channels left",
        "tokens": "would be smaller only with less than 28% of its new channels left",
        "head": "would be smaller only with less than 16% of its new channels left",
    }
    assert transformed("kfe", "mixed", "layers=point rows")[1].layers == ("point", "rows")
    with pytest.raises(UsageError, match=r"'stern'.*stem, inner"):
        transform_model(net("mixed"), [(inputs("mixed")[0], None)], options="layers=stern")
    assert transformed("kfe", "mixed", "share=0.4")[1].layers == ("stem", "inner", "outer", "point", "rows")


def test_layers_that_cannot_be_split_say_why() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.circular = nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(8, 8, 3, padding_mode="circular")
            self.same, self.unused = nn.Conv2d(8, 8, 3, padding="same"), nn.Conv2d(8, 8, 3)
            self.computed = nn.utils.spectral_norm(nn.Conv2d(8, 8, 3, padding=1))
            self.shared, self.plain = Shared(), nn.Conv2d(6, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.plain(self.shared(self.computed(self.same(self.circular(self.up(x))))))

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Odd(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    found = transform_model(model, [(torch.randn(4, 3, 8, 8), None)], options="layers=*")[1]
    assert found.layers == ("0", "1.shared.point", "1.plain")
    assert found.skipped == {
        "1.up": "is a ConvTranspose2d, not a plain Conv1d, Conv2d or Linear",
        "1.circular": "pads with something else than a number of zeros",
        "1.same": "pads with something else than a number of zeros",
        "1.unused": "does not run on the calibration examples, or gets no gradient",
        "1.computed": "has a weight that is computed from others",
        "1.shared.first": "is a grouped convolution",
        "1.shared.left": "is used, or its weight is, under two names",
        "1.shared.right": "is used, or its weight is, under two names",
    }


def test_a_layer_that_is_called_twice_stays_one_layer() -> None:
    model = Chain(8, Shared(), 6).eval()
    x = torch.randn(3, 3, 8, 8)
    new, found = transform_model(model, [(x, None)], options="layers=middle.point")
    graph = trace_graph(new, (x,))
    keep = {name: np.arange(5) for name in inner_groups(graph, found.layers)}
    assert len(keep) == 2
    smaller = compact_model(new, (x,), graph, keep).eval()
    expected = output(smaller, (x,))
    assert relative_error(output(restore_layers(smaller, found.layers, "kfe"), (x,)), expected) < LIMIT
    assert smaller.get_submodule("middle.point").weight.shape == (8, 8, 1, 1)


def test_code_that_looks_into_a_layer_is_an_error_and_says_so() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return functional.conv2d(x, self.conv.weight).mean((2, 3))

    with pytest.raises(ModelError, match=r"looks into a layer.*'weight'.*layers="):
        transform_model(Looks(), [(torch.randn(2, 3, 8, 8), None)])


# --- the eigenbasis ------------------------------------------------------------------------------


@cache
def two_linear() -> tuple[nn.Module, Tensor]:
    """A linear net, and one batch of examples."""
    torch.manual_seed(1)
    x = torch.randn(kfac.BATCH, 6) @ torch.randn(6, 6)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).eval(), x


def drawn_gradients(model: nn.Module, x: Tensor) -> Tensor:
    """Of the summed loss at the first layer's output, with the labels that the statistic draws, by hand."""
    with torch.no_grad():
        p = model(x).softmax(1)
    drawn = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(0)).squeeze(1)
    return ((p - functional.one_hot(drawn, 4)) @ model[1].weight).detach().double()  # type: ignore[index]


def test_a_linear_layer_is_turned_into_the_eigenvectors_of_its_two_factors() -> None:
    model, x = two_linear()
    new, found = transform_model(model, [(x, None)], options="layers=0")
    first, core, last = (new.get_submodule(f"0.{part}") for part in kfe.PARTS)
    g, a = drawn_gradients(model, x), x.double()
    for basis, moments in ((first.weight.detach().double(), a.T @ a), (last.weight.detach().double().T, g.T @ g)):
        turned = basis @ moments @ basis.T
        values = torch.linalg.eigvalsh(moments).flip(0)
        assert torch.allclose(turned, values.diag(), atol=1e-4 * float(values[0])), "diagonal, the largest first"
        assert torch.allclose(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), atol=1e-5)
    assert torch.allclose(last.weight @ core.weight @ first.weight, model[0].weight, atol=1e-5)  # type: ignore[index]
    assert torch.equal(last.bias, model[0].bias) and first.bias is None and core.bias is None  # type: ignore[index]
    assert found.layers == ("0",)


def test_the_score_is_the_damage_of_each_row_and_column_by_the_eigenvalues() -> None:
    model, x = two_linear()
    new, _ = transform_model(model, [(x, None)], options="layers=0")
    graph = trace_graph(new, (x[:2],))
    scores = score_groups(new, (x[:2],), graph, [(x, None)], criterion="eigen_damage", curves=False).scores
    g, a, w = drawn_gradients(model, x), x.double(), new.get_submodule("0.core").weight.detach().double()
    of_inputs = torch.linalg.eigvalsh(a.T @ a).flip(0) / len(x)
    of_outputs = torch.linalg.eigvalsh(g.T @ g).flip(0) / len(x)
    damage = [[0.5 * w[i, j] ** 2 * of_outputs[i] * of_inputs[j] for j in range(6)] for i in range(5)]
    rows = [float(sum(damage[i])) for i in range(5)]
    columns = [float(sum(row[j] for row in damage)) for j in range(6)]
    for name, expected in (("0.rotate_in", columns), ("0.core", rows)):
        assert np.allclose(scores[name], expected, rtol=1e-3, atol=1e-6 * max(expected)), name
    assert sum(rows) == pytest.approx(sum(columns))


def test_a_layer_that_only_bears_the_name_of_the_middle_one_is_scored_like_any_other() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 4)]
    x, scores = torch.randn(8, 6), []
    for names in ("abc", ("a", "core", "c")):
        model = nn.Sequential(OrderedDict(m=nn.Sequential(OrderedDict(zip(names, layers, strict=True))))).eval()
        graph = trace_graph(model, (x,))
        importance = score_groups(model, (x,), graph, [(x, None)], criterion="eigen_damage", curves=False)
        scores.append([importance.scores[group.name] for group in graph.prunable])
    assert len(scores[0]) == 2 and all(np.allclose(*pair) for pair in zip(*scores, strict=True))


def off_diagonal(model: nn.Module, graph: Graph, layer: str, x: Tensor) -> tuple[float, float]:
    """Share of the squared moments that is off the diagonal: of a layer's inputs over channels, and of its outputs."""
    fill = next(kfac.collect(copy.deepcopy(model), graph, [((x,), None)]))
    members = [m for g in graph.prunable for m in g.members if m.parameter == f"{layer}.weight"]
    view = fill(members[0])["layer"]
    taps = prod(dict(model.named_modules())[layer].weight.shape[2:])
    channels = view.inputs[0][taps // 2 :: taps, taps // 2 :: taps]
    shares = []
    for moments in (channels, view.outputs[0]):
        diagonal = moments.diagonal().square().sum()
        shares.append(float(1 - diagonal / moments.square().sum()))
    return shares[0], shares[1]


def test_factors_of_a_convolution_are_over_channels_and_diagonal_after_it() -> None:
    x = inputs("mixed", 8, 1)[0]
    new, _ = transform_model(net("mixed"), [(x, None)])
    graph, before = graph_of("kfe", "mixed"), trace_graph(net("mixed"), inputs("mixed"))
    path = "outer"  # of stride 1, so that the middle tap reads every place
    assert max(off_diagonal(new, graph, f"{path}.core", x)) < 1e-6
    assert min(off_diagonal(net("mixed"), before, path, x)) > 0.01
    groups = [group for group in graph.prunable if group.name in inner_groups(graph, [path])]
    assert [(group.name, group.units) for group in groups] == [(f"{path}.rotate_in", 16), (f"{path}.core", 12)]
    assert [[m.parameter.rsplit(".", 2)[1] for m in group.members] for group in groups] == [
        ["rotate_in", "core"], ["core", "rotate_out"],
    ]  # fmt: skip


def test_a_pruned_layer_is_turned_again_without_a_second_pair() -> None:
    x = inputs("mixed", 8, 1)[0]
    graph, found = graph_of("kfe", "mixed"), transformed("kfe", "mixed")[1]
    keep = random_keep(graph, np.random.default_rng(4))
    pruned = compact_model(transformed("kfe", "mixed")[0], inputs("mixed"), graph, keep).eval()
    again, refound = transform_model(pruned, [(x, None)], options="layers=outer")
    assert refound.layers == found.layers and not refound.skipped
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in pruned.state_dict().items()}
    assert relative_error(output(again, (x,)), output(pruned, (x,))) < 1e-5
    after = trace_graph(again, inputs("mixed"))
    assert max(off_diagonal(again, after, "outer.core", x)) < 1e-6 < min(off_diagonal(pruned, after, "outer.core", x))
    assert relative_error(output(restore_layers(again, refound.layers, "kfe"), (x,)), output(pruned, (x,))) < LIMIT


def test_restored_after_pruning_it_is_of_the_rank_that_was_kept() -> None:
    model, x = two_linear()
    new, found = transform_model(model, [(x, None)], options="layers=0")
    graph = trace_graph(new, (x[:2],))
    smaller = compact_model(new, (x[:2],), graph, {"0.core": np.array([0, 2]), "0.rotate_in": np.array([0, 1, 4])})
    weight = restore_layers(smaller, found.layers, "kfe").get_submodule("0").weight
    assert weight.shape == (5, 6) and int(torch.linalg.matrix_rank(weight.detach(), atol=1e-5)) == 2


# --- what pays -----------------------------------------------------------------------------------


def test_parameters_decide_where_nothing_was_measured() -> None:
    (model, rewritten), graph = transformed("kfe", "mixed"), graph_of("kfe", "mixed")
    assert kfe.unpaid_layers(graph, {}) == list(rewritten.layers)
    for seed in range(4):
        keep, smaller = random_keep(graph, np.random.default_rng(seed), least=0.3), copy.deepcopy(model)
        compact_model(smaller, inputs("mixed"), graph, keep, in_place=True)
        unpaid = []
        for path in rewritten.layers:
            parts = sum(p.numel() for n, p in smaller.named_parameters() if n.startswith(path) and p.ndim > 1)
            merged = restore_layers(copy.deepcopy(smaller), [path], "kfe").get_submodule(path)
            if parts >= merged.weight.numel():
                unpaid.append(path)
        assert kfe.unpaid_layers(graph, {name: len(kept) for name, kept in keep.items()}) == unpaid


def priced(graph: Graph, seconds: Callable[[Kernel], float]) -> Profile:
    """A profile whose kernels take times that grow with either size."""
    profile, tables = synthetic_profile(graph, tile=1), {}
    kernels = tuple(replace(kernel, signature=kernel.name) for kernel in profile.kernels)
    for kernel in kernels:
        sizes = np.array([1, 64])
        tables[kernel.name] = replace(
            profile.tables[0], signature=kernel.name, in_sizes=sizes, out_sizes=sizes, tile_in=1, tile_out=1,
            latency_s=seconds(kernel) * np.outer(sizes, sizes) / 64**2,
        )  # fmt: skip
    return replace(profile, kernels=kernels, tables=tuple(tables.values()))


def test_a_profile_prices_the_added_layers() -> None:
    graph = graph_of("kfe", "mixed")
    weight = {node.name: node.parameters[0] for node in graph.nodes if node.parameters}
    widths = {group.name: group.units // 2 for group in graph.prunable if group.name.startswith("inner.")}
    rotation = {node for node, name in weight.items() if "rotate" in name}
    free = priced(graph, lambda kernel: 1e-9 if kernel.nodes[0] in rotation else 1e-3)
    dear = priced(graph, lambda kernel: 1e-3)
    assert "inner" not in kfe.unpaid_layers(graph, widths, free)
    assert "inner" in kfe.unpaid_layers(graph, widths, dear), "12 x 6 + 6 x 8 + 8 x 16 for 12 x 16"
    assert set(transformed("kfe", "mixed")[1].layers) - {"inner"} <= set(kfe.unpaid_layers(graph, widths, free))


def test_a_plan_leaves_whole_what_does_not_pay_and_puts_it_back() -> None:
    (model, rewritten), graph, x = transformed("kfe", "mixed"), graph_of("kfe", "mixed"), inputs("mixed")
    importance, profile = synthetic_importance(graph, curves=False), synthetic_profile(graph)
    plan = choose_widths(graph, profile, importance, Budget(artifact_bytes=14_000), compare=())
    settled, layers = settle_plan(graph, plan, "kfe")
    whole = inner_groups(graph, layers)
    assert layers and set(layers) < set(rewritten.layers), "some pay and some do not"
    assert settled.keep == {k: v for k, v in plan.keep.items() if k not in whole}
    smaller = restore_layers(compact_model(model, x, graph, settled.keep), layers, "kfe")
    assert sum(p.numel() for p in smaller.parameters()) <= count_parameters(graph, plan.widths)
    assert relative_error(output(smaller, x), output(mask_model(model, graph, settled.keep), x)) < LIMIT


def test_code_that_computes_something_else_with_other_layers_is_an_error() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((2, 3)) * len(list(self.modules()))

    with pytest.raises(ModelError, match=r"computes something else.*layers="):
        transform_model(Counts(), [(torch.randn(2, 3, 8, 8), None)], options="layers=conv")


def test_layers_that_are_not_split_cannot_be_restored() -> None:
    with pytest.raises(ModelError, match=r"'linear' is not in its eigenbasis"):
        restore_layers(copy.deepcopy(net("resnet20")), ["linear"], "kfe")


# --- a run ---------------------------------------------------------------------------------------


def run_file(**sections: Any) -> RunFile:
    parts: dict[str, Any] = {
        "model": {"factory": "nets.py:net"}, "data": {"source": "nets.py:source"}, "target": {"name": "embedded"},
        "budget": {"size": "0.6x"}, "output": {"dir": "run"},
        "prune": {"transform": "kfe", "criterion": "taylor", "curves": False},
    }  # fmt: skip
    return msgspec.convert({**parts, **sections}, RunFile)


def stages_of(run: RunFile, folder: Path) -> Stages:
    generator = torch.Generator().manual_seed(0)
    batches = [(inputs("mixed", 16, seed)[0], torch.randint(0, 5, (16,), generator=generator)) for seed in (1, 2)]
    data = Data(calibration=batches, test=batches)
    model, sources = copy.deepcopy(net("mixed")), (weights_digest(net("mixed")),)
    return Stages(
        run, folder, RunFolder(folder), sources, model, inputs("mixed"), data, silent, start=model
    ).transformed()


def test_a_run_keeps_its_rewritten_model_and_puts_back_what_does_not_pay(tmp_path: Path) -> None:
    first = stages_of(run_file(), tmp_path)
    rewritten = read_record(Rewritten, tmp_path / "transformed.json")
    assert rewritten.layers == ("stem", "inner", "outer", "rows") and set(rewritten.skipped) > {"depth"}
    graph, x = first.trace(), inputs("mixed", 4, 7)
    importance, profile = first.score(graph), synthetic_profile(graph)
    plan = choose_widths(graph, profile, importance, Budget(artifact_bytes=14_000), compare=())
    smaller, accuracy = first.compact(graph, plan)
    unpaid = kfe.unpaid_layers(graph, plan.widths)
    split = [path for path in rewritten.layers if f"{path}.core.weight" in smaller.state_dict()]
    assert unpaid and split == [path for path in rewritten.layers if path not in unpaid]
    assert accuracy.dense == pytest.approx(evaluate_accuracy(net("mixed"), first.data.test), abs=1e-6)

    torch.manual_seed(5)
    again = stages_of(run_file(), tmp_path)
    assert all(torch.equal(value, again.model.state_dict()[key]) for key, value in first.model.state_dict().items())
    resumed, _ = again.compact(again.trace(), plan)
    assert torch.equal(output(resumed, x), output(smaller, x))
    dense = first.export_dense(graph)
    (got,) = load_member("formats", "onnx").run(Path(dense.path), [inputs("mixed")[0].numpy()])
    assert relative_error(torch.from_numpy(got), output(net("mixed"), inputs("mixed"))) < LIMIT
    assert not any("rotate" in key.name for key in onnx.load(dense.path).graph.initializer), "of the original model"


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"budget": {"latency": "0.5x"}}, r"latency = '0.5x' would be relative to the rewritten model"),
        ({"budget": {"size": "0.5x", "memory": "50%"}}, r"memory = '50%'"),
        ({"export": {"dtype": "int8"}}, r"dtype = 'int8'; use float32"),
        ({"prune": {"transform": "kfe", "pivot": [2]}}, r"pivot and transform do not go together"),
        ({"prune": {"transform": "nonsense"}}, r"unknown transforms 'nonsense'; known: kfe"),
        ({"prune": {"transform": "kfe:p=2"}}, r"'p' is not an option of kfe; known: layers, share"),
    ],
)
def test_a_run_refuses_what_a_transform_cannot_have(sections: dict[str, Any], said: str, tmp_path: Path) -> None:
    run = run_file(**sections)
    with pytest.raises(UsageError, match=said):
        check_run_file(run)
        stages_of(run, tmp_path)
