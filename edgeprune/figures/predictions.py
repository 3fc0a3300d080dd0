"""Predicted against measured latency of whole networks."""

from __future__ import annotations

from edgeprune.core.cost import predict_latency
from edgeprune.figures import DENSE, PRUNED, STAGE, Figure, Run, Table, Trace, axis, time_scale
from edgeprune.tables.combine import average_rounds

ORDER = 50
KINDS = (("fitted", DENSE, "circle"), ("held out", PRUNED, "circle"), ("closed loop", STAGE, "diamond"))


def draw(run: Run) -> Figure | None:
    """One point a configuration of the profile, and one a round of the closed loop."""
    points = [
        ("held out" if c.held_out else "fitted", c.name, predict_latency(run.graph, c.widths, run.profile), c.whole_s)
        for c in average_rounds(run.profile.measurements)
    ]
    points += [
        ("closed loop", f"round {number}", turn.predicted_s, turn.measured.median)
        for number, turn in enumerate(run.plan.rounds, 1)
    ]
    if not points:
        return None
    scale, unit = time_scale(seconds for *_, seconds in points)
    ends = [0, 1.05 * scale * max(max(predicted, seconds) for *_, predicted, seconds in points)]
    diagonal: Trace = {
        "type": "scatter",
        "mode": "lines",
        "x": ends,
        "y": ends,
        "hoverinfo": "skip",
        "showlegend": False,
        "line": {"dash": "dot", "color": DENSE, "width": 1},
    }
    error = run.profile.held_out
    says = (
        f"On {error.configurations} configurations that the tables never saw, the error is {error.mean:.1%} on average "
        f"and {error.max:.1%} at most."
        if error is not None
        else "No configurations were held out."
    )
    return Figure(
        name="predictions",
        title="Predicted and measured latency",
        says=f"On the dotted line the prediction is right. {says}",
        traces=[diagonal, *(_scatter(points, *kind, scale) for kind in KINDS if any(p[0] == kind[0] for p in points))],
        layout={
            "height": 440,
            "hovermode": "closest",
            "xaxis": axis(f"predicted ({unit})", range=ends),
            "yaxis": axis(f"measured ({unit})", range=ends),
        },
        table=Table(
            header=("kind", "configuration", f"predicted ({unit})", f"measured ({unit})", "error"),
            rows=tuple(
                (kind, name, f"{predicted * scale:.4g}", f"{seconds * scale:.4g}", f"{predicted / seconds - 1:+.1%}")
                for kind, name, predicted, seconds in points
            ),
        ),
    )


def _scatter(points: list[tuple[str, str, float, float]], kind: str, colour: str, symbol: str, scale: float) -> Trace:
    mine = [point for point in points if point[0] == kind]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": kind,
        "text": [name for _, name, *_ in mine],
        "x": [predicted * scale for *_, predicted, _ in mine],
        "y": [seconds * scale for *_, seconds in mine],
        "marker": {"color": colour, "size": 9, "symbol": symbol, "opacity": 0.85},
    }
