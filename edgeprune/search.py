"""Weigh the loss curves by what groups lose together.

A plan adds what each group would lose if it were cut alone. Cut together, groups lose more, some far more than others.
Each curve gets a weight here, learnt from whole nets: plan with the weights, assemble that net, refit it, take its true
loss, and see which weights explain what was seen. Weights of curves that are judged by the assembled net are SPDY's
(Frantar and Alistarh, ICML 2022, arXiv:2201.13096, section 4.2), which draws them at random around the best. Ours: a
linear model of the true loss in the curves, whose uncertainty says where to look next (Thompson sampling).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.core.errors import DataError
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import CurveTrial, FloatArray, Importance, Plan
from edgeprune.core.store import append_record, digest, read_lines
from edgeprune.plan import level_losses

SPREAD = 0.7
"""Standard deviation of a weight around 1 before anything was seen."""
NOISE = 0.1
"""Share of a net's loss that no weighing explains."""
LEAST_WEIGHT, MOST_WEIGHT = 0.1, 8.0
DRAWS = 4
"""Draws of weights per net at most: many lead to widths that were seen before."""
FITTING_EXAMPLES, JUDGING_EXAMPLES = 128, 1024
"""Calibration examples that a net is refitted on in a search, and others that it is judged by, at most."""

Batches = Iterable[tuple[Any, Tensor]]


def weigh_curves(
    importance: Importance,
    choose: Callable[[Importance], Plan],
    judge: Callable[[Plan], float],
    *,
    trials: int = 16,
    seconds: float = math.inf,
    judged_with: Any = None,
    checkpoint: Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Importance:
    """The importance with its curves weighed so that the plan made of it loses least in truth.

    choose: widths for an importance, within the budget. judge: what the net of a plan loses beside the dense one, > 0.
    trials, seconds: nets to judge at most, the one of the unweighed curves first, and for how long.
    judged_with: what else decides a net's loss, in plain values.
    checkpoint: JSONL file that trials are appended to and taken from.
    returns: the importance as it was where no weights beat it.
    raises: DataError without curves, or when a loss is not finite.
    """
    if not importance.curves:
        raise DataError("a search over loss curves needs them; score with curves, or set [search] trials = 0")
    names, base, rng = sorted(importance.curves), digest([importance, judged_with]), np.random.default_rng(seed)
    judged = _read_trials(checkpoint, base)
    seen: list[CurveTrial] = []
    started = time.monotonic()
    weights = np.ones(len(names))
    for _ in range(trials * DRAWS):
        progress("search: nets judged", len(seen), trials)
        by_name = {name: float(weight) for name, weight in zip(names, weights, strict=True)}
        widths = (plan := choose(apply_weights(importance, by_name))).widths
        if not any(trial.widths == widths for trial in seen):
            loss = next((trial.loss for trial in judged if trial.widths == widths), None)
            if loss is None:
                loss = judge(plan)
                if not np.isfinite(loss):
                    raise DataError("the loss of a planned net is not finite; check the calibration data")
                if checkpoint is not None:
                    append_record(checkpoint, CurveTrial(base=base, weights=by_name, widths=widths, loss=loss))
            seen.append(CurveTrial(base=base, weights=by_name, widths=widths, loss=loss))
        if len(seen) >= trials or time.monotonic() - started > seconds:
            break
        weights = _draw_weights(rises(importance, names, seen), np.array([trial.loss for trial in seen]), rng)
    best = min(seen, key=lambda trial: trial.loss)
    return importance if best is seen[0] else apply_weights(importance, best.weights)


def apply_weights(importance: Importance, weights: Mapping[str, float]) -> Importance:
    """The importance with each curve's rise above the dense loss multiplied."""
    curves = {
        name: replace(curve, loss=curve.loss[-1] + weights.get(name, 1.0) * (curve.loss - curve.loss[-1]))
        for name, curve in importance.curves.items()
    }
    return replace(importance, curves=curves)


def scatter_weights(importance: Importance, seed: int) -> Importance:
    """The importance with random weights on its curves: plans of it are neighbours of the plan without."""
    rng = np.random.default_rng(seed)
    return apply_weights(importance, {name: float(np.exp(rng.normal(0, SPREAD))) for name in sorted(importance.curves)})


def rises(importance: Importance, names: Sequence[str], trials: Sequence[CurveTrial]) -> FloatArray:
    """What the curve of each group, or branch, says that it loses at a trial's width: (trials, names)."""
    columns = []
    for name in names:
        if importance.curves[name].widths[0] == 0:  # a branch: trials name it where it is dropped
            loss = importance.curves[name].loss
            columns.append(np.array([max(loss[0] - loss[-1], 0.0) * (name in trial.widths) for trial in trials]))
            continue
        widths = np.unique([*(trial.widths[name] for trial in trials), int(importance.curves[name].widths[-1])])
        losses = level_losses(importance, {name: widths})[name]
        columns.append(losses[np.searchsorted(widths, [trial.widths[name] for trial in trials])])
    return np.stack(columns, axis=1)


def _draw_weights(rise: FloatArray, loss: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Weights from what the trials say of them: Bayesian linear regression around one common factor.

    rise: (trials, groups). loss: (trials,), > 0.
    """
    alone = rise.sum(axis=1)
    factor = float(alone @ loss / max(float(alone @ alone), 1e-30))
    noise = NOISE * np.maximum(loss, 1e-12)
    seen = factor * rise / noise[:, None]
    missed = (loss - factor * alone) / noise
    covariance = np.linalg.inv(seen.T @ seen + np.eye(rise.shape[1]) / SPREAD**2)
    drawn = rng.multivariate_normal(1 + covariance @ (seen.T @ missed), covariance)
    clipped: FloatArray = np.clip(drawn, LEAST_WEIGHT, MOST_WEIGHT)
    return clipped


def _read_trials(checkpoint: Path | None, base: str) -> list[CurveTrial]:
    """Trials of an earlier, killed run over the same curves."""
    if checkpoint is None or not checkpoint.is_file():
        return []
    return [trial for trial in read_lines(checkpoint, CurveTrial) if trial.base == base]


# --- judging -------------------------------------------------------------------------------------


def split_examples(batches: Batches) -> tuple[list[tuple[Any, Tensor]], list[tuple[Any, Tensor]]]:
    """Examples to refit on, at most half of all, and others to judge by; no more than a search needs."""
    tensors, targets = [], []
    for inputs, target in batches:
        tensors.append(tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,))
        targets.append(target)
    columns, labels = [torch.cat(column) for column in zip(*tensors, strict=True)], torch.cat(targets)
    if len(labels) < 2:
        raise DataError("a search needs at least two calibration examples; set [search] trials = 0")
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
