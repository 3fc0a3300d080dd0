"""ONNX Runtime (CPU execution provider): what to install, and how the agent runs and profiles a model.

The agent gets this file as runtime.py: Python 3.9 and the standard library only, until a model is opened.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

FORMAT = "onnx"
OPTIONS = ()
ACTIVATIONS = ("uint8", "int8")
MODULES = ("onnxruntime", "numpy")
BY_HAND: dict[str, str] = {}
BRANCHES = True
HOLDS_ACTIVATIONS = False
WHEELS = (
    {
        "requirements": ("onnxruntime>=1.19,<2", "numpy>=1.26,<3"),
        "architectures": ("x86_64", "aarch64"),
        "pythons": ((3, 9), (3, 14)),
        "glibc": (2, 27),
    },
)

NUMPY_TYPES = {"float": "float32", "double": "float64"}
KERNEL_SUFFIX = "_kernel_time"


class Model:
    """An inference session as an app would open it. See `runtimes.Model`."""

    def __init__(self, path: str, threads: int, profile: str | None = None) -> None:
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
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs: dict[str, tuple[list[int], str]] = {
            argument.name: (
                [size if isinstance(size, int) and size > 0 else 1 for size in argument.shape],
                _numpy_type(argument.type),
            )
            for argument in self._session.get_inputs()
        }
        self.outputs: list[str] = [argument.name for argument in self._session.get_outputs()]
        # A partial, not a method: no Python frame of ours stands between the clock and the runtime.
        self.run = functools.partial(self._session.run, None)

    def end_profile(self) -> list[tuple[float, list[tuple[str, str, float]]]]:
        """Per run made so far: its seconds, and (name, op, seconds) of each kernel in order."""
        path = Path(self._session.end_profiling())
        return parse_profile(json.loads(path.read_text(encoding="utf-8", errors="replace")))


def check() -> str:
    """See that it is there. raises: ImportError."""
    import onnxruntime  # noqa: F401

    return ""


def _numpy_type(text: str) -> str:
    kind = text[len("tensor(") : -1]
    return NUMPY_TYPES.get(kind, kind)


def parse_profile(events: list[dict[str, Any]]) -> list[tuple[float, list[tuple[str, str, float]]]]:
    """Runs in an ORT profile (the events of its JSON file). A kernel's event ends before its run's does."""
    runs = []
    kernels: list[tuple[str, str, float]] = []
    for event in events:
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith(KERNEL_SUFFIX):
            kernels.append((name[: -len(KERNEL_SUFFIX)], event["args"]["op_name"], event["dur"] * 1e-6))
        elif event.get("cat") == "Session" and name == "model_run":
            runs.append((event["dur"] * 1e-6, kernels))
            kernels = []
    return runs
