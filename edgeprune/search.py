"""Find a plan by what whole nets lose, since groups lose more together than the sum of what each would lose alone.

Plan, assemble that net, refit it, take its true loss, and see what explains the losses that were seen. Weights of loss
curves that are judged by the assembled net are SPDY's (Frantar and Alistarh, ICML 2022, arXiv:2201.13096, section 4.2),
which draws them at random around the best. Ours: besides the measured curves there are other *views* of what a width
loses, such as the summed magnitudes of the units that go, or the same of every group; the true loss is modelled as
linear in all of them, and the model's uncertainty says where to look next (Thompson sampling). So the search starts
from the plan of each view, goes on with plans of mixtures, and ends near the best of those: what a linear model says of
small changes to a net holds better than what it says of another net.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.compact import Assembler
from edgeprune.core.closed_loop import next_request
from edgeprune.core.errors import DataError
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import (
    Budget,
    CurveTrial,
    FloatArray,
    Graph,
    Importance,
    IntArray,
    LossCurve,
    Plan,
    Profile,
)
from edgeprune.core.store import append_record, digest, read_lines
from edgeprune.executors import Pool, load_executor
from edgeprune.graphs.portable import Portable
from edgeprune.plan import choose_widths, level_losses
from edgeprune.score import score_groups

SPREAD = 0.7
"""Standard deviation of a weight, as a share of it, before anything was seen."""
NOISE = 0.1
"""Share of a net's loss that no weights explain."""
PULL = 0.3
"""How much the views are held to be of one mind, beside what a net says."""
BOLDNESS, BOLDER = 0.5, 1.25
"""Share of a weight's uncertainty that a draw makes use of, since all of it explores more than so few nets allow; and
by how much more each time that a draw led to widths that were seen before."""
SAME = 1e-6
"""A net that loses so little less, as a share, is no better."""
LEAST_WEIGHT, MOST_WEIGHT = 0.1, 8.0
"""Of a group's weight in a view, of the view's own."""
LEAST_VIEW = 0.05
"""Weight of a view, of all, that is always left."""
GRID = 16
"""Widths of a group at which the views are tabulated, besides those of its curve."""
FAR = 0.4
"""Share of the nets that are looked for among all widths; the others near the best."""
DRAWS = 4
"""Draws of weights per net at most: many lead to widths that were seen before."""
FITTING_EXAMPLES, JUDGING_EXAMPLES = 128, 1024
"""Calibration examples that a net is refitted on in a search, and others that it is judged by, at most."""

SOLVER_SECONDS = 5.0
"""Time limit of the solver for a plan that only the search sees."""

Batches = Iterable[tuple[Any, Tensor]]
Widths = Mapping[str, int]


def search_curves(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    graph: Graph,
    profile: Profile,
    importance: Importance,
    budget: Budget,
    batches: Batches,
    *,
    trials: int = 16,
    seconds: float = 600.0,
    solver: str = "milp",
    levels: int = 16,
    compensate: bool = True,
    checkpoint: Path | None = None,
    seed: int = 0,
    executor: str = "here",
    progress: Progress = silent,
) -> Importance:
    """The importance with curves and widths of which the plan within the budget loses least, as whole nets have shown.

    inputs: example tensors, as for `trace_graph`. importance: with loss curves. budget: the tables' word counts, no
        board is asked.
    batches: (inputs, targets) for calibration, targets unused: a part to refit on, another to judge by.
    trials, seconds: nets to judge at most, and for how long. solver, levels: as for `choose_widths`.
    compensate: refit the nets. checkpoint: JSONL file that judged nets are appended to and taken from.
    executor: where nets are judged; a member of `executors/`, as `processes:workers=2`.
    raises: DataError without curves, with fewer than two examples, or when a loss is not finite; as `choose_widths`;
        as `load_executor`.
    """
    if not importance.curves:
        raise DataError("a search needs loss curves; score with them, or do without ([search] trials = 0, no --data)")
    # What the closed loop asks for first, so that the net that was judged best is the one that the board confirms.
    asked = replace(budget, latency_s=next_request((), budget))
    fitting, judging = split_examples(batches)
    start = load_executor(executor)

    def choose(given: Importance, near: Widths | None) -> Plan:
        # Greedy beside the solver asked for, which may find nothing in so short a time.
        return choose_widths(
            graph, profile, given, asked, solver=solver, compare=("greedy",), levels=levels, near=near,
            time_limit_s=SOLVER_SECONDS,
        )  # fmt: skip

    judged = Judged(
        model=Portable(module, inputs), graph=graph, fitting=fitting if compensate else None, judging=judging
    )
    with start(make_judge, judged) as judges:
        return weigh_curves(
            importance,
            choose,
            judges,
            beside=[score_groups(module, inputs, graph, None, criterion="magnitude", curves=False)],
            trials=trials,
            seconds=seconds,
            judged_with=[compensate, *(len(labels) for _, labels in (*fitting, *judging))],
            checkpoint=checkpoint,
            seed=seed,
            progress=progress,
        )


