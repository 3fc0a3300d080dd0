"""Several ways to one latency, side by side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edgeprune.core.records.board import Conditions
from edgeprune.core.records.costs import Cost, Quantity


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one recipe came to.

    recipe: its name. asked: the latency limit as text, "" where there is none. directory: of its run, beside the
    comparison. target: the board it was measured on.
    latency_s, latency_share: as validated, and over the dense model's in the same turns. before_recovery, accuracy:
    top-1 in [0, 1] before any training, and of what was exported; with several trainings the mean of `accuracies`.
    accuracies: of trainings that differ in their seed, the recipe's own first. repeats: where the others are.
    seconds: spent on it, what it shares with other recipes included. met: every check of its report passed.
    note: why something is missing.
    """

    recipe: str
    asked: str
    directory: str
    target: str
    latency_s: Quantity | None = None
    latency_share: float | None = None
    before_recovery: float | None = None
    accuracy: float | None = None
    accuracies: tuple[float, ...] = ()
    repeats: tuple[str, ...] = ()
    artifact_bytes: int | None = None
    parameters: int | None = None
    seconds: float = 0.0
    met: bool = False
    note: str = ""

    @property
    def way(self) -> str:
        """The recipe's name without the latency that it was carried out to."""
        return self.recipe.removesuffix(f" at {self.asked}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Recipes that were carried out to the same measured latency, each a run of its own.

    dense, dense_accuracy: what all start from. test_examples: that accuracies are of. epochs, scratch_epochs: of
    training, after pruning and from nothing. seeds: trainings of each recipe. verdict: sentences, one for each latency
    that was asked for.
    """

    conditions: Conditions
    dense: Cost
    dense_accuracy: float
    test_examples: int
    epochs: int
    scratch_epochs: int
    outcomes: tuple[Outcome, ...]
    verdict: tuple[str, ...]
    seeds: int = 1


def most_accurate(outcomes: Iterable[Outcome], asked: str) -> Outcome | None:
    """Of those for a latency that meet their limits; the first of several."""
    met = [one for one in outcomes if one.asked == asked and one.met and one.accuracy is not None]
    return max(met, key=lambda one: one.accuracy or 0.0, default=None)
