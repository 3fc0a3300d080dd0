"""Commands and options. One command per stage: it reads files, calls the stage, writes its record.

Stages are reached through `edgeprune.NAME`, which imports them when they are first used, so that
`edgeprune --help` answers at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import edgeprune
from edgeprune.core.effort import find_effort
from edgeprune.core.errors import Unmet, UsageError
from edgeprune.core.family import load_member

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgeprune.core.progress import Progress
    from edgeprune.core.records import Graph, Report

app = typer.Typer(help=edgeprune.__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
targets_app = typer.Typer(help="The boards: list them, look at one, prepare one.", no_args_is_help=True)
app.add_typer(targets_app, name="targets")

Model = Annotated[str, typer.Argument(help="path.py:function, package.module:function or a .pt2 file")]
Weights = Annotated[Path | None, typer.Option(help=".safetensors, or a state dict")]
Shapes = Annotated[list[str] | None, typer.Option("--input", help="shape of an input, batch first: 1x3x224x224")]
Inexact = Annotated[bool, typer.Option("--allow-inexact", help="also prune across layer norms")]
TargetName = Annotated[str, typer.Option("--target", help="a board of the inventory (edgeprune targets list)")]
EffortName = Annotated[str, typer.Option("--effort", help="board time: quick, default or thorough")]
Threads = Annotated[int, typer.Option(min=1, help="threads of the runtime on the board")]
Out = Annotated[Path, typer.Option("--out", "-o", help="where to write the result")]
Source = Annotated[str, typer.Option("--data", help="path.py:function, package.module:function or .npz")]
AsJson = Annotated[bool, typer.Option("--json", help="print the record as JSON")]
UNMEASURED = "not measured"
INTERRUPTED = 130
Limit = Annotated[str | None, typer.Option(help="absolute, such as 12ms or 2MiB, or 0.5x of the dense model")]


def run_command() -> int:
    """Parse sys.argv and run one command. returns: the exit code of the command line's own errors."""
    try:
        result = typer.main.get_command(app).main(standalone_mode=False, prog_name="edgeprune")
    except typer.Exit as error:
        return error.exit_code
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except typer.TyperException as error:
        command = " ".join(["edgeprune", *(word for word in sys.argv[1:2] if not word.startswith("-"))])
        print(f"error: {error.format_message()} Try `{command} --help`.", file=sys.stderr)
        return error.exit_code
    if result == INTERRUPTED:  # typer turns Ctrl-C into this number
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0


@contextmanager
def bars() -> Iterator[Progress]:
    """A progress bar on stderr for each thing being done; a line a tenth where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn()
    with Bars(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as shown:
        tasks: dict[str, Any] = {}
        tenths: dict[str, int] = {}

        def progress(what: str, done: int, total: int) -> None:
            if not console.is_terminal:
                tenth = 10 * done // total if total else 0
                if tenths.get(what) != tenth:
                    tenths[what] = tenth
                    console.print(f"{what}: {done}/{total or '?'}", highlight=False)
                return
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total or None)
            shown.update(tasks[what], completed=done, total=total or None)

        yield progress


def load(model: str, weights: Path | None, shapes: list[str] | None) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The module and its example inputs. raises: UsageError for a shape that cannot be read."""
    from edgeprune.core.records import ModelSpec

    try:
        inputs = tuple(tuple(int(size) for size in shape.lower().split("x")) for shape in shapes or ())
    except ValueError as error:
        raise UsageError(f"--input {' '.join(shapes or ())}: expected sizes such as 1x3x224x224") from error
    place = {"file": model} if model.endswith(".pt2") else {"factory": model}
    spec = ModelSpec(**place, weights=str(weights) if weights else None, inputs=inputs)
    module = edgeprune.load_model(spec, Path.cwd())
    return module, edgeprune.example_inputs(spec, module)


def load_graph(
    model: str, weights: Path | None, shapes: list[str] | None, allow_inexact: bool
) -> tuple[nn.Module, tuple[Tensor, ...], Graph]:
    """The module, its example inputs and its graph."""
    module, inputs = load(model, weights, shapes)
    return module, inputs, edgeprune.trace_graph(module, inputs, allow_inexact=allow_inexact)


def show(record: Any, as_json: bool, describe: str, *extra: Any) -> None:
    """Results go to stdout: a record as JSON, or as `core.describe` puts it for people."""
    from edgeprune.core import describe as texts
    from edgeprune.core.store import to_builtins

    print(json.dumps(to_builtins(record), indent=2) if as_json else getattr(texts, describe)(*extra, record))


def raise_unmet(report: Report) -> None:
    """Exit code 1 with what failed, after everything was printed."""
    failed = [f"{check.name}: {check.note}" for check in report.checks if not check.passed]
    if failed:
        raise Unmet("not met: " + "; ".join(failed))


