"""Boards, and what is measured on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

AVX512 = "AVX-512"
"""Ends the name of a processor that has these instructions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One entry of the inventory, from `targets/NAME.toml`.

    board, transport: names of family members. runtime, meter: too, with their options as `NAME:options`.
    address: what the transport needs (ssh: host, port, user, key, alias ...; adb: serial ...).
    threads: intra-op threads of the runtime.
    workdir: folder on the board that edgeprune may fill. python: interpreter on the board.
    """

    name: str
    board: str = "linux"
    transport: str = "ssh"
    address: dict[str, Any] = field(default_factory=dict)
    runtime: str = "onnxruntime"
    threads: int = 1
    meter: str = "none"
    ram_bytes: int | None = None
    flash_bytes: int | None = None
    workdir: str = "~/.edgeprune"
    python: str | None = None
    description: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardFacts:
    """What the board says about itself; None where it does not say."""

    arch: str
    system: str = ""
    model: str = ""
    cpu: str = ""
    cpus: int | None = None
    ram_bytes: int | None = None
    ram_free_bytes: int | None = None
    disk_free_bytes: int | None = None
    governor: str | None = None
    freq_hz: float | None = None
    temp_c: float | None = None
    throttled: str | None = None
    python: str | None = None
    runtimes: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    """What a run needs and the board lacks, each with the command that mends it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """Under what a number was measured. Numbers of unlike conditions are never mixed."""

    board: str
    arch: str
    cpu: str
    runtime: str
    runtime_version: str
    dtype: str = "float32"
    batch: int = 1
    threads: int = 1
    cpus: int | None = None
    governor: str | None = None
    freq_hz: float | None = None
    temp_before_c: float | None = None
    temp_after_c: float | None = None
    throttled: str | None = None

    def key(self) -> tuple[object, ...]:
        """What must agree before two measurements may be merged (not temperature or momentary clock)."""
        return (
            self.board,
            self.arch,
            self.cpu,
            self.runtime,
            self.runtime_version,
            self.dtype,
            self.batch,
            self.threads,
            self.governor,
        )

    def unlike(self, now: Conditions) -> list[str]:
        """What of the key has changed, a phrase each."""
        names = ("board", "arch", "cpu", "runtime", "runtime_version", "dtype", "batch", "threads", "governor")
        pairs = zip(names, self.key(), now.key(), strict=True)
        return [f"{name} was {before}, is {after}" for name, before, after in pairs if before != after]


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Raw repeated measurements of one quantity: each value is the mean of `loops` inner loops.

    per_turn: how many values in a row were taken before another model had its turn.
    interrupted: turns, counted from 0, of which another process took more than 2 %.
    at_work: per turn, seconds of a run in which the thread had the processor; empty where the work is done elsewhere.
    warmups: runs before them. warm_up_ended: `stable`; at its time limit such as `changing after 3 s`.
    """

    values: tuple[float, ...]
    unit: str = "s"
    per_turn: int = 1
    interrupted: tuple[int, ...] = ()
    at_work: tuple[float, ...] = ()
    loops: int = 1
    warmups: int = 0
    warm_up_ended: str = ""
    stopped_because: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing the agent does with one artifact.

    key: unique in the job; a result of that key is never measured again.
    kind: `time` the whole model; `inputs` the same of each of the inputs on its own; `kernels` with the runtime's own
        profiler; `outputs` for given inputs; `memory` in a fresh process; `energy` by the target's meter, in a loop of
        `seconds`.
    inputs: an .npz on the board (arrays named as the model's inputs, leading axis = examples),
        or None for one random input of the model's own shape.
    against: another artifact that is measured in turns with it, so that the two can be compared on a
        board whose speed changes (`time`, `inputs`, `kernels`).
    seconds: time to spend sampling; of `inputs` as many take part as it allows. precision: stop before that once the
        median, or the ratio to `against`, is known to this relative half-width of its 95 % interval. runs: profiled
        (`kernels`).
    threads: of this artifact alone (`time`); None: as the target says.
    steady: on this board a run takes the same time every time: do not wait until it has settled, do not repeat.
    """

    key: str
    kind: Literal["time", "inputs", "kernels", "outputs", "memory", "energy"]
    artifact: str
    inputs: str | None = None
    against: str | None = None
    seconds: float = 0.3
    precision: float | None = None
    min_samples: int = 7
    runs: int = 10
    threads: int | None = None
    steady: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTime:
    """One kernel as the runtime's profiler saw it: name in the runtime's words, median seconds."""

    name: str
    op: str
    time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerSamples:
    """Power of a board by its meter, in watts: at rest (idle), and while a model ran in a loop (active).

    times are in seconds from the loop's beginning; idle ones lie before it and after it.
    seconds: the loop took. runs: made in it.
    """

    idle_times_s: tuple[float, ...]
    idle_w: tuple[float, ...]
    active_times_s: tuple[float, ...]
    active_w: tuple[float, ...]
    seconds: float
    runs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What came of a step; `error` says why there is nothing else.

    samples, against: whole-model latency of the artifact and of the one it was measured against, turn
    for turn (time), or the typical latency of each input, in their order (inputs). kernels, run_s: typical times of
    each kernel and of the profiled whole run; against_run_s: of the other artifact's (kernels). outputs: name of an
    .npz on the board (outputs).
    activation_bytes: growth of the peak resident set over the loaded session while running;
    process_bytes: peak resident set of the whole process (memory). power: by the target's meter (energy).
    """

    key: str
    kind: str
    error: str | None = None
    samples: Samples | None = None
    against: Samples | None = None
    kernels: tuple[KernelTime, ...] = ()
    run_s: float | None = None
    against_run_s: float | None = None
    outputs: str | None = None
    activation_bytes: int | None = None
    process_bytes: int | None = None
    power: PowerSamples | None = None
    conditions: Conditions | None = None

    @property
    def no_kernels(self) -> bool:
        """Whether the runtime said that it cannot tell the times of its kernels (kernels)."""
        return self.error is not None and self.error.startswith("NoKernels:")
