"""Executors: where independent pieces of work are done. `processes:workers=2` loads `executors/processes.py`.

A member is a module with

    open_pool(prepare, shared, *, workers) -> Pool

`prepare` is a function that can be imported by name; it makes, once in every worker, of what is `shared` (plain values,
arrays, bytes) the function that does one item. So a model is sent and built once, however many items follow. Items
and results are plain values or records. Workers see the same files under the same paths: on several machines that
takes a shared file system. They start when the pool is entered, and none is left when that ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from edgeprune.core.family import configure, load_member

Prepare = Callable[[Any], Callable[[Any], Any]]


class Pool(Protocol):
    """Workers that are ready for items; a context manager. size: how many items are done at once."""

    size: int

    def run(self, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Do all items. returns: (place in `items`, result) of each as it is done, in any order.

        raises: what the first item that failed raised, after the others had their end; an EdgepruneError as itself;
            DeviceError saying which item a worker died over.
        """
        ...

    def __enter__(self) -> Self:
        """Start the workers. raises: what `prepare` raised in one of them."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def load_executor(chosen: str) -> Callable[[Prepare, Any], Pool]:
    """The member of `name:option=value,...`, ready for `prepare` and `shared`. raises: UsageError."""
    name, _, options = chosen.partition(":")
    made: Callable[[Prepare, Any], Pool] = configure(load_member("executors", name).open_pool, options)
    return made
