"""Which precision a model runs best in on a board: measured, not assumed.

Every precision is timed in turns with the dense float32 model. What 8 bits make slower, and what they break, stays in
float32: the first is seen in the times of the kernels, the second in the loss when one layer alone is left out.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.core.effort import DEFAULT, Effort
from edgeprune.core.errors import AgentError, DeviceError
from edgeprune.core.family import load_member
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import (
    FLOAT32,
    Graph,
    KernelTime,
    Precision,
    PrecisionTrial,
    Quantity,
    Step,
    StepResult,
)
from edgeprune.core.stats import median, quantity, turn_ratios
from edgeprune.core.tensors import Calibration, random_like
from edgeprune.device.session import Session
from edgeprune.export import evaluate_artifact
from edgeprune.formats import Resizer, runnable_precisions
from edgeprune.graphs.fake_quantize import simulate_int8
from edgeprune.objective import Batches, evaluate_accuracy
from edgeprune.recover import Data, recover_accuracy

NodesTime = tuple[frozenset[str], float]
"""The nodes of a graph that a kernel computes, and its seconds."""
FLOATS = ("float32", "float16")
"""What computes in float32."""
RANDOM_BATCHES = 2
SLOWER = 1.1
"""A kernel that takes this many times as long in 8 bits as in float32 is slowed by them; less is noise."""
BREAKS = 0.25
"""Share of the divergence that is left which an operation alone has to make up for to count as broken by 8 bits."""
EXAMPLES = 128
"""Calibration examples whose outputs the divergence is taken over, once for every rounded tensor."""
SHORT_LIST = 12
MENDED = 0.1
"""Share of the divergence at which no more is looked for."""
MOST_IN_FLOAT = 6
"""Operations; more are not a few broken ones."""
NOTICEABLE = 0.01
"""Share of the model's latency that operations have to lose together for it to be worth a conversion to and fro."""


def try_precisions(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    session: Session,
    dtype: str,
    *,
    effort: Effort = DEFAULT,
    progress: Progress = silent,
) -> tuple[PrecisionTrial, ...]:
    """How fast the dense model is on a board in every precision of a dtype that the runtime's format can write.

    Which type of activations int8 is fast with differs from processor to processor by more than a factor of two, so
    it is measured: each in turns with the dense float32 model, with ranges from random inputs.
    returns: the fastest first. raises: UsageError where the format has no such dtype; AgentError where none runs.
    """
    member = load_member("formats", session.format)
    precisions = runnable_precisions(member, session.target.runtime, dtype)
    with _files(model, inputs, None, precisions, session, progress) as names:
        results = _time_in_turns(session, names, names[FLOAT32], effort)
    trials = [
        PrecisionTrial(precision=precision, latency_share=share)
        for precision in precisions
        if (share := _share(results[precision])) is not None
    ]
    if not trials:
        errors = {result.error for each in results.values() for result in each if result.error}
        raise AgentError(f"target {session.target.name} cannot run the model in {dtype}: {'; '.join(sorted(errors))}")
    return tuple(sorted(trials, key=lambda trial: trial.latency_share.median))


def worth_planning(trials: Sequence[PrecisionTrial], *, latency_only: bool) -> tuple[Precision, ...]:
    """The precisions that a plan of automatic dtype has to weigh: float32, and what is faster or may be smaller.

    latency_only: the budget is on nothing but the latency, so that what is slower than float32 cannot win.
    """
    faster = [trial.precision for trial in trials if not latency_only or trial.latency_share.low < 1]
    return (FLOAT32, *faster[:1])


def leave_in_float(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    graph: Graph,
    session: Session,
    trial: PrecisionTrial,
    resizer: Resizer,
    judge: Judge,
    *,
    tolerance: float,
    effort: Effort = DEFAULT,
    progress: Progress = silent,
) -> PrecisionTrial:
    """The trial, or that of the same int8 with the operations in float32 that it slows down, or breaks.

    The arguments are those of `leave_slow_in_float` and `leave_broken_in_float`.
    """
    trial = leave_slow_in_float(model, inputs, graph, session, trial, resizer, effort=effort, progress=progress)
    precision = leave_broken_in_float(model, trial.precision, judge, tolerance=tolerance, progress=progress)
    if precision == trial.precision:
        return trial
    return time_precision(model, inputs, graph, session, precision, effort=effort, progress=progress)


