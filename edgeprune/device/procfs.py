"""Parsers of what Linux says about itself under /proc and /sys. Pure: text in, value or None out."""

from __future__ import annotations

import re
from collections.abc import Callable

# Main ID register part numbers, from the kernel's arch/arm64/include/asm/cputype.h.
ARM_PARTS = {
    "0xd03": "Cortex-A53",
    "0xd04": "Cortex-A35",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73",
    "0xd0a": "Cortex-A75",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd41": "Cortex-A78",
    "0xd42": "Cortex-A78AE",
}


def parse_text(text: str) -> str | None:
    """The text without surrounding white space and NULs; None when there is none."""
    return text.strip(" \n\t\0") or None


def parse_os_release(text: str) -> str | None:
    """PRETTY_NAME of /etc/os-release."""
    match = re.search(r"^PRETTY_NAME=\"?([^\"\n]+)", text, re.MULTILINE)
    return match[1] if match else None


def parse_cpu(text: str) -> str | None:
    """The processor's name in /proc/cpuinfo; on ARM from its part number."""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    if match:
        return match[1].strip()
    parts = sorted(set(re.findall(r"^CPU part\s*:\s*(0x[0-9a-f]+)", text, re.MULTILINE)))
    return " + ".join(ARM_PARTS.get(part, f"ARM part {part}") for part in parts) or None


def parse_count(text: str) -> int | None:
    """A bare number."""
    return int(text) if re.fullmatch(r"\d+", text.strip()) else None


def parse_meminfo(field: str) -> Callable[[str], int | None]:
    """A parser of one field of /proc/meminfo, in bytes."""

    def parse(text: str) -> int | None:
        match = re.search(rf"^{field}:\s*(\d+) kB", text, re.MULTILINE)
        return int(match[1]) * 1024 if match else None

    return parse


def parse_disk_free(text: str) -> int | None:
    """Free bytes in the last line of `df -Pk`."""
    match = re.search(r"^.*\s(\d+)\s+(\d+)\s+(-?\d+)\s+\d+%\s+\S.*\Z", text.strip(), re.MULTILINE)
    return max(0, int(match[3])) * 1024 if match else None


def parse_first_value(text: str) -> str | None:
    """The value of the first `path:value` line."""
    match = re.match(r"/[^:\n]*:(.*)", text)
    return match[1].strip() or None if match else None


def parse_scaling_freq(text: str) -> float | None:
    """cpufreq's scaling_cur_freq (kHz, `path:value`), in hertz."""
    value = parse_first_value(text)
    return float(value) * 1e3 if value and value.isdigit() else None


def parse_thermal_zones(text: str) -> float | None:
    """Temperature of the CPU's thermal zone, in degrees Celsius, from `zone/type:` and `zone/temp:` lines.

    The zone named after the CPU is taken where there is one, else the hottest plausible one.
    """
    types = dict(re.findall(r"^(\S*thermal_zone\d+)/type:(\S+)", text, re.MULTILINE))
    readings = {
        zone: int(millidegrees) / 1e3
        for zone, millidegrees in re.findall(r"^(\S*thermal_zone\d+)/temp:(-?\d+)", text, re.MULTILINE)
        # Absent sensors read 0 or, on Tegra, -256.
        if 0 < int(millidegrees) < 150_000
    }
    named = {zone: value for zone, value in readings.items() if re.search("cpu|x86_pkg|soc", types.get(zone, ""), re.I)}
    return max((named or readings).values(), default=None)


def parse_throttle_counts(text: str) -> int | None:
    """Sum of the x86 thermal_throttle event counters (`path:count` lines)."""
    counts = re.findall(r"_throttle_count:(\d+)$", text, re.MULTILINE)
    return sum(map(int, counts)) if counts else None
