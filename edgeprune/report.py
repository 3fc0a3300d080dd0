"""One self-contained HTML page from the records of a run: what was reached, and the evidence for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from edgeprune.core.budget import format_amount, format_bytes, format_energy, format_seconds
from edgeprune.core.describe import comparison_rows, interval
from edgeprune.core.family import list_members, load_member
from edgeprune.core.records import (
    Advice,
    Bracket,
    Budget,
    Check,
    Comparison,
    Cost,
    Graph,
    Group,
    Importance,
    Outcome,
    Plan,
    Profile,
    Report,
    most_accurate,
)
from edgeprune.core.store import to_builtins, write_atomic
from edgeprune.figures import DENSE, PRUNED, STAGE, Figure, Run, Table, axis, bars_height, names_axis, time_scale

UNKNOWN = "–"
AMOUNTS = {"s": "latency_s", "bytes": "artifact_bytes", "J": "energy_j"}
"""Unit of a check -> a budget field of that unit, which is how `format_amount` is told."""


def write_report(
    path: Path,
    *,
    report: Report,
    plan: Plan,
    graph: Graph,
    profile: Profile,
    importance: Importance,
    bracket: Bracket | None = None,
) -> None:
    """Write the page, whole or not at all. raises: UsageError when the folder cannot be written."""
    page = render_report(report=report, plan=plan, graph=graph, profile=profile, importance=importance, bracket=bracket)
    write_atomic(path, page.encode())


def render_report(
    *,
    report: Report,
    plan: Plan,
    graph: Graph,
    profile: Profile,
    importance: Importance,
    bracket: Bracket | None = None,
) -> str:
    """The page: needs no network, works in light and dark and on a narrow screen.

    report, plan, graph, profile, importance: of one run; the profile with the closed loop's measurements.
    bracket: of the tournament that the plan came from, where there was one.
    """
    run = Run(report=report, plan=plan, graph=graph, profile=profile, importance=importance)
    return _render(
        "report",
        headline(report),
        report=report,
        plan=plan,
        graph=graph,
        failed=sum(not check.passed for check in report.checks),
        figures=draw_figures(run),
        costs=tabulate_costs(report),
        checks=tabulate_checks(report.checks),
        rounds=tabulate_rounds(plan, report.budget),
        tournament=tabulate_bracket(bracket),
        solvers=tabulate_solvers(plan, graph),
        frozen=tabulate_frozen(graph, importance.by_magnitude),
        conditions=_facts(to_builtins(report.conditions)),
        provenance=_facts({"artifact_sha256": report.artifact_sha256, **report.provenance}),
    )


def write_comparison(path: Path, comparison: Comparison) -> None:
    """The page of a comparison. raises: UsageError when it cannot be written."""
    first = comparison.outcomes[0]
    header, rows = comparison_rows(comparison)
    finished = [one for one in comparison.outcomes if one.latency_s is not None]
    page = _render(
        "compare",
        f"{len(comparison.outcomes)} ways to be fast on {first.target}",
        comparison=comparison,
        conditions=comparison.conditions,
        outcomes=Table(header=header, rows=rows, marked=_best_places(comparison)),
        figure=draw_comparison(comparison),
        pages=[
            (name, f"{Path(directory).relative_to(first.directory)}/report.html")
            for one in finished
            for name, directory in [
                (one.recipe, one.directory),
                *((f"{one.recipe}, seed {again.rpartition('-')[2]}", again) for again in one.repeats),
            ]
        ],
        facts_of_run=_facts(to_builtins(comparison.conditions)),
    )
    write_atomic(path, page.encode())


def _best_places(comparison: Comparison) -> frozenset[int]:
    """Rows of the most accurate outcome at each latency; the first row is the dense model's."""
    best = [most_accurate(comparison.outcomes, asked) for asked in {one.asked for one in comparison.outcomes}]
    return frozenset(place for place, one in enumerate(comparison.outcomes, 1) if one in best)


