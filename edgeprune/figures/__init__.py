"""Pictures of a run for the report: one file each, drawn from records alone.

A member has `ORDER` (its place on the page) and `draw(run) -> Figure | None`, None where the run did
not measure what it shows. Plots are plain Plotly dictionaries; the page adds fonts and colours of
the reader's theme.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from edgeprune.core.records import Graph, Importance, Plan, Profile, Report

DENSE, PRUNED, STAGE, LIMIT = "#8b93a7", "#12a594", "#f2a20d", "#e5484d"
"""Colours that stand out on a light and on a dark page."""

Trace = dict[str, Any]
Layout = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The records of one run; the profile with what the closed loop measured."""

    report: Report
    plan: Plan
    graph: Graph
    profile: Profile
    importance: Importance


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of text; `marked` are the rows to stress."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A plot, what it says in words, and its numbers as a table for those who cannot see it.

    layout: has `height` in pixels. half: may stand beside another figure on a wide screen.
    """

    name: str
    title: str
    says: str
    traces: list[Trace]
    layout: Layout
    table: Table
    half: bool = False


class Member(Protocol):
    """What a figure module offers."""

    ORDER: int

    def draw(self, run: Run) -> Figure | None:
        """The figure, or None where the run has nothing to show."""
        ...


def axis(title: str, **more: Any) -> dict[str, Any]:
    """A Plotly axis."""
    return {"title": {"text": title}, **more}


def names_axis() -> dict[str, Any]:
    """A vertical axis of names, the first one on top."""
    return {"autorange": "reversed", "automargin": True, "type": "category", "ticksuffix": "  "}


def bars_height(count: int, each: int) -> int:
    """Pixels for `count` horizontal bars of `each`, with legend and axis."""
    return 130 + each * count


def time_scale(seconds: Iterable[float]) -> tuple[float, str]:
    """What to multiply seconds by so that the largest reads well, and the unit that gives."""
    largest = max(seconds, default=0.0)
    return (1.0, "s") if largest >= 1 else (1e3, "ms") if largest >= 1e-3 else (1e6, "µs")
