"""The steps of a job, measured on the board. Copied there beside agent.py, with warm_up.py, runtime.py and others.

runtime.py is the module of `runtimes/` that the target names. Python 3.9, numpy and the runtime's own
package, nothing else of edgeprune.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import json
import math
import operator
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from edgeprune.device import by_input, energy
    from edgeprune.device.runtimes import onnxruntime as runtime
    from edgeprune.device.warm_up import WARM_UP_LIMIT_S, warm_up
else:
    import by_input
    import energy
    import runtime
    from warm_up import WARM_UP_LIMIT_S, warm_up

MARK = "@@edgeprune@@"
CLOCK_MULTIPLE = 1000
"""One sample is at least this many ticks of the clock."""
WARM_AGAIN_LIMIT_S = 0.5
"""Of kernels: the same files were warmed up at length when the whole model was timed."""
TURN_S = 0.005
"""A turn takes at least this long. The shorter, the less the machine changes from a turn to its neighbour."""
SPIN_S = 0.002
"""For so long the threads of a runtime may go on spinning after a run, in the way of another model's."""
MIN_TURNS = 5
MOST_TURNS_FOR_CLEAN = 25
"""Turns after which a timing may end though hardly one of them was left alone."""
AWAY_SHARE = 0.02
"""A turn was interrupted when the processor did something else for more than this share of it."""
PROBES, PROBE_S, PROBE_LIMIT_S = 20, 0.001, 0.3
"""To see once that nothing interrupted: long against reading the clocks, short against what others leave."""
MAX_SAMPLES_PER_TURN = 1000
MAX_SAMPLES = 20_000
MMAP_THRESHOLD_BYTES = 131072
"""glibc's default (mallopt(3)), which setting it keeps from growing."""
CHILD_LIMIT_S = 300
BURST = 3
"""Profiled runs that count in a row, of each of two models in turns."""


