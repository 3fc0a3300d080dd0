"""What a run cannot have, found before anything long starts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from edgeprune.core.budget import check_steps
from edgeprune.core.errors import UsageError
from edgeprune.core.family import configure, load_member
from edgeprune.core.runfile import RunFile
from edgeprune.executors import load_executor
from edgeprune.gating import load_gating
from edgeprune.patterns import load_pattern
from edgeprune.planning import CURVES, NEAR, UNIFORM
from edgeprune.statistics._losses import are_logits
from edgeprune.training.attention import shared_layers
from edgeprune.training.batch import check_mixable
from edgeprune.training.launch import check_launcher
from edgeprune.training.options import SCRATCH, check_options
from edgeprune.transform import check_run

SCALED = "scaled"
"""The solver that scales another plan's widths."""


def check_run_file(run: RunFile) -> None:
    """raises: UsageError for what can be told from the run file alone."""
    check_contenders(run.search.contenders)
    check_steps(run.prune.steps, run.budget.latency)
    load_executor(run.executor)
    if run.prune.pattern is not None:
        load_pattern(run.prune.pattern)
    if run.prune.gating is not None:
        check_gating(run)
    if run.prune.transform is not None or run.prune.pivot:
        check_run(run)
    check_plans(run)


def check_contenders(names: Iterable[str]) -> None:
    """raises: UsageError for one that is neither of ours nor a criterion: hours of profiling come before it is used."""
    for name in names:
        if name not in (CURVES, UNIFORM) and not NEAR.fullmatch(name):
            criterion, _, options = name.partition(":")
            try:
                configure(load_member("criteria", criterion).score, options)
            except UsageError as error:
                raise UsageError(
                    f"[search] contenders: '{name}' is not {CURVES}, {UNIFORM}, near-1 and on, or a criterion ({error})"
                ) from error


def check_plans(run: RunFile) -> None:
    """raises: UsageError for plans of other runs that do not go with what else is asked for."""
    if (run.prune.like is None) != (run.prune.solver != SCALED):
        raise UsageError(f'[prune] solver = "{SCALED}" and like = "plan.json", whose widths it scales, go together')
    if run.prune.plan is not None and run.prune.like is not None:
        raise UsageError("[prune] has either plan or like, which is scaled, not both")


def check_gating(run: RunFile) -> None:
    """raises: UsageError for what a run with gates cannot have."""
    load_gating(run.prune.gating or "")
    if run.export.dtype not in ("float32", "float16"):
        raise UsageError(
            f"[prune] gating does not go with [export] dtype = '{run.export.dtype}'; use float32 or float16"
        )
    if run.budget.energy is not None and run.budget.power_model is None:
        raise UsageError("[prune] gating does not go with [budget] energy: a meter cannot tell one input from another")


def check_recovery(run: RunFile, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """raises: UsageError or DataError for what [recover] asks for and this run cannot have."""
    settings = run.recover
    check_launcher(settings.launch)
    check_options(
        **settings.options, budget=settings.budget, taught=settings.distil, pattern=run.prune.pattern,
        processes=2 if settings.launch else 1,
    )  # fmt: skip
    if settings.mixup:
        check_mixable(inputs)
    if settings.features:
        shared_layers(model, model, inputs)


def check_unlabelled(run: RunFile, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """raises: UsageError naming every setting that needs labels, or a classifier's outputs where they are none."""
    with torch.no_grad():
        classifier = are_logits(model(*inputs))
    prune = run.prune
    needs = load_member("criteria", prune.criterion.partition(":")[0]).NEEDS
    statistic = None if needs is None else load_member("statistics", needs)
    wrong = {
        '[prune] criterion = "reconstruction" (or another that needs none)': statistic is not None
        and (statistic.LABELS or (statistic.CLASSIFIER and not classifier)),
        "[prune] curves = false": prune.curves,
        "[prune] steps = 1": prune.step_count > 1,
        "[prune] without regularizer": prune.regularizer is not None,
        "[prune] without gating": prune.gating is not None,
        "[recover] distil = true (or epochs = 0)": run.recover.epochs > 0 and not run.recover.distil,
        '[recover] start = "pruned" (or epochs = 0)': run.recover.epochs > 0 and run.recover.start == SCRATCH,
        "[recover] launch = []": run.recover.epochs > 0 and bool(run.recover.launch),
        "[recover] label_smoothing = 0": run.recover.label_smoothing > 0,
        '[export] dtype = "float32" or "float16"': run.export.dtype not in ("float32", "float16"),
    }
    if found := [setting for setting, is_wrong in wrong.items() if is_wrong]:
        why = "a scope's outputs have no labels" if run.model.scope else "the data have no labels"
        raise UsageError(
            f"{why}, so the run cannot measure losses, and trains by the dense outputs alone; set {', '.join(found)}. "
            "Layers that read removed channels are refitted by least squares all the same"
        )
