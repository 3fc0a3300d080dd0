"""How the latency is spread over real inputs, where work is decided per input."""

from __future__ import annotations

import numpy as np

from edgeprune.figures import DENSE, LIMIT, PRUNED, Figure, Layout, Run, Table, Trace, axis, time_scale

ORDER = 11
BINS = 40


def draw(run: Run) -> Figure | None:
    """A histogram of the pruned model's latency, an input counted once, beside the dense one's."""
    found = run.report.distribution
    if found is None:
        return None
    ours = np.asarray(found.latencies_s)
    dense = np.median([samples.values[: len(ours)] for samples in run.report.samples["dense"]], axis=0)
    scale, unit = time_scale([*found.latencies_s, *dense.tolist()])
    low, high = float(min(ours.min(), dense.min())) * scale, float(max(ours.max(), dense.max())) * scale
    bins = {"start": low, "end": high, "size": (high - low) / BINS or 1.0}
    traces: list[Trace] = [
        {"type": "histogram", "name": name, "x": (values * scale).tolist(), "xbins": bins, "opacity": 0.7,
         "marker": {"color": colour}}
        for name, values, colour in (("dense", dense, DENSE), ("pruned", ours, PRUNED))
    ]  # fmt: skip
    lines = [("mean", found.mean_s, PRUNED), ("worst", found.worst_s, LIMIT)]
    layout: Layout = {
        "height": 360,
        "barmode": "overlay",
        "xaxis": axis(f"latency ({unit})"),
        "yaxis": axis("inputs"),
        "shapes": [
            {"type": "line", "x0": value * scale, "x1": value * scale, "y0": 0, "y1": 1, "yref": "paper",
             "line": {"color": colour, "width": 1.5, "dash": "dash"}}
            for _, value, colour in lines
        ],
        "annotations": [
            {"x": value * scale, "y": 1, "yref": "paper", "yanchor": "bottom", "text": name, "showarrow": False}
            for name, value, _ in lines
        ],
    }  # fmt: skip
    ran = "; ".join(f"{name} ran for {share:.0%}" for name, share in found.gates.items())
    rows = [
        (name, f"{value * scale:.4g}", "" if share is None else f"{share:.1%}")
        for name, value, share in (
            ("mean", found.mean_s, found.mean_share), ("median", found.median_s, None), ("95 %", found.p95_s, None),
            ("worst", found.worst_s, found.worst_share),
        )
    ]  # fmt: skip
    return Figure(
        name="inputs",
        title="Latency over real inputs",
        says=f"Each of {len(ours)} inputs was timed on its own on {run.report.target}, and the dense model after it. "
        f"{ran + '.' if ran else ''}",
        traces=traces,
        layout=layout,
        table=Table(header=("over inputs", f"latency ({unit})", "of the dense latency"), rows=tuple(rows)),
        half=True,
    )
