"""What is worth keeping, and what is kept."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgeprune.core.records.arrays import FloatArray, IntArray
from edgeprune.core.records.costs import Budget, Cost, Quantity
from edgeprune.core.records.model import FLOAT32, Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class LossCurve:
    """Calibration loss of the model with one group cut to a few widths (ascending), others dense."""

    widths: IntArray
    loss: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """How much each unit matters: larger = keep.

    curves: measured, per group, where asked for; of a branch at widths 0, without it, and 1.
    by_magnitude: groups that the criterion cannot score; the order of their units is another one.
    found: widths that a search judged best; a plan is narrower only where its budget asks for it.
    """

    criterion: str
    graph_sha256: str
    scores: dict[str, FloatArray]
    dense_loss: float | None = None
    curves: dict[str, LossCurve] = field(default_factory=dict)
    by_magnitude: tuple[str, ...] = ()
    found: dict[str, int] = field(default_factory=dict)


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
    """One turn of the closed loop: latency asked of the tables, predicted and measured; peak memory, energy.

    asked_s: None where no latency was asked for.
    """

    asked_s: float | None
    predicted_s: float
    measured: Quantity
    widths: dict[str, int]
    peak_memory_bytes: int | None = None
    energy_j: Quantity | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The chosen widths and the units to keep.

    widths: of groups, and 0 of each branch that is dropped.
    keep: per pruned group the kept unit indices, ascending; a group not named keeps all; none of a dropped branch.
    precision: of the artifact that the costs are of.
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
    precision: Precision = FLOAT32
    finer_step: str | None = None
    """Why the measured latency may stay below 0.97 of the budget, or None when it does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveTrial:
    """One net of a search for what groups lose together.

    base: digest of the importances that the search started from and of how nets are judged. weights: of each view, of
    each group or branch in the order of their names, that the widths were planned with. loss: of the assembled net on
    calibration examples.
    """

    base: str
    weights: list[list[float]]
    widths: dict[str, int]
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Heat:
    """One contender's short training in a tournament.

    made_from: digest of what decides its outcome. steps: of training.
    accuracy: top-1 afterwards, on held-back examples; below 0 where the training diverged.
    """

    contender: str
    made_from: str
    steps: int
    accuracy: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bracket:
    """A tournament of plans: the rungs in order, each with the heats of who was still in, best first.

    latency_s: measured, per contender, where a board was asked. left_out: contender -> why it could not take part.
    """

    rungs: tuple[tuple[Heat, ...], ...]
    winner: str
    latency_s: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
