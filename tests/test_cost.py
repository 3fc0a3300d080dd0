"""Costs against real networks, hand counts and what slicing really leaves."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import torchvision_models

from edgeprune.compact import compact_model
from edgeprune.core import cost
from edgeprune.core.arena import COPY, HANDLE_SHARE, Arena, Buffer, lower, pattern_bytes, peak_memory_bytes
from edgeprune.core.budget import (
    budget_between,
    check_steps,
    format_amount,
    format_bytes,
    format_seconds,
    make_budget,
    parse_limit,
    step_budgets,
)
from edgeprune.core.errors import UsageError
from edgeprune.core.records import Budget, Cost, Extent, Graph, Node, Quantity, Table
from edgeprune.trace import trace_graph

torch.set_num_threads(1)


class Branches(nn.Module):
    """Grouped, depthwise and transposed convolutions, a concatenation, and a linear after flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.b = nn.Conv2d(8, 12, 1)
        self.up = nn.ConvTranspose2d(20, 6, 2, stride=2)
        self.head = nn.Linear(6 * 16 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.a(x)))
        x = torch.cat([self.depthwise(x), self.b(x)], dim=1)
        return self.head(torch.relu(self.up(x)).flatten(1))


MODELS = {
    "branches": (Branches, 8),
    "resnet18": (lambda: torchvision_models().resnet18(), 224),
    "densenet": (
        lambda: torchvision_models().DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=16, num_classes=5),
        64,
    ),
}


@cache
def traced(name: str) -> tuple[nn.Module, Tensor, Graph]:
    torch.manual_seed(0)
    make, size = MODELS[name]
    module, x = make().eval(), torch.randn(1, 3, size, size)
    return module, x, trace_graph(module, (x,))


@pytest.fixture(params=list(MODELS))
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Graph]:
    return traced(request.param)


