"""Score every unit by a criterion, and measure what each group's removal costs in calibration loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeprune.compensation._rows import Layer, is_plain
from edgeprune.compensation.batch_norm import reestimate_batch_norm
from edgeprune.compensation.obs import collect_gram, explain_removed
from edgeprune.core.errors import DataError, NothingToScore, UsageError
from edgeprune.core.family import configure, load_member
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import Branch, FloatArray, Graph, Group, Importance, IntArray, LossCurve
from edgeprune.core.store import append_record, read_lines
from edgeprune.criteria import GroupView
from edgeprune.executors import load_executor
from edgeprune.graphs.portable import Portable
from edgeprune.graphs.slice import named_tensors
from edgeprune.statistics import Batch, Fill
from edgeprune.statistics._layers import rows
from edgeprune.statistics._losses import cross_entropy

Batches = Iterable[tuple[Any, Any]]
EVALUATION_EXAMPLES = 128


def score_groups(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    graph: Graph,
    calibration: Batches | None,
    *,
    criterion: str = "surgeon",
    options: str = "",
    curves: bool = True,
    levels: int = 4,
    compensate: bool = True,
    examples: int = 256,
    damping: float = 1e-2,
    depth: bool = False,
    checkpoint: Path | None = None,
    executor: str = "here",
    progress: Progress = silent,
) -> Importance:
    """One score per unit of each prunable group, and per group the measured loss at a few widths.

    The module is not changed. A curve's loss is that of the model with the lowest-scored units of one
    group removed and the layers that read them refitted by least squares, all else dense.

    inputs:      example inputs; calibration inputs must have their shape behind the batch axis.
    calibration: (inputs, labels). Without curves, labels may be anything for a criterion that does
        not use them, and calibration None for one that reads nothing but weights.
    criterion, options: a member of `criteria/` and its configuration (`p=1`). With curves, units of a group that it
        cannot score are ordered by magnitude: the curve says what they cost.
    levels:      widths per curve besides the narrowest: even parts of the group, on its step.
    compensate:  refit consumers. examples: calibration examples for the curves (all for the scores).
    depth:       also measure the loss without each residual branch, so that a plan may drop it.
    checkpoint:  JSONL file that finished groups and branches are appended to and taken from; cleared by the caller.
    executor:    where curves are measured, each on its own; a member of `executors/`, as `processes:workers=2`.
    raises:      DataError without labels, on inputs of other shapes, or a loss that is not finite; UsageError for
        depth without curves; as `load_executor`.
    """
    if depth and not curves:
        raise UsageError("dropping whole branches (depth) needs measured losses; leave loss curves on")
    start, member = load_executor(executor), load_member("criteria", criterion)
    score = configure(member.score, options)
    statistic = None if member.NEEDS is None else load_member("statistics", member.NEEDS)
    model = copy.deepcopy(module).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # what the user froze for training matters as well
    examples_ = None
    other = load_member("criteria", "magnitude").score if curves else None
    if statistic is not None or curves:
        examples_ = _read_examples(calibration, inputs, labels=curves or (statistic is not None and statistic.LABELS))
    if statistic is None or examples_ is None:
        scores, unscored = _average(score, other, model, graph, [lambda _: {}])
    else:
        scores, unscored = {}, ()
        batches = examples_.batches(statistic.BATCH)
        # The same batches each time, so that labels drawn from the model are the same ones.
        parts = statistic.split(model, graph) if hasattr(statistic, "split") else [graph]
        for number, part in enumerate(parts):
            counted = _counted(batches, progress, number, len(parts))
            found = _average(score, other, model, part, statistic.collect(model, part, counted))
            scores, unscored = scores | found[0], unscored + found[1]
    name = f"{criterion}:{options}" if options else criterion
    if not curves:
        return Importance(criterion=name, graph_sha256=graph.model_sha256, scores=scores)
    assert examples_ is not None
    few = examples_.first(examples)
    dense_loss = _Bench(model, few, damping=None).loss()
    importance = Importance(
        criterion=name, graph_sha256=graph.model_sha256, scores=scores, dense_loss=dense_loss, by_magnitude=unscored
    )
    finished = _finished(checkpoint, importance)
    wanted = {
        "score: loss curves": [group.name for group in graph.prunable],
        "score: branches": [branch.name for branch in graph.branches] if depth else [],
    }
    measured = Measured(
        model=Portable(model, inputs), graph=graph, examples=few, scores=scores, dense_loss=dense_loss, levels=levels,
        damping=damping if compensate else None,
        plain=frozenset(path for path, layer in model.named_modules() if is_plain(layer)),
    )  # fmt: skip
    with start(make_measure, measured) as pool:
        for what, names in wanted.items():
            if not (left := [each for each in names if each not in finished]):
                continue
            progress(what, len(names) - len(left), len(names))
            for done, (place, curve) in enumerate(pool.run(left), len(names) - len(left) + 1):
                of = left[place]
                finished[of] = curve
                if checkpoint is not None:
                    own = {of: scores[of]} if of in scores else {}
                    append_record(checkpoint, replace(importance, scores=own, curves={of: curve}))
                progress(what, done, len(names))
    return replace(importance, curves={each: finished[each] for names in wanted.values() for each in names})


def _finished(checkpoint: Path | None, now: Importance) -> dict[str, LossCurve]:
    """Curves of an earlier, killed run of the same model, data and criterion; a branch has no scores."""
    if checkpoint is None or not checkpoint.is_file():
        return {}
    found: dict[str, LossCurve] = {}
    for line in read_lines(checkpoint, Importance):
        same = (line.criterion, line.graph_sha256) == (now.criterion, now.graph_sha256)
        same = same and line.dense_loss is not None and math.isclose(line.dense_loss, now.dense_loss or 0, rel_tol=1e-6)
        for name, curve in line.curves.items():
            ranked = np.allclose(line.scores.get(name, 0.0), now.scores.get(name, 0.0), rtol=1e-4)
            if same and ranked:
                found[name] = curve
    return found


# --- examples ------------------------------------------------------------------------------------


class _Examples:
    """Calibration examples, all in memory, re-batched at will."""

    def __init__(self, inputs: Sequence[Tensor], targets: Tensor | None) -> None:
        self.inputs, self.targets = tuple(inputs), targets

    def first(self, count: int) -> _Examples:
        return _Examples([tensor[:count] for tensor in self.inputs], self._targets(slice(count)))

    def batches(self, size: int) -> list[Batch]:
        parts = [slice(start, start + size) for start in range(0, len(self.inputs[0]), size)]
        return [(tuple(x[part] for x in self.inputs), self._targets(part)) for part in parts]

    def _targets(self, part: slice) -> Tensor | None:
        return None if self.targets is None else self.targets[part]


def _read_examples(calibration: Batches | None, inputs: tuple[Tensor, ...], *, labels: bool) -> _Examples:
    """raises: DataError when there are none, or they lack the model's input shape, or labels that are needed."""
    if calibration is None:
        raise DataError(
            f"scoring needs calibration data{' with labels' if labels else ''}; give the data source a .calibration, "
            "or use criterion magnitude without loss curves"
        )
    kept: list[tuple[Tensor, ...]] = []
    targets: list[Tensor] = []
    for given, label in calibration:
        tensors = tuple(given) if isinstance(given, tuple | list) else (given,)
        if labels:
            targets.append(_check_label(label))
        shapes = [list(tensor.shape[1:]) for tensor in tensors]
        wanted = [list(tensor.shape[1:]) for tensor in inputs]
        if shapes != wanted:
            raise DataError(f"calibration inputs have shape {shapes} behind the batch axis, the model's are {wanted}")
        kept.append(tensors)
    if not kept:
        raise DataError("the calibration data is empty")
    columns = zip(*kept, strict=True)
    return _Examples([torch.cat(column) for column in columns], torch.cat(targets) if labels else None)


