"""What is adb's own; the battery that every transport passes is in test_device_session.py."""

from __future__ import annotations

import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from loopback.adb import AdbServer

from edgeprune.core.errors import ConnectionLost, UsageError
from edgeprune.core.records import Target
from edgeprune.device.targets import connect_target


def test_serial_is_pinned() -> None:
    server = AdbServer()
    with server as target:
        connect_target(target).run(["true"])
        assert set(server.services) == {"host:transport:emulator-5554", "shell,v2,raw:true"}
        other = replace(target, address={**target.address, "serial": "R58M123ABC"})
        with pytest.raises(ConnectionLost, match=r"R58M123ABC.*not found.*adb devices"):
            connect_target(other)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ({}, "needs serial"),
        ({"serial": "a b"}, "needs serial"),
        ({"serial": "x\nhost:kill"}, "needs serial"),
        ({"serial": "x", "port": "usb"}, "numbers"),
        ({"serial": "x", "user": "pi"}, "unknown user"),
    ],
)
def test_bad_address(address: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        connect_target(Target(name="phone", transport="adb", address=address))


def test_no_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ConnectionLost, match="adb start-server"):
        connect_target(Target(name="phone", transport="adb", address={"serial": "x", "port": port}))


def test_device_that_is_too_old() -> None:
    server = AdbServer()
    with server as target:
        server.old = True
        with pytest.raises(ConnectionLost, match="Android 7 or newer"):
            connect_target(target)


def test_device_that_does_not_trust_us_is_not_waited_for() -> None:
    server = AdbServer()
    with server as target:
        transport = connect_target(target)
        server.refusal = "device unauthorized.\nThis adb server's $ADB_VENDOR_KEYS is not set"
        before = len(server.services)
        with pytest.raises(ConnectionLost, match="confirm the question on its screen"):
            transport.run(["true"])
        assert server.services[before:] == ["host:transport:emulator-5554"]


def test_device_that_comes_back_is_waited_for() -> None:
    server = AdbServer()
    with server as target:
        transport = connect_target(target)
        server.refusal = "device offline"
        threading.Timer(0.5, setattr, (server, "refusal", "")).start()
        assert transport.run(["echo", "back"]).stdout == b"back\n"


def test_device_that_does_not_come_back(tmp_path: Path) -> None:
    server = AdbServer()
    with server as target:
        transport = connect_target(replace(target, address={**target.address, "patience_s": 0.3}))
        server.refusal = "device offline"
        with pytest.raises(ConnectionLost, match=r"device offline.*run the same command again"):
            transport.read("/proc/stat")


@pytest.mark.parametrize("cut_after", [2, 10, 70_000, 300_000])
def test_cut_while_a_file_comes(cut_after: int, tmp_path: Path) -> None:
    content = bytes(range(256)) * 2000
    (tmp_path / "there").write_bytes(content)
    server = AdbServer()
    with server as target:
        transport = connect_target(target)
        server.cut_after = cut_after
        transport.get(str(tmp_path / "there"), tmp_path / "here")
        assert server.cut_after is None
    assert (tmp_path / "here").read_bytes() == content
    assert {path.name for path in tmp_path.iterdir()} == {"here", "there"}


def test_device_that_is_full_says_so(tmp_path: Path) -> None:
    server = AdbServer()
    (tmp_path / "here").write_bytes(bytes(5_000_000))
    with server as target:
        transport = connect_target(target)
        server.disk_full = True
        with pytest.raises(OSError, match="No space left"):
            transport.put(tmp_path / "here", str(tmp_path / "there"), lambda count: None)
    assert not (tmp_path / "there").exists()


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with AdbServer() as target, pytest.raises(FileNotFoundError):
        connect_target(target).write(f"{tmp_path}/absent/file", b"x")
