"""What runs on the board: carries out a job's steps and appends each result to a file.

    python agent.py start JOB      read a job from standard input, detach, carry it out; prints the process id
    python agent.py stop JOB       kill the agent of JOB

Beside it on the board lie measure.py, which takes the measurements, and runtime.py, which runs models.
They need Python 3.9, numpy and the runtime's own package, nothing else of edgeprune.

JOB/results.jsonl gets one line per event: `begin` and `result` of a step from the worker, `exit` of the
worker from its supervisor, so that the host need only read one file. A step whose result is in the file
is not done again. Only one agent of a board measures at a time (BOARD_LOCK).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import glob
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MARK = "@@edgeprune@@"
# One for all users of the board, on purpose. Android has no /tmp, and only one user.
BOARD_LOCK = Path("/tmp" if Path("/tmp").is_dir() else tempfile.gettempdir(), "edgeprune-board.lock")  # noqa: S108
BOARD_LOCK_TIMEOUT_S = 1800.0
DEATHS_PER_STEP = 2
"""A step that took the agent down this often is given up, so that the others are still done."""
PR_SET_PDEATHSIG = 1


# --- starting and stopping -----------------------------------------------------------------------


def start(job: Path) -> int:
    """Take a job from standard input, end the agent that JOB may have, detach a new one; print its id.

    An agent that works for another client is left alone, and that client printed, unless `force` is set.
    """
    job.mkdir(parents=True, exist_ok=True)
    spec = json.load(sys.stdin)
    lock = os.open(job / "agent.lock", os.O_CREAT | os.O_RDWR, 0o600)
    client = job / "agent.client"
    if not _try_lock(lock):
        holder = json.loads(client.read_text()) if client.exists() else None
        if holder not in (None, spec["client"]) and not spec["force"]:
            print(MARK, json.dumps({"busy": holder}))
            return 0
        if not _kill_holder(job, lock):
            return 1
    client.write_text(json.dumps(spec["client"]))
    log = os.open(job / "agent.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    pid = os.fork()
    if pid:
        (job / "agent.pid").write_text(str(pid))
        print(MARK, json.dumps({"pid": pid}))
        return 0
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os._exit(_supervise(job, spec))


def _supervise(job: Path, spec: dict[str, Any]) -> int:
    """Run the worker in a child, so that someone is left to say how it ended."""
    results = Results(job, spec["run"])
    worker = os.fork()
    if worker == 0:
        code = 1
        try:
            _die_with_parent()
            work(spec, results)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(worker, 0)
    rc = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    results.close_line()
    results.append({"event": "exit", "rc": rc})
    return 0


def stop(job: Path) -> int:
    """Kill the agent of JOB, if there is one, and wait until it is gone."""
    try:
        lock = os.open(job / "agent.lock", os.O_RDWR)
    except FileNotFoundError:
        return 0
    return 0 if _kill_holder(job, lock) else 1


def _kill_holder(job: Path, lock: int) -> bool:
    """Take JOB's lock from the agent that holds it, if one does, by killing that. False when it does not die."""
    for _ in range(500):
        if _try_lock(lock):
            return True
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, ValueError):
            os.killpg(int((job / "agent.pid").read_text()), signal.SIGKILL)
        time.sleep(0.01)
    print("the agent of an earlier run does not die", file=sys.stderr)
    return False


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _die_with_parent() -> None:
    """Kill this process when its supervisor dies, and let the out-of-memory killer take it first."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


class Results:
    """JOB/results.jsonl: append-only, each line on disk before the next step begins."""

    def __init__(self, job: Path, run: str) -> None:
        self.path = job / "results.jsonl"
        self.run = run

    def append(self, event: dict[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps({"run": self.run, **event}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def close_line(self) -> None:
        """Drop a last line that a kill cut short."""
        with contextlib.suppress(FileNotFoundError):
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_bytes().splitlines()] if self.path.exists() else []


# --- the job -------------------------------------------------------------------------------------


def work(spec: dict[str, Any], results: Results) -> None:
    """Carry out the steps of `spec` that have no result yet, in order."""
    # Not above, so that starting and stopping cost no import of numpy.
    import measure  # type: ignore[import-not-found]
    import pin  # type: ignore[import-not-found]

    results.close_line()
    events = results.read()
    done = {
        (event["key"], event["fingerprint"])
        for event in events
        # Of an earlier run: no failures, and no outputs, whose file may be gone.
        if event["event"] == "result"
        and (event["run"] == results.run or (event["error"] is None and event["kind"] != "outputs"))
    }
    deaths = find_deaths([event for event in events if event["run"] == results.run])
    pinned = Path(spec["job"]).resolve() / "pinned.json"
    os.chdir(spec["files"])
    for step in spec["steps"]:
        if (step["key"], step["fingerprint"]) in done:
            continue
        event: dict[str, Any] = {"event": "result", "key": step["key"], "kind": step["kind"]}
        event["fingerprint"] = step["fingerprint"]
        codes = deaths.get(step["key"], [])
        if len(codes) >= DEATHS_PER_STEP:
            results.append({**event, "error": f"the agent died {len(codes)} times at this step: {describe(codes[-1])}"})
            continue
        results.append({"event": "begin", "key": step["key"]})
        try:
            with board_lock(spec["owner"]), pin.held(spec["pins"], pinned):
                event["before"] = read_sources(spec["sources"])
                event["value"] = measure.STEPS[step["kind"]](step, spec)
                event["after"] = read_sources(spec["sources"])
            event["error"] = None
        except Exception as error:  # whatever one artifact does, the next one is still measured
            traceback.print_exc()
            event["error"] = f"{type(error).__name__}: {error}"[:2000]
        results.append(event)
        gc.collect()
        time.sleep(0.005)  # lets an agent that waits for the board lock have it


def find_deaths(events: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Step -> exit codes of the workers that died at it, in order; a signal is below 0.

    Where even the supervisor is gone, as after a reboot, nobody wrote an exit: that counts as a kill.
    """
    deaths: dict[str, list[int]] = {}
    at = None
    for event in [*events, {"event": "exit", "rc": -signal.SIGKILL}]:
        if at is not None and event["event"] in ("begin", "exit"):
            deaths.setdefault(at, []).append(event.get("rc", -signal.SIGKILL))
        at = event["key"] if event["event"] == "begin" else None
    return deaths


