"""An Android phone, through Termux's SSH server or adb: system properties, thermal zones and service.

source: AOSP's `getprop`, and `dumpsys thermalservice` as quoted publicly (Android 10 and newer). An app
such as Termux may not ask that service, and often not read thermal zones: then these are None.
"""

from __future__ import annotations

import re

from edgeprune.device import procfs
from edgeprune.device.boards import KERNEL_FACTS, Fact
from edgeprune.device.sources import Source

# android.os.PowerManager, THERMAL_STATUS_*.
STATUS = ("", "light", "moderate", "severe", "critical", "emergency", "shutdown")


def parse_property(name: str) -> Fact:
    """A fact that is one system property."""
    return Fact(Source(argv=("getprop", name)), _parse_property)


def _parse_property(text: str) -> str | None:
    value = procfs.parse_text(text)
    return value if value and "not found" not in value else None  # a shell without getprop says so in words


def parse_release(text: str) -> str | None:
    """`Android 14` from the property ro.build.version.release."""
    version = re.fullmatch(r"\d+(\.\d+)*|[A-Z]", text.strip())
    return f"Android {version[0]}" if version else None


def parse_status(text: str) -> int | None:
    """0 (none) to 6 (shutdown) in `Thermal Status: 2`."""
    match = re.search(r"^\s*Thermal Status: ([0-6])\s*$", text, re.MULTILINE)
    return int(match[1]) if match else None


FACTS = {
    **KERNEL_FACTS,
    "system": Fact(Source(argv=("getprop", "ro.build.version.release")), parse_release),
    "model": parse_property("ro.product.model"),
    "throttled": Fact(Source(argv=("dumpsys", "thermalservice")), parse_status),
}


PINS: dict[str, str] = {}  # an app may not touch the clocks


def find_throttling(before: str, after: str) -> str | None:
    """The higher of the thermal service's two states; None when it may not be asked."""
    first, last = parse_status(before), parse_status(after)
    if first is None or last is None:
        return None
    worst = max(first, last)
    return f"thermal status {STATUS[worst]}" if worst else ""
