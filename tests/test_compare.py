"""compare: recipes are runs of their own that share what they can, and the verdict says what the figures say."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec
import pytest
from command import edgeprune
from evidence import make_evidence
from test_pipeline import NETS, QUICK

from edgeprune.compare import (
    CONFIDENCE,
    join_repeats,
    judge,
    list_recipes,
    margin,
    order_recipes,
    seed_variance,
    share_of_dense,
)
from edgeprune.core.effort import EFFORTS
from edgeprune.core.errors import UsageError
from edgeprune.core.records import Comparison, Outcome, Plan, Quantity, Report
from edgeprune.core.runfile import RunFile, read_run_file
from edgeprune.core.store import read_record, to_builtins
from edgeprune.tables.stored import read_measured


def run_file(folder: Path, compare: str, text: str = QUICK) -> RunFile:
    path = folder / "edgeprune.toml"
    path.write_text(f"{text}\n[compare]\n{compare}\n")
    return read_run_file(path)


def recipes_of(folder: Path, compare: str, text: str = QUICK) -> dict[str, RunFile]:
    return {recipe.name: recipe.run for recipe in list_recipes(run_file(folder, compare, text))}


def changed(run: RunFile, other: RunFile) -> dict[str, dict[str, Any]]:
    """What is other in a run than in another, but for its folder."""
    before, after = msgspec.to_builtins(run), msgspec.to_builtins(other)
    return {
        table: {key: value for key, value in after[table].items() if value != before[table][key]}
        for table in ("model", "data", "target", "budget", "prune", "search", "recover", "export")
        if after[table] != before[table]
    }


# --- recipes -------------------------------------------------------------------------------------


def test_what_a_run_file_without_compare_is_held_against(tmp_path: Path) -> None:
    recipes = recipes_of(tmp_path, "")
    run = recipes["run"]
    assert list(recipes) == ["run", "uniform", "scratch", "reduced"]
    assert changed(run, recipes["uniform"]) == {"prune": {"solver": "uniform"}}
    assert changed(run, recipes["scratch"]) == {"prune": {"plan": "run/plan.json"}, "recover": {"start": "scratch"}}
    assert changed(run, recipes["reduced"]) == {"prune": {"solver": "uniform"}, "recover": {"start": "scratch"}}
    depth = recipes_of(tmp_path, "", QUICK.replace("levels = 6", "levels = 6\ndepth = true"))
    assert all(recipe.prune.depth for recipe in depth.values()), "or the losses of branches would be measured twice"
    folders = [recipe.output.dir for recipe in recipes.values()]
    assert folders == ["run", "run/compare/uniform", "run/compare/scratch", "run/compare/reduced"]


def test_every_combination_of_what_is_listed(tmp_path: Path) -> None:
    recipes = recipes_of(
        tmp_path,
        'criteria = ["magnitude:p=1", "fpgm"]\nsolvers = ["greedy"]\nrecoveries = ["fine_tune", "scratch"]\n'
        "baselines = []\nscratch_epochs = 9",
        QUICK.replace("contenders = []", 'contenders = ["curves", "lamp"]'),
    )
    assert list(recipes) == [
        "run",
        *(f"{criterion} greedy {recovery}" for criterion in ("magnitude:p=1", "fpgm")
          for recovery in ("fine_tune", "scratch")),
    ]  # fmt: skip
    assert changed(recipes["run"], recipes["magnitude:p=1 greedy scratch"]) == {
        "prune": {"criterion": "magnitude:p=1", "solver": "greedy"},
        "search": {"contenders": ()},
        "recover": {"start": "scratch", "epochs": 9},
    }
    assert recipes["magnitude:p=1 greedy scratch"].output.dir == "run/compare/magnitude-p-1-greedy-scratch"


def test_further_latencies_and_recipes_of_ones_own(tmp_path: Path) -> None:
    recipes = recipes_of(
        tmp_path,
        'latencies = ["0.5x", "0.7x"]\nbaselines = ["copycat", "scratch"]\n'
        '[compare.recipes.zeros]\nprune = { pattern = "n_m:n=2,m=4" }\nrecover = { epochs = 3 }',
    )
    assert list(recipes) == [
        *("run", "scratch", "zeros"),
        *("run at 0.5x", "copycat at 0.5x", "scratch at 0.5x", "zeros at 0.5x"),
    ]
    further = recipes["run at 0.5x"]
    assert changed(recipes["run"], further) == {"budget": {"latency": "0.5x"}}
    assert recipes["scratch at 0.5x"].prune.plan == f"{further.output.dir}/plan.json"
    assert changed(further, recipes["copycat at 0.5x"]) == {
        "prune": {"solver": "scaled", "like": "run/plan.json"},
        "recover": {"start": "scratch"},
    }
    assert changed(recipes["run"], recipes["zeros"]) == {
        "prune": {"pattern": "n_m:n=2,m=4"},
        "recover": {"epochs": 3},
    }


def test_the_same_recipe_is_carried_out_once_and_untrained_nets_not_at_all(tmp_path: Path) -> None:
    again = 'solvers = ["milp", "greedy"]\nrecoveries = ["distil"]\nbaselines = []'
    assert list(recipes_of(tmp_path, again)) == ["run", "greedy distil"]
    untrained = recipes_of(tmp_path, "", QUICK.replace("epochs = 2", "epochs = 0"))
    assert list(untrained) == ["run", "uniform"]


def test_every_recipe_is_repeated_with_other_seeds(tmp_path: Path) -> None:
    recipes = recipes_of(tmp_path, 'seeds = 3\nbaselines = ["uniform", "scratch"]\nlatencies = ["0.5x"]')
    assert list(recipes)[:4] == ["run", "run, seed 1", "run, seed 2", "uniform"]
    run = recipes["run"]
    assert changed(run, recipes["run, seed 2"]) == {"recover": {"seed": 2}}
    assert (run.training_seed, recipes["run, seed 2"].training_seed) == (0, 2)
    assert recipes["run, seed 2"].output.dir == "run/compare/run-seed-2"
    assert recipes["scratch at 0.5x, seed 1"].output.dir == "run/compare/scratch-at-0.5x-seed-1"
    assert recipes["scratch at 0.5x, seed 1"].prune.plan == "run/compare/run-at-0.5x/plan.json"
    assert len({recipe.output.dir for recipe in recipes.values()}) == len(recipes) == 2 * 3 * 3
    waves = order_recipes(list_recipes(run_file(tmp_path, 'seeds = 2\nbaselines = ["scratch"]')), ["a", "b"])
    assert [[recipe.name for recipe in wave] for wave in waves] == [
        ["run"], ["run, seed 1"], ["scratch", "scratch, seed 1"],
    ]  # fmt: skip
    untrained = recipes_of(tmp_path, "seeds = 3", QUICK.replace("epochs = 2", "epochs = 0"))
    assert list(untrained) == ["run", "uniform"]


def test_repeats_are_one_outcome(tmp_path: Path) -> None:
    recipes = list_recipes(run_file(tmp_path, 'seeds = 3\nbaselines = ["uniform"]'))
    accuracies = {"run": 0.9, "run, seed 1": 0.8, "run, seed 2": None, "uniform": None, "uniform, seed 1": 0.7}
    done = {recipe.name: outcome(recipe.name, accuracies.get(recipe.name, 0.6)) for recipe in recipes}
    done["run, seed 2"] = replace(done["run, seed 2"], latency_s=None, met=False, note="the loss was not finite")
    run, uniform = join_repeats(recipes, done)
    assert (run.recipe, run.accuracies, run.accuracy, run.met) == ("run", (0.9, 0.8), pytest.approx(0.85), True)
    assert run.repeats == ("run, seed 1",) and run.note == "run, seed 2: the loss was not finite"
    assert uniform.accuracy is None and uniform.repeats == ("uniform, seed 1", "uniform, seed 2")


@pytest.mark.parametrize(
    ("compare", "said"),
    [
        ("seeds = 0", "trained at least once"),
        ('baselines = ["copycat"]', "further latencies"),
        ('[compare.recipes.a]\nbudget = { latency = "1 ms" }', "recipe 'a' changes 'budget'"),
        ("[compare.recipes.a]\nprune = { criteria = 1 }", "recipe 'a'.*criteria"),
        ("[compare.recipes.run]\nprune = { levels = 3 }", "two recipes called 'run'"),
        ("[compare.recipes.reduced]\nprune = { levels = 3 }", "two recipes called 'reduced'"),
        (
            '[compare.recipes."a b"]\nprune = { levels = 3 }\n[compare.recipes.a-b]\nprune = { levels = 4 }',
            "the same folder",
        ),
        ('latencies = ["0.5"]', "no time budget"),
    ],
)
def test_recipes_that_cannot_be_right(tmp_path: Path, compare: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        list_recipes(run_file(tmp_path, compare))


def test_what_recipes_share_is_there_before_the_second_begins(tmp_path: Path) -> None:
    run = run_file(
        tmp_path,
        'criteria = ["lamp", "fpgm"]\nrecoveries = ["distil", "fine_tune"]\nbaselines = ["uniform", "scratch"]',
    )
    waves = order_recipes(list_recipes(run), ["a", "b"])
    placed = [{recipe.name: recipe.run.target.name for recipe in wave} for wave in waves]
    assert placed == [
        {"run": "a"},
        {"lamp distil": "b", "fpgm distil": "a", "uniform": "b"},
        {"lamp fine_tune": "b", "fpgm fine_tune": "a"},
        {"scratch": "a"},
    ]
    elsewhere = msgspec.structs.replace(run, output=msgspec.structs.replace(run.output, dir="./run"))
    further = run_file(tmp_path, 'baselines = ["scratch"]\nlatencies = ["0.5x"]').compare
    waves = order_recipes(list_recipes(msgspec.structs.replace(elsewhere, compare=further)), ["a", "b"])
    assert {recipe.name: recipe.run.target.name for recipe in waves[-1]} == {"scratch": "a", "scratch at 0.5x": "b"}


# --- the verdict ---------------------------------------------------------------------------------


def outcome(recipe: str, accuracy: float | None, share: float = 0.5, **more: Any) -> Outcome:
    latency = Quantity(median=share / 1000, low=share / 1000, high=share / 1000)
    known = {"latency_s": latency, "latency_share": share, "met": True, "asked": "0.5x", **more}
    return Outcome(recipe=recipe, directory=recipe, target="board", accuracy=accuracy, **known)


def test_the_least_difference_is_that_of_two_samples() -> None:
    half = outcome("run", 0.5)
    assert margin(half, half, 5000) == pytest.approx(CONFIDENCE * (2 * 0.25 / 5000) ** 0.5)
    assert margin(outcome("run", 0.9), outcome("lamp", None), 100) == pytest.approx(CONFIDENCE * (0.09 / 100) ** 0.5)


def test_what_seeds_change_is_part_of_the_difference() -> None:
    run, lamp = outcome("run", 0.90, accuracies=(0.88, 0.92)), outcome("lamp", 0.80, accuracies=(0.79, 0.81))
    scatter = seed_variance([run, lamp, outcome("once", 0.5, accuracies=(0.5,))])
    assert scatter == pytest.approx((2 * 0.02**2 + 2 * 0.01**2) / 2)
    images = (0.09 + 0.16) / 5000
    assert margin(run, lamp, 5000, scatter) == pytest.approx(CONFIDENCE * (images + scatter) ** 0.5)
    assert seed_variance([outcome("run", 0.9), outcome("lamp", 0.8)]) == 0
    # A reduced network that is as far behind as seeds of one recipe are apart is not told from it.
    behind = outcome("reduced", 0.87, accuracies=(0.85, 0.89))
    assert "no difference was found" in judge([run, behind], "0.5x", 50_000, 5)
    once = [replace(one, accuracies=()) for one in (run, behind)]
    assert "pruning beat" in judge(once, "0.5x", 50_000, 5)


@pytest.mark.parametrize(
    ("pruned", "reduced", "said"),
    [
        (0.90, 0.80, "pruning beat the reduced network, trained from nothing for 7 epochs: 90.0% against 80.0%"),
        (0.80, 0.90, "pruning did not beat the reduced network"),
        (0.80, 0.81, "no difference was found between pruning and the reduced network"),
        (0.80, None, "the reduced network has no accuracy to compare"),
    ],
)
def test_the_verdict_follows_from_the_accuracies(pruned: float, reduced: float | None, said: str) -> None:
    assert said in judge([outcome("run", pruned), outcome("reduced", reduced)], "0.5x", 1000, 7)


def test_the_verdict_names_the_best_and_those_that_are_level_with_it() -> None:
    others = [outcome("uniform", 0.905), outcome("lamp", 0.70), outcome("missed", 0.99, met=False, note="too slow")]
    said = judge([outcome("run", 0.90), outcome("reduced", 0.85), *others], "0.5x", 1000, 5)
    assert "The most accurate was 'uniform' with 90.5%" in said
    assert "do not tell it from 'run'." in said
    assert "lamp" not in said and "missed" not in said


def test_the_verdict_names_what_is_as_accurate_and_faster() -> None:
    rest = [outcome("uniform", 0.895, 0.40), outcome("lamp", 0.896, 0.45), outcome("poor", 0.5, 0.1)]
    assert judge([outcome("run", 0.90, 0.5), *rest], "0.5x", 1000, 5).endswith("Of these 'uniform' is 20% faster.")
    assert "faster" not in judge([outcome("run", 0.90, 0.5), outcome("lamp", 0.896, 0.49)], "0.5x", 1000, 5)


def test_the_verdict_tells_latencies_that_are_not_the_same() -> None:
    slower = judge([outcome("run", 0.9, 0.5), outcome("reduced", 0.8, 0.4)], "0.5x", 1000, 5)
    assert "The reduced network is 20% faster besides" in slower
    assert "faster" not in judge([outcome("run", 0.9, 0.5), outcome("reduced", 0.8, 0.49)], "0.5x", 1000, 5)
    late = outcome("run", 0.9, met=False, note="latency: 3 % over")
    assert "does not meet its limits (latency: 3 % over)" in judge([late, outcome("reduced", 0.8)], "0.5x", 1000, 5)
    assert judge([late], "0.5x", 1000, 5).endswith("No recipe met its limits.")
    assert "there is no reduced network" in judge([outcome("run", 0.9)], "0.5x", 1000, 5)


def test_the_verdict_is_of_one_latency() -> None:
    both = [outcome("run", 0.9), outcome("reduced", 0.8), outcome("run at 0.3x", 0.6, 0.3, asked="0.3x"),
            outcome("reduced at 0.3x", 0.7, 0.3, asked="0.3x")]  # fmt: skip
    assert judge(both, "0.5x", 1000, 5).startswith("At 0.5x: pruning beat")
    assert judge(both, "0.3x", 1000, 5).startswith("At 0.3x: pruning did not beat")
    assert "The most accurate was 'reduced' with 70.0%" in judge(both, "0.3x", 1000, 5)


def test_a_latency_is_told_as_it_was_held_against_its_limit() -> None:
    report = make_evidence().report
    dense, compact = report.dense.latency_s, report.compact.latency_s
    check = next(check for check in report.checks if check.name == "latency (median)")
    assert dense is not None and compact is not None and check.measured is not None and check.limit is not None
    absolute = replace(report, budget=replace(report.budget, latency_share=None))
    assert share_of_dense(absolute) == pytest.approx(compact.median / dense.median)
    relative = replace(report, budget=replace(report.budget, latency_share=0.4))
    assert share_of_dense(relative) == pytest.approx(0.4 * check.measured / check.limit)
    assert share_of_dense(relative) != pytest.approx(compact.median / dense.median)
    assert share_of_dense(replace(relative, checks=())) == pytest.approx(compact.median / dense.median)


# --- the whole -----------------------------------------------------------------------------------


TURNED = '[compare.recipes.turned]\nprune = { transform = "kfe" }'


@pytest.mark.slow
@pytest.mark.device
@pytest.mark.timeout(900)
def test_recipes_on_a_board_share_what_they_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EFFORTS, "quick", replace(EFFORTS["quick"], repeats=2, seconds=0.1, precision=None))
    (tmp_path / "nets.py").write_text(NETS)
    brief = QUICK.replace("epochs = 2", "epochs = 1").replace("levels = 6", "levels = 6\ncurves = false")
    run_file(tmp_path, f'baselines = ["reduced"]\n{TURNED}', brief)
    done = edgeprune("compare", "--json", cwd=tmp_path)
    comparison = read_record(Comparison, tmp_path / "run" / "compare.json")
    assert json.loads(done.stdout) == json.loads(json.dumps(to_builtins(comparison)))
    assert [one.recipe for one in comparison.outcomes] == ["run", "reduced", "turned"]
    # A transform takes no relative latency: that recipe cannot be carried out, the others are none the worse.
    *others, turned = comparison.outcomes
    assert "transform" in turned.note and turned.latency_s is None
    assert done.returncode == 1 and "turned" in done.stderr
    assert comparison.test_examples == 32
    for one in others:
        report = read_record(Report, tmp_path / one.directory / "report.json")
        assert one.accuracy == report.accuracy.after_recovery is not None
        assert one.latency_s == report.compact.latency_s
        assert one.met == report.passed
        assert one.seconds > 0
    logs = {one.recipe: (tmp_path / one.directory / "run.log").read_text() for one in others}
    assert "importance: taken from" in logs["reduced"] and "profile-float32.jsonl: begun with" in logs["reduced"]
    shared = read_measured(tmp_path / "run" / "profile-float32.jsonl")[1]
    theirs = read_measured(tmp_path / "run/compare/reduced/profile-float32.jsonl")[1]
    assert theirs[: len(shared)] == shared, "widths were measured again"
    assert 'href="compare/reduced/report.html"' in (tmp_path / "run" / "compare.html").read_text()

    # What is added is carried out elsewhere; what is done stays. Both have the run's plan.
    ray = "ray:workers=2" if find_spec("ray") is not None else "processes:workers=2"
    run_file(tmp_path, "baselines = []\nseeds = 2", brief)
    edgeprune("compare", "--executor", "processes:workers=2", cwd=tmp_path)
    repeated = read_record(Comparison, tmp_path / "run" / "compare.json")
    (run,) = repeated.outcomes
    assert repeated.seeds == 2 and run.repeats == ("run/compare/run-seed-1",)
    again = read_record(Report, tmp_path / run.repeats[0] / "report.json").accuracy.after_recovery
    assert run.accuracies == (others[0].accuracy, again) and run.accuracy == pytest.approx(fmean(run.accuracies))
    run_file(tmp_path, 'baselines = ["scratch", "reduced"]', brief)
    done = edgeprune("compare", "--executor", ray, cwd=tmp_path)
    grown = {one.recipe: one for one in read_record(Comparison, tmp_path / "run" / "compare.json").outcomes}
    assert list(grown) == ["run", "scratch", "reduced"]
    assert [grown["run"], grown["reduced"]] == others
    assert grown["scratch"].accuracy is not None and "reduced network" in done.stdout
    for added in (run.repeats[0], grown["scratch"].directory):
        log = (tmp_path / added / "run.log").read_text()
        assert "plan-float32" not in log and "recovered: started" in log
        assert plan_of(tmp_path, added) == plan_of(tmp_path, "run")
    for one in others:
        assert "started" not in (tmp_path / one.directory / "run.log").read_text().removeprefix(logs[one.recipe])


def plan_of(folder: Path, directory: str) -> Any:
    return to_builtins(read_record(Plan, folder / directory / "plan.json"))


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--targets", "embedded,nosuch", "nosuch"), ("--executor", "nosuch", "unknown executors 'nosuch'")],
)
def test_boards_and_executors_are_known_before_anything_starts(
    tmp_path: Path, option: str, value: str, said: str
) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    run_file(tmp_path, "")
    done = edgeprune("compare", option, value, cwd=tmp_path)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "run").exists()


def test_a_comparison_without_labels_is_refused(tmp_path: Path) -> None:
    unlabelled = NETS + "\n\ndef source():\n    made = Source()\n    made.test = None\n    return made\n"
    (tmp_path / "nets.py").write_text(unlabelled)
    run_file(tmp_path, "")
    done = edgeprune("compare", cwd=tmp_path)
    assert done.returncode == 2
    assert "need labels and test batches" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_plan_and_what_scales_one_are_checked_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    for keys, said in (
        ('solver = "scaled"', "go together"),
        ('like = "other.json"', "go together"),
        ('like = "other.json"\nsolver = "scaled"\nplan = "plan.json"', "either plan or like"),
    ):
        (tmp_path / "edgeprune.toml").write_text(QUICK.replace("levels = 6", f"levels = 6\n{keys}"))
        done = edgeprune("run", cwd=tmp_path)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
