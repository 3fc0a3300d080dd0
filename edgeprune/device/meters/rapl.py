"""RAPL, the energy counters of x86 processors, in /sys/class/powercap.

    domain   names of the zones to add up, joined by "+"; "package" means package-0, package-1 ...

source: the kernel's Documentation/power/powercap. Counters are in microjoules and wrap at
max_energy_range_uj. Since Linux 5.10 only root may read them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from edgeprune.device.meters import Meter, Power, Reading, configured
from edgeprune.device.sources import Source

FILES = tuple(f"/sys/class/powercap/intel-rapl:*/{name}" for name in ("name", "energy_uj", "max_energy_range_uj"))


def make(options: str) -> Meter:
    return configured(_make, options)


def _make(*, domain: str = "package") -> Meter:
    return Meter(
        source=Source(files=FILES),
        watts=lambda readings: power_between(readings, domain.split("+")),
        hint="are /sys/class/powercap/intel-rapl:*/energy_uj readable? Since Linux 5.10 only for root: "
        "sudo chmod a+r, or run the agent as root",
    )


def parse_counters(text: str, domains: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Zone -> its counter and where that wraps, in microjoules, of the zones so named (`path:line`)."""
    fields: dict[str, dict[str, str]] = {}
    for zone, field, value in re.findall(r"^\S*/(intel-rapl:[\d:]+)/(\w+):(\S+)", text, re.MULTILINE):
        fields.setdefault(zone, {})[field] = value
    return {
        zone: (int(found["energy_uj"]), int(found["max_energy_range_uj"]))
        for zone, found in fields.items()
        if {"name", "energy_uj", "max_energy_range_uj"} <= found.keys()
        and re.sub(r"-\d+$", "", found["name"]) in domains
    }


def power_between(readings: Sequence[Reading], domains: Sequence[str]) -> list[Power]:
    """Mean power between successive readings, at the middle of each pair, in watts."""
    powers = []
    counted = [(time_s, parse_counters(text, domains)) for time_s, text in readings]
    for (began, first), (ended, last) in pairwise((time_s, zones) for time_s, zones in counted if zones):
        if first.keys() == last.keys() and ended > began:
            # More than one wrap between two readings takes minutes at any power.
            joules = sum((last[zone][0] - first[zone][0]) % (first[zone][1] or 1) for zone in first) * 1e-6
            powers.append(((began + ended) / 2, joules / (ended - began)))
    return powers
