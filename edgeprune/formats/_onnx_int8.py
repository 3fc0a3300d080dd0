"""An int8 twin of an ONNX model, to see how fast it would be."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgeprune.core.errors import ModelError

ACTIVATIONS = ("uint8", "int8")
EXAMPLES = 2
"""Random inputs that are run to find ranges; which ones they are does not matter for the speed."""


def quantize_randomly(path: Path, out: Path, *, activations: str = "uint8", seed: int = 0) -> None:
    """Write the model with int8 weights per channel, and activations of 8 bits whose ranges come from random inputs.

    activations: `uint8` or `int8`; which one is faster differs from processor to processor.
    raises: ModelError where ONNX Runtime has no quantizer or fails on this model.
    source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html, QDQ format.
    """
    previous = logging.root.manager.disable
    try:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

        class RandomInputs(CalibrationDataReader):  # type: ignore[misc]  # without types
            def __init__(self) -> None:
                self._feeds = _random_feeds(session, seed)

            def get_next(self) -> dict[str, Any] | None:
                return next(self._feeds, None)

        logging.disable(logging.WARNING)  # it advises on accuracy, which is not what is asked
        quantize_static(
            str(path), str(out), RandomInputs(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8 if activations == "uint8" else QuantType.QInt8,
            weight_type=QuantType.QInt8,
        )  # fmt: skip
    except Exception as error:  # the quantizer's errors share no base class
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ModelError(f"ONNX Runtime cannot make an int8 model of {path.name}: {reason}") from error
    finally:
        logging.disable(previous)


def _random_feeds(session: onnxruntime.InferenceSession, seed: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    for _ in range(EXAMPLES):
        # Zeros where numbers are indices: any other could lie outside the table they index.
        yield {
            value.name: rng.standard_normal(value.shape).astype(np.float32)
            if value.type == "tensor(float)"
            else np.zeros(value.shape, value.type[len("tensor(") : -1])
            for value in session.get_inputs()
        }
