"""Boards as text: the inventory, facts, and what was measured there."""

from __future__ import annotations

from collections.abc import Sequence

from edgeprune.core.budget import format_bytes, format_energy, format_seconds
from edgeprune.core.describe.text import UNKNOWN, interval, table
from edgeprune.core.records import Advice, BoardFacts, Measured, Target


def describe_targets(targets: Sequence[Target]) -> str:
    """The inventory, one board a line."""
    rows = [(t.name, t.board, t.transport, t.description) for t in targets]
    return table(("target", "board", "transport", ""), rows)


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
