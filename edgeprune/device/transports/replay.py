"""A board that answers from a recording: what `record` wrote down, in any order, as often as asked.

A recording is a JSON object: `commands`, a list of {argv, rc, stdout, stderr}, and `files`, path -> text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeprune.core.errors import DeviceError, UsageError
from edgeprune.device.transports import Finished, Transport


def connect(address: Mapping[str, Any], *, name: str, trust_new_host: bool = False) -> ReplayTransport:
    """A recorded board. address: file, the recording. raises: UsageError when it cannot be read."""
    del trust_new_host
    try:
        recording = json.loads(Path(address["file"]).read_bytes())
        return ReplayTransport(recording["commands"], recording["files"], name)
    except (KeyError, OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"target {name}: [address] needs file = a recording, and it cannot be read: {error}"
        ) from error


class ReplayTransport:
    """See `transports.Transport`. What is written stays in memory."""

    def __init__(self, commands: Sequence[Mapping[str, Any]], files: Mapping[str, str], name: str) -> None:
        self._commands = {
            tuple(item["argv"]): Finished(
                int(item["rc"]), item["stdout"].encode("utf-8", "surrogateescape"), item["stderr"].encode()
            )
            for item in commands
        }
        self._files = {path: text.encode("utf-8", "surrogateescape") for path, text in files.items()}
        self._name = name

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60.0) -> Finished:
        del stdin, timeout
        try:
            return self._commands[tuple(argv)]
        except KeyError as error:
            raise DeviceError(f"target {self._name}: the recording has no answer to {list(argv)}") from error

    def put(self, source: Path, path: str, advance: Callable[[int], None]) -> None:
        self._files[path] = source.read_bytes()
        advance(len(self._files[path]))

    def get(self, path: str, destination: Path) -> None:
        if path not in self._files:
            raise FileNotFoundError(path)
        destination.write_bytes(self._files[path])

    def write(self, path: str, data: bytes) -> None:
        self._files[path] = data

    def read(self, path: str, offset: int = 0) -> bytes:
        return self._files.get(path, b"")[offset:]

    def sizes(self, folder: str) -> dict[str, int]:
        inside = {path.removeprefix(f"{folder}/"): len(data) for path, data in self._files.items()}
        return {name: size for name, size in inside.items() if "/" not in name}

    def close(self) -> None:
        pass


class Recorder:
    """A transport that passes everything on to another and remembers the answers of its commands."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._commands: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60.0) -> Finished:
        done = self._transport.run(argv, stdin=stdin, timeout=timeout)
        answer = {
            "stdout": done.stdout.decode("utf-8", "surrogateescape"),
            "stderr": done.stderr.decode("utf-8", "replace"),
        }
        self._commands.append({"argv": list(argv), "rc": done.rc, **answer})
        return done

    def save(self, path: Path) -> None:
        """Write what was recorded."""
        path.write_text(json.dumps({"commands": self._commands, "files": {}}, indent=1) + "\n")
