"""Latency tables of a model on a board: measure many widths in place, fit, and say how wrong it is.

*In situ.* Timing kernels alone misses how they fuse and what is in the cache. So whole models of
different widths are run, and one profiled run measures every kernel in its real surroundings.
Configurations come in random order over several rounds, each in turns of milliseconds with the dense
model: what the board's speed does from second to second meets both and falls out of their ratio. The
dense model is the float32 one whatever the precision that is profiled, so that a budget means the same
for all of them.
After a first batch that spreads over all widths the next ones are those that the tables are least sure
of, until they predict configurations they have not seen as closely as asked for.

What the file looks like: `tables/stored.py`.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.core.branches import dropped_branches
from edgeprune.core.budget import parse_limit
from edgeprune.core.cost import activation_bytes
from edgeprune.core.effort import DEFAULT, Effort
from edgeprune.core.energy import energy_per_run
from edgeprune.core.errors import AgentError, RecordError, UsageError
from edgeprune.core.family import load_member
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import (
    FLOAT32,
    Graph,
    Measurement,
    Precision,
    Profile,
    Quantity,
    Step,
    StepResult,
    Table,
    Widths,
)
from edgeprune.core.store import append_record, digest
from edgeprune.formats import KernelMap, Resizer
from edgeprune.tables.combine import PLANNED, measured_latency
from edgeprune.tables.design import DENSE, Configuration, choose_next, design_configurations
from edgeprune.tables.stored import ProfileHeading, check_graph, derive_profile, read_measured, read_measurements
from edgeprune.tables.stored import read_profile as read_profile

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgeprune.device.session import Session

WEIGHTS, REFERENCE = "weights.bin", "reference"
FIRST, FEWER_FIRST, NEXT = 16, 8, 8
"""Configurations of the first batch, of one that starts from known tables, and of each batch after it."""


def profile_target(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    graph: Graph,
    session: Session,
    *,
    path: Path,
    configurations: int = 40,
    held_out: int = 8,
    error: float | None = 0.01,
    effort: Effort = DEFAULT,
    step: int | None = None,
    around: str | None = None,
    known: Sequence[Profile] = (),
    black_box: bool = False,
    progress: Progress = silent,
    seed: int = 0,
    resizer: Resizer | None = None,
    precision: Precision = FLOAT32,
) -> Profile:
    """Measure a model at many widths on the board and fit its latency tables.

    path: the JSONL file; what it already holds is not measured again.
    configurations: most widths to fit, dense included. held_out: more widths, never fitted, that give
    the profile's error. error: stop with fewer once the mean relative error on configurations left out
    of the fit in turn is no more; None: measure all. effort: board time for each. step: widths are
    multiples of it (default: a mixture). around: the latency budget plans will be made for, such as
    "0.5x" or "12 ms": there the tables shall be surest. known: profiles of other boards, thread counts
    or models; tables of the same kernels are sought as multiples of theirs, which takes fewer widths.
    black_box: time whole models only, as where the runtime tells no kernels.
    resizer: made once by `formats`, of this precision, to share it with `measure_widths`.
    precision: of the files that are measured.
    raises: RecordError when `path` holds a profile of another graph, other conditions or other
        widths; AgentError when the dense model or most configurations cannot be run.
    """
    if configurations < 2 or effort.rounds < 1 or held_out < 0:
        raise UsageError("a profile needs at least 2 configurations and 1 round")
    model = _Model(module, inputs, graph, precision, resizer)
    tables = tuple({table.signature: table for profile in reversed(known) for table in profile.tables}.values())
    with _Run(model, session, path, effort, progress, tables, black_box) as run:
        batches = choose_batches(
            graph, path, first=FEWER_FIRST if known else FIRST, configurations=configurations, held_out=held_out,
            error=error, step=step, around=around, seed=seed,
        )  # fmt: skip
        for number, batch in enumerate(batches):
            run.measure(_shuffled(batch, effort.rounds, (seed, number)))
    return read_profile(path, graph)


def choose_batches(
    graph: Graph,
    path: Path,
    *,
    first: int = FIRST,
    configurations: int,
    held_out: int,
    error: float | None,
    step: int | None = None,
    around: str | None = None,
    seed: int = 0,
) -> Iterator[list[Configuration]]:
    """The design, then batch by batch those that the tables are least sure of, until they are as close as asked for.

    path: the profile that holds each batch when the next one is asked for. first: configurations of the design to fit.
    The others as `profile_target` has them.
    """
    batch = list(design_configurations(graph, min(first, configurations), held_out, step=step, seed=seed))
    sweep: list[Configuration] = []
    while batch:
        yield batch
        sweep += batch
        # Only of what earlier batches hold: a run that was killed in a batch chooses the same ones again.
        profile = derive_profile(*read_measured(path), only={item.name for item in sweep})
        left = configurations - sum(not item.held_out for item in sweep)
        if not left or not profile.folds or (error is not None and _left_out_error(profile) <= error):
            return
        near_s = parse_limit(around, "time").absolute(reference_latency(profile).median) if around else None
        chosen = choose_next(graph, profile, min(NEXT, left), step=step, budget_s=near_s, seed=seed)
        batch = [Configuration(name=f"next-{len(sweep) + n:02d}", widths=widths) for n, widths in enumerate(chosen)]


def measure_configurations(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    graph: Graph,
    session: Session,
    sweep: Sequence[Configuration],
    *,
    path: Path,
    effort: Effort = DEFAULT,
    progress: Progress = silent,
    seed: int = 0,
    resizer: Resizer | None = None,
    precision: Precision = FLOAT32,
) -> None:
    """Measure configurations into a profile's file, except what it holds, and fit nothing."""
    with _Run(_Model(module, inputs, graph, precision, resizer), session, path, effort, progress) as run:
        run.measure(_shuffled(sweep, effort.rounds, (seed,)))