def _check_label(label: Any) -> Tensor:
    if isinstance(label, Tensor) and not label.is_floating_point() and label.ndim == 1:
        return label
    shown = label.dtype if isinstance(label, Tensor) else type(label).__name__
    raise DataError(
        f"scoring needs a whole-number label per calibration example; the targets are {shown}. Without labels, use a "
        "criterion such as reconstruction and no loss curves"
    )


def _counted(batches: Sequence[Batch], progress: Progress, number: int, passes: int) -> Iterator[Batch]:
    """The batches of one of several passes over them."""
    before, total = number * len(batches), passes * len(batches)
    for done, batch in enumerate(batches):
        progress("score: units", before + done, total)
        yield batch
    progress("score: units", before + len(batches), total)


# --- scores --------------------------------------------------------------------------------------


Score = Callable[[Sequence[GroupView]], Tensor]


def _average(
    score: Score, other: Score | None, model: nn.Module, graph: Graph, collected: Iterable[Fill]
) -> tuple[dict[str, FloatArray], tuple[str, ...]]:
    """Mean of each group's scores over what a statistic has collected, and the groups that `other` scored."""
    totals: dict[str, Tensor] = {}
    unscored: dict[str, None] = {}
    tensors, count = dict(model.named_parameters()), 0
    for fill in collected:
        count += 1
        for group in graph.prunable:
            views = group_views(group, graph, tensors, fill)
            with torch.no_grad():
                try:
                    value = score(views).double() if views else torch.zeros(group.units, dtype=torch.float64)
                except NothingToScore:
                    if other is None:  # scores are all that there is to compare groups by
                        raise
                    value, unscored[group.name] = other(views).double(), None
            totals[group.name] = totals.get(group.name, 0) + value
    for name, total in totals.items():
        if not bool(torch.isfinite(total).all()):
            raise DataError(f"the scores of group '{name}' are not finite; check weights and calibration data")
    return {name: (total / count).numpy() for name, total in totals.items()}, tuple(unscored)


