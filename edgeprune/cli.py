"""Commands and options. One command per stage: it reads files, calls the stage, writes its record.

Nothing heavy is imported until a command runs, so that `edgeprune --help` answers at once.
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
from edgeprune.core.errors import Unmet, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgeprune.core.progress import Progress
    from edgeprune.core.records import ModelSpec, Report

app = typer.Typer(help=edgeprune.__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
targets_app = typer.Typer(help="The boards: list them, look at one, prepare one.", no_args_is_help=True)
app.add_typer(targets_app, name="targets")

Model = Annotated[str, typer.Argument(help="path.py:function, package.module:function or a .pt2 file")]
Weights = Annotated[Path | None, typer.Option(help=".safetensors, or a state dict")]
Input = Annotated[list[str] | None, typer.Option("--input", help="shape of an input, batch first: 1x3x224x224")]
TargetName = Annotated[str, typer.Option("--target", help="a board of the inventory (edgeprune targets)")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="where to write the result")]
Source = Annotated[str | None, typer.Option("--data", help="path.py:function, package.module:function or .npz")]
AsJson = Annotated[bool, typer.Option("--json", help="print the record as JSON")]
Inexact = Annotated[bool, typer.Option("--allow-inexact", help="also prune across layer norms")]
Latency = Annotated[str | None, typer.Option(help="12ms, or 0.5x of the dense model")]
Memory = Annotated[str | None, typer.Option(help="peak activation memory: 8MiB or 0.5x")]
Size = Annotated[str | None, typer.Option(help="size of the artifact: 2MiB or 0.5x")]
Energy = Annotated[str | None, typer.Option(help="energy per inference: 30mJ or 0.5x")]
GraphFile = Annotated[Path | None, typer.Option("--graph", help="from `edgeprune trace`; traced anew when not given")]


def run_command() -> int:
    """Parse sys.argv and run one command. returns: the exit code of the command line's own errors."""
    try:
        result = typer.main.get_command(app).main(standalone_mode=False, prog_name="edgeprune")
    except typer.Exit as error:
        return error.exit_code
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except typer.TyperException as error:
        error.show()
        return error.exit_code
    return result if isinstance(result, int) else 0


@contextmanager
def bars() -> Iterator[Progress]:
    """A progress bar on stderr for each thing being done; a line a tenth where stderr is not a terminal."""
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


def model_spec(model: str, weights: Path | None, shapes: list[str] | None) -> ModelSpec:
    """MODEL and its options as a record. raises: UsageError for a shape that cannot be read."""
    from edgeprune.core.records import ModelSpec

    try:
        inputs = tuple(tuple(int(size) for size in shape.lower().split("x")) for shape in shapes or ())
    except ValueError as error:
        raise UsageError(f"--input {' '.join(shapes or ())}: expected sizes such as 1x3x224x224") from error
    place = {"file": model} if model.endswith(".pt2") else {"factory": model}
    return ModelSpec(**place, weights=str(weights) if weights else None, inputs=inputs)


