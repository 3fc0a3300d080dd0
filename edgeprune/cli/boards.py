"""The boards: what there is, what one has, what an artifact does on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import edgeprune
from edgeprune.cli.common import (
    AsJson,
    EffortName,
    Inexact,
    MeterName,
    Model,
    RuntimeName,
    Shapes,
    TargetName,
    Threads,
    Weights,
    bars,
    load_graph,
    show,
)
from edgeprune.core.effort import find_effort

targets_app = typer.Typer(help="The boards: list them, look at one, prepare one.", no_args_is_help=True)


@targets_app.command("list")
def list_boards(as_json: AsJson = False) -> None:
    """The inventory: ./targets, then those that come with edgeprune."""
    show([edgeprune.load_target(name) for name in edgeprune.list_targets()], as_json, "describe_targets")


@targets_app.command("check")
def check_board(
    name: str,
    trust: Annotated[bool, typer.Option("--trust", help="remember the host key of a board seen first")] = False,
    as_json: AsJson = False,
) -> None:
    """Connect and print the board's facts, and what is missing."""
    facts = edgeprune.check_target(edgeprune.load_target(name), trust_new_host=trust)
    show(facts, as_json, "describe_facts")
    if facts.missing:
        raise typer.Exit(3)


@targets_app.command("setup")
def setup_board(
    name: str,
    offline: Annotated[bool, typer.Option("--offline", help="the host downloads the wheels, pushes them")] = False,
) -> None:
    """Make a virtual environment with the runtime on the board."""
    with bars() as progress:
        facts = edgeprune.setup_target(edgeprune.load_target(name), offline=offline, progress=progress)
    show(facts, False, "describe_facts")


def measure(
    files: Annotated[list[Path], typer.Argument(help="a model file, or two to compare")], target: TargetName,
    threads: Threads = 1, runtime: RuntimeName = None, effort: EffortName = "default", meter: MeterName = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="keep the record with its raw samples")] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Benchmark a model file on a board, or compare two in turns."""
    level = find_effort(effort)
    runtime = edgeprune.choose_runtime(target, runtime, files[0].suffix.lstrip(".").lower())
    with (
        bars() as progress,
        edgeprune.connect(target, threads=threads, runtime=runtime, meter=meter, progress=progress) as session,
    ):
        measured = edgeprune.measure_files(files, session, effort=level, progress=progress)
    if out:
        edgeprune.write_record(out, measured)
    show(measured, as_json, "describe_measured")


def advise(
    model: Model, target: TargetName, weights: Weights = None, shapes: Shapes = None, allow_inexact: Inexact = False,
    threads: Threads = 1, runtime: RuntimeName = None, effort: EffortName = "quick",
    other_threads: Annotated[list[int] | None, typer.Option("--other-threads", help="also time these")] = None,
    int8: Annotated[bool, typer.Option("--int8/--no-int8", help="also time the model with 8 bits")] = True,
    html: Annotated[Path | None, typer.Option(help="a page with the picture")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="keep the record")] = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Where the time goes on a board and whether pruning is worth it, before anyone trains anything."""
    level = find_effort(effort)
    with bars() as progress, edgeprune.connect(target, threads=threads, runtime=runtime, progress=progress) as session:
        module, inputs, graph = load_graph(model, weights, shapes, allow_inexact)
        cpus = session.facts.cpus or 1
        counts = other_threads or [count for count in (1, 2, 4) if count <= cpus and count != threads]
        found = edgeprune.advise_pruning(
            module, inputs, graph, session, threads=counts, int8=int8, effort=level, progress=progress
        )
    if out:
        edgeprune.write_record(out, found)
    if html:
        from edgeprune.report import write_advice

        write_advice(html, found)
    show(found, as_json, "describe_advice")


COMMANDS = (advise, measure)
