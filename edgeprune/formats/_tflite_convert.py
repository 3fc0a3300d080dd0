"""A module as a float32 .tflite file, by litert-torch in a process of its own.

The module's ATen graph is rewritten before the converter sees it: images come and go with channels
last, which is what the runtime computes in, and every operation carries the name of its node, which
the converter then writes into the tensors' names.
"""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map_only

from edgeprune.core.errors import ModelError
from edgeprune.core.family import MissingLibrary
from edgeprune.formats import _tflite_worker
from edgeprune.graphs.capture import capture, module_path

Inputs = tuple[torch.Tensor, ...]

WORKER = Path(_tflite_worker.__file__)
IMPORT_S, MODEL_S = 120.0, 600.0
"""Longest the converter may take to start, and for each model: about ten times what is usual."""
MAX_BYTES = 2**31 - 1
"""Offsets in a flatbuffer have 32 bits, one of them a sign."""
LAST, FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


def convert(
    modules: Sequence[nn.Module],
    inputs: Inputs,
    *,
    worker: Path = WORKER,
    timeout_s: float | None = None,
) -> list[bytes]:
    """Each module as a .tflite model, in one process.

    inputs: example inputs of every module; their shapes become the file's.
    timeout_s: of all of them; None: as long as so many models may take.
    raises: ModelError that names the operation and the module it stands in, or the signal that ended the
        converter, or the time it did not keep; MissingLibrary.
    """
    if importlib.util.find_spec("litert_torch") is None:
        raise MissingLibrary("conversion to TFLite needs litert-torch: pip install 'edgeprune[tflite]'")
    limit = IMPORT_S + MODEL_S * len(modules) if timeout_s is None else timeout_s
    with tempfile.TemporaryDirectory(prefix="edgeprune-tflite-") as name:
        folder = Path(name)
        paths = {number: _save(module, inputs, folder / f"{number}.pt2") for number, module in enumerate(modules)}
        log = folder / "log"
        with log.open("wb") as file:
            try:
                done = subprocess.run(
                    [sys.executable, "-P", str(worker), name],
                    stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, timeout=limit, check=False,
                )  # fmt: skip
            except subprocess.TimeoutExpired as error:
                raise ModelError(
                    f"the TFLite converter did not finish within {limit:.0f} s and was stopped; "
                    "look for an operation that it expands without end, or give it a smaller model"
                ) from error
        return [_result(folder / f"{number}.tflite", places, done, log) for number, places in paths.items()]


def _result(path: Path, places: dict[str, str], done: subprocess.CompletedProcess[bytes], log: Path) -> bytes:
    if path.is_file():
        return path.read_bytes()
    if (report := path.with_suffix(".json")).is_file():
        failure = json.loads(report.read_text())
        raise ModelError(_explain(failure["reason"], failure["place"], places))
    if done.returncode < 0:
        try:
            ended = signal.Signals(-done.returncode).name
        except ValueError:
            ended = f"signal {-done.returncode}"
        raise ModelError(f"the TFLite converter crashed ({ended}): {_last_line(log)}; simplify the model")
    raise ModelError(f"the TFLite converter ended with {done.returncode} and wrote nothing: {_last_line(log)}")


def _explain(reason: str, place: str, places: dict[str, str]) -> str:
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    missing = re.search(r"Lowering not found: (\S+)", reason)
    what = f"TFLite has no operation for {missing.group(1)}" if missing else lines[0]
    where = f" at {place} in {places[place] or 'the model itself'}" if place in places else ""
    return f"litert-torch cannot convert the model{where}: {what}; rewrite that operation"


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


# --- what the converter gets -----------------------------------------------------------------------


def _save(module: nn.Module, inputs: Inputs, path: Path) -> dict[str, str]:
    """Write the module with channels last as an archive; the module path of every labelled node."""
    captured = capture(module, inputs)
    tensors = {id(t): t for t in (*captured.parameters(), *captured.buffers())}.values()
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > MAX_BYTES:
        raise ModelError("the weights are larger than the 2 GiB of a TFLite file; split the model")
    places = {node.name: module_path(node) for node in captured.graph.nodes if node.op == "call_function"}
    for node in captured.graph.nodes:
        node.meta["nn_module_stack"] = {"": ("", node.name)}
    for node in list(captured.graph.nodes):
        _turn_mean(captured.graph, node)
    _channels_last(captured.graph)
    captured.recompile()
    given = tuple(x.permute(LAST).contiguous() if x.ndim == 4 else x for x in inputs)
    try:
        with torch.no_grad():
            torch.export.save(torch.export.export(captured.eval(), given, strict=False), path)
    except Exception as error:  # torch.export's errors share no base class
        raise ModelError(
            f"torch.export cannot write the model with channels last: {str(error).splitlines()[0]}"
        ) from error
    return places


def _channels_last(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op == "placeholder" and _rank(node) == 4:
            with graph.inserting_after(node):
                turned = _call(graph, torch.ops.aten.permute.default, (node, FIRST), node)
            node.replace_all_uses_with(turned, delete_user_cb=lambda user, turned=turned: user is not turned)
        elif node.op == "output":
            with graph.inserting_before(node):
                node.args = tree_map_only(
                    fx.Node,
                    lambda value: (
                        _call(graph, torch.ops.aten.permute.default, (value, LAST), value)
                        if _rank(value) == 4
                        else value
                    ),
                    node.args,
                )


def _turn_mean(graph: fx.Graph, node: fx.Node) -> None:
    """A mean over an image is taken with channels last: the converter turns the image around for it otherwise."""
    if node.op != "call_function" or node.target is not torch.ops.aten.mean.dim or len(node.args) != 2:
        return
    image, axes = node.args
    if not isinstance(image, fx.Node) or _rank(image) != 4 or not isinstance(axes, list):
        return
    if {int(axis) % 4 for axis in axes} == {2, 3}:  # type: ignore[call-overload, unused-ignore]
        with graph.inserting_before(node):
            turned = _call(graph, torch.ops.aten.permute.default, (image, LAST), image)
        node.args = (turned, [1, 2])


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta = {"nn_module_stack": {"": ("", like.name)}, "val": like.meta.get("val")}
    return node


def _rank(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.ndim if isinstance(value, torch.Tensor) else -1
