"""Processes of this machine, each with its share of the cores.

They are started anew (spawn), since PyTorch and its threads do not survive a fork. A script that is not the command
line needs `if __name__ == "__main__":`, as it is imported in each of them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Self

from edgeprune.core.errors import DeviceError
from edgeprune.executors import Prepare
from edgeprune.executors._work import attempt, check_workers, died, make_ready, pack, unpack

SPAWN = multiprocessing.get_context("spawn")
CORES_PER_WORKER = 4
"""By default: more threads gain little on one net, and each worker takes memory for the model and its data."""
GRACE_SECONDS = 10.0
"""That a worker has to leave its `with` blocks, which may hold a board or a folder, before it is killed."""


def open_pool(prepare: Prepare, shared: Any, *, workers: int = 0) -> Processes:
    """A pool of processes. workers: 0 for one to every four cores. raises: UsageError."""
    check_workers(workers)
    return Processes(prepare, shared, workers)


class Processes:
    """Processes that this one has started, and ends."""

    def __init__(self, prepare: Prepare, shared: Any, workers: int) -> None:
        cores = _count_cores()
        self.size = workers or max(1, cores // CORES_PER_WORKER)
        self._threads = max(1, cores // self.size)
        self._parcel = pack((prepare, shared))
        self._workers: list[_Worker] = []

    def run(self, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """As `executors.Pool` says."""
        waiting, busy = deque(range(len(items))), dict[Any, tuple[_Worker, int]]()
        failed: dict[int, Exception] = {}
        try:
            while waiting or busy:
                self._fill()
                taken = {worker for worker, _ in busy.values()}
                for worker in [each for each in self._workers if each not in taken][: len(waiting)]:
                    place = waiting.popleft()
                    busy[worker.connection] = (worker, place)
                    worker.send(items[place])
                for connection in wait(list(busy)):
                    worker, place = busy.pop(connection)
                    try:
                        done, value = worker.receive()
                    except EOFError:
                        self._workers.remove(worker)  # for the others to have their end another takes its place
                        failed[place] = died(worker.how_it_ended(), place, len(items), items[place])
                        continue
                    if done:
                        yield place, value
                    else:
                        failed[place] = value
        finally:  # whoever took the results may have gone
            given_up = [worker for worker, _ in busy.values()]
            self._workers = [worker for worker in self._workers if worker not in given_up]
            _end(given_up)
        if failed:
            raise failed[min(failed)]

    def _fill(self) -> None:
        """Start the workers that are missing, all at once, and wait until they are ready."""
        started: list[_Worker] = []
        try:
            while len(self._workers) + len(started) < self.size:
                started.append(_Worker(self._threads))
            for worker in started:
                worker.send_parcel(self._parcel)
            for worker in started:
                worker.check_ready()
        except BaseException:
            _end(started)
            raise
        self._workers += started

    def __enter__(self) -> Self:
        self._fill()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        workers, self._workers = self._workers, []
        _end(workers)


class _Worker:
    """One process, as its pool sees it."""

    def __init__(self, threads: int) -> None:
        self.connection, theirs = SPAWN.Pipe()
        # Not a daemon, which multiprocessing allows no processes of its own: a data source may load in several.
        self.process = SPAWN.Process(target=_serve, args=(theirs, threads), name="edgeprune-worker")
        self.process.start()
        theirs.close()  # so that its death is the end of the connection

    def send(self, item: Any) -> None:
        self.send_parcel(pack(item))

    def send_parcel(self, parcel: bytes) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # it died: what is received says so
            self.connection.send_bytes(parcel)

    def receive(self) -> tuple[bool, Any]:
        """Whether it went well, and the result or the exception. raises: EOFError when the process died."""
        try:
            done, value = unpack(self.connection.recv_bytes())
        except ConnectionResetError as error:
            raise EOFError from error
        return done, value

    def check_ready(self) -> None:
        """raises: what `prepare` raised; DeviceError when the process died over it."""
        try:
            done, value = self.receive()
        except EOFError as error:
            raise DeviceError(
                f"a worker {self.how_it_ended()} before it was ready; if memory ran out, take fewer workers. A script "
                'that starts workers needs `if __name__ == "__main__":`'
            ) from error
        if not done:
            raise value

    def how_it_ended(self) -> str:
        """In words, once its connection has ended."""
        _end([self])
        code = self.process.exitcode or 0
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _end(workers: Iterable[_Worker]) -> None:
    """Ask them to leave, and kill those that do not."""
    workers = list(workers)
    for worker in workers:
        worker.process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.connection.close()


def _count_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- in the worker -------------------------------------------------------------------------------


def _serve(connection: Connection, threads: int) -> None:
    """Get ready and do items until the connection ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the pool's process decides
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_follow_parent, daemon=True).start()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        parcel = connection.recv_bytes()
        done, work = attempt(make_ready, parcel, threads)
        del parcel
        connection.send_bytes(pack((done, None if done else work)))
        while done:
            item = connection.recv_bytes()
            connection.send_bytes(pack(attempt(lambda item=item: work(unpack(item)))))


def _leave(*_: Any) -> None:
    """Leave `with` blocks in order, undisturbed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(0)


def _follow_parent() -> None:
    """End this process when the one that started it is gone, killed perhaps."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)
