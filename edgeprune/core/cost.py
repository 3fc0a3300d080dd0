"""What a network costs as a function of its widths: latency, memory, bytes, MACs.

Every axis size is affine in the widths (`Extent`), so parameters, MACs and activation bytes are
polynomials in the widths. They are kept as polynomials, because the solvers need the terms.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import overload

import numpy as np
import numpy.typing as npt

from edgeprune.core.arena import (
    CONVOLUTIONS,
    COPY,
    FLOAT_BYTES,
    channel_block,
    lower,
    peak_memory_bytes,
    place,
)
from edgeprune.core.branches import branch_of, branch_of_kernel, dropped_branches, without_branches
from edgeprune.core.records import (
    Branch,
    Conditions,
    Cost,
    Extent,
    FloatArray,
    Fold,
    Graph,
    Kernel,
    Node,
    Profile,
    Quantity,
    Table,
    Widths,
)
from edgeprune.core.workspace import workspace_bytes

TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
PRODUCTS = frozenset({"matmul", "bmm", "mm"})

TFLITE = "tflite"
"""The runtime whose activations lie in XNNPACK's workspace."""
INTERVAL_SHARE = 0.9
"""How many of the measured latencies a predicted interval is to hold."""

BYTES_PER_SCALE = 9
"""A float32 and, of ONNX, a zero point of 8 bits; the scale of the bias beside it."""

Polynomial = dict[tuple[str, ...], float]
"""Sum of coefficient x product of widths: {(): 3.0, ("a",): 2.0, ("a", "b"): 9.0}; names sorted."""


# --- polynomials ---------------------------------------------------------------------------------


def extent_polynomial(extent: Extent) -> Polynomial:
    """One axis size as a polynomial of degree <= 1."""
    result: Polynomial = {(): float(extent.fixed)} if extent.fixed else {}
    for name, count in extent.groups:
        result[(name,)] = result.get((name,), 0.0) + count
    return result


def multiply(left: Polynomial, right: Polynomial) -> Polynomial:
    """Product of two polynomials."""
    result: Polynomial = {}
    for a, x in left.items():
        for b, y in right.items():
            key = tuple(sorted(a + b))
            result[key] = result.get(key, 0.0) + x * y
    return result


def add(polynomials: Iterable[Polynomial]) -> Polynomial:
    """Sum of polynomials."""
    result: Polynomial = {}
    for polynomial in polynomials:
        for key, value in polynomial.items():
            result[key] = result.get(key, 0.0) + value
    return result


def volume(extents: Iterable[Extent], factor: float = 1.0) -> Polynomial:
    """Number of elements of a tensor with these axis sizes, times `factor`."""
    result: Polynomial = {(): factor}
    for extent in extents:
        result = multiply(result, extent_polynomial(extent))
    return result


def evaluate(polynomial: Polynomial, widths: Widths, units: Widths) -> int:
    """Value for `widths`; `units` gives the full width of groups not in `widths`."""
    return round(sum(c * prod(widths.get(name, units[name]) for name in key) for key, c in polynomial.items()))


# --- parameters, MACs, bytes ---------------------------------------------------------------------


def count_parameters(graph: Graph, widths: Widths) -> int:
    """Trainable parameters of the network at `widths`."""
    return evaluate(parameter_polynomial(without_branches(graph, widths)), widths, graph.units)


def parameter_polynomial(graph: Graph) -> Polynomial:
    """Trainable parameters of the network."""
    return add(volume(p.extents) for p in graph.parameters if p.trainable)


def mac_polynomial(graph: Graph) -> Polynomial:
    """Multiply-accumulates of convolutions, linears and matrix products on the example input."""
    return add(mac_terms(graph).values())


def mac_terms(graph: Graph) -> dict[str, Polynomial]:
    """`mac_polynomial` of each node that has any.

    A weight is used once per output position (per input position when transposed), so a layer costs
    positions x elements of its weight, grouped or not.
    """
    nodes = {node.name: node for node in graph.nodes}
    parameters = {p.name: p for p in graph.parameters}
    terms: dict[str, Polynomial] = {}
    for node in graph.nodes:
        if node.op in PRODUCTS and node.inputs:
            inner = nodes[node.inputs[0]].out_extents[-1]
            terms[node.name] = volume((*node.out_extents, inner))
            continue
        if node.op == "einsum" and len(node.inputs) == 2:
            terms[node.name] = volume(_einsum_extents(node, [nodes[name] for name in node.inputs]))
            continue
        if node.op == "scaled_dot_product_attention" and len(node.inputs) > 2:
            query, key = nodes[node.inputs[0]].out_extents, nodes[node.inputs[1]].out_extents
            terms[node.name] = add([volume((*query, key[-2])), volume((*node.out_extents, key[-2]))])
            continue
        if not node.parameters or node.parameters[0] not in parameters:
            continue
        weight = parameters[node.parameters[0]]
        if node.op in CONVOLUTIONS or node.op in TRANSPOSED:
            source = node if node.op in CONVOLUTIONS else nodes[node.inputs[0]]
            rank = len(weight.shape) - 2
            positions = (*source.out_extents[: -rank - 1], *source.out_extents[-rank:])
        elif node.op == "linear":
            positions = node.out_extents[:-1]
        else:
            continue
        terms[node.name] = volume((*positions, *weight.extents))
    return terms


