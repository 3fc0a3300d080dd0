"""TFLite on the processor (LiteRT, tflite-runtime or TensorFlow): how the agent runs and profiles a model.

The agent gets this file as runtime.py: Python 3.9 and the standard library only, until a model is opened.

Options: `delegate=xnnpack` (refuse to go on without it), `none`, `gpu`, `nnapi` or the path of an external
delegate; left out, the interpreter does as it does in an app. `benchmark=PATH`: the board's benchmark_model,
which tells the operations' times where the interpreter cannot.

None of the three packages shows a profiler to Python. LiteRT has one behind its C interface, in the shared
library that the wheel brings: see `LiteRtProfiler`.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import functools
import importlib
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

FORMAT = "tflite"
OPTIONS = ("delegate", "benchmark")
ACTIVATIONS = ("int8",)
MODULES = ("ai_edge_litert|tflite_runtime|tensorflow", "numpy")
BY_HAND: dict[str, str] = {}
BRANCHES = False
HOLDS_ACTIVATIONS = True
WHEELS = (
    {
        "requirements": ("ai-edge-litert==2.3.0", "numpy>=1.26,<3"),
        "architectures": ("x86_64", "aarch64"),
        "pythons": ((3, 10), (3, 14)),
        "glibc": (2, 27),
    },
    {
        # With numpy 2 it can be installed and imported, and no model can be opened.
        "requirements": ("tflite-runtime==2.14.0", "numpy>=1.23.2,<2"),
        "architectures": ("x86_64", "aarch64", "armv7l"),
        "pythons": ((3, 9), (3, 11)),
        "glibc": (2, 34),
    },
    {
        "requirements": ("tflite-runtime==2.13.0", "numpy>=1.21.2,<2"),
        "architectures": ("x86_64", "aarch64", "armv7l"),
        "pythons": ((3, 9), (3, 9)),
        "glibc": (2, 17),
    },
)

INTERPRETERS = {
    "ai_edge_litert": "ai_edge_litert.interpreter",
    "tflite_runtime": "tflite_runtime.interpreter",
    "tensorflow": "tensorflow",
}
"""Where each package has its interpreter; the first that opens a model is taken."""
EXTERNAL = {"gpu": "libtensorflowlite_gpu_delegate.so", "nnapi": "libnnapi_delegate.so"}
"""Delegates that are libraries of their own: as they are called where the board's loader finds them."""
TINY = zlib.decompress(
    base64.b64decode(
        "eNpdjjEOwjAMRV9ohkiNqgwdOjBwBCTuwMTQgYEVTsJhGbhF+HGNiLD0FNn+/8cLcD1fTjCxMFPIJKI61MFeHMRbDCKI2Ga1VrzarIjc+bPP"
        "1pYvbq6bzTHZ27Sj/1W2qPHreyo/uGfHr0IHvjv6TS95kt2x7R+dNttdmLLte939LzeZKlrmB7GcEOg="
    )
)
"""A model that adds two numbers."""

PROFILED_VERSIONS = ("2.3.0",)
"""Versions of ai_edge_litert whose profiler is known; another one is tried in a process of its own first."""
TRIAL_TIMEOUT_S = 120
BENCHMARK_TIMEOUT_S = 600
BENCHMARK_RUNS = 50
INVOKE, OPERATOR, DELEGATED = 1, 2, 8
"""Kinds of events (tflite/core/api/profiler.h): anything, an operation of the interpreter, one inside a delegate."""
HALF_TICK_S = 0.5e-6
"""XNNPACK cuts its times down to whole microseconds, half of one too short on average."""
CPU, BUFFER_WRITE = 1, 1
DESTROYED_BY = {
    "CreateModelFromFile": "DestroyModel",
    "CreateOptions": "DestroyOptions",
    "CreateCompiledModel": "DestroyCompiledModel",
    "CreateManagedTensorBufferFromRequirements": "DestroyTensorBuffer",
}

Kernels = list[tuple[str, str, float]]


class NoKernels(Exception):
    """The runtime, as it is on this board, does not tell the times of single operations."""


# --- running -------------------------------------------------------------------------------------


