"""TFLite's kernels in terms of the traced graph, on files of the real converter and times of the real runtime."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tflite_nets import NETS, SIDE, convert_nets, make_net

from edgeprune.core.errors import RecordError
from edgeprune.core.records import Graph, KernelTime
from edgeprune.trace import trace_graph

pytest.importorskip("ai_edge_litert")

from edgeprune.device.runtimes import tflite as runtime
from edgeprune.formats._tflite_graph import WEIGHTED, execution_order, read_tflite_graph
from edgeprune.formats._tflite_kernels import TfliteKernelMap
from edgeprune.formats._tflite_match import align, match_nodes

FIXTURES = Path(__file__).parent / "fixtures" / "tflite"
FILES = ["resnet-1", "mobilenet_v2-1", "mobilenet_v3-1", "mobilenet_v3-1-int8", "mobilenet_v3-1-dynamic",
         "branches-1-dynamic"]  # fmt: skip


def graph_of(name: str, width: float = 1.0) -> Graph:
    return trace_graph(make_net(name.split("-")[0], width), (torch.zeros(1, 3, SIDE, SIDE),))


def timed(path: Path, **options: str) -> list[KernelTime]:
    """One profiled run, as a session gives it."""
    model = runtime.Model(str(path), 1, "profile", **options)
    feed = {name: np.zeros(shape, dtype) for name, (shape, dtype) in model.inputs.items()}
    for _ in range(3):
        model.run(feed)
    _, kernels = model.end_profile()[-1]
    return [KernelTime(name=name, op=op, time_s=seconds) for name, op, seconds in kernels]


def check_map(path: Path, graph: Graph, times: Sequence[KernelTime] | None, charged: Sequence[KernelTime]) -> None:
    """Every layer is a kernel's; no node is two kernels'; all of the time is someone's."""
    model = path.read_bytes()
    mapped = TfliteKernelMap(model, graph, times)
    layers = {node.name for node in graph.nodes if node.op in ("conv2d", "linear")}
    weighted = [kernel for kernel in mapped.kernels if kernel.name.startswith(("conv", "depth", "fully"))]
    assert len(weighted) == len(layers)
    assert all(len(layers & set(kernel.nodes)) == 1 for kernel in weighted)
    nodes = Counter(name for kernel in mapped.kernels for name in kernel.nodes)
    assert set(nodes) == {node.name for node in graph.nodes if node.op != "input"}
    assert set(nodes.values()) == {1}
    assert len({kernel.name for kernel in mapped.kernels}) == len(mapped.kernels)
    seconds = mapped.charge(charged)
    assert set(seconds) <= {kernel.name for kernel in mapped.kernels}
    assert sum(seconds.values()) == pytest.approx(sum(time.time_s for time in charged))


@pytest.mark.parametrize("name", FILES)
def test_every_layer_has_its_kernel(name: str) -> None:
    path = FIXTURES / f"{name}.tflite"
    graph = graph_of(name)
    times = timed(path)
    check_map(path, graph, times, times)
    check_map(path, graph, timed(path, delegate="none"), times)
    check_map(path, graph, None, times)


