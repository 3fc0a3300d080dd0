"""Artifact formats: export a module, inspect a file, make other widths of it in milliseconds.

A member holds the functions of `Format`. Profiling needs dozens of widths of one model and an
export takes seconds, so a member rewrites one exported file instead: its `Resizer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgeprune.core.errors import UsageError
from edgeprune.core.records import FLOAT32, Artifact, Graph, IntArray, Kernel, KernelTime, Precision, Widths
from edgeprune.core.tensors import Array, Calibration
from edgeprune.device.runtimes import open_runtime

if TYPE_CHECKING:
    from torch import Tensor, nn


def runnable_precisions(member: Format, runtime: str, dtype: str) -> tuple[Precision, ...]:
    """Of what a format writes of a dtype, what a target's runtime can run. raises: UsageError where there is none."""
    kinds = open_runtime(runtime)[0].ACTIVATIONS
    written = [each for each in member.PRECISIONS if each.dtype == dtype]
    found = [each for each in written if dtype != "int8" or each.activations in kinds]
    if not found:
        known = ", ".join(dict.fromkeys(each.dtype for each in member.PRECISIONS))
        raise UsageError(f"{member.SUFFIX} files cannot be {dtype}; known: {known}")
    return tuple(found)


class KernelMap(Protocol):
    """What the runtime's kernels are in terms of the graph.

    Made from the dense artifact, whose fused chains define the kernels; other widths may fuse
    otherwise, and what they run is charged to the dense kernel that covers the same operations.
    """

    kernels: tuple[Kernel, ...]

    def charge(self, times: Sequence[KernelTime]) -> dict[str, float]:
        """Seconds per kernel name from one profiled artifact of any widths."""
        ...


class Resizer(Protocol):
    """One exported model at any widths."""

    dense_sha256: str
    """Of the dense model as exported."""
    dense_bytes: int
    """Size of the dense model as exported."""

    def write_weights(self, path: Path) -> None:
        """Write the dense float weights once, for the files of `write_structure`."""
        ...

    def write_structure(self, widths: Widths, path: Path, weights: str) -> None:
        """Write a model of `widths` whose weights lie in the file `weights` beside it.

        For timing only: shapes are right, values are prefixes of the dense tensors.
        raises: ModelError when the model cannot be made at these widths.
        """
        ...

    def write_model(self, keep: Mapping[str, IntArray], path: Path) -> None:
        """Write the self-contained model that keeps the units `keep` of each group.

        Equal to an export of the sliced module.
        """
        ...

    def map_kernels(self, times: Sequence[KernelTime] | None) -> KernelMap:
        """Kernels of the dense artifact from the runtime's own names, in the order of execution.

        times: None where the runtime tells none: then they are what the file's structure lets expect.
        """
        ...


class Format(Protocol):
    """What a member offers."""

    SUFFIX: str
    """Of its files, with the dot."""

    PRECISIONS: tuple[Precision, ...]
    """What it can write, float32 first. Of those of one dtype a board may prefer the one or the other."""

    def export(
        self,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        path: Path,
        *,
        precision: Precision = FLOAT32,
        calibration: Calibration | None = None,
        graph: Graph | None = None,
    ) -> Artifact:
        """Write a module in evaluation mode as one self-contained file.

        calibration: what int8 takes its ranges from. graph: the module's, to find `precision.float_nodes` in.
        raises: ModelError when it cannot be expressed in the format; DataError for calibration data that are
            missing, constant or not finite; MissingLibrary.
        returns: what `inspect` says, but for the compressed size, which takes long on large files.
        """
        ...

    def inspect(self, path: Path) -> Artifact:
        """What a file is. raises: RecordError when it is not a valid model."""
        ...

    def run(self, path: Path, inputs: Sequence[Array]) -> list[Array]:
        """The file's outputs on this machine, in its order. raises: ModelError when it does not run.

        inputs, returns: as the module has them, whatever layout and types the file wants (`core/tensors.py`); of
            more examples than the file's batch holds, batch by batch.
        """
        ...

    def quantize_randomly(self, path: Path, out: Path, precision: Precision) -> None:
        """Write a twin of a float32 file at another precision, to see how fast it would be.

        precision: without nodes in float32; of int8 the ranges come from random inputs.
        raises: ModelError where the quantizer fails on this model; MissingLibrary.
        """
        ...

    def embed_metadata(
        self,
        path: Path,
        values: Mapping[str, str],
        *,
        labels: Sequence[str] | None = None,
        normalisation: Mapping[str, Any] | None = None,
    ) -> None:
        """Write into a file what it is, where apps and viewers look for it; its sha256 changes.

        values: any. labels: names of the classes. normalisation: `scale`, `mean`, `std` of raw data.
        """
        ...

    def make_resizer(
        self, module: nn.Module, inputs: tuple[Tensor, ...], graph: Graph, *, precision: Precision = FLOAT32
    ) -> Resizer:
        """A resizer of the module; exports it a few times. raises: ModelError.

        For int8, ranges come from random inputs where a timing is all that is wanted of the files.
        """
        ...