def _einsum_extents(node: Node, operands: Sequence[Node]) -> list[Extent]:
    """One size for each letter of a product of two activations."""
    letters = str(node.attributes["equation"]).replace(" ", "").partition("->")[0].split(",")
    sizes = {
        letter: extent
        for term, operand in zip(letters, operands, strict=True)
        for letter, extent in zip(term, operand.out_extents, strict=True)
    }
    return list(sizes.values())


def count_macs(graph: Graph, widths: Widths) -> int:
    """Multiply-accumulates of one forward pass on the example input."""
    return evaluate(mac_polynomial(without_branches(graph, widths)), widths, graph.units)


def artifact_volumes(graph: Graph, dtype: str = "float32") -> tuple[tuple[tuple[Extent, ...], int], ...]:
    """Axis sizes and bytes per element of every tensor in an exported file.

    A batch norm that directly follows a convolution is folded into it by the exporter: its four
    vectors vanish and the convolution has a bias. Weights of 8 bits have a scale and a zero point for each
    output channel.
    """
    tensors = _stored_tensors(graph)
    if dtype == "float16":
        return tuple((extents, size // 2 if size == FLOAT_BYTES else size) for extents, size in tensors)
    if dtype == "float32":
        return tensors
    weights = [extents for extents, size in tensors if len(extents) > 1 and size == FLOAT_BYTES]
    rest = [(extents, size) for extents, size in tensors if len(extents) <= 1 or size != FLOAT_BYTES]
    scales = [(extents[:1], BYTES_PER_SCALE) for extents in weights]
    return (*((extents, 1) for extents in weights), *scales, *rest)


def volumes_by_branch(
    graph: Graph, dtype: str = "float32"
) -> dict[str | None, tuple[tuple[tuple[Extent, ...], int], ...]]:
    """`artifact_volumes` by the branch that they go with; None: with no branch."""
    rest = Counter(artifact_volumes(graph, dtype))
    whole, found = rest, dict[str | None, tuple[tuple[tuple[Extent, ...], int], ...]]()
    for branch in graph.branches:
        own = whole - Counter(artifact_volumes(without_branches(graph, {branch.name: 0}), dtype))
        found[branch.name] = tuple(own.elements())
        rest = rest - own
    return {None: tuple(rest.elements()), **found}


def _stored_tensors(graph: Graph) -> tuple[tuple[tuple[Extent, ...], int], ...]:
    nodes = {node.name: node for node in graph.nodes}
    readers = _readers(graph)
    parameters = {p.name: p for p in graph.parameters}
    stored: dict[str, tuple[tuple[Extent, ...], int]] = {}
    for node in graph.nodes:
        producer = nodes.get(node.inputs[0]) if node.inputs else None
        if (
            node.op == "batch_norm"
            and producer is not None
            and producer.op in CONVOLUTIONS | TRANSPOSED
            and readers[producer.name] == [node.name]
        ):
            if len(producer.parameters) < 2:
                stored[f"{producer.name} bias"] = (node.out_extents[1:2], FLOAT_BYTES)
            continue
        for name in node.parameters:
            if name in parameters:
                stored[name] = (parameters[name].extents, parameters[name].element_bytes)
    return tuple(stored.values())


def artifact_polynomial(graph: Graph, dtype: str = "float32") -> Polynomial:
    """Bytes of the weights in an exported file."""
    return add(volume(extents, element_bytes) for extents, element_bytes in artifact_volumes(graph, dtype))


def artifact_bytes(graph: Graph, widths: Widths, dense_bytes: int, dtype: str = "float32") -> int:
    """Size of the exported file: its weights at `widths`, and the rest of the dense file as it is.

    dense_bytes: size of the dense artifact, as measured.
    """
    dense = evaluate(artifact_polynomial(graph, dtype), graph.units, graph.units)
    weights = artifact_polynomial(without_branches(graph, widths), dtype)
    return max(dense_bytes - dense, 0) + evaluate(weights, widths, graph.units)


# --- activation memory ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryStep:
    """Bytes that live while one kernel runs: its inputs, its output and all that is read later.

    branch: the one that the kernel goes with.
    """

    node: str
    bytes: Polynomial
    branch: Branch | None = None


def memory_steps(graph: Graph) -> tuple[MemoryStep, ...]:
    """Live activation bytes at each kernel, in the order of execution; the model's inputs are the caller's.

    The least that any allocator needs; `activation_bytes` has what the runtime's own makes of it.
    """
    kernels, outputs = lower(graph, {})
    extents = {node.name: node.out_extents for node in graph.nodes}
    buffers = place(kernels, outputs, {name: extents[name] for name in kernels}, reuse=False)
    sizes = [volume(buffer.shape, FLOAT_BYTES) for buffer in buffers]
    return tuple(
        MemoryStep(
            node=name,
            bytes=add(size for buffer, size in zip(buffers, sizes, strict=True) if buffer.born <= index <= buffer.dies),
            branch=branch_of(graph.branches, name.removesuffix(COPY)),
        )
        for index, name in enumerate(kernels)
    )


def live_bytes(graph: Graph, widths: Widths) -> int:
    """Largest sum of live activations at `widths`."""
    steps = memory_steps(without_branches(graph, widths))
    return max((evaluate(step.bytes, widths, graph.units) for step in steps), default=0)


def activation_bytes(graph: Graph, widths: Widths, conditions: Conditions | None) -> int:
    """Peak activation memory as the runtime lays it out; None: as ONNX Runtime does on x86."""
    graph = without_branches(graph, widths)
    if conditions is None:
        return peak_memory_bytes(graph, widths)
    if conditions.runtime.partition(":")[0] == TFLITE:
        return workspace_bytes(graph, widths)
    return peak_memory_bytes(graph, widths, channel_block(conditions.arch, conditions.cpu), conditions.threads)


def live_of_peak(profile: Profile, peak_bytes: float) -> float:
    """What may be alive at once, at the very most, where a run takes `peak_bytes`."""
    model = profile.memory
    return peak_bytes if model is None else (peak_bytes - model.base_bytes) / model.scale


def peak_of_live(profile: Profile, live: float) -> int:
    """The inverse of `live_of_peak`."""
    model = profile.memory
    return int(live if model is None else model.base_bytes + model.scale * live)


def _readers(graph: Graph) -> dict[str, list[str]]:
    """Per node the names of the nodes that read it."""
    result: dict[str, list[str]] = {node.name: [] for node in graph.nodes}
    for node in graph.nodes:
        for name in node.inputs:
            result[name].append(node.name)
    return result


# --- latency -------------------------------------------------------------------------------------


@overload
def kernel_latency(table: Table, cin: int, cout: int) -> float: ...
@overload
def kernel_latency(table: Table, cin: npt.ArrayLike, cout: npt.ArrayLike) -> FloatArray: ...
def kernel_latency(table: Table, cin: npt.ArrayLike, cout: npt.ArrayLike) -> float | FloatArray:
    """Seconds of one kernel for channel counts (broadcast against each other).

    A size is first rounded up to the tile (it computes the whole tile), then interpolated linearly
    between grid points. Outside the grid the nearest grid point counts below, and the last segment's
    slope above. cin is ignored where the table has no input axis.
    """
    rows, row_weight = _locate(table.in_sizes, np.asarray(cin), table.tile_in)
    columns, column_weight = _locate(table.out_sizes, np.asarray(cout), table.tile_out)
    t = table.latency_s
    next_row, next_column = np.minimum(rows + 1, t.shape[0] - 1), np.minimum(columns + 1, t.shape[1] - 1)
    low = t[rows, columns] * (1 - column_weight) + t[rows, next_column] * column_weight
    high = t[next_row, columns] * (1 - column_weight) + t[next_row, next_column] * column_weight
    result = np.maximum(low * (1 - row_weight) + high * row_weight, 0.0)
    return float(result) if result.ndim == 0 else result


def _locate(
    grid: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], tile: int
) -> tuple[npt.NDArray[np.intp], FloatArray]:
    """Index of the grid point at or below each size, and the share of the next one."""
    if len(grid) == 1:
        return np.zeros(sizes.shape, dtype=np.intp), np.zeros(sizes.shape)
    rounded = -(-sizes // tile) * tile
    # the last grid point may be a full width that is no multiple of the tile
    sizes = np.where(sizes <= grid[-1], np.minimum(rounded, grid[-1]), rounded)
    index = np.clip(np.searchsorted(grid, sizes, side="right") - 1, 0, len(grid) - 2)
    share = (sizes - grid[index]) / (grid[index + 1] - grid[index])
    return index, np.maximum(share, 0.0)


def kernel_sizes(kernel: Kernel, widths: Widths, units: Widths) -> tuple[int, int]:
    """(input, output) channels of a kernel; input 0 where only one size matters."""
    cin = kernel.in_extent.size(widths, units) if kernel.in_extent is not None else 0
    return cin, kernel.out_extent.size(widths, units)


def left_kernels(graph: Graph, widths: Widths, kernels: Iterable[Kernel]) -> list[Kernel]:
    """The kernels that are still run where some branches are dropped."""
    dropped = dropped_branches(graph, widths)
    return [kernel for kernel in kernels if branch_of_kernel(dropped, kernel) is None]


def operator_of(kernel: Kernel) -> str:
    """What kind of kernel it is: of one operator, and reading one size (depthwise, pooling) or two."""
    return f"{kernel.signature.split(' ')[0].split('+')[0]} {'one size' if kernel.in_extent is None else 'two sizes'}"


def predict_latency(graph: Graph, widths: Widths, profile: Profile | Fold, kernels: Sequence[Kernel] = ()) -> float:
    """Whole-model seconds: the sum over kernels plus the time outside any kernel.

    kernels: of the profile, where only one of its folds is given.
    """
    tables = {table.signature: table for table in profile.tables}
    total = profile.overhead_s
    for kernel in left_kernels(graph, widths, profile.kernels if isinstance(profile, Profile) else kernels):
        total += kernel_latency(tables[kernel.signature], *kernel_sizes(kernel, widths, graph.units))
    return total


def latency_interval(graph: Graph, widths: Widths, profile: Profile) -> Quantity:
    """Predicted whole-model latency, and between what the measured one is to be expected.

    The interval is what the folds say of these widths, each moved by the errors on the configurations
    it had not seen, so that it is wide where the folds disagree and as wide as they were wrong before.
    Without folds it is the largest error on held-out configurations, without those it has no width.
    source: CV+ of Barber et al., Predictive inference with the jackknife+, Annals of Statistics 49 (2021),
        section 3, on relative errors.
    """
    seconds = predict_latency(graph, widths, profile)
    said = [predict_latency(graph, widths, fold, profile.kernels) for fold in profile.folds]
    low, high = (
        [p * (1 + sign * e) for p, f in zip(said, profile.folds, strict=True) for e in f.errors] for sign in (-1, 1)
    )
    if low:
        # The ends are order statistics, as the theorem has them.
        reach = min(math.ceil(INTERVAL_SHARE * (len(low) + 1)), len(low))
        return Quantity(
            median=seconds, low=max(min(sorted(low)[-reach], seconds), 0.0), high=max(sorted(high)[reach - 1], seconds)
        )
    error = profile.held_out.max if profile.held_out is not None else 0.0
    return Quantity(median=seconds, low=seconds * max(1 - error, 0.0), high=seconds * (1 + error))


def predict_energy(graph: Graph, widths: Widths, profile: Profile) -> Quantity | None:
    """Joules of one inference above the board's rest; None where the profile has no energy.

    The interval is that of the latency, and the largest error of the energy on held-out configurations.
    """
    if profile.energy is None:
        return None
    tables = {table.signature: table for table in profile.tables}
    joules = profile.energy.mean_w * profile.overhead_s
    for kernel in left_kernels(graph, widths, profile.kernels):
        seconds = kernel_latency(tables[kernel.signature], *kernel_sizes(kernel, widths, graph.units))
        joules += profile.energy.power_w[operator_of(kernel)] * seconds
    latency = latency_interval(graph, widths, profile)
    error = profile.energy.error.max if profile.energy.error is not None else 0.0
    return Quantity(
        median=joules,
        low=joules * latency.low / latency.median * max(1 - error, 0.0),
        high=joules * latency.high / latency.median * (1 + error),
    )


def predict_cost(graph: Graph, widths: Widths, profile: Profile | None = None) -> Cost:
    """Everything that can be said without running the network.

    Latency and artifact size need a profile; with one, memory is what this runtime takes for it.
    """
    latency = size = None
    if profile is not None:
        latency = latency_interval(graph, widths, profile)
        size = artifact_bytes(graph, widths, profile.dense_bytes, profile.precision.dtype)
    memory = activation_bytes(graph, widths, profile.conditions if profile is not None else None)
    if profile is not None and profile.memory is not None:
        memory = round(profile.memory.base_bytes + profile.memory.scale * memory)
    return Cost(
        latency_s=latency,
        peak_memory_bytes=memory,
        artifact_bytes=size,
        parameters=count_parameters(graph, widths),
        macs=count_macs(graph, widths),
        energy_j=predict_energy(graph, widths, profile) if profile is not None else None,
    )