class Model:
    """An interpreter as an app would open it. See `runtimes.Model`."""

    def __init__(
        self, path: str, threads: int, profile: str | None = None, *, delegate: str = "", benchmark: str = ""
    ) -> None:
        package, library = find_library()
        interpreter = open_interpreter(library, path, threads, delegate)
        import numpy as np

        inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
        self.inputs: dict[str, tuple[list[int], str]] = {
            entry["name"]: ([int(size) for size in entry["shape"]], np.dtype(entry["dtype"]).name) for entry in inputs
        }
        self.outputs: list[str] = [entry["name"] for entry in outputs]
        self._benchmark: list[str] = []
        self._runs = 0
        if profile is not None and not benchmark:
            self._profiler = open_profiler(package, path, threads, delegate)
            self.run: Callable[[Mapping[str, Any]], list[Any]] = self._profiler.run
            return
        if profile is not None:
            self._benchmark = benchmark_command(benchmark, path, threads, delegate)
        self._set, self._invoke, self._get = interpreter.set_tensor, interpreter.invoke, interpreter.get_tensor
        self._inputs = [(entry["name"], entry["index"]) for entry in inputs]
        self._outputs = [entry["index"] for entry in outputs]
        self.run = self._run

    def _run(self, feed: Mapping[str, Any]) -> list[Any]:
        # The interpreter may use an input's memory again while it runs: every run needs it anew, as in an app.
        for name, index in self._inputs:
            self._set(index, feed[name])
        self._invoke()
        self._runs += 1
        return [self._get(index) for index in self._outputs]

    def end_profile(self) -> list[tuple[float, Kernels]]:
        """Per run made so far: its seconds, and (name, op, seconds) of each kernel in order.

        A kernel's name is `node:N`, N the operation's place in the file, or, inside a delegate,
        `delegate:N`, counted from 0 in each of its partitions.
        """
        if not self._benchmark:
            return [read_events(events) for events in self._profiler.runs]
        # benchmark_model tells means over its runs: each of ours is such a one.
        done = subprocess.run(
            self._benchmark, stdin=subprocess.DEVNULL, capture_output=True, timeout=BENCHMARK_TIMEOUT_S
        )
        said = (done.stdout + done.stderr).decode("utf-8", "replace")
        if done.returncode != 0:
            raise RuntimeError(f"{self._benchmark[0]} ended with {done.returncode}: {said.strip()[-300:]}")
        return [parse_benchmark(said)] * self._runs


@functools.cache
def find_library() -> tuple[str, Any]:
    """The first package that opens a model, and its module of interpreters. raises: ImportError."""
    reasons = []
    for package, module in INTERPRETERS.items():
        try:
            library = importlib.import_module(module)
            library = library.lite if package == "tensorflow" else library
            # Importing is no proof: one built for another numpy fails only here.
            library.Interpreter(model_content=TINY).allocate_tensors()
        except ModuleNotFoundError as error:
            reasons.append(str(error))
        except Exception as error:  # each fails in its own way
            reasons.append(f"{package} is installed and does not work: {type(error).__name__}: {error}")
        else:
            return package, library
    raise ImportError(f"no TFLite runtime: {'; '.join(reasons)}")


def open_interpreter(library: Any, path: str, threads: int, delegate: str) -> Any:
    """An interpreter with its tensors allocated.

    raises: ValueError naming the file, or the delegate that cannot be had.
    """
    experimental = getattr(library, "experimental", library)
    options: dict[str, Any] = {"model_path": path, "num_threads": threads}
    if delegate == "none":
        resolvers = experimental.OpResolverType
        options["experimental_op_resolver_type"] = resolvers.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    elif delegate in EXTERNAL or "/" in delegate:
        file = EXTERNAL.get(delegate, delegate)
        try:
            options["experimental_delegates"] = [experimental.load_delegate(file)]
        except (OSError, ValueError) as error:
            raise ValueError(
                f"delegate={delegate}: {file} cannot be loaded ({error}); name the board's: delegate=/path/to/it.so"
            ) from error
    elif delegate not in ("", "xnnpack"):
        raise ValueError(f"delegate={delegate}: xnnpack, none, {', '.join(EXTERNAL)} or a path")
    try:
        interpreter = library.Interpreter(**options)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if delegate == "xnnpack" and not count_delegated(interpreter):
        raise ValueError(f"delegate=xnnpack: this interpreter has none, or {path} has no operation for it")
    return interpreter


