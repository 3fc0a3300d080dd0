"""The server process of the embedded board: an SSH server on loopback that runs commands as the user.

    python embedded_server.py FOLDER      FOLDER holds host_key, authorized_keys and home/

Prints the port it listens on. Ends when its standard input closes (its parent is gone), and takes
with it FOLDER and every process that was started through it, detached ones too. SIGUSR1 cuts every connection.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import asyncssh

PR_SET_CHILD_SUBREAPER = 36
connections: set[asyncssh.SSHServerConnection] = set()


class Server(asyncssh.SSHServer):
    """Keeps account of the connections, so that they can be cut."""

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn
        connections.add(conn)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        connections.discard(self._connection)


async def serve(folder: Path) -> None:
    """Serve until standard input closes."""
    home = folder / "home"
    environment = {key: os.environ[key] for key in ("PATH", "USER", "LOGNAME", "LANG", "TMPDIR") if key in os.environ}
    environment["HOME"] = str(home)

    async def handle(process: asyncssh.SSHServerProcess[bytes]) -> None:
        if process.command is None:
            process.stderr.write(b"no interactive shell here\n")
            process.exit(1)
            return
        child = await asyncio.create_subprocess_exec(
            "/bin/sh",
            "-c",
            process.command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=home,
            env=environment,
        )
        assert child.stdin is not None
        feeding = asyncio.create_task(feed(process.stdin, child.stdin))
        await asyncio.gather(pump(child.stdout, process.stdout), pump(child.stderr, process.stderr))
        code = await child.wait()
        feeding.cancel()
        process.exit(code if code >= 0 else 128 - code)

    server = await asyncssh.listen(
        "127.0.0.1",
        0,
        server_factory=Server,
        server_host_keys=[str(folder / "host_key")],
        authorized_client_keys=str(folder / "authorized_keys"),
        process_factory=handle,
        sftp_factory=True,
        encoding=None,
        line_editor=False,
    )
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, cut_connections)
    print(server.get_port(), flush=True)
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()


async def pump(reader: Any, writer: Any) -> None:
    """Pass bytes on until they end. Not asyncssh's own redirect: it stumbles over its pauses on a full pipe."""
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except (BrokenPipeError, ConnectionResetError, asyncssh.BreakReceived):
        return  # the other side wants no more


async def feed(reader: Any, writer: asyncio.StreamWriter) -> None:
    """Pass a command its input, and its end."""
    await pump(reader, writer)
    writer.close()


def cut_connections() -> None:
    """Drop every connection without a word."""
    for connection in list(connections):
        connection.abort()


def kill_descendants() -> None:
    """Kill the children of this process until there are none; orphans become its children."""
    while children := [pid for pid, parent, state in list_processes() if parent == os.getpid() and state != "Z"]:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        for pid in children:
            try:
                os.waitpid(pid, 0)
            except ChildProcessError:
                continue


def list_processes() -> list[tuple[int, int, str]]:
    """(id, parent, state) of every process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
        except OSError:
            continue  # gone in between
        found.append((int(folder.name), int(parent), state))
    return found


def main(argv: list[str]) -> int:
    libc: Any = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    folder = Path(argv[1])
    try:
        asyncio.run(serve(folder))
    finally:
        kill_descendants()
    shutil.rmtree(folder, ignore_errors=True)  # the parent may be gone without having done it
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
