"""How bytes and argument lists reach a board. A member is a module with `connect`.

A transport repeats an operation after it had to reconnect, so what is asked of it must bear being
done twice. Paths are absolute paths on the board.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol


class Finished(NamedTuple):
    """What a command on the board came to; output as it was, not decoded."""

    rc: int
    stdout: bytes
    stderr: bytes


class Transport(Protocol):
    """A way to one board."""

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60.0) -> Finished:
        """Run a command to its end. raises: DeviceError when it takes longer than `timeout` seconds."""
        ...

    def put(self, source: Path, path: str, advance: Callable[[int], None]) -> None:
        """Copy a local file to the board, seen there whole or not at all; `advance` gets bytes as they go."""
        ...

    def get(self, path: str, destination: Path) -> None:
        """Copy a file of the board here, seen here whole or not at all."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """Write a small file on the board, seen there whole or not at all."""
        ...

    def read(self, path: str, offset: int = 0) -> bytes:
        """The bytes of a file from `offset` on; empty when there are none, or no such file."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """Name -> bytes of what lies in a folder; empty when there is no such folder."""
        ...

    def close(self) -> None:
        """Hang up. What was started detached goes on."""
        ...


class Member(Protocol):
    """What a transport module offers."""

    def connect(self, address: Mapping[str, Any], *, name: str, trust_new_host: bool = False) -> Transport:
        """Open the way to a board.

        address: what the target's [address] table says. name: the target's, for messages.
        trust_new_host: remember a host key never seen before instead of refusing it.
        raises: UsageError for an address that cannot be right; HostKeyError; ConnectionLost.
        """
        ...
