"""executors: one battery for every member, with real processes and a real Ray cluster on loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from edgeprune.core.errors import DataError, DeviceError, UnknownMember, UsageError
from edgeprune.core.family import MissingLibrary, list_members
from edgeprune.executors import Pool, load_executor
from edgeprune.executors._work import pack, unpack

RAY = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'edgeprune[cluster]'")
CHOSEN = {"here": "here", "processes": "processes:workers=2", "ray": "ray:workers=2"}
MEMBERS = [pytest.param(name, marks=RAY if name == "ray" else ()) for name in list_members("executors")]
SEVERAL = [each for each in MEMBERS if each.values != ("here",)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray cluster that all pools of this module join; nothing of it is left behind."""
    import ray

    from edgeprune.executors.ray import _join

    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # sockets have short paths
        before = os.environ.get("RAY_TMPDIR")
        os.environ["RAY_TMPDIR"] = folder
        try:
            assert _join("", 2, 0)
            yield
        finally:
            ray.shutdown()
            os.environ.pop("RAY_TMPDIR") if before is None else os.environ.update(RAY_TMPDIR=before)


@pytest.fixture
def open_pool(request: pytest.FixtureRequest) -> Callable[[str, Any, Any], Pool]:
    """Opens a pool of a member; Ray's cluster is started when it is first asked for."""

    def make(name: str, prepare: Any, shared: Any) -> Pool:
        if name == "ray":
            request.getfixturevalue("cluster")
        return load_executor(CHOSEN[name])(prepare, shared)

    return make


# --- what workers do: functions that they import by name -----------------------------------------


def note_and_square(folder: str) -> Callable[[int], tuple[int, int]]:
    """Leaves a file for itself, and for every item."""
    (Path(folder) / f"prepared-{time.monotonic_ns()}").touch()

    def work(item: int) -> tuple[int, int]:
        (Path(folder) / f"item-{item}-{time.monotonic_ns()}").touch()
        time.sleep(0.01 * (item % 3))
        return item * item, os.getpid()

    return work


def fail_on_two(folder: str) -> Callable[[int], int]:
    def work(item: int) -> int:
        (Path(folder) / f"item-{item}").touch()
        if item == 2:
            raise DataError("two is no good")
        if item == 4:
            raise KeyError("four")
        return -item

    return work


