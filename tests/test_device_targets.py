"""The inventory: TOML files, what may be wrong with them, and what fits on a board."""

from __future__ import annotations

import ensurepip
import os
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from edgeprune.core.errors import BoardNotReady, ConnectionLost, DeviceError, UnknownMember, UsageError
from edgeprune.core.records import BoardFacts, Target
from edgeprune.device.embedded import EmbeddedBoard
from edgeprune.device.facts import Board
from edgeprune.device.install import choose_wheels, download_wheels, platform_tags
from edgeprune.device.runtimes import onnxruntime as runtime
from edgeprune.device.runtimes import tflite
from edgeprune.device.targets import check_target, list_targets, load_target, read_target, setup_target
from edgeprune.device.transports._ssh_address import resolve_address


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def test_shipped_targets_can_be_read() -> None:
    for path in list_targets().values():
        assert read_target(path).description
    assert {"localhost", "raspberry-pi-4", "raspberry-pi-5"} <= list_targets().keys()


def test_first_directory_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("named", "work/targets"):
        (tmp_path / folder).mkdir(parents=True)
    write(tmp_path / "named", "localhost", 'transport = "local"\ndescription = "named"\n')
    write(tmp_path / "work" / "targets", "localhost", 'transport = "local"\ndescription = "working directory"\n')
    monkeypatch.chdir(tmp_path / "work")
    assert load_target("localhost").description == "working directory"
    monkeypatch.setenv("EDGEPRUNE_TARGETS", str(tmp_path / "named"))
    assert load_target("localhost").description == "named"


@pytest.mark.parametrize("name", ["nowhere", "../localhost", "$(touch pwned)", "", "local*"])
def test_unknown_target_lists_the_known(name: str, tmp_path: Path) -> None:
    write(tmp_path, "lab", 'transport = "local"')
    with pytest.raises(UnknownMember, match=r"unknown target .*; known: lab\."):
        load_target(name, [tmp_path])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("board = ", "not TOML"),
        ("board = 3", r"board"),
        ('board = "toaster"', r"unknown board 'toaster'; known: android, jetson, linux, raspberry_pi"),
        ('transport = "pigeon"', "known: adb, local, replay, ssh"),
        ('runtime = "tpu"', "unknown runtime 'tpu'; known: onnxruntime, t"),
        ('runtime = "onnxruntime:threads=2"', "'threads' is not an option of the runtime onnxruntime; known: none"),
        ('meter = "gas"', "unknown meter 'gas'; known: android_battery, command, hwmon"),
        ('meter = "rapl:core=1"', "'core' is not an option of rapl; known: domain"),
        ('meter = "tegrastats:interval_ms=0"', "readings every 0 s"),
        ('meter = "command:"', "needs a program"),
        ('meter = "command:it\'s"', "No closing quotation"),
        ('bord = "linux"', "unknown key bord; known: address, board"),
        ("threads = 0", "at least 1"),
        ('threads = "two"', "threads"),
        ('workdir = "a\\nb"', "workdir"),
        ('workdir = ""', "workdir"),
    ],
)
def test_bad_file_is_one_clear_sentence(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, "lab", text)
    with pytest.raises(UsageError, match=message) as caught:
        read_target(path)
    assert "lab.toml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ({}, "needs host"),
        ({"host": "-oProxyCommand=touch pwned"}, "needs host"),
        ({"host": "x", "port": "twenty-two"}, "numbers"),
        ({"host": "x", "password": "hunter2"}, "unknown password"),
        ({"host": "x", "key": "/nowhere/key"}, "no key file /nowhere/key"),
    ],
)
def test_bad_address(address: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        resolve_address(address, name="lab")
    assert "hunter2" not in str(caught.value)


def test_alias_of_the_ssh_configuration(tmp_path: Path) -> None:
    (tmp_path / "key").touch()
    (tmp_path / "config").write_text(
        f"Host kitchen\n HostName 192.0.2.7\n Port 2222\n User pi\n IdentityFile {tmp_path}/key\n ProxyJump gate:23\n"
        f" UserKnownHostsFile {tmp_path}/known\n"
    )
    found = resolve_address({"host": "kitchen", "config": str(tmp_path / "config")}, name="lab")
    assert (found.host, found.port, found.user) == ("192.0.2.7", 2222, "pi")
    assert found.keys == (str(tmp_path / "key"),)
    assert found.known_hosts == (tmp_path / "known",)
    assert found.proxy == "ssh -W 192.0.2.7:2222 -- gate:23"
    over = resolve_address({"host": "kitchen", "user": "root", "port": 22, "config": os.devnull}, name="lab")
    assert (over.host, over.port, over.user) == ("kitchen", 22, "root")


def test_local_transport_takes_no_address() -> None:
    with pytest.raises(UsageError, match="takes no address"):
        check_target(Target(name="lab", transport="local", address={"host": "x"}))


def test_server_that_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=lambda: server.accept()[0].recv(1), daemon=True)
        thread.start()
        address = {"host": "127.0.0.1", "port": server.getsockname()[1], "timeout_s": 0.5, "config": os.devnull}
        with pytest.raises(ConnectionLost, match="cannot be reached"):
            check_target(Target(name="lab", address=address))


# --- setting a board up --------------------------------------------------------------------------

LAB = Target(name="lab")
READY = Board(
    facts=BoardFacts(arch="aarch64", disk_free_bytes=2**33),
    python="/usr/bin/python3",
    python_version=(3, 11, 2),
    workdir="/home/pi/.edgeprune",
    libc="glibc 2.36",
)


