"""What is told of files and models before or without pruning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from edgeprune.core.records.board import Conditions, Samples
from edgeprune.core.records.costs import Quantity
from edgeprune.core.records.model import Precision
from edgeprune.core.records.report import TensorInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One file as measured on a board.

    latency_s: median, with its 95 % interval, over turns that no other process interrupted (over all where those are
    fewer than five). quartiles_s, p95_s: of single runs, all of them.
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
class PrecisionTrial:
    """How fast the dense model is in a precision. latency_share: over that of float32, in the same turns."""

    precision: Precision
    latency_share: Quantity


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionChoice:
    """How the precision of a run was chosen.

    trials: of the dense model on the board. candidates: each planned for the same budget, with the accuracy of the
    artifact before any training, on calibration data. chosen: one of them.
    """

    trials: tuple[PrecisionTrial, ...]
    candidates: tuple[tuple[Precision, float | None], ...]
    chosen: Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelAdvice:
    """One kernel of the dense model.

    limited_by: `compute`, `memory` or `start-up`; empty where the runtime tells no kernels and this is the whole model.
    prunable: whether pruning changes its size.
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
    prunable_share: of the time in kernels; None where the runtime tells none. kernels: the costliest first.
    threads: (thread count, latency). dtypes: (data type, latency over that of float32). notes: what was not done
    and why. verdict: the conclusion in words.
    """

    target: str
    conditions: Conditions
    latency_s: Quantity
    smallest_s: Quantity | None
    outside_s: float
    prunable_share: float | None
    kernels: tuple[KernelAdvice, ...]
    threads: tuple[tuple[int, Quantity], ...]
    verdict: str
    dtypes: tuple[tuple[str, Quantity], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationError:
    """What an operation of a file gives in one runtime, held against another. error: largest difference, relative."""

    name: str
    op: str
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossCheck:
    """A file in two runtimes on this machine.

    runtimes: (name, version) of each. output_error: largest difference of any output over its largest value.
    operations: in the file's order, each by the runtimes' plain kernels, with what those before it left.
    """

    runtimes: tuple[tuple[str, str], ...]
    output_error: float
    operations: tuple[OperationError, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation of a model file.

    shape, dtype: of its first output; shape None where the file does not tell.
    macs: multiplications that are added up, batch 1 where it is free; 0 of an operation without, None where its
        shapes are not known. weight_bytes: constants that it reads.
    """

    name: str
    op: str
    shape: tuple[int, ...] | None
    dtype: str
    macs: int | None
    weight_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What a model file, or the model of a bundle, holds.

    weights: data type -> (numbers, bytes) of all constants. metadata: what the file says of itself.
    measured: target, conditions and costs from the bundle's manifest or the report beside the file; {} without.
    compressed_bytes: as in `Artifact`.
    """

    path: str
    format: str
    sha256: str
    bytes: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    operations: tuple[Operation, ...]
    weights: dict[str, tuple[int, int]]
    metadata: dict[str, str] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    compressed_bytes: int | None = None

    @property
    def macs(self) -> int | None:
        """Of all operations; None where those of one are not known."""
        known = [operation.macs for operation in self.operations if operation.macs is not None]
        return sum(known) if len(known) == len(self.operations) else None
