"""Score every unit by a criterion, and measure what each group's removal costs in calibration loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.compensation._rows import Layer, is_plain
from edgeprune.compensation.obs import collect_gram, explain_removed
from edgeprune.core.errors import DataError
from edgeprune.core.family import configure, load_member
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import FloatArray, Graph, Group, Importance, IntArray, LossCurve
from edgeprune.core.store import append_record, read_lines
from edgeprune.criteria import GroupView

Batches = Iterable[tuple[Any, Tensor]]
GRADIENT_EXAMPLES = 16
"""Examples per gradient: squared means of small batches stay apart from noise at a trained minimum."""
EVALUATION_EXAMPLES = 128


def score_groups(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    graph: Graph,
    calibration: Batches | None,
    *,
    criterion: str = "taylor",
    options: str = "",
    curves: bool = True,
    levels: int = 4,
    compensate: bool = True,
    examples: int = 256,
    damping: float = 1e-2,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> Importance:
    """One score per unit of each prunable group, and per group the measured loss at a few widths.

    The module is not changed. A curve's loss is that of the model with the lowest-scored units of one
    group removed and the layers that read them refitted by least squares, all else dense.

    inputs:      example inputs; calibration inputs must have their shape behind the batch axis.
    calibration: (inputs, labels); may be None for a criterion without gradients and curves=False.
    criterion, options: a member of `criteria/` and its configuration (`p=1`).
    levels:      widths per curve besides the narrowest: even parts of the group, on its step.
    compensate:  refit consumers. examples: calibration examples for the curves (all for the scores).
    checkpoint:  JSONL file that finished groups are appended to and taken from; cleared by the caller.
    raises:      DataError without labels, on inputs of other shapes, or a loss that is not finite.
    """
    member = load_member("criteria", criterion)
    score = configure(member.score, options)
    needs_gradient = "grad" in member.NEEDS
    examples_ = _read_examples(calibration, inputs) if needs_gradient or curves else None
    model = copy.deepcopy(module).eval()
    if examples_ is None:
        scores = _average(score, model, graph, [None])
    else:
        batches = examples_.batches(GRADIENT_EXAMPLES) if needs_gradient else [None]
        scores = _average(score, model, graph, batches, progress)
    name = f"{criterion}:{options}" if options else criterion
    if not curves:
        return Importance(criterion=name, graph_sha256=graph.model_sha256, scores=scores)
    assert examples_ is not None
    few = examples_.first(examples)
    bench = _Bench(model, few, damping if compensate else None)
    dense_loss = bench.loss()
    importance = Importance(criterion=name, graph_sha256=graph.model_sha256, scores=scores, dense_loss=dense_loss)
    finished = _finished(checkpoint, importance)
    for done, group in enumerate(graph.prunable):
        progress("score: loss curves", done, len(graph.prunable))
        if group.name in finished:
            continue
        curve = _measure_curve(bench, group, scores[group.name], levels, dense_loss)
        finished[group.name] = curve
        if checkpoint is not None:
            append_record(checkpoint, Importance(
                criterion=name, graph_sha256=graph.model_sha256, scores={group.name: scores[group.name]},
                dense_loss=dense_loss, curves={group.name: curve},
            ))  # fmt: skip
    progress("score: loss curves", len(graph.prunable), len(graph.prunable))
    return Importance(criterion=name, graph_sha256=graph.model_sha256, scores=scores,
                      dense_loss=dense_loss, curves=finished)  # fmt: skip


def _finished(checkpoint: Path | None, now: Importance) -> dict[str, LossCurve]:
    """Curves of an earlier, killed run of the same model, data and criterion."""
    if checkpoint is None or not checkpoint.is_file():
        return {}
    found: dict[str, LossCurve] = {}
    for line in read_lines(checkpoint, Importance):
        same = (line.criterion, line.graph_sha256) == (now.criterion, now.graph_sha256)
        same = same and line.dense_loss is not None and math.isclose(line.dense_loss, now.dense_loss or 0, rel_tol=1e-6)
        for name, curve in line.curves.items():
            if same and np.allclose(line.scores[name], now.scores.get(name, math.nan), rtol=1e-4):
                found[name] = curve
    return found


# --- examples ------------------------------------------------------------------------------------


class _Examples:
    """Calibration examples, all in memory, re-batched at will."""

    def __init__(self, inputs: Sequence[Tensor], targets: Tensor) -> None:
        self.inputs, self.targets = tuple(inputs), targets

    def first(self, count: int) -> _Examples:
        return _Examples([tensor[:count] for tensor in self.inputs], self.targets[:count])

    def batches(self, size: int) -> list[tuple[tuple[Tensor, ...], Tensor]]:
        starts = range(0, len(self.targets), size)
        return [(tuple(x[s : s + size] for x in self.inputs), self.targets[s : s + size]) for s in starts]


def _read_examples(calibration: Batches | None, inputs: tuple[Tensor, ...]) -> _Examples:
    """raises: DataError when there are none, or they lack labels or the model's input shape."""
    if calibration is None:
        raise DataError("scoring needs calibration data with labels; give the data source a .calibration, "
                        "or use criterion magnitude without loss curves")  # fmt: skip
    kept: list[tuple[tuple[Tensor, ...], Tensor]] = []
    for given, targets in calibration:
        tensors = tuple(given) if isinstance(given, tuple | list) else (given,)
        if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.ndim != 1:
            shown = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
            raise DataError(f"scoring needs a whole-number label per calibration example; the targets are {shown}")
        shapes = [list(tensor.shape[1:]) for tensor in tensors]
        wanted = [list(tensor.shape[1:]) for tensor in inputs]
        if shapes != wanted:
            raise DataError(f"calibration inputs have shape {shapes} behind the batch axis, the model's are {wanted}")
        kept.append((tensors, targets))
    if not kept:
        raise DataError("the calibration data is empty")
    columns = zip(*(tensors for tensors, _ in kept), strict=True)
    return _Examples([torch.cat(column) for column in columns], torch.cat([targets for _, targets in kept]))


