"""The board is this machine: subprocesses and files."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeprune.core.errors import DeviceError, UsageError
from edgeprune.device.transports import Finished

CHUNK_BYTES = 1024 * 1024


def connect(address: Mapping[str, Any], *, name: str, trust_new_host: bool = False) -> LocalTransport:
    """This machine. address: nothing. raises: UsageError when it holds something."""
    del trust_new_host  # there is no host key between a machine and itself
    if address:
        raise UsageError(f"target {name}: the local transport takes no address, got {', '.join(address)}")
    return LocalTransport()


class LocalTransport:
    """See `transports.Transport`."""

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60.0) -> Finished:
        try:
            done = subprocess.run(list(argv), input=stdin, capture_output=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired as error:
            raise DeviceError(f"{argv[0]} did not finish within {timeout:g} s on this machine") from error
        except OSError as error:
            # What a shell answers, so that every transport says the same of a missing command.
            return Finished(127, b"", f"{argv[0]}: {error.strerror}".encode())
        return Finished(done.returncode, done.stdout, done.stderr)

    def put(self, source: Path, path: str, advance: Callable[[int], None]) -> None:
        with source.open("rb") as file:
            _replace(Path(path), iter(lambda: file.read(CHUNK_BYTES), b""), advance)

    def get(self, path: str, destination: Path) -> None:
        with Path(path).open("rb") as file:
            _replace(destination, iter(lambda: file.read(CHUNK_BYTES), b""), _ignore)

    def write(self, path: str, data: bytes) -> None:
        _replace(Path(path), iter([data]), _ignore)

    def read(self, path: str, offset: int = 0) -> bytes:
        try:
            with Path(path).open("rb") as file:
                file.seek(offset)
                return file.read()
        except FileNotFoundError:
            return b""

    def sizes(self, folder: str) -> dict[str, int]:
        try:
            return {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
        except FileNotFoundError:
            return {}

    def close(self) -> None:
        pass


def _replace(path: Path, chunks: Iterator[bytes], advance: Callable[[int], None]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:64]}.")
    try:
        with os.fdopen(handle, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                advance(len(chunk))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink()
        raise


def _ignore(count: int) -> None:
    """Nobody watches."""
    del count
