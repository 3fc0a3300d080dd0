"""The battery of an Android phone. Unplug it: over USB it charges, so use SSH or wireless adb.

    source   "termux": `termux-battery-status` of the Termux:API app; "dumpsys": `dumpsys battery`, which
             apps may not ask and which tells a current on few phones (Samsung's `current now`)

source: termux-battery-status prints JSON with microamperes and millivolts; AOSP's BatteryService prints
millivolts (some vendors' volts) and a status: 2 charging, 3 discharging, 4 not charging, 5 full. Most
phones renew these figures once in seconds: measure for a minute.
"""

from __future__ import annotations

import json
import re

from edgeprune.core.errors import DeviceError, UsageError
from edgeprune.device.meters import Meter, configured, each
from edgeprune.device.sources import Source

LEAST_MILLIVOLTS = 100
"""What is less is in volts."""


def make(options: str) -> Meter:
    return configured(_make, options)


def _make(*, source: str = "termux") -> Meter:
    if source not in ("termux", "dumpsys"):
        raise UsageError(f"meter android_battery: source={source}; known: termux, dumpsys")
    termux = source == "termux"
    return Meter(
        source=Source(argv=("termux-battery-status",) if termux else ("dumpsys", "battery")),
        watts=each(parse_termux if termux else parse_dumpsys),
        interval_s=1.0,
        hint="are the Termux:API app and `pkg install termux-api` there?" if termux else "does it tell `current now`?",
    )


def parse_termux(text: str) -> float | None:
    """Watts in the JSON of termux-battery-status. raises: DeviceError when the battery is charged."""
    try:
        found = json.loads(text)
        volts, amperes = float(found["voltage"]) * 1e-3, abs(float(found["current"])) * 1e-6
    except (ValueError, KeyError, TypeError):
        return None
    if found.get("status") != "DISCHARGING":
        raise DeviceError(f"the battery is not discharging ({found.get('status')}); unplug the charger")
    return volts * amperes


def parse_dumpsys(text: str) -> float | None:
    """Watts in `dumpsys battery`. raises: DeviceError when the battery is charged."""
    fields = {
        key.strip().lower(): value for key, value in re.findall(r"^\s+([^:\n]+): (-?\d+)\s*$", text, re.MULTILINE)
    }
    if "voltage" not in fields or "current now" not in fields:
        return None
    if fields.get("status") != "3":
        raise DeviceError(f"the battery is not discharging (status {fields.get('status')}); unplug the charger")
    voltage = float(fields["voltage"])
    volts = voltage * 1e-3 if voltage >= LEAST_MILLIVOLTS else voltage
    return volts * abs(float(fields["current now"])) * 1e-3