def count_by_hooks(module: nn.Module, x: Tensor) -> int:
    """Multiply-adds, independently: from what each layer is given and gives while it runs."""
    total = 0

    def hook(layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        weight = layer.weight
        if isinstance(layer, nn.ConvTranspose2d):
            total += weight.numel() * given[0].shape[-1] * given[0].shape[-2]
        elif isinstance(layer, nn.Conv2d):
            total += weight.numel() * out.shape[-1] * out.shape[-2]
        else:
            total += weight.numel()

    layers = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    with torch.no_grad():
        module(x)
    for handle in handles:
        handle.remove()
    return total


def random_keep(graph: Graph, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    keep = {}
    for group in graph.prunable:
        width = int(rng.integers(1, group.units // group.step + 1)) * group.step
        keep[group.name] = np.sort(rng.permutation(group.units)[:width]).astype(np.int64)
    return keep


def test_dense_counts(network: tuple[nn.Module, Tensor, Graph]) -> None:
    module, x, graph = network
    assert cost.count_parameters(graph, {}) == sum(p.numel() for p in module.parameters())
    assert cost.count_macs(graph, {}) == count_by_hooks(module, x)


@pytest.mark.parametrize("seed", [0, 1])
def test_counts_of_sliced_networks(network: tuple[nn.Module, Tensor, Graph], seed: int) -> None:
    """What the polynomials say is what slicing leaves."""
    module, x, graph = network
    keep = random_keep(graph, seed)
    widths = {name: len(kept) for name, kept in keep.items()}
    sliced = compact_model(module, (x,), graph, keep).eval()
    assert cost.count_parameters(graph, widths) == sum(p.numel() for p in sliced.parameters())
    assert cost.count_macs(graph, widths) == count_by_hooks(sliced, x)


def test_artifact_bytes_follow_the_weights(network: tuple[nn.Module, Tensor, Graph]) -> None:
    """Dense: the measured size itself; sliced: less by the bytes of the weights that went."""
    module, x, graph = network
    assert cost.artifact_bytes(graph, {}, 10**8) == 10**8
    keep = random_keep(graph, 2)
    sliced = compact_model(module, (x,), graph, keep).eval()

    def stored(model: nn.Module) -> int:
        folded = sum(
            m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and follows_conv(n)
        )
        layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
        norms = [m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and not follows_conv(n)]
        return 4 * (
            sum(p.numel() for m in layers for p in m.parameters()) + folded + 4 * sum(m.weight.numel() for m in norms)
        )

    nodes = {node.name: node for node in graph.nodes}
    readers = [name for node in graph.nodes for name in node.inputs]

    def follows_conv(path: str) -> bool:
        node = next(n for n in graph.nodes if n.op == "batch_norm" and n.parameters[0] == f"{path}.weight")
        producer = nodes[node.inputs[0]]
        return producer.op == "conv2d" and readers.count(producer.name) == 1

    widths = {name: len(kept) for name, kept in keep.items()}
    assert 10**8 - cost.artifact_bytes(graph, widths, 10**8) == stored(module) - stored(sliced)


def test_costs_grow_with_every_width(network: tuple[nn.Module, Tensor, Graph]) -> None:
    _, _, graph = network
    rng = np.random.default_rng(0)
    steps = cost.memory_steps(graph)
    for _ in range(20):
        low = {g.name: int(rng.integers(1, g.units + 1)) for g in graph.prunable}
        high = {name: int(rng.integers(width, graph.units[name] + 1)) for name, width in low.items()}
        for measure in (cost.count_parameters, cost.count_macs, cost.live_bytes):
            assert measure(graph, low) <= measure(graph, high)
        assert cost.live_bytes(graph, low) == max(cost.evaluate(step.bytes, low, graph.units) for step in steps)
        assert cost.live_bytes(graph, low) <= peak_memory_bytes(graph, low)


def test_resnet18_as_published() -> None:
    _, _, graph = traced("resnet18")
    assert cost.count_parameters(graph, {}) == 11_689_512
    assert cost.count_macs(graph, {}) == 1_814_073_344
    # conv1 is 64 x 112 x 112, its pooled copy 64 x 56 x 56; both live while pooling
    assert cost.live_bytes(graph, {}) == 4 * 64 * (112 * 112 + 56 * 56)


# --- memory, by hand -----------------------------------------------------------------------------


def node(name: str, op: str, inputs: tuple[str, ...], channels: Extent, size: int = 4, view: bool = False) -> Node:
    extents = (Extent(fixed=1), channels, Extent(fixed=size), Extent(fixed=size))
    return Node(name=name, path="", op=op, inputs=inputs, out_shape=(1, 8, size, size), out_extents=extents, view=view)


def chain(*nodes: Node, outputs: tuple[str, ...]) -> Graph:
    return Graph(model_sha256="", inputs=("x",), outputs=outputs, nodes=nodes, parameters=(), groups=())


THREE, EIGHT = Extent(fixed=3), Extent(fixed=8)
TENSOR = 4 * 8 * 4 * 4
"""Bytes of one (1, 8, 4, 4) tensor."""


def lives(graph: Graph, channels: int = 8) -> dict[str, int]:
    """Tensors of so many channels alive at each kernel."""
    size = TENSOR * channels // 8
    return {step.node: round(cost.evaluate(step.bytes, {}, {}) / size) for step in cost.memory_steps(graph)}


def test_memory_of_a_fused_chain_counts_one_output() -> None:
    """Normalisation is the convolution's, the activation writes over its input, the model's input is the caller's."""
    graph = chain(
        node("x", "input", (), THREE),
        node("conv", "conv2d", ("x",), EIGHT),
        node("norm", "batch_norm", ("conv",), EIGHT),
        node("relu", "relu", ("norm",), EIGHT),
        outputs=("relu",),
    )
    assert lives(graph) == {"conv": 1, "relu": 1}


def test_memory_of_a_residual_block() -> None:
    """`a` stays until the addition, which the second convolution does, writing over it."""
    graph = chain(
        node("x", "input", (), THREE),
        node("a", "conv2d", ("x",), EIGHT),
        node("b", "conv2d", ("a",), EIGHT),
        node("c", "conv2d", ("b",), EIGHT),
        node("sum", "add", ("c", "a"), EIGHT),
        outputs=("sum",),
    )
    assert lives(graph) == {"a": 1, "b": 2, "sum": 2}


def test_memory_of_an_addition_across_layouts() -> None:
    """Without blocks the convolution does it; with blocks its result and the other addend differ in layout."""
    graph = chain(
        node("x", "input", (), THREE),
        node("a", "conv2d", ("x",), EIGHT),
        node("b", "conv2d", ("a",), EIGHT),
        node("turned", "roll", ("a",), EIGHT),
        node("sum", "add", ("b", "turned"), EIGHT),
        outputs=("sum",),
    )
    assert lives(graph) == {"a": 1, "turned": 2, "sum": 2}
    assert list(lower(graph, {}, block=8)[0]) == ["a", "b", "b" + COPY, "a" + COPY, "turned", "sum"]


def test_memory_of_views_and_inputs() -> None:
    """A view costs nothing and keeps its source alive; an input is never written over."""
    graph = chain(
        node("x", "input", (), THREE),
        node("relu", "relu", ("x",), THREE),
        node("flat", "flatten", ("relu",), THREE, view=True),
        node("pool", "max_pool2d", ("flat",), THREE),
        node("again", "add", ("pool", "flat"), THREE),
        outputs=("again",),
    )
    assert lives(graph, 3) == {"relu": 1, "pool": 2, "again": 2}


def test_the_arena_grows_by_doubling_and_splits_what_is_twice_as_large() -> None:
    arena, mib = Arena(), 2**20
    first = arena.take(400_000)  # of the first MiB, which it leaves more than half of
    second = arena.take(400_000)
    third = arena.take(3 * mib)  # the next region would be 2 MiB: 4
    assert [region.size for region in arena.regions] == [mib, 4 * mib]
    assert (first.region, second.start) == (second.region, first.size)
    assert third.size == 4 * mib  # not split
    arena.give(first)
    arena.give(second)
    assert arena.take(mib).region is arena.regions[0]  # joined again
    handles = 5 * mib // HANDLE_SHARE
    assert mib + 3 * mib + handles == arena.touched_bytes


def test_of_equal_holes_the_youngest_regions_is_taken() -> None:
    arena = Arena(next_region=4096)
    old, young = arena.take(4096), arena.take(8192)
    arena.give(young)
    arena.regions[1].free = [(0, 4096), (4096, 4096)]
    arena.give(old)
    assert arena.take(4000).region is arena.regions[1]


def test_one_block_for_all_buffers() -> None:
    """Of 1, 1, 1 and 2 KiB: the third lies where the first was, the fourth behind it, where the second was."""
    kib: tuple[int, ...] = (1, 1, 16, 16)
    buffers = [Buffer(kib, 0, 1), Buffer(kib, 1, 2), Buffer(kib, 2, 4), Buffer((1, 2, 16, 16), 3, 4)]
    assert pattern_bytes(buffers) == 3 * 1024
    assert pattern_bytes(buffers[:3]) == 2 * 1024


# --- tables --------------------------------------------------------------------------------------


def table(tile: int, sizes: tuple[int, ...] = (16, 32, 64)) -> Table:
    grid = np.array(sizes, dtype=np.int64)
    return Table(
        signature="conv",
        in_sizes=grid,
        out_sizes=grid,
        latency_s=np.outer(grid, grid).astype(float),
        tile_in=tile,
        tile_out=tile,
    )


@pytest.mark.parametrize(
    ("tile", "cin", "cout", "expected"),
    [
        (16, 16, 16, 256.0),
        (16, 17, 1, 512.0),
        (16, 33, 32, 48.0 * 32),
        (16, 64, 65, 64.0 * 80),
        (1, 24, 16, 24.0 * 16),
        (1, 48, 48, 48.0 * 48),
        (1, 4, 16, 256.0),
    ],
)
def test_look_up(tile: int, cin: int, cout: int, expected: float) -> None:
    """Up to the tile, then along the grid; the smallest grid point below, the last slope above."""
    assert cost.kernel_latency(table(tile), cin, cout) == pytest.approx(expected)


def test_a_full_width_that_is_no_multiple_of_the_tile() -> None:
    assert cost.kernel_latency(table(16, (16, 24)), 20, 24) == pytest.approx(24.0 * 24)


def test_look_up_where_only_the_output_matters() -> None:
    one = Table(
        signature="depthwise",
        in_sizes=np.zeros(1, dtype=np.int64),
        out_sizes=np.array([8, 16]),
        latency_s=np.array([[1.0, 3.0]]),
    )
    assert cost.kernel_latency(one, 0, 12) == pytest.approx(2.0)
    assert cost.kernel_latency(one, np.zeros(1), np.array([8, 16])) == pytest.approx([1.0, 3.0])


@settings(max_examples=50, deadline=None)
@given(tile=st.sampled_from([1, 4, 16]), a=st.integers(1, 200), b=st.integers(1, 200), more=st.integers(0, 50))
def test_more_channels_never_cost_less(tile: int, a: int, b: int, more: int) -> None:
    t = table(tile)
    assert cost.kernel_latency(t, a, b) <= cost.kernel_latency(t, a + more, b) + 1e-9
    assert cost.kernel_latency(t, a, b) <= cost.kernel_latency(t, a, b + more) + 1e-9


# --- budgets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "value", "relative"),
    [
        ("12ms", "time", 0.012, False),
        ("12 ms", "time", 0.012, False),
        ("1.5s", "time", 1.5, False),
        ("250us", "time", 250e-6, False),
        ("0.5x", "time", 0.5, True),
        ("50%", "bytes", 0.5, True),
        ("8MiB", "bytes", 8 * 2**20, False),
        ("2 MB", "bytes", 2e6, False),
        ("30mJ", "energy", 0.03, False),
    ],
)
def test_limits_as_written(text: str, kind: str, value: float, relative: bool) -> None:
    request = parse_limit(text, kind)  # type: ignore[arg-type]
    assert request.value == pytest.approx(value)
    assert request.relative is relative


@pytest.mark.parametrize("text", ["", "fast", "12", "12 apples", "8MiB", "-1ms", "0x", "nan", "1e", "0.5xx"])
def test_limits_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UsageError, match="budget"):
        parse_limit(text, "time")


def test_budget_relative_to_the_dense_model() -> None:
    dense = Cost(latency_s=Quantity(median=0.02, low=0.02, high=0.02), artifact_bytes=1000)
    budget = make_budget(dense, latency="0.5x", size="400B")
    assert (budget.latency_s, budget.artifact_bytes, budget.peak_memory_bytes) == (0.01, 400, None)
    with pytest.raises(UsageError, match="energy"):
        make_budget(dense, energy="0.5x")
    with pytest.raises(UsageError, match="no budget"):
        make_budget(dense)


def test_a_part_of_the_way_to_a_budget() -> None:
    """Three equal ratios from 16 ms to 2 ms are halvings; what the dense model already meets stays a limit."""
    dense = Cost(latency_s=Quantity(median=0.016, low=0.016, high=0.016), artifact_bytes=1000)
    budget = Budget(latency_s=0.002, artifact_bytes=4000, energy_j=0.5)
    parts = [budget_between(dense, budget, share / 3) for share in range(4)]
    assert [part.latency_s for part in parts] == pytest.approx([0.016, 0.008, 0.004, 0.002])
    assert {part.artifact_bytes for part in parts} <= {3999, 4000} and {part.energy_j for part in parts} == {0.5}
    assert parts[1].peak_memory_bytes is None
    half = budget_between(dense, Budget(latency_s=0.004, latency_share=0.25), 0.5)
    assert (half.latency_s, half.latency_share) == (pytest.approx(0.008), None)


def test_budgets_of_steps() -> None:
    """Latencies are as given, of the dense model's or not; what else is limited goes in equal ratios."""
    dense = Cost(latency_s=Quantity(median=0.016, low=0.016, high=0.016), artifact_bytes=8000)
    budget = Budget(latency_s=0.002, latency_share=0.125, artifact_bytes=1000)
    equal = step_budgets(dense, budget, 3)
    assert equal == [budget_between(dense, budget, share) for share in (1 / 3, 2 / 3)]
    assert step_budgets(dense, budget, 1) == step_budgets(dense, budget, []) == []
    for steps in (["0.75x", "25%"], ["12 ms", "4ms"]):
        found = step_budgets(dense, budget, steps)
        assert [each.latency_s for each in found] == pytest.approx([0.012, 0.004])
        assert [each.artifact_bytes for each in found] == [each.artifact_bytes for each in equal]
        assert all(each.latency_share is None for each in found)


@pytest.mark.parametrize(
    ("steps", "latency", "message"),
    [
        (["0.8x", "0.9x"], "0.5x", "'0.8x' and '0.9x' do not fall"),
        (["0.8x", "50%"], "0.5x", r"'50%' and '0.5x' of \[budget\] latency do not fall"),
        (["10 ms", "9000 us"], "10ms", r"'9000 us' and '10ms' of \[budget\] latency do not fall"),
        (["10 ms"], "0.5x", "'10 ms' and '0.5x' of .* cannot be compared"),
        (["1.0x"], "0.5x", "'1.0x' is not below the dense model's"),
        (["0.8x"], None, r"need a \[budget\] latency"),
        (["0.8"], "0.5x", "no time budget"),
    ],
)
def test_steps_that_do_not_fall_are_refused(steps: list[str], latency: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_steps(steps, latency)


def test_steps_that_fall_are_fine() -> None:
    for steps, latency in ((3, None), ([], None), (["0.8x", "70%"], "0.6x"), (["1 s", "20 ms"], "19.9ms")):
        check_steps(steps, latency)


def test_energy_by_a_power_model_is_a_latency() -> None:
    """2.5 W more at work: 30 mJ are 12 ms, half the energy is half the latency, and the tighter limit holds."""
    dense = Cost(latency_s=Quantity(median=0.02, low=0.02, high=0.02))
    model = "idle=2.0W,active=4.5W"
    absolute = make_budget(dense, energy="30mJ", power_model=model)
    assert absolute.latency_s == pytest.approx(0.012)
    assert absolute.energy_j is None and absolute.latency_share is None
    relative = make_budget(dense, energy="0.5x", power_model=model)
    assert (relative.latency_s, relative.latency_share) == (0.01, 0.5)
    tighter = make_budget(dense, latency="5 ms", energy="30mJ", power_model=model)
    assert tighter.latency_s == pytest.approx(0.005)
    looser = make_budget(dense, latency="0.9x", energy="30mJ", power_model=model)
    assert looser.latency_s == pytest.approx(0.012)
    with pytest.raises(UsageError, match="power model"):
        make_budget(dense, energy="30mJ", power_model="idle=2")


def test_numbers_for_people() -> None:
    assert format_seconds(0.0123) == "12.3 ms"
    assert format_seconds(789e-6) == "789 us"
    assert format_seconds(2.5) == "2.5 s"
    assert format_bytes(8 * 2**20) == "8 MiB"
    assert format_bytes(1500) == "1.46 KiB"
    assert format_amount("energy_j", 0.03) == "30 mJ"
    assert format_amount("latency_s", 0.5) == "500 ms"
