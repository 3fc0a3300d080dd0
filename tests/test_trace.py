"""What a traced graph says: groups, extents, names, reasons, identity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from exactness import LIMIT, random_keep, randomise, relative_error
from small_nets import NETS, Chain, ResNet20, WideResNet
from torch import Tensor, nn

from edgeprune.core.errors import ModelError
from edgeprune.core.records import Graph
from edgeprune.core.store import read_record, write_record
from edgeprune.core.units import Units
from edgeprune.graphs.slice import mask_model, slice_model
from edgeprune.trace import trace_graph

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def resnet20() -> tuple[nn.Module, Graph]:
    module = randomise(ResNet20())
    return module, trace_graph(module, (torch.randn(1, 3, 32, 32),))


def test_option_a_stages_share_and_add_channels(resnet20: tuple[nn.Module, Graph]) -> None:
    _, graph = resnet20
    widths = {g.name: g.units for g in graph.prunable}
    assert widths["conv1"] == 16 and widths["layer2.0.conv2"] == 16 and widths["layer3.0.conv2"] == 32
    assert sum(name.endswith("conv1") for name in widths) == 10
    extents = {p.name: p.extents for p in graph.parameters}
    assert dict(extents["layer2.0.conv2.weight"][0].groups) == {"conv1": 1, "layer2.0.conv2": 1}
    assert dict(extents["linear.weight"][1].groups) == {"conv1": 1, "layer2.0.conv2": 1, "layer3.0.conv2": 1}
    padded = next(g for g in graph.groups if g.name == "layer2.0.conv2")
    assert {(c.argument, int(c.count.sum())) for c in padded.constants} == {((1, 4), 8), ((1, 5), 8)}


def test_extents_give_full_sizes_and_members_cover_them(resnet20: tuple[nn.Module, Graph]) -> None:
    _, graph = resnet20
    for sizes, extents in [(n.out_shape, n.out_extents) for n in graph.nodes] + [
        (p.shape, p.extents) for p in graph.parameters
    ]:
        assert tuple(extent.size({}, graph.units) for extent in extents) == sizes
    for parameter in graph.parameters:
        for axis, extent in enumerate(parameter.extents):
            members = [m for g in graph.groups for m in g.members if (m.parameter, m.axis) == (parameter.name, axis)]
            positions = np.concatenate([m.index.ravel() for m in members]) if members else np.zeros(0)
            assert sorted(positions) == (list(range(parameter.shape[axis])) if extent.groups else [])
    for group in graph.groups:
        assert all(m.index.shape[0] == group.units for m in group.members)
        assert all(c.count.shape == (group.units,) for c in group.constants)


def test_predicted_shapes_are_those_of_the_sliced_model(resnet20: tuple[nn.Module, Graph]) -> None:
    module, graph = resnet20
    example = torch.randn(1, 3, 32, 32)
    keep = random_keep(graph, np.random.default_rng(0))
    widths = {name: len(units) for name, units in keep.items()}
    again = trace_graph(slice_model(module, (example,), graph, keep), (example,))
    for ours, theirs in zip(graph.nodes, again.nodes, strict=True):
        assert ours.op == theirs.op
        assert tuple(extent.size(widths, graph.units) for extent in ours.out_extents) == theirs.out_shape


def test_roles_paths_and_attributes(resnet20: tuple[nn.Module, Graph]) -> None:
    _, graph = resnet20
    inner = next(g for g in graph.groups if g.name == "layer1.0.conv1")
    assert {(m.parameter, m.axis, m.role) for m in inner.members} == {
        ("layer1.0.conv1.weight", 0, "out"),
        ("layer1.0.conv2.weight", 1, "in"),
        *((f"layer1.0.bn1.{name}", 0, "out") for name in ("weight", "bias", "running_mean", "running_var")),
    }
    stem = next(n for n in graph.nodes if n.op == "conv2d")
    assert (stem.path, stem.inputs, stem.parameters) == ("conv1", ("x",), ("conv1.weight",))
    assert stem.attributes["kernel_size"] == [3, 3] and stem.attributes["stride"] == [1, 1]
    assert graph.inputs == ("x",) and graph.nodes[0].op == "input" and graph.nodes[0].out_shape == (1, 3, 32, 32)
    assert graph.outputs == ("linear",) and not graph.unsupported
    views = {n.op for n in graph.nodes if n.view}
    assert "view" in views and not views & {"conv2d", "batch_norm", "add", "avg_pool2d"}


def test_frozen_groups_say_why(resnet20: tuple[nn.Module, Graph]) -> None:
    frozen = {g.frozen_because for g in resnet20[1].groups if g.frozen_because}
    assert frozen == {"reads model input 'x' at 'conv2d'", "is a model output"}


def test_the_record_survives_the_disk(resnet20: tuple[nn.Module, Graph], tmp_path: Path) -> None:
    _, graph = resnet20
    write_record(tmp_path / "graph.json", graph)
    again = read_record(Graph, tmp_path / "graph.json")
    assert again.units == graph.units and again.nodes == graph.nodes


def test_pre_activation_net_has_one_stream_per_stage() -> None:
    graph = trace_graph(WideResNet(), (torch.randn(2, 3, 32, 32),))
    assert {g.name: g.units for g in graph.prunable} == {
        "conv1": 16,
        "groups.0.conv1": 32, "groups.0.conv2": 32, "groups.1.conv1": 32,
        "groups.2.conv1": 64, "groups.2.conv2": 64, "groups.3.conv1": 64,
        "groups.4.conv1": 128, "groups.4.conv2": 128, "groups.5.conv1": 128,
    }  # fmt: skip


def test_identity_is_of_structure_not_of_weights() -> None:
    example = (torch.randn(1, 3, 8, 8),)
    first, second = (trace_graph(randomise(NETS["depthwise"](), seed), example).model_sha256 for seed in (0, 1))
    assert first == second
    assert trace_graph(NETS["grouped"](), example).model_sha256 != first
    assert trace_graph(NETS["depthwise"](), (torch.randn(5, 3, 8, 8),)).model_sha256 == first


def test_the_batch_in_the_record_is_the_users() -> None:
    for batch in (1, 3):
        graph = trace_graph(NETS["channel_shuffle"](), (torch.randn(batch, 3, 8, 8),))
        assert {node.out_shape[0] for node in graph.nodes} == {batch}


def test_tracing_leaves_the_model_alone() -> None:
    module = NETS["gated"]().train()
    module.middle[2].eval()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    trace_graph(module, (torch.randn(1, 3, 8, 8),))
    assert module.training and not module.middle[2].training
    assert all(torch.equal(before[key], tensor) for key, tensor in module.state_dict().items())


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


def test_a_model_that_cannot_be_exported_names_the_line() -> None:
    with pytest.raises(ModelError, match=r"torch\.export.*test_trace\.py:\d+: if x\.sum\(\) > 0"):
        trace_graph(Chain(4, Branching(), 4), (torch.randn(1, 3, 8, 8),))


def test_a_wrong_input_shape_is_told_from_it() -> None:
    with pytest.raises(ModelError, match=r"does not accept inputs of shape \(1, 4, 8, 8\).*channels"):
        trace_graph(NETS["gated"](), (torch.randn(1, 4, 8, 8),))


def test_channels_merged_with_the_batch_are_followed() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            batch, channels, height, width = x.shape
            y = self.inner(x.reshape(batch * channels, 1, height, width))
            return y.reshape(batch, 2 * channels, height, width)

    module, images = randomise(Chain(4, Folded(), 8)), torch.randn(3, 3, 8, 8)
    graph = trace_graph(module, (images,))
    assert {g.name: g.units for g in graph.prunable} == {"stem": 4}
    inner = next(node for node in graph.nodes if node.path == "middle.inner")
    assert inner.out_shape[0] == 12 and dict(inner.out_extents[0].groups) == {"stem": 3}
    keep = {"stem": np.array([0, 3])}
    with torch.no_grad():
        ours = slice_model(module, (images,), graph, keep).eval()(images)
        assert relative_error(ours, mask_model(module, graph, keep)(images)) < LIMIT


def test_an_empty_slice_of_a_tensor_is_no_obstacle() -> None:
    """Window attention without a shift takes one; its size is 0, which every number divides."""

    class Rolled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x[..., 8:], x[..., :8]], dim=-1)

    module, images = randomise(Chain(4, Rolled(), 4)), torch.randn(2, 3, 8, 8)
    graph = trace_graph(module, (images,))
    keep = {"stem": np.array([1, 2])}
    with torch.no_grad():
        ours = slice_model(module, (images,), graph, keep).eval()(images)
        assert relative_error(ours, mask_model(module, graph, keep)(images)) < LIMIT


def test_union_find() -> None:
    units = Units()
    ids = units.fresh(8)
    units.union(ids[:4], ids[4:])
    units.union(ids[1:2], ids[2:4])
    assert units.find(ids).tolist() == [0, 1, 1, 1, 0, 1, 1, 1]
    units.freeze(ids[7:], "first")
    units.freeze(ids[:], "second")
    units.mark_inexact(ids[4:5], "why")
    assert units.frozen() == {0: "second", 1: "first"} and units.inexact() == {0: "why"}
    assert len(units) == 8 and units.fresh(2).tolist() == [8, 9]
