"""Raspberry Pi: what Linux says, and what the firmware says through `vcgencmd`.

source: the firmware's documented `vcgencmd` output; bits of get_throttled: 0 under-voltage, 1 frequency
capped, 2 throttled, 3 soft temperature limit, 16-19 the same since boot.
"""

from __future__ import annotations

import re

from edgeprune.device.boards import GOVERNOR_PINS, KERNEL_FACTS, Fact
from edgeprune.device.sources import Source

THROTTLE_FLAGS = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}
SINCE_BOOT = 16


def parse_temperature(text: str) -> float | None:
    """Degrees Celsius in `temp=48.3'C`; None for the firmware's error messages."""
    match = re.search(r"temp=(-?\d+(?:\.\d+)?)'C", text)
    return float(match[1]) if match else None


def parse_clock(text: str) -> float | None:
    """Hertz in `frequency(48)=1500398464`; the index differs between models and firmwares."""
    match = re.search(r"frequency\(\d+\)=(\d+)", text)
    return float(match[1]) if match else None


def parse_flags(text: str) -> int | None:
    """The bits in `throttled=0x50005`."""
    match = re.search(r"throttled=(0x[0-9a-fA-F]+)", text)
    return int(match[1], 16) if match else None


FACTS = {
    **KERNEL_FACTS,
    "freq_hz": Fact(Source(argv=("vcgencmd", "measure_clock", "arm")), parse_clock),
    "temp_c": Fact(Source(argv=("vcgencmd", "measure_temp")), parse_temperature),
    "throttled": Fact(Source(argv=("vcgencmd", "get_throttled")), parse_flags),
}
PINS = GOVERNOR_PINS


def find_throttling(before: str, after: str) -> str | None:
    """Flags that were set at either reading, or raised and cleared in between."""
    first, last = parse_flags(before), parse_flags(after)
    if first is None or last is None:
        return None
    in_between = (last & ~first) >> SINCE_BOOT
    active = first | last | in_between
    return ", ".join(reason for bit, reason in THROTTLE_FLAGS.items() if active >> bit & 1)
