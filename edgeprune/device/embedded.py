"""The embedded board: a stand-in for a board, on this machine, behind a real SSH server on loopback."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

import paramiko

from edgeprune.core.errors import DeviceError
from edgeprune.core.family import MissingLibrary
from edgeprune.core.records import Target

SERVER = Path(__file__).with_name("embedded_server.py")
USER = "edgeprune"


class EmbeddedBoard:
    """A board that lives as long as the `with` block, and gives the target that reaches it.

    It listens on 127.0.0.1 at a free port, with host and client keys made for this one run. Commands
    run as the user, in a scratch folder that is deleted at the end, with this Python.

        with EmbeddedBoard() as target, open_session(target) as session:
            ...
    """

    def __init__(self, *, name: str = "embedded", threads: int = 1) -> None:
        self._name = name
        self._threads = threads
        self._folder: Path | None = None
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> Target:
        """Start the server. raises: MissingLibrary; DeviceError when it does not start."""
        if importlib.util.find_spec("asyncssh") is None:
            raise MissingLibrary("the embedded board needs asyncssh: pip install 'edgeprune[demo]'")
        self._folder = folder = Path(tempfile.mkdtemp(prefix="edgeprune-board-"))
        try:
            (folder / "home").mkdir()
            host_key = _write_key(folder / "host_key")
            client_key = _write_key(folder / "client_key")
            (folder / "authorized_keys").write_text(f"{client_key}\n")
            with (folder / "server.log").open("w") as log:
                # -P: the server's own folder is full of modules that would shadow others.
                self._server = subprocess.Popen(
                    [sys.executable, "-P", str(SERVER), str(folder)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    start_new_session=True,
                )
            assert self._server.stdout is not None
            port = self._server.stdout.readline().strip()
            if not port:
                raise DeviceError(f"the embedded board did not start: {(folder / 'server.log').read_text()[-500:]}")
            (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}\n")
        except BaseException:
            self.close()
            raise
        return Target(
            name=self._name,
            board="linux",
            transport="ssh",
            address={
                "host": "127.0.0.1",
                "port": int(port),
                "user": USER,
                "key": str(folder / "client_key"),
                "known_hosts": str(folder / "known_hosts"),
                "config": os.devnull,
            },
            threads=self._threads,
            python=sys.executable,
            description="this machine behind an SSH server on loopback",
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def cut_connections(self) -> None:
        """Cut every connection at once, as a network that fails would; the board goes on."""
        assert self._server is not None
        self._server.send_signal(signal.SIGUSR1)

    def close(self) -> None:
        """Stop the server and all that was started through it, and delete the scratch folder."""
        server, self._server = self._server, None
        if server is not None:
            assert server.stdin is not None
            assert server.stdout is not None
            server.stdin.close()
            try:
                server.wait(timeout=10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
            server.stdout.close()
        folder, self._folder = self._folder, None
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _write_key(path: Path) -> str:
    """Make an ECDSA key pair, write the private key for its owner only, and return the public line."""
    key = paramiko.ECDSAKey.generate()
    path.touch(mode=0o600)
    key.write_private_key_file(str(path))
    return f"{key.get_name()} {key.get_base64()}"
