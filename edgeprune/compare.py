"""Several recipes to the same measured latency, and whether pruning was worth it beside a smaller network.

A recipe is the run file with some of its keys changed, carried out as a run of its own. What two of them share
(tables, scores, plans) is made once: a run takes over from the folders beside it what was made from the same things.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, variance
from typing import Any

import msgspec

from edgeprune.core.budget import parse_limit
from edgeprune.core.errors import InputError, Unmet, UsageError
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import Accuracy, Comparison, Outcome, Report, most_accurate
from edgeprune.core.runfile import RunFile
from edgeprune.core.runfolder import RunFolder
from edgeprune.core.store import read_record, write_record
from edgeprune.executors import load_executor
from edgeprune.graphs.ports import get_ports
from edgeprune.load import load_data, load_model
from edgeprune.on_board import choose_runtime
from edgeprune.pipeline import run_pipeline
from edgeprune.report import write_comparison
from edgeprune.run_checks import SCALED
from edgeprune.training.options import SCRATCH

RUN = "run"
"""The recipe that is the run file as it stands."""
FOLDER = "compare"
"""Below the run's own: a folder for each other recipe."""
CHANGEABLE = ("prune", "search", "recover", "export")
"""Tables of the run file that a recipe may change."""
COPYCAT = "copycat"
WHOLE = {"steps": 1, "regularizer": None}
ONE_PLAN = {"trials": 0, "contenders": []}
BASELINES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "uniform": {"prune": {**WHOLE, "solver": "uniform"}, "search": ONE_PLAN},
    SCRATCH: {"prune": WHOLE, "recover": {"start": SCRATCH}},
    "reduced": {"prune": {**WHOLE, "solver": "uniform"}, "search": ONE_PLAN, "recover": {"start": SCRATCH}},
    COPYCAT: {"prune": {**WHOLE, "solver": SCALED}, "search": ONE_PLAN, "recover": {"start": SCRATCH}},
}
"""What pruning is held against.

uniform: the same share of every width. scratch: the run's own widths, trained from nothing (Liu et al., ICLR 2019,
arXiv:1810.05270). reduced: both, a smaller network as one would draw it up without pruning. copycat: at further
latencies, the run's own widths scaled, trained from nothing (Crowley et al., 2018, arXiv:1810.04622).
"""
RECOVERIES: Mapping[str, Mapping[str, Any]] = {
    "distil": {"start": "pruned", "distil": True},
    "fine_tune": {"start": "pruned", "distil": False},
    SCRATCH: {"start": SCRATCH},
}
CONFIDENCE = 1.96
"""Standard errors within which two accuracies are not told apart: 95 %."""
FASTER = 0.03
"""A latency that is lower by more than this share is said to be."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """One way to a latency. run: what to do, with a folder of its own. asked: the latency limit, as text.

    repeats: the recipe that this is once more, with another seed for what is trained after pruning.
    """

    name: str
    asked: str
    run: RunFile
    repeats: str | None = None


def compare_recipes(
    run: RunFile,
    base: Path,
    *,
    executor: str | None = None,
    targets: Sequence[str] = (),
    progress: Progress = silent,
) -> Comparison:
    """Carry out a run and its recipes, and say which is best.

    run: with what to compare in its `compare`. base: the folder that relative paths in it start from.
    executor: where recipes are carried out, several at a time. targets: boards of a kind that share them. Both are by
        default the run's own.
    returns: the comparison, also written as compare.json and compare.html into the run's folder. A recipe that cannot
        be carried out is in it with the reason.
    raises: EdgepruneError when the run itself cannot, or a board fails; UsageError for recipes that cannot be right,
        and for data without labels.
    """
    boards = tuple(targets) or (run.target.name,)
    for name in boards:
        choose_runtime(name, run.target.runtime, run.export.format)  # hours come before the second is used
    recipes = list_recipes(run)
    executor = executor or run.executor
    start = load_executor(executor)
    model = load_model(run.spec, base)
    data = load_data(run.data.source, base, get_ports(model).inputs)
    if not data.labelled or run.model.scope is not None or data.test is None:
        raise UsageError("a comparison is by accuracy: the data need labels and test batches, and the model no scope")
    examples = sum(len(labels) for _, labels in data.require("test"))
    bars = progress if executor.partition(":")[0] == "here" else silent  # those of other processes do not arrive
    done: dict[str, Outcome] = {}
    with start(_prepare, (str(base), bars)) as pool:
        for wave in order_recipes(recipes, boards):
            beside = [str(base / recipe.run.output.dir) for recipe in recipes if recipe.name in done]
            for place, outcome in pool.run([(recipe, beside) for recipe in wave]):
                done[wave[place].name] = outcome
                progress("compare: recipes done", len(done), len(recipes))
    folder = base / run.output.dir
    report = read_record(Report, folder / "report.json")
    outcomes = join_repeats(recipes, done)
    scratch = run.compare.scratch_epochs or run.recover.epochs
    comparison = Comparison(
        conditions=report.conditions,
        dense=report.dense,
        dense_accuracy=report.accuracy.dense or 0.0,
        test_examples=examples,
        epochs=run.recover.epochs,
        scratch_epochs=scratch,
        outcomes=outcomes,
        seeds=run.compare.seeds if run.recover.epochs else 1,
        verdict=tuple(judge(outcomes, asked, examples, scratch) for asked in dict.fromkeys(r.asked for r in recipes)),
    )
    write_record(folder / "compare.json", comparison)
    write_comparison(folder / "compare.html", comparison)
    return comparison


# --- recipes -------------------------------------------------------------------------------------


def list_recipes(run: RunFile) -> list[Recipe]:
    """The run itself and what its `compare` asks for beside it, each with a folder of its own; none twice.

    raises: UsageError for a recipe that is no run file, two folders of one name, latencies that cannot be read, and
        what can come to nothing.
    """
    settings, own = run.compare, run.budget.latency
    if settings.seeds < 1:
        raise UsageError(f"[compare] seeds = {settings.seeds}: every recipe is trained at least once")
    if COPYCAT in settings.baselines and not settings.latencies:
        raise UsageError("[compare] copycat scales the run's widths to further latencies; give some, or leave it out")
    changes: dict[str, Mapping[str, Any]] = {RUN: {}}
    for criterion, solver, recovery in itertools.product(
        settings.criteria or ("",), settings.solvers or ("",), settings.recoveries or ("",)
    ):
        prune = {key: value for key, value in (("criterion", criterion), ("solver", solver)) if value}
        if name := " ".join(filter(None, (criterion, solver, recovery))):
            # Of plans that came about in other ways the tournament would take the same for several criteria.
            changes[name] = {
                "prune": prune,
                **({"search": {"contenders": []}} if prune else {}),
                **({"recover": RECOVERIES[recovery]} if recovery else {}),
            }
    changes |= {name: BASELINES[name] for name in settings.baselines if run.recover.epochs or name == "uniform"}
    for name, keys in settings.recipes.items():
        if name in changes or name in BASELINES:
            raise UsageError(f"[compare] has two recipes called '{name}'")
        changes[name] = keys
    known: dict[bytes, Recipe] = {}
    for latency in dict.fromkeys((own, *settings.latencies)):
        for name, change in changes.items():
            if name == COPYCAT and latency == own:
                continue  # that is `scratch`
            recipe = _make_recipe(run, name, change, latency)
            if known.setdefault(_identify(recipe.run), recipe) is recipe and recipe.run.recover.epochs:
                again = [_repeat(recipe, number) for number in range(1, settings.seeds)]
                known |= {_identify(repeated.run): repeated for repeated in again}
    found = list(known.values())
    if len({recipe.run.output.dir for recipe in found}) < len(found):
        raise UsageError("two recipes would have the same folder; give them names that differ in letters or digits")
    return found


def _make_recipe(run: RunFile, name: str, changes: Mapping[str, Any], latency: str | None) -> Recipe:
    """raises: UsageError."""
    plain = msgspec.to_builtins(run)
    for table, keys in changes.items():
        if table not in CHANGEABLE or not isinstance(keys, Mapping):
            raise UsageError(f"[compare] recipe '{name}' changes '{table}'; it may change {', '.join(CHANGEABLE)}")
        plain[table] |= keys
    if name == SCRATCH:
        plain["prune"]["plan"] = f"{_folder(run, RUN, latency)}/plan.json"
    if name == COPYCAT:
        plain["prune"]["like"] = f"{run.output.dir}/plan.json"
    if plain["recover"]["start"] == SCRATCH and run.compare.scratch_epochs:
        plain["recover"]["epochs"] = run.compare.scratch_epochs
    if latency is not None:
        parse_limit(latency, "time")
        plain["budget"]["latency"] = latency
    plain |= {"compare": {}, "executor": "here"}  # what is done at once are recipes
    plain["output"]["dir"] = _folder(run, name, latency)
    shown = name if latency == run.budget.latency else f"{name} at {latency}"
    try:
        return Recipe(shown, latency or "", msgspec.convert(plain, RunFile))
    except msgspec.ValidationError as error:
        raise UsageError(f"[compare] recipe '{name}': {error}") from error


def _repeat(recipe: Recipe, number: int) -> Recipe:
    """The same with another seed for its training; all else is taken over from it."""
    run = msgspec.to_builtins(recipe.run)
    run["recover"]["seed"] = recipe.run.training_seed + number
    parent = f"{recipe.run.output.dir}/{FOLDER}/{RUN}" if recipe.name == RUN else recipe.run.output.dir
    run["output"]["dir"] = f"{parent}-seed-{number}"
    return Recipe(f"{recipe.name}, seed {number}", recipe.asked, msgspec.convert(run, RunFile), recipe.name)


def join_repeats(recipes: Sequence[Recipe], done: Mapping[str, Outcome]) -> tuple[Outcome, ...]:
    """An outcome for each recipe, with what its repeats came to."""
    outcomes = []
    for recipe in recipes:
        if recipe.repeats is not None:
            continue
        own = done[recipe.name]
        again = [done[other.name] for other in recipes if other.repeats == recipe.name]
        if again:
            found = [one.accuracy for one in (own, *again) if one.accuracy is not None]
            notes = [own.note, *(f"{one.recipe}: {one.note}" for one in again if one.note)]
            own = replace(
                own,
                accuracy=None if own.accuracy is None else fmean(found),
                accuracies=tuple(found),
                repeats=tuple(one.directory for one in again if one.latency_s is not None),
                note="; ".join(filter(None, notes)),
            )
        outcomes.append(own)
    return tuple(outcomes)


def _folder(run: RunFile, name: str, latency: str | None) -> str:
    """Of a recipe, relative to the run file."""
    shown = name if latency == run.budget.latency else f"{name} at {latency}"
    if shown == RUN:
        return run.output.dir
    return f"{run.output.dir}/{FOLDER}/{re.sub(r'[^A-Za-z0-9.]+', '-', shown).strip('-')}"


def _identify(run: RunFile) -> bytes:
    """What makes a run another one: all of it but its folder."""
    return msgspec.json.encode({**msgspec.to_builtins(run), "output": None})


def order_recipes(recipes: Sequence[Recipe], boards: Sequence[str]) -> list[list[Recipe]]:
    """Recipes that can be carried out at once, each with its board: first the run, last those that need another's plan.

    In between first one of each way to plan, then those that only train otherwise, so that whatever two share is there
    before the second begins; these have the same board.
    """
    waves: list[list[Recipe]] = [[], [], [], []]
    places: dict[bytes, str] = {}
    board_of: dict[str, str] = {}
    for recipe in recipes:
        prune = recipe.run.prune
        planning = msgspec.json.encode({**msgspec.to_builtins(recipe.run), "output": None, "recover": None})
        if (other := prune.plan or prune.like) is not None:
            wave, board = 3, board_of.get(str(Path(other).parent), boards[0])
        else:
            wave = 0 if recipe.name == RUN else 2 if planning in places else 1
            board = places.setdefault(planning, boards[len(places) % len(boards)])
        board_of[str(Path(recipe.run.output.dir))] = board
        target = msgspec.structs.replace(recipe.run.target, name=board)
        waves[wave].append(replace(recipe, run=msgspec.structs.replace(recipe.run, target=target)))
    return [wave for wave in waves if wave]


def _prepare(shared: tuple[str, Progress]) -> Callable[[tuple[Recipe, list[str]]], Outcome]:
    """What an executor's worker does with a recipe and the folders that are done."""
    base, progress = Path(shared[0]), shared[1]

    def carry_out(item: tuple[Recipe, list[str]]) -> Outcome:
        recipe, beside = item
        own = Path(recipe.run.output.dir)
        try:
            report = run_pipeline(recipe.run, base, progress, beside=[Path(each) for each in beside])
        except (InputError, Unmet, UsageError) as error:
            if recipe.name == RUN:  # nothing to compare with
                raise
            return Outcome(
                recipe=recipe.name,
                asked=recipe.asked,
                directory=str(own),
                target=recipe.run.target.name,
                note=str(error),
            )
        return _describe(recipe, report, RunFolder(base / own).seconds)

    return carry_out


