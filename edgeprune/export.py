"""Export a module to an artifact and check it on the host before anybody can see it."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from edgeprune.core.errors import DataError, ModelError, UsageError
from edgeprune.core.family import load_member
from edgeprune.core.records import FLOAT32, Artifact, Graph, Precision
from edgeprune.core.store import compressed_bytes, replacing, sha256_file
from edgeprune.core.tensors import Array, Calibration, random_like

Check = Callable[[Array, Array], str | None]
"""Of an artifact's output and the module's: what is wrong, or None."""
HALF_TOLERANCE = 5e-3
"""float16 rounds each weight by up to 2^-11 = 5e-4 relative; the errors of some layers add up to a few of these."""
LEAST_COSINE = 0.8
"""int8 that works stays above 0.99; what lies below this has no more to do with the model."""


def export_model(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    path: Path,
    *,
    format: str = "onnx",
    graph: Graph | None = None,
    tolerance: float = 1e-4,
    precision: Precision = FLOAT32,
    calibration: Calibration | None = None,
    labels: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    sparse: bool = False,
    opset: int | None = None,
) -> Artifact:
    """Write a module as an artifact whose outputs on the host equal the module's, or nearly where it has fewer bits.

    inputs: example inputs, batch first; the check runs on them and on random inputs of their kind.
    path: written at the end in one rename, or not at all.
    format: member of `formats`. graph: what the module was pruned from, recorded by its digest.
    tolerance: largest |artifact - module| / max |module| allowed, over all outputs, of float32.
    precision: of the artifact; calibration: what int8 takes its ranges from, and is then checked on.
    labels, preprocessing: names of the classes, and `scale`, `mean`, `std` of raw data: written into the file, where
        apps and viewers look for them, beside what made it.
    sparse: store 1x1 convolutions without their zeros (TFLite): smaller, and faster where the runtime has such kernels.
    opset: of an ONNX file; None: the oldest from 17 that has every operator, since more boards read it.
    returns: the artifact, with the versions of the tools that made it.
    raises: ModelError when it cannot be exported, not at that opset, or computes something else; UsageError when the
        folder cannot be written, nothing can be stored sparsely, or the format has no such opset.
    """
    member = load_member("formats", format)
    if sparse:
        check_sparse(format)
    options = {} if opset is None else {"opset": check_opset(format, opset)}
    with _evaluating(module), replacing(path) as temporary:
        artifact: Artifact = member.export(
            module, inputs, temporary, precision=precision, calibration=calibration, graph=graph, **options
        )
        if sparse:
            member.encode_sparse(temporary)
            artifact = replace(artifact, bytes=temporary.stat().st_size)
        made_by = {"name": path.stem, "edgeprune": version("edgeprune"), "precision": precision.name}
        member.embed_metadata(temporary, made_by, labels=labels, normalisation=preprocessing or None)
        size_bytes, sha256 = temporary.stat().st_size, sha256_file(temporary)
        packed_bytes = compressed_bytes(temporary)
        check = _within(HALF_TOLERANCE if precision.dtype == "float16" else tolerance)
        noise = random_like([tensor.numpy(force=True) for tensor in inputs])
        given = {"example": inputs, "random": _like(inputs, [noise])}
        if precision.dtype in ("int8", "dynamic"):
            check = _alike
        if precision.dtype == "int8" and calibration:
            # Outside of the calibrated ranges int8 clips, as it should.
            given = {"calibration": _like(inputs, calibration)}
        for kind, tensors in given.items():
            _check_outputs(module, tensors, member, temporary, kind=kind, check=check)
    tools = {"edgeprune": version("edgeprune"), "python": platform.python_version(), "torch": str(torch.__version__)}
    return replace(
        artifact,
        path=str(path),
        bytes=size_bytes,
        compressed_bytes=packed_bytes,
        metadata_bytes=size_bytes - artifact.bytes,
        sha256=sha256,
        graph_sha256=graph.model_sha256 if graph is not None else artifact.graph_sha256,
        tools={**tools, **artifact.tools},
    )


def check_sparse(format: str) -> None:
    """raises: UsageError for a format that cannot store weights without their zeros."""
    if not hasattr(load_member("formats", format), "encode_sparse"):
        raise UsageError(f"{format} files store every zero; weights without them are for tflite")


def check_opset(format: str, opset: int) -> int:
    """The opset. raises: UsageError for a format without opsets, or one that files are not written in."""
    known = getattr(load_member("formats", format), "OPSETS", None)
    if known is None:
        raise UsageError(f"{format} files have no opset; it is for onnx")
    if opset not in known:
        raise UsageError(f"files are written in opset {known[0]} to {known[-1]}, not {opset}")
    return opset


def _check_outputs(
    module: nn.Module, inputs: tuple[Tensor, ...], member: Any, path: Path, *, kind: str, check: Check
) -> None:
    with torch.no_grad():
        expected = [leaf.numpy(force=True) for leaf in tree_leaves(module(*inputs)) if isinstance(leaf, Tensor)]
    got: Sequence[Any] = member.run(path, [tensor.numpy(force=True) for tensor in inputs])
    if [a.shape for a in got] != [a.shape for a in expected]:
        raise ModelError(
            f"the {member.__name__.rsplit('.', 1)[-1]} export gives shapes {[a.shape for a in got]} where the module "
            f"gives {[a.shape for a in expected]} on {kind} inputs; nothing was written"
        )
    for number, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        if not np.isfinite(theirs).all():
            raise ModelError(f"output {number} of the module holds NaN or infinity on {kind} inputs; check its weights")
        if (reason := check(mine, theirs)) is not None:
            raise ModelError(f"output {number} of the export {reason} on {kind} inputs; nothing was written")


def _within(tolerance: float) -> Check:
    """A check that nothing differs by more than a share of the largest output."""

    def check(mine: Array, theirs: Array) -> str | None:
        error = float(np.abs(mine - theirs).max(initial=0.0) / max(float(np.abs(theirs).max(initial=0.0)), 1e-12))
        if error <= tolerance:
            return None
        return (
            f"differs from the module by {error:.2g} relative (allowed {tolerance:.0e}): the model may use an operator "
            "that its format computes otherwise, or numbers that its precision does not hold;"
        )

    return check


def _alike(mine: Array, theirs: Array) -> str | None:
    """Whether quantised outputs still point where the module's do."""
    ours, wanted = mine.astype(np.float64).ravel(), theirs.astype(np.float64).ravel()
    size = float(np.linalg.norm(ours) * np.linalg.norm(wanted))
    if not np.isfinite(ours).all():
        return "holds NaN or infinity"
    similarity = float(ours @ wanted) / size if size else float(not ours.any() and not wanted.any())
    if similarity >= LEAST_COSINE:
        return None
    return (
        f"is destroyed by quantisation (cosine similarity {similarity:.2f} to the module's, least {LEAST_COSINE}); "
        "leave the layers that break in float32, or train for int8; seen"
    )


