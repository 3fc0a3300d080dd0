"""Records as a real run leaves them: WRN-16-2 at half its latency, on a board that works in blocks of 16."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgeprune.core.cost import predict_cost, predict_latency
from edgeprune.core.records import (
    Accuracy,
    Budget,
    Check,
    Conditions,
    Cost,
    Extent,
    Graph,
    Group,
    HeldOutError,
    Importance,
    Kernel,
    LossCurve,
    Measurement,
    Node,
    NumericError,
    Parameter,
    Plan,
    PlanRound,
    Profile,
    Quantity,
    Report,
    Samples,
    SolverResult,
    Table,
)
from edgeprune.core.stats import quantity

TILE = 16
# layer, input group, output group, output height and width, kernel size
LAYERS = [
    ("conv1", "x", "conv1", 32, 3),
    ("layer1.0.conv1", "conv1", "layer1.0.conv1", 32, 3),
    ("layer1.0.conv2", "layer1.0.conv1", "layer1", 32, 3),
    ("layer1.0.shortcut", "conv1", "layer1", 32, 1),
    ("layer1.1.conv1", "layer1", "layer1.1.conv1", 32, 3),
    ("layer1.1.conv2", "layer1.1.conv1", "layer1", 32, 3),
    ("layer2.0.conv1", "layer1", "layer2.0.conv1", 16, 3),
    ("layer2.0.conv2", "layer2.0.conv1", "layer2", 16, 3),
    ("layer2.0.shortcut", "layer1", "layer2", 16, 1),
    ("layer2.1.conv1", "layer2", "layer2.1.conv1", 16, 3),
    ("layer2.1.conv2", "layer2.1.conv1", "layer2", 16, 3),
    ("layer3.0.conv1", "layer2", "layer3.0.conv1", 8, 3),
    ("layer3.0.conv2", "layer3.0.conv1", "layer3", 8, 3),
    ("layer3.0.shortcut", "layer2", "layer3", 8, 1),
    ("layer3.1.conv1", "layer3", "layer3.1.conv1", 8, 3),
    ("layer3.1.conv2", "layer3.1.conv1", "layer3", 8, 3),
    ("fc", "layer3", "logits", 1, 1),
]
UNITS = {"x": 3, "conv1": 16, "logits": 10}
UNITS |= {out: {"1": 32, "2": 64, "3": 128}[out[5]] for _, _, out, *_ in LAYERS if out.startswith("layer")}
KEPT = {
    "conv1": 16, "layer1": 32, "layer1.0.conv1": 16, "layer1.1.conv1": 16, "layer2": 64, "layer2.0.conv1": 48,
    "layer2.1.conv1": 16, "layer3": 96, "layer3.0.conv1": 80, "layer3.1.conv1": 32,
}  # fmt: skip
CONDITIONS = Conditions(
    board="raspberry_pi", arch="aarch64", cpu="Cortex-A72", runtime="onnxruntime", runtime_version="1.31.1", cpus=4,
    governor="performance", freq_hz=1.5e9, temp_before_c=48.3, temp_after_c=52.1,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What `render_report` takes."""

    graph: Graph
    profile: Profile
    importance: Importance
    plan: Plan
    report: Report


def make_graph() -> Graph:
    """WRN-16-2 with its residual streams as groups; input and output frozen."""
    nodes = [Node(name="x", path="", op="input", out_shape=(1, 3, 32, 32),
                  out_extents=tuple(Extent(fixed=n) for n in (1, 3, 32, 32)))]  # fmt: skip
    parameters = []
    produced = {"x": "x"}
    for layer, source, out, size, kernel in LAYERS:
        extents = (_width(out), _width(source), Extent(fixed=kernel), Extent(fixed=kernel))
        shape = (UNITS[out], UNITS[source], kernel, kernel)
        parameters.append(Parameter(name=f"{layer}.weight", shape=shape, extents=extents))
        nodes.append(Node(
            name=layer.replace(".", "_"), path=layer, op="conv2d", inputs=(produced[source],),
            parameters=(f"{layer}.weight",), out_shape=(1, UNITS[out], size, size),
            out_extents=(Extent(fixed=1), _width(out), Extent(fixed=size), Extent(fixed=size)),
        ))  # fmt: skip
        produced[out] = nodes[-1].name
    frozen = {"x": "input of the model", "logits": "output of the model"}
    groups = tuple(Group(name=name, units=units, frozen_because=frozen.get(name)) for name, units in UNITS.items())
    return Graph(
        model_sha256="a" * 64, inputs=("x",), outputs=("fc",), nodes=tuple(nodes), parameters=tuple(parameters),
        groups=groups, unsupported=(("cumsum", "position_encoding"),),
    )  # fmt: skip


