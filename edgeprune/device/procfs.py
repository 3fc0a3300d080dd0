"""Parsers of what Linux says about itself under /proc and /sys. Pure: text in, value or None out."""

from __future__ import annotations

import re
from collections.abc import Callable

from edgeprune.core.records import AVX512

# Main ID register, (implementer, part): the kernel's arch/arm64/include/asm/cputype.h and arch/arm's.
ARM_PARTS = {
    ("0x41", "0xb76"): "ARM1176",
    ("0x41", "0xc05"): "Cortex-A5",
    ("0x41", "0xc07"): "Cortex-A7",
    ("0x41", "0xc08"): "Cortex-A8",
    ("0x41", "0xc09"): "Cortex-A9",
    ("0x41", "0xc0d"): "Cortex-A12",
    ("0x41", "0xc0e"): "Cortex-A17",
    ("0x41", "0xc0f"): "Cortex-A15",
    ("0x41", "0xd03"): "Cortex-A53",
    ("0x41", "0xd04"): "Cortex-A35",
    ("0x41", "0xd05"): "Cortex-A55",
    ("0x41", "0xd07"): "Cortex-A57",
    ("0x41", "0xd08"): "Cortex-A72",
    ("0x41", "0xd09"): "Cortex-A73",
    ("0x41", "0xd0a"): "Cortex-A75",
    ("0x41", "0xd0b"): "Cortex-A76",
    ("0x41", "0xd0c"): "Neoverse-N1",
    ("0x41", "0xd0d"): "Cortex-A77",
    ("0x41", "0xd41"): "Cortex-A78",
    ("0x41", "0xd42"): "Cortex-A78AE",
    ("0x41", "0xd44"): "Cortex-X1",
    ("0x41", "0xd46"): "Cortex-A510",
    ("0x41", "0xd47"): "Cortex-A710",
    ("0x41", "0xd48"): "Cortex-X2",
    ("0x41", "0xd4d"): "Cortex-A715",
    ("0x41", "0xd4e"): "Cortex-X3",
    ("0x4e", "0x003"): "NVIDIA Denver 2",
    ("0x4e", "0x004"): "NVIDIA Carmel",
    ("0x51", "0x802"): "Kryo 385 Gold",
    ("0x51", "0x803"): "Kryo 385 Silver",
    ("0x51", "0x804"): "Kryo 4xx Gold",
    ("0x51", "0x805"): "Kryo 4xx Silver",
}


def parse_text(text: str) -> str | None:
    """The first line without surrounding white space and NULs; None when there is none."""
    return text.strip(" \n\t\0").partition("\n")[0].strip(" \t\0") or None


def parse_os_release(text: str) -> str | None:
    """PRETTY_NAME of /etc/os-release."""
    match = re.search(r"^PRETTY_NAME=\"?([^\"\n]+)", text, re.MULTILINE)
    return match[1] if match else None


def parse_cpu(text: str) -> str | None:
    """The processor's name in /proc/cpuinfo; on ARM, 32 bits too, from its part number.

    A 32-bit kernel names the architecture as the model ("ARMv7 Processor rev 4 (v7l)"), which tells
    less than the part does; kernels before 3.8 call that field "Processor".
    """
    parts = sorted(
        set(
            re.findall(
                r"^CPU implementer\s*:\s*(0x[0-9a-f]+)$.*?^CPU part\s*:\s*(0x[0-9a-f]+)$",
                text,
                re.MULTILINE | re.DOTALL,
            )
        )
    )
    if parts:
        return " + ".join(ARM_PARTS.get(part, f"ARM part {part[1]} of {part[0]}") for part in parts)
    match = re.search(r"^(?:model name|Processor)\s*:\s*(.+)$", text, re.MULTILINE)
    if match is None:
        return None
    # Virtual machines of one name have it or not, and runtimes have other kernels for it.
    wide = re.search(r"^flags\s*:.*\bavx512f\b", text, re.MULTILINE)
    return f"{match[1].strip()}, {AVX512}" if wide else match[1].strip()


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
