"""The INA3221 power monitors of NVIDIA's Jetson boards, read from sysfs.

    rail   rails to add up, joined by "+", such as "VDD_CPU_GPU_CV+VDD_SOC"; where not given the one that
           feeds the board, where there is one, else all

source: the kernel's Documentation/hwmon/ina3221 (L4T r34 and newer: in{1,2,3}_label, in{N}_input in
millivolts, curr{N}_input in milliamperes); L4T r32's ina3221x driver: in_power{0,1,2}_input in milliwatts;
its rail_name_{0,1,2} is unconfirmed.
"""

from __future__ import annotations

import re

from edgeprune.device.meters import Meter, configured, each, total_watts
from edgeprune.device.sources import Source

BOARD_INPUTS = ("VDD_IN", "POM_5V_IN", "VIN")
FILES = (
    *(f"/sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/{name}" for name in ("in[123]_label", "in[123]_input")),
    "/sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/curr[123]_input",
    *(f"/sys/bus/i2c/drivers/ina3221x/*/iio:device*/{name}" for name in ("rail_name_[012]", "in_power[012]_input")),
)


def make(options: str) -> Meter:
    return configured(_make, options)


def _make(*, rail: str = "") -> Meter:
    return Meter(
        source=Source(files=FILES),
        watts=each(lambda text: total_watts(parse_rails(text), rail, BOARD_INPUTS)),
        hint="is there an INA3221 in /sys/bus/i2c/drivers/ina3221*, and does it have the rails asked for?",
    )


def parse_rails(text: str) -> dict[str, float]:
    """Rail -> watts, of all the monitors of a board (`path:line`); a rail without a name is `DEVICE:CHANNEL`."""
    fields = dict(re.findall(r"^(/\S*/ina3221x?/\S+/\w+):(.*)$", text, re.MULTILINE))
    rails = {}
    for path, value in fields.items():
        folder, _, field = path.rpartition("/")
        device = re.sub(r".*/ina3221x?/([^/]+)/.*", r"\1", folder)
        match = re.fullmatch(r"in(?:_power)?(\d)_input", field)
        amperes = fields.get(f"{folder}/curr{match[1]}_input") if match else None
        if match and "power" in field:
            name, watts = fields.get(f"{folder}/rail_name_{match[1]}"), int(value) * 1e-3
        elif match and amperes:
            name, watts = fields.get(f"{folder}/in{match[1]}_label"), int(value) * int(amperes) * 1e-6
        else:
            continue
        name = (name or f"{device}:{match[1]}").strip()
        if name != "NC":  # not connected
            rails[name] = watts
    return rails
