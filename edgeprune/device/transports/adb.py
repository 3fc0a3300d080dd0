"""The board is an Android device: shell and files through the adb server of this machine.

Speaks the server's own protocol, so that nothing stands between an argument list and the device's
shell but one quoting. The device is pinned by its serial number: another one on the same cable is never
measured by mistake. Each operation is a connection of its own.
source: AOSP, packages/modules/adb: OVERVIEW.TXT, SERVICES.TXT, SYNC.TXT and shell_protocol.h. The shell
protocol (exit codes, stderr apart) needs Android 7 or newer.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from edgeprune.core.errors import ConnectionLost, DeviceError, UsageError
from edgeprune.device.transports import Finished

KEYS = ("serial", "host", "port", "timeout_s", "patience_s")
DEFAULT_PORT = 5037
STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = range(5)
STDIN_CHUNK_BYTES = 4000
SYNC_CHUNK_BYTES = 64 * 1024
FILE_TIMEOUT_S = 60.0
FILE_MODE = 0o100600
FIRST_BACKOFF_S = 0.2
LONGEST_BACKOFF_S = 5.0

T = TypeVar("T")


def connect(address: Mapping[str, Any], *, name: str, trust_new_host: bool = False) -> AdbTransport:
    """A device that `adb devices` lists.

    address: serial, and optionally host and port of the adb server, timeout_s, patience_s.
    name, raises: see `transports.Member`. Trust is given on the device's own screen.
    """
    del trust_new_host
    where = f"target {name}: [address]"
    if unknown := sorted(address.keys() - set(KEYS)):
        raise UsageError(f"{where} has unknown {', '.join(unknown)}; known: {', '.join(KEYS)}")
    serial = address.get("serial")
    if not isinstance(serial, str) or not serial or any(ord(character) <= 32 for character in serial):
        raise UsageError(f'{where} needs serial = "...", as `adb devices` shows it')
    host = str(address.get("host", "127.0.0.1"))
    try:
        port = int(address.get("port", DEFAULT_PORT))
        timeout_s, patience_s = float(address.get("timeout_s", 15)), float(address.get("patience_s", 120))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: port, timeout_s and patience_s are numbers") from error
    transport = AdbTransport(serial, (host, port), timeout_s, patience_s, name=name)
    transport.check()
    return transport


class _Refused(Exception):
    """The server or the device answered FAIL; the message is its own."""


class _Link:
    """One connection to the adb server, with a deadline."""

    def __init__(self, host: str, port: int, timeout_s: float) -> None:
        self.deadline = time.monotonic() + timeout_s
        self._socket = socket.create_connection((host, port), timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        # A thread may be waiting in it: shutting down wakes that, closing alone would not.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.settimeout(max(0.01, self.deadline - time.monotonic()))
        self._socket.sendall(data)

    def receive(self, count: int) -> bytes:
        """Exactly so many bytes. raises: EOFError when the other end hangs up; TimeoutError."""
        parts = bytearray()
        while len(parts) < count:
            self._socket.settimeout(max(0.01, self.deadline - time.monotonic()))
            if not (data := self._socket.recv(count - len(parts))):
                raise EOFError("the adb server hung up")
            parts += data
        return bytes(parts)

    def request(self, service: str) -> None:
        """Ask the server for a service. raises: _Refused with its reason."""
        data = service.encode()
        self.send(b"%04x%s" % (len(data), data))
        if (status := self.receive(4)) != b"OKAY":
            reason = self.receive(int(self.receive(4), 16)) if status == b"FAIL" else status
            raise _Refused(reason.decode("utf-8", "replace"))

    def ask(self, command: bytes, data: bytes) -> None:
        """A request of the sync service."""
        self.send(command + struct.pack("<I", len(data)) + data)

    def answer(self) -> tuple[bytes, int]:
        """Identifier and number of the sync service's answer. raises: OSError with the device's reason."""
        identifier, number = struct.unpack("<4sI", self.receive(8))
        if identifier == b"FAIL":
            reason = self.receive(number).decode("utf-8", "replace")
            raise FileNotFoundError(reason) if "No such file" in reason else _DeviceFileError(reason)
        return identifier, number


class _DeviceFileError(OSError):
    """A file operation that the device refused: not the connection's fault."""