@pytest.mark.parametrize("name", FILES)
def test_each_convolution_is_timed_once(name: str) -> None:
    path = FIXTURES / f"{name}.tflite"
    times = timed(path)
    mapped = TfliteKernelMap(path.read_bytes(), graph_of(name), times)

    def payer(place: int) -> str:
        """The kernel that pays for one of the times."""
        seconds = mapped.charge([replace(time, time_s=float(at == place)) for at, time in enumerate(times)])
        (name,) = (name for name, paid in seconds.items() if paid)
        return name

    heavy = ("Convolution", "Fully Connected", "CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
    payers = [payer(place) for place, time in enumerate(times) if time.op.startswith(heavy)]
    assert len(set(payers)) == len(payers)
    assert set(payers) == {k.name for k in mapped.kernels if k.name.startswith(("conv", "depth", "fully"))}
    # The stage that makes bytes of floats is paid by the convolution that reads them.
    conversions = [payer(place) for place, time in enumerate(times) if time.op.startswith("Convert")]
    assert all(name.startswith(("conv", "fully")) for name in conversions)


def test_kernels_of_a_mobilenet() -> None:
    path = FIXTURES / "mobilenet_v3-1.tflite"
    mapped = TfliteKernelMap(path.read_bytes(), graph_of("mobilenet_v3"), timed(path))
    by_node = {node: kernel for kernel in mapped.kernels for node in kernel.nodes}
    stem, depthwise, project = by_node["conv2d"], by_node["conv2d_2"], by_node["conv2d_5"]
    assert stem.signature == "PAD+CONV_2D kernel=3x3 stride=2x2 size=16x16"
    assert (stem.positions, stem.taps) == (256, 9)
    assert depthwise.signature == "PAD+DEPTHWISE_CONV_2D depthwise kernel=3x3 stride=2x2 size=8x8"
    assert depthwise.in_extent is None
    assert [count for _, count in depthwise.out_extent.groups] == [1]
    assert project.in_extent is not None and project.in_extent.groups == depthwise.out_extent.groups
    assert by_node["hardswish"].signature == "HARD_SWISH size=16x16"
    assert by_node["adaptive_avg_pool2d"].signature == "MEAN size=8x8->1x1"
    assert by_node["batch_norm"] is stem
    assert by_node["linear"].signature.startswith("FULLY_CONNECTED")


def test_other_widths_are_charged_to_the_dense_kernels() -> None:
    dense, thin = FIXTURES / "mobilenet_v3-1.tflite", FIXTURES / "mobilenet_v3-0.75.tflite"
    mapped = TfliteKernelMap(dense.read_bytes(), graph_of("mobilenet_v3"), timed(dense))
    times = timed(thin)
    seconds = mapped.charge(times)
    assert set(seconds) == {kernel.name for kernel in mapped.kernels}
    assert sum(seconds.values()) == pytest.approx(sum(time.time_s for time in times))
    thinner = TfliteKernelMap(thin.read_bytes(), graph_of("mobilenet_v3", 0.75), times)
    assert [kernel.signature for kernel in thinner.kernels] == [kernel.signature for kernel in mapped.kernels]


@pytest.mark.parametrize("name", ["mobilenet_v3-1-int8", "mobilenet_v3-1-dynamic", "branches-1-dynamic"])
def test_order_of_execution_is_the_interpreters(name: str) -> None:
    """What is not delegated comes where the partitions that TFLite makes let it come."""
    path = FIXTURES / f"{name}.tflite"
    file, times = read_tflite_graph(path.read_bytes()), timed(path)
    alone = [int(time.name.partition(":")[2]) for time in times if time.name.startswith("node:")]
    order = execution_order(file, set(alone))
    assert sorted(order) == list(range(len(file.operations)))
    assert [place for place in order if place in set(alone)] == alone

    # Between two such operations there is a partition in the profile exactly where there is one in our order.
    def runs(kinds: list[bool]) -> list[bool]:
        return [kind for place, kind in enumerate(kinds) if place == 0 or kind != kinds[place - 1]]

    timed_runs = runs([time.name.startswith("node:") for time in times])
    ours = runs([place in set(alone) for place in order])
    assert ours == timed_runs and len(ours) > 3


def test_layers_are_found_by_shape_where_branches_come_in_another_order() -> None:
    file = read_tflite_graph((FIXTURES / "branches-1-dynamic.tflite").read_bytes())
    graph = graph_of("branches")
    found = match_nodes(file, graph)
    weighted = [place for place, operation in enumerate(file.operations) if operation.kind in WEIGHTED]
    assert [found[place].op for place in weighted] == ["conv2d"] * (len(weighted) - 1) + ["linear"]
    assert len({found[place].name for place in weighted}) == len(weighted)


def test_unknown_work_goes_to_the_neighbour() -> None:
    path = FIXTURES / "resnet-1.tflite"
    times = timed(path)
    mapped = TfliteKernelMap(path.read_bytes(), graph_of("resnet"), times)
    strange = KernelTime(name="delegate:99", op="Something New (NC)", time_s=1.0)
    before = KernelTime(name="delegate:98", op="Convert (NC, F32, QD8)", time_s=1.0)
    plain = mapped.charge(times)
    behind_first = mapped.charge([times[0], strange, *times[1:]])
    ahead_of_all = mapped.charge([before, *times])
    first = mapped.kernels[0].name
    for seconds in (behind_first, ahead_of_all):
        assert seconds[first] == pytest.approx(plain[first] + 1.0)
        assert sum(seconds.values()) == pytest.approx(sum(plain.values()) + 1.0)


@pytest.mark.parametrize("model", [b"", b"\x1c\x00\x00\x00TFL2" + bytes(40), b"not a model"])
def test_what_is_no_tflite_file(model: bytes) -> None:
    with pytest.raises(RecordError, match="no TFLite model"):
        read_tflite_graph(model)


@given(st.lists(st.sampled_from("abc"), max_size=7), st.lists(st.sampled_from("abc"), max_size=7))
def test_alignment_is_the_longest_common_subsequence(left: list[str], right: list[str]) -> None:
    pairs = align(len(left), len(right), lambda i, j: float(left[i] == right[j]))
    assert all(left[i] == right[j] for i, j in pairs)
    assert all(a < c and b < d for (a, b), (c, d) in itertools.pairwise(pairs))

    def longest(i: int, j: int) -> int:
        if i == len(left) or j == len(right):
            return 0
        if left[i] == right[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    assert len(pairs) == longest(0, 0)


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("litert_torch")
    folder = tmp_path_factory.mktemp("tflite")
    convert_nets(folder, list(NETS), [1.0, 0.75])
    return folder


@pytest.mark.long
@pytest.mark.parametrize("kind", ["", "-int8", "-dynamic"])
@pytest.mark.parametrize("name", sorted(NETS))
def test_what_the_installed_converter_writes(converted: Path, name: str, kind: str) -> None:
    dense, thin = (converted / f"{name}-{width}{kind}.tflite" for width in ("1", "0.75"))
    graph = graph_of(name)
    check_map(dense, graph, timed(dense), timed(thin))
