"""An adb server with one device, which is this machine: the protocol's bytes over real sockets."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType

from edgeprune.core.records import Target

STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = range(5)
FAIL_AFTER_BYTES = 64


class AdbServer:
    """Listens on 127.0.0.1 for as long as the `with` block, and gives the target that reaches it.

    refusal: what it says instead of joining the device, the way a server does. cut_after: hang up after
    so many bytes to the client, once. disk_full: no file gets longer than a few bytes. old: a device of
    before the shell protocol.
    """

    def __init__(self, serial: str = "emulator-5554") -> None:
        self.serial = serial
        self.refusal = ""
        self.cut_after: int | None = None
        self.disk_full = False
        self.old = False
        self.services: list[str] = []
        outer = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError, EOFError):
                    _Conversation(outer, self.request).serve()

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Target:
        self._thread.start()
        port = self._server.server_address[1]
        address = {"serial": self.serial, "port": port, "patience_s": 5}
        return Target(name="phone", transport="adb", address=address, python=sys.executable)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Conversation:
    """One client."""

    def __init__(self, server: AdbServer, link: socket.socket) -> None:
        self.server = server
        self.link = link
        self.lock = threading.Lock()

    def receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            if not (part := self.link.recv(count - len(data))):
                raise EOFError
            data += part
        return data

    def send(self, data: bytes) -> None:
        with self.lock:
            if self.server.cut_after is not None:
                if len(data) >= self.server.cut_after:
                    self.link.sendall(data[: self.server.cut_after])
                    self.server.cut_after = None
                    self.link.shutdown(socket.SHUT_RDWR)
                    raise EOFError
                self.server.cut_after -= len(data)
            self.link.sendall(data)

    def fail(self, reason: str) -> None:
        self.send(b"FAIL%04x%s" % (len(reason), reason.encode()))

    def serve(self) -> None:
        joined = False
        while True:
            service = self.receive(int(self.receive(4), 16)).decode()
            self.server.services.append(service)
            if service.startswith("host:transport:"):
                serial = service.removeprefix("host:transport:")
                if self.server.refusal or serial != self.server.serial:
                    self.fail(self.server.refusal or f"device '{serial}' not found")
                    return
                joined = True
                self.send(b"OKAY")
            elif joined and service == "sync:":
                self.send(b"OKAY")
                self.sync()
                return
            elif joined and service.startswith("shell,v2,raw:") and not self.server.old:
                self.send(b"OKAY")
                self.shell(service.removeprefix("shell,v2,raw:"))
                return
            else:
                self.fail("unknown host service")
                return

    # --- shell ------------------------------------------------------------------------------------

    def shell(self, command: str) -> None:
        process = subprocess.Popen(
            ["sh", "-c", command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self.feed, args=(process,), daemon=True).start()
        readers = [
            threading.Thread(target=self.forward, args=(kind, pipe))
            for kind, pipe in ((STDOUT, process.stdout), (STDERR, process.stderr))
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        rc = process.wait()
        self.send(struct.pack("<BIB", EXIT, 1, rc if rc >= 0 else 128 - rc))

    def feed(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        try:
            while True:
                kind, size = struct.unpack("<BI", self.receive(5))
                data = self.receive(size)
                with contextlib.suppress(OSError, ValueError):
                    if kind == STDIN:
                        process.stdin.write(data)
                        process.stdin.flush()
                    elif kind == CLOSE_STDIN:
                        process.stdin.close()
        except (EOFError, OSError):  # the client is gone, and with it the terminal
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGHUP)

    def forward(self, kind: int, pipe: object) -> None:
        with contextlib.suppress(OSError, EOFError):
            while data := os.read(pipe.fileno(), 32768):  # type: ignore[attr-defined]
                self.send(struct.pack("<BI", kind, len(data)) + data)

    # --- files ------------------------------------------------------------------------------------

    def sync(self) -> None:
        while True:
            command, size = struct.unpack("<4sI", self.receive(8))
            argument = self.receive(size).decode()
            if command == b"QUIT":
                return
            try:
                {b"SEND": self.store, b"RECV": self.load, b"LIST": self.list}[command](argument)
            except OSError as error:
                reason = f"couldn't open: {error.strerror}".encode()
                self.send(b"FAIL" + struct.pack("<I", len(reason)) + reason)
                return

    def store(self, argument: str) -> None:
        path, _, mode = argument.rpartition(",")
        stored = 0
        with Path(path).open("wb") as file:
            while True:
                command, size = struct.unpack("<4sI", self.receive(8))
                if command == b"DONE":
                    break
                assert command == b"DATA" and size <= 64 * 1024
                stored += file.write(self.receive(size))
                if self.server.disk_full and stored > FAIL_AFTER_BYTES:
                    raise OSError(28, "No space left on device")
        Path(path).chmod(int(mode) & 0o777)
        self.send(b"OKAY" + struct.pack("<I", 0))

    def load(self, path: str) -> None:
        with Path(path).open("rb") as file:
            while data := file.read(64 * 1024):
                self.send(b"DATA" + struct.pack("<I", len(data)) + data)
        self.send(b"DONE" + struct.pack("<I", 0))

    def list(self, folder: str) -> None:
        names = [".", "..", *(path.name for path in Path(folder).glob("*"))]
        names = names if Path(folder).is_dir() else []
        for name in names:
            found, data = Path(folder, name).stat(), name.encode()
            self.send(
                b"DENT" + struct.pack("<IIII", found.st_mode, found.st_size, int(found.st_mtime), len(data)) + data
            )
        self.send(b"DONE" + bytes(16))
