"""`tegrastats` of NVIDIA's Jetson boards: the power rails in its lines.

    rail          rails to add up, joined by "+"; where not given the one that feeds the board, where there
                  is one, else all
    interval_ms   between lines

source: lines of L4T r32 to r36 as published. `NAME 900/943` is milliwatts now and on average; newer ones
write the unit, `VDD_IN 5336mW/4970mW`.
"""

from __future__ import annotations

import re

from edgeprune.device.meters import Meter, configured, each, total_watts
from edgeprune.device.sources import Source

BOARD_INPUTS = ("VDD_IN", "POM_5V_IN", "VIN")


def make(options: str) -> Meter:
    return configured(_make, options)


def _make(*, rail: str = "", interval_ms: int = 100) -> Meter:
    return Meter(
        source=Source(argv=("tegrastats", "--interval", str(interval_ms))),
        watts=each(lambda text: total_watts(parse_rails(text), rail, BOARD_INPUTS)),
        stream=True,
        interval_s=interval_ms * 1e-3,
        hint="is tegrastats in the board's $PATH, and does it print the rails asked for?",
    )


def parse_rails(line: str) -> dict[str, float]:
    """Rail -> watts at this moment; empty for a line without any."""
    # RAM 613/3964MB looks alike, up to the unit.
    found = re.findall(r"(?:^|\s)([A-Za-z]\w*) (\d+)(?:mW)?/\d+(?:mW)?(?=\s|$)", line)
    return {name: int(milliwatts) * 1e-3 for name, milliwatts in found}