def leave_slow_in_float(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    graph: Graph,
    session: Session,
    trial: PrecisionTrial,
    resizer: Resizer,
    *,
    effort: Effort = DEFAULT,
    progress: Progress = silent,
) -> PrecisionTrial:
    """The precision with those operations left in float32 that 8 bits slow down, where that is faster as a whole.

    trial: of int8. resizer: of its precision. returns: the mixed precision's trial; `trial` itself where no kernel
        is clearly slower, the runtime tells no kernels, or the conversions to and fro cost what is won.
    """
    precision = trial.precision
    with _files(model, inputs, graph, (precision,), session, progress) as names:
        found = _profile(session, names, effort)
    if found is None:
        return trial
    slow = slower_operations(*(_times_of_nodes(resizer, found[each]) for each in (FLOAT32, precision)))
    if not slow:
        return trial
    mixed = replace(precision, float_nodes=tuple(node.name for node in graph.nodes if node.name in slow))
    with _files(model, inputs, graph, (precision, mixed), session, progress) as names:
        against_plain = _share(_time_in_turns(session, {mixed: names[mixed]}, names[precision], effort)[mixed])
        if against_plain is None or against_plain.high >= 1:
            return trial
        share = _share(_time_in_turns(session, {mixed: names[mixed]}, names[FLOAT32], effort)[mixed])
    return trial if share is None else PrecisionTrial(precision=mixed, latency_share=share)


def time_precision(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    graph: Graph,
    session: Session,
    precision: Precision,
    *,
    effort: Effort = DEFAULT,
    progress: Progress = silent,
) -> PrecisionTrial:
    """How fast the dense model is in one precision. raises: AgentError where it does not run."""
    with _files(model, inputs, graph, (precision,), session, progress) as names:
        results = _time_in_turns(session, names, names[FLOAT32], effort)[precision]
    share = _share(results)
    if share is None:
        raise AgentError(f"target {session.target.name} cannot run {precision.name}: {results[0].error}")
    return PrecisionTrial(precision=precision, latency_share=share)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """How accurate a module is as a file of some precision, run on this machine.

    inputs: example inputs. graph: of the dense model. format: member of `formats`. calibration: what int8 takes its
    ranges from. batches: labelled examples that it is judged on; not those that the run reports at last.
    """

    inputs: tuple[Tensor, ...]
    graph: Graph
    format: str
    calibration: Calibration
    batches: Batches

    def accuracy(self, module: nn.Module, precision: Precision, batches: Batches | None = None) -> float:
        """Top-1 in [0, 1]. batches: other examples."""
        given = self.batches if batches is None else batches
        if precision.dtype in FLOATS:
            return evaluate_accuracy(module, given)
        member = load_member("formats", self.format)
        with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
            path = Path(folder) / f"model{member.SUFFIX}"
            # Not checked against the module: how far it is off is the question.
            member.export(
                module, self.inputs, path, precision=precision, calibration=self.calibration, graph=self.graph
            )
            return evaluate_artifact(path, given, format=self.format)


