"""What executes artifacts on the board: what to install, and how to ask for it."""

from __future__ import annotations

from typing import Protocol


class Runtime(Protocol):
    """What a runtime module offers."""

    REQUIREMENTS: tuple[str, ...]
    """pip requirements of the agent with this runtime."""

    MODULES: tuple[str, ...]
    """Python modules the agent imports; the first one's version is the runtime's."""

    ARCHITECTURES: tuple[str, ...]
    """`uname -m` of boards there are wheels for."""

    OLDEST_GLIBC: tuple[int, int]
    """The C library the oldest usable wheel was built against."""
