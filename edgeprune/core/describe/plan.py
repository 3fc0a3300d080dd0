"""Latency tables, and the plans made from them, as text."""

from __future__ import annotations

from collections.abc import Mapping

from edgeprune.core.branches import dropped_branches
from edgeprune.core.budget import format_seconds
from edgeprune.core.closed_loop import taken_round
from edgeprune.core.describe.text import UNKNOWN, interval, table
from edgeprune.core.records import Graph, Plan, Profile


def describe_profile(profile: Profile) -> str:
    """How the tables were made and how far they can be trusted."""
    rows = []
    for entry in profile.tables:
        count = sum(kernel.signature == entry.signature for kernel in profile.kernels)
        dense = format_seconds(float(entry.latency_s[-1, -1]))
        rows.append((entry.signature, str(count), f"{entry.tile_in}/{entry.tile_out}", dense))
    error = profile.held_out
    trusted = (
        f"held-out error of the whole model: mean {error.mean:.1%}, max {error.max:.1%}"
        f" on {error.configurations} configurations"
        if error
        else "no configuration was held out"
    )
    left_out = [error for fold in profile.folds for error in fold.errors]
    if left_out:
        trusted += f"\nleft out of the fit in turn: mean {sum(left_out) / len(left_out):.1%}, max {max(left_out):.1%}"
    if profile.energy is not None:
        watts = ", ".join(f"{operator} {power:.3g} W" for operator, power in profile.energy.power_w.items())
        wrong = profile.energy.error
        trusted += f"\npower above rest: {watts}"
        trusted += f"; energy on held-out configurations within {wrong.max:.1%}" if wrong else ""
    trusted += "".join(f"\n{note}" for note in sorted({m.note for m in profile.measurements if m.note}))
    made = len({m.configuration for m in profile.measurements})
    return (
        table(("kernel", "uses", "tile in/out", "largest"), rows)
        + f"\n\n{made} configurations, {len(profile.measurements)} measurements on {profile.target}"
        + f" ({profile.conditions.cpu or profile.conditions.arch}, {profile.conditions.runtime}"
        + f" {profile.conditions.runtime_version}, {profile.conditions.threads} thread)\n{trusted}"
        + f"\noverhead outside kernels {format_seconds(profile.overhead_s)},"
        + (
            " kernels not told by the runtime: tables from whole models alone"
            if profile.additivity_gap is None
            else f" additivity gap {profile.additivity_gap:.1%}"
        )
    )


def describe_plan(graph: Graph, plan: Plan) -> str:
    """Widths, the loop on the board, and what every solver would have reached."""
    units = graph.units
    kept = {name: width for name, width in plan.widths.items() if name in units}
    rows = [(name, str(units[name]), str(width), f"{width / units[name]:.0%}") for name, width in kept.items()]
    parts = [table(("group", "units", "kept", "share"), rows)]
    if dropped := dropped_branches(graph, plan.widths):
        parts.append("residual branches dropped whole: " + ", ".join(branch.name for branch in dropped))
    solvers = [
        (s.solver, s.status, f"{s.loss:.4g}", "" if s.gap is None else f"{s.gap:.2%}", interval(s.cost.latency_s))
        for s in plan.alternatives
    ]
    if solvers:
        parts.append(table(("solver", "status", "predicted loss", "proven gap", "predicted latency"), solvers))
    if plan.rounds:
        loop = [
            (
                str(i),
                UNKNOWN if r.asked_s is None else format_seconds(r.asked_s),
                format_seconds(r.predicted_s),
                interval(r.measured),
            )
            for i, r in enumerate(plan.rounds, 1)
        ]
        parts.append(table(("round", "asked of the tables", "predicted", "measured"), loop))
    if plan.finer_step:
        parts.append(plan.finer_step)
    return "\n\n".join(parts)


def describe_plans(graph: Graph, plans: Mapping[str, Plan]) -> str:
    """Plans of one model within several budgets, a line each: what is lost for what."""
    units = graph.units
    total = sum(units[group.name] for group in graph.prunable)
    rows = []
    for name, plan in plans.items():
        turn = taken_round(plan)
        kept = sum(plan.widths.get(group.name, group.units) for group in graph.prunable)
        rows.append((
            name,
            UNKNOWN if plan.budget.latency_s is None else format_seconds(plan.budget.latency_s),
            interval(plan.predicted.latency_s),
            UNKNOWN if turn is None else interval(turn.measured),
            f"{kept / total:.0%}",
            UNKNOWN if plan.predicted.parameters is None else f"{plan.predicted.parameters:,}",
            f"{plan.loss:.4g}",
        ))  # fmt: skip
    return table(("plan", "limit", "predicted", "measured", "units", "parameters", "predicted loss"), rows)