def _shuffled(
    batch: Sequence[Configuration], rounds: int, seed: tuple[int, ...]
) -> list[tuple[int, list[Configuration]]]:
    """Every round of a batch in another order."""
    return [
        (number, [batch[index] for index in np.random.default_rng((*seed, number)).permutation(len(batch))])
        for number in range(rounds)
    ]


def _left_out_error(profile: Profile) -> float:
    """Mean relative error on configurations that were left out of the fit in turn."""
    return float(np.mean([error for fold in profile.folds for error in fold.errors] or [np.inf]))


def measure_widths(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    graph: Graph,
    session: Session,
    profile: Profile,
    path: Path,
    candidates: Sequence[Widths],
    *,
    effort: Effort = DEFAULT,
    progress: Progress = silent,
    resizer: Resizer | None = None,
) -> tuple[Profile, list[Quantity]]:
    """Measure widths that a planner chose, in the profile's precision, add them to it and fit it again.

    returns: the new profile, and each candidate's whole-model latency: its ratio to the dense model in
        the same seconds, times the profile's dense latency.
    raises: as profile_target; AgentError when a candidate cannot be run.
    """
    names = [planned_name(graph.units | dict(widths)) for widths in candidates]
    new = {
        name: Configuration(name=name, widths=graph.units | dict(widths), memory=True)
        for name, widths in zip(names, candidates, strict=True)
        if graph.units | dict(widths) != graph.units
    }
    model = _Model(module, inputs, graph, profile.precision, resizer)
    with _Run(model, session, path, effort, progress) as run:
        run.measure([(number, list(new.values())) for number in range(effort.repeats)])
    profile = read_profile(path, graph)
    measured = {item.configuration for item in profile.measurements}
    failed = [name for name in new if name not in measured]
    if failed:
        raise AgentError(f"the board could not run the planned model {failed[0]}; see the agent's log")
    own_dense = None if profile.precision == FLOAT32 else DENSE  # of float32 it is the reference itself
    return profile, [measured_latency(profile.measurements, name if name in new else own_dense) for name in names]


def planned_name(widths: Widths) -> str:
    """Configuration name of planned widths, the same for the same widths."""
    return PLANNED + digest(dict(sorted(widths.items())))[:12]


def measured_memory(measurements: Sequence[Measurement], widths: Widths, graph: Graph) -> int | None:
    """Peak activation bytes of a model of `widths`, where it was measured."""
    full = graph.units | dict(widths)
    return next((m.activation_bytes for m in measurements if m.activation_bytes and m.widths == full), None)


def measured_energy(measurements: Sequence[Measurement], widths: Widths, graph: Graph) -> Quantity | None:
    """Energy of one inference of a model of `widths` above the board's rest, where it was measured."""
    full = graph.units | dict(widths)
    return next((energy_per_run(m.power) for m in measurements if m.power and m.widths == full), None)


def reference_latency(profile: Profile) -> Quantity:
    """Whole-model latency of the dense float32 model over all rounds: what a relative budget refers to."""
    return measured_latency(profile.measurements)


class _Model:
    """What is profiled, and how its files are made; made late, since that takes seconds."""

    def __init__(
        self,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        graph: Graph,
        precision: Precision,
        resizer: Resizer | None,
    ) -> None:
        self.module, self.inputs, self.graph, self.precision = module, inputs, graph, precision
        self._resizer = resizer

    def resizer(self, session: Session) -> Resizer:
        """Of the profile's precision, in the format that the session's runtime runs."""
        if self._resizer is None:
            member = load_member("formats", session.format)
            self._resizer = member.make_resizer(self.module, self.inputs, self.graph, precision=self.precision)
        return self._resizer

    def write_reference(self, session: Session, path: Path) -> None:
        """The dense float32 model."""
        load_member("formats", session.format).export(self.module, self.inputs, path)


