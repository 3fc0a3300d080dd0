"""Any Linux machine: /proc, /sys and a few commands of every distribution and of busybox."""

from __future__ import annotations

from edgeprune.device import procfs
from edgeprune.device.boards import Fact
from edgeprune.device.sources import Source

FACTS = {
    "arch": Fact(Source(argv=("uname", "-m")), procfs.parse_text),
    "system": Fact(Source(argv=("cat", "/etc/os-release")), procfs.parse_os_release),
    "model": Fact(
        # A PC has the one, an ARM board the other, which ends in a NUL that grep would take for a binary file.
        Source(argv=("cat", "/sys/class/dmi/id/product_name", "/proc/device-tree/model")),
        procfs.parse_text,
    ),
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
    "throttled": Fact(
        Source(files=("/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count",)),
        procfs.parse_throttle_counts,
    ),
}


PINS = {"/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor": "performance"}


def find_throttling(before: str, after: str) -> str | None:
    """Thermal throttling events that the processor counted between two readings."""
    first, last = procfs.parse_throttle_counts(before), procfs.parse_throttle_counts(after)
    if first is None or last is None:
        return None
    return f"{last - first} thermal throttling events" if last > first else ""
