"""Records as text for people: milliseconds, mebibytes and aligned columns, nowhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from edgeprune.core.branches import dropped_branches
from edgeprune.core.budget import format_amount, format_bytes, format_energy, format_seconds
from edgeprune.core.closed_loop import taken_round
from edgeprune.core.cost import mac_polynomial, parameter_polynomial
from edgeprune.core.records import (
    Advice,
    Artifact,
    BoardFacts,
    Comparison,
    Cost,
    CrossCheck,
    Distribution,
    Gated,
    Graph,
    Group,
    Inspection,
    Measured,
    Pivoted,
    Plan,
    Profile,
    Quantity,
    Report,
    Sparsity,
    Target,
    TensorInfo,
)

UNKNOWN = "not measured"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Columns as wide as their widest cell; numbers (all but the columns `left`) to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


def interval(value: Quantity | None) -> str:
    """A latency with its interval."""
    if value is None:
        return UNKNOWN
    return f"{format_seconds(value.median)} [{format_seconds(value.low)}, {format_seconds(value.high)}]"


def prunable_macs(graph: Graph) -> float:
    """Share of the multiply-adds that shrink when some group is pruned, in [0, 1]."""
    units, prunable = graph.units, {group.name for group in graph.prunable}
    total = shrinking = 0.0
    for names, coefficient in mac_polynomial(graph).items():
        macs = coefficient
        for name in names:
            macs *= units[name]
        total += macs
        shrinking += macs if prunable & set(names) else 0.0
    return shrinking / total if total else 0.0


def describe_graph(graph: Graph) -> str:
    """Every group under the module that makes it, with what shrinks with it, or why it stays whole."""
    tree: dict[str, Any] = {}
    for group in graph.groups:
        place = tree
        for part in group.name.split("."):
            place = place.setdefault(part, {})
        place[""] = group
    macs, parameters = shares(mac_polynomial(graph), graph), shares(parameter_polynomial(graph), graph)
    rows = [
        (f"{'  ' * depth}{label}", *(_group_cells(group, macs, parameters) if group else ("",) * 5))
        for depth, label, group in _walk(tree)
    ]
    parts = [table(("group", "units", "step", "MACs", "parameters", "note"), rows, left=(0, 5))]
    if graph.unsupported:
        names = sorted({f"{op} at {node}" for op, node in graph.unsupported})
        parts.append("operators without a rule (what touches them is frozen):\n" + "\n".join(f"  {n}" for n in names))
    if graph.branches:
        paths = ", ".join(branch.name for branch in graph.branches)
        parts.append(f"{len(graph.branches)} residual branches can be dropped whole: {paths}")
    count = len(graph.prunable)
    parts.append(
        f"{count} groups can be pruned; {prunable_macs(graph):.1%} of the multiply-adds are in them"
        if count
        else "nothing can be pruned"
    )
    return "\n\n".join(parts)


def _walk(tree: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[int, str, Group | None]]:
    """Depth, label and group of every line; modules with one child and no group of their own share its line."""
    for part, below in tree.items():
        if not part:
            continue
        label = part
        while "" not in below and len(below) == 1:
            ((inner, below),) = below.items()
            label = f"{label}.{inner}"
        yield depth, label, below.get("")
        yield from _walk(below, depth + 1)


def _group_cells(group: Group, macs: Mapping[str, float], parameters: Mapping[str, float]) -> tuple[str, ...]:
    notes = [f"frozen: {group.frozen_because}"] if group.frozen_because else []
    if group.inexact_because and group.inexact_because != group.frozen_because:
        notes.append(f"inexact: {group.inexact_because}")
    if group.least > 1:
        notes.append(f"at least {group.least}")
    step = "" if group.frozen_because else str(group.step)
    sizes = (short_number(macs.get(group.name, 0)), short_number(parameters.get(group.name, 0)))
    return (str(group.units), step, *sizes, "; ".join(notes))


def shares(polynomial: Mapping[tuple[str, ...], float], graph: Graph) -> dict[str, float]:
    """What each group takes part in, so that the sum over groups counts twice what two groups share."""
    units, found = graph.units, dict.fromkeys(graph.units, 0.0)
    for names, coefficient in polynomial.items():
        for name in set(names):
            found[name] += coefficient * prod(units[each] for each in names)
    return found


def short_number(number: float) -> str:
    """Three digits and k, M or G."""
    for suffix in ("", " k", " M"):
        if number < 999.5:
            return f"{number:.3g}{suffix}"
        number /= 1000
    return f"{number:.3g} G"


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


def describe_targets(targets: Sequence[Target]) -> str:
    """The inventory, one board a line."""
    rows = [(t.name, t.board, t.transport, t.description) for t in targets]
    return table(("target", "board", "transport", ""), rows)


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


def describe_artifact(artifact: Artifact) -> str:
    """An exported file in one line."""
    packed = "" if artifact.compressed_bytes is None else f" ({artifact.compressed_bytes:,} compressed)"
    opset = f" opset {artifact.tools['opset']}" if "opset" in artifact.tools else ""
    return f"{artifact.format}{opset}, {artifact.bytes:,} bytes{packed}, sha256 {artifact.sha256[:12]}: {artifact.path}"


def describe_cross_check(found: CrossCheck, most: int = 5) -> str:
    """How far two runtimes are apart, and in which operations most."""
    first, second = (f"{name} {version}" for name, version in found.runtimes)
    lines = [f"{first} against {second}: outputs differ by {found.output_error:.2g} of their largest value"]
    apart = sorted((operation for operation in found.operations if operation.error), key=lambda each: -each.error)
    lines += [f"  {operation.error:.2g}  {operation.op}  {operation.name[-60:]}" for operation in apart[:most]]
    equal = len(found.operations) - len(apart)
    return "\n".join(
        [*lines, f"  plain kernels of {equal} of {len(found.operations)} operations give the same numbers"]
    )


def describe_facts(facts: BoardFacts) -> str:
    """A board's facts, one a line, and what it lacks."""
    lines = [
        ("architecture", facts.arch),
        ("system", facts.system),
        ("model", facts.model),
        ("processor", facts.cpu),
        ("cores", None if facts.cpus is None else str(facts.cpus)),
        ("memory", None if facts.ram_bytes is None else format_bytes(facts.ram_bytes)),
        ("memory free", None if facts.ram_free_bytes is None else format_bytes(facts.ram_free_bytes)),
        ("disk free", None if facts.disk_free_bytes is None else format_bytes(facts.disk_free_bytes)),
        ("governor", facts.governor),
        ("frequency", None if facts.freq_hz is None else f"{facts.freq_hz / 1e6:.0f} MHz"),
        ("temperature", None if facts.temp_c is None else f"{facts.temp_c:.1f} C"),
        ("throttled", "no" if facts.throttled == "" else facts.throttled),
        ("python", facts.python),
        ("runtimes", ", ".join(f"{name} {version}" for name, version in facts.runtimes.items())),
    ]
    text = "\n".join(f"{name:<14}{value or 'not known'}" for name, value in lines)
    missing = "\n".join(f"missing: {what}" for what in facts.missing)
    return text + ("\n" + missing if missing else "\nready")


