"""float16, dynamic and int8 forms of a float32 .tflite model, by ai-edge-quantizer.

source: https://github.com/google-ai-edge/ai-edge-quantizer; ranges are the minimum and maximum over the
calibration data, weights are symmetric and have one scale per channel.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from edgeprune.core.errors import ModelError
from edgeprune.core.family import MissingLibrary
from edgeprune.core.records import Precision
from edgeprune.core.tensors import Calibration
from edgeprune.formats._tflite_model import indices, name_of, shape_of, unpack

Ranges = Mapping[str, Any]
"""Tensor name -> what the quantizer keeps of its values."""
THREADS = 1


def quantize(data: bytes, precision: Precision, ranges: Ranges | None = None) -> bytes:
    """The model at another precision.

    data: a float32 model. ranges: from `calibrate`, for int8; of this model or of other widths of it.
    raises: ModelError when the quantizer fails, or a float node is in no operation of its own; MissingLibrary.
    """
    if precision.dtype == "float32":
        return data
    with _mapped(precision):
        quantizer = _quantizer(data, precision)
        given = None if ranges is None or precision.dtype != "int8" else dict(ranges)
        made = quantizer.quantize(given, enable_progress_bar=False, enable_progress_report=False)
        assert made.quantized_model is not None
        return bytes(made.quantized_model)


def calibrate(data: bytes, precision: Precision, calibration: Calibration) -> Ranges:
    """Ranges of the activations of a float32 model. raises: ModelError; MissingLibrary.

    calibration: as the module has it; cut into batches of the model's size, what is left over is not used.
    """
    with _mapped(precision):
        from ai_edge_quantizer import calibrator, recipe_manager
        from ai_edge_quantizer.utils import qsv_utils

        recipe = recipe_manager.RecipeManager()
        recipe.load_quantization_recipe(_quantizer(data, precision).get_quantization_recipe())
        # The quantizer's own choice, a moving average, cuts off what only a few examples reach.
        ranges = calibrator.Calibrator(bytearray(data), num_threads=THREADS, qsv_update_func=qsv_utils.min_max_update)
        ranges.calibrate({_signature(data)[0]: list(_feeds(data, calibration))}, recipe)
        result: Ranges = ranges.get_model_qsvs()
        return result


def _quantizer(data: bytes, precision: Precision) -> Any:
    from ai_edge_quantizer import qtyping, quantizer, recipe

    made = quantizer.Quantizer(bytearray(data))
    everything = qtyping.TFLOperationName.ALL_SUPPORTED
    if precision.dtype == "float16":
        made.add_weight_only_config(
            ".*", everything, num_bits=16, granularity=qtyping.QuantGranularity.TENSORWISE,
            algorithm_key=quantizer.AlgorithmName.FLOAT_CASTING,
        )  # fmt: skip
    elif precision.dtype == "dynamic":
        made.load_quantization_recipe(recipe.dynamic_wi8_afp32())
    elif precision.dtype == "int8" and precision.activations == "int8":
        made.load_quantization_recipe(recipe.static_wi8_ai8())
    else:
        raise ModelError(f"TFLite cannot store {precision.name}; choose float32, float16, dynamic or int8")
    for scope in _scopes(data, precision.float_nodes):
        made.update_quantization_recipe(scope, everything, algorithm_key=quantizer.AlgorithmName.NO_QUANTIZE)
    return made


def _scopes(data: bytes, nodes: tuple[str, ...]) -> Iterator[str]:
    """Expressions for the outputs of the operations that compute the nodes.

    An operation fused of several nodes is named after all of them; the model's own outputs after none.
    """
    if not nodes:
        return
    model = unpack(data)
    graph = model.subgraphs[0]
    names = [[name_of(graph.tensors[index]) for index in indices(operator.outputs)] for operator in graph.operators]
    # What an output is named after is lost; the constants of its operation have kept it.
    for operator, outputs in zip(graph.operators, names, strict=True):
        if set(indices(operator.outputs)) & set(indices(graph.outputs)):
            read = [graph.tensors[index] for index in indices(operator.inputs) if index >= 0]
            outputs += [name_of(tensor) for tensor in read if model.buffers[tensor.buffer].data is not None]
    for node in nodes:
        chosen = [outputs[0] for outputs in names if any(node in labels(output) for output in outputs)]
        if not chosen:
            raise ModelError(f"no operation of the TFLite file computes {node}, so it cannot stay in float32")
        yield from (f"^{re.escape(output)}" for output in chosen)


def labels(name: str) -> list[str]:
    """The nodes of the graph that a tensor is named after."""
    return re.findall(r"(\w+);", name)


def _signature(data: bytes) -> tuple[str, list[str]]:
    """The name of the model's signature and of its inputs, in their order."""
    model = unpack(data)
    signature = model.signatureDefs[0]
    by_tensor = {entry.tensorIndex: entry.name for entry in signature.inputs}
    text = [by_tensor[index] for index in model.subgraphs[0].inputs]
    key = signature.signatureKey
    return key.decode(), [name.decode() for name in text]


def _feeds(data: bytes, calibration: Calibration) -> Iterator[dict[str, Any]]:
    graph = unpack(data).subgraphs[0]
    shapes = [shape_of(graph.tensors[index]) for index in graph.inputs]
    _, names = _signature(data)
    count = 0
    for arrays in calibration:
        turned = [np.moveaxis(a, 1, -1) if a.ndim == 4 else a for a in arrays]
        size = shapes[0][0] if shapes[0] else 1
        for start in range(0, len(turned[0]) - size + 1, size):
            count += 1
            yield {
                name: np.ascontiguousarray(
                    array[start : start + size], np.float32 if array.dtype.kind == "f" else np.int32
                )
                for name, array in zip(names, turned, strict=True)
            }
    if not count:
        raise ModelError(f"no batch of the calibration data holds the {shapes[0][0]} examples of the file's batch")


@contextlib.contextmanager
def _mapped(precision: Precision) -> Iterator[None]:
    """The quantizer's errors are ours, and what it says about its progress is nobody's."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    except ModelError:
        raise
    except ModuleNotFoundError as error:
        raise MissingLibrary(
            f"{precision.name} TFLite files need {error.name}: pip install 'edgeprune[tflite]'"
        ) from error
    except Exception as error:  # its errors share no base class
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"ai-edge-quantizer cannot make a {precision.name} model: {reason}") from error
    finally:
        logging.disable(previous)