def leave_broken_in_float(
    model: nn.Module, precision: Precision, judge: Judge, *, tolerance: float, progress: Progress = silent
) -> Precision:
    """The precision with those operations left in float32 that alone make 8 bits lose accuracy.

    Few layers break int8, by a range that a single value stretches or by weights of very unlike channels. They are
    found by simulation: without the rounding of one tensor at a time, how much nearer the outputs come to the float
    model's (Kullback-Leibler divergence). What the simulation finds is taken only if the artifact confirms it.
    tolerance: accuracy that may be lost. returns: `precision` itself where 8 bits lose no more than that, or lose it
        a little everywhere, which training mends better.
    """
    wanted = judge.accuracy(model, FLOAT32)
    lost = wanted - judge.accuracy(model, precision)
    if lost <= tolerance:
        return precision
    examples = _first_examples(judge.batches, EXAMPLES)
    simulated = simulate_int8(model, judge.inputs, precision, examples)
    model.eval()
    with torch.no_grad():
        targets = [model(*example).log_softmax(1) for example in examples]

        def divergence(operations: Sequence[str]) -> float:
            with simulated.in_float(operations):
                found = [
                    functional.kl_div(simulated(*example).log_softmax(1), target, reduction="sum", log_target=True)
                    for example, target in zip(examples, targets, strict=True)
                ]
            return float(sum(found))

        chosen: list[str] = []
        candidates = simulated.neighbours
        whole = left = divergence(())
        while len(chosen) < MOST_IN_FLOAT and left > MENDED * whole:
            gains: dict[tuple[str, ...], float] = {}
            for names in candidates:
                progress("looking for layers that 8 bits break", len(gains), len(candidates))
                gains[names] = left - divergence([*chosen, *names])
            # What hardly helps alone hardly helps the best of them.
            candidates = tuple(sorted(gains, key=lambda names: -gains[names])[:SHORT_LIST])
            best = max(gains, key=lambda names: (gains[names], -len(names)), default=())
            if not best or gains[best] < BREAKS * left:
                break
            chosen += [name for name in best if name not in chosen]
            left -= gains[best]
    if not chosen:
        return precision
    mixed = replace(precision, float_nodes=tuple(dict.fromkeys((*precision.float_nodes, *chosen))))
    return mixed if wanted - judge.accuracy(model, mixed) <= lost / 2 else precision


def train_in_8_bits(
    module: nn.Module,
    precision: Precision,
    judge: Judge,
    data: Data,
    *,
    tolerance: float,
    epochs: int,
    lr: float,
    teacher: nn.Module | None = None,
    checkpoint: Path | None = None,
    seed: int = 0,
    pattern: str | None = None,
    progress: Progress = silent,
) -> str:
    """Train a module with 8 bits simulated, in place, where they lose more accuracy than is tolerated.

    It stays as it was where the artifact of the trained module is no more accurate. pattern: that of its zeros, as
    `recover_accuracy` takes it. returns: what was done, in words.
    """
    wanted, found = judge.accuracy(module, FLOAT32), judge.accuracy(module, precision)
    if wanted - found <= tolerance:
        return f"8 bits keep {found:.2%} of {wanted:.2%} on calibration data: no training needed"
    if not epochs or data.train is None:
        return f"8 bits keep {found:.2%} of {wanted:.2%} on calibration data; not trained"
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    recover_accuracy(
        module, data, teacher=teacher, epochs=epochs, lr=lr, checkpoint=checkpoint, seed=seed, precision=precision,
        pattern=pattern, progress=progress,
    )  # fmt: skip
    trained = judge.accuracy(module, precision)
    if trained <= found:
        module.load_state_dict(before)
    outcome = "kept" if trained > found else "undone"
    return f"8 bits keep {found:.2%} of {wanted:.2%} on calibration data, {trained:.2%} after training: {outcome}"


def _first_examples(batches: Batches, count: int) -> list[tuple[Tensor, ...]]:
    """Batches of the first examples, the last one cut."""
    found: list[tuple[Tensor, ...]] = []
    for inputs, _ in batches:
        tensors = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
        found.append(tuple(tensor[:count] for tensor in tensors))
        count -= len(tensors[0])
        if count <= 0:
            break
    return found


def slower_operations(float_times: Sequence[NodesTime], int8_times: Sequence[NodesTime]) -> frozenset[str]:
    """The nodes whose kernels take clearly longer in 8 bits, conversions included; none where they hardly count.

    Kernels of the two models may cover different nodes: those that share one are compared together.
    """
    total = sum(seconds for _, seconds in float_times)
    slow: frozenset[str] = frozenset()
    lost = 0.0
    for nodes, before, after in _joined(float_times, int8_times):
        if after > SLOWER * before:
            slow |= nodes
            lost += after - before
    return slow if lost > NOTICEABLE * total else frozenset()


