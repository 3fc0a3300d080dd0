"""Budgets as people write them ("12ms", "0.5x", "8MiB", "30mJ"), and numbers as people read them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, get_args

from edgeprune.core.energy import PowerModel, parse_power_model
from edgeprune.core.errors import UsageError
from edgeprune.core.records import Budget, Cost, Quantity, Statistic

Kind = Literal["time", "bytes", "energy"]

UNITS: dict[Kind, dict[str, float]] = {
    "time": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6},
    "bytes": {
        **{"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9},
        **{"kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30},
    },
    "energy": {"j": 1.0, "mj": 1e-3, "uj": 1e-6, "µj": 1e-6},
}

_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-zµ%]*)\s*")


@dataclass(frozen=True, slots=True)
class Request:
    """A limit as it was asked for: SI units, or a share of what the dense model takes."""

    value: float
    relative: bool

    def absolute(self, dense: float) -> float:
        """In SI units; dense: what the dense model takes."""
        return self.value * dense if self.relative else self.value


def parse_limit(text: str, kind: Kind) -> Request:
    """Read "12ms", "0.5x" or "50%".

    raises: UsageError when it is no number, has no unit or the wrong one, or is not above zero.
    """
    known = ", ".join([*UNITS[kind], "x"])
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise UsageError(f"budget '{text}' is not a number with a unit; write one of {known}, such as '0.5x'")
    value, unit = float(match[1]), match[2].lower()
    if value <= 0:
        raise UsageError(f"budget '{text}' must be above zero")
    if unit in ("x", "%"):
        return Request(value / 100 if unit == "%" else value, relative=True)
    if unit not in UNITS[kind]:
        raise UsageError(f"budget '{text}' is no {kind} budget; write the number with one of {known}")
    return Request(value * UNITS[kind][unit], relative=False)


def make_budget(
    dense: Cost,
    *,
    latency: str | None = None,
    memory: str | None = None,
    size: str | None = None,
    energy: str | None = None,
    power_model: str | None = None,
    statistic: Statistic = "median",
) -> Budget:
    """Absolute limits from what was asked for.

    dense: what the dense model takes; needed for limits that are relative to it.
    power_model: such as "idle=2.1W,active=4.8W", where no meter can tell: energy is then the difference
        times the latency, and an energy limit one on the latency.
    statistic: of the latency, what the limit is for.
    raises: UsageError for text that cannot be read, no limit at all, or a relative limit on
            something that was not measured.
    """
    if energy is not None and power_model is not None:
        latency, energy = _tighter_latency(dense, latency, energy, parse_power_model(power_model)), None
    asked: dict[str, tuple[str | None, Kind, float | None]] = {
        "latency": (latency, "time", dense.latency_s.median if dense.latency_s else None),
        "memory": (memory, "bytes", dense.peak_memory_bytes),
        "size": (size, "bytes", dense.artifact_bytes),
        "energy": (energy, "energy", dense.energy_j.median if dense.energy_j else None),
    }
    limits: dict[str, float] = {}
    share: float | None = None
    for name, (text, kind, reference) in asked.items():
        if text is None:
            continue
        request = parse_limit(text, kind)
        if request.relative and reference is None:
            raise UsageError(f"{name} '{text}' is relative to the dense model, whose {name} was not measured")
        limits[name] = request.absolute(reference or 0.0)
        if name == "latency" and request.relative:
            share = request.value
    if not limits:
        raise UsageError("no budget given; ask for at least one of latency, memory, size or energy")
    return Budget(
        latency_s=limits.get("latency"),
        latency_share=share,
        peak_memory_bytes=int(limits["memory"]) if "memory" in limits else None,
        artifact_bytes=int(limits["size"]) if "size" in limits else None,
        energy_j=limits.get("energy"),
        statistic=statistic,
    )


def choose_statistic(budget: Budget, name: str | None) -> Budget:
    """The budget with another statistic of the latency; None: as it is. raises: UsageError listing the known."""
    if name is None:
        return budget
    known: dict[str, Statistic] = {each: each for each in get_args(Statistic)}
    if name not in known:
        raise UsageError(f"unknown statistic '{name}'; known: {', '.join(known)}")
    return replace(budget, statistic=known[name])


def _tighter_latency(dense: Cost, latency: str | None, energy: str, model: PowerModel) -> str:
    """The latency limit that keeps both, as text."""
    asked = parse_limit(energy, "energy")
    watts = model.active_w - model.idle_w
    # A share of the energy is the same share of the latency.
    meant = f"{asked.value}x" if asked.relative else f"{asked.value / watts} s"
    if latency is None:
        return meant
    reference = dense.latency_s.median if dense.latency_s else 0.0
    return min(meant, latency, key=lambda text: parse_limit(text, "time").absolute(reference))


def format_seconds(seconds: float) -> str:
    """Three significant digits: 1.23 s, 45.6 ms, 789 us."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 * scale else f"{seconds / scale:.0f} {unit}"
    return f"{seconds * 1e6:.3g} us"


