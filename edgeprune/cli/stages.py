"""From the model to the compact one: `trace`, `profile`, `score`, `plan`, `compact`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import edgeprune
from edgeprune.cli.common import (
    AsJson,
    Dtype,
    EffortName,
    Executor,
    Freeze,
    Inexact,
    Limit,
    MeterName,
    MinWidth,
    Model,
    Only,
    Out,
    RuntimeName,
    Scope,
    Shapes,
    Source,
    Step,
    Threads,
    Tie,
    Weights,
    bars,
    load_calibration,
    load_graph,
    rule_widths,
    show,
)
from edgeprune.core.effort import Effort, find_effort
from edgeprune.core.errors import Unmet, UsageError
from edgeprune.core.family import load_member
from edgeprune.executors import load_executor

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgeprune.core.progress import Progress
    from edgeprune.core.records import Precision
    from edgeprune.device.session import Session


def trace(
    model: Model, weights: Weights = None, shapes: Shapes = None, allow_inexact: Inexact = False, scope: Scope = None,
    freeze: Freeze = None, only: Only = None, tie: Tie = None, step: Step = 1, min_width: MinWidth = 1,
    out: Annotated[Path | None, typer.Option("--out", "-o")] = None,
    html: Annotated[Path | None, typer.Option(help="also draw it: a page that needs no network")] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """What can be pruned, what is frozen and why."""
    *_, graph = load_graph(model, weights, shapes, allow_inexact, scope)
    graph = rule_widths(graph, freeze, only, tie, step, min_width)
    if out:
        edgeprune.write_record(out, graph)
    if html:
        edgeprune.write_drawing(html, graph, model if scope is None else f"{model} {scope}")
    show(graph, as_json, "describe_graph")


def profile(
    model: Model,
    target: Annotated[str, typer.Option("--target", "--targets", help="a board of the inventory, or a,b,c of a kind")],
    out: Out, weights: Weights = None, shapes: Shapes = None,
    allow_inexact: Inexact = False, scope: Scope = None, threads: Threads = 1, meter: MeterName = None,
    configurations: Annotated[int, typer.Option(help="most widths to fit the tables to")] = 40,
    held_out: Annotated[int, typer.Option(help="more widths, which only tell the tables' error")] = 8,
    error: Annotated[float, typer.Option(help="stop once left-out widths are predicted this closely; 0: never")] = 0.01,
    around: Annotated[str | None, typer.Option(help="latency of the plans to come: there the tables matter")] = None,
    known: Annotated[
        list[Path] | None, typer.Option("--from", help="profiles of the same kernels elsewhere, or folders of them")
    ] = None,
    black_box: Annotated[bool, typer.Option("--black-box", help="time whole models only, no kernels")] = False,
    runtime: RuntimeName = None, dtype: Dtype = "float32",
    effort: EffortName = "default", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Measure the latency tables of a model on a board, or on several at once; goes on where it was stopped."""
    paths = [file for path in known or () for file in (sorted(path.glob("**/*.jsonl")) if path.is_dir() else [path])]
    level, names = find_effort(effort), target.split(",")
    if len(names) > 1 and (paths or black_box):
        raise UsageError("--from and --black-box are for one board, not for a fleet")
    with bars() as progress, ExitStack() as stack:
        boards = [
            stack.enter_context(
                edgeprune.connect(each, threads=threads, runtime=runtime, meter=meter, progress=progress)
            )
            for each in names
        ]
        module, inputs, graph = load_graph(model, weights, shapes, allow_inexact, scope)
        precision = choose_precision(module, inputs, boards[0], dtype, out, level, progress)
        if len(boards) > 1:
            fleet = edgeprune.profile_fleet(
                module, inputs, graph, boards, path=out, configurations=configurations, held_out=held_out,
                error=error or None, around=around, effort=level, precision=precision, progress=progress,
            )  # fmt: skip
            tables = fleet.profile
        else:
            tables = edgeprune.profile_target(
                module, inputs, graph, boards[0], path=out, configurations=configurations, held_out=held_out,
                error=error or None, around=around, known=[edgeprune.read_profile(path) for path in paths],
                black_box=black_box, effort=level, precision=precision, progress=progress,
            )  # fmt: skip
    if len(boards) > 1 and not as_json:
        print(fleet)
    show(tables, as_json, "describe_profile")


def choose_precision(
    module: nn.Module, inputs: tuple[Tensor, ...], session: Session, dtype: str, path: Path, effort: Effort,
    progress: Progress,
) -> Precision:  # fmt: skip
    """Of a dtype the precision that is fastest on the board, or the one that a profile was begun with."""
    from edgeprune.core.records import FLOAT32
    from edgeprune.tables.stored import read_measurements

    heading, _ = read_measurements(path)
    if heading is not None and heading.precision.dtype == dtype:
        return heading.precision
    if dtype == FLOAT32.dtype:
        return FLOAT32
    trials = edgeprune.try_precisions(module, inputs, session, dtype, effort=effort, progress=progress)
    return trials[0].precision


def score(
    model: Model, data: Source, out: Out, weights: Weights = None, shapes: Shapes = None,
    allow_inexact: Inexact = False, scope: Scope = None,
    criterion: Annotated[str, typer.Option(help="a name, or name:option=value,...")] = "surgeon",
    curves: Annotated[bool, typer.Option(help="measure the loss of each group at a few widths")] = True,
    depth: Annotated[bool, typer.Option(help="and without each residual branch, so that a plan may drop it")] = False,
    executor: Executor = "here",
) -> None:  # fmt: skip
    """How much each unit matters."""
    name, _, options = criterion.partition(":")
    load_member("criteria", name)
    load_executor(executor)
    module, inputs, graph = load_graph(model, weights, shapes, allow_inexact, scope)
    calibration = load_calibration(data, module, model, weights, shapes, scope)
    with bars() as progress:
        importance = edgeprune.score_groups(
            module, inputs, graph, calibration, criterion=name, options=options, curves=curves, depth=depth,
            executor=executor, progress=progress,
        )  # fmt: skip
    edgeprune.write_record(out, importance)
    others = f" ({len(importance.by_magnitude)} of them by magnitude)" if importance.by_magnitude else ""
    print(f"{len(importance.scores)} groups scored by {criterion}{others}: {out}")


