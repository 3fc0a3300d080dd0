"""A bad network in front of a board: slow, late, and cut at any moment, without the board's doing."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from boards._server import free_port
from edgeprune.core.records import Target

CHUNK_BYTES = 4096


class Link:
    """Stands between us and a target on loopback for as long as the `with` block, and gives the target behind it.

    with Link(target, bytes_per_s=64_000, delay_s=0.1) as slow: ...
    """

    def __init__(self, target: Target, *, bytes_per_s: float | None = None, delay_s: float = 0.0) -> None:
        """bytes_per_s: in each direction of each connection. delay_s: added to everything, each way."""
        self._target = target
        self._bytes_per_s = bytes_per_s
        self._delay_s = delay_s
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._down_until = 0.0
        self.connections = 0

    def __enter__(self) -> Target:
        port = free_port()
        self._listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
        address = dict(self._target.address)
        known = Path(address["known_hosts"]).with_name(f"known_hosts-{port}")
        known.write_text(Path(address["known_hosts"]).read_text().replace(f":{address['port']} ", f":{port} "))
        return replace(self._target, address={**address, "port": port, "known_hosts": str(known)})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
        self.cut()

    def cut(self) -> None:
        """Drop every connection without a word; new ones are let through."""
        with self._lock:
            sockets, self._sockets = self._sockets, set()
        for end in sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def go_down(self, seconds: float) -> None:
        """Drop every connection, and let none through for a while, as when the board restarts."""
        self._down_until = time.monotonic() + seconds
        self.cut()

    def wait_until_up(self) -> None:
        """As long as `go_down` asked for."""
        time.sleep(max(0.0, self._down_until - time.monotonic()))

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return  # closed
            if time.monotonic() < self._down_until:
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target.address["port"]))
            except OSError:
                near.close()
                continue
            for end in (near, far):  # else the chunks of one message wait for acknowledgements of each other
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets |= {near, far}
                self.connections += 1
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                time.sleep(self._delay_s + (len(data) / self._bytes_per_s if self._bytes_per_s else 0.0))
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
