"""The one file that runs on the board: carries out a job's steps and appends each result to a file.

    python agent.py start JOB      detach, then carry out JOB/job.json; prints the process id
    python agent.py stop JOB       kill the agent of JOB
    python agent.py memory ...     one memory measurement, in this process

Needs Python 3.9, numpy and the runtime, nothing of edgeprune. JOB/results.jsonl gets one line per
event: `begin` and `result` of a step from the worker, `exit` of the worker from its supervisor, so that
the host need only read one file. A step whose result is in the file is not done again. Time is taken
here, never across the connection, and only one agent of a board measures at a time (BOARD_LOCK).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import glob
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

MARK = "@@edgeprune@@"
BOARD_LOCK = "/tmp/edgeprune-board.lock"
BOARD_LOCK_TIMEOUT_S = 1800.0
DEATHS_PER_STEP = 2
"""A step that took the agent down this often is given up, so that the others are still done."""
CLOCK_MULTIPLE = 1000
"""One sample is at least this many ticks of the clock."""
WARM_UP_WINDOW_S = 0.02
WARM_UP_LIMIT_S = 3.0
WARM_UP_TOLERANCE = 0.02
MAX_SAMPLES = 20_000
PR_SET_PDEATHSIG = 1


# --- starting and stopping -----------------------------------------------------------------------


def start(job: str) -> int:
    """Detach a supervisor and its worker unless JOB has them already; print the supervisor's id."""
    lock = os.open(os.path.join(job, "agent.lock"), os.O_CREAT | os.O_RDWR, 0o600)
    if not _try_lock(lock):
        print(MARK, json.dumps({"pid": _read_pid(job), "running": True}))
        return 0
    log = os.open(os.path.join(job, "agent.log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    pid = os.fork()
    if pid:
        with open(os.path.join(job, "agent.pid"), "w") as file:
            file.write(str(pid))
        print(MARK, json.dumps({"pid": pid, "running": False}))
        return 0
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os._exit(_supervise(job))


def _supervise(job: str) -> int:
    """Run the worker in a child, so that someone is left to say how it ended."""
    with open(os.path.join(job, "job.json")) as file:
        spec = json.load(file)
    results = Results(job, spec["run"])
    worker = os.fork()
    if worker == 0:
        code = 1
        try:
            _die_with_parent()
            work(job, spec, results)
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


def stop(job: str) -> int:
    """Kill the agent of JOB, if there is one, and wait until it is gone."""
    try:
        lock = os.open(os.path.join(job, "agent.lock"), os.O_RDWR)
    except FileNotFoundError:
        return 0
    for _ in range(500):
        if _try_lock(lock):
            return 0
        pid = _read_pid(job)
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        time.sleep(0.01)
    print("the agent does not die", file=sys.stderr)
    return 1


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_pid(job: str) -> int:
    try:
        with open(os.path.join(job, "agent.pid")) as file:
            return int(file.read() or 0)
    except (FileNotFoundError, ValueError):
        return 0


def _die_with_parent() -> None:
    """Kill this process when its supervisor dies, and let the out-of-memory killer take it first."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")


class Results:
    """JOB/results.jsonl: append-only, each line on disk before the next step begins."""

    def __init__(self, job: str, run: str) -> None:
        self.path = os.path.join(job, "results.jsonl")
        self.run = run

    def append(self, event: dict[str, Any]) -> None:
        with open(self.path, "ab") as file:
            file.write(json.dumps({"run": self.run, **event}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def close_line(self) -> None:
        """End a line that a kill cut short; it stays there, marked as what it is."""
        with open(self.path, "ab+") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                return
            file.seek(0)
            content = file.read()
            if not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)

    def read(self) -> list[dict[str, Any]]:
        try:
            with open(self.path, "rb") as file:
                return [json.loads(line) for line in file.read().split(b"\n")[:-1]]
        except FileNotFoundError:
            return []


# --- the job -------------------------------------------------------------------------------------


def work(job: str, spec: dict[str, Any], results: Results) -> None:
    """Carry out the steps of `spec` that have no result yet, in order."""
    results.close_line()
    events = results.read()
    done = {
        (event["key"], event["fingerprint"])
        for event in events
        # Of an earlier run: no failures, and no outputs, whose file may be gone.
        if event["event"] == "result"
        and (event["run"] == results.run or (event["error"] is None and event["kind"] != "outputs"))
    }
    begun = [event["key"] for event in events if event["event"] == "begin" and event["run"] == results.run]
    os.chdir(spec["files"])
    for step in spec["steps"]:
        if (step["key"], step["fingerprint"]) in done:
            continue
        event: dict[str, Any] = {"event": "result", "key": step["key"], "kind": step["kind"]}
        event["fingerprint"] = step["fingerprint"]
        if begun.count(step["key"]) >= DEATHS_PER_STEP:
            error = f"the agent was killed {DEATHS_PER_STEP} times at this step (is the board out of memory?)"
            results.append({**event, "error": error})
            continue
        results.append({"event": "begin", "key": step["key"]})
        try:
            with board_lock(spec["owner"]):
                event["before"] = read_sources(spec["sources"])
                event["value"] = STEPS[step["kind"]](step, spec, job)
                event["after"] = read_sources(spec["sources"])
            event["error"] = None
        except Exception as error:  # whatever one artifact does, the next one is still measured
            traceback.print_exc()
            event["error"] = f"{type(error).__name__}: {error}"[:2000]
        results.append(event)
        gc.collect()
        time.sleep(0.005)  # lets an agent that waits for the board lock have it


@contextlib.contextmanager
def board_lock(owner: str) -> Iterator[None]:
    """Hold the board alone. raises: TimeoutError naming who holds it."""
    try:
        descriptor = os.open(BOARD_LOCK, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        descriptor = os.open(BOARD_LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        with contextlib.suppress(PermissionError):
            os.fchmod(descriptor, 0o666)
    try:
        limit = time.monotonic() + BOARD_LOCK_TIMEOUT_S
        while not _try_lock(descriptor):
            if time.monotonic() > limit:
                with open(BOARD_LOCK, errors="replace") as file:
                    raise TimeoutError(f"the board is measuring for someone else: {file.read(200)}")
            time.sleep(0.002)
        with contextlib.suppress(PermissionError), open(BOARD_LOCK, "r+") as file:
            file.truncate()
            file.write(owner)
        yield
    finally:
        os.close(descriptor)


def read_sources(sources: dict[str, dict[str, list[str]]]) -> dict[str, str]:
    """Raw text of each source: what its command prints, or the lines of its files as `path:line`."""
    readings = {}
    for name, source in sources.items():
        lines = []
        for path in [path for pattern in source["files"] for path in sorted(glob.glob(pattern))]:
            with contextlib.suppress(OSError), open(path, errors="replace") as file:
                lines += [f"{path}:{line}" for line in file.read().splitlines()]
        if source["argv"]:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                done = subprocess.run(source["argv"], stdin=subprocess.DEVNULL, capture_output=True, timeout=5)
                lines.append(done.stdout.decode("utf-8", "replace").strip())
        readings[name] = "\n".join(lines)
    return readings


# --- ONNX Runtime --------------------------------------------------------------------------------


def open_model(path: str, threads: int, profile: str | None = None) -> Any:
    """An inference session as an app would open it, with `threads` intra-op threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


NUMPY_TYPES = {"float": "float32", "double": "float64", "float16": "float16", "bool": "bool"}


def load_examples(model: Any, inputs: str | None) -> dict[str, Any]:
    """Model input -> array, leading axis examples; one random example where `inputs` is None."""
    import numpy as np

    if inputs is not None:
        with np.load(inputs, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        names = [argument.name for argument in model.get_inputs()]
        if sorted(arrays) != sorted(names):
            raise ValueError(f"{inputs} holds {sorted(arrays)}, the model reads {sorted(names)}")
        if len({len(array) for array in arrays.values()}) != 1 or len(arrays[names[0]]) == 0:
            raise ValueError(f"{inputs}: every array needs the same number of examples, at least one")
        return arrays
    generator = np.random.default_rng(0)
    examples = {}
    for argument in model.get_inputs():
        kind = argument.type[len("tensor(") : -1]
        dtype = np.dtype(NUMPY_TYPES.get(kind, kind))
        shape = [size if isinstance(size, int) and size > 0 else 1 for size in argument.shape]
        # Zeros where numbers are indices: any other could lie outside the table they index.
        values = generator.standard_normal(shape) if dtype.kind == "f" else np.zeros(shape)
        examples[argument.name] = values.astype(dtype)
    return examples


def first_example(examples: dict[str, Any]) -> dict[str, Any]:
    """One feed of batch 1; a random example is its own."""
    return {name: array[:1] for name, array in examples.items()}


# --- the four kinds of step ----------------------------------------------------------------------


def measure_time(step: dict[str, Any], spec: dict[str, Any], job: str) -> dict[str, Any]:
    """Whole-model latency: warm up until stable, then samples of `loops` runs each, in seconds."""
    model = open_model(step["artifact"], spec["threads"])
    examples = load_examples(model, step["inputs"])
    feed = first_example(examples) if step["inputs"] else examples
    run_s, warmups = warm_up(model, feed)
    loops = max(1, math.ceil(CLOCK_MULTIPLE * clock_tick_s() / run_s))
    values: list[float] = []
    clock, run, each = time.perf_counter_ns, model.run, range(loops)
    gc.collect()
    gc.disable()
    try:
        began = clock()
        while True:
            before = clock()
            for _ in each:
                run(None, feed)
            after = clock()
            values.append((after - before) * 1e-9 / loops)
            if len(values) >= MAX_SAMPLES:
                reason = "sample limit"
                break
            if (after - began) * 1e-9 >= step["seconds"] and len(values) >= step["min_samples"]:
                reason = "time limit" if len(values) > step["min_samples"] else "minimum of samples"
                break
    finally:
        gc.enable()
    return {"values": values, "loops": loops, "warmups": warmups, "stopped_because": reason}


def warm_up(model: Any, feed: dict[str, Any]) -> tuple[float, int]:
    """Run until the medians of two successive windows agree. returns: seconds per run, runs made."""
    began = time.perf_counter()
    model.run(None, feed)
    first = time.perf_counter() - began
    window = min(50, max(2, math.ceil(WARM_UP_WINDOW_S / max(first, 1e-7))))
    runs, previous = 1, math.inf
    while True:
        durations = []
        for _ in range(window):
            before = time.perf_counter()
            model.run(None, feed)
            durations.append(time.perf_counter() - before)
        runs += window
        median = max(statistics.median(durations), 1e-7)
        stable = abs(median - previous) <= WARM_UP_TOLERANCE * median
        if stable or time.perf_counter() - began > WARM_UP_LIMIT_S:
            return median, runs
        previous = median


def clock_tick_s() -> float:
    """The smallest step between two readings of the clock, calls included, in seconds."""
    ticks = []
    for _ in range(200):
        before = time.perf_counter_ns()
        after = time.perf_counter_ns()
        while after == before:
            after = time.perf_counter_ns()
        ticks.append(after - before)
    return statistics.median(ticks) * 1e-9


def measure_kernels(step: dict[str, Any], spec: dict[str, Any], job: str) -> dict[str, Any]:
    """Seconds per kernel in order of execution, from the runtime's own profiler."""
    for stale in glob.glob(os.path.join(glob.escape(job), "profile_*")):
        os.unlink(stale)
    model = open_model(step["artifact"], spec["threads"], profile=os.path.join(job, "profile"))
    examples = load_examples(model, step["inputs"])
    feed = first_example(examples) if step["inputs"] else examples
    warm_up(model, feed)
    for _ in range(step["runs"]):
        model.run(None, feed)
    path = model.end_profiling()
    with open(path, encoding="utf-8", errors="replace") as file:
        events = json.load(file)
    os.unlink(path)
    return parse_profile(events, step["runs"])


def parse_profile(events: list[dict[str, Any]], runs: int) -> dict[str, Any]:
    """Typical seconds of each kernel and of the run, over the last `runs` runs of an ORT profile.

    ORT counts whole microseconds, so a median would lose most of a short kernel's resolution: the
    mean of the middle half keeps it and is as deaf to outliers.
    """
    finished: list[tuple[float, list[dict[str, Any]]]] = []
    kernels: list[dict[str, Any]] = []
    for event in events:
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            kernels.append(event)
        elif event.get("cat") == "Session" and name == "model_run":
            finished.append((event["dur"], kernels))
            kernels = []
    last = finished[-runs:]
    if len(last) < runs:
        raise ValueError(f"the runtime's profile holds {len(last)} runs of {runs}")
    orders = [[(e["name"], e["args"]["op_name"]) for e in kernels] for _, kernels in last]
    if any(order != orders[0] for order in orders):
        raise ValueError("the runtime executed its kernels in different orders")
    if not orders[0]:
        raise ValueError("the runtime's profile holds no kernels")
    typical = [
        {
            "name": name[: -len("_kernel_time")],
            "op": op,
            "time_s": middle_mean([kernels[place]["dur"] for _, kernels in last]) * 1e-6,
        }
        for place, (name, op) in enumerate(orders[0])
    ]
    return {"kernels": typical, "run_s": middle_mean([duration for duration, _ in last]) * 1e-6}


def middle_mean(values: list[float]) -> float:
    """Mean of the middle half."""
    ordered = sorted(values)
    cut = len(ordered) // 4
    return statistics.fmean(ordered[cut : len(ordered) - cut])


def compute_outputs(step: dict[str, Any], spec: dict[str, Any], job: str) -> dict[str, Any]:
    """Outputs for every example, one example at a time, saved beside the artifact."""
    import numpy as np

    model = open_model(step["artifact"], spec["threads"])
    examples = load_examples(model, step["inputs"])
    names = [argument.name for argument in model.get_outputs()]
    collected: list[list[Any]] = [[] for _ in names]
    count = len(next(iter(examples.values()))) if step["inputs"] else 1
    for i in range(count):
        feed = {name: array[i : i + 1] for name, array in examples.items()} if step["inputs"] else examples
        for store, output in zip(collected, model.run(None, feed)):  # noqa: B905  (Python 3.9 has no strict)
            store.append(output)
    path = f"{step['fingerprint'][:16]}.outputs.npz"
    with open(path + ".part", "wb") as file:
        np.savez(file, **{name: np.concatenate(store) for name, store in zip(names, collected)})  # noqa: B905
    os.replace(path + ".part", path)
    return {"outputs": path}


def measure_memory(step: dict[str, Any], spec: dict[str, Any], job: str) -> dict[str, Any]:
    """Peak resident sets, in a process that does nothing else."""
    argument = json.dumps({"step": step, "threads": spec["threads"]})
    argv = [sys.executable, os.path.abspath(__file__), "memory", argument]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode != 0:
        hint = " (killed: is the board out of memory?)" if done.returncode == -signal.SIGKILL else ""
        tail = done.stderr.decode("utf-8", "replace")[-500:].strip()
        raise RuntimeError(f"the memory measurement ended with {done.returncode}{hint}: {tail}")
    value: dict[str, Any] = json.loads(done.stdout.rsplit(MARK.encode(), 1)[1])
    return value


def memory(argument: str) -> int:
    """Open a model, run it a few times and print what that did to the resident set, in bytes."""
    request = json.loads(argument)
    step = request["step"]
    model = open_model(step["artifact"], request["threads"])
    examples = load_examples(model, step["inputs"])
    feed = first_example(examples) if step["inputs"] else examples
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        # Opening a model leaves freed pages behind, into which activations would fit unseen.
        ctypes.CDLL(None).malloc_trim(0)
    loaded = resident_bytes("VmRSS")
    peak_loading = resident_bytes("VmHWM")
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets VmHWM to the present size
    for _ in range(3):
        model.run(None, feed)
    peak_running = resident_bytes("VmHWM")
    value = {"activation_bytes": max(0, peak_running - loaded), "process_bytes": max(peak_loading, peak_running)}
    print(MARK + json.dumps(value))
    return 0


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


STEPS = {"time": measure_time, "kernels": measure_kernels, "outputs": compute_outputs, "memory": measure_memory}


if __name__ == "__main__":
    sys.exit({"start": start, "stop": stop, "memory": memory}[sys.argv[1]](sys.argv[2]))
