"""How much board time a measurement may take: one of three levels."""

from __future__ import annotations

from dataclasses import dataclass

from edgeprune.core.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """Board time for measurements; every round opens the models anew.

    rounds: of each configuration of a profile. repeats: rounds of one model that counts by itself (a
        candidate of the plan, a validation, `edgeprune measure`).
    seconds: longest sampling of one timing. precision: a timing ends before that once the 95 %
        interval of its median, or of the ratio to what it is compared with, is +- this share.
    energy_s: of the loop in which power is sampled. samples: fewest of one timing that does not reach the precision:
    models so slow that few turns fit into `seconds` get more.
    profiled_runs: of which a kernel's typical time is made. steady: a run takes the same time every time, so that
    one turn behind the first runs says all.
    """

    rounds: int
    repeats: int
    seconds: float
    precision: float | None
    energy_s: float = 10.0
    samples: int = 15
    profiled_runs: int = 12
    steady: bool = False


DEFAULT = Effort(rounds=3, repeats=6, seconds=0.6, precision=0.01)
EFFORTS = {
    "quick": Effort(rounds=1, repeats=3, seconds=0.5, precision=0.02, energy_s=5.0),
    "default": DEFAULT,
    "thorough": Effort(rounds=5, repeats=12, seconds=2.0, precision=0.005, energy_s=30.0),
}
NOISELESS = Effort(rounds=1, repeats=1, seconds=0.0, precision=None, samples=1, profiled_runs=2, steady=True)
"""For boards on which a run takes the same time every time, such as an emulator that counts instructions."""


def find_effort(name: str) -> Effort:
    """The level of that name. raises: UsageError listing the known ones."""
    if name not in EFFORTS:
        raise UsageError(f"unknown effort '{name}'; known: {', '.join(EFFORTS)}")
    return EFFORTS[name]
