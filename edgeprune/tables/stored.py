"""A profile as it lies on disk: JSON lines, a heading and then one line per measurement as it came in.

Tables are derived from the measurements on reading, so a killed run goes on where it stopped and a
profile can be added to.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from edgeprune.core.errors import RecordError
from edgeprune.core.records import FLOAT32, Conditions, Graph, Kernel, Measurement, Precision, Profile, Table
from edgeprune.core.store import read_lines, sha256_file
from edgeprune.tables.combine import combine


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileHeading:
    """First line of a profile: what was measured on what.

    job: the folder on the board. known: tables of the same kernels under other conditions, to start from.
    black_box: kernels are what the artifact's structure says; only whole models are timed.
    """

    target: str
    conditions: Conditions
    graph_sha256: str
    artifact_sha256: str
    dense_bytes: int
    kernels: tuple[Kernel, ...]
    job: str
    known: tuple[Table, ...] = ()
    black_box: bool = False
    precision: Precision = FLOAT32


def read_profile(path: Path, graph: Graph | None = None) -> Profile:
    """Read a profile and fit its tables.

    graph: checks that the profile is of this graph.
    raises: RecordError when it is altered, incomplete, or of another graph.
    """
    heading, measurements = read_measured(path)
    check_graph(heading, graph, path)
    return _derived(_Content(sha256_file(path), heading, measurements))


@dataclass(frozen=True)
class _Content:
    """What a file holds, compared by its digest."""

    sha256: str
    heading: ProfileHeading = field(compare=False)
    measurements: Sequence[Measurement] = field(compare=False)


@lru_cache(maxsize=2)
def _derived(content: _Content) -> Profile:
    """Every stage of a run reads the profile again, and its tables take seconds to fit."""
    return derive_profile(content.heading, content.measurements)


def derive_profile(
    heading: ProfileHeading, measurements: Sequence[Measurement], only: Collection[str] | None = None
) -> Profile:
    """The tables that the measurements give.

    only: names of the configurations to know of; None: all.
    raises: RecordError when the dense configuration or a kernel is missing among them.
    """
    used = [item for item in measurements if only is None or item.configuration in only]
    combined = combine(heading.kernels, used, heading.known)
    return Profile(
        target=heading.target, conditions=heading.conditions, graph_sha256=heading.graph_sha256,
        artifact_sha256=heading.artifact_sha256, dense_bytes=heading.dense_bytes, kernels=heading.kernels,
        measurements=tuple(used), tables=combined.tables, overhead_s=combined.overhead_s,
        additivity_gap=combined.additivity_gap, held_out=combined.held_out, memory=combined.memory,
        energy=combined.energy, folds=combined.folds, precision=heading.precision,
    )  # fmt: skip


def read_measurements(path: Path) -> tuple[ProfileHeading | None, list[Measurement]]:
    """What a file holds, nothing where there is none.

    raises: RecordError when the file is damaged or does not begin with a heading.
    """
    if not path.exists():
        return None, []
    records = list(read_lines(path, ProfileHeading, Measurement))
    if not records:
        return None, []
    if not isinstance(records[0], ProfileHeading):
        raise RecordError(f"{path} does not begin with a profile's heading; profile again into another file")
    if any(isinstance(record, ProfileHeading) for record in records[1:]):
        raise RecordError(f"{path} holds two profiles; profile again into another file")
    return records[0], records[1:]


def read_measured(path: Path) -> tuple[ProfileHeading, list[Measurement]]:
    """`read_measurements` of a file that is there. raises: RecordError when it is not."""
    heading, measurements = read_measurements(path)
    if heading is None:
        raise RecordError(f"{path} holds no profile; profile again")
    return heading, measurements


def check_graph(heading: ProfileHeading, graph: Graph | None, path: Path) -> None:
    """raises: RecordError when the profile is of another model."""
    if graph is not None and heading.graph_sha256 != graph.model_sha256:
        raise RecordError(f"{path} is a profile of another model (graph {heading.graph_sha256[:8]}); profile this one")