class _Odd(Exception):
    """Cannot be made again of its message."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


def fail_oddly(_: Any) -> Callable[[int], int]:
    def work(item: int) -> int:
        raise _Odd(item, 7)

    return work


def fail_at_once(_: Any) -> Callable[[int], int]:
    raise DataError("nothing to work with")


def die_on_two(folder: str) -> Callable[[int], int]:
    """Dies at item 2 every time, and at item 3 the first time."""

    def work(item: int) -> int:
        mark = Path(folder) / f"tried-{item}"
        first, _ = not mark.exists(), mark.touch()
        if item == 2 or (item == 3 and first):
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    return work


def die_at_once(_: Any) -> Callable[[int], int]:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def sleep_for_long(folder: str) -> Callable[[int], int]:
    """Item 0 is done at once; the others take minutes. Leaves a file for each that it leaves in order."""

    def work(item: int) -> int:
        try:
            (Path(folder) / f"pid-{os.getpid()}").touch()
            time.sleep(300 if item else 0)
        finally:
            (Path(folder) / f"left-{item}").touch()
        return item

    return work


def count_threads(_: Any) -> Callable[[Any], Any]:
    import torch

    return lambda item: (torch.get_num_threads(), item)


def wait_until(true: Callable[[], bool], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return true()


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- the battery ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEMBERS)
def test_every_item_is_done_once_in_workers_that_were_prepared_once(name: str, open_pool: Any, tmp_path: Path) -> None:
    with open_pool(name, note_and_square, str(tmp_path)) as pool:
        assert pool.size == (1 if name == "here" else 2)
        found = dict(pool.run(list(range(9))))
        assert list(pool.run([])) == []
        again = dict(pool.run([5, 5]))  # a pool is good for more than one run
    assert {place: square for place, (square, _) in found.items()} == {n: n * n for n in range(9)}
    assert [again[place][0] for place in (0, 1)] == [25, 25]
    assert len(list(tmp_path.glob("prepared-*"))) == pool.size
    assert all(len(list(tmp_path.glob(f"item-{n}-*"))) == (3 if n == 5 else 1) for n in range(9))
    pids = {pid for _, pid in found.values()}
    assert pids == {os.getpid()} if name == "here" else os.getpid() not in pids and len(pids) == 2


@pytest.mark.parametrize("name", MEMBERS)
def test_what_an_item_raises_arrives_as_itself_once_the_others_are_done(
    name: str, open_pool: Any, tmp_path: Path
) -> None:
    found = {}
    with open_pool(name, fail_on_two, str(tmp_path)) as pool, pytest.raises(DataError) as caught:
        for place, result in pool.run([4, 0, 2, 1, 3][1:]):
            found[place] = result
    assert (type(caught.value), str(caught.value), caught.value.exit_code) == (DataError, "two is no good", 4)
    assert found == {0: 0, 2: -1, 3: -3}
    with open_pool(name, fail_on_two, str(tmp_path)) as pool:
        with pytest.raises(KeyError, match="four"):  # of several that of the first item
            list(pool.run([0, 4, 2]))
        assert list(pool.run([1])) == [(0, -1)], "the pool is good for nothing afterwards"


@pytest.mark.parametrize("name", SEVERAL)
def test_an_exception_that_cannot_be_sent_still_says_what_it_was(name: str, open_pool: Any) -> None:
    with open_pool(name, fail_oddly, None) as pool, pytest.raises(RuntimeError, match="_Odd: 1 and 7"):
        list(pool.run([1]))


@pytest.mark.parametrize("name", MEMBERS)
def test_what_cannot_be_prepared_says_why(name: str, open_pool: Any) -> None:
    with pytest.raises(DataError, match="nothing to work with"), open_pool(name, fail_at_once, None):
        pass


@pytest.mark.parametrize("name", SEVERAL)
def test_a_worker_that_is_killed_costs_its_item_and_no_other(name: str, open_pool: Any, tmp_path: Path) -> None:
    found = {}
    with open_pool(name, die_on_two, str(tmp_path)) as pool, pytest.raises(DeviceError, match=r"item 3 of 6") as caught:
        for place, result in pool.run([0, 1, 2, 4, 5, 6]):
            found[place] = result
    assert caught.value.exit_code == 3
    assert found == {0: 0, 1: 1, 3: 4, 4: 5, 5: 6}
    if name == "processes":
        assert "killed by SIGKILL" in str(caught.value)
        with pytest.raises(DeviceError, match="killed by SIGKILL before it was ready"):
            open_pool(name, die_at_once, None).__enter__()
    else:  # whose machines may go: what was being done is done once more elsewhere
        with open_pool(name, die_on_two, str(tmp_path)) as pool:
            assert sorted(pool.run([3, 1])) == [(0, 3), (1, 1)]


@pytest.mark.parametrize("name", SEVERAL)
def test_whoever_stops_taking_results_frees_the_workers(name: str, open_pool: Any, tmp_path: Path) -> None:
    with open_pool(name, sleep_for_long, str(tmp_path)) as pool:
        results = pool.run([0, 1, 2, 3])
        assert next(results) == (0, 0)
        assert wait_until(lambda: len(list(tmp_path.glob("pid-*"))) == 2)
    pids = [int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")]
    assert wait_until(lambda: not any(is_running(pid) for pid in pids))
    if name == "processes":
        assert (tmp_path / "left-1").exists() or (tmp_path / "left-2").exists()


@pytest.mark.parametrize("name", SEVERAL)
def test_workers_share_the_cores(name: str, open_pool: Any) -> None:
    cores = len(os.sched_getaffinity(0))
    with open_pool(name, count_threads, None) as pool:
        assert {threads for _, (threads, _) in pool.run([0, 1])} == {max(1, cores // 2)}


# --- what is chosen ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "kind", "said"),
    [
        ("nonsense", UnknownMember, "unknown executors 'nonsense'; known: here, processes, ray"),
        ("processes:threads=2", UsageError, "'threads' is not an option of processes; known: workers"),
        ("processes:workers=two", UsageError, "expected int"),
        ("here:workers=2", UsageError, "not an option of here"),
        pytest.param("ray:port=1", UsageError, "known: workers, address", marks=RAY),
    ],
)
def test_what_is_not_there_is_refused_before_anything_starts(chosen: str, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        load_executor(chosen)


def test_fewer_workers_than_none_are_refused() -> None:
    with pytest.raises(UsageError, match="workers=-1"):
        load_executor("processes:workers=-1")(note_and_square, "")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "edgeprune.executors.ray", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingLibrary, match=r"pip install 'edgeprune\[cluster\]'"):
        load_executor("ray")


@RAY
def test_workers_fit_on_the_machines() -> None:
    from edgeprune.executors.ray import share_cpus

    assert share_cpus([64], 0) == (16, 4)
    assert share_cpus([2], 0) == (1, 2)
    assert share_cpus([8, 8, 8], 4) == (4, 4), "six each would leave one worker without a machine"
    assert share_cpus([8, 2], 3) == (3, 2)
    assert share_cpus([4, 4], 2) == (2, 4)
    with pytest.raises(UsageError, match="2 CPUs, too few for 3 workers"):
        share_cpus([2], 3)


def test_of_a_tensor_only_what_it_shows_is_sent() -> None:
    import torch

    whole = torch.arange(100_000.0).reshape(1000, 100)
    for part in (whole, whole[:10], whole[::50, 3], whole[:1].expand(5, 100)):
        parcel = pack({"examples": [part]})
        assert len(parcel) < 4 * part.numel() + 1000
        assert torch.equal(unpack(parcel)["examples"][0], part)


# --- processes and their parent ------------------------------------------------------------------

PARENT = """
import sys
from test_executors import sleep_for_long
from edgeprune.executors import load_executor

