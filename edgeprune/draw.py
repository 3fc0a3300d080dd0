"""A traced model as one HTML page: its layers in order, what flows between them, and what can be cut together.

The drawing is that of version histories: a row for each operation, a lane for each tensor that is still wanted. A
residual stream stays in its lane beside the branch that will be added to it. Nothing has to be laid out, so the page
needs no library and no network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from math import prod
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from edgeprune.core.cost import evaluate, mac_polynomial, mac_terms, parameter_polynomial
from edgeprune.core.describe import prunable_macs, shares, short_number
from edgeprune.core.records import Graph, Group, Node
from edgeprune.core.store import write_atomic

GOLDEN_ANGLE = 137.508
"""Degrees between the hues of two groups, so that no two that follow each other look alike."""
FROZEN = "var(--frozen)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Of a row's drawing: from a lane at the top (or the row's own dot) to a lane at the bottom (or the dot)."""

    top: int | None
    bottom: int | None
    colour: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An operation, or the heading of a module (`folded`: its lines where the module is folded up).

    lane, colour: of the dot. within: headings that it stands under. depth: how far it is indented.
    """

    label: str
    depth: int
    within: tuple[int, ...]
    lines: tuple[Line, ...]
    lane: int = 0
    colour: str = FROZEN
    heading: int | None = None
    folded: tuple[Line, ...] = ()
    node: Node | None = None
    groups: tuple[Group, ...] = ()
    shape: str = ""
    parameters: str = ""
    macs: str = ""


def write_drawing(path: Path, graph: Graph, title: str) -> None:
    """Write the page, whole or not at all. raises: UsageError when the folder cannot be written."""
    write_atomic(path, render_drawing(graph, title).encode())


def render_drawing(graph: Graph, title: str) -> str:
    """The page: layers in order with their groups, units, parameters and multiply-adds; frozen ones with the reason.

    title: what the model is called.
    """
    text = files("edgeprune").joinpath("templates", "graph.html.j2").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    colours, drawn = group_colours(graph), lanes(graph)
    rows = list(_rows(graph, drawn))
    macs, parameters = shares(mac_polynomial(graph), graph), shares(parameter_polynomial(graph), graph)
    count = sum(prod(each.shape) for each in graph.parameters if each.trainable)
    total = sum(evaluate(polynomial, {}, graph.units) for polynomial in mac_terms(graph).values())
    return environment.from_string(text).render(
        title=title,
        rows=rows,
        groups=[
            (group, short_number(macs.get(group.name, 0)), short_number(parameters.get(group.name, 0)))
            for group in graph.groups
        ],
        colours=colours,
        width=max((lane for row in drawn for lane in row.used), default=0) + 1,
        prunable=len(graph.prunable),
        covered=f"{prunable_macs(graph):.1%}",
        branches=[branch.name for branch in graph.branches],
        unsupported=sorted({f"{op} at {node}" for op, node in graph.unsupported}),
        totals=f"{short_number(count)} parameters, {short_number(total)} multiply-adds",
    )


def group_colours(graph: Graph) -> dict[str, str]:
    """A CSS colour for each group; frozen ones are grey."""
    prunable = [group.name for group in graph.prunable]
    hues = {name: f"hsl({number * GOLDEN_ANGLE % 360:.0f} 60% 41%)" for number, name in enumerate(prunable)}
    return {group.name: hues.get(group.name, FROZEN) for group in graph.groups}


# --- lanes ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """What is in the lanes above a node and below it, names of nodes; lane: its own."""

    above: tuple[str | None, ...]
    below: tuple[str | None, ...]
    lane: int
    inputs: tuple[str, ...]

    @property
    def used(self) -> list[int]:
        """Lanes that are not empty."""
        both = (self.above, self.below)
        return [self.lane, *(lane for side in both for lane, value in enumerate(side) if value is not None)]


def lanes(graph: Graph) -> list[Lanes]:
    """One for each node: a tensor stays in its node's lane until its last reader, which takes that lane over."""
    left = {node.name: 0 for node in graph.nodes}
    for name in (*graph.outputs, *(source for node in graph.nodes for source in set(node.inputs))):
        left[name] += 1
    held: list[str | None] = []
    found = []
    for node in graph.nodes:
        above = tuple(held)
        inputs = tuple(dict.fromkeys(name for name in node.inputs if name in held))
        for name in inputs:
            left[name] -= 1
            if not left[name]:
                held[held.index(name)] = None
        ended = [above.index(name) for name in inputs if not left[name]]
        free = ended or [lane for lane, value in enumerate(held) if value is None] or [len(held)]
        lane = min(free)
        held += [None] * (lane + 1 - len(held))
        held[lane] = node.name if left[node.name] else None
        while held and held[-1] is None:
            held.pop()
        found.append(Lanes(above=above, below=tuple(held), lane=lane, inputs=inputs))
    return found


# --- rows ----------------------------------------------------------------------------------------


