"""One battery for every pattern: zeros where it says, which stay through training, folding, 8 bits and export."""

from __future__ import annotations

import copy
import math
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from digits import digits
from onnx import numpy_helper
from torch import Tensor, nn

from edgeprune.core.errors import DataError, ModelError, UnknownMember, UsageError
from edgeprune.core.family import list_members
from edgeprune.core.records import Graph, Precision, RecoverResult, Sparsity
from edgeprune.core.store import read_record, write_record
from edgeprune.export import export_model
from edgeprune.formats import _tflite_model as tflite_model
from edgeprune.inspect import inspect_file
from edgeprune.patterns import load_pattern, load_sparsifier, select_layers
from edgeprune.patterns._layers import Layer
from edgeprune.patterns._permutation import find_order, kept
from edgeprune.precisions import train_in_8_bits
from edgeprune.recover import evaluate_accuracy, recover_accuracy
from edgeprune.sparsify import order_channels, prepare_pattern, sparsify_model
from edgeprune.trace import trace_graph

torch.set_num_threads(1)
CHOSEN = {
    "block": ("rows=2,columns=4,sparsity=0.5", "rows=1,columns=4,sparsity=0.6,training=gradual,scope=global"),
    "n_m": ("n=2,m=4", "n=1,m=4,training=sr_ste"),
    "unstructured": (
        "sparsity=0.8", "sparsity=0.7,scope=global,training=gradual", "sparsity=0.8,training=regrow",
        "sparsity=0.8,training=surgery",
    ),
    "zeros": ("layers=*",),
}  # fmt: skip
ALL = [f"{name}:{options}" for name in list_members("patterns") for options in CHOSEN[name]]
INPUTS = (torch.zeros(2, 1, 8, 8),)