def load_examples(model: runtime.Model, inputs: str | None) -> dict[str, Any]:
    """Model input -> array, leading axis examples; one random example where `inputs` is None."""
    if inputs is not None:
        with np.load(inputs, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        if sorted(arrays) != sorted(model.inputs):
            raise ValueError(f"{inputs} holds {sorted(arrays)}, the model reads {sorted(model.inputs)}")
        if len({len(array) for array in arrays.values()}) != 1 or 0 in map(len, arrays.values()):
            raise ValueError(f"{inputs}: every array needs the same number of examples, at least one")
        return arrays
    generator = np.random.default_rng(0)
    examples = {}
    for name, (shape, dtype) in model.inputs.items():
        # Zeros where numbers are indices: any other could lie outside the table they index.
        values = generator.standard_normal(shape) if np.dtype(dtype).kind == "f" else np.zeros(shape)
        examples[name] = values.astype(dtype)
    return examples


def open_step(
    step: dict[str, Any], spec: dict[str, Any], *, threads: int | None = None, profile: str | None = None
) -> tuple[runtime.Model, dict[str, Any]]:
    """The step's model, and one feed of batch 1 for it."""
    model = runtime.Model(step["artifact"], threads or spec["threads"], profile, **spec["options"])
    examples = load_examples(model, step["inputs"])
    # A random example has the shape the model asks for, whatever its batch.
    return model, {name: array[:1] for name, array in examples.items()} if step["inputs"] else examples


# --- the kinds of step ----------------------------------------------------------------------


def measure_time(step: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """Whole-model latency in short turns, each followed or preceded by one of the model to compare with, if any.

    A machine that others share changes its speed from second to second: only runs milliseconds apart
    can be compared. So the ratio of two models comes from neighbouring turns, and a median over those.
    """
    threads = step["threads"] or spec["threads"]
    most = max(threads, spec["threads"])
    warm_up_s = WARM_UP_LIMIT_S if not step["steady"] else 0.0
    timers = [Timer(*open_step(step, spec, threads=threads), most, warm_up_s)]
    if step["against"]:
        timers.append(Timer(*open_step({**step, "artifact": step["against"]}, spec), most, warm_up_s))
    longest = max(timer.turn_s for timer in timers)
    for timer in timers:
        # The same time for both: a disturbance must be as likely to fall into the one's turn as the other's.
        timer.samples = min(MAX_SAMPLES_PER_TURN, max(1, round(longest / (timer.run_s * timer.loops))))
    gc.collect()
    gc.disable()
    began = time.perf_counter()
    reason = ""
    try:
        while not reason:
            # Who goes first alternates, so that a drift meets both alike.
            for timer in timers if len(timers[0].turns) % 2 == 0 else reversed(timers):
                timer.take_turn(alone=len(timers) == 1)
            reason = stop_reason(step, timers, time.perf_counter() - began)
    finally:
        gc.enable()
    samples = [
        {
            "values": [value for turn in timer.turns for value in turn],
            "per_turn": timer.samples,
            "interrupted": timer.interrupted,
            "at_work": timer.at_work or [],
            "loops": timer.loops,
            "warmups": timer.warm.runs,
            "warm_up_ended": timer.warm.ended,
            "stopped_because": reason,
        }
        for timer in timers
    ]
    return {"samples": samples[0], "against": samples[1] if len(samples) > 1 else None}


class Timer:
    """One model and the turns it had: `samples` samples of `loops` runs each."""

    def __init__(self, model: runtime.Model, feed: dict[str, Any], threads: int, warm_up_s: float) -> None:
        self.run = functools.partial(model.run, feed)
        self.warm = warm_up(self.run, limit_s=warm_up_s)
        self.run_s = self.warm.run_s
        self.loops = max(1, math.ceil(CLOCK_MULTIPLE * clock_tick_s() / self.run_s))
        self.samples = 1
        self.turns: list[list[float]] = []
        self.medians: list[float] = []
        self.interrupted: list[int] = []
        self.at_work: list[float] | None = [] if threads == 1 and works_here(self.run, self.run_s) else None
        # A long run refills the caches by itself. The other's threads spin on after its last run.
        self.settle = 1 if self.run_s * self.loops < TURN_S else 0
        if threads > 1:
            self.settle = max(1, math.ceil(SPIN_S / self.run_s))

    @property
    def turn_s(self) -> float:
        return max(TURN_S, self.run_s * self.loops)

    def take_turn(self, *, alone: bool) -> None:
        clock, run, each = time.perf_counter_ns, self.run, range(self.loops)
        for _ in range(0 if alone else self.settle):
            run()
        turn = []
        began, at_work = clock(), time.thread_time_ns()
        for _ in range(self.samples):
            before = clock()
            for _ in each:
                run()
            turn.append((clock() - before) * 1e-9 / self.loops)
        if self.at_work is not None:
            self.at_work.append((time.thread_time_ns() - at_work) * 1e-9 / (self.samples * self.loops))
        if was_interrupted(began, at_work):
            self.interrupted.append(len(self.turns))
        self.turns.append(turn)
        self.medians.append(statistics.median(turn))


def measure_inputs(step: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """Typical latency of each example on its own, and of the model to compare with, if any, beside it."""
    threads = step["threads"] or spec["threads"]
    model, _ = open_step(step, spec, threads=threads)
    models = [model] + ([open_step({**step, "artifact": step["against"]}, spec)[0]] if step["against"] else [])
    examples = load_examples(model, step["inputs"])
    count = len(next(iter(examples.values()))) if step["inputs"] else 1
    feeds = [{name: array[i : i + 1] for name, array in examples.items()} for i in range(count)]
    feeds = feeds if step["inputs"] else [examples]
    warm_up_s = WARM_UP_LIMIT_S if not step["steady"] else 0.0
    timers = [Timer(each, feeds[0], max(threads, spec["threads"]), warm_up_s) for each in models]
    loops = max(timer.loops for timer in timers)
    gc.collect()
    gc.disable()
    try:
        values, rounds = by_input.time_inputs(
            [each.run for each in models], feeds, step["seconds"], run_s=max(timer.run_s for timer in timers),
            loops=loops, working=all(timer.at_work is not None for timer in timers), steady=step["steady"],
        )  # fmt: skip
    finally:
        gc.enable()
    samples = [
        {
            "values": each,
            "per_turn": 1,
            "loops": loops,
            "warmups": timer.warm.runs,
            "warm_up_ended": timer.warm.ended,
            "stopped_because": f"{rounds} rounds over {len(each)} of {count} inputs",
        }
        for each, timer in zip(values, timers)  # noqa: B905
    ]
    return {"samples": samples[0], "against": samples[1] if len(samples) > 1 else None}


def stop_reason(step: dict[str, Any], timers: list[Timer], elapsed_s: float) -> str:
    """Why a timing is over; empty while it is not."""
    turns, first = len(timers[0].turns), timers[0].samples
    # Processor time is that of undisturbed turns in any case.
    disturbed = {place for timer in timers if not timer.at_work for place in timer.interrupted}
    clean = turns - len(disturbed)
    if step["steady"] and clean and turns * first >= step["min_samples"]:
        return "steady board"
    if turns < MIN_TURNS or (clean < MIN_TURNS and turns < MOST_TURNS_FOR_CLEAN):
        return ""
    # Looking costs time too: now and then is often enough.
    if step["precision"] and turns % 8 == 0:
        values = timers[0].medians if len(timers) == 1 else turn_ratios(*timers)
        if half_width(values) <= step["precision"] * statistics.median(values):
            return "interval"
    if turns * max(timer.samples for timer in timers) >= MAX_SAMPLES:
        return "sample limit"
    if elapsed_s >= step["seconds"] and turns * first >= step["min_samples"]:
        return "time limit"
    return ""


def turn_ratios(ours: Timer, theirs: Timer) -> list[float]:
    """Ratios of neighbouring turns without what other processes took of them (as `core.stats`)."""
    if ours.at_work and theirs.at_work:
        each = list(map(operator.truediv, ours.at_work, theirs.at_work))
        # Two successive ones were measured in opposite order.
        return [math.sqrt(one * other) for one, other in zip(each[::2], each[1::2])]  # noqa: B905
    ratios = list(map(operator.truediv, ours.medians, theirs.medians))
    disturbed = {*ours.interrupted, *theirs.interrupted}
    clean = [ratio for place, ratio in enumerate(ratios) if place not in disturbed]
    return clean if len(clean) >= MIN_TURNS else ratios


def works_here(run: Callable[[], Any], run_s: float) -> bool:
    """Whether the runtime works in this thread, so that its processor time is the latency without interruptions.

    It is not where other threads or an accelerator work and this one waits.
    """
    limit = time.perf_counter() + PROBE_LIMIT_S
    for _ in range(PROBES):
        began, at_work = time.perf_counter_ns(), time.thread_time_ns()
        for _ in range(max(1, round(PROBE_S / run_s))):
            run()
        if not was_interrupted(began, at_work):
            return True
        if time.perf_counter() > limit:
            break
    return False


def half_width(values: list[float]) -> float:
    """Half of the 95 % interval of the median, from order statistics (Conover, Practical Nonparametric Statistics)."""
    ordered, count = sorted(values), len(values)
    reach = 0.98 * math.sqrt(count)
    low, high = max(0, math.floor(count / 2 - reach)), min(count - 1, math.ceil(count / 2 + reach))
    return (ordered[high] - ordered[low]) / 2


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


def measure_kernels(step: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds per kernel in order of execution, from the runtime's own profiler.

    With a model to compare with, both are profiled in turns of a few runs, so that what is measured of
    the one can be held against the speed the board had at that moment.
    """
    artifacts = [step["artifact"], *([step["against"]] if step["against"] else [])]
    with tempfile.TemporaryDirectory(dir=spec["job"]) as folder:
        models = [
            open_step({**step, "artifact": artifact}, spec, profile=f"{folder}/{number}-profile")
            for number, artifact in enumerate(artifacts)
        ]
        for model, feed in models:
            warm_up(functools.partial(model.run, feed), limit_s=WARM_AGAIN_LIMIT_S if not step["steady"] else 0.0)
        burst = min(BURST, step["runs"])
        bursts = math.ceil(step["runs"] / burst)
        whole: list[list[bool]] = [[] for _ in models]
        for _ in range(bursts):
            for number, (model, feed) in enumerate(models):
                for _ in range(1 + burst):
                    began, at_work = time.perf_counter_ns(), time.thread_time_ns()
                    model.run(feed)
                    whole[number].append(not was_interrupted(began, at_work))
        ends = [model.end_profile()[-bursts * (1 + burst) :] for model, _ in models]
    if len(ends[0]) < bursts * (1 + burst) or not ends[0][0][1]:
        raise ValueError(f"the runtime's profile holds {len(ends[0])} runs of {bursts * (1 + burst)}")
    enough = MIN_TURNS if not step["steady"] else 1
    runs, others = (pick_runs(ends[place], whole[place], burst, enough) for place in (0, -1))
    orders = [[(name, op) for name, op, _ in kernels] for _, kernels in runs]
    if any(order != orders[0] for order in orders):
        raise ValueError("the runtime executed its kernels in different orders")
    typical = [
        {"name": name, "op": op, "time_s": middle_mean([kernels[place][2] for _, kernels in runs])}
        for place, (name, op) in enumerate(orders[0])
    ]
    against_run_s = middle_mean([duration for duration, _ in others]) if step["against"] else None
    return {
        "kernels": typical,
        "run_s": middle_mean([duration for duration, _ in runs]),
        "against_run_s": against_run_s,
    }


def pick_runs(runs: list[Any], whole: list[bool], burst: int, enough: int) -> list[Any]:
    """The profiled runs that count: those that nothing interrupted, of all where these are not enough.

    burst: runs in a row that count; the one before them finds the caches as the other model left them.
    """
    places = [place for place in range(len(runs)) if place % (1 + burst)]
    clean = [place for place in places if whole[place]]
    return [runs[place] for place in (clean if len(clean) >= enough else places)]


def was_interrupted(began_ns: int, at_work_ns: int) -> bool:
    """Whether this thread was without the processor for a good share of the time since then.

    began_ns: reading of `perf_counter_ns`; at_work_ns: of `thread_time_ns`, taken after it.
    """
    at_work = time.thread_time_ns() - at_work_ns
    return at_work < (1 - AWAY_SHARE) * (time.perf_counter_ns() - began_ns)


def middle_mean(values: list[float]) -> float:
    """Mean of the middle half.

    A profiler may count whole microseconds, of which a median would keep no more than one: this keeps
    the resolution and is as deaf to outliers.
    """
    ordered = sorted(values)
    cut = len(ordered) // 4
    return statistics.fmean(ordered[cut : len(ordered) - cut])


def compute_outputs(step: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """Outputs for every example, one example at a time, saved beside the artifact."""
    model = runtime.Model(step["artifact"], spec["threads"], **spec["options"])
    examples = load_examples(model, step["inputs"])
    if step["inputs"]:
        count = len(next(iter(examples.values())))
        rows = [model.run({name: array[i : i + 1] for name, array in examples.items()}) for i in range(count)]
    else:
        rows = [model.run(examples)]
    arrays: dict[str, Any] = {name: np.concatenate([row[i] for row in rows]) for i, name in enumerate(model.outputs)}
    path = f"{step['fingerprint'][:16]}.outputs.npz"
    with Path(path + ".part").open("wb") as file:
        np.savez(file, **arrays)
    os.replace(path + ".part", path)
    return {"outputs": path}


def measure_memory(step: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """Peak resident sets, in a process that does nothing else."""
    argument = json.dumps({"step": step, "spec": {"threads": spec["threads"], "options": spec["options"]}})
    argv = [sys.executable, __file__, argument]
    # Large allocations come as mappings of their own, not from holes that loading left: the same every time.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD_BYTES)}
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, env=environment)
    if done.returncode != 0:
        hint = " (killed: is the board out of memory?)" if done.returncode == -signal.SIGKILL else ""
        tail = done.stderr.decode("utf-8", "replace")[-500:].strip()
        raise RuntimeError(f"the memory measurement ended with {done.returncode}{hint}: {tail}")
    value: dict[str, Any] = json.loads(done.stdout.rsplit(MARK.encode(), 1)[1])
    return value


def memory(argument: str) -> int:
    """Open a model, run it a few times and print what that did to the resident set, in bytes."""
    request = json.loads(argument)
    # A forked child has none of its parent's threads.
    threads = 1 if runtime.HOLDS_ACTIVATIONS else None
    model, feed = open_step(request["step"], request["spec"], threads=threads)
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        # Opening a model leaves freed pages behind, into which activations would fit unseen.
        ctypes.CDLL(None).malloc_trim(0)
    peak_loading = resident_bytes("VmHWM")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to the present size
    loaded, mapped, reset_to = resident_bytes("VmRSS"), resident_bytes("RssFile"), resident_bytes("VmHWM")
    run = functools.partial(model.run, feed)
    for _ in range(3):
        run()
    peak = resident_bytes("VmHWM")
    # Code and weights that a first run maps in from files are not activations.
    growth = peak - loaded - (resident_bytes("RssFile") - mapped)
    # Where the kernel does not reset, a peak no higher than that of loading tells nothing.
    known = reset_to < peak_loading or peak > peak_loading or peak_loading == loaded
    activations = written_bytes(run) if runtime.HOLDS_ACTIVATIONS else max(0, growth) if known else None
    print(MARK + json.dumps({"activation_bytes": activations, "process_bytes": max(peak_loading, peak)}))
    return 0


def written_bytes(run: Callable[[], Any]) -> int | None:
    """Memory that a run writes: the pages that a child which runs it no longer shares with this process.

    About 0.1 MiB of it is Python's. None where the kernel does not tell (before 4.14), or the child does not end.
    """
    receiver, sender = os.pipe()
    if (child := os.fork()) == 0:
        try:
            signal.alarm(CHILD_LIMIT_S)  # a delegate's driver may not survive the fork
            private_bytes()  # what reading it writes is not the run's
            before = private_bytes()
            for _ in range(3):
                run()
            os.write(sender, str(max(0, private_bytes() - before)).encode())
        finally:
            os._exit(0)
    os.close(sender)
    with os.fdopen(receiver) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return int(text) if text else None


def private_bytes() -> int:
    """Memory of this process that no other process shares and that is not as it is in a file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty:"))


def resident_bytes(field: str) -> int:
    """VmRSS, VmHWM or RssFile of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure_energy(step: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """Readings of the board's meter, at rest and while the model runs in a loop."""
    model, feed = open_step(step, spec)
    run = functools.partial(model.run, feed)
    warm_up(run)
    return energy.measure_power(run, step["seconds"], spec["meter"])


STEPS = {
    "time": measure_time,
    "inputs": measure_inputs,
    "kernels": measure_kernels,
    "outputs": compute_outputs,
    "memory": measure_memory,
    "energy": measure_energy,
}


if __name__ == "__main__":
    sys.exit(memory(sys.argv[1]))
