"""Between a module's tensors and an artifact's: the order of axes, and numbers of 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.core.errors import DataError
from edgeprune.core.records import TensorInfo

Array = npt.NDArray[Any]
Calibration = Sequence[tuple[Array, ...]]
"""Batches of the module's inputs, as the module has them, from which ranges of activations are taken."""

CHANNELS_LAST = frozenset({"NLC", "NHWC", "NDHWC"})


def encode(array: Array, info: TensorInfo) -> Array:
    """An array as the module has it, the way an artifact's input wants it.

    array: leading axis = examples; any number of them.
    source of the numbers of 8 bits: value = scale (q - zero_point), Jacob et al., CVPR 2018, arXiv:1712.05877, eq. 1.
    """
    if info.layout in CHANNELS_LAST:
        array = np.moveaxis(array, 1, -1)
    kind = np.dtype(info.dtype)
    if info.scale is not None and array.dtype.kind == "f":
        limits = np.iinfo(kind)
        array = np.clip(np.rint(array / info.scale) + (info.zero_point or 0), limits.min, limits.max)
    return np.ascontiguousarray(array, dtype=kind)


def decode(array: Array, info: TensorInfo) -> Array:
    """An artifact's output as the module has it; float32 where the artifact has numbers of 8 bits."""
    if info.scale is not None and array.dtype.kind in "iu":
        array = (array.astype(np.float32) - np.float32(info.zero_point or 0)) * np.float32(info.scale)
    if info.layout in CHANNELS_LAST:
        array = np.moveaxis(array, -1, 1)
    return np.ascontiguousarray(array)


def random_like(examples: Sequence[Array], seed: int = 0) -> tuple[Array, ...]:
    """Arrays of the examples' shapes: normal noise of their mean and deviation; whole numbers within what they span."""
    generator = np.random.default_rng(seed)
    made = []
    for example in examples:
        if example.dtype.kind == "f":
            deviation = max(float(example.std()), 1e-3) if example.size > 1 else 1.0
            noise: Array = generator.standard_normal(example.shape) * deviation + float(example.mean())
        else:
            noise = generator.integers(int(example.min()), int(example.max()) + 1, example.shape)
        made.append(np.asarray(noise).astype(example.dtype))
    return tuple(made)


def run_in_batches(run: Callable[[list[Array]], list[Array]], inputs: Sequence[Array], size: int) -> list[Array]:
    """Outputs for any number of examples from a file with a fixed batch size.

    run: outputs of one batch. inputs: leading axis = examples, a multiple of `size` of them where that is above 0.
    """
    count = len(inputs[0]) if inputs and inputs[0].ndim else 0
    if size < 1 or count <= size:
        return run(list(inputs))
    pieces = [run([array[start : start + size] for array in inputs]) for start in range(0, count, size)]
    return [np.concatenate(arrays) for arrays in zip(*pieces, strict=True)]


def check_calibration(calibration: Calibration | None) -> Calibration:
    """What was given, once it can give ranges. raises: DataError when it is missing, constant or not finite."""
    if not calibration or not any(len(array) for batch in calibration for array in batch):
        raise DataError("int8 takes the ranges of its activations from data, and there are none; give calibration data")
    for place, arrays in enumerate(zip(*calibration, strict=True)):
        floats = [array for array in arrays if array.dtype.kind == "f"]
        if not all(np.isfinite(array).all() for array in floats):
            raise DataError(f"the calibration data of input {place} hold NaN or infinity; clean them")
        if floats and max(float(a.max()) for a in floats) <= min(float(a.min()) for a in floats):
            raise DataError(f"the calibration data of input {place} are constant, which gives no range; take real ones")
    return calibration