@app.command()
def demo(out: Out = Path("runs/demo"), latency: Limit = "0.5x") -> None:
    """The whole pipeline on built-in data and an embedded SSH board."""
    from edgeprune.demo import write_demo

    with bars() as progress:
        run_file = write_demo(out, latency or "0.5x", progress)
    run(run_file)


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="the run file")] = Path("edgeprune.toml"), as_json: AsJson = False
) -> None:
    """The whole pipeline on yours; resumes where it stopped."""
    from edgeprune.core.runfile import read_run_file

    settings = read_run_file(file)
    with bars() as progress:
        report = edgeprune.run_pipeline(settings, file.parent, progress)
    show(report, as_json, "summary", file.parent / settings.output.dir)
    raise_unmet(report)


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


@app.command()
def trace(
    model: Model, weights: Weights = None, shapes: Shapes = None, allow_inexact: Inexact = False,
    out: Annotated[Path | None, typer.Option("--out", "-o")] = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """What can be pruned, what is frozen and why."""
    *_, graph = load_graph(model, weights, shapes, allow_inexact)
    if out:
        edgeprune.write_record(out, graph)
    show(graph, as_json, "describe_graph")


@app.command()
def profile(
    model: Model, target: TargetName, out: Out, weights: Weights = None, shapes: Shapes = None,
    allow_inexact: Inexact = False, threads: Threads = 1, configurations: int = 32,
    effort: EffortName = "default", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Measure the latency tables of a model on a board; goes on where it was stopped."""
    with bars() as progress, edgeprune.connect(target, threads=threads, progress=progress) as session:
        module, inputs, graph = load_graph(model, weights, shapes, allow_inexact)
        tables = edgeprune.profile_target(
            module, inputs, graph, session, path=out, configurations=configurations, effort=find_effort(effort),
            progress=progress,
        )  # fmt: skip
    show(tables, as_json, "describe_profile")


@app.command()
def score(
    model: Model, data: Source, out: Out, weights: Weights = None, shapes: Shapes = None,
    allow_inexact: Inexact = False,
    criterion: Annotated[str, typer.Option(help="a name, or name:option=value,...")] = "taylor",
    curves: Annotated[bool, typer.Option(help="measure the loss of each group at a few widths")] = True,
) -> None:  # fmt: skip
    """How much each unit matters."""
    name, _, options = criterion.partition(":")
    load_member("criteria", name)
    module, inputs, graph = load_graph(model, weights, shapes, allow_inexact)
    calibration = edgeprune.load_data(data, Path.cwd()).require("calibration")
    with bars() as progress:
        importance = edgeprune.score_groups(
            module, inputs, graph, calibration, criterion=name, options=options, curves=curves, progress=progress
        )
    edgeprune.write_record(out, importance)
    print(f"{len(importance.scores)} groups scored by {criterion}: {out}")


@app.command()
def plan(
    model: Model, profile: Annotated[Path, typer.Option(help="from `edgeprune profile`")],
    importance: Annotated[Path, typer.Option(help="from `edgeprune score`")], out: Out, weights: Weights = None,
    shapes: Shapes = None, allow_inexact: Inexact = False, latency: Limit = None, memory: Limit = None,
    size: Limit = None, energy: Limit = None,
    target: Annotated[str | None, typer.Option(help="close the loop: measure the plan on this board")] = None,
    threads: Threads = 1, effort: EffortName = "default", solver: str = "milp", levels: int = 16,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Choose the widths that lose least within the budgets."""
    from edgeprune.core.budget import make_budget
    from edgeprune.core.records import Importance

    module, inputs, graph = load_graph(model, weights, shapes, allow_inexact)
    tables, scores = edgeprune.read_profile(profile, graph), edgeprune.read_record(Importance, importance)
    budget = make_budget(edgeprune.dense_cost(graph, tables), latency=latency, memory=memory, size=size, energy=energy)
    with bars() as progress:
        if target is None:
            chosen = edgeprune.choose_widths(
                graph, tables, scores, budget, solver=solver, levels=levels, progress=progress
            )
        else:
            with edgeprune.connect(target, threads=threads, progress=progress) as session:
                chosen = edgeprune.plan_on_board(
                    module, inputs, graph, tables, scores, budget, session, profile, solver=solver, levels=levels,
                    effort=find_effort(effort), progress=progress,
                )  # fmt: skip
    edgeprune.write_record(out, chosen)
    show(chosen, as_json, "describe_plan", graph)


@app.command()
def compact(
    model: Model, plan: Annotated[Path, typer.Option(help="from `edgeprune plan`")], out: Out, weights: Weights = None,
    shapes: Shapes = None, allow_inexact: Inexact = False,
    data: Annotated[str | None, typer.Option(help="refit the consumers on its calibration batches")] = None,
) -> None:  # fmt: skip
    """Cut the model to a plan: compact.pt2 and compact.safetensors in the folder --out."""
    from edgeprune.core.records import Plan

    module, inputs, graph = load_graph(model, weights, shapes, allow_inexact)
    calibration = edgeprune.load_data(data, Path.cwd()).require("calibration") if data else None
    chosen = edgeprune.read_record(Plan, plan)
    with bars() as progress:
        smaller = edgeprune.compact_and_compensate(module, inputs, graph, chosen, calibration, progress=progress)
    edgeprune.save_compact(smaller, inputs, out)
    print(f"{sum(p.numel() for p in smaller.parameters()):,} parameters: {out}/compact.pt2")


@app.command()
def recover(
    model: Model, data: Source, out: Out, weights: Weights = None, shapes: Shapes = None, epochs: int = 5,
    lr: float = 0.02, teacher: Annotated[str | None, typer.Option(help="distil from this model as well")] = None,
    teacher_weights: Weights = None,
) -> None:  # fmt: skip
    """Train a compact model; goes on where it was stopped. Writes recovered.pt2 in the folder --out."""
    module, inputs = load(model, weights, shapes)
    guide = load(teacher, teacher_weights, shapes)[0] if teacher else None
    with bars() as progress:
        result = edgeprune.recover_accuracy(
            module, edgeprune.load_data(data, Path.cwd()), teacher=guide, epochs=epochs, lr=lr,
            checkpoint=out / "recover.checkpoint", progress=progress,
        )  # fmt: skip
    edgeprune.save_compact(module, inputs, out, name="recovered")
    accuracies = [UNMEASURED if a is None else f"{a:.2%}" for a in (result.accuracy_before, result.accuracy_after)]
    print(f"accuracy {' -> '.join(accuracies)}: {out}/recovered.pt2{result.note and '; ' + result.note}")


@app.command()
def export(
    model: Model, out: Out, weights: Weights = None, shapes: Shapes = None,
    format: Annotated[str, typer.Option(help="artifact format")] = "onnx", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Write the artifact that runs on the board, checked on the host."""
    load_member("formats", format)
    artifact = edgeprune.export_model(*load(model, weights, shapes), out, format=format)
    show(artifact, as_json, "describe_artifact")


@app.command()
def validate(
    artifact: Annotated[Path, typer.Argument(help="the exported file")], target: TargetName,
    model: Annotated[str, typer.Option(help="the same model in PyTorch: the reference for its outputs")],
    dense: Annotated[Path, typer.Option(help="the exported dense model: the reference for its costs")],
    plan: Annotated[Path, typer.Option(help="from `edgeprune plan`: the budgets and what was predicted")],
    data: Source, out: Out, weights: Weights = None, shapes: Shapes = None, threads: Threads = 1,
    effort: EffortName = "default", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Run the artifact on the board and hold it against the host, the dense model and the budgets."""
    from edgeprune.core.records import Plan

    module, _ = load(model, weights, shapes)
    chosen = edgeprune.read_record(Plan, plan)
    files = [load_member("formats", file.suffix.lstrip(".")).inspect(file) for file in (artifact, dense)]
    examples = edgeprune.collect_examples(module, edgeprune.load_data(data, Path.cwd()).require("test"), files[0])
    with bars() as progress, edgeprune.connect(target, threads=threads, progress=progress) as session:
        report = edgeprune.validate_artifact(
            files[0], session, dense=files[1], examples=examples, budget=chosen.budget, predicted=chosen.predicted,
            effort=find_effort(effort), progress=progress,
        )  # fmt: skip
    edgeprune.write_record(out, report)
    show(report, as_json, "summary", out.parent)
    raise_unmet(report)


@app.command()
def bundle(
    artifact: Annotated[Path, typer.Argument(help="the exported file")],
    plan: Annotated[Path, typer.Option(help="from `edgeprune plan`")],
    report: Annotated[Path, typer.Option(help="from `edgeprune validate`")],
    out: Out = Path("bundle.zip"),
    data: Annotated[str | None, typer.Option(help="takes labels and preprocessing from it")] = None,
) -> None:
    """Zip the artifact with its manifest, evidence and runnable examples."""
    from edgeprune.core.records import Plan, Report

    source = edgeprune.load_data(data, Path.cwd()) if data else None
    made = edgeprune.write_bundle(
        artifact, load_member("formats", artifact.suffix.lstrip(".")).inspect(artifact),
        edgeprune.read_record(Plan, plan), edgeprune.read_record(Report, report), out,
        labels=source.labels if source else None, preprocessing=source.preprocessing if source else None,
    )  # fmt: skip
    print(f"{len(made.files)} files: {out}")


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="the folder of a run")],
    out: Annotated[Path | None, typer.Option("--out", "-o")] = None,
) -> None:
    """One self-contained HTML page with the evidence of a run."""
    print(edgeprune.report_run(directory, out or directory / "report.html"))


@app.command()
def version() -> None:
    """The version of edgeprune."""
    print(edgeprune.__version__)
