"""Before anyone trains anything: where the time goes on the board, and whether pruning can help there.

A handful of configurations, each run a few times in turns with the dense model: the smallest one, every width
lowered by the same few units, which shows the staircase of every layer at once, other thread counts, and 8 bits.
Where the runtime does not tell its kernels apart, the whole model is timed at the same widths instead.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.core.budget import format_seconds
from edgeprune.core.cost import evaluate, mac_terms
from edgeprune.core.effort import EFFORTS, Effort
from edgeprune.core.errors import AgentError, DeviceError, ModelError
from edgeprune.core.family import load_member
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import (
    Advice,
    FloatArray,
    Graph,
    Kernel,
    KernelAdvice,
    Quantity,
    Step,
    StepResult,
)
from edgeprune.core.stats import clean_turns, median, quantity, turn_medians, turn_ratios
from edgeprune.device.session import Session
from edgeprune.formats import Format, KernelMap, Resizer, runnable_precisions
from edgeprune.tables.design import DENSE, Configuration

if TYPE_CHECKING:
    from torch import Tensor, nn

LESS = (1, 4, 8, 12, 16, 32)
"""Units taken off every group at once, one configuration each."""
LESS_NAME = "less-"
SMALLEST = "smallest"
PROBE = f"0 kernels {DENSE}"
"""Key of the first step, which tells whether there are kernels."""
THREADS = "threads"
INT8 = "int8 ({} activations)"
WHOLE = "the whole model"
WEIGHTS = "weights.bin"
SHORT_S = 15e-6
"""A kernel this short spends its time on being started."""
CLEARLY_SLOWER = 1.15
OFTEN = 0.2
"""Share of interrupted turns from which kernels cannot be trusted."""
NOTEWORTHY = 0.9
WORTHWHILE = 0.85
"""Lowest reachable share of the dense latency above which pruning is not worth it."""


def advise_pruning(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    graph: Graph,
    session: Session,
    *,
    threads: Sequence[int] = (),
    int8: bool = True,
    effort: Effort = EFFORTS["quick"],
    progress: Progress = silent,
) -> Advice:
    """Where the time goes on the session's board, and what pruning can do about it, in the format of its runtime.

    threads: other thread counts to time the dense model with. int8: also time it with 8 bits.
    raises: ModelError, AgentError when the model does not run on the board.
    """
    sweep = _sweep(graph)
    member: Format = load_member("formats", session.format)
    with tempfile.TemporaryDirectory(prefix="edgeprune-advise-") as name:
        folder = Path(name)
        progress("exporting", 0, 0)
        resizer = member.make_resizer(module, inputs, graph)
        resizer.write_weights(folder / WEIGHTS)
        files = {WEIGHTS: folder / WEIGHTS}
        for configuration in (Configuration(name=DENSE, widths=graph.units), *sweep):
            file = f"{configuration.name}{member.SUFFIX}"
            files[file] = folder / file
            resizer.write_structure(configuration.widths, files[file], WEIGHTS)
        twins, notes = (
            _make_int8(member, session.target.runtime, resizer, graph, folder, progress) if int8 else ({}, [])
        )
        files |= {path.name: path for path in twins.values()}
        models = {name: path.name for name, path in twins.items()}
        models |= {configuration.name: f"{configuration.name}{member.SUFFIX}" for configuration in sweep}
        results = _measure(files, f"{DENSE}{member.SUFFIX}", models, threads, effort, session, progress)
    silence = untold.error if (untold := results[PROBE]).no_kernels else None
    if silence is not None:
        del results[PROBE]
        notes.append(f"the runtime does not tell its kernels apart, so {WHOLE} was timed at all widths: {silence}")
    for key in (PROBE, f"0 time {DENSE}"):
        if key in results and (error := results[key].error) is not None:
            raise AgentError(f"the board cannot run the dense model: {error}")
    notes += sorted({f"{key.split(' ', 2)[2]}: not measured: {r.error}" for key, r in results.items() if r.error})
    notes += _find_disturbance(results)
    whole = _read_times(results)
    dense = whole.pop(DENSE)
    times = {name: _times(share, dense) for name, share in whole.items()}
    outside, prunable_share = 0.0, None
    if silence is None:
        mapped = resizer.map_kernels(results[PROBE].kernels)
        kernels = _read_kernels(results, mapped)
        outside = _time_outside(kernels, results, dense.median, times.get(SMALLEST))
        judged = _judge_kernels(graph, mapped.kernels, kernels, dense.median - outside)
        inside = sum(kernel.time_s for kernel in judged)
        prunable_share = sum(kernel.time_s for kernel in judged if kernel.prunable) / inside if inside else 0.0
    else:
        judged = (_judge_whole(graph, whole, dense.median),)
    advice = Advice(
        target=session.target.name, conditions=session.conditions(), latency_s=dense, smallest_s=times.get(SMALLEST),
        outside_s=outside, kernels=judged, notes=tuple(notes), verdict="", prunable_share=prunable_share,
        threads=tuple((count, times[name]) for count in sorted(threads) if (name := f"{count} {THREADS}") in times),
        dtypes=tuple((name, whole[name]) for name in twins if name in whole),
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
            found.append(Configuration(name=f"{LESS_NAME}{less:02d}", widths=widths))
    least = lowered(max((group.units for group in graph.prunable), default=0))
    if graph.prunable:
        found.append(Configuration(name=SMALLEST, widths=least))
    return found


def _make_int8(
    member: Format, runtime: str, resizer: Resizer, graph: Graph, folder: Path, progress: Progress
) -> tuple[dict[str, Path], list[str]]:
    """Twins of the dense model in every int8 that the runtime runs, or why there are none."""
    whole = folder / f"whole{member.SUFFIX}"
    resizer.write_model({name: np.arange(count) for name, count in graph.units.items()}, whole)
    twins: dict[str, Path] = {}
    kinds = runnable_precisions(member, runtime, "int8")
    for number, precision in enumerate(kinds):
        progress("making int8 models", number, len(kinds))
        path = folder / f"{precision.name}{member.SUFFIX}"
        try:
            member.quantize_randomly(whole, path, precision)
        except ModelError as error:
            return twins, [f"int8: not measured: {error}"]
        twins[INT8.format(precision.activations)] = path
    return twins, []


def _plan_steps(
    dense: str, models: Mapping[str, str], threads: Sequence[int], effort: Effort, *, kernels: bool
) -> list[Step]:
    """Kernels of every width, and whole models of what is asked about, all in turns with the dense model.

    dense: its file. models: name -> file of the others. kernels: whether the runtime tells them; if not, whole models
    of every width. Keys: round, kind, and what it is.
    """
    widths = sorted(name for name in models if name.startswith((LESS_NAME, SMALLEST)))
    timed: list[tuple[str, str, int | None]] = [(f"{count} {THREADS}", dense, count) for count in threads]
    timed += [(name, file, None) for name, file in models.items() if not (kernels and name.startswith(LESS_NAME))]
    steps = []
    for number in range(effort.rounds):
        if kernels:
            steps += [
                Step(key=f"{number} kernels {name}", kind="kernels", artifact=models.get(name, dense), against=dense,
                     runs=effort.profiled_runs)
                for name in (DENSE, *widths)
            ]  # fmt: skip
        alone = Step(key=f"{number} time {DENSE}", kind="time", artifact=dense, seconds=effort.seconds,
                     precision=effort.precision, min_samples=effort.samples)  # fmt: skip
        steps.append(alone)
        steps += [
            replace(alone, key=f"{number} time {name}", artifact=file, against=dense, threads=count)
            for name, file, count in timed
        ]
    return steps


def _measure(
    files: Mapping[str, Path], dense: str, models: Mapping[str, str], threads: Sequence[int], effort: Effort,
    session: Session, progress: Progress,
) -> dict[str, StepResult]:  # fmt: skip
    """Results by key; where the first one says that there are no kernels, of whole models only."""
    results: dict[str, StepResult] = {}
    steps = _plan_steps(dense, models, threads, effort, kernels=True)

    def take(result: StepResult) -> None:
        results[result.key] = result
        progress(f"measuring on {session.target.name}", len(results), len(steps))

    job = f"advise-{time.time_ns():x}"
    session.push(files)
    try:
        (probe,) = session.run(steps[:1], job=job, on_result=take)
        if probe.no_kernels:
            steps = [steps[0], *_plan_steps(dense, models, threads, effort, kernels=False)]
        session.run(steps[1:], job=job, on_result=take)
    finally:
        with suppress(DeviceError):  # a board that cannot be reached any more keeps them
            session.remove(list(files))
    return results


def _read_times(results: Mapping[str, StepResult]) -> dict[str, Quantity]:
    """The dense model's latency in seconds, and what each other takes in shares of it."""
    dense: list[FloatArray] = []
    shares: dict[str, list[FloatArray]] = {}
    for key, result in results.items():
        if result.kind != "time" or result.samples is None:
            continue
        dense.append(clean_turns(result.against or result.samples))
        if result.against is not None:
            shares.setdefault(key.split(" ", 2)[2], []).append(turn_ratios(result.samples, result.against))
    return {DENSE: quantity(np.concatenate(dense))} | {
        name: quantity(np.concatenate(rounds)) for name, rounds in shares.items()
    }


