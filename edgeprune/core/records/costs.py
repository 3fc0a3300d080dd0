"""What running a model takes: tables, costs and limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from edgeprune.core.records.arrays import FloatArray, IntArray
from edgeprune.core.records.board import Conditions, PowerSamples, Samples
from edgeprune.core.records.model import FLOAT32, Extent, Precision

Statistic = Literal["median", "p95", "mean", "worst"]
"""Of latencies: `mean` and `worst` are over real inputs, each timed on its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A fused chain of nodes that the runtime executes as one.

    name: the runtime's own name for it in the dense artifact. nodes: graph nodes it covers.
    signature: what fixes its cost besides channels (op, kernel size, stride, groups, spatial size);
        kernels of one signature share one table.
    in_extent, out_extent: channels read and written; in_extent None where only one size matters.
    positions: places of one output channel. taps: of the window at each of them.
    """

    name: str
    nodes: tuple[str, ...]
    signature: str
    out_extent: Extent
    in_extent: Extent | None = None
    positions: int = 1
    taps: int = 1


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

    note: why something that was asked for is missing.
    dense, dense_run_s: the dense float32 model in the turns between: whole, and whole while profiled.
    activation_bytes: growth of the process while running, where it was measured; arena_bytes: what the
        runtime's arena should take for these widths. power: by the board's meter.
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
    arena_bytes: int | None = None
    power: PowerSamples | None = None
    note: str = ""
    conditions: Conditions | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutError:
    """Relative error on configurations the fit never saw."""

    mean: float
    max: float
    configurations: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryModel:
    """Peak activation memory as measured: base_bytes + scale x what the runtime's arena should take.

    error: on held-out configurations.
    """

    base_bytes: float
    scale: float
    error: HeldOutError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyModel:
    """Watts above the board's rest while each kind of operator runs; mean_w: of the whole model.

    error: of the energy per inference on held-out configurations.
    """

    power_w: dict[str, float]
    mean_w: float
    error: HeldOutError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """Tables fitted without some of the configurations, and how well they predict just those.

    What several of these say of the same widths tells how sure the profile is of them.
    errors: |measured / predicted - 1| of each configuration that was left out.
    """

    tables: tuple[Table, ...]
    overhead_s: float
    errors: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Latency tables of one model on one target, with all that they were made from.

    overhead_s: whole-model time outside any kernel.
    additivity_gap: |sum of kernels - profiled run| / profiled run, median over configurations; None where the
        runtime does not tell kernels.
    precision: of the artifacts. dense_bytes: size of the dense one. folds: the tables fitted to parts of the
        measurements.
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
    additivity_gap: float | None
    held_out: HeldOutError | None = None
    memory: MemoryModel | None = None
    energy: EnergyModel | None = None
    folds: tuple[Fold, ...] = ()
    precision: Precision = FLOAT32


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """A number with its interval (95 % for latencies)."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What running a model takes; each None when not known. compressed_bytes: of its file, deflated."""

    latency_s: Quantity | None = None
    peak_memory_bytes: int | None = None
    artifact_bytes: int | None = None
    parameters: int | None = None
    macs: int | None = None
    energy_j: Quantity | None = None
    compressed_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Limits, absolute, each optional. peak_memory_bytes is of activations while running.

    statistic: of the latency.
    """

    latency_s: float | None = None
    latency_share: float | None = None
    peak_memory_bytes: int | None = None
    artifact_bytes: int | None = None
    energy_j: float | None = None
    statistic: Statistic = "median"
