"""What takes a board and several stages: the connection and the closed loop."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from edgeprune.core.closed_loop import best_round, corrected_limit
from edgeprune.core.cost import predict_cost
from edgeprune.core.effort import DEFAULT, Effort
from edgeprune.core.errors import InfeasibleBudget, UsageError
from edgeprune.core.family import list_members, load_member
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import (
    Budget,
    Cost,
    Graph,
    Importance,
    Plan,
    PlanRound,
    Profile,
)
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
    if resizer is None:
        member = load_member("formats", session.format)
        resizer = member.make_resizer(model, inputs, graph, precision=profile.precision)

    def choose(request: Budget) -> Plan:
        return choose_written(
            graph, profile, importance, request, resizer, solver=solver, levels=levels, progress=progress
        )

    if limit is None and energy is None:
        return choose(budget)
    while (asked is not None or limit is None) and len(rounds) < max_rounds:
        progress("closing the loop on the board", len(rounds), 0)
        request = replace(budget, latency_s=asked, peak_memory_bytes=memory, energy_j=energy)
        try:
            plan = choose(request)
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


def choose_written(
    graph: Graph,
    profile: Profile,
    importance: Importance,
    budget: Budget,
    resizer: Resizer,
    *,
    solver: str = "milp",
    levels: int = 16,
    progress: Progress = silent,
) -> Plan:
    """`choose_widths` whose artifact size is that of the file as it is written, not what a formula makes of it.

    raises: as `choose_widths`.
    """
    asked = budget
    for _ in range(MAX_ROUNDS):
        plan = choose_widths(graph, profile, importance, asked, solver=solver, levels=levels, progress=progress)
        if budget.artifact_bytes is None:
            return plan
        written = written_bytes(resizer, plan)
        smaller = corrected_limit(budget.artifact_bytes, plan.predicted.artifact_bytes, written)
        plan = replace(plan, budget=budget, predicted=replace(plan.predicted, artifact_bytes=written))
        if smaller is None:
            break
        asked = replace(asked, artifact_bytes=int(smaller))
    return plan


def written_bytes(resizer: Resizer, plan: Plan) -> int:
    """Size of a plan's artifact: what the resizer writes, and what an export has beside it whatever the widths."""
    with tempfile.TemporaryDirectory(prefix="edgeprune-size-") as folder:
        path = Path(folder) / "model"
        sizes = []
        for keep in ({}, plan.keep):
            resizer.write_model(keep, path)
            sizes.append(path.stat().st_size)
    return resizer.dense_bytes - sizes[0] + sizes[1]


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