def draw_comparison(comparison: Comparison) -> Figure:
    """Accuracy over the measured latency: a line for each recipe, through the latencies that it was carried out to."""
    recipes: dict[str, list[tuple[float, Outcome]]] = {}
    for one in comparison.outcomes:
        if one.latency_share is not None and one.accuracy is not None:
            recipes.setdefault(one.way, []).append((one.latency_share, one))
    traces: list[dict[str, Any]] = []
    for name, found in recipes.items():
        points = sorted(found, key=lambda point: point[0])
        traces.append({
            "type": "scatter", "mode": "lines+markers", "name": name,
            "x": [share for share, _ in points], "y": [100 * (one.accuracy or 0.0) for _, one in points],
            "text": [one.recipe if one.met else f"{one.recipe}: limits not met" for _, one in points],
            "hovertemplate": "%{text}: %{y:.2f} % at %{x:.3f}<extra></extra>", "line": {"width": 1},
            **_seed_bars([one for _, one in points]),
            "marker": {"size": 11, "symbol": ["circle" if one.met else "x" for _, one in points]},
        })  # fmt: skip
    before = [
        (share, one.before_recovery, one.recipe)
        for found in recipes.values()
        for share, one in found
        if one.before_recovery is not None and one.before_recovery != one.accuracy
    ]
    traces.append({
        "type": "scatter", "mode": "markers", "name": "before training", "x": [share for share, *_ in before],
        "y": [100 * accuracy for _, accuracy, _ in before], "text": [name for *_, name in before],
        "hovertemplate": "%{text} before training: %{y:.2f} %<extra></extra>",
        "marker": {"color": STAGE, "size": 7, "symbol": "circle-open"},
    })  # fmt: skip
    traces.append({
        "type": "scatter", "mode": "markers", "name": "dense", "x": [1.0], "y": [100 * comparison.dense_accuracy],
        "marker": {"color": DENSE, "size": 12},
    })  # fmt: skip
    header, rows = comparison_rows(comparison)
    return Figure(
        name="accuracy",
        title="Accuracy against latency",
        says="Further left is faster, further up more accurate. A recipe below and to the right of another is no use. "
        "A cross stands for limits that were not met.",
        traces=traces,
        layout={
            "height": 480, "xaxis": axis("latency on the board, of the dense model's"), "yaxis": axis("top-1 (%)"),
        },
        table=Table(header=header, rows=rows),
    )  # fmt: skip


