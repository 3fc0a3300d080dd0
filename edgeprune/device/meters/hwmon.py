"""Power sensors of the kernel's hwmon class, such as an INA219, INA226 or INA260 on the supply.

    chip   the driver's name, as in /sys/class/hwmon/hwmon*/name; needed where several measure power
    rail   labels or numbers of the channels to add up, joined by "+"; all where not given

source: the kernel's Documentation/hwmon/sysfs-interface (power in microwatts, in in millivolts, curr in
milliamperes).
"""

from __future__ import annotations

import re

from edgeprune.core.errors import DeviceError
from edgeprune.device.meters import Meter, configured, each, total_watts
from edgeprune.device.sources import Source

FILES = tuple(
    f"/sys/class/hwmon/hwmon*/{name}"
    for name in ("name", "power*_input", "power*_label", "in*_input", "in*_label", "curr*_input")
)


def make(options: str) -> Meter:
    return configured(_make, options)


def _make(*, chip: str = "", rail: str = "") -> Meter:
    return Meter(
        source=Source(files=FILES),
        watts=each(lambda text: choose_chip(parse_chips(text), chip, rail)),
        hint="does `grep -s . /sys/class/hwmon/hwmon*/power*_input` on the board show power?",
    )


def parse_chips(text: str) -> dict[str, dict[str, float]]:
    """Chip -> channel -> watts, of the chips that measure power (`path:line`).

    A chip is named `NAME`, or `NAME@hwmonN` where two have one name.
    """
    fields: dict[str, dict[str, str]] = {}
    for folder, field, value in re.findall(r"^\S*/(hwmon\d+)/(\w+):(.*)$", text, re.MULTILINE):
        fields.setdefault(folder, {})[field] = value.strip()
    names = [found.get("name", folder) for folder, found in fields.items()]
    chips = {}
    for (folder, found), name in zip(fields.items(), names, strict=True):
        if channels := parse_channels(found):
            chips[name if names.count(name) == 1 else f"{name}@{folder}"] = channels
    return chips


def parse_channels(fields: dict[str, str]) -> dict[str, float]:
    """Label (or number) of a channel -> watts; voltage times current where the chip gives no power."""
    channels = {}
    for field, value in fields.items():
        match = re.fullmatch(r"(power|in)(\d+)_input", field)
        if match is None:
            continue
        kind, number = match.groups()
        label = fields.get(f"{kind}{number}_label", number)
        if kind == "power":
            channels[label] = int(value) * 1e-6
        elif f"curr{number}_input" in fields and f"power{number}_input" not in fields:
            channels[label] = int(value) * int(fields[f"curr{number}_input"]) * 1e-6
    return channels


def choose_chip(chips: dict[str, dict[str, float]], chip: str, rail: str) -> float | None:
    """Watts of one chip's rails. raises: DeviceError when several chips measure power and none was named."""
    if not chip and len(chips) > 1:
        raise DeviceError(f"several chips measure power: {', '.join(sorted(chips))}; name one: hwmon:chip=NAME")
    found = chips.get(chip) if chip else next(iter(chips.values()), None)
    return total_watts(found, rail) if found else None
