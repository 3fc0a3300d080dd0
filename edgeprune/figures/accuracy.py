"""Accuracy over the latency on the board: dense, pruned, recovered."""

from __future__ import annotations

from edgeprune.core.describe import interval
from edgeprune.figures import DENSE, LIMIT, PRUNED, STAGE, Figure, Layout, Run, Table, Trace, axis, time_scale

ORDER = 20


def draw(run: Run) -> Figure | None:
    """Drawn when the accuracy of at least two models is known."""
    accuracy, dense, compact = run.report.accuracy, run.report.dense.latency_s, run.report.compact.latency_s
    places = (
        ("dense", accuracy.dense, dense, DENSE),
        ("pruned", accuracy.before_recovery, compact, STAGE),
        ("recovered", accuracy.after_recovery, compact, PRUNED),
    )
    points = [(name, share, time, colour) for name, share, time, colour in places if share is not None and time]
    if len(points) < 2:
        return None
    scale, unit = time_scale(time.median for _, _, time, _ in points)
    traces: list[Trace] = [
        {
            "type": "scatter",
            "mode": "markers+text",
            "name": name,
            "x": [time.median * scale],
            "y": [100 * share],
            "error_x": {
                "type": "data",
                "symmetric": False,
                "array": [(time.high - time.median) * scale],
                "arrayminus": [(time.median - time.low) * scale],
                "color": colour,
            },
            "text": [f"  {name} {share:.1%}  "],
            "textposition": "top center" if name == "dense" else "middle right",
            "cliponaxis": False,
            "marker": {"color": colour, "size": 14},
        }
        for name, share, time, colour in points
    ]
    low, high = min(share for _, share, *_ in points), max(share for _, share, *_ in points)
    room = max(high - low, 0.02)
    widest = max(time.median for *_, time, _ in points)
    layout: Layout = {
        "height": 400,
        "showlegend": False,
        "xaxis": axis(f"latency on the board ({unit})", range=[0, 1.2 * widest * scale]),
        "yaxis": axis("top-1 (%)", range=[100 * (low - 0.2 * room), min(100 * (high + 0.25 * room), 104)]),
    }
    limit = run.report.budget.latency_s
    if limit is not None:
        ends = {"x0": limit * scale, "x1": limit * scale, "y0": 0, "y1": 1, "yref": "paper"}
        layout["shapes"] = [{"type": "line", **ends, "line": {"color": LIMIT, "width": 1.5, "dash": "dash"}}]
        place = {"x": limit * scale, "xanchor": "right", "y": 1, "yref": "paper", "yanchor": "top"}
        layout["annotations"] = [{**place, "text": "budget ", "showarrow": False, "font": {"color": LIMIT}}]
    return Figure(
        name="accuracy",
        title="Accuracy against latency",
        says="What pruning cost, what retraining gave back, and how fast each is on the board.",
        traces=traces,
        layout=layout,
        table=Table(
            header=("model", "top-1", "latency"),
            rows=tuple((name, f"{share:.2%}", interval(time)) for name, share, time, _ in points),
        ),
        half=True,
    )
