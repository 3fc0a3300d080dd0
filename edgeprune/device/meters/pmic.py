"""The power management chip of a Raspberry Pi 5: `vcgencmd pmic_read_adc`. Older models have no such sensor.

    wall   true: estimate what the board draws from its supply, which feeds more than these rails

source: the firmware's output as published; rails come as NAME_A in amperes and NAME_V in volts. The
estimate (1.1451 times the sum, plus 0.5879 W) is one published fit against a wall meter, unconfirmed.
"""

from __future__ import annotations

import re

from edgeprune.device.meters import Meter, configured, each
from edgeprune.device.sources import Source

WALL_SLOPE = 1.1451
WALL_OFFSET_W = 0.5879


def make(options: str) -> Meter:
    return configured(_make, options)


def _make(*, wall: bool = False) -> Meter:
    def watts(text: str) -> float | None:
        rails = parse_rails(text)
        total = sum(rails.values())
        return None if not rails else WALL_SLOPE * total + WALL_OFFSET_W if wall else total

    return Meter(
        source=Source(argv=("vcgencmd", "pmic_read_adc")),
        watts=each(watts),
        hint="is it a Raspberry Pi 5, and the user in group video (sudo usermod -aG video $USER)?",
    )


def parse_rails(text: str) -> dict[str, float]:
    """Rail -> watts, of those whose current and voltage are both told."""
    found = re.findall(r"^\s*(\w+)_([AV]) (?:current|volt)\(\d+\)=([\d.]+)[AV]$", text, re.MULTILINE)
    amperes = {rail: float(value) for rail, unit, value in found if unit == "A"}
    volts = {rail: float(value) for rail, unit, value in found if unit == "V"}
    return {rail: amperes[rail] * volts[rail] for rail in amperes if rail in volts}