def count_delegated(interpreter: Any) -> int:
    """Partitions that a delegate took over."""
    # Private, but in all three packages; the public interface does not tell.
    return sum(entry["op_name"] == "DELEGATE" for entry in interpreter._get_ops_details())


def check() -> str:
    """See that models can be opened; says what else is worth knowing. raises: ImportError."""
    _, library = find_library()
    interpreter = library.Interpreter(model_content=TINY)
    interpreter.allocate_tensors()
    return "" if count_delegated(interpreter) else "without XNNPACK"


# --- times of single operations: LiteRT's profiler -----------------------------------------------


class Event(ctypes.Structure):
    """ProfiledEventData of ai_edge_litert 2.3.0, 104 bytes; published headers have had others."""

    _fields_ = [
        ("tag", ctypes.c_char_p),
        ("kind", ctypes.c_int),
        ("start_us", ctypes.c_uint64),
        ("elapsed_us", ctypes.c_uint64),
        ("memory", ctypes.c_uint64 * 6),
        ("index", ctypes.c_uint64),
        ("subgraph", ctypes.c_uint64),
        ("source", ctypes.c_int),
    ]


class LiteRtProfiler:
    """A compiled model of LiteRT with its profiler on, through the C interface of the wheel's own library.

    source: litert/c/*.h of LiteRT 2.3; what the headers leave open (options as text) was found by trying.
    """

    def __init__(self, path: str, threads: int, delegate: str) -> None:
        self.runs: list[list[tuple[int, str, int, int]]] = []
        self._library, self._environment = open_litert()
        self._kept: list[Any] = []  # what the library may read or call as long as the model lives
        self._made: list[tuple[str, ctypes.c_void_p]] = []  # what must be destroyed
        model = self._make("CreateModelFromFile", self._environment, os.fsencode(path))
        options = self._make("CreateOptions")
        self._call("SetOptionsHardwareAccelerators", options, CPU)
        self._add_options(options, "runtime_options_string", "enable_profiling = true\n")
        kernels = "builtin" if delegate == "none" else "xnnpack"
        self._add_options(options, "xnnpack", f'num_threads = {threads}\nkernel_mode = "{kernels}"\n')
        self._model = self._make("CreateCompiledModel", self._environment, model, options)
        self._profiler = self._make("CompiledModelGetProfiler", self._model)
        if not self._profiler:
            raise RuntimeError("this LiteRT has no profiler")
        graph = self._make("GetModelSubgraph", model, ctypes.c_size_t(0))
        self._inputs = self._make_buffers(graph, "Input")
        self._outputs = self._make_buffers(graph, "Output")

    def run(self, feed: Mapping[str, Any]) -> list[Any]:
        """One run with the profiler on; its events are added to `runs`. returns: no outputs."""
        for name, buffer in self._inputs.items():
            array = feed[name]
            memory = ctypes.c_void_p()
            self._call("LockTensorBuffer", buffer, ctypes.byref(memory), BUFFER_WRITE)
            ctypes.memmove(memory, array.ctypes.data, array.nbytes)
            self._call("UnlockTensorBuffer", buffer)
        # In this order: a reset ends what was started.
        self._call("ResetProfiler", self._profiler)
        self._call("StartProfiler", self._profiler)
        self._call(
            "RunCompiledModel", self._model, ctypes.c_size_t(0), *_counted(self._inputs), *_counted(self._outputs)
        )
        self._call("StopProfiler", self._profiler)
        count = ctypes.c_int()
        self._call("GetNumProfilerEvents", self._profiler, ctypes.byref(count))
        events = (Event * max(1, count.value))()
        self._call("GetProfilerEvents", self._profiler, count, events)
        # Now: the tags are the profiler's, until its next reset.
        self.runs.append(
            [
                (event.kind, (event.tag or b"").decode("utf-8", "replace"), event.index, event.elapsed_us)
                for event in events[: count.value]
            ]
        )
        return []

    def _call(self, name: str, *arguments: Any) -> None:
        _call(self._library, name, *arguments)

    def _make(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        self._call(name, *arguments, ctypes.byref(handle))
        if name in DESTROYED_BY:
            self._made.append((DESTROYED_BY[name], handle))
        return handle

    def __del__(self) -> None:
        for name, handle in reversed(getattr(self, "_made", [])):
            destroy = getattr(self._library, f"LiteRt{name}")
            destroy.restype = None
            destroy(handle)

    def _add_options(self, options: ctypes.c_void_p, kind: str, text: str) -> None:
        payload = ctypes.create_string_buffer(text.encode())
        leave = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)
        self._kept += [payload, leave]
        self._call("AddOpaqueOptions", options, self._make("CreateOpaqueOptions", kind.encode(), payload, leave))

    def _make_buffers(self, graph: ctypes.c_void_p, kind: str) -> dict[str, ctypes.c_void_p]:
        """Name -> memory of each input or output."""
        count = ctypes.c_size_t()
        self._call(f"GetNumSubgraph{kind}s", graph, ctypes.byref(count))
        buffers = {}
        for place in range(count.value):
            tensor = self._make(f"GetSubgraph{kind}", graph, ctypes.c_size_t(place))
            name = ctypes.c_char_p()
            self._call("GetTensorName", tensor, ctypes.byref(name))
            tensor_type = (ctypes.c_uint64 * 64)()  # a structure of about 100 bytes
            self._call("GetRankedTensorType", tensor, tensor_type)
            needs = self._make(
                f"GetCompiledModel{kind}BufferRequirements", self._model, ctypes.c_size_t(0), ctypes.c_size_t(place)
            )
            buffers[(name.value or b"").decode()] = self._make(
                "CreateManagedTensorBufferFromRequirements", self._environment, tensor_type, needs
            )
        return buffers


