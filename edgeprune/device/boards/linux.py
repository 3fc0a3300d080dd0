"""Any Linux machine: /proc, /sys and a few commands of every distribution and of busybox."""

from __future__ import annotations

from edgeprune.device import procfs
from edgeprune.device.boards import GOVERNOR_PINS, KERNEL_FACTS, Fact
from edgeprune.device.sources import Source

FACTS = {
    **KERNEL_FACTS,
    "model": Fact(
        # A PC has the one, an ARM board the other, which ends in a NUL that grep would take for a binary file.
        Source(argv=("cat", "/sys/class/dmi/id/product_name", "/proc/device-tree/model")),
        procfs.parse_text,
    ),
    "throttled": Fact(
        Source(files=("/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count",)),
        procfs.parse_throttle_counts,
    ),
}
PINS = GOVERNOR_PINS


def find_throttling(before: str, after: str) -> str | None:
    """Thermal throttling events that the processor counted between two readings."""
    first, last = procfs.parse_throttle_counts(before), procfs.parse_throttle_counts(after)
    if first is None or last is None:
        return None
    return f"{last - first} thermal throttling events" if last > first else ""