class _Run:
    """One sitting at the board: makes the files, measures what the profile lacks, appends it."""

    def __init__(
        self,
        model: _Model,
        session: Session,
        path: Path,
        effort: Effort,
        progress: Progress,
        known: tuple[Table, ...] = (),
        black_box: bool = False,
    ) -> None:
        self.model = model
        self.graph = model.graph
        self.session = session
        self.suffix = load_member("formats", session.format).SUFFIX
        self.path = path
        self.effort = effort
        self.progress = progress
        self.known = known
        self.black_box = black_box
        self._folder = tempfile.TemporaryDirectory(prefix="edgeprune-profile-")

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def measure(self, schedule: Sequence[tuple[int, Sequence[Configuration]]]) -> None:
        """Measure each round's configurations in order, except what the file already holds.

        raises: RecordError when the file does not fit; AgentError when too much fails.
        """
        heading, done = read_measurements(self.path)
        self.black_box = heading.black_box if heading is not None else self.black_box
        precision = self.model.precision
        conditions = self.session.conditions(dtype=precision.dtype)
        if heading is not None:
            check_graph(heading, self.graph, self.path)
            if heading.precision != precision:
                raise RecordError(
                    f"{self.path} is a profile of {heading.precision.name}, not of {precision.name}; use another file"
                )
            if heading.conditions.key() != conditions.key():
                unlike = "; ".join(heading.conditions.unlike(conditions))
                raise RecordError(
                    f"{self.path} was measured under other conditions ({unlike}); restore them or use another file"
                )
        widths = {item.configuration: item.widths for item in done}
        held = {item.configuration: item.held_out for item in done}
        for _, round_configurations in schedule:
            for entry in round_configurations:
                if (
                    widths.get(entry.name, entry.widths) != entry.widths
                    or held.get(entry.name, entry.held_out) != entry.held_out
                ):
                    raise RecordError(
                        f"{self.path} has other widths under the name '{entry.name}': it was made with other options; "
                        "profile with the same ones or into another file"
                    )
        slots = list(_missing(schedule, done))
        if not slots:
            return
        # Made only now: it takes seconds, and a complete profile needs none.
        self.progress("exporting", 0, 0)
        resizer = self.model.resizer(self.session)
        self._push(resizer, {slot.configuration.name: slot.configuration for slot in slots})
        job = heading.job if heading is not None else f"profile-{self.graph.model_sha256[:8]}-{secrets.token_hex(4)}"
        mapped = resizer.map_kernels(None) if self.black_box else self._map_kernels(resizer, job)
        if heading is None:
            signatures = {kernel.signature for kernel in mapped.kernels}
            heading = ProfileHeading(
                target=self.session.target.name, conditions=conditions, graph_sha256=self.graph.model_sha256,
                artifact_sha256=resizer.dense_sha256, dense_bytes=resizer.dense_bytes,
                kernels=mapped.kernels, job=job,
                known=tuple(table for table in self.known if table.signature in signatures), black_box=self.black_box,
                precision=precision,
            )  # fmt: skip
            append_record(self.path, heading)
        # As sets: of kernels that do not wait for each other the runtime takes now the one first, now the other.
        elif {kernel.name for kernel in heading.kernels} != {kernel.name for kernel in mapped.kernels}:
            raise RecordError(
                f"{self.path}: the runtime now makes other kernels of the same model; profile into another file"
            )
        self._run_slots(slots, job, mapped)

    def _push(self, resizer: Resizer, configurations: Mapping[str, Configuration]) -> None:
        folder = Path(self._folder.name)
        resizer.write_weights(folder / WEIGHTS)
        files = {WEIGHTS: folder / WEIGHTS}
        wanted = {DENSE: Configuration(name=DENSE, widths=self.graph.units), **configurations}
        for index, (name, configuration) in enumerate(wanted.items()):
            self.progress("making widths", index, len(wanted))
            file = f"{name}{self.suffix}"
            files[file] = folder / file
            resizer.write_structure(configuration.widths, files[file], WEIGHTS)
        if self.reference not in files:
            files[self.reference] = folder / self.reference
            self.model.write_reference(self.session, files[self.reference])
        self.progress("making widths", len(wanted), len(wanted))
        self.session.push(files)

    @property
    def reference(self) -> str:
        """The file of the dense float32 model, against which everything is timed."""
        return f"{DENSE if self.model.precision == FLOAT32 else REFERENCE}{self.suffix}"

    def _map_kernels(self, resizer: Resizer, job: str) -> KernelMap:
        """Learn the kernels from one profiled run of the dense model; what tells none is profiled as a black box."""
        dense = f"{DENSE}{self.suffix}"
        step = Step(key="dense-kernels", kind="kernels", artifact=dense, runs=self.effort.profiled_runs,
                    steady=self.effort.steady)  # fmt: skip
        (result,) = self.session.run([step], job=job)
        if result.no_kernels:
            self.black_box = True
            return resizer.map_kernels(None)
        if result.error is not None:
            raise AgentError(f"the board cannot run the dense model: {result.error}")
        return resizer.map_kernels(result.kernels)

    def _run_slots(self, slots: Sequence[_Slot], job: str, mapped: KernelMap) -> None:
        metered = self.session.target.meter != "none"
        steps = {
            slot: slot.steps(
                f"{slot.configuration.name}{self.suffix}", self.reference, self.effort,
                kernels=not self.black_box and not dropped_branches(self.graph, slot.configuration.widths),
                metered=metered,
            )
            for slot in slots
        }  # fmt: skip
        by_key = {step.key: slot for slot, its in steps.items() for step in its}
        waiting: dict[_Slot, dict[str, StepResult]] = {slot: {} for slot in slots}
        failures: dict[str, str] = {}
        finished = 0

        def take(result: StepResult) -> None:
            nonlocal finished
            slot = by_key[result.key]
            waiting[slot][result.kind] = result
            if len(waiting[slot]) < len(steps[slot]):
                return
            results = waiting.pop(slot)
            finished += 1
            self.progress("profiling", finished, len(slots))
            error = results["time"].error or (results["kernels"].error if "kernels" in results else None)
            if error is not None or results["time"].samples is None:
                failures[slot.configuration.name] = error or "no samples"
                return
            append_record(self.path, _measurement(slot, results, mapped, self.graph))

        self.session.run([step for its in steps.values() for step in its], job=job, on_result=take)
        names = {slot.configuration.name for slot in slots}
        if DENSE in failures or 2 * len(failures) > len(names):
            name, error = next(iter(failures.items()))
            raise AgentError(
                f"{len(failures)} of {len(names)} configurations failed on the board, first {name}: {error}"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Slot:
    """One configuration in one round."""

    configuration: Configuration
    round: int

    def steps(self, ours: str, reference: str, effort: Effort, *, kernels: bool, metered: bool) -> list[Step]:
        """The whole model and its kernels against the reference; once, for some, the memory and the energy."""
        key = f"{self.round}-{self.configuration.name}"
        steps = [
            Step(
                key=f"{key}-time", kind="time", artifact=ours, against=reference, seconds=effort.seconds,
                precision=effort.precision, min_samples=effort.samples, steady=effort.steady,
            ),
        ]  # fmt: skip
        if kernels:
            steps.append(
                Step(key=f"{key}-kernels", kind="kernels", artifact=ours, against=reference, runs=effort.profiled_runs,
                     steady=effort.steady)
            )  # fmt: skip
        if self.round == 0 and self.configuration.memory:
            steps.append(Step(key=f"{key}-memory", kind="memory", artifact=ours))
            if metered:
                steps.append(Step(key=f"{key}-energy", kind="energy", artifact=ours, seconds=effort.energy_s))
        return steps


def _measurement(slot: _Slot, results: Mapping[str, StepResult], mapped: KernelMap, graph: Graph) -> Measurement:
    timed, profiled = results["time"], results.get("kernels")
    memory, energy = results.get("memory"), results.get("energy")
    assert timed.samples is not None and timed.against is not None
    return Measurement(
        configuration=slot.configuration.name, round=slot.round, widths=dict(slot.configuration.widths),
        held_out=slot.configuration.held_out, samples=timed.samples, dense=timed.against,
        kernels=mapped.charge(profiled.kernels) if profiled else {}, run_s=profiled.run_s if profiled else None,
        dense_run_s=profiled.against_run_s if profiled else None,
        activation_bytes=memory.activation_bytes if memory else None,
        arena_bytes=activation_bytes(graph, slot.configuration.widths, timed.conditions) if memory else None,
        power=energy.power if energy else None, note=f"no energy: {energy.error}" if energy and energy.error else "",
        conditions=timed.conditions,
    )  # fmt: skip


def _missing(schedule: Sequence[tuple[int, Sequence[Configuration]]], done: Sequence[Measurement]) -> Iterator[_Slot]:
    """What the schedule has and the file has not, in order."""
    have = {(item.round, item.configuration) for item in done}
    for number, configurations in schedule:
        for configuration in configurations:
            if (number, configuration.name) not in have:
                yield _Slot(configuration=configuration, round=number)