def _describe(recipe: Recipe, report: Report, seconds: float) -> Outcome:
    failed = [f"{check.name}: {check.note}" for check in report.checks if not check.passed]
    return Outcome(
        recipe=recipe.name,
        asked=recipe.asked,
        directory=recipe.run.output.dir,
        target=report.target,
        latency_s=report.compact.latency_s,
        latency_share=share_of_dense(report),
        before_recovery=report.accuracy.before_recovery,
        accuracy=_final(report.accuracy),
        artifact_bytes=report.compact.artifact_bytes,
        parameters=report.compact.parameters,
        seconds=seconds,
        met=report.passed,
        note="; ".join(failed),
    )


def share_of_dense(report: Report) -> float | None:
    """Of the dense model's latency, as it was held against a relative limit: by neighbouring turns; else of medians."""
    asked, dense, compact = report.budget.latency_share, report.dense.latency_s, report.compact.latency_s
    for check in report.checks:
        if asked is not None and check.name.startswith("latency") and check.measured is not None and check.limit:
            return asked * check.measured / check.limit
    return None if dense is None or compact is None else compact.median / dense.median


def _final(accuracy: Accuracy) -> float | None:
    """Of what was exported."""
    for known in (accuracy.quantised, accuracy.after_recovery, accuracy.before_recovery):
        if known is not None:
            return known
    return None