def format_bytes(count: float) -> str:
    """Three significant digits in binary units: 1.23 MiB, 45.6 KiB, 12 B."""
    for unit, scale in (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 1000 * scale else f"{count / scale:.0f} {unit}"
    return f"{count:.0f} B"


def format_energy(joules: float) -> str:
    """Three significant digits: 1.2 J, 30 mJ."""
    return f"{joules:.3g} J" if joules >= 1 else f"{joules * 1e3:.3g} mJ"


def format_amount(name: str, value: float) -> str:
    """The value of a `Budget` field, such as "latency_s", for people."""
    if name.endswith("_s"):
        return format_seconds(value)
    return format_energy(value) if name.endswith("_j") else format_bytes(value)


def budget_between(cost: Cost, budget: Budget, share: float) -> Budget:
    """Limits a part of the way from what the dense model takes to a budget, in equal ratios.

    share: in [0, 1]; 0: of the dense model, 1: the budget. What is not limited, or not known of it, stays as it is.
    """

    def part(start: float | Quantity | None, end: float | None) -> float | None:
        if start is None or end is None:
            return end
        dense = start.median if isinstance(start, Quantity) else start
        return float(max(dense, end) ** (1 - share) * end**share)

    def whole(value: float | None) -> int | None:
        return None if value is None else int(value)

    return replace(
        budget,
        latency_share=None,
        latency_s=part(cost.latency_s, budget.latency_s),
        artifact_bytes=whole(part(cost.artifact_bytes, budget.artifact_bytes)),
        peak_memory_bytes=whole(part(cost.peak_memory_bytes, budget.peak_memory_bytes)),
        energy_j=part(cost.energy_j, budget.energy_j),
    )


def step_budgets(cost: Cost, budget: Budget, steps: int | Sequence[str]) -> list[Budget]:
    """Limits of a schedule's steps before the last, which has the budget itself.

    cost: of the dense model. steps: how many, the last among them, in equal ratios; or the latencies of all but the
    last, checked by `check_steps`: then only what else is limited falls in equal ratios.
    """
    if isinstance(steps, int):
        return [budget_between(cost, budget, step / steps) for step in range(1, steps)]
    dense = cost.latency_s.median if cost.latency_s else 0.0
    return [
        replace(
            budget_between(cost, budget, step / (len(steps) + 1)), latency_s=parse_limit(text, "time").absolute(dense)
        )
        for step, text in enumerate(steps, 1)
    ]


def check_steps(steps: int | Sequence[str], latency: str | None) -> None:
    """Whether the latencies of a schedule's steps fall, down to that of the budget.

    raises: UsageError for one that cannot be read, is not above the next, or cannot be compared with it.
    """
    if isinstance(steps, int) or not steps:
        return
    if latency is None:
        raise UsageError("[prune] steps as latencies need a [budget] latency, which is the last step's")
    texts = [*steps, latency]
    asked = [parse_limit(text, "time") for text in texts]
    if asked[0].relative and asked[0].value >= 1:
        raise UsageError(f"[prune] steps: '{steps[0]}' is not below the dense model's latency, '1x'")
    for number, (this, following) in enumerate(pairwise(asked)):
        what = f"[prune] steps: '{texts[number]}' and '{texts[number + 1]}'"
        what += " of [budget] latency" if number == len(steps) - 1 else ""
        if this.relative != following.relative:
            raise UsageError(
                f"{what} cannot be compared before measuring; write all as times, or all as shares ('0.8x')"
            )
        if this.value <= following.value:
            raise UsageError(f"{what} do not fall; each step has to be above the next, and the last above the budget")
