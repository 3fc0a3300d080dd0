"""Before anyone trains anything: where the time goes on the board, and whether pruning can help there.

A handful of configurations, each run a few times: the dense model, the smallest one, and every width
lowered by the same few units, which shows the staircase of every layer at once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from edgeprune.core.budget import format_seconds
from edgeprune.core.cost import evaluate, mac_terms
from edgeprune.core.effort import EFFORTS, Effort
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import Advice, Graph, Kernel, KernelAdvice, Profile, Quantity, Step
from edgeprune.core.stats import quantity
from edgeprune.device.session import Session, open_session
from edgeprune.formats import onnx as onnx_format
from edgeprune.profile import dense_latency, profile_configurations
from edgeprune.tables.combine import average_rounds, measured_latency
from edgeprune.tables.design import DENSE, Configuration

if TYPE_CHECKING:
    from torch import Tensor, nn

LESS = (1, 2, 4, 8, 12, 16, 24, 32)
"""Units taken off every group at once, one configuration each."""
SMALLEST = "smallest"
SHORT_S = 15e-6
"""A kernel this short spends its time on being started."""
CLEARLY_SLOWER = 1.15
WORTHWHILE = 0.85
"""Lowest reachable share of the dense latency above which pruning is not worth it."""


def advise_pruning(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    graph: Graph,
    session: Session,
    *,
    threads: Sequence[int] = (),
    effort: Effort = EFFORTS["quick"],
    progress: Progress = silent,
) -> Advice:
    """Where the time goes on the session's board, and what pruning can do about it.

    threads: other thread counts to time the dense model with.
    raises: ModelError, AgentError when the model does not run on the board.
    """
    with tempfile.TemporaryDirectory(prefix="edgeprune-advise-") as folder:
        path = Path(folder) / "profile.jsonl"
        sweep = [Configuration(name=DENSE, widths=graph.units), *_sweep(graph)]
        profile = profile_configurations(
            module, inputs, graph, session, sweep, path=path, effort=effort, progress=progress
        )
        others = _time_threads(module, inputs, session, Path(folder), threads, effort)
    dense = dense_latency(profile)
    known = {item.configuration for item in profile.measurements}
    smallest = measured_latency(profile.measurements, SMALLEST) if SMALLEST in known else None
    kernels = _judge_kernels(graph, profile)
    inside = sum(kernel.time_s for kernel in kernels)
    prunable = sum(kernel.time_s for kernel in kernels if kernel.prunable) / inside if inside else 0.0
    times = tuple(sorted(((count, _times(share, dense)) for count, share in others.items()), key=lambda pair: pair[0]))
    advice = Advice(
        target=session.target.name, conditions=session.conditions(), latency_s=dense, smallest_s=smallest,
        outside_s=profile.overhead_s, prunable_share=prunable, kernels=kernels, threads=times, verdict="",
    )  # fmt: skip
    return replace(advice, verdict=_verdict(advice))


def _sweep(graph: Graph) -> list[Configuration]:
    """Every group lowered by the same few units, and every group at its least."""

    def lowered(less: int) -> dict[str, int]:
        widths = graph.units
        for group in graph.prunable:
            # What is no multiple of the group's step cannot be built.
            widths[group.name] = max(group.units - less // group.step * group.step, group.step)
        return widths

    found: list[Configuration] = []
    for less in LESS:
        widths = lowered(less)
        if widths != graph.units and all(widths != other.widths for other in found):
            found.append(Configuration(name=f"less-{less:02d}", widths=widths))
    least = lowered(max((group.units for group in graph.prunable), default=0))
    if graph.prunable:
        found.append(Configuration(name=SMALLEST, widths=least))
    return found


def _time_threads(
    module: nn.Module, inputs: tuple[Tensor, ...], session: Session, folder: Path, counts: Sequence[int], effort: Effort
) -> dict[int, Quantity]:
    """Latency with other thread counts as a share of the session's own, from alternating sessions."""
    if not counts:
        return {}
    onnx_format.export(module, inputs, folder / "whole.onnx")
    step = Step(key="time", kind="time", artifact="whole.onnx", seconds=effort.seconds)
    shares: dict[int, Quantity] = {}
    for count in counts:
        with open_session(replace(session.target, threads=count)) as other:
            for each in (session, other):
                each.push({"whole.onnx": folder / "whole.onnx"})
            ratios = []
            for turn in range(max(3, effort.repeats)):
                ours, theirs = (
                    each.run([replace(step, key=str(turn))], job=f"threads-{each.target.threads}-{folder.name}")[0]
                    for each in (session, other)
                )
                if ours.samples is None or theirs.samples is None:
                    break
                ratios.append(median(theirs.samples.values) / median(ours.samples.values))
            if ratios:
                shares[count] = quantity(ratios)
            for each in (session, other):
                each.remove(["whole.onnx"])
    return shares


