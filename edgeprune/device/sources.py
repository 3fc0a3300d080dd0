"""Text read from a board in one round trip: every source becomes a section of one shell script's output."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from edgeprune.core.errors import DeviceError

MARK = "@@edgeprune@@"


@dataclass(frozen=True, slots=True)
class Source:
    """Where text on the board comes from: the lines of files as `path:line`, then a command's output."""

    argv: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    """Shell patterns; constants of a member, never data."""

    def script(self) -> str:
        """The source as a line of POSIX shell."""
        files = [f"grep -sH '' {' '.join(self.files)}"] if self.files else []
        return "; ".join([*files, *([shlex.join(self.argv)] if self.argv else [])])


def section_script(sources: Mapping[str, str]) -> bytes:
    """A POSIX shell script that runs each line of shell and marks where its output begins and ends."""
    parts = [f"printf '\\n{MARK} {name}\\n'; {{ {line}; }} 2>/dev/null </dev/null" for name, line in sources.items()]
    return "\n".join([*parts, f"printf '\\n{MARK} end\\n'", ""]).encode()


def split_sections(output: bytes, where: str) -> dict[str, str]:
    """The sections that `section_script` printed; what a login shell printed before them is dropped.

    raises: DeviceError when the output breaks off.
    """
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in output.decode("utf-8", "replace").split("\n"):
        if line.startswith(MARK):
            lines = sections.setdefault(line[len(MARK) :].strip(), [])
        else:
            lines.append(line)
    if "end" not in sections:
        raise DeviceError(f"{where}: the board's answer broke off: {output[-200:]!r}; is /bin/sh there?")
    return {name: "\n".join(lines).strip("\n\0 ") for name, lines in sections.items()}