def _find_disturbance(results: Mapping[str, StepResult]) -> list[str]:
    """That the board had other work, where it had much."""
    found = [samples for result in results.values() for samples in (result.samples, result.against) if samples]
    share = sum(len(samples.interrupted) for samples in found) / sum(len(turn_medians(samples)) for samples in found)
    if share <= OFTEN:
        return []
    return [
        f"something else had the processor in {share:.0%} of the turns; kernels and staircase are rough: stop it and "
        "ask again"
    ]


def _read_kernels(results: Mapping[str, StepResult], mapped: KernelMap) -> dict[str, dict[str, float]]:
    """Configuration -> kernel -> profiled seconds at the speed that the board had at first."""
    found: dict[str, list[dict[str, float]]] = {}
    usual = results[PROBE].against_run_s or 0.0
    for key, result in results.items():
        if result.kind == "kernels" and result.against_run_s:
            speed = usual / result.against_run_s
            times = {name: speed * seconds for name, seconds in mapped.charge(result.kernels).items()}
            found.setdefault(key.split(" ", 2)[2], []).append(times)
    return {
        name: {kernel: median([times.get(kernel, 0.0) for times in rounds]) for kernel in rounds[0]}
        for name, rounds in found.items()
    }


def _time_outside(
    kernels: Mapping[str, Mapping[str, float]],
    results: Mapping[str, StepResult],
    dense_s: float,
    smallest: Quantity | None,
) -> float:
    """Seconds of the dense model in no kernel: what is left where the line through it and the smallest one has none.

    Without a smallest one, the gap in the profiled run, which the profiler itself makes wider.
    """
    dense = sum(kernels[DENSE].values())
    if smallest is not None and SMALLEST in kernels:
        least = sum(kernels[SMALLEST].values())
        slope = (dense_s - smallest.median) / (dense - least) if dense > least else 0.0
        outside = smallest.median - slope * least
    else:
        run_s = results[PROBE].run_s or dense
        outside = dense_s * (1 - dense / run_s)
    return min(max(outside, 0.0), dense_s)


