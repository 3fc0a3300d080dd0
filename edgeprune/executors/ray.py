"""Workers of a Ray cluster: on this machine, or on several that share a file system.

On each machine edgeprune is installed in the same version and the run's folder lies under the same path. A cluster is
joined on one of its machines. One that is started here opens its ports on loopback only, and ends with the pool.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from edgeprune.core.errors import DeviceError, UsageError, first_line
from edgeprune.core.family import MissingLibrary
from edgeprune.executors import Prepare
from edgeprune.executors._work import attempt, check_workers, died, make_ready, pack, unpack

try:
    import ray
    from ray._private import ray_constants
    from ray.exceptions import RayError
except ModuleNotFoundError as error:
    raise MissingLibrary("executor 'ray' needs Ray: pip install 'edgeprune[cluster]'") from error

CPUS_PER_WORKER = 4
"""By default: more threads gain little on one net, and each worker takes memory for the model and its data."""
START_SECONDS = 600
"""That a busy or growing cluster has to make room for the workers."""
LEAST_STORE_BYTES = 128 << 20
LOOPBACK = "127.0.0.1"


def open_pool(prepare: Prepare, shared: Any, *, workers: int = 0, address: str = "") -> RayPool:
    """A pool of Ray actors.

    workers: 0 for one to every four CPUs of the cluster. address: of the cluster's head (host:port), `auto` for the one
        that runs on this machine; without it that of $RAY_ADDRESS, or else one is started here and ended again.
    raises: UsageError.
    """
    check_workers(workers)
    return RayPool(prepare, shared, workers, address or os.environ.get("RAY_ADDRESS", ""))


class RayPool:
    """Actors of a cluster."""

    def __init__(self, prepare: Prepare, shared: Any, workers: int, address: str) -> None:
        parcel = pack((prepare, shared))
        self._ours = _join(address, workers, len(parcel))
        try:
            self.size, self._cpus = share_cpus(_cpus_of_nodes(), workers)
            self._parcel = ray.put(parcel)  # kept once on each machine
        except BaseException:
            self._leave()
            raise
        self._actors: list[Any] = []

    def run(self, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """As `executors.Pool` says. What a worker died over is given to another once; those that are left go on."""
        waiting, again = deque(range(len(items))), set[int]()
        busy: dict[Any, tuple[Any, int]] = {}
        failed: dict[int, Exception] = {}
        try:
            while waiting or busy:
                if not self._actors:
                    self._fill()
                taken = [actor for actor, _ in busy.values()]
                for actor in [each for each in self._actors if each not in taken][: len(waiting)]:
                    place = waiting.popleft()
                    busy[actor.do.remote(pack(items[place]))] = (actor, place)
                (ready, *_), _ = ray.wait(list(busy))
                actor, place = busy.pop(ready)
                try:
                    done, value = unpack(ray.get(ready))
                except RayError as error:
                    self._actors.remove(actor)
                    if place in again:
                        failed[place] = died(f"died twice ({first_line(error)})", place, len(items), items[place])
                    else:
                        again.add(place)
                        waiting.append(place)
                    continue
                if done:
                    yield place, value
                else:
                    failed[place] = value
        finally:  # whoever took the results may have gone
            given_up = [actor for actor, _ in busy.values()]
            self._actors = [actor for actor in self._actors if actor not in given_up]
            _end(given_up)
        if failed:
            raise failed[min(failed)]

    def _fill(self) -> None:
        """Start all workers at once, and wait until they are ready."""
        make = ray.remote(num_cpus=self._cpus, max_restarts=0)(_Worker)
        started = [make.remote() for _ in range(self.size)]
        try:
            answers = ray.get(
                [each.get_ready.remote(self._parcel, self._cpus, sys.path) for each in started], timeout=START_SECONDS
            )
        except RayError as error:
            _end(started)
            raise DeviceError(
                f"{self.size} workers with {self._cpus} CPUs each did not get ready on the Ray cluster: "
                f"{first_line(error)}; take fewer, or see `ray status`"
            ) from error
        except BaseException:
            _end(started)
            raise
        for done, value in map(unpack, answers):
            if not done:
                _end(started)
                raise value
        self._actors = started

    def __enter__(self) -> Self:
        try:
            self._fill()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _end(self._actors)
        self._actors = []
        self._leave()

    def _leave(self) -> None:
        if self._ours:
            ray.shutdown()


class _Worker:
    """What runs in an actor."""

    def get_ready(self, parcel: bytes, threads: int, path: list[str]) -> bytes:
        sys.path += [folder for folder in path if folder not in sys.path]  # same files, same paths
        done, self._work = attempt(make_ready, parcel, threads)
        return pack((done, None if done else self._work))

    def do(self, item: bytes) -> bytes:
        return pack(attempt(lambda: self._work(unpack(item))))


def _end(actors: Sequence[Any]) -> None:
    for actor in actors:
        ray.kill(actor)


def _join(address: str, workers: int, shared_bytes: int) -> bool:
    """Join a cluster, or start one where no address is given. returns: whether it is for us to end that."""
    if ray.is_initialized():  # whoever did that ends it
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        try:
            _knock(address)
            ray.init(address=address, **quiet)
        except Exception as error:
            raise DeviceError(
                f"there is no Ray cluster to join at '{address}' from this machine: {first_line(error)}"
            ) from error
        return True
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # it would report to its makers
    # Ray opens ports to the whole network, but for where this is unset, as on macOS and Windows.
    usual, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        ray.init(
            address="local",
            num_cpus=max(workers, os.cpu_count() or 1),
            include_dashboard=False,
            object_store_memory=max(LEAST_STORE_BYTES, 2 * shared_bytes),
            _node_ip_address=LOOPBACK,
            **quiet,
        )
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = usual
    if any(node["NodeManagerAddress"] != LOOPBACK for node in ray.nodes()):
        ray.shutdown()
        raise DeviceError("this version of Ray opens its ports to the network; take executor processes")
    return True


def _knock(address: str) -> None:
    """Ray itself takes two minutes to find nobody there. raises: OSError."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "//" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _cpus_of_nodes() -> list[int]:
    return [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]


def share_cpus(nodes: Sequence[int], workers: int) -> tuple[int, int]:
    """How many workers, and as many CPUs for each as let all of them run on the machines at once.

    nodes: CPUs of each machine. workers: 0 for one to every four of all CPUs, and none without a machine.
    raises: UsageError for more workers than CPUs.
    """
    wanted = workers or max(1, sum(nodes) // CPUS_PER_WORKER)
    for cpus in range(max(nodes, default=0), 0, -1):
        if sum(count // cpus for count in nodes) >= wanted:
            return wanted, cpus
    raise UsageError(f"the Ray cluster has {sum(nodes)} CPUs, too few for {wanted} workers; give a smaller workers=")
