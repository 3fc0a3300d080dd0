"""One after another, in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from edgeprune.executors import Prepare


def open_pool(prepare: Prepare, shared: Any) -> Here:
    """A pool of one."""
    return Here(prepare, shared)


class Here:
    """This process."""

    size = 1

    def __init__(self, prepare: Prepare, shared: Any) -> None:
        self._work = prepare(shared)

    def run(self, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """As `executors.Pool` says."""
        failed: Exception | None = None
        for place, item in enumerate(items):
            try:
                result = self._work(item)
            except Exception as error:
                failed = failed or error
                continue
            yield place, result
        if failed is not None:
            raise failed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to end."""
