"""What travels between a pool and its workers, and how one item is done there."""

from __future__ import annotations

import io
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from typing import Any

from edgeprune.core.errors import DeviceError, UsageError


def pack(value: Any) -> bytes:
    """A value as bytes. Plain pickle: multiprocessing's own would put tensors into shared memory, one file each."""
    file = io.BytesIO()
    _Pickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


class _Pickler(pickle.Pickler):
    """Of a tensor that shows a part of another, as the first examples of all, torch would write the whole."""

    def reducer_override(self, value: Any) -> Any:
        torch = sys.modules.get("torch")
        if torch is None or type(value) is not torch.Tensor or value.layout is not torch.strided:
            return NotImplemented
        if value.untyped_storage().nbytes() <= value.nbytes:
            return NotImplemented
        return value.clone().__reduce_ex__(pickle.HIGHEST_PROTOCOL)


def unpack(parcel: bytes) -> Any:
    """The value of `pack`. Only for what one of our own processes has sent."""
    return pickle.loads(parcel)  # noqa: S301 - between a process and those that it started


def attempt(function: Callable[..., Any], *arguments: Any) -> tuple[bool, Any]:
    """(True, what the function returns) or (False, what it raised), with its traceback there as a note."""
    try:
        return True, function(*arguments)
    except Exception as error:
        error.add_note("in a worker:\n" + traceback.format_exc().rstrip())
        return False, _that_travels(error)


def make_ready(parcel: bytes, threads: int) -> Callable[[Any], Any]:
    """What does an item, in a worker with so many of PyTorch's threads. parcel: of `prepare` and what is shared."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for PyTorch to read, should it be imported: that takes seconds
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(threads)
    prepare, shared = unpack(parcel)
    work: Callable[[Any], Any] = prepare(shared)
    return work


def _that_travels(error: Exception) -> Exception:
    """The exception itself, or where it cannot be read back elsewhere one that says the same."""
    try:
        unpack(pack(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def check_workers(workers: int) -> None:
    """raises: UsageError for less than none; 0 leaves it to the executor."""
    if workers < 0:
        raise UsageError(f"workers={workers}: expected a number of workers, or 0 for as many as suit the machine")


def died(how: str, place: int, items: int, item: Any) -> DeviceError:
    """What became of an item whose worker died. how: in words."""
    name = f" ({item})" if isinstance(item, str) else ""
    return DeviceError(
        f"a worker {how} at item {place + 1} of {items}{name}; what is finished is kept. If memory ran out there, "
        "take fewer workers"
    )