def load(model: str, weights: Path | None, shapes: list[str] | None) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The module and its example inputs."""
    from edgeprune.load import example_inputs, load_model

    spec = model_spec(model, weights, shapes)
    module = load_model(spec, Path.cwd())
    return module, example_inputs(spec, module)


def show(record: Any, as_json: bool, text: str) -> None:
    """Results go to stdout: a record as JSON, or text for people."""
    from edgeprune.core.store import to_builtins

    print(json.dumps(to_builtins(record), indent=2) if as_json else text)


def raise_unmet(report: Report) -> None:
    """Exit code 1 with what failed, after everything was printed."""
    failed = [f"{check.name}: {check.note}" for check in report.checks if not check.passed]
    if failed:
        raise Unmet("not met: " + "; ".join(failed))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="folder of the run")] = Path("runs/demo"),
    latency: Annotated[str, typer.Option(help="budget: 0.5x of the dense model, or 3ms")] = "0.5x",
) -> None:
    """The whole pipeline on built-in data and an embedded SSH board."""
    from edgeprune.demo import write_demo

    with bars() as progress:
        run_file = write_demo(out, latency, progress)
    run(run_file)


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="the run file")] = Path("edgeprune.toml"),
    as_json: AsJson = False,
) -> None:
    """The whole pipeline on yours; resumes where it stopped."""
    from edgeprune.core.describe import summary
    from edgeprune.core.runfile import read_run_file
    from edgeprune.pipeline import run_pipeline

    settings = read_run_file(file)
    with bars() as progress:
        report = run_pipeline(settings, file.parent, progress)
    show(report, as_json, summary(report, file.parent / settings.output.dir))
    raise_unmet(report)


@targets_app.command("list")
def list_boards(as_json: AsJson = False) -> None:
    """The inventory: ./targets, then those that come with edgeprune."""
    from edgeprune.device.inventory import list_targets, load_target

    found = [load_target(name) for name in list_targets()]
    show(found, as_json, "\n".join(f"{t.name:<24}{t.board:<16}{t.transport:<10}{t.description}" for t in found))


@targets_app.command("check")
def check_board(
    name: str,
    trust: Annotated[
        bool, typer.Option("--trust", help="remember the host key of a board seen for the first time")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Connect and print the board's facts, and what is missing."""
    from edgeprune.core.describe import describe_facts
    from edgeprune.device.inventory import check_target, load_target

    facts = check_target(load_target(name), trust_new_host=trust)
    show(facts, as_json, describe_facts(facts))
    if facts.missing:
        raise typer.Exit(3)


@targets_app.command("setup")
def setup_board(
    name: str,
    offline: Annotated[bool, typer.Option("--offline", help="the host downloads the wheels and pushes them")] = False,
) -> None:
    """Make a virtual environment with the runtime on the board."""
    from edgeprune.core.describe import describe_facts
    from edgeprune.device.inventory import load_target, setup_target

    with bars() as progress:
        facts = setup_target(load_target(name), offline=offline, progress=progress)
    print(describe_facts(facts))


