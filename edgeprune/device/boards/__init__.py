"""What kinds of boards there are: each fact is a source of text on the board and a pure parser of it.

A member is a module with `FACTS` and `find_throttling`. The facts named in `MOMENTARY` are read
again by the agent before and after every measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from edgeprune.device.sources import Source

MOMENTARY = ("governor", "freq_hz", "temp_c", "throttled")


@dataclass(frozen=True, slots=True)
class Fact:
    """One field of `BoardFacts`: its source, and the parser that gives the value or None."""

    source: Source
    parse: Callable[[str], Any]


class Board(Protocol):
    """What a board module offers."""

    FACTS: Mapping[str, Fact]
    """BoardFacts field -> fact."""

    PINS: Mapping[str, str]
    """Shell patterns of settings that change the board's speed, and the value to hold them at while it measures."""

    def find_throttling(self, before: str, after: str) -> str | None:
        """What slowed the board between two readings of the `throttled` fact.

        returns: the reasons in words; "" when the board says there were none; None when it does not say.
        """
        ...
