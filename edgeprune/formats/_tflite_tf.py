"""A .tflite file in TensorFlow's interpreter beside LiteRT's: two builds of its kernels, which have to agree.

Outputs are compared as an app gets them, by XNNPACK where the interpreters come with it. To see every operation's own
result nothing may be fused and no memory used again, which no delegate offers: there both run their plain kernels.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.core.errors import ModelError
from edgeprune.core.family import MissingLibrary
from edgeprune.core.records import CrossCheck, OperationError
from edgeprune.core.tensors import Array
from edgeprune.formats._tflite_model import indices, name_of, operator_names, read

LIMIT, LIMIT_8_BITS = 1e-4, 0.02
"""Of 8 bits one step is 1/127 of the largest value, and a rounding that falls the other way moves a result by one."""


class Interpreters:
    """One library's interpreters of a file, one for each way of running it."""

    def __init__(self, name: str, version: str, library: Any, experimental: Any) -> None:
        """experimental: where the library has `OpResolverType`."""
        self.name, self.version, self._library = name, version, library
        self._plain = experimental.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES

    def outputs(self, path: Path, inputs: Sequence[Array]) -> list[Array]:
        """As an app gets them. inputs: one batch, in the file's own layout and types."""
        interpreter = self._run(path, inputs)
        return [interpreter.get_tensor(place["index"]) for place in interpreter.get_output_details()]

    def values(self, path: Path, inputs: Sequence[Array]) -> dict[int, Array]:
        """Every tensor of the main graph that has a value at the end of a run without delegates."""
        interpreter = self._run(
            path, inputs, experimental_preserve_all_tensors=True, experimental_op_resolver_type=self._plain
        )
        found = {}
        for place in interpreter.get_tensor_details():
            with contextlib.suppress(ValueError):  # what only exists while its operation runs
                found[int(place["index"])] = interpreter.get_tensor(place["index"])
        return found

    def _run(self, path: Path, inputs: Sequence[Array], **options: Any) -> Any:
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")  # TensorFlow's announces that it will be dropped
                interpreter = self._library.Interpreter(model_path=str(path), num_threads=1, **options)
            interpreter.allocate_tensors()
            for place, array in zip(interpreter.get_input_details(), inputs, strict=True):
                interpreter.set_tensor(place["index"], array)
            interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ModelError(f"{self.name} {self.version} cannot run {path.name}: {reason}") from error
        return interpreter


def open_litert() -> Interpreters:
    """LiteRT's, the reference. raises: MissingLibrary."""
    try:
        import ai_edge_litert
        from ai_edge_litert import interpreter
    except ModuleNotFoundError as error:
        raise MissingLibrary(f"running a TFLite file needs {error.name}: pip install 'edgeprune[tflite]'") from error
    return Interpreters("LiteRT", ai_edge_litert.__version__, interpreter, interpreter)


def open_tensorflow() -> Interpreters:
    """TensorFlow's; to import it takes seconds. raises: MissingLibrary."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import tensorflow
    except ModuleNotFoundError as error:
        raise MissingLibrary(f"the cross-check needs {error.name}: pip install 'edgeprune[tf]'") from error
    return Interpreters("TensorFlow", tensorflow.__version__, tensorflow.lite, tensorflow.lite.experimental)


def compare(path: Path, inputs: Sequence[Array], ours: Interpreters, theirs: Interpreters) -> CrossCheck:
    """A file's outputs, and what each operation gives, from two libraries.

    inputs: one batch, in the file's own layout and types. raises: ModelError when one of them cannot run it.
    """
    model, _ = read(path)
    results = (library.outputs(path, inputs) for library in (ours, theirs))
    output_error = max(relative_error(mine, other) for mine, other in zip(*results, strict=True))
    values, others = (library.values(path, inputs) for library in (ours, theirs))
    graph = model.subgraphs[0]
    operations = [
        OperationError(name=name_of(graph.tensors[made[0]]), op=kind, error=max(errors))
        for operator, kind in zip(graph.operators, operator_names(model), strict=True)
        if (made := [index for index in indices(operator.outputs) if index in values and index in others])
        and (errors := [relative_error(values[index], others[index]) for index in made])
    ]
    return CrossCheck(
        runtimes=((ours.name, ours.version), (theirs.name, theirs.version)), output_error=output_error,
        operations=tuple(operations),
    )  # fmt: skip


def check_agreement(found: CrossCheck, path: Path, limit: float) -> None:
    """raises: ModelError naming the first operation that differs, when the outputs differ by more than `limit`."""
    if found.output_error <= limit:
        return
    first = next((operation for operation in found.operations if operation.error > limit), None)
    where = f"first in {first.op} {first.name} ({first.error:.2g})" if first else "in no plain kernel, so in XNNPACK's"
    names = " and ".join(f"{name} {version}" for name, version in found.runtimes)
    raise ModelError(
        f"{names} compute {path.name} differently: outputs by {found.output_error:.2g} relative (allowed {limit:g}), "
        f"{where}; trust neither before you know which one is wrong"
    )


def relative_error(ours: Array, theirs: Array) -> float:
    """Largest |ours - theirs| over the largest finite |theirs|; infinite where only one of them is not finite."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return float("inf")
    mine, other = ours.astype(np.float64), theirs.astype(np.float64)
    known = np.isfinite(mine) & np.isfinite(other)
    if not np.array_equal(mine[~known], other[~known], equal_nan=True):
        return float("inf")
    mine, other = mine[known], other[known]
    largest = max(float(np.abs(other).max(initial=0.0)), float(np.finfo(np.float32).tiny))
    return float(np.abs(mine - other).max(initial=0.0)) / largest