def _loss(model: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor, reduction: str = "mean") -> Tensor:
    logits = model(*inputs)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise DataError("scoring needs a classifier with outputs (n, classes)")
    if int(targets.max()) >= logits.shape[1] or int(targets.min()) < 0:
        raise DataError(f"the data has the label {int(targets.max())}, the model only {logits.shape[1]} classes")
    return functional.cross_entropy(logits, targets, reduction=reduction)


# --- scores --------------------------------------------------------------------------------------


def _average(
    score: Any, model: nn.Module, graph: Graph, batches: Sequence[Any], progress: Progress = silent
) -> dict[str, FloatArray]:
    """Mean over batches of each group's scores; a batch of None asks for no gradient."""
    totals: dict[str, Tensor] = {}
    tensors = dict(model.named_parameters())
    for done, batch in enumerate(batches):
        progress("score: gradients", done, len(batches))
        if batch is not None:
            model.zero_grad(set_to_none=True)
            loss = _loss(model, *batch)
            if not math.isfinite(float(loss.detach())):
                raise DataError(f"the model's calibration loss is {float(loss.detach())}; check weights and data")
            loss.backward()
        for group in graph.prunable:
            views = _views(group, graph, tensors, with_gradient=batch is not None)
            with torch.no_grad():
                value = score(views).double() if views else torch.zeros(group.units, dtype=torch.float64)
            totals[group.name] = totals.get(group.name, 0) + value / len(batches)
    for name, total in totals.items():
        if not bool(torch.isfinite(total).all()):
            raise DataError(f"the scores of group '{name}' are not finite; check weights and calibration data")
    return {name: total.numpy() for name, total in totals.items()}


def _views(group: Group, graph: Graph, tensors: dict[str, nn.Parameter], *, with_gradient: bool) -> list[GroupView]:
    extents = {parameter.name: parameter.extents for parameter in graph.parameters}
    views = []
    for member in group.members:
        tensor = tensors.get(member.parameter)
        if tensor is None or not tensor.is_floating_point():
            continue  # a running statistic says nothing about importance
        gradient = tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)
        views.append(GroupView(
            parameter=member.parameter, axis=member.axis, role=member.role,
            extents=extents.get(member.parameter, ()), weight=_rows(tensor.detach(), member.axis, member.index),
            gradient=_rows(gradient, member.axis, member.index) if with_gradient else None,
        ))  # fmt: skip
    return views


