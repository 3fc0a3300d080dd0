"""Every raw latency on the board, round by round, dense and pruned."""

from __future__ import annotations

import numpy as np

from edgeprune.core.records import Samples
from edgeprune.figures import DENSE, LIMIT, PRUNED, Figure, Layout, Run, Table, Trace, axis, time_scale

ORDER = 10
MOST_POINTS = 60
"""Samples drawn a round, evenly over its time; thousands of points would only make the page slow."""
SHOWN = 0.98
"""Share of the samples that the scale has room for: one interrupted sample would flatten the others."""
NEAR = 0.15
"""The budget line is drawn when it is this close to the samples; further off it would flatten them."""


def draw(run: Run) -> Figure | None:
    """Two panels of their own scale, so that the spread is seen and not only the difference."""
    samples = run.report.samples
    if not samples.get("dense") or not samples.get("compact"):
        return None
    scale, unit = time_scale(float(np.median(s.values)) for rounds in samples.values() for s in rounds)
    traces = [
        _boxes("dense", samples["dense"], DENSE, scale, "y"),
        _boxes("pruned", samples["compact"], PRUNED, scale, "y2"),
    ]
    limit = _near(run.report.budget.latency_s, samples["compact"])
    layout: Layout = {
        "height": 400,
        "showlegend": False,
        "xaxis": axis("round", type="category", anchor="y2"),
        "yaxis": axis(f"dense ({unit})", domain=[0.54, 1], range=_range(samples["dense"], scale)),
        "yaxis2": axis(f"pruned ({unit})", domain=[0, 0.46], range=_range(samples["compact"], scale, limit)),
    }
    if limit is not None:
        ends = {"x0": 0, "x1": 1, "xref": "paper", "y0": limit * scale, "y1": limit * scale, "yref": "y2"}
        layout["shapes"] = [{"type": "line", **ends, "line": {"color": LIMIT, "width": 1.5, "dash": "dash"}}]
        place = {"x": 1, "xref": "paper", "xanchor": "right", "y": limit * scale, "yref": "y2", "yanchor": "bottom"}
        layout["annotations"] = [{**place, "text": "budget", "showarrow": False, "font": {"color": LIMIT}}]
    columns = [f"{name} ({unit})" for name in ("least", "25 %", "median", "75 %", "most")]
    rows = [
        (
            name,
            str(number),
            str(len(s.values)),
            *(f"{q * scale:.4g}" for q in np.percentile(s.values, range(0, 101, 25))),
        )
        for name, key in (("dense", "dense"), ("pruned", "compact"))
        for number, s in enumerate(samples[key], 1)
    ]
    return Figure(
        name="samples",
        title="Measured latency, sample by sample",
        says=f"Both models were timed in turn on {run.report.target}, so that a drift of the board shows in both. "
        f"Each point is one sample, {MOST_POINTS} a round at most; the panels have scales of their own, which may "
        f"leave out the slowest {1 - SHOWN:.0%}.",
        traces=traces,
        layout=layout,
        table=Table(header=("model", "round", "samples", *columns), rows=tuple(rows)),
        half=True,
    )


def _boxes(name: str, rounds: tuple[Samples, ...], colour: str, scale: float, panel: str) -> Trace:
    return {
        "type": "box",
        "name": name,
        "x": [f"{number}" for number, s in enumerate(rounds, 1) for _ in _thin(s.values)],
        "y": [value * scale for s in rounds for value in _thin(s.values)],
        "yaxis": panel,
        "boxpoints": "all",
        "jitter": 0.7,
        "pointpos": 0,
        "line": {"width": 1.5},
        "fillcolor": "rgba(0,0,0,0)",
        "marker": {"color": colour, "size": 5, "opacity": 0.6},
    }


def _thin(values: tuple[float, ...]) -> tuple[float, ...]:
    return values[:: -(-len(values) // MOST_POINTS)]


def _ends(rounds: tuple[Samples, ...]) -> tuple[float, float]:
    """The least sample and the largest that the scale has room for, s."""
    values = [value for s in rounds for value in s.values]
    return min(values), float(np.quantile(values, SHOWN))


def _near(limit: float | None, rounds: tuple[Samples, ...]) -> float | None:
    """The limit, s, where it can be drawn beside the samples."""
    low, high = _ends(rounds)
    return limit if limit is not None and low * (1 - NEAR) <= limit <= high * (1 + NEAR) else None


def _range(rounds: tuple[Samples, ...], scale: float, limit: float | None = None) -> list[float]:
    ends = [*_ends(rounds), *([] if limit is None else [limit])]
    room = 0.08 * (max(ends) - min(ends)) or 0.01 * max(ends)
    return [(min(ends) - room) * scale, (max(ends) + room) * scale]
