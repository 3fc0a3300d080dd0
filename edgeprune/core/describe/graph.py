"""A traced model as text: groups under the modules that make them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from edgeprune.core.cost import mac_polynomial, parameter_polynomial
from edgeprune.core.describe.text import short_number, table
from edgeprune.core.records import Graph, Group


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