def _rows(graph: Graph, drawn: Sequence[Lanes]) -> Iterator[Row]:
    paths = _paths(graph.nodes)
    numbers = iter(range(len(graph.nodes) * 8))
    details = _Details(graph)

    def walk(first: int, last: int, level: int, depth: int, within: tuple[int, ...]) -> Iterator[Row]:
        start = first
        while start < last:
            end = start + 1
            while end < last and _shared(paths[start], paths[end], level + 1):
                end += 1
            if end - start == 1 or len(paths[start]) <= level:
                yield details.row(start, paths[start][level:], drawn[start], depth, within)
                start += 1
                continue
            below = level + 1
            while all(_shared(paths[start], path, below + 1) for path in paths[start:end]):
                below += 1
            number = next(numbers)
            yield details.heading(start, end, paths[start][level:below], drawn, depth, (*within,), number)
            yield from walk(start, end, below, depth + 1, (*within, number))
            start = end

    return walk(0, len(graph.nodes), 0, 0, ())


def _paths(nodes: Sequence[Node]) -> list[list[str]]:
    """The module path of each node; what belongs to no module stands with the layer before it."""
    found: list[list[str]] = []
    before: list[str] = []
    for node in nodes:
        if node.path:
            before = node.path.split(".")
            found.append(before)
        else:
            found.append([] if node.op == "input" else before[:-1])
    return found


def _shared(one: Sequence[str], other: Sequence[str], length: int) -> bool:
    return len(one) >= length and len(other) >= length and list(one[:length]) == list(other[:length])


class _Details:
    """What stands in a row beside its drawing."""

    def __init__(self, graph: Graph) -> None:
        self.colours, self.groups = group_colours(graph), {group.name: group for group in graph.groups}
        self.macs = {name: evaluate(terms, {}, graph.units) for name, terms in mac_terms(graph).items()}
        self.parameters = {each.name: each for each in graph.parameters}
        self.nodes = {node.name: node for node in graph.nodes}
        self.order = list(graph.nodes)

    def row(self, place: int, path: Sequence[str], drawn: Lanes, depth: int, within: tuple[int, ...]) -> Row:
        node = self.order[place]
        lines = [self._line(name, top=lane, bottom=lane) for lane, name in _passing(drawn.above, drawn.below)]
        lines += [self._line(name, top=drawn.above.index(name), bottom=None) for name in drawn.inputs]
        if node.name in drawn.below:
            lines.append(self._line(node.name, top=None, bottom=drawn.lane))
        records = [self.parameters[name] for name in node.parameters]
        cut = [*node.out_extents, *(extent for record in records for extent in record.extents)]
        names = dict.fromkeys(name for extent in cut for name, _ in extent.groups)
        size = sum(prod(record.shape) for record in records if record.trainable)
        return Row(
            label=".".join(path) or node.name, depth=depth, within=within, lines=tuple(lines), lane=drawn.lane,
            colour=self._line(node.name, top=None, bottom=None).colour, node=node,
            groups=tuple(self.groups[name] for name in self._prunable_first(names)),
            shape=" × ".join(map(str, node.out_shape)),
            parameters=short_number(size) if size else "",
            macs=short_number(self.macs[node.name]) if self.macs.get(node.name) else "",
        )  # fmt: skip

    def heading(
        self, start: int, end: int, path: Sequence[str], drawn: Sequence[Lanes], depth: int, within: tuple[int, ...],
        number: int,
    ) -> Row:  # fmt: skip
        above, below = drawn[start].above, drawn[end - 1].below
        passing = [self._line(name, top=lane, bottom=lane) for lane, name in enumerate(above) if name is not None]
        inside = {node.name for node in self.order[start:end]}
        folded = [self._line(name, top=lane, bottom=lane) for lane, name in _passing(above, below)]
        read = {name for each in drawn[start:end] for name in each.inputs} - inside
        folded += [self._line(name, top=above.index(name), bottom=None) for name in above if name in read]
        made = [(lane, name) for lane, name in enumerate(below) if name in inside and name is not None]
        folded += [self._line(name, top=None, bottom=lane) for lane, name in made]
        records = {name for node in self.order[start:end] for name in node.parameters}
        size = sum(prod(self.parameters[name].shape) for name in records if self.parameters[name].trainable)
        macs = sum(self.macs.get(node.name, 0) for node in self.order[start:end])
        return Row(
            label=".".join(path), depth=depth, within=within, lines=tuple(passing), folded=tuple(folded),
            lane=made[0][0] if made else drawn[end - 1].lane, heading=number,
            parameters=short_number(size) if size else "", macs=short_number(macs) if macs else "",
        )  # fmt: skip

    def _prunable_first(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda name: self.groups[name].frozen_because is not None)

    def _line(self, name: str, *, top: int | None, bottom: int | None) -> Line:
        """In the colour of the channels that flow in it."""
        groups = self._prunable_first(group for extent in self.nodes[name].out_extents for group, _ in extent.groups)
        return Line(top=top, bottom=bottom, colour=self.colours[groups[0]] if groups else FROZEN)


def _passing(above: Sequence[str | None], below: Sequence[str | None]) -> list[tuple[int, str]]:
    return [(i, a) for i, a in enumerate(above) if a is not None and i < len(below) and below[i] == a]