def describe(code: int) -> str:
    """An exit code in words, with what it usually means."""
    if code >= 0:
        return f"exit {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    hints = {signal.SIGKILL: "is the board out of memory?", signal.SIGSEGV: "the runtime crashes on this model"}
    hints[signal.SIGILL] = "the runtime was built for another processor"
    hint = hints.get(-code)  # type: ignore[call-overload]  # a number equals its enumeration member
    return f"signal {-code} ({name})" + (f": {hint}" if hint else "")


@contextlib.contextmanager
def board_lock(owner: str) -> Iterator[None]:
    """Hold the board alone. raises: TimeoutError naming who holds it."""
    descriptor = _open_board_lock()
    try:
        limit = time.monotonic() + BOARD_LOCK_TIMEOUT_S
        while not _try_lock(descriptor):
            if time.monotonic() > limit:
                holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace")
                raise TimeoutError(f"the board is measuring for someone else: {holder}")
            time.sleep(0.002)
        with contextlib.suppress(OSError):  # another user's file can be locked, not written
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, owner.encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _open_board_lock() -> int:
    # Of another user, /tmp may let us open it only without creating it, or only for reading.
    for flags in (os.O_RDWR | os.O_CREAT, os.O_RDWR):
        with contextlib.suppress(PermissionError):
            descriptor = os.open(BOARD_LOCK, flags | os.O_NOFOLLOW, 0o666)
            with contextlib.suppress(PermissionError):
                os.fchmod(descriptor, 0o666)  # whatever our umask
            return descriptor
    return os.open(BOARD_LOCK, os.O_RDONLY | os.O_NOFOLLOW)


def read_sources(sources: dict[str, dict[str, list[str]]]) -> dict[str, str]:
    """Raw text of each source: what its command prints, or the lines of its files as `path:line`."""
    readings = {}
    for name, source in sources.items():
        lines = []
        for path in [path for pattern in source["files"] for path in sorted(glob.glob(pattern))]:  # noqa: PTH207
            with contextlib.suppress(OSError):  # a sensor may be there and refuse to be read
                lines += [f"{path}:{line}" for line in Path(path).read_text(errors="replace").splitlines()]
        if source["argv"]:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                done = subprocess.run(source["argv"], stdin=subprocess.DEVNULL, capture_output=True, timeout=5)
                lines.append(done.stdout.decode("utf-8", "replace").strip())
        readings[name] = "\n".join(lines)
    return readings


def main(argv: list[str]) -> int:
    return {"start": start, "stop": stop}[argv[1]](Path(argv[2]))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
