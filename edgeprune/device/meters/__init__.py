"""What measures energy: a source of text read before and after a measurement, and its parser."""

from __future__ import annotations

from typing import Protocol

from edgeprune.device.sources import Source


class Meter(Protocol):
    """What a meter module offers."""

    SOURCE: Source | None
    """Read by the agent on the board; None where there is nothing to read."""

    def measure_energy(self, before: str, after: str) -> float | None:
        """Energy between two readings, in joules; None when it was not measured."""
        ...