# --- the verdict ---------------------------------------------------------------------------------


def judge(outcomes: Sequence[Outcome], asked: str, examples: int, epochs: int) -> str:
    """Whether pruning beat the smaller network at one latency, and what was best there, in a few sentences.

    examples: that accuracies are of. epochs: that the smaller network was trained for.
    Two accuracies differ where they are further apart than `margin` says.
    """
    here = [outcome for outcome in outcomes if outcome.asked == asked]
    scatter = seed_variance(here)
    by_name = {outcome.way: outcome for outcome in here}
    at = f"At {asked}" if asked else "Within the budget"
    pruned, reduced = by_name.get(RUN), by_name.get("reduced")
    said = [f"{at}: {_against(pruned, reduced, examples, epochs, scatter)}"]
    best = most_accurate(here, asked)
    if best is None:
        return f"{said[0]} No recipe met its limits."
    level = {
        name: other
        for name, other in by_name.items()
        if other is not best
        and other.met
        and other.accuracy is not None
        and (best.accuracy or 0.0) - other.accuracy <= margin(best, other, examples, scatter)
    }
    said.append(f"The most accurate was '{best.way}' with {best.accuracy:.1%}")
    said[-1] += f"; {examples} test images do not tell it from {_listed(list(level))}." if level else "."
    if best.latency_share and (shares := {name: one.latency_share for name, one in level.items() if one.latency_share}):
        fastest = min(shares, key=lambda name: shares[name])
        if (ratio := shares[fastest] / best.latency_share) < 1 - FASTER:
            said.append(f"Of these '{fastest}' is {1 - ratio:.0%} faster.")
    return " ".join(said)