def _amount(unit: str, value: float) -> str:
    """A check's value in its own unit."""
    known = {"s": format_seconds, "bytes": format_bytes, "J": format_energy}
    return known[unit](value) if unit in known else f"{value:.3g}"


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


def describe_measured(measured: Measured) -> str:
    """Latencies of one or two files, and the comparison."""
    rows = [
        (
            timing.name,
            interval(timing.latency_s),
            " to ".join(map(format_seconds, timing.quartiles_s)),
            format_seconds(timing.p95_s),
            UNKNOWN if timing.activation_bytes is None else format_bytes(timing.activation_bytes),
            format_bytes(timing.size_bytes),
            UNKNOWN if timing.energy_j is None else format_energy(timing.energy_j.median),
        )
        for timing in measured.timings
    ]
    now = measured.conditions
    runtime = f"{now.runtime} {now.runtime_version}, {now.threads} thread{'s' if now.threads > 1 else ''}"
    where = f"{measured.target}: {now.cpu}, {runtime}"
    head = ("file", "median latency", "half of the runs", "95 % below", "peak memory", "size", "energy")
    return "\n".join(filter(None, [table(head, rows), "", where, measured.verdict, *measured.notes]))


def describe_advice(advice: Advice, most: int = 20) -> str:
    """The costliest kernels with their staircase, other thread counts, and the conclusion."""
    total = sum(kernel.time_s for kernel in advice.kernels) + advice.outside_s
    steps = [less for less, _ in advice.kernels[0].steps] if advice.kernels else []
    rows = [
        (
            kernel.name,
            kernel.op,
            format_seconds(kernel.time_s),
            f"{kernel.time_s / total:.0%}",
            kernel.limited_by,
            "yes" if kernel.prunable else "no",
            *(f"{share:.2f}" if kernel.prunable else "" for _, share in kernel.steps),
        )
        for kernel in advice.kernels[:most]
    ]
    head = ("layer", "kernel", "time", "share", "limit", "prunable", *(f"-{less}" for less in steps))
    parts = [table(head, rows)] if rows else []
    if len(advice.kernels) > most:
        rest = sum(kernel.time_s for kernel in advice.kernels[most:])
        parts.append(f"{len(advice.kernels) - most} more kernels: {format_seconds(rest)}")
    parts.append(f"outside kernels: {format_seconds(advice.outside_s)}")
    if steps:
        parts.append("-N: share of a kernel's time that is left with N units taken off every group")
    parts += [f"{count} thread{'s' if count > 1 else ''}: {interval(time)}" for count, time in advice.threads]
    parts += [
        f"{dtype}: {share.median:.2f} of float32 [{share.low:.2f}, {share.high:.2f}] "
        "(measured; calibrated on random inputs: accuracy not evaluated)"
        for dtype, share in advice.dtypes
    ]
    parts += advice.notes
    parts += [f"dense model: {interval(advice.latency_s)} on {advice.target}", "", advice.verdict]
    return "\n".join(parts)


