"""Board facts and power from recorded outputs of several generations, and the recorder that makes such recordings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import record_board

from edgeprune.core.errors import DeviceError, UsageError
from edgeprune.core.family import list_members, load_member
from edgeprune.device.boards import android, jetson
from edgeprune.device.meters import Meter, open_meter, total_watts
from edgeprune.device.meters.command import parse_lines
from edgeprune.device.meters.rapl import power_between
from edgeprune.device.results import read_power
from edgeprune.device.targets import list_targets, read_target

FIXTURES = Path(__file__).parent / "fixtures"
RECORDED = sorted(path.parent.relative_to(FIXTURES) for path in FIXTURES.glob("*/*/expected.json"))


@pytest.mark.parametrize("folder", RECORDED, ids=str)
def test_recorded_board(folder: Path) -> None:
    expected = json.loads((FIXTURES / folder / "expected.json").read_text())
    found = record_board.parse_folder(FIXTURES / folder, expected["board"], list(expected["meters"]))
    assert found["facts"] == expected["facts"]
    assert found["meters"].keys() == expected["meters"].keys()
    for meter, watts in expected["meters"].items():
        assert found["meters"][meter] == (watts if isinstance(watts, str) else pytest.approx(watts))


def test_generations_are_there() -> None:
    kinds = [folder.parts[0] for folder in RECORDED]
    assert all(kinds.count(kind) >= 3 for kind in list_members("device.boards"))


def test_recorded_power_agrees_with_itself() -> None:
    """tegrastats and sysfs tell of the same board at nearly the same moment."""
    for folder in ("orin-nano-r36", "agx-orin-r35"):
        watts = json.loads((FIXTURES / "jetson" / folder / "expected.json").read_text())["meters"]
        assert watts["tegrastats"][0] == pytest.approx(watts["ina3221"][0], rel=0.01)


# --- meters ---------------------------------------------------------------------------------------

MADE = {"command": "echo"}


@pytest.mark.parametrize("name", list_members("device.meters"))
def test_every_meter_keeps_the_contract(name: str) -> None:
    meter = open_meter(f"{name}:{MADE.get(name, '')}")
    if name == "none":
        assert meter is None
        return
    assert isinstance(meter, Meter)
    assert bool(meter.source.argv) != bool(meter.source.files)
    assert not meter.stream or meter.source.argv
    assert meter.hint
    for text in ("", "command not found", "VCHI initialization failed", "{}", "nan", "\x00\xff"):
        assert meter.watts([(0.0, text), (1.0, text)]) == []
    assert (load_member("device.meters", name).__doc__ or "").count("source:") or name in ("command", "none")


def test_options_are_checked() -> None:
    for text, message in {
        "rapl:core=1": "'core' is not an option of rapl; known: domain",
        "pmic:wall=maybe": "expected bool",
        "android_battery:source=usb": "known: termux, dumpsys",
        "tegrastats:interval_ms=0": "0.001 to 10 s",
        "none:x=1": "not an option",
    }.items():
        with pytest.raises(UsageError, match=message):
            open_meter(text)


def test_rails_are_added_or_chosen() -> None:
    rails = {"VDD_IN": 5.0, "CPU": 2.0, "GPU": 1.0}
    assert total_watts(rails, "", ["VDD_IN"]) == 5.0
    assert total_watts(rails, "") == 8.0
    assert total_watts(rails, "CPU+GPU", ["VDD_IN"]) == 3.0
    assert total_watts(rails, "CPU+NPU") is None
    assert total_watts({}, "") is None


def test_counter_that_wraps_or_misses_a_reading() -> None:
    def reading(energy: int) -> str:
        zone = "/sys/class/powercap/intel-rapl:0"
        return f"{zone}/name:package-0\n{zone}/energy_uj:{energy}\n{zone}/max_energy_range_uj:10000000"

    readings = [(0.0, reading(9_000_000)), (1.0, ""), (2.0, reading(1_000_000)), (3.0, reading(4_000_000))]
    assert power_between(readings, ["package"]) == [(1.0, pytest.approx(1.0)), (2.5, pytest.approx(3.0))]
    assert power_between(readings, ["psys"]) == []
    assert power_between(readings[:1], ["package"]) == []


def test_counter_that_only_root_may_read_says_so() -> None:
    """Since Linux 5.10 energy_uj is not readable: the other files alone tell nothing."""
    zone = "/sys/class/powercap/intel-rapl:0"
    readings = [[0.1 * i, f"{zone}/name:package-0\n{zone}/max_energy_range_uj:262143328850"] for i in range(50)]
    value = {"readings": readings, "idle": [[0.0, 2.0]], "active": [2.0, 5.0], "runs": 10}
    with pytest.raises(DeviceError, match=r"0 readings at rest and 0 in the loop.*energy_uj readable"):
        read_power(value, open_meter("rapl"))


def test_charging_battery_is_no_meter() -> None:
    text = (FIXTURES / "linux" / "laptop-charging" / "meter-power_supply.txt").read_text()
    value = {"readings": [[0.1 * i, text] for i in range(50)], "idle": [[0.0, 2.0]], "active": [2.0, 5.0], "runs": 10}
    with pytest.raises(DeviceError, match=r"BAT0 is not discharging \(Charging\); unplug"):
        read_power(value, open_meter("power_supply"))


def test_line_protocol() -> None:
    lines = ["# INA219 at 0x40", "4.87", "4.5 W of the board", "", "nan", "inf", "watts 3", "-0.01"]
    assert parse_lines([(float(i), line) for i, line in enumerate(lines)]) == [(1.0, 4.87), (2.0, 4.5), (7.0, -0.01)]


def test_line_protocol_with_the_meters_own_clock() -> None:
    """Lines that arrive late, in clumps, keep the distances that the meter gave them."""
    arrivals = [(100.30, "7.0 1"), (100.31, "7.1 2"), (100.32, "7.2 3"), (100.50, "7.3 4")]
    times = [time_s for time_s, _ in parse_lines(arrivals)]
    assert times == pytest.approx([93.12 + own for own in (7.0, 7.1, 7.2, 7.3)])


# --- boards ---------------------------------------------------------------------------------------


def test_power_mode_is_part_of_the_governor() -> None:
    governor = "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor:schedutil\n"
    assert jetson.parse_governor(governor + "NV Power Mode: 15W\n0") == "schedutil, 15W"
    assert jetson.parse_governor(governor) == "schedutil"
    assert jetson.parse_governor("NVPM VERB: config\nNV Power Mode: MODE_15W_6CORE\n2") == "MODE_15W_6CORE"


def test_source_of_files_and_a_command_is_one_line_of_shell() -> None:
    script = jetson.FACTS["governor"].source.script()
    assert script == "grep -sH '' /sys/devices/system/cpu/cpu0/cpufreq/scaling_governor; nvpmodel -q"


def test_jetson_throttling() -> None:
    before = "/sys/class/hwmon/hwmon2/oc1_event_cnt:3\n/sys/class/hwmon/hwmon2/oc3_event_cnt:0"
    assert jetson.find_throttling(before, before) == ""
    assert jetson.find_throttling(before, before.replace(":0", ":2")) == "2 over-current events"


def test_android_throttling() -> None:
    assert android.find_throttling("Thermal Status: 0", "Thermal Status: 2") == "thermal status moderate"
    assert android.find_throttling("Thermal Status: 0", "Permission Denial") is None


# --- targets --------------------------------------------------------------------------------------


def test_target_of_every_board_and_its_meter() -> None:
    targets = [read_target(path) for name, path in list_targets([FIXTURES.parents[1] / "targets"]).items()]
    assert {target.board for target in targets} == set(list_members("device.boards"))
    assert {"ssh", "adb", "local"} == {target.transport for target in targets}
    assert all(target.ram_bytes is None or target.ram_bytes >= 2**28 for target in targets)


# --- the recorder ---------------------------------------------------------------------------------


def test_recorded_folder_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "here.toml").write_text('transport = "local"\nboard = "linux"\n')
    monkeypatch.setenv("EDGEPRUNE_TARGETS", str(tmp_path / "targets"))
    meter = "command:sh -c 'while sleep 0.1; do echo 0.5; done'"
    done = subprocess.run(
        [sys.executable, record_board.__file__, "here", str(tmp_path / "new"), "--meter", meter, "--meter", "hwmon"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    expected = json.loads((tmp_path / "new" / "expected.json").read_text())
    assert json.loads(done.stdout) == expected
    assert expected["facts"]["arch"] and expected["facts"]["ram_bytes"] > 0
    assert set(expected["meters"][meter]) == {0.5}
    assert record_board.parse_folder(tmp_path / "new", "linux", list(expected["meters"])) == expected
    texts = record_board.split_readings((tmp_path / "new" / "meter-hwmon.txt").read_text(), 0.1)
    assert len(texts) == record_board.READINGS and sorted(texts) == texts


def test_recorder_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert record_board.main(["no such board", str(tmp_path)]) == 2
    assert "unknown target 'no such board'" in capsys.readouterr().err


def test_secrets_are_taken_out() -> None:
    text = "Serial\t\t: 10000000deadbeef\nModel\t: Pi\nwlan0 dc:a6:32:01:23:45 10.1.2.3 kitchen kitchens at kitchen."
    clean = record_board.scrub(text, ["kitchen"])
    assert "deadbeef" not in clean and "dc:a6" not in clean and "10.1.2.3" not in clean
    assert clean.endswith("board kitchens at board.") and "Model\t: Pi" in clean


def test_recording_through_a_board_kind_keeps_what_parsers_read() -> None:
    """Taking secrets out changes no fact and no watt of any fixture."""
    for folder in RECORDED:
        for path in (FIXTURES / folder).glob("*.txt"):
            text = path.read_text()
            assert record_board.scrub(text, []) == text, path
