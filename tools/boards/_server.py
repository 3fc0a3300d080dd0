"""What the boards' SSH servers have in common: a free port, waiting for the banner, the target to reach it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from edgeprune.core.errors import DeviceError


def free_port() -> int:
    """A TCP port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for_banner(port: int, process: subprocess.Popen[Any], log: Path, seconds: float) -> None:
    """Until an SSH server says who it is. raises: DeviceError with the end of the log."""
    deadline = time.monotonic() + seconds
    patience = 2.0
    while time.monotonic() < deadline and process.poll() is None:
        # An emulator accepts before the machine in it does: only what is said counts.
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=patience) as link:
            if link.recv(4) == b"SSH-":
                return
        time.sleep(0.05)
        patience *= 1.2  # on a busy machine it answers late, and later still when asked again and again
    state = "ended" if process.poll() is not None else f"said nothing on port {port} in {seconds:g} s"
    raise DeviceError(f"the board's SSH server {state}; {log} ends: {log.read_text(errors='replace')[-600:]}")


def ssh_address(
    folder: Path, port: int, user: str, *, host_key: Path, client_key: Path, **more: object
) -> dict[str, Any]:
    """A target's [address] for a server on loopback; its known_hosts file is written into `folder`."""
    kind, key, *_ = host_key.read_text().split()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {kind} {key}\n")
    return {
        "host": "127.0.0.1", "port": port, "user": user, "key": str(client_key),
        "known_hosts": str(folder / "known_hosts"), "config": os.devnull, **more,
    }  # fmt: skip


def end(process: subprocess.Popen[Any]) -> None:
    """Ask a process to end, make it when it does not, and collect it."""
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def die_with_parent() -> None:
    """In a child about to become another program: be killed when the thread that made us ends (prctl(2))."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    os.setpgid(0, 0)  # Ctrl-C is for the parent, who then ends the board