if __name__ == "__main__":
    with load_executor("processes:workers=2")(sleep_for_long, sys.argv[1]) as pool:
        for _ in pool.run([1, 2]):
            pass
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_process_that_started_it(sent: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent), *sys.path])
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert wait_until(lambda: len(list(tmp_path.glob("pid-*"))) == 2)
        if sent == signal.SIGINT:
            os.killpg(process.pid, sent)  # as a terminal does
        else:
            process.kill()
        _, said = process.communicate(timeout=60)
        pids = [int(found.name.removeprefix("pid-")) for found in tmp_path.glob("pid-*")]
        assert len(pids) == 2 and wait_until(lambda: not any(is_running(pid) for pid in pids))
        assert (tmp_path / "left-1").exists() and (tmp_path / "left-2").exists(), (
            "a `with` block in a worker was not left"
        )
        if sent == signal.SIGINT:
            assert said.count("Traceback") == 1 and "KeyboardInterrupt" in said, "of the parent, and no worker"
    finally:
        process.kill()


# --- Ray's cluster -------------------------------------------------------------------------------


@RAY
def test_a_cluster_of_our_own_listens_on_loopback_only(cluster: None) -> None:
    import ray

    daemons = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if any(part in path.read_bytes() for part in (b"/raylet", b"/gcs_server"))
    ]
    inodes = set()
    for pid in daemons:
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            target = str(handle.readlink())
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                listening.append(fields[1].partition(":")[0])
    assert listening and set(listening) <= {"0100007F", "0000000000000000FFFF00000100007F"}
    assert ray.is_initialized()


@RAY
def test_a_cluster_that_is_not_there_is_an_error_of_the_machine() -> None:
    """In a process of its own: this one may be in a cluster already."""
    code = (
        "from edgeprune.executors import load_executor\n"
        "from edgeprune.core.errors import DeviceError\n"
        "try: load_executor('ray:address=127.0.0.1:1')(print, None)\n"
        "except DeviceError as error: print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120).stdout
    assert "no Ray cluster to join at '127.0.0.1:1'" in said and "refused" in said


@RAY
def test_a_cluster_is_joined_by_its_address_and_left_as_it_was(cluster: None, tmp_path: Path) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    code = (
        "import sys\n"
        "from edgeprune.executors import load_executor\n"
        "from test_executors import fail_on_two\n"
        "with load_executor('ray:workers=1' + sys.argv[2])(fail_on_two, sys.argv[1]) as pool:\n"
        "    print(pool.size, list(pool.run([3])))\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent), *sys.path])
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # else Ray looks for it at the machine's outer address
    for option, named in ((f",address={address}", ""), ("", address)):
        said = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), option], check=True, capture_output=True, text=True,
            timeout=120, env={**os.environ, **loopback, "PYTHONPATH": path, "RAY_ADDRESS": named},
        ).stdout  # fmt: skip
        assert said == "1 [(0, -3)]\n"
    assert len(ray.nodes()) == 1 and ray.nodes()[0]["Alive"]
