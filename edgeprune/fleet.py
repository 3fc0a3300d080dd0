"""One model profiled by several boards of a kind at once: each measures a share of the widths.

Every board times the dense model first. Boards on which it takes the same time may stand for each other;
one that is slower or faster than the rest (another governor, a throttled or busy board, another revision)
is named and gets no share. What each measured lies in a file of its own, and all of it in one profile.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.core.budget import format_seconds
from edgeprune.core.effort import DEFAULT, Effort
from edgeprune.core.errors import RecordError, UsageError
from edgeprune.core.family import load_member
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import FLOAT32, Graph, IntArray, KernelTime, Precision, Profile, Quantity, Widths
from edgeprune.core.stats import median
from edgeprune.core.store import append_record, replacing
from edgeprune.formats import KernelMap, Resizer
from edgeprune.profile import choose_batches, measure_configurations, read_profile
from edgeprune.tables.combine import measured_latency
from edgeprune.tables.design import DENSE, Configuration
from edgeprune.tables.stored import read_measured

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgeprune.device.session import Session

AGREEMENT = 0.05
"""Relative distance from the boards' median at which a board's dense latency is no longer the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetProfile:
    """The merged profile, the dense latency on each board, and the boards that were left out of it."""

    profile: Profile
    anchors: dict[str, Quantity]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        """A line per board."""
        rows = [
            f"{name}: dense {format_seconds(anchor.median)}"
            + (", differs from the others and was left out" if name in self.left_out else "")
            for name, anchor in self.anchors.items()
        ]
        return "\n".join(rows)


def profile_fleet(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    graph: Graph,
    sessions: Sequence[Session],
    *,
    path: Path,
    configurations: int = 40,
    held_out: int = 8,
    error: float | None = 0.01,
    around: str | None = None,
    effort: Effort = DEFAULT,
    agreement: float = AGREEMENT,
    progress: Progress = silent,
    seed: int = 0,
    resizer: Resizer | None = None,
    precision: Precision = FLOAT32,
) -> FleetProfile:
    """Measure a model's widths on several boards of a kind and fit one profile; as `profile_target`, in batches.

    sessions: open ones, each on another board, with a target name of its own. path: of the merged
    profile; each board's own lies beside it, and what it holds is not measured again. agreement: greatest
    relative distance of a board's dense latency from the median of all.
    raises: UsageError for fewer than two boards or equal names; RecordError for boards of unlike
        conditions, or when no more than half of them agree; DeviceError when a board fails.
    """
    names = [session.target.name for session in sessions]
    if len(set(names)) != len(names) or len(names) < 2:
        raise UsageError(f"a fleet is two or more boards with different names, not {', '.join(names) or 'none'}")
    check_alike(sessions)
    member = load_member("formats", sessions[0].format)
    made = _OneAtATime(resizer or member.make_resizer(module, inputs, graph, precision=precision))
    paths = {name: path.with_name(f"{path.stem}.{name}{path.suffix}") for name in names}

    def measure(shares: Mapping[str, Sequence[Configuration]]) -> None:
        def one(session: Session) -> None:
            name = session.target.name
            measure_configurations(
                module, inputs, graph, session, shares[name], path=paths[name], effort=effort, seed=seed, resizer=made,
                precision=precision, progress=lambda what, done, total: progress(f"{name}: {what}", done, total),
            )  # fmt: skip

        working = [session for session in sessions if shares.get(session.target.name)]
        with ThreadPoolExecutor(max_workers=len(working)) as pool:
            # Every board gets to its end, or to its own error, before the first error is raised.
            for finished in [pool.submit(one, session) for session in working]:
                finished.result()

    dense = Configuration(name=DENSE, widths=graph.units, memory=True)
    measure({name: [dense] for name in names})
    anchors = {name: measured_latency(read_measured(paths[name])[1]) for name in names}
    left_out = find_unlike(anchors, agreement)
    sharing = [name for name in names if name not in left_out]
    batches = choose_batches(
        graph, path, configurations=configurations, held_out=held_out, error=error, around=around, seed=seed
    )
    for batch in batches:
        rest = [entry for entry in batch if entry != dense]
        measure({name: rest[place :: len(sharing)] for place, name in enumerate(sharing)})
        merge_profiles([paths[name] for name in sharing], path, effort.rounds)
    return FleetProfile(profile=read_profile(path, graph), anchors=anchors, left_out=left_out)


def check_alike(sessions: Sequence[Session]) -> None:
    """Refuse boards that differ in anything that tables depend on. raises: RecordError naming board and difference."""
    first, *others = [(session.target.name, session.conditions()) for session in sessions]
    for name, conditions in others:
        unlike = first[1].unlike(conditions)
        if unlike:
            raise RecordError(f"{name} is no board like {first[0]} ({'; '.join(unlike)}); profile it by itself")


def find_unlike(anchors: Mapping[str, Quantity], agreement: float = AGREEMENT) -> tuple[str, ...]:
    """Boards whose dense latency is not that of the others.

    raises: RecordError when no more than half of them agree: then none can be told to be the odd one.
    """
    middle = median([anchor.median for anchor in anchors.values()])
    unlike = tuple(name for name, anchor in anchors.items() if abs(anchor.median / middle - 1) > agreement)
    if 2 * (len(anchors) - len(unlike)) <= len(anchors):
        told = ", ".join(f"{name} {format_seconds(anchor.median)}" for name, anchor in anchors.items())
        raise RecordError(
            f"the boards do not agree on the dense model ({told}): are governor, cooling and load the same? Mend that,"
            " or profile each by itself"
        )
    return unlike


def merge_profiles(paths: Sequence[Path], path: Path, rounds: int) -> None:
    """Write the measurements of several boards into one profile, each board's rounds after those of the one before.

    rounds: of each board. raises: RecordError when the runtime made other kernels on one of them.
    """
    read = [read_measured(each) for each in paths]
    heading = read[0][0]
    for other, where in zip(read, paths, strict=True):
        if {kernel.name for kernel in other[0].kernels} != {kernel.name for kernel in heading.kernels}:
            raise RecordError(
                f"{where}: the runtime makes other kernels there than in {paths[0]}; merge like ones only"
            )
    together = ",".join(each.target for each, _ in read)
    with replacing(path) as part:
        append_record(part, replace(heading, target=together))
        for place, (_, measurements) in enumerate(read):
            for item in measurements:
                append_record(part, replace(item, round=item.round + place * rounds))


class _OneAtATime:
    """A resizer that several threads may use: exporting is not made for that."""

    def __init__(self, resizer: Resizer) -> None:
        self._resizer, self._lock = resizer, threading.Lock()
        self.dense_sha256, self.dense_bytes = resizer.dense_sha256, resizer.dense_bytes

    def write_weights(self, path: Path) -> None:
        with self._lock:
            self._resizer.write_weights(path)

    def write_structure(self, widths: Widths, path: Path, weights: str) -> None:
        with self._lock:
            self._resizer.write_structure(widths, path, weights)

    def write_model(self, keep: Mapping[str, IntArray], path: Path) -> None:
        with self._lock:
            self._resizer.write_model(keep, path)

    def map_kernels(self, times: Sequence[KernelTime] | None) -> KernelMap:
        with self._lock:
            return self._resizer.map_kernels(times)
