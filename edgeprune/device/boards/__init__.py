"""What kinds of boards there are: each fact is a source of text on the board and a pure parser of it.

A member is a module with `FACTS` and `find_throttling`. The facts named in `MOMENTARY` are read
again by the agent before and after every measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from edgeprune.device import procfs
from edgeprune.device.sources import Source

MOMENTARY = ("governor", "freq_hz", "temp_c", "throttled")


@dataclass(frozen=True, slots=True)
class Fact:
    """One field of `BoardFacts`: its source, and the parser that gives the value or None."""

    source: Source
    parse: Callable[[str], Any]


KERNEL_FACTS = {
    "arch": Fact(Source(argv=("uname", "-m")), procfs.parse_text),
    "system": Fact(Source(argv=("cat", "/etc/os-release")), procfs.parse_os_release),
    "model": Fact(Source(argv=("cat", "/proc/device-tree/model")), procfs.parse_text),
    "cpu": Fact(Source(argv=("cat", "/proc/cpuinfo")), procfs.parse_cpu),
    "cpus": Fact(Source(argv=("nproc",)), procfs.parse_count),
    "ram_bytes": Fact(Source(argv=("cat", "/proc/meminfo")), procfs.parse_meminfo("MemTotal")),
    "ram_free_bytes": Fact(Source(argv=("cat", "/proc/meminfo")), procfs.parse_meminfo("MemAvailable")),
    "governor": Fact(
        Source(files=("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",)), procfs.parse_first_value
    ),
    "freq_hz": Fact(
        Source(files=("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq",)), procfs.parse_scaling_freq
    ),
    "temp_c": Fact(
        Source(files=("/sys/class/thermal/thermal_zone*/type", "/sys/class/thermal/thermal_zone*/temp")),
        procfs.parse_thermal_zones,
    ),
}
"""What a Linux kernel says on every board; members replace what their board says better."""

GOVERNOR_PINS = {"/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor": "performance"}


class Board(Protocol):
    """What a board module offers."""

    FACTS: Mapping[str, Fact]
    """BoardFacts field -> fact."""

    PINS: Mapping[str, str]
    """Shell patterns of settings that change the board's speed, and the value to hold them at while it measures."""

    def find_throttling(self, before: str, after: str) -> str | None:
        """What slowed the board between two readings of the `throttled` fact.

        returns: the reasons in words; "" when the board says there were none; None when it does not say.
        """
        ...
