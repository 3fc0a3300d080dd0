"""How long work says where it is: a plain call that the command line turns into a bar."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called as the work advances: `what` is being done, `done` of `total` (0 = unknown)."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""
