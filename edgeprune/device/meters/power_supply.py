"""The board's own battery, in /sys/class/power_supply. Unplug the charger: energy then comes from it alone.

    name   of the battery, such as "BAT0"; needed where there are several

source: the kernel's Documentation/ABI/testing/sysfs-class-power (microwatts, microvolts, microamperes). Drivers
disagree on the current's sign, so its amount counts and `status` tells the direction.
"""

from __future__ import annotations

import re

from edgeprune.core.errors import DeviceError
from edgeprune.device.meters import Meter, configured, each
from edgeprune.device.sources import Source

FILES = tuple(
    f"/sys/class/power_supply/*/{name}" for name in ("type", "status", "power_now", "voltage_now", "current_now")
)


def make(options: str) -> Meter:
    return configured(_make, options)


def _make(*, name: str = "") -> Meter:
    return Meter(
        source=Source(files=FILES),
        watts=each(lambda text: parse_battery(text, name)),
        interval_s=0.25,
        hint="does /sys/class/power_supply/*/current_now exist, and may this user read it?",
    )


def parse_battery(text: str, name: str) -> float | None:
    """Watts drawn from a battery (`path:line`). raises: DeviceError when it is charged, or one of several."""
    supplies: dict[str, dict[str, str]] = {}
    for supply, field, value in re.findall(r"^\S*/power_supply/([^/\n]+)/(\w+):(.*)$", text, re.MULTILINE):
        supplies.setdefault(supply, {})[field] = value.strip()
    batteries = {key: found for key, found in supplies.items() if found.get("type") == "Battery" and name in ("", key)}
    drawn = {key: watts for key, found in batteries.items() if (watts := _watts(found)) is not None}
    if not drawn:
        return None
    if len(drawn) > 1:
        raise DeviceError(f"several batteries: {', '.join(sorted(drawn))}; name one: power_supply:name=NAME")
    ((key, watts),) = drawn.items()
    if batteries[key].get("status", "Discharging") != "Discharging":
        raise DeviceError(f"battery {key} is not discharging ({batteries[key]['status']}); unplug the charger")
    return watts


def _watts(found: dict[str, str]) -> float | None:
    number = {field: abs(int(value)) for field, value in found.items() if re.fullmatch(r"-?\d+", value)}
    if "power_now" in number:
        return number["power_now"] * 1e-6
    if "voltage_now" in number and "current_now" in number:
        return number["voltage_now"] * number["current_now"] * 1e-12
    return None
