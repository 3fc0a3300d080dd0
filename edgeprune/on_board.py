"""What takes a board and several stages: the connection, the closed loop, the choice of a precision."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from edgeprune.compact import compact_model
from edgeprune.compensation.batch_norm import reestimate_batch_norm
from edgeprune.compensation.least_squares import compensate
from edgeprune.core.closed_loop import best_round, corrected_limit
from edgeprune.core.cost import predict_cost
from edgeprune.core.effort import DEFAULT, Effort
from edgeprune.core.errors import AgentError, DeviceError, InfeasibleBudget, UsageError
from edgeprune.core.family import list_members, load_member
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import (
    FLOAT32,
    Budget,
    Cost,
    Graph,
    Importance,
    Plan,
    PlanRound,
    Precision,
    PrecisionTrial,
    Profile,
    Step,
)
from edgeprune.core.stats import quantity, turn_ratios
from edgeprune.device.embedded import EmbeddedBoard
from edgeprune.device.session import Session, open_session
from edgeprune.device.targets import load_target, runtime_format
from edgeprune.formats import Resizer
from edgeprune.plan import choose_widths, next_request, no_finer_step
from edgeprune.profile import (
    measure_widths,
    measured_energy,
    measured_memory,
    reference_latency,
)

Batches = Iterable[tuple[Any, Tensor]]
EMBEDDED = "embedded"
"""The target that is started on the spot: this machine behind an SSH server on loopback."""
DEFAULT_RUNTIME = "onnxruntime"
RANDOM_BATCHES = 2
MAX_ROUNDS = 8
"""Turns of the closed loop before the best plan so far is taken and the report says by how much it misses."""


@contextmanager
def connect(
    name: str,
    *,
    threads: int = 1,
    runtime: str | None = None,
    meter: str | None = None,
    space: Path | None = None,
    progress: Progress = silent,
) -> Iterator[Session]:
    """An open session on a board of the inventory, or on an embedded one of its own.

    runtime, meter: instead of the target's own. space: whose files on the board are shared and reused; the
        current folder's when not given.
    """
    with ExitStack() as stack:
        target = stack.enter_context(EmbeddedBoard()) if name == EMBEDDED else load_target(name)
        target = replace(target, threads=threads, runtime=runtime or target.runtime, meter=meter or target.meter)
        where = str((space or Path.cwd()).resolve())
        yield stack.enter_context(open_session(target, space=where, progress=progress))


def plan_on_board(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    graph: Graph,
    profile: Profile,
    importance: Importance,
    budget: Budget,
    session: Session,
    path: Path,
    *,
    solver: str = "milp",
    levels: int = 16,
    max_rounds: int = MAX_ROUNDS,
    effort: Effort = DEFAULT,
    resizer: Resizer | None = None,
    progress: Progress = silent,
) -> Plan:
    """Plan, measure the planned network on the board, correct the tables, plan again.

    path: the profile's file; what is measured here is appended to it. resizer: the one it was
        profiled with, made here when not given. The plan has the profile's precision.
    returns: the plan whose measured latency is within the budget and closest to it, of those whose
        measured peak memory and energy are within their own. Its `rounds` are the evidence, and `finer_step` says
        why where it stays below 0.97 of the budget.
    """
    rounds: list[PlanRound] = []
    plans: list[Plan] = []
    within: list[PlanRound] = []  # the memory and energy budgets, as far as they were measured
    memory, energy = budget.peak_memory_bytes, budget.energy_j
    limit, asked = budget.latency_s, next_request(rounds, budget)
    if limit is None and energy is None:
        return choose_widths(graph, profile, importance, budget, solver=solver, levels=levels, progress=progress)
    member = load_member("formats", session.format)
    resizer = resizer or member.make_resizer(model, inputs, graph, precision=profile.precision)
    while (asked is not None or limit is None) and len(rounds) < max_rounds:
        progress("closing the loop on the board", len(rounds), 0)
        request = replace(budget, latency_s=asked, peak_memory_bytes=memory, energy_j=energy)
        try:
            plan = choose_widths(graph, profile, importance, request, solver=solver, levels=levels, progress=progress)
        except InfeasibleBudget:
            # Of the budget itself it is the answer; a corrected one only ends the search for something closer.
            if rounds:
                break
            if asked == limit:
                raise
            asked = limit
            continue
        profile, measured = measure_widths(
            model, inputs, graph, session, profile, path, [plan.widths],
            effort=effort, resizer=resizer, progress=progress,
        )  # fmt: skip
        assert plan.predicted.latency_s is not None
        peak = measured_memory(profile.measurements, plan.widths, graph)
        joules = measured_energy(profile.measurements, plan.widths, graph)
        turn = PlanRound(
            asked_s=asked, predicted_s=plan.predicted.latency_s.median, measured=measured[0], widths=plan.widths,
            peak_memory_bytes=peak, energy_j=joules,
        )  # fmt: skip
        rounds.append(turn)
        plans.append(plan)
        less = corrected_limit(budget.peak_memory_bytes, plan.predicted.peak_memory_bytes, peak)
        predicted_j = plan.predicted.energy_j.median if plan.predicted.energy_j is not None else None
        weaker = corrected_limit(budget.energy_j, predicted_j, joules.median if joules is not None else None)
        if less is not None or weaker is not None:  # and the same latency once more
            memory, energy = int(less) if less is not None else memory, weaker if weaker is not None else energy
            continue
        within.append(turn)
        if limit is None:
            break
        asked = next_request(within, budget)
    fitting = within or rounds
    if limit is None:
        return replace(plans[rounds.index(fitting[-1])], budget=budget, rounds=tuple(rounds))
    best = plans[rounds.index(fitting[best_round(fitting, limit)])]
    return replace(best, budget=budget, rounds=tuple(rounds), finer_step=no_finer_step(fitting, budget))


def compact_and_compensate(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    graph: Graph,
    plan: Plan,
    calibration: Batches | None,
    *,
    progress: Progress = silent,
) -> nn.Module:
    """The smaller model; with calibration batches the layers that read removed channels are refitted.

    Refitted outputs match the dense model's, so its batch-norm statistics still hold: taking them anew
    costs accuracy. Only where nothing could be refitted they are.
    """
    smaller = compact_model(model, inputs, graph, plan.keep)
    if calibration is not None and not compensate(smaller, model, graph, plan.keep, calibration, progress=progress):
        reestimate_batch_norm(smaller, calibration)
    return smaller.eval()


def dense_cost(graph: Graph, profile: Profile, dense_bytes: int | None = None) -> Cost:
    """What the dense model takes: its latency and energy as measured, the rest from its graph.

    Its latency is that of float32, to which budgets are relative; so is its size where `dense_bytes` gives it.
    """
    cost = predict_cost(graph, {}, profile)
    return replace(
        cost,
        latency_s=reference_latency(profile),
        artifact_bytes=dense_bytes or cost.artifact_bytes,
        energy_j=measured_energy(profile.measurements, {}, graph),
    )


def choose_runtime(name: str, runtime: str | None = None, format: str | None = None) -> str:
    """The runtime of a run: as asked for, else the target's own, else the first that runs the format.

    name: of the target. raises: UsageError for a runtime and a format that do not go together; UnknownMember.
    """
    own = runtime or (DEFAULT_RUNTIME if name == EMBEDDED else load_target(name).runtime)
    if format is None or runtime_format(own) == format:
        return own
    if runtime is not None:
        raise UsageError(f"runtime {runtime} runs {runtime_format(runtime)} files, not {format}; leave one of them out")
    load_member("formats", format)
    fitting = [each for each in list_members("device.runtimes") if runtime_format(each) == format]
    if not fitting:
        raise UsageError(f"no runtime of a board runs {format} files")
    return fitting[0]


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
    precisions = [precision for precision in member.PRECISIONS if precision.dtype == dtype]
    if not precisions:
        known = ", ".join(dict.fromkeys(precision.dtype for precision in member.PRECISIONS))
        raise UsageError(f"{session.format} files cannot be {dtype}; known: {known}")
    generator = np.random.default_rng(0)
    noise = [
        tuple(
            generator.standard_normal(tuple(x.shape)).astype(np.float32) if x.is_floating_point() else x.numpy()
            for x in inputs
        )
        for _ in range(RANDOM_BATCHES)
    ]
    with tempfile.TemporaryDirectory(prefix="edgeprune-precision-") as folder:
        reference = f"float32{member.SUFFIX}"
        files = {reference: Path(folder) / reference}
        member.export(model, inputs, files[reference])
        for done, precision in enumerate(precisions):
            progress(f"making {dtype}", done, len(precisions))
            name = f"{precision.name}{member.SUFFIX}"
            files[name] = Path(folder) / name
            member.export(model, inputs, files[name], precision=precision, calibration=noise)
        session.push(files)
        steps = [
            Step(
                key=f"{precision.name} {number}", kind="time", artifact=f"{precision.name}{member.SUFFIX}",
                against=reference, seconds=effort.seconds, precision=effort.precision, min_samples=effort.samples,
            )
            for number in range(effort.repeats)
            for precision in precisions
        ]  # fmt: skip
        results = {result.key: result for result in session.run(steps, job=f"precision-{time.time_ns():x}")}
        with suppress(DeviceError):  # a board that cannot be reached any more keeps them
            session.remove(list(files))
    trials = []
    for precision in precisions:
        own = [results[f"{precision.name} {number}"] for number in range(effort.repeats)]
        ratios = [turn_ratios(r.samples, r.against) for r in own if r.samples is not None and r.against is not None]
        if ratios:
            trials.append(PrecisionTrial(precision=precision, latency_share=quantity(np.concatenate(ratios))))
    if not trials:
        errors = {result.error for result in results.values() if result.error}
        raise AgentError(f"target {session.target.name} cannot run the model in {dtype}: {'; '.join(sorted(errors))}")
    return tuple(sorted(trials, key=lambda trial: trial.latency_share.median))


def worth_planning(trials: Sequence[PrecisionTrial], *, latency_only: bool) -> tuple[Precision, ...]:
    """The precisions that a plan of automatic dtype has to weigh: float32, and what is faster or may be smaller.

    latency_only: the budget is on nothing but the latency, so that what is slower than float32 cannot win.
    """
    faster = [trial.precision for trial in trials if not latency_only or trial.latency_share.low < 1]
    return (FLOAT32, *faster[:1])
