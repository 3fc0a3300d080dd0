"""No meter: energy is not measured."""

from __future__ import annotations

from edgeprune.core.family import configure
from edgeprune.device.meters import Meter


def make(options: str) -> Meter | None:
    """None; takes no options."""
    configure(lambda: None, options)
    return None
