"""The outcome of a run as text."""

from __future__ import annotations

from pathlib import Path

from edgeprune.core.budget import format_amount, format_bytes, format_energy, format_seconds
from edgeprune.core.describe.text import UNKNOWN, interval, table
from edgeprune.core.records import Cost, Distribution, Report


def summary(directory: Path, report: Report) -> str:
    """The last words of a run: dense against pruned, the checks, where everything lies."""
    dense, compact, predicted = report.dense, report.compact, report.predicted

    def amounts(name: str) -> list[str]:
        values = [getattr(cost, name) for cost in (dense, predicted, compact)]
        return [UNKNOWN if v is None else format_amount(name, float(v)) for v in values]

    def counts(name: str, cost: Cost) -> str:
        value = getattr(cost, name)
        return UNKNOWN if value is None else f"{value:,}"

    accuracy = report.accuracy
    rows = [
        ("latency", interval(dense.latency_s), interval(predicted.latency_s), interval(compact.latency_s)),
        ("accuracy", *(UNKNOWN if v is None else f"{v:.2%}" for v in (accuracy.dense, None, accuracy.after_recovery))),
        ("  on the board", UNKNOWN, "", UNKNOWN if accuracy.on_board is None else f"{accuracy.on_board:.2%}"),
        (
            "  before recovery",
            "",
            "",
            UNKNOWN if accuracy.before_recovery is None else f"{accuracy.before_recovery:.2%}",
        ),
        ("parameters", *(counts("parameters", cost) for cost in (dense, predicted, compact))),
        ("MACs", *(counts("macs", cost) for cost in (dense, predicted, compact))),
        ("artifact size", *amounts("artifact_bytes")),
        ("  compressed", *amounts("compressed_bytes")),
        ("peak memory", *amounts("peak_memory_bytes")),
    ]
    checks = [
        (
            check.name,
            *("" if v is None else _amount(check.unit, v) for v in (check.predicted, check.measured, check.limit)),
            "passed" if check.passed else "FAILED",
        )
        for check in report.checks
    ]
    return "\n\n".join(
        [
            table(("", "dense", "predicted", "pruned"), rows),
            *([] if report.distribution is None else [describe_distribution(report.distribution)]),
            table(("check", "predicted", "measured", "limit", ""), checks),
            f"everything lies in {directory}",
        ]
    )


def _amount(unit: str, value: float) -> str:
    """A check's value in its own unit."""
    known = {"s": format_seconds, "bytes": format_bytes, "J": format_energy}
    return known[unit](value) if unit in known else f"{value:.3g}"


def describe_distribution(found: Distribution) -> str:
    """Latency over real inputs in a sentence, and how often each gate ran."""
    times = [
        f"{name} {format_seconds(value)}"
        for name, value in (("mean", found.mean_s), ("median", found.median_s), ("worst", found.worst_s))
    ]
    text = (
        f"latency over {len(found.latencies_s)} inputs: {', '.join(times)}; of the dense {found.mean_share:.1%} "
        f"on average, {found.worst_share:.1%} at worst"
    )
    if found.gates:
        text += f"\ngates ran: {', '.join(f'{name} {share:.0%}' for name, share in found.gates.items())}"
    return text