def plan(
    model: Model, profile: Annotated[Path, typer.Option(help="from `edgeprune profile`")],
    importance: Annotated[Path, typer.Option(help="from `edgeprune score`")], out: Out, weights: Weights = None,
    shapes: Shapes = None, allow_inexact: Inexact = False, scope: Scope = None,
    latency: Annotated[str | None, typer.Option(help="12ms, or 0.5x of the dense model; 0.8x,0.5x: two plans")] = None,
    memory: Limit = None, size: Limit = None, energy: Limit = None,
    power_model: Annotated[str | None, typer.Option(help='"idle=2.1W,active=4.8W", where no meter can tell')] = None,
    target: Annotated[str | None, typer.Option(help="close the loop: measure the plan on this board")] = None,
    threads: Threads = 1, runtime: RuntimeName = None, meter: MeterName = None, effort: EffortName = "default",
    solver: str = "milp", levels: int = 16, freeze: Freeze = None, only: Only = None, tie: Tie = None, step: Step = 1,
    min_width: MinWidth = 1,
    data: Annotated[str | None, typer.Option(help="search: judge whole nets on its calibration batches")] = None,
    trials: Annotated[int, typer.Option(min=1, help="nets that a search judges")] = 16, executor: Executor = "here",
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Choose the widths that lose least within the budgets."""
    from edgeprune.core.budget import make_budget
    from edgeprune.core.records import Importance, Plan

    load_executor(executor)
    module, inputs, graph = load_graph(model, weights, shapes, allow_inexact, scope)
    graph = rule_widths(graph, freeze, only, tie, step, min_width)
    tables, scores = edgeprune.read_profile(profile, graph), edgeprune.read_record(Importance, importance)
    dense = edgeprune.dense_cost(graph, tables)
    limits = [limit.replace(" ", "") for limit in latency.split(",")] if latency else [None]
    if "" in limits:
        raise UsageError(f"--latency {latency} names an empty limit; give them as 0.8x,0.5x")
    asked = [
        make_budget(dense, latency=limit, memory=memory, size=size, energy=energy, power_model=power_model)
        for limit in limits
    ]
    names = [out] if len(limits) == 1 else [out.with_name(f"{out.stem}-{limit}{out.suffix}") for limit in limits]
    budgets = dict(zip(names, asked, strict=True))
    calibration = load_calibration(data, module, model, weights, shapes, scope) if data is not None else None
    checkpoint = out.with_name(f"{out.stem}.search.jsonl")
    plans: dict[str, Plan] = {}
    missed: list[str] = []
    with ExitStack() as stack:
        progress = stack.enter_context(bars())
        session = None
        if target is not None:
            runtime = runtime or tables.conditions.runtime
            session = stack.enter_context(
                edgeprune.connect(target, threads=threads, runtime=runtime, meter=meter, progress=progress)
            )
        for file, budget in budgets.items():
            if session is not None and plans:
                tables = edgeprune.read_profile(profile, graph)  # with what was measured for the plans before
            try:
                weighed = scores
                if calibration is not None:
                    weighed = edgeprune.search_curves(
                        module, inputs, graph, tables, scores, budget, calibration, trials=trials, solver=solver,
                        levels=levels, checkpoint=checkpoint, executor=executor, progress=progress,
                    )  # fmt: skip
                if session is None:
                    chosen = edgeprune.choose_widths(
                        graph, tables, weighed, budget, solver=solver, levels=levels, progress=progress
                    )
                else:
                    chosen = edgeprune.plan_on_board(
                        module, inputs, graph, tables, weighed, budget, session, profile, solver=solver, levels=levels,
                        effort=find_effort(effort), progress=progress,
                    )  # fmt: skip
            except Unmet as error:
                if len(budgets) == 1:
                    raise
                missed.append(f"{file.name}: {error}")
                continue
            edgeprune.write_record(file, chosen)
            plans[str(file)] = chosen
    checkpoint.unlink(missing_ok=True)
    if len(budgets) == 1:
        show(chosen, as_json, "describe_plan", graph)
    else:
        show(plans, as_json, "describe_plans", graph)
    if missed:
        raise Unmet("no plan for " + "; ".join(missed))


def compact(
    model: Model, plan: Annotated[Path, typer.Option(help="from `edgeprune plan`")], out: Out, weights: Weights = None,
    shapes: Shapes = None, allow_inexact: Inexact = False, scope: Scope = None,
    data: Annotated[str | None, typer.Option(help="refit the consumers on its calibration batches")] = None,
) -> None:  # fmt: skip
    """Cut the model to a plan: compact.pt2 and compact.safetensors in the folder --out."""
    from edgeprune.core.records import Plan

    module, inputs, graph = load_graph(model, weights, shapes, allow_inexact, scope)
    calibration = load_calibration(data, module, model, weights, shapes, scope) if data else None
    chosen = edgeprune.read_record(Plan, plan)
    with bars() as progress:
        smaller = edgeprune.compact_and_compensate(module, inputs, graph, chosen, calibration, progress=progress)
    edgeprune.save_compact(smaller, inputs, out)
    print(f"{sum(p.numel() for p in smaller.parameters()):,} parameters: {out}/compact.pt2")


COMMANDS = (trace, profile, score, plan, compact)
