"""What executes artifacts on the board: what to install there, and how the agent runs a model.

A member is copied to the board as it is, beside the agent: at import it may need Python 3.9 and the
standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Model(Protocol):
    """A loaded model. Made as `Model(path, threads, profile, **options)`.

    profile: prefix of the profiler's files, or None.
    options: text values, from the target's `runtime = "NAME:key=value,..."`.
    """

    inputs: dict[str, tuple[list[int], str]]
    """Name -> shape, with 1 for what is free, and numpy's name of the type."""

    outputs: list[str]

    def run(self, feed: Mapping[str, Any]) -> list[Any]:
        """One run; arrays in the order of `outputs`."""
        ...

    def end_profile(self) -> list[tuple[float, list[tuple[str, str, float]]]]:
        """Per run made so far: its seconds, and (name, op, seconds) of each kernel in order."""
        ...


class Runtime(Protocol):
    """What a runtime module offers."""

    FORMAT: str
    """The member of `formats` whose files it runs."""

    OPTIONS: tuple[str, ...]
    """Names of the options that `Model` takes."""

    REQUIREMENTS: tuple[str, ...]
    """pip requirements of the agent with this runtime."""

    MODULES: tuple[str, ...]
    """Python modules that must import; the member's own name among them tells the runtime's version."""

    BY_HAND: dict[str, str]
    """Those among them that pip does not bring but the board's system, and how they get there."""

    ARCHITECTURES: tuple[str, ...]
    """`uname -m` of boards that there are wheels for."""

    OLDEST_GLIBC: tuple[int, int]
    """The C library that the oldest usable wheel was built against."""

    Model: type[Any]
    """See `Model`."""
