"""What was done to a model besides fewer channels, as text: zeros, gates, blocks."""

from __future__ import annotations

from edgeprune.core.describe.text import UNKNOWN, short_number, table
from edgeprune.core.records import Gated, Pivoted, Sparsity


def describe_sparsity(sparsity: Sparsity) -> str:
    """What is zero, layer by layer, and what stays dense and why."""
    rows = [
        (name.removesuffix(".weight"), f"{each.weights:,}", f"{each.zeros / each.weights:.1%}",
         UNKNOWN if each.kept_share is None else f"{each.kept_share:.1%}", "")
        for name, each in sparsity.layers.items()
    ]  # fmt: skip
    rows += [(name.removesuffix(".weight"), "", "", "", f"dense: {why}") for name, why in sparsity.skipped.items()]
    parts = [table(("layer", "weights", "zero", "magnitude kept", ""), rows, left=(0, 4))]
    if sparsity.permuted:
        parts.append(f"channels in another order: {', '.join(sparsity.permuted)}")
    parts.append(
        f"{sparsity.pattern}: {sparsity.zeros:,} of {sparsity.weights:,} weights are zero ({sparsity.share:.1%})"
    )
    return "\n\n".join(parts)


def describe_gates(gated: Gated) -> str:
    """How often each gate runs, and which always decide the same."""
    collapsed = gated.collapsed
    rows = [(name, f"{g.share:.1%}", f"{g.runs:.1%}", collapsed.get(name, "")) for name, g in gated.gates.items()]
    parts = [table(("gate", "of the MACs", "runs", ""), rows, left=(0, 3))]
    if collapsed:
        parts.append(
            f"{len(collapsed)} of {len(rows)} gates decide the same for every example: "
            + ", ".join(f"{name} ({what})" for name, what in collapsed.items())
        )
    parts.append(
        f"{gated.gating}: an input needs {gated.macs_share:.1%} of the MACs on average of {gated.examples} examples"
    )
    return "\n\n".join(parts)


def describe_pivoted(pivoted: Pivoted) -> str:
    """Which layers run in blocks, which stay whole and why, and what came of it."""
    rows = []
    for path, each in pivoted.layers.items():
        times = (each.latency_s, each.whole_latency_s)
        share = UNKNOWN if times[0] is None or not times[1] else f"{times[0] / times[1]:.2f}"
        loss = UNKNOWN if each.loss is None else f"{each.loss:.2g}"
        rows.append((path, str(each.groups), f"{each.kept_share:.0%}", loss, share, "gathers" if each.gathered else ""))
    rows += [(path, "", "", "", "", f"whole: {why}") for path, why in pivoted.skipped.items()]
    parts = [table(("layer", "blocks", "kept", "loss", "latency / whole", ""), rows, left=(0, 5))]
    if pivoted.permuted:
        parts.append(f"channels in another order: {', '.join(pivoted.permuted)}")
    line = f"{short_number(pivoted.macs)} of {short_number(pivoted.whole_macs)} MACs"
    if (measured := pivoted.latency_share) is not None:
        line += f"; {measured.median:.3f} [{measured.low:.3f}, {measured.high:.3f}] of the latency, in turns"
        line += f" (asked for: {pivoted.limit_share:.3f})" if pivoted.limit_share is not None else ""
    return "\n\n".join([*parts, line])
