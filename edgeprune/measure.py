"""Benchmark a model file on a board, or compare two in turns."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.core.budget import format_seconds
from edgeprune.core.effort import DEFAULT, Effort
from edgeprune.core.energy import energy_per_run
from edgeprune.core.errors import AgentError, DeviceError, InputError, UsageError
from edgeprune.core.family import load_member
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import Artifact, Conditions, Measured, Quantity, Samples, Step, StepResult, Timing
from edgeprune.core.stats import (
    clean_turns,
    find_drift,
    find_modes,
    p95,
    quantity,
    round_ratio,
    turn_medians,
    turn_ratios,
)

if TYPE_CHECKING:
    from edgeprune.device.session import Session


NO_METER = "none"
MOST_ROUNDS = 4
"""Of a comparison, in multiples of the effort's repeats."""
OFTEN = 0.2
"""Share of interrupted turns that is worth a word."""


def measure_files(
    paths: Sequence[Path], session: Session, *, effort: Effort = DEFAULT, progress: Progress = silent
) -> Measured:
    """Measure one file, or compare two in turns of milliseconds.

    paths: one or two model files of formats that the target's runtime runs.
    effort: its repeats are rounds, each opening the files anew; a comparison takes up to four times as
        many, until its interval is as narrow as the effort's precision or the difference is plain.
    returns: latencies, peak memory, and of two files the second's latency over the first's.
    raises: InputError for what is no model file; AgentError when one does not run on the board.
    """
    if not 1 <= len(paths) <= 2:
        raise UsageError("measure takes one file, or two to compare")
    files = {f"measure-{number}{path.suffix}": path for number, path in enumerate(paths)}
    artifacts = [_inspect(path) for path in paths]
    names = list(files)
    steps = [Step(key=f"memory {name}", kind="memory", artifact=name) for name in names]
    if session.target.meter != NO_METER:
        steps += [Step(key=f"energy {name}", kind="energy", artifact=name, seconds=effort.energy_s) for name in names]
    steps += _time_steps(names, effort, range(effort.repeats))
    results: list[StepResult] = []
    job = f"measure-{time.time_ns():x}"

    def take(result: StepResult) -> None:
        results.append(result)
        progress(f"measuring on {session.target.name}", len(results), max(len(steps), len(results)))

    session.push(files)
    try:
        session.run(steps, job=job, on_result=take)
        rounds = _read_rounds(results, files, session.target.name)
        ratio = _compare(rounds)
        while ratio and not is_settled(ratio, effort.precision) and len(rounds[0]) < MOST_ROUNDS * effort.repeats:
            count = len(rounds[0])
            steps += (more := _time_steps(names, effort, range(count, count + max(2, effort.repeats // 2))))
            session.run(more, job=job, on_result=take)
            rounds = _read_rounds(results, files, session.target.name)
            ratio = _compare(rounds)
    finally:
        with suppress(DeviceError):  # a board that cannot be reached any more keeps them
            session.remove(names)
    by_key = {result.key: result for result in results}
    timings = [
        _timing(artifact, path, samples, by_key[f"memory {name}"], by_key.get(f"energy {name}"))
        for artifact, path, samples, name in zip(artifacts, paths, rounds, names, strict=True)
    ]
    conditions = [result.conditions for result in results if result.kind == "time" and result.conditions is not None]
    return Measured(
        target=session.target.name,
        conditions=conditions[-1] if conditions else session.conditions(),
        timings=tuple(timings),
        ratio=ratio,
        verdict=describe_ratio(ratio, paths[0].name, paths[-1].name) if ratio else "",
        notes=(*find_disturbances(rounds, conditions), *_failures(results)),
    )


def is_settled(ratio: Quantity, precision: float | None) -> bool:
    """Whether a comparison needs no more rounds.

    Either its interval is narrow, or 1 lies far outside of it: to stop as soon as 1 is just outside would find
    differences that are none, since every look is another chance.
    """
    reach = math.log(ratio.high / ratio.median)
    return precision is None or reach <= precision or abs(math.log(ratio.median)) > 2 * reach


def _compare(rounds: Sequence[Sequence[Samples]]) -> Quantity | None:
    """The second file's latency over the first's; None of one file, or of one round."""
    if len(rounds) == 1 or len(rounds[0]) < 2:
        return None
    return round_ratio([turn_ratios(second, first) for first, second in zip(*rounds, strict=True)])


def _time_steps(names: Sequence[str], effort: Effort, numbers: range) -> list[Step]:
    """A round each. In a comparison the second file is the one that is measured against the first."""
    against = names[0] if len(names) > 1 else None
    return [
        Step(
            key=f"time {number}", kind="time", artifact=names[-1], against=against, seconds=effort.seconds,
            precision=effort.precision, min_samples=effort.samples,
        )
        for number in numbers
    ]  # fmt: skip


def _read_rounds(results: Sequence[StepResult], files: dict[str, Path], target: str) -> list[list[Samples]]:
    """The samples of each file, round by round. raises: AgentError when a round failed."""
    rounds: list[list[Samples]] = [[] for _ in files]
    for result in results:
        if result.kind != "time":
            continue
        if result.error is not None or result.samples is None:
            raise AgentError(f"target {target} cannot run {_name(result.error or '', files)}: {result.error}")
        rounds[-1].append(result.samples)
        if result.against is not None:
            rounds[0].append(result.against)
    return rounds


def describe_ratio(ratio: Quantity, first: str, second: str) -> str:
    """One sentence; a difference is one whose 99 % interval leaves 1 out."""
    interval = f"99 % interval {ratio.low:.3f} to {ratio.high:.3f}"
    if ratio.low <= 1 <= ratio.high:
        reach = max(ratio.high - 1, 1 - ratio.low)
        return f"no difference between {first} and {second} was found; one of {reach:.1%} would have been ({interval})"
    change = f"{1 - ratio.median:.1%} faster" if ratio.median < 1 else f"{ratio.median - 1:.1%} slower"
    return f"{second} is {change} than {first}: {ratio.median:.3f} of its latency ({interval})"


def _inspect(path: Path) -> Artifact:
    if not path.is_file():
        raise InputError(f"there is no file {path}; give a model file, such as model.onnx")
    artifact: Artifact = load_member("formats", path.suffix.lstrip(".").lower()).inspect(path)
    return artifact


def _timing(
    artifact: Artifact, path: Path, rounds: Sequence[Samples], memory: StepResult, energy: StepResult | None
) -> Timing:
    runs = np.concatenate([samples.values for samples in rounds])
    low, high = np.percentile(runs, [25, 75])
    return Timing(
        name=path.name, sha256=artifact.sha256, size_bytes=artifact.bytes,
        latency_s=quantity(np.concatenate([clean_turns(samples) for samples in rounds])),
        quartiles_s=(float(low), float(high)), p95_s=p95(runs), activation_bytes=memory.activation_bytes,
        process_bytes=memory.process_bytes, rounds=tuple(rounds),
        energy_j=energy_per_run(energy.power) if energy is not None and energy.power is not None else None,
    )  # fmt: skip


def find_disturbances(rounds: Sequence[Sequence[Samples]], conditions: Sequence[Conditions]) -> list[str]:
    """What disturbed a measurement, a sentence each.

    rounds: of each file; two speeds and a drift are the board's, and the first file shows them.
    """
    medians = np.concatenate([turn_medians(samples) for samples in rounds[0]])
    notes = []
    if (modes := find_modes(medians)) is not None:
        (fast, fast_s), (slow, slow_s) = modes
        notes.append(
            f"the board jumps between two speeds: {format_seconds(fast_s)} in {fast:.0%} of the turns, "
            f"{format_seconds(slow_s)} in {slow:.0%}; another process, or a CPU quota?"
        )
    interrupted, turns = sum(len(samples.interrupted) for samples in rounds[0]), len(medians)
    if interrupted > OFTEN * turns:
        notes.append(
            f"something else had the processor in {interrupted / turns:.0%} of the turns (another process, a CPU quota)"
            "; the median latency and the comparison are without them, the 95 % are not"
        )
    if (drift := find_drift(medians)) is not None:
        notes.append(f"the latency drifted by {drift:+.1%} during the measurement; is the board warming up?")
    ends = [samples.warm_up_ended for each in rounds for samples in each]
    for end, count in sorted(Counter(ends).items()):
        if end not in ("", "stable"):
            notes.append(f"{count} of {len(ends)} warm-ups were not seen to become stable: {end}")
    throttled = sorted({c.throttled for c in conditions if c.throttled})
    if throttled:
        notes.append(f"the board was throttled: {'; '.join(throttled)}; cool it and measure again")
    if conditions and conditions[-1].governor not in (None, "performance"):
        notes.append(f"the clock's governor is '{conditions[-1].governor}'; with 'performance' latencies vary less")
    return notes


def _failures(results: Sequence[StepResult]) -> list[str]:
    """Why energy was not measured."""
    return [f"no energy: {result.error}" for result in results if result.kind == "energy" and result.error]


def _name(error: str, files: dict[str, Path]) -> str:
    """The user's name of the file that an error is about; the last one's where it does not say."""
    return next((str(path) for name, path in files.items() if name in error), str(list(files.values())[-1]))