def _counted(buffers: Mapping[str, ctypes.c_void_p]) -> tuple[Any, Any]:
    return ctypes.c_size_t(len(buffers)), (ctypes.c_void_p * len(buffers))(*buffers.values())


@functools.cache
def open_litert() -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    """The shared library of the installed ai_edge_litert, and its environment.

    One for the process: making it looks for accelerators, which takes as long as opening a model.
    """
    library = ctypes.CDLL(str(Path(importlib.import_module("ai_edge_litert").__path__[0], "libLiteRt.so")))
    environment = ctypes.c_void_p()
    _call(library, "CreateEnvironment", 0, None, ctypes.byref(environment))
    return library, environment


def _call(library: ctypes.CDLL, name: str, *arguments: Any) -> None:
    if status := getattr(library, f"LiteRt{name}")(*arguments):
        raise RuntimeError(f"LiteRt{name} failed with {status}")


def open_profiler(package: str, path: str, threads: int, delegate: str) -> LiteRtProfiler:
    """LiteRT's profiler, where it can be trusted. raises: NoKernels, saying why not."""
    if package != "ai_edge_litert":
        raise NoKernels(f"{package} has no profiler; the option benchmark=PATH names the board's benchmark_model")
    if delegate in EXTERNAL or "/" in delegate:
        raise NoKernels(f"LiteRT's profiler does not see into delegate={delegate}; try benchmark=PATH")
    if (version := metadata.version("ai-edge-litert")) not in PROFILED_VERSIONS and (reason := try_profiler()):
        raise NoKernels(f"the profiler of ai_edge_litert {version} is another one ({reason})")
    try:
        return LiteRtProfiler(path, threads, delegate)
    except (OSError, AttributeError, RuntimeError) as error:
        raise NoKernels(f"LiteRT's profiler cannot be used: {error}") from error


@functools.cache
def try_profiler() -> str:
    """Why LiteRT's profiler cannot be used; tried in a process of its own, which it may take down. Empty: it can."""
    done = subprocess.run(
        [sys.executable, __file__], stdin=subprocess.DEVNULL, capture_output=True, timeout=TRIAL_TIMEOUT_S
    )
    if done.returncode == 0:
        return ""
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return f"ended with {done.returncode}: {lines[-1][:200] if lines else ''}"


def profile_tiny(folder: Path) -> None:
    """Profile a model that adds two numbers. raises: when what comes out cannot be that."""
    import numpy as np

    path = folder / "tiny.tflite"
    path.write_bytes(TINY)
    profiler = LiteRtProfiler(str(path), 1, "")
    for _ in range(3):
        profiler.run({"a": np.ones(1, np.float32)})
    for events in profiler.runs:
        seconds, kernels = read_events(events)
        if len(kernels) != 1 or kernels[0][1] not in ("Add (ND)", "ADD") or not 0 <= kernels[0][2] <= seconds < 1:
            raise RuntimeError(f"one addition has these events: {events}")