def _judge_kernels(
    graph: Graph, kernels: Sequence[Kernel], times: Mapping[str, Mapping[str, float]], inside_s: float
) -> tuple[KernelAdvice, ...]:
    """Every kernel of the dense model, the costliest first."""
    dense = times[DENSE]
    # The profiler slows the run: kernels are shares of the model timed without it.
    scale = inside_s / sum(dense.values())
    macs = {name: evaluate(terms, {}, graph.units) for name, terms in mac_terms(graph).items()}
    groups = {group.name for group in graph.prunable}
    less = sorted((name for name in times if name.startswith(LESS_NAME)), key=lambda name: int(name[len(LESS_NAME) :]))
    work = {kernel.name: sum(macs.get(node, 0) for node in kernel.nodes) for kernel in kernels}
    rates = [work[kernel.name] / (scale * dense[kernel.name]) for kernel in kernels if dense.get(kernel.name)]
    fastest = max(rates, default=0.0)
    found = []
    for kernel in kernels:
        seconds = scale * dense.get(kernel.name, 0.0)
        steps = tuple((int(name[len(LESS_NAME) :]), _share(times[name], dense, kernel)) for name in less)
        found.append(
            KernelAdvice(
                name=_layer(graph, kernel), op=kernel.signature.split(" ")[0], time_s=seconds, macs=work[kernel.name],
                limited_by=_limit(seconds, work[kernel.name], fastest), prunable=bool(groups & _groups(kernel)),
                steps=steps,
            )
        )  # fmt: skip
    return tuple(sorted(found, key=lambda kernel: -kernel.time_s))


def _judge_whole(graph: Graph, shares: Mapping[str, Quantity], dense_s: float) -> KernelAdvice:
    """The dense model as if it were one kernel. shares: of its latency, by configuration."""
    less = sorted((int(name[len(LESS_NAME) :]), name) for name in shares if name.startswith(LESS_NAME))
    return KernelAdvice(
        name=WHOLE, op="", time_s=dense_s, limited_by="", prunable=bool(graph.prunable),
        macs=sum(evaluate(terms, {}, graph.units) for terms in mac_terms(graph).values()),
        steps=tuple((units, shares[name].median) for units, name in less),
    )  # fmt: skip


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
        share = advice.prunable_share
        where = "" if share is None else f"; {share:.0%} of the time is in kernels that shrink"
        if reach > WORTHWHILE:
            parts.append(f"Pruning is not worth it here: {span}, {reach:.0%} of the dense latency{where}.")
        else:
            parts.append(f"Pruning can pay here: {span}, {reach:.0%} of the dense latency{where}.")
    odd = _cost_of_odd_widths(advice.kernels)
    if odd is not None:
        parts.append(
            f"Widths have to stay on the runtime's blocks: with {odd[0]} fewer, layers take {odd[1]:.1f} times as long."
        )
    if advice.dtypes:
        dtype, best = min(advice.dtypes, key=lambda pair: pair[1].median)
        if best.high < NOTEWORTHY:
            parts.append(f"{dtype} alone gives {best.median:.2f} of float32 (accuracy not evaluated).")
        elif best.low > 1:
            parts.append(f"8 bits are no gain here: {best.median:.2f} of float32 at best.")
    quicker = [(count, time) for count, time in advice.threads if time.median < NOTEWORTHY * dense]
    if quicker:
        count, time = min(quicker, key=lambda pair: pair[1].median)
        parts.append(f"{count} threads alone give {format_seconds(time.median)}.")
    return " ".join(parts)