def describe_inspection(found: Inspection, most: int = 200) -> str:
    """Operations one by one and by kind, tensors, weights, and what was measured."""
    rows = [
        (
            operation.name[-48:],
            operation.op,
            "?" if operation.shape is None else "x".join(map(str, operation.shape)),
            operation.dtype,
            "?" if operation.macs is None else f"{operation.macs:,}",
            format_bytes(operation.weight_bytes) if operation.weight_bytes else "",
        )
        for operation in found.operations[:most]
    ]
    parts = [table(("operation", "kind", "output", "type", "MACs", "weights"), rows)]
    if len(found.operations) > most:
        parts.append(f"{len(found.operations) - most} more operations")
    kinds: dict[str, list[int | None]] = {}
    for operation in found.operations:
        kinds.setdefault(operation.op, []).append(operation.macs)
    totals = [
        (kind, str(len(macs)), "?" if None in macs else f"{sum(filter(None, macs)):,}")
        for kind, macs in sorted(kinds.items(), key=lambda item: (-sum(filter(None, item[1])), item[0]))
    ]
    parts.append(table(("kind", "operations", "MACs"), totals))
    lines = [
        *(_tensor_line("input", info) for info in found.inputs),
        *(_tensor_line("output", info) for info in found.outputs),
        *(f"weights: {count:,} of {dtype}, {format_bytes(size)}" for dtype, (count, size) in found.weights.items()),
        *(f"metadata: {key} = {value}" for key, value in found.metadata.items()),
        f"{found.format}, {len(found.operations)} operations, "
        f"{UNKNOWN if found.macs is None else f'{found.macs:,}'} MACs, {format_bytes(found.bytes)}, "
        f"{UNKNOWN if found.compressed_bytes is None else format_bytes(found.compressed_bytes)} compressed, "
        f"sha256 {found.sha256}",
    ]
    return "\n\n".join([*parts, "\n".join(lines), _measured_lines(found.measured)])


def _tensor_line(kind: str, info: TensorInfo) -> str:
    shape = "x".join("?" if size < 0 else str(size) for size in info.shape)
    quantised = "" if info.scale is None else f", {info.scale:g} x (stored - {info.zero_point})"
    return f"{kind} {info.name}: {info.dtype} {shape}{' ' + info.layout if info.layout else ''}{quantised}"


def _measured_lines(measured: Mapping[str, Any]) -> str:
    """What a manifest or report tells of the model: costs against the dense model's, conditions, accuracy."""
    if not measured:
        return UNKNOWN
    rows = []
    for name in ("latency_s", "peak_memory_bytes", "artifact_bytes", "compressed_bytes", "energy_j"):
        cells = []
        for which in ("dense", "compact"):
            value = measured.get(which, {}).get(name)
            if value is None:
                cells.append(UNKNOWN)
            elif isinstance(value, dict):
                cells.append(" ".join(format_amount(name, value[key]) for key in ("median", "low", "high")))
            else:
                cells.append(format_amount(name, value))
        rows.append((name.rpartition("_")[0].replace("_", " "), *cells))
    now, accuracy = measured.get("conditions", {}), measured.get("accuracy", {})
    shown = [f"{key.replace('_', ' ')} {value:.2%}" for key, value in accuracy.items() if isinstance(value, float)]
    where = f"measured on {measured.get('target')}: {now.get('cpu') or now.get('arch')}, {now.get('runtime')} "
    where += f"{now.get('runtime_version')}, threads: {now.get('threads')}"
    lines = [table(("median, low, high", "dense", "this model"), rows), where]
    if shown:
        lines.append(f"accuracy: {', '.join(shown)}")
    return "\n".join(lines)


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
            share(one.accuracy),
            "" if one.artifact_bytes is None else format_bytes(one.artifact_bytes),
            f"{one.seconds:.0f} s" if one.seconds else "",
            one.note if one.met or not one.note else f"NOT MET: {one.note}",
        ))  # fmt: skip
    header = ("recipe", "measured latency", "of dense", "before training", "accuracy", "size", "time spent", "note")
    return header, tuple(rows)


def describe_comparison(comparison: Comparison) -> str:
    """Every recipe, and the verdict."""
    header, rows = comparison_rows(comparison)
    return "\n\n".join([table(header, rows, left=(0, 7)), *comparison.verdict])