def read_events(events: Sequence[tuple[int, str, int, int]]) -> tuple[float, Kernels]:
    """Seconds of a run and its kernels, from the profiler's (kind, tag, index, microseconds) in order."""
    seconds, kernels = 0.0, []
    for kind, tag, index, elapsed_us in events:
        if kind == INVOKE and tag == "Invoke":
            seconds = elapsed_us * 1e-6
        elif kind == OPERATOR:
            kernels.append((f"node:{index}", tag, elapsed_us * 1e-6))
        elif kind == DELEGATED:
            kernels.append((f"delegate:{index}", tag, elapsed_us * 1e-6 + HALF_TICK_S))
    if not kernels or seconds == 0:
        raise NoKernels(f"LiteRT's profiler tells no operations in {len(events)} events")
    return seconds, kernels


# --- times of single operations: benchmark_model -------------------------------------------------

BENCHMARK_TABLE = re.compile(
    r"Profiling Info for Regular Benchmark Runs:\s*\n=+ Run Order =+\s*\n(?P<table>.*?)(?:\n\s*\n|\n=|\Z)", re.DOTALL
)
BENCHMARK_MEAN = re.compile(r"Inference \(avg\): ([0-9.e+]+)")
COLUMNS_BEHIND_TYPE = {"first", "avg ms", "%", "cdf%", "mem kb", "times called", "name", "start"}


def benchmark_command(program: str, path: str, threads: int, delegate: str) -> list[str]:
    """The command line of benchmark_model that tells what our interpreter would do."""
    flags = {
        "": [],
        "xnnpack": ["--use_xnnpack=true"],
        "none": ["--use_xnnpack=false"],
        "gpu": ["--use_gpu=true"],
        "nnapi": ["--use_nnapi=true"],
    }.get(delegate, [f"--external_delegate_path={delegate}"])
    return [
        program, f"--graph={path}", f"--num_threads={threads}", f"--num_runs={BENCHMARK_RUNS}",
        "--enable_op_profiling=true", *flags,
    ]  # fmt: skip


def parse_benchmark(text: str) -> tuple[float, Kernels]:
    """Seconds of a run and its kernels, from what benchmark_model prints (as a table or as CSV).

    raises: NoKernels where a row stands for several operations; ValueError when there is no table.
    """
    found = BENCHMARK_TABLE.search(text)
    if found is None:
        raise ValueError(f"benchmark_model printed no times of operations; it ended: {text.strip()[-300:]}")
    header, *rows = [line.strip() for line in found["table"].splitlines() if line.strip()]
    is_csv = "," in header
    columns = [column.strip(" []").replace("_", " ").lower() for column in re.split(r",|\s*\t\s*|\s{2,}", header)]
    columns = [column for column in columns if column]
    behind = columns[1:]
    if not {"avg ms", "times called", "name"} <= set(behind) <= COLUMNS_BEHIND_TYPE:
        raise ValueError(f"benchmark_model's table has unknown columns: {header[:200]}")
    kernels = []
    for row in rows:
        # From the right: a kernel's type may itself hold commas.
        cells = row.rsplit(",", len(behind)) if is_csv else re.split(r"\s*\t\s*|\s{2,}", row)
        if len(cells) != len(columns):
            raise ValueError(f"a row of benchmark_model's table cannot be read: {row[:200]}")
        named = dict(zip(behind, (cell.strip() for cell in cells[1:])))  # noqa: B905  Python 3.9
        place = re.search(r":(\d+)$", named["name"])
        if int(named["times called"]) != 1 or place is None:
            raise NoKernels(
                f"benchmark_model adds up {named['times called']} operations in one row ({cells[0].strip()}): "
                "they lie in several partitions of a delegate"
            )
        kind = "delegate" if named["name"].startswith("Delegate/") else "node"
        kernels.append((f"{kind}:{place[1]}", cells[0].strip(), float(named["avg ms"]) * 1e-3))
    mean = BENCHMARK_MEAN.search(text)
    return float(mean[1]) * 1e-6 if mean else sum(seconds for _, _, seconds in kernels), kernels


if __name__ == "__main__":
    import tempfile

    with contextlib.ExitStack() as stack:
        profile_tiny(Path(stack.enter_context(tempfile.TemporaryDirectory())))