def _seed_bars(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """From the worst to the best training of each, where there were several."""
    if not any(len(one.accuracies) > 1 for one in outcomes):
        return {}
    ranges = [(one.accuracy or 0.0, one.accuracies or (one.accuracy or 0.0,)) for one in outcomes]
    return {"error_y": {
        "type": "data", "symmetric": False, "array": [100 * (max(found) - mean) for mean, found in ranges],
        "arrayminus": [100 * (mean - min(found)) for mean, found in ranges], "thickness": 1, "width": 4,
    }}  # fmt: skip


def _render(name: str, title: str, **values: Any) -> str:
    """A page of the templates: whole in itself."""
    environment = Environment(
        loader=PackageLoader("edgeprune", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(f"{name}.html.j2").render(
        title=title,
        colours={"dense": DENSE, "pruned": PRUNED},
        plotly=Markup(get_plotlyjs()),  # noqa: S704  the library's own text, not data
        **values,
    )


def write_advice(path: Path, advice: Advice, most: int = 25) -> None:
    """A page with the costliest kernels and their staircases. raises: UsageError when it cannot be written."""
    kernels = advice.kernels[:most]
    scale, unit = time_scale(kernel.time_s for kernel in kernels)
    names = [kernel.name for kernel in kernels]
    bars = [
        {
            "type": "bar", "orientation": "h",
            "name": (f"limited by {limit}" if limit else "whole") + ("" if prunable else ", not prunable"),
            "y": [k.name for k in mine], "x": [k.time_s * scale for k in mine],
            "marker": {"color": colour, "opacity": 1.0 if prunable else 0.4},
        }
        for limit, colour in (("compute", PRUNED), ("memory", STAGE), ("start-up", DENSE), ("", DENSE))
        for prunable in (True, False)
        if (mine := [k for k in kernels if k.limited_by == limit and k.prunable == prunable])
    ]  # fmt: skip
    stairs = [
        {
            "type": "scatter", "mode": "lines+markers", "name": k.name, "line": {"shape": "linear"},
            "x": [0, *(less for less, _ in k.steps)], "y": [1, *(share for _, share in k.steps)],
        }
        for k in [k for k in kernels if k.prunable and k.steps][:6]
    ]  # fmt: skip
    bar_layout = {
        "height": bars_height(len(kernels), 24), "barmode": "stack", "xaxis": axis(f"time ({unit})"),
        "yaxis": {**names_axis(), "categoryorder": "array", "categoryarray": names},
    }  # fmt: skip
    stair_layout = {
        "height": 420, "xaxis": axis("units taken off every group"),
        "yaxis": axis("share of the kernel's time left", rangemode="tozero"),
    }  # fmt: skip
    page = _render(
        "advice",
        f"Is pruning worth it on {advice.target}?",
        advice=advice,
        latency=interval(advice.latency_s),
        outside=format_seconds(advice.outside_s),
        seconds=format_seconds,
        threads=[(count, interval(time)) for count, time in advice.threads],
        plots=[("kernels", bars, bar_layout), *([("stairs", stairs, stair_layout)] if stairs else [])],
    )
    write_atomic(path, page.encode())


def headline(report: Report) -> str:
    """The result in one sentence."""
    dense, compact, accuracy = report.dense.latency_s, report.compact.latency_s, report.accuracy
    result = f"Pruned for {report.target}"
    if dense is not None and compact is not None:
        ratio = dense.median / compact.median
        change = f"{ratio:.1f}× faster" if ratio >= 1 else f"{1 / ratio:.1f}× slower"
        times = f"{format_seconds(dense.median)} → {format_seconds(compact.median)}"
        result = f"{change} on {report.target}: {times} measured"
    # Not the board's: that is of fewer examples than the dense model's.
    shares = (accuracy.after_recovery, accuracy.before_recovery)
    after = next((share for share in shares if share is not None), None)
    if accuracy.dense is not None and after is not None:
        result += f", accuracy {accuracy.dense:.1%} → {after:.1%}"
    return result


def draw_figures(run: Run) -> list[Figure]:
    """Every figure of the family that this run can fill, in the order of the page."""
    members = sorted((load_member("figures", name) for name in list_members("figures")), key=lambda m: int(m.ORDER))
    drawn = [member.draw(run) for member in members]
    return [figure for figure in drawn if figure is not None]


def tabulate_costs(report: Report) -> Table:
    """Dense against pruned: every quantity that was measured or counted."""
    costs = (report.dense, report.compact, report.predicted)
    rows: list[tuple[str, ...]] = []

    def add(name: str, pick: Callable[[Cost], Any], show: Callable[[Any], str], size: Callable[[Any], float]) -> None:
        values = [pick(cost) for cost in costs]
        if values[0] is None and values[1] is None:
            return
        known = values[0] is not None and values[1] is not None and size(values[0]) > 0
        ratio = f"{size(values[1]) / size(values[0]):.1%}" if known else UNKNOWN
        rows.append((name, *(UNKNOWN if value is None else show(value) for value in values), ratio))

    spread = report.distribution
    latency = "latency, median" if spread is None else "latency, mean over inputs"
    add(latency, lambda cost: cost.latency_s, interval, lambda value: value.median)
    add("energy", lambda cost: cost.energy_j, lambda value: format_energy(value.median), lambda value: value.median)
    add("peak activation memory", lambda cost: cost.peak_memory_bytes, format_bytes, float)
    add("artifact size", lambda cost: cost.artifact_bytes, format_bytes, float)
    add("artifact size, compressed", lambda cost: cost.compressed_bytes, format_bytes, float)
    add("parameters", lambda cost: cost.parameters, _count, float)
    add("multiply-accumulates", lambda cost: cost.macs, _count, float)
    if report.sparsity is not None:
        zero = _share(report.sparsity.share)
        rows.append((f"weights at zero, {report.sparsity.pattern}", UNKNOWN, zero, UNKNOWN, UNKNOWN))
    if spread is not None:
        worst = format_seconds(spread.worst_s)
        rows.append(("latency, worst input", UNKNOWN, worst, UNKNOWN, f"{spread.worst_share:.1%}"))
    accuracy = report.accuracy
    examples = f", {report.numeric_error.examples} examples" if report.numeric_error is not None else ""
    for name, dense, share in (
        ("accuracy, not retrained", accuracy.dense, accuracy.before_recovery),
        ("accuracy, recovered", accuracy.dense, accuracy.after_recovery),
        (f"accuracy on the board{examples}", None, accuracy.on_board),
    ):
        if share is not None:
            rows.append((name, _share(dense), _share(share), UNKNOWN, UNKNOWN))
    return Table(header=("", "dense", "pruned", "predicted", "pruned / dense"), rows=tuple(rows))


def tabulate_checks(checks: Sequence[Check]) -> Table:
    """What was asked, predicted and measured."""
    rows = tuple(
        (
            "passed" if check.passed else "FAILED",
            check.name,
            *(_amount(value, check.unit) for value in (check.limit, check.predicted, check.measured)),
            check.note,
        )
        for check in checks
    )
    return Table(header=("", "check", "limit", "predicted", "measured", "note"), rows=rows)


def tabulate_rounds(plan: Plan, budget: Budget) -> Table:
    """The closed loop: what was asked of the tables, and what the board said. The taken round is marked."""
    rows = tuple(
        (
            str(number),
            format_seconds(turn.asked_s) if turn.asked_s is not None else "–",
            format_seconds(turn.predicted_s),
            interval(turn.measured),
            f"{turn.measured.median / budget.latency_s:.1%}" if budget.latency_s else UNKNOWN,
        )
        for number, turn in enumerate(plan.rounds, 1)
    )
    taken = [number for number, turn in enumerate(plan.rounds) if turn.widths == plan.widths]
    header = ("round", "asked", "predicted", "measured", "of the budget")
    return Table(header=header, rows=rows, marked=frozenset(taken[-1:]))


def tabulate_bracket(bracket: Bracket | None) -> Table:
    """Accuracy of each contender after each rung, and why some could not take part. The winner is marked."""
    if bracket is None or not bracket.rungs:
        return Table(header=(), rows=())
    reached = {heat.contender: heat.accuracy for heat in bracket.rungs[0]}
    later = [{heat.contender: heat.accuracy for heat in rung} for rung in bracket.rungs[1:]]
    # Who got furthest first; of those the most accurate.
    names = sorted(reached, key=lambda name: [-rung.get(name, -2.0) for rung in [*reversed(later), reached]])
    rows = [
        (
            name,
            format_seconds(bracket.latency_s[name]) if name in bracket.latency_s else UNKNOWN,
            *(_heat_share(rung.get(name)) for rung in (reached, *later)),
            "",
        )
        for name in names
    ]
    rows += [(name, UNKNOWN, *[UNKNOWN] * len(bracket.rungs), why) for name, why in bracket.left_out.items()]
    steps = (f"after {rung[0].steps} steps" for rung in bracket.rungs)
    return Table(
        header=("plan", "measured latency", *steps, "note"),
        rows=tuple(rows),
        marked=frozenset([names.index(bracket.winner)]),
    )


def _heat_share(accuracy: float | None) -> str:
    if accuracy is None:
        return UNKNOWN
    return "diverged" if accuracy < 0 else f"{accuracy:.2%}"


def tabulate_solvers(plan: Plan, graph: Graph) -> Table:
    """What every search would have reached under the same budget. The chosen one is marked."""
    units = sum(group.units for group in graph.prunable)
    rows = tuple(
        (
            result.solver,
            result.status,
            f"{result.loss:.4g}",
            format_seconds(result.cost.latency_s.median) if result.cost.latency_s else UNKNOWN,
            f"{sum(result.widths.get(group.name, group.units) for group in graph.prunable) / max(units, 1):.0%}",
            UNKNOWN if result.gap is None else f"{result.gap:.2%}",
            format_seconds(result.seconds),
        )
        for result in plan.alternatives
    )
    chosen = [number for number, result in enumerate(plan.alternatives) if result.solver == plan.solver]
    header = ("solver", "status", "predicted loss", "predicted latency", "units kept", "proven gap", "time")
    return Table(header=header, rows=rows, marked=frozenset(chosen))


def tabulate_frozen(graph: Graph, by_magnitude: Collection[str] = ()) -> Table:
    """Groups that keep every unit, and why; those whose pruning is not exact, or goes by magnitude."""
    reasons = ((group, _reservation(group, by_magnitude)) for group in graph.groups)
    rows = tuple((group.name, str(group.units), reason) for group, reason in reasons if reason)
    return Table(header=("group", "units", "reason"), rows=rows)


def _reservation(group: Group, by_magnitude: Collection[str]) -> str:
    if group.frozen_because is not None:
        return group.frozen_because
    notes = ["by magnitude, since the criterion cannot score it"] if group.name in by_magnitude else []
    notes += [f"not exact: {group.inexact_because}"] if group.inexact_because is not None else []
    return f"pruned, but {'; '.join(notes)}" if notes else ""


def _count(value: float) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:g}"


def _share(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.2%}"


def _amount(value: float | None, unit: str) -> str:
    if value is None:
        return UNKNOWN
    if unit in AMOUNTS:
        return format_amount(AMOUNTS[unit], value)
    return f"{value:.1%}" if unit == "share" else f"{value:.2g}"


def _facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and text of every value that is known."""
    known = ((name, value) for name, value in values.items() if value is not None)
    return [(name, f"{value:g}" if isinstance(value, float) else str(value)) for name, value in known]
