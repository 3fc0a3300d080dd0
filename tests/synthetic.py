"""Profiles, scores and boards made from formulas: what planning needs, without a board."""

from __future__ import annotations

import hashlib
from math import prod

import numpy as np

from edgeprune.core.cost import CONVOLUTIONS, artifact_polynomial, evaluate
from edgeprune.core.records import (
    Conditions,
    Extent,
    Graph,
    HeldOutError,
    Importance,
    Kernel,
    LossCurve,
    Profile,
    Table,
)

CONDITIONS = Conditions(board="synthetic", arch="x86_64", cpu="formula", runtime="onnxruntime", runtime_version="1")


def synthetic_profile(graph: Graph, *, tile: int = 16, seed: int = 0) -> Profile:
    """A staircase of `tile` channels: multiply-adds at a rate per layer, bytes moved, and a launch."""
    nodes = {node.name: node for node in graph.nodes}
    kernels: list[Kernel] = []
    tables: dict[str, Table] = {}
    for node in graph.nodes:
        if node.op not in CONVOLUTIONS | {"linear"} or not node.parameters:
            continue
        weight = next(p for p in graph.parameters if p.name == node.parameters[0])
        depthwise = weight.shape[1] == 1 and len(weight.shape) > 2
        axis = 1 if len(weight.shape) > 2 else len(node.out_shape) - 1
        source = nodes[node.inputs[0]]
        inside = None if depthwise else source.out_extents[axis]
        signature = f"{node.op} {weight.shape[2:]} {source.out_shape[2:]} {node.out_shape[2:]} {depthwise}"
        kernels.append(
            Kernel(
                name=node.name,
                nodes=(node.name,),
                signature=signature,
                in_extent=inside,
                out_extent=node.out_extents[axis],
            )
        )
        largest_in = 0 if depthwise else weight.shape[1]
        known = tables.get(signature)
        if known is not None:
            largest_in = max(largest_in, int(known.in_sizes[-1]))
        largest_out = max(weight.shape[0], int(known.out_sizes[-1]) if known is not None else 0)
        tables[signature] = _table(signature, largest_in, largest_out, weight.shape, node.out_shape, tile, seed)
    weights = evaluate(artifact_polynomial(graph), {}, graph.units)
    return Profile(
        target="synthetic",
        conditions=CONDITIONS,
        graph_sha256=graph.model_sha256,
        artifact_sha256="0" * 64,
        dense_bytes=weights + 10_000,
        kernels=tuple(kernels),
        measurements=(),
        tables=tuple(tables.values()),
        overhead_s=1e-4,
        additivity_gap=0.0,
        held_out=HeldOutError(mean=0.01, max=0.04, configurations=5),
    )


def _table(
    signature: str,
    largest_in: int,
    largest_out: int,
    weight: tuple[int, ...],
    out_shape: tuple[int, ...],
    tile: int,
    seed: int,
) -> Table:
    digest = hashlib.sha256(f"{seed} {signature}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    rate = 30e9 * rng.uniform(0.7, 1.2)
    positions, window = prod(out_shape[2:]), prod(weight[2:])
    tile = 1 if len(weight) == 2 else tile

    def grid(largest: int) -> np.ndarray:
        points = max(1, -(-largest // tile))
        return tile * np.unique(np.linspace(1, points, min(points, 33)).round().astype(np.int64))

    sizes_in = grid(largest_in) if largest_in else np.zeros(1, dtype=np.int64)
    sizes_out = grid(largest_out)
    cin, cout = np.maximum(sizes_in, 1)[:, None], sizes_out[None, :]
    seconds = cin * cout * window * positions / rate + 4 * (cin + cout) * positions / 8e9
    return Table(
        signature=signature,
        in_sizes=sizes_in,
        out_sizes=sizes_out,
        latency_s=seconds + 4 * cin * cout * window / 8e9 + 2e-6,
        tile_in=tile if largest_in else 1,
        tile_out=tile,
    )


def synthetic_importance(graph: Graph, *, seed: int = 0, curves: bool = True) -> Importance:
    """Scores with a heavy tail, and loss curves that steepen towards few units, unlike per group."""
    rng = np.random.default_rng(seed)
    scores = {group.name: rng.lognormal(0.0, 1.0, group.units) for group in graph.prunable}
    measured: dict[str, LossCurve] = {}
    for group in graph.prunable:
        share = np.array([1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0])
        widths = np.unique(np.maximum(1, (share * group.units).round()).astype(np.int64))
        left = widths / group.units
        steepness, size = rng.uniform(1.5, 3.5), rng.lognormal(-1.0, 0.8)
        rise = size * (1 - left) ** steepness * (0.3 + 1 / np.sqrt(left))
        measured[group.name] = LossCurve(widths=widths, loss=0.5 + rise * rng.lognormal(0.0, 0.03, len(rise)))
    return Importance(
        criterion="synthetic",
        graph_sha256=graph.model_sha256,
        scores=scores,
        dense_loss=0.5,
        curves=measured if curves else {},
    )


def group_extent(name: str, count: int = 1, fixed: int = 0) -> Extent:
    """fixed + count x width of one group."""
    return Extent(fixed=fixed, groups=((name, count),))
