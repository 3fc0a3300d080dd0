"""Several ways to one latency."""

from __future__ import annotations

from collections.abc import Sequence

from edgeprune.core.budget import format_bytes
from edgeprune.core.describe.text import interval, table
from edgeprune.core.records import Comparison


def comparison_rows(comparison: Comparison) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Header and rows of a table: the dense model, then every outcome."""

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.2%}"

    dense = comparison.dense
    size = "" if dense.artifact_bytes is None else format_bytes(dense.artifact_bytes)
    rows = [("dense", interval(dense.latency_s), "1.000", "", share(comparison.dense_accuracy), size, "", "")]
    for one in comparison.outcomes:
        rows.append((
            one.recipe,
            "" if one.latency_s is None else interval(one.latency_s),
            "" if one.latency_share is None else f"{one.latency_share:.3f}",
            share(one.before_recovery),
            share(one.accuracy) + _range(one.accuracies),
            "" if one.artifact_bytes is None else format_bytes(one.artifact_bytes),
            f"{one.seconds:.0f} s" if one.seconds else "",
            one.note if one.met or not one.note else f"NOT MET: {one.note}",
        ))  # fmt: skip
    header = ("recipe", "measured latency", "of dense", "before training", "accuracy", "size", "time spent", "note")
    return header, tuple(rows)


def _range(accuracies: Sequence[float]) -> str:
    """From the worst to the best of several trainings, after their mean."""
    return f" ({min(accuracies):.1%} to {max(accuracies):.1%})" if len(accuracies) > 1 else ""


def describe_comparison(comparison: Comparison) -> str:
    """Every recipe, and the verdict."""
    header, rows = comparison_rows(comparison)
    return "\n\n".join([table(header, rows, left=(0, 7)), *comparison.verdict])