@app.command()
def trace(
    model: Model,
    weights: Weights = None,
    shapes: Input = None,
    allow_inexact: Inexact = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """What can be pruned, what is frozen and why."""
    from edgeprune.core.describe import describe_graph
    from edgeprune.core.store import write_record
    from edgeprune.trace import trace_graph

    module, inputs = load(model, weights, shapes)
    graph = trace_graph(module, inputs, allow_inexact=allow_inexact)
    if out:
        write_record(out, graph)
    show(graph, as_json, describe_graph(graph))


@app.command()
def profile(
    model: Model,
    target: TargetName,
    out: Annotated[Path, typer.Option("--out", "-o")],
    weights: Weights = None,
    shapes: Input = None,
    allow_inexact: Inexact = False,
    threads: int = 1,
    configurations: int = 32,
    rounds: int = 3,
    as_json: AsJson = False,
) -> None:
    """Measure the latency tables of a model on a board; goes on where it was stopped."""
    from edgeprune.core.describe import describe_profile
    from edgeprune.pipeline import connect
    from edgeprune.profile import profile_target
    from edgeprune.trace import trace_graph

    module, inputs = load(model, weights, shapes)
    graph = trace_graph(module, inputs, allow_inexact=allow_inexact)
    with bars() as progress, connect(target, threads=threads, progress=progress) as session:
        made = profile_target(
            module, inputs, graph, session, path=out, configurations=configurations, rounds=rounds, progress=progress
        )
    show(made, as_json, describe_profile(made))


@app.command()
def score(
    model: Model,
    data: Annotated[str, typer.Option("--data")],
    out: Annotated[Path, typer.Option("--out", "-o")],
    weights: Weights = None,
    shapes: Input = None,
    allow_inexact: Inexact = False,
    criterion: Annotated[str, typer.Option(help="name, or name:option=value")] = "taylor",
    curves: Annotated[bool, typer.Option(help="measure the loss of each group at a few widths")] = True,
) -> None:
    """How much each unit matters."""
    from edgeprune.core.store import write_record
    from edgeprune.load import load_data
    from edgeprune.score import score_groups
    from edgeprune.trace import trace_graph

    module, inputs = load(model, weights, shapes)
    graph = trace_graph(module, inputs, allow_inexact=allow_inexact)
    name, _, options = criterion.partition(":")
    calibration = load_data(data, Path.cwd()).require("calibration")
    with bars() as progress:
        importance = score_groups(
            module, inputs, graph, calibration, criterion=name, options=options, curves=curves, progress=progress
        )
    write_record(out, importance)
    print(f"{len(importance.scores)} groups scored by {criterion}: {out}")


@app.command()
def plan(
    model: Model,
    profile: Annotated[Path, typer.Option(help="from `edgeprune profile`")],
    importance: Annotated[Path, typer.Option(help="from `edgeprune score`")],
    out: Annotated[Path, typer.Option("--out", "-o")],
    weights: Weights = None,
    shapes: Input = None,
    allow_inexact: Inexact = False,
    latency: Latency = None,
    memory: Memory = None,
    size: Size = None,
    energy: Energy = None,
    target: Annotated[str | None, typer.Option(help="close the loop: measure the plan on this board")] = None,
    threads: int = 1,
    solver: str = "milp",
    levels: int = 16,
    as_json: AsJson = False,
) -> None:
    """Choose the widths that lose least within the budgets."""
    from edgeprune.core.budget import make_budget
    from edgeprune.core.cost import predict_cost
    from edgeprune.core.describe import describe_plan
    from edgeprune.core.records import Importance
    from edgeprune.core.store import read_record, write_record
    from edgeprune.pipeline import connect, plan_on_board
    from edgeprune.plan import choose_widths
    from edgeprune.profile import read_profile
    from edgeprune.trace import trace_graph

    module, inputs = load(model, weights, shapes)
    graph = trace_graph(module, inputs, allow_inexact=allow_inexact)
    tables, scores = read_profile(profile, graph), read_record(Importance, importance)
    dense = predict_cost(graph, {}, tables)
    budget = make_budget(dense, latency=latency, memory=memory, size=size, energy=energy)
    with bars() as progress:
        if target is None:
            chosen = choose_widths(graph, tables, scores, budget, solver=solver, levels=levels, progress=progress)
        else:
            with connect(target, threads=threads, progress=progress) as session:
                chosen = plan_on_board(
                    module, inputs, graph, tables, scores, budget, session, profile,
                    solver=solver, levels=levels, progress=progress,
                )  # fmt: skip
    write_record(out, chosen)
    show(chosen, as_json, describe_plan(graph, chosen))


@app.command()
def compact(
    model: Model,
    plan: Annotated[Path, typer.Option(help="from `edgeprune plan`")],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for compact.pt2 and compact.safetensors")],
    weights: Weights = None,
    shapes: Input = None,
    allow_inexact: Inexact = False,
    data: Source = None,
) -> None:
    """Cut the model to a plan; with --data its consumers are refitted on the calibration batches."""
    from edgeprune.compact import save_compact
    from edgeprune.core.records import Plan
    from edgeprune.core.store import read_record
    from edgeprune.load import load_data
    from edgeprune.pipeline import compact_and_compensate
    from edgeprune.trace import trace_graph

    module, inputs = load(model, weights, shapes)
    graph = trace_graph(module, inputs, allow_inexact=allow_inexact)
    calibration = load_data(data, Path.cwd()).require("calibration") if data else None
    with bars() as progress:
        smaller = compact_and_compensate(module, inputs, graph, read_record(Plan, plan), calibration, progress=progress)
    save_compact(smaller, inputs, out)
    print(f"{sum(p.numel() for p in smaller.parameters())} parameters: {out}/compact.pt2")


@app.command()
def recover(
    model: Model,
    data: Annotated[str, typer.Option("--data")],
    out: Annotated[Path, typer.Option("--out", "-o")],
    weights: Weights = None,
    shapes: Input = None,
    epochs: int = 5,
    lr: float = 0.02,
    teacher: Annotated[str | None, typer.Option(help="distil from this model as well")] = None,
    teacher_weights: Weights = None,
) -> None:
    """Train a compact model; goes on where it was stopped."""
    from edgeprune.compact import save_compact
    from edgeprune.load import load_data
    from edgeprune.recover import recover_accuracy

    module, inputs = load(model, weights, shapes)
    guide = load(teacher, teacher_weights, shapes)[0] if teacher else None
    with bars() as progress:
        result = recover_accuracy(
            module,
            load_data(data, Path.cwd()),
            teacher=guide,
            epochs=epochs,
            lr=lr,
            checkpoint=out / "recover.checkpoint",
            progress=progress,
        )
    save_compact(module, inputs, out, name="recovered")
    print(f"accuracy {result.accuracy_before:.2%} -> {result.accuracy_after:.2%}: {out}/recovered.pt2")


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o")],
    weights: Weights = None,
    shapes: Input = None,
    format: Annotated[str, typer.Option(help="artifact format")] = "onnx",
    as_json: AsJson = False,
) -> None:
    """Write the artifact that runs on the board, checked on the host."""
    from edgeprune.export import export_model

    module, inputs = load(model, weights, shapes)
    artifact = export_model(module, inputs, out, format=format)
    show(artifact, as_json, f"{artifact.bytes} bytes, sha256 {artifact.sha256[:12]}: {out}")


