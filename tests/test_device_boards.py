"""Board facts: pure parsers on recorded text, and whole boards replayed from recordings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeprune.core.arena import channel_block
from edgeprune.core.errors import DeviceError, UsageError
from edgeprune.core.family import list_members, load_member
from edgeprune.core.records import BoardFacts, Target
from edgeprune.device import procfs
from edgeprune.device.boards import MOMENTARY, linux, raspberry_pi
from edgeprune.device.facts import gather_facts
from edgeprune.device.sources import section_script, split_sections
from edgeprune.device.targets import connect_target
from edgeprune.device.transports.replay import Recorder

FIXTURES = Path(__file__).parent / "fixtures"


def replayed(recording: str, board: str) -> BoardFacts:
    target = Target(name="lab", board=board, transport="replay", address={"file": str(FIXTURES / recording)})
    return gather_facts(target, connect_target(target)).facts


def test_raspberry_pi_4_that_is_ready() -> None:
    facts = replayed("raspberry_pi/pi4-ready.json", "raspberry_pi")
    assert facts == BoardFacts(
        arch="aarch64",
        system="Debian GNU/Linux 12 (bookworm)",
        model="Raspberry Pi 4 Model B Rev 1.2",
        cpu="Cortex-A72",
        cpus=4,
        ram_bytes=3884276 * 1024,
        ram_free_bytes=3301240 * 1024,
        disk_free_bytes=23880308 * 1024,
        governor="ondemand",
        freq_hz=1500398464.0,
        temp_c=48.3,
        throttled="",
        python="3.11.2",
        runtimes={"onnxruntime": "1.23.2"},
    )


def test_raspberry_pi_5_that_is_hot_and_bare() -> None:
    facts = replayed("raspberry_pi/pi5-throttled-bare.json", "raspberry_pi")
    assert facts.cpu == "Cortex-A76"
    assert facts.throttled == "frequency capped, throttled, soft temperature limit"
    assert facts.runtimes == {}
    assert facts.missing == ("onnxruntime: edgeprune targets setup lab",)


def test_what_the_firmware_does_not_say_is_none() -> None:
    facts = replayed("raspberry_pi/pi4-no-firmware-access.json", "raspberry_pi")
    assert (facts.freq_hz, facts.temp_c, facts.throttled, facts.governor, facts.python) == (None,) * 5
    assert facts.missing[0].startswith("Python 3.9 or newer: ")


def test_virtual_machine_has_no_sensors() -> None:
    facts = replayed("linux/debian12-vm.json", "linux")
    assert (facts.arch, facts.cpu, facts.cpus) == ("x86_64", "AMD EPYC", 2)
    assert (facts.governor, facts.freq_hz, facts.temp_c, facts.throttled) == (None,) * 4
    assert facts.missing == ("onnxruntime: edgeprune targets setup lab",)


def test_recording_gives_the_same_facts(tmp_path: Path) -> None:
    target = Target(name="here", transport="local")
    recorder = Recorder(connect_target(target))
    facts = gather_facts(target, recorder).facts
    recorder.save(tmp_path / "here.json")
    replay = Target(name="here", transport="replay", address={"file": str(tmp_path / "here.json")})
    assert gather_facts(replay, connect_target(replay)).facts == facts


def test_recording_answers_only_what_it_heard(tmp_path: Path) -> None:
    target = Target(name="lab", transport="replay", address={"file": str(FIXTURES / "raspberry_pi/pi4-ready.json")})
    with pytest.raises(DeviceError, match="no answer to"):
        connect_target(target).run(["reboot"])
    absent = Target(name="lab", transport="replay", address={"file": str(tmp_path / "absent.json")})
    with pytest.raises(UsageError, match=r"absent\.json"):
        connect_target(absent)


@pytest.mark.parametrize("name", list_members("device.boards"))
def test_every_board_keeps_the_contract(name: str) -> None:
    board = load_member("device.boards", name)
    assert set(MOMENTARY) <= set(board.FACTS) <= set(BoardFacts.__dataclass_fields__)
    for fact in board.FACTS.values():
        assert fact.source.argv or fact.source.files
        assert fact.parse("") is None
        free_text = fact.source.argv[:1] in {("uname",), ("cat",)}
        assert free_text or fact.parse("bash: command not found") is None
    assert board.find_throttling("", "") is None


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("throttled=0x0", "throttled=0x0", ""),
        ("throttled=0x0", "throttled=0x50005", "under-voltage, throttled"),
        ("throttled=0x20002", "throttled=0x20000", "frequency capped"),
        ("throttled=0x0", "throttled=0x40000", "throttled"),  # came and went in between
        ("throttled=0xf0000", "throttled=0xf0000", ""),  # long ago
        ("throttled=0x0", "VCHI initialization failed", None),
    ],
)
def test_raspberry_pi_throttling(before: str, after: str, expected: str | None) -> None:
    assert raspberry_pi.find_throttling(before, after) == expected


def test_linux_throttling_counts_events() -> None:
    before = "/sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count:3\n/sys/x/package_throttle_count:0"
    assert linux.find_throttling(before, before) == ""
    assert linux.find_throttling(before, before.replace(":3", ":5")) == "2 thermal throttling events"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("temp=48.3'C", 48.3),
        ("temp=-5.0'C", -5.0),
        ('error=1 error_msg="Command not registered"', None),
    ],
)
def test_firmware_temperature(text: str, expected: float | None) -> None:
    assert raspberry_pi.parse_temperature(text) == expected


def test_thermal_zone_of_the_cpu_is_found() -> None:
    zones = "/sys/class/thermal/thermal_zone{}/{}:{}"
    lines = [
        zones.format(0, "type", "gpu-thermal"),
        zones.format(1, "type", "cpu-thermal"),
        zones.format(0, "temp", "71000"),
        zones.format(1, "temp", "48312"),
    ]
    assert procfs.parse_thermal_zones("\n".join(lines)) == 48.312
    unnamed = [zones.format(i, "temp", value) for i, value in enumerate(("-256000", "41000", "0", "39000"))]
    assert procfs.parse_thermal_zones("\n".join(unnamed)) == 41.0


def cpuinfo(*parts: str, implementer: str = "0x41") -> str:
    return "\n".join(f"CPU implementer\t: {implementer}\nCPU variant\t: 0x0\nCPU part\t: {part}\n" for part in parts)


def test_big_little_names_both_kinds() -> None:
    assert procfs.parse_cpu(cpuinfo("0xd03", "0xd08", "0xd03")) == "Cortex-A53 + Cortex-A72"
    assert procfs.parse_cpu(cpuinfo("0xfff")) == "ARM part 0xfff of 0x41"
    tx2 = cpuinfo("0xd07") + cpuinfo("0x003", implementer="0x4e")
    assert procfs.parse_cpu(tx2) == "Cortex-A57 + NVIDIA Denver 2"


def test_32_bit_kernels_name_the_architecture() -> None:
    """The part says more than "ARMv7 Processor rev 4 (v7l)", which every 32-bit ARM board is."""
    name = "model name\t: ARMv7 Processor rev 4 (v7l)\nBogoMIPS\t: 38.40\n"
    assert procfs.parse_cpu(name + cpuinfo("0xd03")) == "Cortex-A53"
    old = "Processor\t: ARMv6-compatible processor rev 7 (v6l)\nBogoMIPS\t: 697.95\n"
    assert procfs.parse_cpu(old + cpuinfo("0xb76")) == "ARM1176"
    assert procfs.parse_cpu(old) == "ARMv6-compatible processor rev 7 (v6l)"


def test_vector_instructions_are_part_of_the_name_of_a_processor() -> None:
    """Virtual machines of one name have them or not, and the runtime stores channels in other blocks with them."""
    text = "model name\t: Intel(R) Xeon(R) Processor @ 2.50GHz\nflags\t\t: fpu avx2 avx512f avx512dq\n"
    name = procfs.parse_cpu(text)
    assert name == "Intel(R) Xeon(R) Processor @ 2.50GHz, AVX-512" and channel_block("x86_64", name) == 16
    name = procfs.parse_cpu(text.replace("avx512f ", ""))
    assert name == "Intel(R) Xeon(R) Processor @ 2.50GHz" and channel_block("x86_64", name) == 8
    assert channel_block("aarch64", "Cortex-A72") == 1


def test_disk_free_of_long_and_odd_names() -> None:
    head = "Filesystem 1024-blocks Used Available Capacity Mounted on\n"
    assert procfs.parse_disk_free(head + "//server/a b 100 60 40 60% /mnt/a b\n") == 40 * 1024
    assert procfs.parse_disk_free(head + "/dev/root 100 100 -5 105% /\n") == 0
    assert procfs.parse_disk_free("df: no such file") is None


def test_noise_of_a_login_shell_is_dropped() -> None:
    answer = b"Welcome!\n\xff\xfe motd \n\n@@edgeprune@@ arch\naarch64\n\n@@edgeprune@@ end\n"
    assert split_sections(answer, "x") == {"arch": "aarch64", "end": ""}
    with pytest.raises(DeviceError, match="broke off"):
        split_sections(b"\n@@edgeprune@@ arch\naarch", "target x")


def test_sections_come_through_a_real_shell() -> None:
    local = connect_target(Target(name="here", transport="local"))
    script = section_script({"a": "echo one; echo two", "b": "false; cat", "c": "echo noise >&2; printf end"})
    output = local.run(["sh", "-s"], stdin=script).stdout
    assert split_sections(output, "x") == {"a": "one\ntwo", "b": "", "c": "end", "end": ""}


def test_fixtures_are_json() -> None:
    for path in FIXTURES.glob("*/*.json"):
        assert json.loads(path.read_text())
