"""Export a module to an artifact and check it on the host before anybody can see it."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from edgeprune.core.errors import DataError, ModelError
from edgeprune.core.family import load_member
from edgeprune.core.records import FLOAT32, Artifact, Graph, Precision
from edgeprune.core.store import replacing
from edgeprune.core.tensors import Calibration

TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "dynamic": 0.7, "int8": 0.7}
"""Half an order above what the rounding of 2^-11 of float16 weights comes to in deep nets. What 8 bits may cost is a
matter of accuracy; beyond this a file computes something else."""


def export_model(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    path: Path,
    *,
    format: str = "onnx",
    precision: Precision = FLOAT32,
    calibration: Calibration | None = None,
    graph: Graph | None = None,
    tolerance: float | None = None,
) -> Artifact:
    """Write a module as an artifact whose outputs on the host are the module's, as nearly as its precision allows.

    inputs: example inputs, batch first; the check runs on them and on random inputs of their kind, of 8 bits on
        calibration data where there are any: other inputs may lie outside the ranges.
    precision, calibration: as `Format.export` has them.
    path: written at the end in one rename, or not at all.
    format: member of `formats`. graph: what the module was pruned from, recorded by its digest.
    tolerance: largest |artifact - module| / max |module| allowed, over all outputs; None: see TOLERANCES.
    returns: the artifact, with the versions of the tools that made it.
    raises: ModelError when it cannot be exported, or computes something else; DataError for calibration data that
        give no ranges; UsageError when the folder cannot be written.
    """
    member = load_member("formats", format)
    with _evaluating(module), replacing(path) as temporary:
        # Members tell files by their names, too.
        artifact: Artifact = member.export(
            module, inputs, temporary, precision=precision, calibration=calibration, graph=graph
        )
        checks = [("example", inputs), ("random", _random_like(inputs))]
        if precision.dtype == "int8" and calibration:
            checks = [("calibration", tuple(torch.from_numpy(array[: len(inputs[0])]) for array in calibration[0]))]
        allowed = TOLERANCES[precision.dtype] if tolerance is None else tolerance
        for kind, given in checks:
            _check_outputs(module, given, member, temporary, kind=kind, tolerance=allowed)
    tools = {"edgeprune": version("edgeprune"), "python": platform.python_version(), "torch": str(torch.__version__)}
    return replace(
        artifact,
        path=str(path),
        graph_sha256=graph.model_sha256 if graph is not None else artifact.graph_sha256,
        tools={**tools, **artifact.tools},
    )


def _check_outputs(
    module: nn.Module, inputs: tuple[Tensor, ...], member: Any, path: Path, *, kind: str, tolerance: float
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
        error = float(np.abs(mine - theirs).max(initial=0.0) / max(float(np.abs(theirs).max(initial=0.0)), 1e-12))
        if not error <= tolerance:
            raise ModelError(
                f"output {number} of the export differs from the module by {error:.2g} relative on {kind} inputs "
                f"(allowed {tolerance:.0e}); nothing was written. The model may use an operator that its format "
                "computes otherwise"
            )


def _random_like(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Normal noise with each input's mean and deviation; integers from the range the example spans."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for tensor in inputs:
        if tensor.is_floating_point():
            deviation = tensor.float().std() if tensor.numel() > 1 else torch.tensor(1.0)
            noise = torch.randn(tensor.shape, generator=generator) * deviation.clamp(min=1e-3) + tensor.float().mean()
        else:
            low, high = int(tensor.min()), int(tensor.max())
            noise = torch.randint(low, high + 1, tensor.shape, generator=generator)
        made.append(noise.to(tensor.dtype).to(tensor.device))
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
