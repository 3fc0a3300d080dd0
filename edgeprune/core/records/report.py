"""What comes out: artifacts, checks and the evidence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from edgeprune.core.records.board import Conditions, Samples
from edgeprune.core.records.costs import Budget, Cost
from edgeprune.core.records.gating import Distribution
from edgeprune.core.records.sparsity import Sparsity


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One input or output of an artifact.

    layout: order of the axes as letters (`NCHW`, `NHWC`), "" where it is as the module has it.
    scale, zero_point: of a quantised tensor: value = scale x (stored - zero_point); None of another.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: str = ""
    scale: float | None = None
    zero_point: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """An exported model file.

    dtype: as `Precision.dtype`, of the weights and what is computed with them. metadata_bytes: how many of its bytes
    say what it is and name the classes, and do not depend on the widths. compressed_bytes: of the file as an app store
    or a firmware image packs it (deflate at level 9).
    """

    path: str
    format: str
    dtype: str
    sha256: str
    bytes: int
    metadata_bytes: int = 0
    compressed_bytes: int | None = None
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
    """Top-1 in [0, 1]; None where not measured.

    quantised: of the artifact on the host, where it has numbers of 8 bits.
    """

    dense: float | None = None
    before_recovery: float | None = None
    after_recovery: float | None = None
    quantised: float | None = None
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
    sparsity: of the pruned model's weights, where it has a pattern. distribution: of its latency, where it has gates or
    the budget asks for it; then `samples` has one value an input.
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
    sparsity: Sparsity | None = None
    distribution: Distribution | None = None

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