class AdbTransport:
    """See `transports.Transport`."""

    def __init__(self, serial: str, server: tuple[str, int], timeout_s: float, patience_s: float, *, name: str) -> None:
        self._serial = serial
        self._server = server
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._name = name

    def check(self) -> None:
        """See that the device is there. raises: ConnectionLost, saying what to do."""
        try:
            with self._open(self._timeout_s) as link:
                try:
                    link.request("shell,v2,raw:true")
                except (_Refused, EOFError) as error:
                    raise ConnectionLost(
                        f"target {self._name}: device {self._serial} does not know adb's shell protocol ({error}), "
                        "which needs Android 7 or newer"
                    ) from error
        except (_Refused, OSError, EOFError) as error:
            raise ConnectionLost(self._explain(error)) from error

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60.0) -> Finished:
        def execute() -> Finished:
            with self._open(self._timeout_s) as link:
                link.request(f"shell,v2,raw:{shlex.join(argv)}")
                link.deadline = time.monotonic() + timeout
                threading.Thread(target=_feed, args=(link, stdin), daemon=True).start()
                outputs: dict[int, list[bytes]] = {STDOUT: [], STDERR: []}
                try:
                    while True:
                        kind, size = struct.unpack("<BI", link.receive(5))
                        data = link.receive(size)
                        if kind == EXIT:
                            return Finished(data[0], b"".join(outputs[STDOUT]), b"".join(outputs[STDERR]))
                        if kind in outputs:
                            outputs[kind].append(data)
                except TimeoutError as error:
                    raise DeviceError(f"target {self._name}: {argv[0]} did not finish within {timeout:g} s") from error

        return self._persist(execute)

    def put(self, source: Path, path: str, advance: Callable[[int], None]) -> None:
        def copy() -> None:
            with source.open("rb") as file:
                self._send(iter(lambda: file.read(SYNC_CHUNK_BYTES), b""), path, advance)

        self._persist(copy)

    def write(self, path: str, data: bytes) -> None:
        chunks = [data[place : place + SYNC_CHUNK_BYTES] for place in range(0, len(data), SYNC_CHUNK_BYTES)]
        self._persist(lambda: self._send(chunks, path, lambda count: None))  # noqa: ARG005

    def get(self, path: str, destination: Path) -> None:
        def copy() -> None:
            handle, temporary = tempfile.mkstemp(dir=destination.parent, prefix=f".{destination.name[:64]}.")
            try:
                with os.fdopen(handle, "wb") as file, self._sync() as link:
                    link.ask(b"RECV", path.encode())
                    while (answer := link.answer())[0] == b"DATA":
                        file.write(link.receive(answer[1]))
                        link.deadline = time.monotonic() + FILE_TIMEOUT_S
                os.replace(temporary, destination)
            except BaseException:
                Path(temporary).unlink()
                raise

        self._persist(copy)

    def read(self, path: str, offset: int = 0) -> bytes:
        # The sync service reads whole files only.
        done = self.run(["tail", "-c", f"+{offset + 1}", "--", path])
        if done.rc != 0 and b"No such file" not in done.stderr:
            raise OSError(done.stderr.decode("utf-8", "replace").strip())
        return done.stdout if done.rc == 0 else b""

    def sizes(self, folder: str) -> dict[str, int]:
        def look() -> dict[str, int]:
            found: dict[str, int] = {}
            with self._sync() as link:
                link.ask(b"LIST", folder.encode())
                while True:
                    identifier, _, size, _, length = struct.unpack("<4sIIII", link.receive(20))
                    if identifier == b"DONE":
                        return found
                    if (name := link.receive(length).decode("utf-8", "replace")) not in (".", ".."):
                        found[name] = size

        return self._persist(look)

    def close(self) -> None:
        """There is no connection between operations."""

    @contextlib.contextmanager
    def _open(self, timeout_s: float) -> Iterator[_Link]:
        """A connection that the server has joined to the device."""
        with contextlib.closing(_Link(*self._server, timeout_s)) as link:
            link.request(f"host:transport:{self._serial}")
            yield link

    @contextlib.contextmanager
    def _sync(self) -> Iterator[_Link]:
        with self._open(self._timeout_s) as link:
            link.request("sync:")
            link.deadline = time.monotonic() + FILE_TIMEOUT_S
            yield link
            link.ask(b"QUIT", b"")

    def _send(self, chunks: Iterable[bytes], path: str, advance: Callable[[int], None]) -> None:
        with self._sync() as link:
            try:
                link.ask(b"SEND", f"{path}.part,{FILE_MODE}".encode())
                for chunk in chunks:
                    link.ask(b"DATA", chunk)
                    link.deadline = time.monotonic() + FILE_TIMEOUT_S
                    advance(len(chunk))
                link.send(b"DONE" + struct.pack("<I", int(time.time())))
            except (BrokenPipeError, ConnectionResetError):
                pass  # the device says why before it hangs up
            link.answer()
        done = self.run(["mv", "-f", "--", f"{path}.part", path])
        if done.rc != 0:
            raise _DeviceFileError(done.stderr.decode("utf-8", "replace").strip())

    def _persist(self, operation: Callable[[], T]) -> T:
        """Do it, and again when the device or the server went away, for as long as `patience_s` says."""
        limit = time.monotonic() + self._patience_s
        pause = FIRST_BACKOFF_S
        while True:
            try:
                return operation()
            except (FileNotFoundError, PermissionError, _DeviceFileError):
                raise  # the file, not the connection
            except (_Refused, OSError, EOFError) as error:
                if time.monotonic() + pause > limit or "unauthorized" in str(error):
                    raise ConnectionLost(
                        f"{self._explain(error)}. What the agent has measured is kept on the device: run the same "
                        "command again to go on"
                    ) from error
            time.sleep(pause)
            pause = min(pause * 2, LONGEST_BACKOFF_S)

    def _explain(self, error: Exception) -> str:
        where, reason = f"target {self._name}: device {self._serial}", str(error) or type(error).__name__
        if isinstance(error, ConnectionRefusedError):
            host, port = self._server
            return f"{where}: there is no adb server at {host}:{port}; start it: adb start-server"
        if "unauthorized" in reason:
            return f"{where} does not trust this machine; unlock it and confirm the question on its screen"
        return f"{where} cannot be reached ({reason}); is it connected, and does `adb devices` list it?"


def _feed(link: _Link, stdin: bytes) -> None:
    # Beside the reading: a device that waits for us to read would not read itself.
    with contextlib.suppress(OSError):
        for place in range(0, len(stdin), STDIN_CHUNK_BYTES):
            chunk = stdin[place : place + STDIN_CHUNK_BYTES]
            link.send(struct.pack("<BI", STDIN, len(chunk)) + chunk)
        link.send(struct.pack("<BI", CLOSE_STDIN, 0))
