"""NVIDIA Jetson, Nano to Orin: what Linux says, L4T's release, and the power mode of `nvpmodel`.

The power mode sets clocks and the number of cores, so it is part of the governor: numbers of two modes
are never merged.
source: outputs of L4T r32 to r36 as published; the counters of over-current events (oc*_event_cnt)
are unconfirmed.
"""

from __future__ import annotations

import re

from edgeprune.device import procfs
from edgeprune.device.boards import GOVERNOR_PINS, KERNEL_FACTS, Fact
from edgeprune.device.sources import Source


def parse_release(text: str) -> str | None:
    """`L4T 32.7.1, Ubuntu 18.04.6 LTS` from /etc/nv_tegra_release and /etc/os-release (`path:line`)."""
    tegra = re.search(r"# R(\d+) \(release\), REVISION: ([\d.]+)", text)
    system = re.search(r"PRETTY_NAME=\"?([^\"\n]+)", text)
    return ", ".join([*([f"L4T {tegra[1]}.{tegra[2]}"] if tegra else []), *([system[1]] if system else [])]) or None


def parse_power_mode(text: str) -> str | None:
    """`25W` in nvpmodel's `NV Power Mode: 25W`, whatever warnings stand before it."""
    match = re.search(r"^NV Power Mode: *(\S+)", text, re.MULTILINE)
    return match[1] if match else None


def parse_governor(text: str) -> str | None:
    """`schedutil, 25W`: cpufreq's governor (`path:value`) and the power mode; whichever are there."""
    return ", ".join(filter(None, [procfs.parse_first_value(text), parse_power_mode(text)])) or None


def parse_events(text: str) -> int | None:
    """Sum of the over-current events counted since boot (`path:count`)."""
    counts = re.findall(r"/oc\d+_event_cnt:(\d+)$", text, re.MULTILINE)
    return sum(map(int, counts)) if counts else None


FACTS = {
    **KERNEL_FACTS,
    "system": Fact(Source(files=("/etc/nv_tegra_release", "/etc/os-release")), parse_release),
    "governor": Fact(
        Source(files=("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",), argv=("nvpmodel", "-q")),
        parse_governor,
    ),
    "throttled": Fact(Source(files=("/sys/class/hwmon/hwmon*/oc*_event_cnt",)), parse_events),
}
PINS = GOVERNOR_PINS


def find_throttling(before: str, after: str) -> str | None:
    """Over-current events between two readings; None where this L4T does not count them."""
    first, last = parse_events(before), parse_events(after)
    if first is None or last is None:
        return None
    return f"{last - first} over-current events" if last > first else ""