def _width(group: str) -> Extent:
    return Extent(fixed=UNITS[group]) if group in ("x", "logits") else Extent(groups=((group, 1),))


def make_profile(graph: Graph, seed: int = 0) -> Profile:
    """24 configurations in 3 rounds, 6 of them held out; noise of 1.5 %."""
    rng = np.random.default_rng(seed)
    kernels, tables = [], {}
    for layer, source, out, size, kernel in LAYERS:
        signature = f"conv2d {kernel}x{kernel} {size}x{size}"
        name = layer.replace(".", "_")
        kernels.append(Kernel(name=f"{name}_nchwc", nodes=(name,), signature=signature, in_extent=_width(source),
                              out_extent=_width(out)))  # fmt: skip
        grid = np.arange(TILE, 129, TILE)
        macs = np.multiply.outer(grid, grid) * kernel**2 * size**2
        tables[signature] = Table(signature=signature, in_sizes=grid, out_sizes=grid, latency_s=4e-6 + macs / 22e9,
                                  tile_in=TILE, tile_out=TILE)  # fmt: skip
    profile = Profile(
        target="raspberry-pi-4", conditions=CONDITIONS, graph_sha256=graph.model_sha256, artifact_sha256="b" * 64,
        dense_bytes=2_790_000, kernels=tuple(kernels), measurements=(), tables=tuple(tables.values()),
        overhead_s=60e-6, additivity_gap=0.021,
    )  # fmt: skip
    prunable = [group for group in graph.groups if group.frozen_because is None]
    designs = [{}, *({g.name: int(rng.integers(1, g.units // 8 + 1)) * 8 for g in prunable} for _ in range(23)), KEPT]
    measurements, errors = [], []
    for number, widths in enumerate(designs):
        held_out = 18 <= number < 24
        truth = predict_latency(graph, widths, profile) * (1 + rng.normal(0, 0.012))
        if held_out:
            errors.append(abs(predict_latency(graph, widths, profile) / truth - 1))
        for turn in range(3):
            samples = tuple(truth * (1 + np.abs(rng.normal(0, 0.015, 9))))
            dense = tuple(predict_latency(graph, {}, profile) * (1 + np.abs(rng.normal(0, 0.015, 9))))
            measurements.append(Measurement(
                configuration="dense" if not widths else f"c{number:02d}", round=turn, widths=widths,
                held_out=held_out, samples=Samples(values=samples, loops=4, warmups=3), run_s=truth * 1.04,
                dense=Samples(values=dense, loops=4, warmups=3),
                kernels=_kernel_times(graph, profile, widths, rng), conditions=CONDITIONS,
            ))  # fmt: skip
    return Profile(
        target=profile.target, conditions=CONDITIONS, graph_sha256=graph.model_sha256, artifact_sha256="b" * 64,
        dense_bytes=profile.dense_bytes, kernels=profile.kernels, measurements=tuple(measurements),
        tables=profile.tables, overhead_s=profile.overhead_s, additivity_gap=profile.additivity_gap,
        held_out=HeldOutError(mean=float(np.mean(errors)), max=float(np.max(errors)), configurations=len(errors)),
    )  # fmt: skip


def _kernel_times(graph: Graph, profile: Profile, widths: dict[str, int], rng: np.random.Generator) -> dict[str, float]:
    rest = [kernel.name for kernel in profile.kernels]
    times = {}
    for kernel in profile.kernels:
        only = Profile(**{field: getattr(profile, field) for field in Profile.__slots__} | {"kernels": (kernel,)})
        times[kernel.name] = (predict_latency(graph, widths, only) - profile.overhead_s) * (1 + rng.normal(0, 0.02))
    assert list(times) == rest
    return times


def make_importance(graph: Graph) -> Importance:
    """Scores, and loss curves that rise as units go, more steeply in narrow groups."""
    rng = np.random.default_rng(1)
    curves = {}
    for group in graph.prunable:
        widths = np.unique(np.linspace(group.units // 8, group.units, 8).astype(np.int64))
        removed = 1 - widths / group.units
        curves[group.name] = LossCurve(widths=widths, loss=0.031 + rng.uniform(0.4, 3) * removed ** rng.uniform(2, 4))
    scores = {group.name: rng.gamma(1.0, 1.0, group.units) for group in graph.prunable}
    return Importance(
        criterion="taylor", graph_sha256=graph.model_sha256, scores=scores, dense_loss=0.031, curves=curves
    )


def make_evidence(*, passed: bool = True) -> Evidence:
    """A whole run; `passed=False`: the board was 8 % slower than promised."""
    graph = make_graph()
    profile = make_profile(graph)
    dense, compact = predict_cost(graph, {}, profile), predict_cost(graph, KEPT, profile)
    assert dense.latency_s is not None and compact.latency_s is not None
    limit = dense.latency_s.median * 0.5
    slow = 1.0 if passed else 1.08
    rng = np.random.default_rng(2)
    real = {"dense": dense.latency_s.median, "compact": limit * 0.985 * slow}
    samples = {
        name: tuple(Samples(values=tuple(value * (1 + np.abs(rng.normal(0, 0.012, 15)))), loops=8) for _ in range(5))
        for name, value in real.items()
    }
    measured = {name: quantity([float(np.median(s.values)) for s in rounds]) for name, rounds in samples.items()}
    plan_rounds = tuple(
        PlanRound(asked_s=limit * asked, predicted_s=limit * asked * 0.99, widths=KEPT,
                  measured=Quantity(median=limit * got, low=limit * got * 0.99, high=limit * got * 1.01))
        for asked, got in ((1.0, 1.06), (0.94, 0.95), (0.97, 0.985))
    )  # fmt: skip
    budget = Budget(latency_s=limit, artifact_bytes=2_000_000)
    plan = Plan(
        graph_sha256=graph.model_sha256, budget=budget, widths=KEPT,
        keep={name: np.arange(width) for name, width in KEPT.items()}, predicted=compact, solver="milp",
        status="optimal", gap=0.0004, loss=0.412, rounds=plan_rounds,
        alternatives=tuple(
            SolverResult(solver=name, status=status, widths=KEPT, loss=loss, cost=compact, gap=gap, seconds=seconds)
            for name, status, loss, gap, seconds in (
                ("milp", "optimal", 0.412, 0.0004, 1.8), ("greedy", "feasible", 0.533, None, 0.02),
                ("uniform", "feasible", 1.27, None, 0.001))
        ),
    )  # fmt: skip
    costs = {
        name: Cost(latency_s=measured[name], peak_memory_bytes=memory, artifact_bytes=size,
                   parameters=cost.parameters, macs=cost.macs)
        for name, cost, memory, size in (("dense", dense, 1_310_720, 2_790_000), ("compact", compact, 983_040, 820_000))
    }  # fmt: skip
    share = measured["compact"].median / limit
    checks = (
        Check(name="latency (median)", predicted=compact.latency_s.median, measured=measured["compact"].median,
              limit=limit, unit="s", passed=share <= 1, note=f"uses {share:.1%} of the budget"),
        Check(name="artifact size", predicted=815_000, measured=820_000, limit=2_000_000, unit="bytes", passed=True),
        Check(name="numeric error", predicted=None, measured=2.1e-6, limit=1e-3, unit="relative", passed=True,
              note="largest difference from the host over 512 examples, of the largest output"),
        Check(name="top-1 agreement", predicted=None, measured=1.0, limit=0.99, unit="share", passed=True,
              note="at least; same answer on the board and on the host"),
    )  # fmt: skip
    report = Report(
        artifact_sha256="c" * 64, target="raspberry-pi-4", budget=budget, dense=costs["dense"],
        compact=costs["compact"], predicted=compact,
        accuracy=Accuracy(dense=0.972, before_recovery=0.641, after_recovery=0.969, on_board=0.969),
        numeric_error=NumericError(max_absolute=4.4e-5, max_relative=2.1e-6, top1_agreement=1.0, examples=512),
        checks=checks, conditions=CONDITIONS, samples=samples,
        provenance={"edgeprune": "0.1.0", "torch": "2.13.0", "onnx": "1.23.2", "date": "2026-11-22"},
    )  # fmt: skip
    return Evidence(graph=graph, profile=profile, importance=make_importance(graph), plan=plan, report=report)