def _judge_kernels(graph: Graph, profile: Profile) -> tuple[KernelAdvice, ...]:
    """Every kernel of the dense model, the costliest first."""
    configured = {item.name: item for item in average_rounds(profile.measurements)}
    dense = configured[DENSE].kernels
    # The profiler slows the run: kernels are shares of the model timed without it.
    scale = (configured[DENSE].whole_s - profile.overhead_s) / sum(dense.values())
    macs = {name: evaluate(terms, {}, graph.units) for name, terms in mac_terms(graph).items()}
    groups = {group.name for group in graph.prunable}
    less = sorted((name for name in configured if name.startswith("less-")), key=lambda name: int(name[5:]))
    rates = [
        sum(macs.get(node, 0) for node in kernel.nodes) / (scale * dense[kernel.name])
        for kernel in profile.kernels
        if dense.get(kernel.name)
    ]
    fastest = max(rates, default=0.0)
    found = []
    for kernel in profile.kernels:
        seconds = scale * dense.get(kernel.name, 0.0)
        work = sum(macs.get(node, 0) for node in kernel.nodes)
        steps = tuple((int(name[5:]), _share(configured[name].kernels, dense, kernel)) for name in less)
        found.append(
            KernelAdvice(
                name=_layer(graph, kernel), op=kernel.signature.split(" ")[0], time_s=seconds, macs=work,
                limited_by=_limit(seconds, work, fastest), prunable=bool(groups & _groups(kernel)), steps=steps,
            )
        )  # fmt: skip
    return tuple(sorted(found, key=lambda kernel: -kernel.time_s))


def _limit(seconds: float, macs: int, fastest: float) -> str:
    """What a kernel waits for; what the board's arithmetic can do is what the best kernel of the model reaches."""
    if seconds <= SHORT_S:
        return "start-up"
    return "compute" if macs / seconds >= 0.4 * fastest else "memory"


def _share(times: Mapping[str, float], dense: Mapping[str, float], kernel: Kernel) -> float:
    return times.get(kernel.name, 0.0) / dense[kernel.name] if dense.get(kernel.name) else 0.0


def _groups(kernel: Kernel) -> set[str]:
    return {name for extent in (kernel.in_extent, kernel.out_extent) if extent for name, _ in extent.groups}


def _layer(graph: Graph, kernel: Kernel) -> str:
    nodes = {node.name: node for node in graph.nodes}
    covered = [nodes[name] for name in kernel.nodes if name in nodes]
    return next((node.path for node in covered if node.path and node.parameters), kernel.name)


def _times(share: Quantity, seconds: Quantity) -> Quantity:
    return Quantity(
        median=share.median * seconds.median, low=share.low * seconds.median, high=share.high * seconds.median
    )


def _cost_of_odd_widths(kernels: Sequence[KernelAdvice]) -> tuple[str, float] | None:
    """The removal that slows the prunable layers most, where one does clearly, and how many times as long they take."""
    layers = [kernel for kernel in kernels if kernel.prunable and kernel.steps]
    total = sum(kernel.time_s for kernel in layers)
    if not total:
        return None
    slowed = [
        (sum(kernel.time_s * kernel.steps[place][1] for kernel in layers) / total, less)
        for place, (less, _) in enumerate(layers[0].steps)
    ]
    share, less = max(slowed)
    return (f"{less} unit" + ("s" if less > 1 else ""), share) if share > CLEARLY_SLOWER else None


def _verdict(advice: Advice) -> str:
    """In a sentence or two, whether pruning is worth it here."""
    dense = advice.latency_s.median
    parts = []
    if advice.smallest_s is None:
        parts.append("Nothing of this model can be pruned (`edgeprune trace` says why).")
    else:
        reach = advice.smallest_s.median / dense
        span = f"from {format_seconds(dense)} to {format_seconds(advice.smallest_s.median)} at the least widths"
        share = f"{advice.prunable_share:.0%} of the time is in kernels that shrink"
        if reach > WORTHWHILE:
            parts.append(f"Pruning is not worth it here: {span}, {reach:.0%} of the dense latency; {share}.")
        else:
            parts.append(f"Pruning can pay here: {span}, {reach:.0%} of the dense latency; {share}.")
    odd = _cost_of_odd_widths(advice.kernels)
    if odd is not None:
        parts.append(
            f"Widths have to stay on the runtime's blocks: with {odd[0]} fewer, layers take {odd[1]:.1f} times."
        )
    quicker = [(count, time) for count, time in advice.threads if time.median < 0.9 * dense]
    if quicker:
        count, time = min(quicker, key=lambda pair: pair[1].median)
        parts.append(f"{count} threads alone give {format_seconds(time.median)}.")
    return " ".join(parts)
