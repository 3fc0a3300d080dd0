"""OpenSSH's own server as a board: loopback, a free port, fresh keys, the current user."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from edgeprune.core.records import Target

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")

CONFIG = """
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
PidFile {folder}/sshd.pid
AuthorizedKeysFile {folder}/client_key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
AllowUsers {user}
UseDNS no
"""
SFTP = "Subsystem sftp internal-sftp\n"


@contextlib.contextmanager
def openssh_board(folder: Path, *, sftp: bool = True) -> Iterator[Target]:
    """A target that is reached through a real sshd, which lives as long as the block."""
    assert SSHD is not None
    for name in ("host_key", "client_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    user = getpass.getuser()
    config = CONFIG.format(port=port, folder=folder, user=user) + (SFTP if sftp else "")
    (folder / "sshd_config").write_text(config)
    if os.geteuid() == 0:
        # Where sshd drops privileges to; a service manager would have made it.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    with (folder / "sshd.log").open("w") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
    try:
        wait_for_port(port, server)
        kind, key, *_ = (folder / "host_key.pub").read_text().split()
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {kind} {key}\n")
        yield Target(
            name="openssh",
            address={
                "host": "127.0.0.1",
                "port": port,
                "user": user,
                "key": str(folder / "client_key"),
                "known_hosts": str(folder / "known_hosts"),
                "config": os.devnull,
            },
            python=sys.executable,
        )
    finally:
        server.terminate()
        server.wait(timeout=10)


def wait_for_port(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        assert server.poll() is None, "sshd ended"
        time.sleep(0.02)
    raise AssertionError("sshd does not listen")