class Net(nn.Module):
    """A residual sum, a depthwise convolution, a flatten, batch norms everywhere, and a tiny layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.depth, self.depth_norm = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.outer, self.outer_norm = nn.Conv2d(16, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.hidden, self.head = nn.Linear(8 * 16, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        y = torch.relu(self.depth_norm(self.depth(torch.relu(self.inner_norm(self.inner(x))))))
        x = torch.relu(x + self.outer_norm(self.outer(y))).flatten(1)
        return self.head(torch.relu(self.hidden(x)))


@cache
def trained() -> tuple[nn.Module, Graph]:
    torch.manual_seed(0)
    net = Net().eval()
    recover_accuracy(net, digits(), epochs=4, lr=0.05, autocast=False)
    return net, trace_graph(net, INPUTS)


def start(chosen: str) -> nn.Module:
    """A trained net; for `zeros` one that has some."""
    net = copy.deepcopy(trained()[0])
    if chosen.startswith("zeros"):
        sparsify_model(net, "n_m:n=2,m=4,permute=false")
    return net


@cache
def sparse(chosen: str) -> tuple[nn.Module, RecoverResult]:
    model = start(chosen)
    return model, recover_accuracy(model, digits(), epochs=4, lr=0.05, autocast=False, pattern=chosen)


def zeros_of(model: nn.Module, chosen: str) -> dict[str, Tensor]:
    return {name: layer.weight.detach() == 0 for name, layer in select_layers(model, load_pattern(chosen))[0].items()}


def check_pattern(chosen: str, name: str, rows: np.ndarray) -> None:
    """Hold rows (out, places, in) of any file against the pattern, with nothing but their zeros to go by."""
    pattern = "n_m:n=2,m=4" if chosen.startswith("zeros") else chosen
    kind, _, text = pattern.partition(":")
    options = dict(item.split("=") for item in text.split(","))
    live = rows != 0
    assert live.any(), name
    if kind == "n_m":
        n, m = int(options["n"]), int(options["m"])
        assert (live.reshape(*live.shape[:2], -1, m).sum(axis=3) <= n).all(), name
    elif kind == "block":
        height, width = int(options["rows"]), int(options["columns"])
        tiles = live.reshape(live.shape[0] // height, height, live.shape[1], -1, width).any(axis=(1, 4))
        if "scope" not in options:
            assert abs(tiles.mean() - (1 - float(options["sparsity"]))) <= 0.5 / tiles.size + 1e-9, name
        # What is left lies in few tiles: scattered over all it would touch nearly every one.
        assert tiles.mean() <= live.mean() + 0.05, name
    elif "scope" not in options:
        assert live.sum() <= round((1 - float(options["sparsity"])) * live.size), name


@pytest.mark.parametrize("chosen", ALL)
class TestEveryPattern:
    def test_masks_have_the_pattern_and_are_their_own_fixed_point(self, chosen: str) -> None:
        net = start(chosen)
        pattern = load_pattern(chosen)
        layers, skipped = select_layers(net, pattern)
        masks = pattern.masks(layers)
        assert masks.keys() == layers.keys() and len(layers) >= 3
        assert "depth.weight" in skipped and "stem.weight" in skipped
        for name, mask in masks.items():
            assert mask.dtype == torch.bool and mask.shape == layers[name].weight.shape
            check_pattern(chosen, name, layers[name].matrix(mask).numpy())
        sparsify_model(net, chosen)
        again = copy.deepcopy(net)
        sparsify_model(again, chosen)
        for key, value in net.state_dict().items():
            assert torch.equal(value, again.state_dict()[key]), key

    def test_zeros_survive_every_step_and_the_net_learns(self, chosen: str) -> None:
        model, result = sparse(chosen)
        layers, _ = select_layers(model, load_pattern(chosen))
        for name, layer in layers.items():
            check_pattern(chosen, name, layer.matrix().numpy())
        assert result.zeroed == {name: int(zero.sum()) for name, zero in zeros_of(model, chosen).items()}
        assert result.accuracy_after is not None and result.accuracy_after > 0.85 and not result.note
        assert evaluate_accuracy(model, digits().test) == result.accuracy_after
        before = copy.deepcopy(model)
        sparsify_model(model, chosen)
        assert all(torch.equal(v, before.state_dict()[k]) for k, v in model.state_dict().items()), "training has it all"

    def test_a_killed_training_resumes_to_the_same_weights(self, chosen: str, tmp_path: Path) -> None:
        settings: dict[str, Any] = {"epochs": 2, "lr": 0.05, "autocast": False, "pattern": chosen}
        whole, path = start(chosen), tmp_path / "checkpoint"
        result = recover_accuracy(whole, digits(), **settings)

        def kill(_: str, done: int, __: int) -> None:
            if done == 23:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            recover_accuracy(start(chosen), digits(), checkpoint=path, progress=kill, **settings)
        resumed = start(chosen)
        assert recover_accuracy(resumed, digits(), checkpoint=path, **settings) == result
        for key, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[key]), key

    def test_it_is_recorded_layer_by_layer(self, chosen: str, tmp_path: Path) -> None:
        model, _ = sparse(chosen)
        record = sparsify_model(copy.deepcopy(model), chosen, before=trained()[0])
        zeros = zeros_of(model, chosen)
        assert {name: each.zeros for name, each in record.layers.items()} == {n: int(z.sum()) for n, z in zeros.items()}
        assert "depthwise" in record.skipped["depth.weight"] and "small" in record.skipped["stem.weight"]
        every = [p for name, p in model.named_parameters() if name in record.layers or name in record.skipped]
        assert record.weights == sum(p.numel() for p in every)
        assert record.zeros == sum(int((p == 0).sum()) for p in every) and 0.2 < record.share < 1
        assert all(each.kept_share is not None and 0 < each.kept_share < 1 for each in record.layers.values())
        write_record(tmp_path / "sparsity.json", record)
        assert read_record(Sparsity, tmp_path / "sparsity.json") == record

    @pytest.mark.parametrize("dtype", ["float32", "int8"])
    def test_an_onnx_file_holds_true_zeros(self, chosen: str, dtype: str, tmp_path: Path) -> None:
        model, _ = sparse(chosen)
        path = tmp_path / "model.onnx"
        batches = [(x[:2].numpy(),) for x, _ in digits().train]
        export_model(
            model, INPUTS, path, format="onnx", precision=Precision(dtype=dtype),
            calibration=batches if dtype == "int8" else None,
        )  # fmt: skip
        stored = weights_in_onnx(path)
        layers, _ = select_layers(model, load_pattern(chosen))
        expected = {name: layer.matrix().numpy() for name, layer in layers.items()}
        check_stored(chosen, expected, stored)

    def test_training_for_8_bits_keeps_the_zeros(self, chosen: str, tmp_path: Path) -> None:
        model = copy.deepcopy(sparse(chosen)[0])
        before = {name: zero.clone() for name, zero in zeros_of(model, chosen).items()}
        weights = {key: value.clone() for key, value in model.state_dict().items()}

        class Judge:
            scores = iter((1.0, 0.5, 0.9))

            def accuracy(self, *_: Any) -> float:
                return next(self.scores)

        outcome = train_in_8_bits(
            model, Precision(dtype="int8"), Judge(), digits(), tolerance=0.01, epochs=1, lr=0.01, pattern="zeros"
        )
        assert outcome.endswith("kept")
        assert any(not torch.equal(value, weights[key]) for key, value in model.state_dict().items()), "it trained"
        for name, zero in zeros_of(model, chosen).items():
            assert bool((zero >= before[name]).all()), name


def weights_in_onnx(path: Path) -> list[np.ndarray]:
    """Every weight as (out, places, in), stored integers as they are."""
    graph = onnx.load(path).graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    found = []
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        name = node.input[1]
        transposed = node.op_type == "MatMul" or any(a.name == "transB" and not a.i for a in node.attribute)
        transposed |= node.op_type == "Gemm" and not any(a.name == "transB" and a.i for a in node.attribute)
        while name not in values:
            transposed ^= makers[name].op_type == "Transpose"
            name = makers[name].input[0]
        value = values[name].T if transposed else values[name]
        found.append(np.moveaxis(value, 1, -1).reshape(value.shape[0], -1, value.shape[1]))
    return found


def check_stored(chosen: str, expected: dict[str, np.ndarray], stored: list[np.ndarray]) -> None:
    """Each layer is in the file, is zero where the model is, and has the pattern on every row."""
    for name, rows in expected.items():
        places = [i for i, got in enumerate(stored) if got.shape == rows.shape and not got[rows == 0].any()]
        assert places, f"{name} is not in the file with its zeros"
        check_pattern(chosen, name, stored[places[0]])
        assert np.count_nonzero(stored[places[0]]) > 0.5 * np.count_nonzero(rows), name


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("chosen", ["n_m:n=2,m=4", "block:rows=2,columns=4,sparsity=0.5"])
def test_a_tflite_file_holds_true_zeros(chosen: str, dtype: str, tmp_path: Path) -> None:
    model, _ = sparse(chosen)
    path, inputs = tmp_path / "model.tflite", (torch.zeros(1, 1, 8, 8),)
    batches = [(x[:2].numpy(),) for x, _ in digits().train]
    export_model(
        model, inputs, path, format="tflite", precision=Precision(dtype=dtype),
        calibration=batches if dtype == "int8" else None,
    )  # fmt: skip
    layers, _ = select_layers(model, load_pattern(chosen))
    expected = {name: layer.matrix().numpy() for name, layer in layers.items()}
    check_stored(chosen, expected, weights_in_tflite(path))


def weights_in_tflite(path: Path) -> list[np.ndarray]:
    """Every weight as (out, places, in), stored integers as they are."""
    model, _ = tflite_model.read(path)
    graph = model.subgraphs[0]
    found = []
    for operator, name in zip(graph.operators, tflite_model.operator_names(model), strict=True):
        if name in ("CONV_2D", "FULLY_CONNECTED"):
            values = tflite_model.constant(model, graph.tensors[operator.inputs[1]])
            assert values is not None
            found.append(values.reshape(values.shape[0], -1, values.shape[-1]))
    return found


def test_zeros_compress(tmp_path: Path) -> None:
    dense, sparse = trained()[0], copy.deepcopy(trained()[0])
    sparsify_model(sparse, "unstructured:sparsity=0.9")
    found = {
        name: export_model(model, INPUTS, tmp_path / f"{name}.onnx", format="onnx")
        for name, model in (("dense", dense), ("sparse", sparse))
    }
    for name, artifact in found.items():
        data = (tmp_path / f"{name}.onnx").read_bytes()
        assert artifact.bytes == len(data) and artifact.compressed_bytes == len(zlib.compress(data, 9))
        assert inspect_file(tmp_path / f"{name}.onnx").compressed_bytes == artifact.compressed_bytes
    assert abs(found["sparse"].bytes - found["dense"].bytes) < 100
    assert found["sparse"].compressed_bytes < 0.6 * found["dense"].compressed_bytes


def test_the_battery_covers_every_member() -> None:
    assert set(CHOSEN) == set(list_members("patterns"))


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ("n_m:n=5,m=4", "less than m"),
        ("n_m:n=4,m=4", "less than m"),
        ("n_m:n=0", "at least 1"),
        ("n_m:training=rigl", "hold, sr_ste"),
        ("n_m:decay=-1", "0 or more"),
        ("unstructured:sparsity=1", "above 0 and below 1"),
        ("unstructured:sparsity=nan", "above 0 and below 1"),
        ("unstructured:scope=net", "layer, global"),
        ("unstructured:training=rigl", "regrow"),
        ("unstructured:density=0.2", "not an option"),
        ("block:rows=0", "at least two weights"),
        ("block:rows=1,columns=1", "at least two weights"),
        ("block:sparsity=x", "expected float"),
        ("unstructured:layers=conv9", "names no"),
    ],
)
def test_bad_options_are_refused_in_words(chosen: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        sparsify_model(copy.deepcopy(trained()[0]), chosen)


def test_an_unknown_pattern_lists_the_known() -> None:
    with pytest.raises(UnknownMember, match="block, n_m, unstructured, zeros"):
        load_pattern("2:4")


def test_layers_that_cannot_have_it_say_why() -> None:
    net = nn.Sequential(nn.Conv2d(6, 32, 3), nn.ReLU(), nn.ConvTranspose2d(32, 16, 3), nn.Conv2d(16, 30, 3, groups=2))
    record = sparsify_model(net, "n_m:n=2,m=4")
    assert set(record.layers) == {"2.weight", "3.weight"}
    assert record.skipped == {"0.weight": "6 input channels are not divisible by 4"}
    with pytest.raises(ModelError, match=r"0\.weight: 6 input channels"):
        sparsify_model(net, "n_m:n=2,m=4,layers=0")
    assert "30 filters are not divisible by 4" in sparsify_model(net, "block:rows=4,columns=1").skipped["3.weight"]


def test_rows_are_along_input_channels_also_of_transposed_layers() -> None:
    for layer in (nn.Conv2d(8, 12, 3), nn.Linear(8, 12), nn.Conv1d(8, 12, 5), nn.ConvTranspose2d(8, 12, 3)):
        transposed = isinstance(layer, nn.ConvTranspose2d)
        view = Layer(layer.weight, transposed)
        matrix = view.matrix()
        weight = layer.weight.detach().transpose(0, 1) if transposed else layer.weight.detach()
        assert matrix.shape == (12, weight[0, 0].numel(), 8)
        assert torch.equal(matrix[3, 0], weight[3].flatten(1)[:, 0] if weight.ndim > 2 else weight[3])
        assert torch.equal(view.shaped(matrix), layer.weight)


def test_shared_and_computed_weights() -> None:
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    net[1].weight = net[0].weight
    nn.utils.parametrizations.weight_norm(net[2])
    record = sparsify_model(net, "unstructured:sparsity=0.5")
    assert set(record.layers) == {"0.weight"}
    assert "shares" in record.skipped["1.weight"] and "computed" in record.skipped["2.weight"]


def test_global_magnitudes_compete_but_no_layer_dies() -> None:
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with torch.no_grad():
        net[1].weight.mul_(1e-3)
    record = sparsify_model(net, "unstructured:sparsity=0.5,scope=global")
    first, second = record.layers["0.weight"], record.layers["1.weight"]
    assert first.zeros + second.zeros == 1024 and second.zeros == 1024 - 10


def test_gradual_goes_along_the_cubic() -> None:
    net = nn.Sequential(nn.Linear(64, 64))
    hook = load_sparsifier("unstructured:sparsity=0.9,training=gradual", net, steps=100)
    shares = []
    for _ in range(100):
        hook.after_step(0.1)
        shares.append(float((net[0].weight == 0).float().mean()))
    for step, share in enumerate(shares, 1):
        assert share == pytest.approx(0.9 * (1 - (1 - min(step / 75, 1)) ** 3), abs=1 / 4096)


def test_regrowth_takes_the_smallest_and_gives_where_the_gradient_is_largest() -> None:
    net = nn.Sequential(nn.Linear(32, 32))
    hook = load_sparsifier("unstructured:sparsity=0.5,training=regrow", net, steps=4)
    weight = net[0].weight
    before = hook.masks["0.weight"].clone()
    weight.grad = torch.randn_like(weight)
    gradient, size = weight.grad.clone(), weight.detach().abs()
    hook.after_backward()
    after = hook.masks["0.weight"]
    assert int(after.sum()) == int(before.sum())
    gone, come = before & ~after, after & ~before
    assert int(gone.sum()) == int(come.sum()) > 0
    dropped = int(0.15 * (1 + math.cos(math.pi / 3)) * int(before.sum()))
    assert size[gone].max() <= size[before].sort().values[dropped - 1]
    assert gradient.abs()[come].min() >= gradient.abs()[~after].max()
    assert bool((weight.grad[~after] == 0).all())


def test_remembered_weights_come_back() -> None:
    net = nn.Sequential(nn.Linear(16, 16))
    hook = load_sparsifier("n_m:n=2,m=4,training=sr_ste,decay=0.5", net, steps=10)
    weight = net[0].weight
    dense, mask = hook.held["dense/0.weight"].clone(), hook.masks["0.weight"].clone()
    weight.grad = torch.zeros_like(weight)
    hook.after_backward()
    assert torch.equal(weight, dense) and torch.allclose(weight.grad, 0.5 * dense * ~mask)
    with torch.no_grad():
        weight[~mask] = 10.0
    hook.after_step(0.1)
    now = hook.masks["0.weight"]
    assert not bool((now & mask).any()) and bool((weight[~now] == 0).all()), "what was masked took over"


def test_batches_without_a_length_are_refused() -> None:
    class Endless:
        test = None

        @property
        def train(self) -> Any:
            return iter(())

    with pytest.raises(DataError, match="length"):
        recover_accuracy(copy.deepcopy(trained()[0]), Endless(), pattern="n_m", epochs=1)


def test_a_regularizer_and_a_pattern_are_refused_together() -> None:
    net, graph = trained()
    with pytest.raises(UsageError, match="do not go together"):
        recover_accuracy(copy.deepcopy(net), digits(), regularizer="greg", graph=graph, pattern="n_m")


def test_swaps_keep_more_and_find_the_best_order_of_a_small_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    # The large columns all in one stripe: two have to leave it.
    rows = torch.rand(6, 8, generator=generator)
    rows[:, :4] += 10
    order = find_order(rows, 2, 4)
    assert sorted(order.tolist()) == list(range(8))
    assert kept(rows[:, order], 2, 4) > 1.5 * kept(rows, 2, 4)
    for seed in range(5):
        rows = torch.rand(32, 32, generator=torch.Generator().manual_seed(seed)) ** 4
        assert kept(rows[:, find_order(rows, 2, 4)], 2, 4) > 1.02 * kept(rows, 2, 4)


def test_another_order_of_channels_changes_no_output_and_keeps_more() -> None:
    net, graph = trained()
    plain, ordered = copy.deepcopy(net), copy.deepcopy(net)
    permuted = order_channels(ordered, INPUTS, graph, "n_m:n=2,m=4")
    assert permuted
    x = torch.cat([x for x, _ in digits().test])
    with torch.no_grad():
        assert torch.allclose(ordered(x), net(x), rtol=1e-4, atol=1e-4)
    assert any(not torch.equal(value, net.state_dict()[key]) for key, value in ordered.state_dict().items())
    before, after = (sparsify_model(model, "n_m:n=2,m=4") for model in (plain, ordered))

    def magnitude(record: Sparsity) -> float:
        return sum(each.kept_share or 0.0 for each in record.layers.values())

    assert magnitude(after) > magnitude(before)
    assert not order_channels(copy.deepcopy(net), INPUTS, graph, "n_m:permute=false")
    assert prepare_pattern(copy.deepcopy(net), INPUTS, graph, "n_m").permuted == permuted


class Halves(nn.Module):
    """Channels that are split by number: another order of them would be another model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 16, 3), nn.Conv2d(8, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(x).chunk(2, dim=1)
        return self.second(left * right)


def test_channels_that_are_split_keep_their_output() -> None:
    net = Halves().eval()
    inputs = (torch.randn(1, 4, 8, 8),)
    ordered = copy.deepcopy(net)
    order_channels(ordered, inputs, trace_graph(net, inputs), "n_m:n=1,m=2")
    with torch.no_grad():
        assert torch.allclose(ordered(*inputs), net(*inputs), rtol=1e-4, atol=1e-5)