def _times_of_nodes(resizer: Resizer, rounds: Sequence[Sequence[KernelTime]]) -> list[NodesTime]:
    mapped = resizer.map_kernels(rounds[0])
    charged = [mapped.charge(times) for times in rounds]
    return [
        (frozenset(kernel.nodes), median([each.get(kernel.name, 0.0) for each in charged]))
        for kernel in mapped.kernels
        if kernel.nodes
    ]


def _joined(left: Sequence[NodesTime], right: Sequence[NodesTime]) -> list[tuple[frozenset[str], float, float]]:
    """Sets of nodes that no kernel of either side crosses, with the seconds of each side."""
    joined: list[tuple[frozenset[str], float, float]] = []
    for nodes, before, after in [(n, s, 0.0) for n, s in left] + [(n, 0.0, s) for n, s in right]:
        touched = [other for other in joined if other[0] & nodes]
        joined = [other for other in joined if not other[0] & nodes]
        joined.append((
            nodes.union(*(other[0] for other in touched)),
            before + sum(other[1] for other in touched),
            after + sum(other[2] for other in touched),
        ))  # fmt: skip
    return joined


@contextmanager
def _files(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    graph: Graph | None,
    precisions: Sequence[Precision],
    session: Session,
    progress: Progress,
) -> Iterator[dict[Precision, str]]:
    """The dense model in float32 and in every precision, on the board for as long as this lasts: their names there."""
    member = load_member("formats", session.format)
    noise = [random_like([tensor.numpy(force=True) for tensor in inputs], seed) for seed in range(RANDOM_BATCHES)]
    with tempfile.TemporaryDirectory(prefix="edgeprune-precision-") as folder:
        paths: dict[str, Path] = {}
        names: dict[Precision, str] = {}
        for done, precision in enumerate((FLOAT32, *precisions)):
            progress(f"making {precision.name}", done, len(precisions) + 1)
            names[precision] = f"{precision.name}{member.SUFFIX}"
            path = paths[names[precision]] = Path(folder) / names[precision]
            if precision == FLOAT32 or precision.float_nodes:
                member.export(model, inputs, path, precision=precision, calibration=noise, graph=graph)
            else:  # in a second, where another export takes ten
                member.quantize_randomly(paths[names[FLOAT32]], path, precision)
        session.push(paths)
        try:
            yield names
        finally:
            with suppress(DeviceError):  # a board that cannot be reached any more keeps them
                session.remove(list(paths))


def _time_in_turns(
    session: Session, names: Mapping[Precision, str], against: str, effort: Effort
) -> dict[Precision, list[StepResult]]:
    """Each file but the other one, in turns with it."""
    timed = {precision: name for precision, name in names.items() if name != against}
    steps = [
        Step(
            key=f"{precision.name} {number}", kind="time", artifact=name, against=against, seconds=effort.seconds,
            precision=effort.precision, min_samples=effort.samples, steady=effort.steady,
        )
        for number in range(effort.repeats)
        for precision, name in timed.items()
    ]  # fmt: skip
    results = {result.key: result for result in session.run(steps, job=f"precision-{time.time_ns():x}")}
    return {
        precision: [results[f"{precision.name} {number}"] for number in range(effort.repeats)] for precision in timed
    }


def _share(results: Sequence[StepResult]) -> Quantity | None:
    ratios = [turn_ratios(r.samples, r.against) for r in results if r.samples is not None and r.against is not None]
    return quantity(np.concatenate(ratios)) if ratios else None


def _profile(
    session: Session, names: Mapping[Precision, str], effort: Effort
) -> dict[Precision, list[tuple[KernelTime, ...]]] | None:
    """Times of every file's kernels, round by round, or None where the runtime tells none."""
    steps = [
        Step(key=f"{precision.name} {number}", kind="kernels", artifact=name, runs=effort.profiled_runs)
        for number in range(effort.rounds)
        for precision, name in names.items()
    ]
    results = {result.key: result for result in session.run(steps, job=f"kernels-{time.time_ns():x}")}
    found = {
        precision: [results[f"{precision.name} {number}"].kernels for number in range(effort.rounds)]
        for precision in names
    }
    return found if all(all(rounds) for rounds in found.values()) else None
