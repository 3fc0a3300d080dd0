"""Every record that passes between stages or is written to disk. Read this first.

Plain values in frozen dataclasses. SI base units stand in the field name (`_s _j _w _bytes _hz _c`).
`None` means "not measured", never 0. How they are written and read back: `core/store.py`.

A *unit* is one removable index of a group, a *group* is a set of channels planned together, its
*width* the number of units kept. Sizes that depend on widths are `Extent`s, so that shapes, MACs,
bytes and kernel costs follow from widths without touching the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Widths = Mapping[str, int]
"""Group name -> units kept. A group that is not named keeps all its units."""


# --- the model -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Where a model comes from.

    factory: `path.py:fn` or `pkg.mod:fn`, called without arguments; or None when `file` is given.
    file: a `.pt2` written by torch.export.
    weights: a `.safetensors` file or a state dict that loads with `weights_only=True`.
    inputs: shapes of the example inputs, batch first.
    """

    factory: str | None = None
    file: str | None = None
    weights: str | None = None
    inputs: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """The size of one tensor axis as a function of the widths: fixed + sum of count x width."""

    fixed: int = 0
    groups: tuple[tuple[str, int], ...] = ()

    def size(self, widths: Widths, units: Widths) -> int:
        """Size of the axis for `widths`; `units` gives the full width of groups not in `widths`."""
        return self.fixed + sum(count * widths.get(name, units[name]) for name, count in self.groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A parameter or buffer of the model: its state-dict key, dense shape and size per axis."""

    name: str
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]
    element_bytes: int = 4
    trainable: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One operation of the exported graph.

    name: unique in the graph. path: the module it stands in ("" for the root).
    op: the ATen name without overload (`conv2d`, `add`, `flatten`; `input` for a model input).
    inputs: the nodes whose outputs it reads, in order (no parameters).
    parameters: the state-dict keys it reads, weight before bias.
    attributes: plain values (stride, padding, dilation, groups ...).
    out_shape: dense shape for the example input, batch included; () for a tuple of tensors.
    out_extents: one per axis of out_shape.
    view: True where the output shares the input's memory (flatten, view, dropout in evaluation).
    """

    name: str
    path: str
    op: str
    inputs: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    out_shape: tuple[int, ...] = ()
    out_extents: tuple[Extent, ...] = ()
    view: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """Where a group's units lie in one axis of one parameter.

    index: (units, k) positions along `axis`; row i goes when unit i is removed.
    role: "out" where the axis produces the channel, "in" where it consumes it.
    """

    parameter: str
    axis: int
    index: IntArray
    role: Literal["out", "in"] = "out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """A number in the graph that falls when units are removed (view sizes, split sizes, pads, groups).

    node, argument: the place, as a path into the node's arguments: (1, 2) is `args[1][2]`.
    count: (units,) by how much it falls for each removed unit.
    """

    node: str
    argument: tuple[int, ...]
    count: IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Channels that can only be removed together.

    units: how many there are. step: a width must be a multiple of it (or all units).
    frozen_because: why it keeps every unit, or None when it may be pruned.
    inexact_because: why removing units changes more than the removed channels, or None.
    """

    name: str
    units: int
    step: int = 1
    members: tuple[Member, ...] = ()
    constants: tuple[Constant, ...] = ()
    frozen_because: str | None = None
    inexact_because: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """What can be pruned and what everything costs in channels.

    model_sha256: digest of the model's structure (graph, shapes; not the weights' values).
    unsupported: (op, node) pairs that no rule covers; what touches them is frozen.
    """

    model_sha256: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    parameters: tuple[Parameter, ...]
    groups: tuple[Group, ...]
    unsupported: tuple[tuple[str, str], ...] = ()

    @property
    def units(self) -> dict[str, int]:
        """Full width of every group."""
        return {group.name: group.units for group in self.groups}

    @property
    def prunable(self) -> tuple[Group, ...]:
        """The groups that may lose units."""
        return tuple(group for group in self.groups if group.frozen_because is None)


# --- the board -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One entry of the inventory, from `targets/NAME.toml`.

    board, transport, runtime: names of family members; meter: too, with its options as `NAME:options`.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Raw repeated measurements of one quantity: each value is the mean of `loops` inner loops.

    per_turn: how many values in a row were taken before another model had its turn.
    """

    values: tuple[float, ...]
    unit: str = "s"
    per_turn: int = 1
    loops: int = 1
    warmups: int = 0
    stopped_because: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing the agent does with one artifact.

    key: unique in the job; a result of that key is never measured again.
    kind: `time` the whole model; `kernels` with the runtime's own profiler; `outputs` for given
        inputs; `memory` in a fresh process; `energy` by the target's meter, in a loop of `seconds`.
    inputs: an .npz on the board (arrays named as the model's inputs, leading axis = examples),
        or None for one random input of the model's own shape.
    against: another artifact that is measured in turns with it, so that the two can be compared on a
        board whose speed changes (`time`, `kernels`).
    seconds: time to spend sampling. precision: stop before that once the median, or the ratio to
        `against`, is known to this relative half-width of its 95 % interval. runs: profiled (`kernels`).
    """

    key: str
    kind: Literal["time", "kernels", "outputs", "memory", "energy"]
    artifact: str
    inputs: str | None = None
    against: str | None = None
    seconds: float = 0.3
    precision: float | None = None
    min_samples: int = 7
    runs: int = 10


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
    for turn (time). kernels, run_s: typical times of each kernel and of the profiled whole run;
    against_run_s: of the other artifact's (kernels). outputs: name of an .npz on the board (outputs).
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


# --- what things cost ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A fused chain of nodes that the runtime executes as one.

    name: the runtime's own name for it in the dense artifact. nodes: graph nodes it covers.
    signature: what fixes its cost besides channels (op, kernel size, stride, groups, spatial size);
        kernels of one signature share one table.
    in_extent, out_extent: channels read and written; in_extent None where only one size matters.
    """

    name: str
    nodes: tuple[str, ...]
    signature: str
    out_extent: Extent
    in_extent: Extent | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Latency of one kernel signature over a grid of channel counts.

    in_sizes (n,), out_sizes (m,): ascending grid; in_sizes is (1,) of 0 where only out matters.
    latency_s: (n, m). A size between grid points costs what the next larger grid point costs
    when the grid is on the tile, so look-ups interpolate linearly only below tile resolution.
    tile_in, tile_out: channels computed at once, found from the data (1 = no staircase).
    """

    signature: str
    in_sizes: IntArray
    out_sizes: IntArray
    latency_s: FloatArray
    tile_in: int = 1
    tile_out: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One configuration as measured in one round: whole model and, if profiled, each kernel.

    dense, dense_run_s: the dense model in the turns between: whole, and whole while profiled.
    activation_bytes: growth of the process while running, where it was measured; live_bytes: the
        largest sum of tensors alive at once in the graph at these widths.
    """

    configuration: str
    round: int
    widths: dict[str, int]
    held_out: bool
    samples: Samples
    dense: Samples
    kernels: dict[str, float] = field(default_factory=dict)
    run_s: float | None = None
    dense_run_s: float | None = None
    activation_bytes: int | None = None
    live_bytes: int | None = None
    conditions: Conditions | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutError:
    """Relative error on configurations the fit never saw."""

    mean: float
    max: float
    configurations: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryModel:
    """Peak activation memory as measured: base_bytes + scale x the tensors alive at once in the graph.

    error: on held-out configurations.
    """

    base_bytes: float
    scale: float
    error: HeldOutError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Latency tables of one model on one target, with all that they were made from.

    overhead_s: whole-model time outside any kernel.
    additivity_gap: |sum of kernels - profiled run| / profiled run, median over configurations.
    dense_bytes: size of the dense artifact. dense_latency: whole-model samples of the anchor.
    """

    target: str
    conditions: Conditions
    graph_sha256: str
    artifact_sha256: str
    dense_bytes: int
    kernels: tuple[Kernel, ...]
    measurements: tuple[Measurement, ...]
    tables: tuple[Table, ...]
    overhead_s: float
    additivity_gap: float
    held_out: HeldOutError | None = None
    memory: MemoryModel | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """A number with its interval (95 % for latencies)."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One file as measured on a board.

    latency_s: median over turns with its 95 % interval. quartiles_s, p95_s: of single runs.
    activation_bytes, process_bytes: as in `StepResult`. rounds: raw samples, a round each.
    energy_j: what one inference adds to the board at rest.
    """

    name: str
    sha256: str
    size_bytes: int
    latency_s: Quantity
    quartiles_s: tuple[float, float]
    p95_s: float
    activation_bytes: int | None
    process_bytes: int | None
    rounds: tuple[Samples, ...]
    energy_j: Quantity | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What `edgeprune measure` found of one file, or of two in turns.

    ratio: second over first, with a 99 % interval over rounds. verdict: the same in a sentence.
    notes: what disturbed the measurement.
    """

    target: str
    conditions: Conditions
    timings: tuple[Timing, ...]
    ratio: Quantity | None = None
    verdict: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What running a model takes; each None when not known."""

    latency_s: Quantity | None = None
    peak_memory_bytes: int | None = None
    artifact_bytes: int | None = None
    parameters: int | None = None
    macs: int | None = None
    energy_j: Quantity | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Limits, absolute, each optional. peak_memory_bytes is of activations while running."""

    latency_s: float | None = None
    latency_share: float | None = None
    peak_memory_bytes: int | None = None
    artifact_bytes: int | None = None
    energy_j: float | None = None
    statistic: Literal["median", "p95"] = "median"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelAdvice:
    """One kernel of the dense model.

    limited_by: `compute`, `memory` or `start-up`. prunable: whether pruning changes its size.
    steps: (units taken off every group, share of its dense time that is left).
    """

    name: str
    op: str
    time_s: float
    macs: int
    limited_by: str
    prunable: bool
    steps: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """Where the time of a model goes on a board, and whether pruning can help.

    smallest_s: at the least widths; None where nothing can be pruned. outside_s: in no kernel.
    prunable_share: of the time in kernels. kernels: the costliest first.
    threads: (thread count, latency). verdict: the conclusion in words.
    """

    target: str
    conditions: Conditions
    latency_s: Quantity
    smallest_s: Quantity | None
    outside_s: float
    prunable_share: float
    kernels: tuple[KernelAdvice, ...]
    threads: tuple[tuple[int, Quantity], ...]
    verdict: str


# --- what to keep --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LossCurve:
    """Calibration loss of the model with one group cut to a few widths (ascending), others dense."""

    widths: IntArray
    loss: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """How much each unit matters: larger = keep. curves: measured, per group, where asked for."""

    criterion: str
    graph_sha256: str
    scores: dict[str, FloatArray]
    dense_loss: float | None = None
    curves: dict[str, LossCurve] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverResult:
    """What one solver would choose: widths, predicted loss and cost, and what is proven of it."""

    solver: str
    status: str
    widths: dict[str, int]
    loss: float
    cost: Cost
    gap: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRound:
    """One turn of the closed loop: the latency asked of the tables, predicted and measured; the peak memory."""

    asked_s: float
    predicted_s: float
    measured: Quantity
    widths: dict[str, int]
    peak_memory_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The chosen widths and the units to keep.

    keep: per pruned group the kept unit indices, ascending; a group not named keeps all.
    rounds: the closed loop on the board, empty when the plan was made from tables alone.
    """

    graph_sha256: str
    budget: Budget
    widths: dict[str, int]
    keep: dict[str, IntArray]
    predicted: Cost
    solver: str
    status: str
    gap: float | None
    loss: float
    alternatives: tuple[SolverResult, ...] = ()
    rounds: tuple[PlanRound, ...] = ()
    finer_step: str | None = None
    """Why the measured latency may stay below 0.97 of the budget, or None when it does not."""


# --- what comes out ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One input or output of an artifact."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """An exported model file."""

    path: str
    format: str
    dtype: str
    sha256: str
    bytes: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    graph_sha256: str | None = None
    tools: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was asked and what came of it."""

    name: str
    predicted: float | None
    measured: float | None
    limit: float | None
    unit: str
    passed: bool
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Top-1 in [0, 1]; None where not measured."""

    dense: float | None = None
    before_recovery: float | None = None
    after_recovery: float | None = None
    on_board: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NumericError:
    """The board's outputs against the host reference on the same inputs."""

    max_absolute: float
    max_relative: float
    top1_agreement: float | None
    examples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The evidence. Its JSON keys are stable.

    samples: raw latencies on the board, one `Samples` per round, under "dense" and "compact".
    """

    artifact_sha256: str
    target: str
    budget: Budget
    dense: Cost
    compact: Cost
    predicted: Cost
    accuracy: Accuracy
    numeric_error: NumericError | None
    checks: tuple[Check, ...]
    conditions: Conditions
    provenance: dict[str, str] = field(default_factory=dict)
    samples: dict[str, tuple[Samples, ...]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """True when every check passed."""
        return all(check.passed for check in self.checks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """What an app embeds: a zip and the sha256 of each file in it."""

    path: str
    files: dict[str, str]
    manifest: dict[str, Any]
