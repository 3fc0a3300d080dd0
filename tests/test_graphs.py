"""Capture and lift: a module made of the exported graph that trains, saves and exports like the first."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from exactness import LIMIT, random_keep, randomise, relative_error
from small_nets import NETS, Chain, WideResNet
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.core.errors import RecordError
from edgeprune.graphs.capture import capture, export_program, import_program, structure_sha256
from edgeprune.graphs.lift import lift
from edgeprune.graphs.portable import Portable
from edgeprune.graphs.slice import mask_model, slice_model
from edgeprune.trace import trace_graph

torch.set_num_threads(1)
IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def _train(module: nn.Module, images: Tensor, steps: int = 8) -> list[float]:
    targets = torch.arange(len(images)) % 5
    optimiser = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = functional.cross_entropy(module(images), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def test_lifted_model_has_the_same_layers_keys_and_outputs() -> None:
    module = randomise(WideResNet())
    lifted = lift(capture(module, (torch.randn(1, 3, 32, 32),))).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert relative_error(lifted(images), module(images)) < LIMIT
    assert lifted.state_dict().keys() == module.state_dict().keys()
    layers = {name: type(part) for name, part in module.named_modules() if not list(part.children())}
    assert {name: type(lifted.get_submodule(name)) for name in layers} == layers


def test_lifted_model_trains_as_the_first_does() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.PReLU(6), nn.GroupNorm(2, 6))
    module = randomise(Chain(8, net, 6))
    lifted = copy.deepcopy(lift(capture(module, (IMAGES[:1],))))
    ours, theirs = _train(lifted.train(), IMAGES), _train(module.train(), IMAGES)
    assert ours[-1] < 0.7 * ours[0]
    assert np.allclose(ours, theirs, rtol=1e-3)
    for key, tensor in module.state_dict().items():
        assert torch.allclose(lifted.state_dict()[key].float(), tensor.float(), atol=1e-4), key


def test_sliced_model_trains_and_leaves_the_dense_one_alone() -> None:
    module = randomise(NETS["squeeze_excite"]())
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    graph = trace_graph(module, (IMAGES[:1],))
    compact = slice_model(module, (IMAGES[:1],), graph, random_keep(graph, np.random.default_rng(0)))
    losses = _train(compact.train(), IMAGES)
    assert losses[-1] < losses[0]
    assert all(torch.equal(before[key], tensor) for key, tensor in module.state_dict().items())


def test_dropout_and_batch_norm_follow_the_mode() -> None:
    module = randomise(Chain(8, nn.Sequential(nn.BatchNorm2d(8), nn.Dropout(0.5)), 8))
    lifted = lift(capture(module, (IMAGES[:1],)))
    assert isinstance(lifted.get_submodule("middle.1"), nn.Dropout)
    lifted.train()
    assert not torch.equal(lifted(IMAGES), lifted(IMAGES))
    assert lifted.get_buffer("middle.0.num_batches_tracked") == 2
    lifted.eval()
    assert torch.equal(lifted(IMAGES), lifted(IMAGES))


def test_functional_dropout_becomes_a_layer_beside_its_caller() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return functional.dropout(self.inner(functional.dropout(x, 0.2, self.training)), 0.4, self.training)

    lifted = lift(capture(randomise(Chain(8, Noisy(), 8)), (IMAGES[:1],)))
    assert sorted(part.p for part in lifted.modules() if isinstance(part, nn.Dropout)) == [0.2, 0.4]


def test_a_module_called_twice_stays_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(functional.relu(self.inner(x)))

    module = randomise(Chain(8, Twice(), 8))
    graph = trace_graph(module, (IMAGES[:1],))
    assert {g.name: g.units for g in graph.prunable} == {"stem": 8}
    keep = {"stem": np.array([0, 2, 5])}
    compact = slice_model(module, (IMAGES[:1],), graph, keep).eval()
    assert sum(node.target == "middle.inner" for node in compact.graph.nodes) == 2
    with torch.no_grad():
        assert relative_error(compact(IMAGES), mask_model(module, graph, keep)(IMAGES)) < LIMIT


def test_tied_and_computed_weights_stay_where_they_are() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 8) / 4)
            self.scale = nn.Parameter(torch.rand(6, 1) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            y = functional.linear(x.permute(0, 2, 3, 1), self.weight * self.scale)
            return (y @ self.weight).permute(0, 3, 1, 2)

    module = randomise(Chain(8, Tied(), 8))
    graph = trace_graph(module, (IMAGES[:1],))
    assert {g.name: g.units for g in graph.prunable} == {"stem": 8, "middle": 6}
    keep = {"stem": np.arange(5), "middle": np.arange(1, 4)}
    compact = slice_model(module, (IMAGES[:1],), graph, keep).eval()
    with torch.no_grad():
        assert relative_error(compact(IMAGES), mask_model(module, graph, keep)(IMAGES)) < LIMIT
    assert compact.state_dict().keys() == module.state_dict().keys()


def test_structured_outputs_and_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(2, 6, 1), nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            both = self.a(x) + self.b(y)
            return {"mean": both.mean((1, 2, 3)), "map": self.c(both)}

    module, inputs = randomise(Two()), (torch.randn(1, 3, 4, 4), torch.randn(1, 2, 4, 4))
    lifted = lift(capture(module, inputs))
    with torch.no_grad():
        ours, theirs = lifted(*inputs), module(*inputs)
    assert ours.keys() == theirs.keys() and all(torch.allclose(ours[key], theirs[key], atol=1e-6) for key in ours)
    graph = trace_graph(module, inputs)
    assert graph.inputs == ("x", "y") and len(graph.outputs) == 2 and [g.name for g in graph.prunable] == ["a"]
    keep = {"a": np.array([1, 4])}
    with torch.no_grad():
        compact, masked = slice_model(module, inputs, graph, keep).eval()(*inputs), mask_model(module, graph, keep)
        assert all(torch.allclose(compact[key], value, atol=1e-6) for key, value in masked(*inputs).items())


def test_blocks_without_gradient_or_autocast_are_part_of_the_graph() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, enabled=False):
                y = self.inner(x)
                with torch.no_grad():
                    low, high = y.relu().chunk(2, 1)
            return self.outer(torch.cat([high, low], 1) + x)

    module = randomise(Chain(8, Blocks(), 8))
    graph = trace_graph(module, (IMAGES[:1],))
    assert not graph.unsupported and {"stem", "middle.outer"} <= {g.name for g in graph.prunable}
    keep = random_keep(graph, np.random.default_rng(0))
    with torch.no_grad():
        ours = slice_model(module, (IMAGES[:1],), graph, keep).eval()(IMAGES)
        assert relative_error(ours, mask_model(module, graph, keep)(IMAGES)) < LIMIT


def test_a_batch_the_model_fixes_is_captured_as_it_is() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, -1, 8, 8)

    module = randomise(Chain(8, Fixed(), 8))
    graph = trace_graph(module, (IMAGES[:2],))
    keep = {group.name: np.arange(group.units)[::2] for group in graph.prunable}
    compact = slice_model(module, (IMAGES[:2],), graph, keep).eval()
    with torch.no_grad():
        assert relative_error(compact(IMAGES[:2]), mask_model(module, graph, keep)(IMAGES[:2])) < LIMIT


def test_program_goes_through_a_file_and_back() -> None:
    module = randomise(NETS["channel_shuffle"]())
    graph = trace_graph(module, (IMAGES[:1],))
    compact = slice_model(module, (IMAGES[:1],), graph, random_keep(graph, np.random.default_rng(3)))
    file = io.BytesIO()
    torch.export.save(export_program(compact, (IMAGES[:1],)), file)
    file.seek(0)
    loaded = lift(import_program(torch.export.load(file))).eval()
    with torch.no_grad():
        assert relative_error(loaded(IMAGES), compact.eval()(IMAGES)) < LIMIT
    assert loaded.state_dict().keys() == compact.state_dict().keys()
    assert trace_graph(loaded, (IMAGES[:1],)).units == trace_graph(compact, (IMAGES[:1],)).units


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"nowhere": np.arange(2)}, "no group 'nowhere'"),
        ({"stem": np.array([], np.int64)}, "at least one"),
        ({"stem": np.array([1, 0])}, "ascending"),
        ({"stem": np.array([0, 8])}, "ascending"),
        ({"head": np.array([0, 1])}, "frozen"),
    ],
)
def test_units_that_do_not_fit_are_refused(keep: dict[str, np.ndarray], message: str) -> None:
    module = NETS["depthwise"]()
    graph = trace_graph(module, (IMAGES[:1],))
    with pytest.raises(RecordError, match=message):
        slice_model(module, (IMAGES[:1],), graph, keep)
    with pytest.raises(RecordError, match=message):
        mask_model(module, graph, keep)


def test_a_graph_of_another_model_is_refused() -> None:
    graph = trace_graph(NETS["depthwise"](), (IMAGES[:1],))
    with pytest.raises(RecordError, match="another model"):
        slice_model(NETS["grouped"](), (IMAGES[:1],), graph, {})


@pytest.mark.parametrize("name", ["grouped", "squeeze_excite", "heads", "gru", "shared", "gated"])
def test_a_model_that_travels_is_the_same_where_it_arrives(name: str) -> None:
    """By the names of its nodes and layers, which kept units and refits go by, and in what it computes."""
    torch.manual_seed(0)
    module = randomise(NETS[name]())
    sent = Portable(module, (IMAGES[:1],))
    came = pickle.loads(pickle.dumps(sent))
    assert sent.module is module
    assert structure_sha256(came.captured) == structure_sha256(sent.captured)
    assert came.module.state_dict().keys() == came.captured.state_dict().keys() == module.state_dict().keys()
    layers = {path for path, layer in module.named_modules(remove_duplicate=False) if isinstance(layer, nn.Conv2d)}
    found = {path for path, layer in came.module.named_modules(remove_duplicate=False) if isinstance(layer, nn.Conv2d)}
    assert found == layers
    with torch.no_grad():
        assert relative_error(came.module(IMAGES), module(IMAGES)) < LIMIT
    assert came.captured is not came.module and not came.module.training