def _against(pruned: Outcome | None, reduced: Outcome | None, examples: int, epochs: int, scatter: float) -> str:
    for name, outcome in (("pruned", pruned), ("reduced", reduced)):
        if outcome is None:
            return f"there is no {name} network to compare."
        if outcome.accuracy is None or outcome.latency_share is None:
            return f"the {name} network has no accuracy to compare{f' ({outcome.note})' if outcome.note else ''}."
        if not outcome.met:
            return f"the {name} network does not meet its limits ({outcome.note}), so that the two cannot be compared."
    assert pruned is not None and reduced is not None
    a, b = pruned.accuracy or 0.0, reduced.accuracy or 0.0
    least = margin(pruned, reduced, examples, scatter)
    at = f"at {pruned.latency_share:.2f} and {reduced.latency_share:.2f} of the dense latency"
    nothing = f"the reduced network, trained from nothing for {epochs} epochs"
    if a - b > least:
        result = f"pruning beat {nothing}: {a:.1%} against {b:.1%}, {at}."
    elif b - a > least:
        result = f"pruning did not beat {nothing}: {a:.1%} against {b:.1%}, {at}. A smaller network pays more here."
    else:
        result = (
            f"no difference was found between pruning and {nothing}: {a:.1%} and {b:.1%}, {at}; with {examples} test "
            f"images one of more than {least:.1%} would have shown."
        )
    ratio = (reduced.latency_share or 0.0) / (pruned.latency_share or 1.0)
    if ratio < 1 - FASTER:
        result += f" The reduced network is {1 - ratio:.0%} faster besides: no width closer to the limit meets it."
    return result


def margin(one: Outcome, other: Outcome, examples: int, scatter: float = 0.0) -> float:
    """The least difference of two accuracies that is told from none: 1.96 standard errors.

    The variance of an accuracy a is a (1 - a) / n for the n examples, as if those of the other were different ones,
    which on the same asks for more than it has to; and that of the seeds over the number of trainings.
    scatter: as `seed_variance` gives it.
    """

    def variance_of(outcome: Outcome) -> float:
        a = outcome.accuracy or 0.0
        return a * (1 - a) / max(examples, 1) + scatter / max(len(outcome.accuracies), 1)

    return CONFIDENCE * math.sqrt(variance_of(one) + variance_of(other))


def seed_variance(outcomes: Sequence[Outcome]) -> float:
    """Of an accuracy over seeds, taken to be one for all recipes, since each has few; 0 with one training of each."""
    several = [one.accuracies for one in outcomes if len(one.accuracies) > 1]
    freedom = sum(len(found) - 1 for found in several)
    return sum((len(found) - 1) * variance(found) for found in several) / freedom if freedom else 0.0


def _listed(names: Sequence[str]) -> str:
    quoted = [f"'{name}'" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"