def group_views(group: Group, graph: Graph, tensors: Mapping[str, Tensor], fill: Fill) -> list[GroupView]:
    """What a criterion sees of a group: its parameters, and what a statistic says of them."""
    extents = {parameter.name: parameter.extents for parameter in graph.parameters}
    ops = {parameter: node.op for node in graph.nodes for parameter in node.parameters}
    views = []
    for member in group.members:
        tensor = tensors.get(member.parameter)
        if tensor is None or not tensor.is_floating_point():
            continue  # a running statistic says nothing about importance
        views.append(GroupView(
            parameter=member.parameter, axis=member.axis, role=member.role, op=ops.get(member.parameter, ""),
            extents=extents.get(member.parameter, ()), weight=rows(tensor.detach(), member.axis, member.index),
            **fill(member),
        ))  # fmt: skip
    return views


# --- loss curves ---------------------------------------------------------------------------------


def curve_widths(units: int, step: int, levels: int) -> list[int]:
    """Widths below `units` at which a curve is measured, ascending: even parts, and the narrowest."""
    parts = {max(step, math.ceil(units * part / levels / step) * step) for part in range(1, levels)}
    narrowest = max(step, math.ceil(units / 16 / step) * step)
    return sorted(width for width in parts | {narrowest} if width < units)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What loss curves are measured of and on.

    damping: None where what reads a group is not refitted. plain: layers that can be, in the user's own classes: those
        that stand for them in a worker may be more, and the curves would differ.
    """

    model: Portable
    graph: Graph
    examples: _Examples
    scores: Mapping[str, FloatArray]
    dense_loss: float
    levels: int
    damping: float | None
    plain: frozenset[str]


def make_measure(given: Measured) -> Callable[[str], LossCurve]:
    """What measures the curve of a group or branch by its name, in a worker."""
    bench = _Bench(given.model.module, given.examples, given.damping, given.plain)
    groups = {group.name: group for group in given.graph.prunable}
    branches = {branch.name: branch for branch in given.graph.branches}

    def measure(name: str) -> LossCurve:
        if name in groups:
            return _measure_curve(bench, groups[name], given.scores[name], given.levels, given.dense_loss)
        losses = np.array([bench.loss_without_branch(branches[name]), given.dense_loss])
        return LossCurve(widths=np.arange(2), loss=losses)

    return measure


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

    def __init__(
        self, model: nn.Module, examples: _Examples, damping: float | None, plain: frozenset[str] = frozenset()
    ) -> None:
        self.model, self.batches = model, examples.batches(EVALUATION_EXAMPLES)
        self.damping, self.plain = damping, plain
        self.tensors = named_tensors(model)
        self.layers = dict(model.named_modules(remove_duplicate=False))
        self.grams: dict[str, Tensor] = {}

    @torch.no_grad()
    def loss(self) -> float:
        """Mean cross-entropy over the examples."""
        total, count = 0.0, 0
        for inputs, targets in self.batches:
            assert targets is not None
            total += float(cross_entropy(self.model, inputs, targets, "sum"))
            count += len(targets)
        return total / count

    @torch.no_grad()
    def watch(self, group: Group) -> None:
        """Collect XᵀX of the layers that read the group, in one pass over the examples."""
        self.grams = {}
        if self.damping is None:
            return
        handles = []
        for name in {m.parameter.removesuffix(".weight") for m in group.members if m.role == "in" and m.axis == 1}:
            layer = self.layers.get(name)
            if name in self.plain and isinstance(layer, Layer) and getattr(layer, "groups", 1) == 1:
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
                self.grams[name] = self.grams.get(name, 0) + gram[0]

        return hook

    @torch.no_grad()
    def loss_without(self, group: Group, removed: IntArray) -> float:
        """The loss with some units of a group removed; the model is as before afterwards."""
        touched = {member.parameter for member in group.members} | {f"{name}.bias" for name in self.grams}
        with self._restored(touched):
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

    @torch.no_grad()
    def loss_without_branch(self, branch: Branch) -> float:
        """The loss without a residual branch, or with batch-norm statistics anew besides, whichever is lower."""
        buffers = {name for name, _ in self.model.named_buffers()}
        with self._restored(buffers | set(branch.parameters)):
            for name in branch.parameters:
                self.tensors[name].zero_()
            as_it_is = self.loss()
            reestimate_batch_norm(self.model, self.batches)
            losses = [loss for loss in (as_it_is, self.loss()) if math.isfinite(loss)]
        if not losses:
            raise DataError(f"the calibration loss without the branch '{branch.name}' is not finite")
        return min(losses)

    @contextmanager
    def _restored(self, touched: Iterable[str]) -> Iterator[None]:
        saved = {name: self.tensors[name].clone() for name in touched if name in self.tensors}
        try:
            yield
        finally:
            for name, value in saved.items():
                self.tensors[name].copy_(value)
