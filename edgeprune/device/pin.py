"""Holds settings of the board still while it measures, and puts them back whatever ends the measurement.

Copied to the board beside agent.py: Python 3.9 and the standard library only.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

SUDO_TIMEOUT_S = 5.0


@contextlib.contextmanager
def held(pins: Mapping[str, str], record: Path) -> Iterator[None]:
    """Keep every file that matches a pattern of `pins` at its value, where we may.

    pins: shell pattern -> value. record: where the former values are kept; one that a measurement left
        behind, killed together with its guard, is put back first.
    """
    restore(record)
    changes = {}
    for pattern, value in pins.items():
        for path in sorted(glob.glob(pattern)):  # noqa: PTH207  patterns are absolute
            with contextlib.suppress(OSError):
                before = Path(path).read_text().strip()
                if before != value:
                    changes[path] = (before, value)
    if not changes:
        yield
        return
    part = record.with_name(record.name + ".part")
    part.write_text(json.dumps({path: before for path, (before, _) in changes.items()}))
    os.replace(part, record)
    guard, end = _start_guard(record)
    try:
        for path, (_, value) in changes.items():
            _write(path, value)
        yield
    finally:
        os.close(end)  # tells the guard
        os.waitpid(guard, 0)


def _start_guard(record: Path) -> tuple[int, int]:
    """A process that restores as soon as this one lets go of the pipe, by closing it or by dying.

    In a session of its own, so that what kills our group leaves it alive.
    """
    ours, end = os.pipe()
    ready, say_ready = os.pipe()
    guard = os.fork()
    if guard == 0:
        try:
            os.setsid()
            os.close(end)
            os.close(say_ready)
            while os.read(ours, 1):
                pass
            restore(record)
        finally:
            os._exit(0)
    os.close(ours)
    os.close(say_ready)
    os.read(ready, 1)  # until the guard is in its own session, what kills us kills it
    os.close(ready)
    return guard, end


def restore(record: Path) -> None:
    """Put back what `record` says, and forget it."""
    try:
        before = json.loads(record.read_text())
    except (FileNotFoundError, ValueError):
        return
    for path, value in before.items():
        _write(path, value)
    with contextlib.suppress(FileNotFoundError):
        record.unlink()


def _write(path: str, value: str) -> None:
    """Write a setting, with sudo where that asks no password; a board that allows neither stays as it is."""
    try:
        Path(path).write_text(value)
    except PermissionError:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            argv = ["sudo", "-n", "tee", "--", path]
            subprocess.run(argv, input=value.encode(), capture_output=True, timeout=SUDO_TIMEOUT_S)
    except OSError:
        pass  # a driver that knows no such value