def test_tags_of_a_raspberry_pi() -> None:
    assert choose_wheels(LAB, READY, runtime.WHEELS) == (("onnxruntime>=1.19,<2", "numpy>=1.26,<3"), (2, 36))
    tags = platform_tags("aarch64", (2, 28))
    assert tags[0] == "manylinux_2_28_aarch64"
    assert tags[-2:] == ["manylinux_2_17_aarch64", "manylinux2014_aarch64"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"facts": BoardFacts(arch="armv7l")}, "no onnxruntime wheels for armv7l.*64-bit"),
        ({"libc": "/lib/ld-musl-aarch64.so.1"}, "need glibc"),
        ({"libc": "glibc 2.24"}, r"needs glibc 2\.27, the board has 2\.24"),
        ({"python": None, "facts": BoardFacts(arch="aarch64", missing=("Python 3.9",))}, "lacks Python"),
        ({"facts": BoardFacts(arch="aarch64", disk_free_bytes=2**20)}, "needs 400 MiB .* has 1 MiB"),
    ],
)
def test_board_that_cannot_have_the_runtime(change: dict[str, object], message: str) -> None:
    with pytest.raises(BoardNotReady, match=message):
        choose_wheels(LAB, replace(READY, **change), runtime.WHEELS)


@pytest.mark.parametrize(
    ("arch", "python", "libc", "chosen"),
    [
        ("aarch64", (3, 11, 2), "glibc 2.36", "ai-edge-litert==2.3.0"),
        ("aarch64", (3, 13, 0), "glibc 2.27", "ai-edge-litert==2.3.0"),
        ("armv7l", (3, 11, 2), "glibc 2.36", "tflite-runtime==2.14.0"),
        ("aarch64", (3, 9, 2), "glibc 2.36", "tflite-runtime==2.14.0"),
        ("aarch64", (3, 9, 2), "glibc 2.31", "tflite-runtime==2.13.0"),
    ],
)
def test_tflite_has_a_package_for_most_boards(arch: str, python: tuple[int, ...], libc: str, chosen: str) -> None:
    board = replace(READY, facts=replace(READY.facts, arch=arch), python_version=python, libc=libc)
    requirements, _ = choose_wheels(replace(LAB, runtime="tflite:delegate=none"), board, tflite.WHEELS)
    assert requirements[0] == chosen
    assert ("<2" in requirements[1]) == chosen.startswith("tflite")


@pytest.mark.parametrize(
    ("arch", "python", "libc", "message"),
    [
        ("riscv64", (3, 11, 2), "glibc 2.36", "no tflite wheels for riscv64, only for x86_64, aarch64, armv7l"),
        ("armv7l", (3, 13, 0), "glibc 2.41", r"needs Python 3\.9 to 3\.11 or .* on armv7l, the board has 3\.13"),
        ("armv7l", (3, 11, 2), "glibc 2.31", r"needs glibc 2\.34, the board has 2\.31"),
    ],
)
def test_board_that_cannot_have_tflite(arch: str, python: tuple[int, ...], libc: str, message: str) -> None:
    board = replace(READY, facts=replace(READY.facts, arch=arch), python_version=python, libc=libc)
    with pytest.raises(BoardNotReady, match=message):
        choose_wheels(replace(LAB, runtime="tflite"), board, tflite.WHEELS)


def write_wheel(folder: Path, name: str, version: str) -> None:
    """A wheel of one module that knows its version."""
    information = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"__version__ = {version!r}\n")
        wheel.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")


@pytest.mark.slow
def test_board_is_set_up_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real pip and venv, with an index of two small wheels in place of the real, large ones."""
    bundled = [
        *Path(ensurepip.__file__).parent.glob("_bundled/pip-*.whl"),
        *Path("/usr/share").glob("python-wheels/pip-*"),
    ]
    if not bundled:
        pytest.skip("this Python came without pip's wheel")
    index = tmp_path / "index"
    index.mkdir()
    shutil.copy(bundled[0], index)
    write_wheel(index, "onnxruntime", "1.99.0")
    write_wheel(index, "numpy", "2.99.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    with EmbeddedBoard() as embedded:
        workdir = tmp_path / "work dir"
        target = replace(embedded, python=str(tmp_path / "bare" / "bin" / "python"), workdir=str(workdir))
        assert check_target(target).missing == ("onnxruntime and numpy: edgeprune targets setup embedded",)
        told: list[str] = []
        facts = setup_target(target, offline=True, progress=lambda what, done, total: told.append(what))
    assert facts.runtimes == {"onnxruntime": "1.99.0"}
    assert facts.missing == ()
    assert told[-1] == "target embedded: ready"
    assert not (workdir / "venv" / "wheels").exists()


def test_pip_that_finds_nothing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        DeviceError, match=r"cannot download onnxruntime.* for aarch64, Python 3\.11, glibc 2\.36 .*ERROR"
    ):
        download_wheels(runtime.WHEELS[0]["requirements"], READY, (2, 36), tmp_path)


def test_device_package_imports_nothing_heavy() -> None:
    program = (
        "import sys, edgeprune.device, edgeprune.device.session, edgeprune.device.targets\n"
        "print([name for name in ('torch', 'onnx', 'onnxruntime', 'paramiko', 'asyncssh') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