def _rows(tensor: Tensor, axis: int, index: IntArray) -> Tensor:
    """(units, everything of a unit in this tensor)."""
    return tensor.movedim(axis, 0)[torch.from_numpy(index)].reshape(len(index), -1)


# --- loss curves ---------------------------------------------------------------------------------


def curve_widths(units: int, step: int, levels: int) -> list[int]:
    """Widths below `units` at which a curve is measured, ascending: even parts, and the narrowest."""
    parts = {max(step, math.ceil(units * part / levels / step) * step) for part in range(1, levels)}
    narrowest = max(step, math.ceil(units / 16 / step) * step)
    return sorted(width for width in parts | {narrowest} if width < units)


def _measure_curve(bench: _Bench, group: Group, scores: FloatArray, levels: int, dense_loss: float) -> LossCurve:
    widths = curve_widths(group.units, group.step, levels)
    order = np.argsort(scores, kind="stable")
    bench.watch(group)
    losses = [bench.loss_without(group, order[: group.units - width]) for width in widths]
    if not all(math.isfinite(loss) for loss in losses):
        raise DataError(f"the calibration loss without units of group '{group.name}' is not finite")
    return LossCurve(widths=np.array([*widths, group.units], np.int64), loss=np.array([*losses, dense_loss]))


class _Bench:
    """A model on which units are removed, what reads them is refitted, and everything is put back."""

    def __init__(self, model: nn.Module, examples: _Examples, damping: float | None) -> None:
        self.model, self.batches, self.damping = model, examples.batches(EVALUATION_EXAMPLES), damping
        self.tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.layers = dict(model.named_modules())
        self.grams: dict[str, Tensor] = {}

    @torch.no_grad()
    def loss(self) -> float:
        """Mean cross-entropy over the examples."""
        total = sum(float(_loss(self.model, *batch, reduction="sum")) for batch in self.batches)
        return total / sum(len(targets) for _, targets in self.batches)

    @torch.no_grad()
    def watch(self, group: Group) -> None:
        """Collect XᵀX of the layers that read the group, in one pass over the examples."""
        self.grams = {}
        if self.damping is None:
            return
        handles = []
        for name in {m.parameter.removesuffix(".weight") for m in group.members if m.role == "in" and m.axis == 1}:
            layer = self.layers.get(name)
            if layer is not None and is_plain(layer) and getattr(layer, "groups", 1) == 1:
                handles.append(layer.register_forward_pre_hook(self._collect(name)))
        try:
            if handles:
                for inputs, _ in self.batches:
                    self.model(*inputs)
        finally:
            for handle in handles:
                handle.remove()

    def _collect(self, name: str) -> Any:
        def hook(layer: Layer, inputs: tuple[Tensor, ...]) -> None:
            gram = collect_gram(layer, inputs[0])
            if gram is not None:
                self.grams[name] = self.grams[name] + gram if name in self.grams else gram

        return hook

    @torch.no_grad()
    def loss_without(self, group: Group, removed: IntArray) -> float:
        """The loss with some units of a group removed; the model is as before afterwards."""
        with self._restored(group):
            for name, gram in self.grams.items():
                gone = [m for m in group.members if m.parameter == f"{name}.weight" and m.axis == 1]
                inputs = torch.from_numpy(np.concatenate([m.index[removed].ravel() for m in gone]))
                layer = self.layers[name]
                assert isinstance(layer, Layer) and self.damping is not None
                explain_removed(layer, gram, inputs, self.damping)
            for member in group.members:
                gone_ = torch.from_numpy(member.index[removed].ravel())
                self.tensors[member.parameter].index_fill_(member.axis, gone_, 0)
            return self.loss()

    @contextmanager
    def _restored(self, group: Group) -> Iterator[None]:
        touched = {member.parameter for member in group.members} | {f"{name}.bias" for name in self.grams}
        saved = {name: self.tensors[name].clone() for name in touched if name in self.tensors}
        try:
            yield
        finally:
            for name, value in saved.items():
                self.tensors[name].copy_(value)
