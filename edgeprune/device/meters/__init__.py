"""What measures power while a model runs: text that the agent reads again and again, and its parser.

A member is a module with `make`. A target names it, with its options, as `meter = "rapl:domain=psys"`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from edgeprune.core.errors import UsageError
from edgeprune.core.family import configure, load_member
from edgeprune.device.sources import Source

Reading: TypeAlias = tuple[float, str]
"""What the meter said, and when: seconds on the board's monotonic clock."""
Power: TypeAlias = tuple[float, float]
"""Seconds on that clock, watts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meter:
    """How the agent reads a meter, and what the readings mean.

    stream: the source's command goes on printing, a line per reading, until it is killed; otherwise it
        is read every `interval_s`.
    watts: readings in order of time -> power; those that say nothing are left out. raises: DeviceError
        where the readings cannot mean the board's power, such as those of a battery on its charger.
    hint: what to look at when there are no readings.
    """

    source: Source
    watts: Callable[[Sequence[Reading]], list[Power]]
    stream: bool = False
    interval_s: float = 0.1
    hint: str = ""


class Member(Protocol):
    """What a meter module offers."""

    def make(self, options: str) -> Meter | None:
        """The meter with these options (`key=value,...`); None where there is none. raises: UsageError."""
        ...


def open_meter(text: str) -> Meter | None:
    """The meter of a target's `meter` field. raises: UnknownMember; UsageError for its options."""
    name, _, options = text.partition(":")
    meter: Meter | None = load_member("device.meters", name).make(options)
    if meter is not None and not 0.001 <= meter.interval_s <= 10:
        raise UsageError(f"meter '{text}': readings every {meter.interval_s:g} s; 0.001 to 10 s is possible")
    return meter


def configured(make: Callable[..., Meter], options: str) -> Meter:
    """The meter that a member's function makes with its options bound to keyword-only parameters."""
    meter: Meter = configure(make, options)()
    return meter


def each(parse: Callable[[str], float | None]) -> Callable[[Sequence[Reading]], list[Power]]:
    """Power from readings of which each tells the watts of its moment."""

    def watts(readings: Sequence[Reading]) -> list[Power]:
        parsed = [(time_s, parse(text)) for time_s, text in readings]
        return [(time_s, value) for time_s, value in parsed if value is not None]

    return watts


def total_watts(rails: dict[str, float], wanted: str, inputs: Sequence[str] = ()) -> float | None:
    """Power of some rails of a board, in watts.

    wanted: `A+B`, the rails to add up. Empty: the first of `inputs` that is there, which feeds all
        others; else all rails.
    """
    names = wanted.split("+") if wanted else next(([name] for name in inputs if name in rails), list(rails))
    if not names or any(name not in rails for name in names):
        return None
    return sum(rails[name] for name in names)