def weigh_curves(
    importance: Importance,
    choose: Callable[[Importance, Widths | None], Plan],
    judges: Pool,
    *,
    beside: Sequence[Importance] = (),
    trials: int = 16,
    seconds: float = math.inf,
    judged_with: Any = None,
    checkpoint: Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Importance:
    """The importance with curves, and the widths found, such that the plan made of it loses least in truth.

    choose: widths for an importance, within the budget, near given ones or anywhere.
    judges: takes plans, and tells what the net of each loses beside the dense one, > 0. Of several as many nets are
        drawn at a time, each as if the others were not: what one teaches comes to those drawn afterwards.
    beside: importances of other criteria, whose summed scores are views besides the curves.
    trials, seconds: nets to judge at most, the one of the unweighed curves first, and for how long.
    judged_with: what else decides a net's loss, in plain values.
    checkpoint: JSONL file that trials are appended to and taken from.
    returns: the importance as it was where nothing beat it.
    raises: DataError without curves, or when a loss is not finite.
    """
    if not importance.curves:
        raise DataError("a search over loss curves needs them")
    views, rng = Views.of(importance, beside), np.random.default_rng(seed)
    base = digest([importance, *beside, judged_with])
    judged = _read_trials(checkpoint, base)
    seen: list[CurveTrial] = []
    explained: list[FloatArray] = []
    started = time.monotonic()
    tried, boldness = 0, BOLDNESS

    def goes_on() -> bool:
        return tried < trials * DRAWS and (not seen or time.monotonic() - started <= seconds)

    while len(seen) < trials and goes_on():
        progress("search: nets judged", len(seen), trials)
        drawn: list[tuple[FloatArray, Plan]] = []
        while len(drawn) < min(judges.size, trials - len(seen)) and goes_on():
            if tried < len(views.rises):
                weights = views.alone(tried)
            elif seen:
                losses = np.array([trial.loss for trial in seen])
                weights = _draw_weights(np.stack(explained), losses, boldness, rng)
            else:
                break  # nothing is known yet to draw weights from
            far = len(seen) + len(drawn) < max(len(views.rises), FAR * trials)
            near = None if far else min(seen, key=lambda trial: trial.loss).widths
            # The curves alone are planned with as they were measured, not as tabulated.
            plan = choose(importance if tried == 0 else views.mix(weights), near)
            tried += 1
            if plan.widths in [known.widths for known in seen] + [other.widths for _, other in drawn]:
                boldness *= BOLDER
                continue
            boldness = BOLDNESS
            drawn.append((weights, plan))
        _judge_new(drawn, judged, judges, base, checkpoint)
        for _, plan in drawn:
            found = _find(plan, judged)
            assert found is not None
            seen.append(found)
            explained.append(views.explain(plan.widths))
    best = min(seen, key=lambda trial: trial.loss)
    if best.loss >= (1 - SAME) * seen[0].loss:
        return importance
    return replace(views.mix(np.array(best.weights)), found=best.widths)


@dataclass(frozen=True)
class Views:
    """What several views say that groups and branches lose, tabulated.

    importance: whose scores rank the units. names: of its curves, in order. widths: of each, ascending.
    rises: per view and name, what the loss rises by at those widths; all views have the same sum half way down.
    """

    importance: Importance
    names: tuple[str, ...]
    widths: tuple[IntArray, ...]
    rises: tuple[tuple[FloatArray, ...], ...]

    @classmethod
    def of(cls, importance: Importance, beside: Sequence[Importance] = ()) -> Views:
        """The measured curves, the summed scores of others, and one that is the same for every group.

        Of a branch only its own curve says anything; all views take it.
        """
        names = tuple(sorted(importance.curves))
        groups = [name for name in names if importance.curves[name].widths[0] > 0]
        grid = {name: _tabulated_widths(importance.curves[name]) for name in groups}
        curves = level_losses(importance, grid)
        tables = [curves]
        tables += [level_losses(replace(other, curves={}), grid) for other in beside]
        tables.append({name: (1 - grid[name] / grid[name][-1]) ** 2 for name in groups})

        def half_way(table: Mapping[str, FloatArray]) -> float:
            return sum(float(np.interp(grid[name][-1] / 2, grid[name], table[name])) for name in groups)

        wanted = half_way(curves)
        scales = [wanted / total if (total := half_way(table)) > 0 and wanted > 0 else 1.0 for table in tables]
        branches = {
            name: np.array([max(float(curve.loss[0] - curve.loss[-1]), 0.0), 0.0])
            for name, curve in importance.curves.items()
            if name not in grid
        }
        return cls(
            importance=importance,
            names=names,
            widths=tuple(grid.get(name, np.arange(2)) for name in names),
            rises=tuple(
                tuple(table[name] * scale if name in grid else branches[name] for name in names)
                for table, scale in zip(tables, scales, strict=True)
            ),
        )

    def alone(self, view: int) -> FloatArray:
        """Weights (views, names) of one view and no other."""
        weights = np.zeros((len(self.rises), len(self.names)))
        weights[view] = 1.0
        return weights

    def mix(self, weights: FloatArray) -> Importance:
        """The importance with the weighed sum of the views for its curves; weights: (views, names)."""
        dense = self.importance.dense_loss or 0.0
        curves = {
            name: LossCurve(
                widths=self.widths[n],
                loss=dense + np.sum([weights[k, n] * rises[n] for k, rises in enumerate(self.rises)], axis=0),
            )
            for n, name in enumerate(self.names)
        }
        return replace(self.importance, curves=curves)

    def explain(self, widths: Mapping[str, int]) -> FloatArray:
        """What each view says that each group, or branch, loses at a plan's widths: (views, names)."""
        found = np.zeros((len(self.rises), len(self.names)))
        for n, name in enumerate(self.names):
            width = widths.get(name, int(self.widths[n][-1]))  # a branch is named where it is dropped
            for k, rises in enumerate(self.rises):
                found[k, n] = np.interp(width, self.widths[n], rises[n])
        return found


def _tabulated_widths(curve: LossCurve) -> IntArray:
    """Those of the curve, and others evenly between one unit and all."""
    even = np.linspace(1, int(curve.widths[-1]), GRID).round()
    widths: IntArray = np.unique([*curve.widths, *even]).astype(np.int64)
    return widths


def scatter_weights(importance: Importance, seed: int) -> Importance:
    """The importance with random weights on its curves' rises: plans of it are neighbours of the plan without."""
    rng = np.random.default_rng(seed)
    curves = {}
    for name in sorted(importance.curves):
        curve, weight = importance.curves[name], float(np.exp(rng.normal(0, SPREAD)))
        curves[name] = replace(curve, loss=curve.loss[-1] + weight * (curve.loss - curve.loss[-1]))
    return replace(importance, curves=curves, found={})


def _draw_weights(rise: FloatArray, loss: FloatArray, boldness: float, rng: np.random.Generator) -> FloatArray:
    """Weights from what the trials say of them: Bayesian linear regression around one factor per view.

    rise: (trials, views, names). loss: (trials,), > 0. boldness: share of the uncertainty. returns: (views, names).
    """
    trials, views, names = rise.shape
    noise = NOISE * np.maximum(loss, 1e-12)
    alone = rise.sum(axis=2)
    level = max(float(np.median(loss / np.maximum(alone.sum(axis=1), 1e-30))), 1e-30)
    pull = PULL * math.sqrt(trials)
    equations = np.vstack([alone / noise[:, None], np.eye(views) * pull / level])
    factors, _ = nnls(equations, np.concatenate([loss / noise, np.full(views, pull)]))
    mean = np.repeat(np.maximum(factors, LEAST_VIEW * factors.sum()), names)
    seen = rise.reshape(trials, -1) * mean / noise[:, None] * SPREAD
    missed = (loss - rise.reshape(trials, -1) @ mean) / noise
    covariance = np.linalg.inv(seen.T @ seen + np.eye(seen.shape[1]))
    expected = covariance @ (seen.T @ missed)
    drawn = expected + boldness * rng.multivariate_normal(np.zeros(len(mean)), covariance)
    weights: FloatArray = mean * np.clip(1 + SPREAD * drawn, LEAST_WEIGHT, MOST_WEIGHT)
    return weights.reshape(views, names)


def _judge_new(
    drawn: Sequence[tuple[FloatArray, Plan]], judged: list[CurveTrial], judges: Pool, base: str, checkpoint: Path | None
) -> None:
    """Judge what is not among `judged`, and add it there as it comes. raises: DataError where a loss is not finite."""
    new = [(weights, plan) for weights, plan in drawn if _find(plan, judged) is None]
    for place, loss in judges.run([plan for _, plan in new]):
        if not np.isfinite(loss):
            raise DataError("the loss of a planned net is not finite; check the calibration data")
        weights, plan = new[place]
        judged.append(CurveTrial(base=base, weights=weights.tolist(), widths=plan.widths, loss=loss))
        if checkpoint is not None:
            append_record(checkpoint, judged[-1])


def _find(plan: Plan, judged: Sequence[CurveTrial]) -> CurveTrial | None:
    return next((trial for trial in judged if trial.widths == plan.widths), None)


def _read_trials(checkpoint: Path | None, base: str) -> list[CurveTrial]:
    """Trials of an earlier, killed run over the same curves."""
    if checkpoint is None or not checkpoint.is_file():
        return []
    return [trial for trial in read_lines(checkpoint, CurveTrial) if trial.base == base]


# --- judging -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What nets are made of and judged by. fitting: examples to refit on, or None to leave them as they are."""

    model: Portable
    graph: Graph
    fitting: Sequence[tuple[Any, Tensor]] | None
    judging: Sequence[tuple[Any, Tensor]]


def make_judge(given: Judged) -> Callable[[Plan], float]:
    """What tells how much the net of a plan loses, in a worker."""
    nets, wanted = Assembler.of(given.model.captured, given.graph), outputs_of(given.model.module, given.judging)

    def judge(plan: Plan) -> float:
        return divergence(outputs_of(nets.assemble(plan, given.fitting), given.judging), wanted)

    return judge


def split_examples(batches: Batches) -> tuple[list[tuple[Any, Tensor]], list[tuple[Any, Tensor]]]:
    """Examples to refit on, at most half of all, and others to judge by; no more than a search needs."""
    tensors, targets = [], []
    for inputs, target in batches:
        tensors.append(tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,))
        targets.append(target)
    columns, labels = [torch.cat(column) for column in zip(*tensors, strict=True)], torch.cat(targets)
    if len(labels) < 2:
        raise DataError("a search needs two calibration examples; or do without ([search] trials = 0, no --data)")
    fitted = min(len(labels) // 2, FITTING_EXAMPLES)
    parts = (slice(0, fitted), slice(fitted, fitted + JUDGING_EXAMPLES))
    fitting, judging = ([(tuple(column[part] for column in columns), labels[part])] for part in parts)
    return fitting, judging


@torch.no_grad()
def outputs_of(module: nn.Module, batches: Batches) -> list[Tensor]:
    """The module's outputs in eval mode, a tensor a batch."""
    training = module.training
    module.eval()
    try:
        return [module(*inputs) for inputs, _ in batches]
    finally:
        module.train(training)


def divergence(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """How far outputs are from those of the dense model; needs no labels.

    outputs, wanted: (n, classes) each: mean Kullback-Leibler divergence of their softmax, nats; of any other shape:
        the squared error as a share of the wanted outputs' variance.
    """
    ours, theirs = torch.cat(list(outputs)).double(), torch.cat(list(wanted)).double()
    if theirs.ndim == 2 and theirs.shape[1] > 1:
        loss = functional.kl_div(ours.log_softmax(1), theirs.log_softmax(1), reduction="batchmean", log_target=True)
    else:
        loss = (ours - theirs).square().mean() / theirs.var(correction=0).clamp_min(1e-12)
    return float(loss)