def _like(inputs: tuple[Tensor, ...], calibration: Calibration) -> tuple[Tensor, ...]:
    """The first calibration examples, as many as the artifact takes at once."""
    made = []
    for tensor, array in zip(inputs, calibration[0], strict=True):
        rows = np.arange(len(tensor)) % len(array) if tensor.ndim else ...
        made.append(torch.from_numpy(np.asarray(array)[rows]).to(tensor.dtype).to(tensor.device))
    return tuple(made)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode; every submodule goes back to its own mode afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def evaluate_artifact(path: Path, batches: Iterable[tuple[Any, Tensor]], *, format: str) -> float:
    """Top-1 accuracy in [0, 1] of an artifact run on the host, one example at a time.

    batches: (inputs, targets) as the module has them. raises: ModelError when it does not run; DataError for no
        examples.
    """
    member = load_member("formats", format)
    right = count = 0
    for inputs, targets in batches:
        arrays = [tensor.numpy(force=True) for tensor in (inputs if isinstance(inputs, tuple | list) else (inputs,))]
        scores = member.run(path, arrays)[0]
        right += int((scores.argmax(axis=1) == targets.numpy(force=True)).sum())
        count += len(targets)
    if not count:
        raise DataError("there are no examples to measure accuracy on")
    return right / count