@app.command()
def validate(
    artifact: Annotated[Path, typer.Argument(help="the exported file")],
    target: TargetName,
    model: Annotated[str, typer.Option(help="the same model in PyTorch: the reference for its outputs")],
    dense: Annotated[Path, typer.Option(help="the exported dense model: the reference for its costs")],
    plan: Annotated[Path, typer.Option(help="from `edgeprune plan`: the budgets and what was predicted")],
    data: Annotated[str, typer.Option("--data", help="its test split gives the inputs")],
    out: Annotated[Path, typer.Option("--out", "-o")],
    weights: Weights = None,
    shapes: Input = None,
    threads: int = 1,
    as_json: AsJson = False,
) -> None:
    """Run the artifact on the board and hold it against the host, the dense model and the budgets."""
    from edgeprune.core.describe import summary
    from edgeprune.core.family import load_member
    from edgeprune.core.records import Plan
    from edgeprune.core.store import read_record, write_record
    from edgeprune.load import load_data
    from edgeprune.pipeline import connect
    from edgeprune.validate import collect_examples, validate_artifact

    module, _ = load(model, weights, shapes)
    chosen = read_record(Plan, plan)
    files = [load_member("formats", file.suffix.lstrip(".")).inspect(file) for file in (artifact, dense)]
    examples = collect_examples(module, load_data(data, Path.cwd()).require("test"), files[0])
    with bars() as progress, connect(target, threads=threads, progress=progress) as session:
        made = validate_artifact(
            files[0], session, dense=files[1], examples=examples, budget=chosen.budget, predicted=chosen.predicted,
            progress=progress,
        )  # fmt: skip
    write_record(out, made)
    show(made, as_json, summary(made, out.parent))
    raise_unmet(made)


@app.command()
def bundle(
    artifact: Annotated[Path, typer.Argument(help="the exported file")],
    plan: Annotated[Path, typer.Option(help="from `edgeprune plan`")],
    report: Annotated[Path, typer.Option(help="from `edgeprune validate`")],
    out: Annotated[Path, typer.Option("--out", "-o")] = Path("bundle.zip"),
    data: Source = None,
) -> None:
    """Zip the artifact with its manifest, evidence and runnable examples."""
    from edgeprune.bundle import write_bundle
    from edgeprune.core.family import load_member
    from edgeprune.core.records import Plan, Report
    from edgeprune.core.store import read_record
    from edgeprune.load import load_data

    source = load_data(data, Path.cwd()) if data else None
    made = write_bundle(
        artifact, load_member("formats", artifact.suffix.lstrip(".")).inspect(artifact), read_record(Plan, plan),
        read_record(Report, report), out, labels=source.labels if source else None,
        preprocessing=source.preprocessing if source else None,
    )  # fmt: skip
    print(f"{len(made.files)} files: {out}")


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="the folder of a run")],
    out: Out = None,
) -> None:
    """One self-contained HTML page with the evidence of a run."""
    from edgeprune.pipeline import report_run

    print(report_run(directory, out or directory / "report.html"))


@app.command()
def version() -> None:
    """The version of edgeprune."""
    print(edgeprune.__version__, file=sys.stdout)
