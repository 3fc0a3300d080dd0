"""One command a stage."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import edgeprune
from edgeprune.cli.common import (
    UNMEASURED,
    AsJson,
    Dtype,
    EffortName,
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
    TargetName,
    Threads,
    Tie,
    Weights,
    bars,
    load,
    load_calibration,
    load_graph,
    raise_unmet,
    rule_widths,
    show,
)
from edgeprune.core.effort import Effort, find_effort
from edgeprune.core.errors import Unmet, UsageError
from edgeprune.core.family import load_member

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgeprune.core.progress import Progress
    from edgeprune.core.records import Precision
    from edgeprune.device.session import Session

CALIBRATION_BATCHES = 8


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
    criterion: Annotated[str, typer.Option(help="a name, or name:option=value,...")] = "taylor",
    curves: Annotated[bool, typer.Option(help="measure the loss of each group at a few widths")] = True,
    depth: Annotated[bool, typer.Option(help="and without each residual branch, so that a plan may drop it")] = False,
) -> None:  # fmt: skip
    """How much each unit matters."""
    name, _, options = criterion.partition(":")
    load_member("criteria", name)
    module, inputs, graph = load_graph(model, weights, shapes, allow_inexact, scope)
    calibration = load_calibration(data, module, model, weights, shapes, scope)
    with bars() as progress:
        importance = edgeprune.score_groups(
            module, inputs, graph, calibration, criterion=name, options=options, curves=curves, depth=depth,
            progress=progress,
        )  # fmt: skip
    edgeprune.write_record(out, importance)
    print(f"{len(importance.scores)} groups scored by {criterion}: {out}")


def plan(
    model: Model, profile: Annotated[Path, typer.Option(help="from `edgeprune profile`")],
    importance: Annotated[Path, typer.Option(help="from `edgeprune score`")], out: Out, weights: Weights = None,
    shapes: Shapes = None, allow_inexact: Inexact = False, scope: Scope = None, latency: Limit = None,
    memory: Limit = None, size: Limit = None, energy: Limit = None,
    power_model: Annotated[str | None, typer.Option(help='"idle=2.1W,active=4.8W", where no meter can tell')] = None,
    target: Annotated[str | None, typer.Option(help="close the loop: measure the plan on this board")] = None,
    threads: Threads = 1, runtime: RuntimeName = None, meter: MeterName = None, effort: EffortName = "default",
    solver: str = "milp", levels: int = 16, freeze: Freeze = None, only: Only = None, tie: Tie = None, step: Step = 1,
    min_width: MinWidth = 1, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Choose the widths that lose least within the budgets."""
    from edgeprune.core.budget import make_budget
    from edgeprune.core.records import Importance

    module, inputs, graph = load_graph(model, weights, shapes, allow_inexact, scope)
    graph = rule_widths(graph, freeze, only, tie, step, min_width)
    tables, scores = edgeprune.read_profile(profile, graph), edgeprune.read_record(Importance, importance)
    budget = make_budget(
        edgeprune.dense_cost(graph, tables), latency=latency, memory=memory, size=size, energy=energy,
        power_model=power_model,
    )  # fmt: skip
    with bars() as progress:
        if target is None:
            chosen = edgeprune.choose_widths(
                graph, tables, scores, budget, solver=solver, levels=levels, progress=progress
            )
        else:
            runtime = runtime or tables.conditions.runtime
            with edgeprune.connect(target, threads=threads, runtime=runtime, meter=meter, progress=progress) as session:
                chosen = edgeprune.plan_on_board(
                    module, inputs, graph, tables, scores, budget, session, profile, solver=solver, levels=levels,
                    effort=find_effort(effort), progress=progress,
                )  # fmt: skip
    edgeprune.write_record(out, chosen)
    show(chosen, as_json, "describe_plan", graph)


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


def recover(
    model: Model, data: Source, out: Out, weights: Weights = None, shapes: Shapes = None, epochs: int = 5,
    lr: float = 0.02, teacher: Annotated[str | None, typer.Option(help="distil from this model as well")] = None,
    teacher_weights: Weights = None,
    regularizer: Annotated[str | None, typer.Option(
        help="drive whole units of the model to zero, for a plan to remove: a name, or name:option=value,..."
    )] = None,
) -> None:  # fmt: skip
    """Train a model, compact or not; goes on where it was stopped. Writes recovered.pt2 in the folder --out."""
    module, inputs = load(model, weights, shapes)
    graph = None if regularizer is None else edgeprune.trace_graph(module, inputs)
    guide = load(teacher, teacher_weights, shapes)[0] if teacher else None
    with bars() as progress:
        result = edgeprune.recover_accuracy(
            module, edgeprune.load_data(data, Path.cwd()), teacher=guide, epochs=epochs, lr=lr,
            checkpoint=out / "recover.checkpoint", progress=progress, regularizer=regularizer, graph=graph,
        )  # fmt: skip
    edgeprune.save_compact(module, inputs, out, name="recovered")
    if regularizer is not None:
        print(f"{sum(result.zeroed.values())} units in {len(result.zeroed)} groups are zero")
    accuracies = _arrow(result.accuracy_before, result.accuracy_after)
    print(f"accuracy {accuracies}: {out}/recovered.pt2{result.note and '; ' + result.note}")


def sparsify(
    model: Model, out: Out,
    pattern: Annotated[str, typer.Option(help="a name, or name:option=value,... such as n_m:n=2,m=4")],
    weights: Weights = None, shapes: Shapes = None,
    data: Annotated[str | None, typer.Option(help="train with the pattern: path.py:function, or .npz")] = None,
    epochs: Annotated[int, typer.Option(help="of that training")] = 5, lr: float = 0.02, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Zero weights in a pattern, every shape stays. Writes sparse.pt2 and sparsity.json in the folder --out."""
    from copy import deepcopy

    module, inputs, graph = load_graph(model, weights, shapes, False)
    permuted, note = edgeprune.order_channels(module, inputs, graph, pattern), ""
    dense = deepcopy(module)
    if data is not None:
        with bars() as progress:
            result = edgeprune.recover_accuracy(
                module, edgeprune.load_data(data, Path.cwd()), teacher=dense, epochs=epochs, lr=lr,
                checkpoint=out / "sparsify.checkpoint", pattern=pattern, progress=progress,
            )  # fmt: skip
        note = f"\naccuracy {_arrow(result.accuracy_before, result.accuracy_after)}{result.note and '; ' + result.note}"
    record = replace(edgeprune.sparsify_model(module, pattern, before=dense), permuted=permuted)
    edgeprune.save_compact(module, inputs, out, name="sparse")
    edgeprune.write_record(out / "sparsity.json", record)
    (out / "sparsify.checkpoint").unlink(missing_ok=True)
    show(record, as_json, "describe_sparsity")
    if not as_json:
        print(f"{out}/sparse.pt2{note}")


def gate(
    model: Model, data: Source, out: Out,
    gating: Annotated[str, typer.Option("--gate", help="a name, or name:option=value,... such as block_skip:rate=0.6")],
    weights: Weights = None, shapes: Shapes = None, epochs: int = 5, lr: float = 0.02,
    teacher: Annotated[str | None, typer.Option(help="distil from this model instead of the one without gates")] = None,
    teacher_weights: Weights = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Let the model decide per input what to compute. Writes gated.pt2 and gating.json in the folder --out."""
    module, inputs = load(model, weights, shapes)
    batches = edgeprune.load_data(data, Path.cwd())
    calibration = batches.require("calibration")
    guide = load(teacher, teacher_weights, shapes)[0] if teacher else module
    gated = edgeprune.gate_model(module, inputs, gating)
    with bars() as progress:
        result = edgeprune.recover_accuracy(
            gated, batches, teacher=guide, epochs=epochs, lr=lr, checkpoint=out / "gate.checkpoint", gating=gating,
            progress=progress,
        )  # fmt: skip
    record = edgeprune.settle_gates(gated, inputs, calibration, gating)
    after = None if batches.test is None else edgeprune.evaluate_accuracy(gated, batches.test)
    edgeprune.save_compact(gated, inputs, out, name="gated")
    edgeprune.write_record(out / "gating.json", record)
    (out / "gate.checkpoint").unlink(missing_ok=True)
    show(record, as_json, "describe_gates")
    if not as_json:
        accuracies = _arrow(result.accuracy_before, after)
        print(f"{out}/gated.pt2\naccuracy {accuracies}{result.note and '; ' + result.note}")


def pivot(
    model: Model, out: Out, weights: Weights = None, shapes: Shapes = None,
    groups: Annotated[str, typer.Option(help="blocks of a layer; with --target several to choose from")] = "4",
    layers: Annotated[list[str] | None, typer.Option(help="only these, such as layer3.*")] = None,
    data: Annotated[str | None, typer.Option(help="weigh and refit by its calibration batches")] = None,
    gather: Annotated[bool, typer.Option(help="layers may read channels in an order of their own")] = False,
    target: Annotated[str | None, typer.Option(help="choose what pays on this board, within --latency")] = None,
    latency: Limit = None, threads: Threads = 1, runtime: RuntimeName = None, effort: EffortName = "default",
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Run layers in diagonal blocks of reordered channels. Writes pivoted.pt2 and pivoted.json in the folder --out."""
    try:
        counts = [int(count) for count in groups.split(",")]
    except ValueError as error:
        raise UsageError(f"--groups {groups}: expected numbers such as 2,4,8") from error
    if (target is None) != (latency is None):
        raise UsageError("--target and --latency go together: what pays is measured on a board, for a latency")
    if target is None and len(counts) > 1:
        raise UsageError("several --groups are for a plan; give --target, --latency and --data, or one number")
    if target is not None and data is None:
        raise UsageError("a plan measures what blocks lose; give --data")
    module, inputs = load(model, weights, shapes)
    calibration = load_calibration(data, module, model, weights, shapes, None) if data else None
    with bars() as progress:
        if target is None or latency is None or calibration is None:
            pivoted, record = edgeprune.pivot_model(
                module, inputs, calibration, groups=counts[0], gather=gather, layers=layers or (), progress=progress
            )
        else:
            with edgeprune.connect(target, threads=threads, runtime=runtime, progress=progress) as session:
                pivoted, record = edgeprune.plan_pivot(
                    module, inputs, calibration, session, latency=latency, groups=counts, layers=layers or (),
                    effort=find_effort(effort), progress=progress,
                )  # fmt: skip
    edgeprune.save_compact(pivoted, inputs, out, name="pivoted")
    edgeprune.write_record(out / "pivoted.json", record)
    show(record, as_json, "describe_pivoted")
    if not as_json:
        print(f"{out}/pivoted.pt2")
    if record.latency_share and record.limit_share and record.latency_share.median > record.limit_share:
        raise Unmet(f"not met: the latency is {record.latency_share.median:.3f} of the model's, the fastest there is")


def _arrow(*accuracies: float | None) -> str:
    return " -> ".join(UNMEASURED if each is None else f"{each:.2%}" for each in accuracies)


def export(
    model: Model, out: Out, weights: Weights = None, shapes: Shapes = None,
    format: Annotated[str | None, typer.Option(help="onnx or tflite; by default as the file's name says")] = None,
    dtype: Dtype = "float32",
    activations: Annotated[str | None, typer.Option(help="of int8: uint8, int8, symmetric (TensorRT)")] = None,
    data: Annotated[str | None, typer.Option(help="int8 takes the ranges of activations from it")] = None,
    sparse: Annotated[bool, typer.Option("--sparse", help="1x1 convolutions without their zeros (tflite)")] = False,
    cross_check: Annotated[bool, typer.Option("--cross-check", help="run a .tflite in TensorFlow as well")] = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Write the artifact that runs on the board, checked on the host."""
    name = format or out.suffix.lstrip(".").lower()
    member = load_member("formats", name)
    if cross_check and not hasattr(member, "cross_check"):
        raise UsageError(f"--cross-check is for tflite: there is no second runtime for {name} files here")
    precision = find_precision(member.PRECISIONS, dtype, activations)
    calibration = None
    if data is not None:
        from edgeprune.load import as_arrays

        batches = edgeprune.load_data(data, Path.cwd()).require("calibration")
        calibration = as_arrays(batch for batch, _ in zip(batches, range(CALIBRATION_BATCHES), strict=False))
    module, inputs = load(model, weights, shapes)
    artifact = edgeprune.export_model(
        module, inputs, out, format=name, precision=precision, calibration=calibration, sparse=sparse
    )
    found = None
    if cross_check:
        found = member.cross_check(out, calibration[0] if calibration else [x.numpy(force=True) for x in inputs])
        tools = {"tensorflow": found.runtimes[1][1], "cross-check": f"{found.output_error:.2g}"}
        artifact = replace(artifact, tools=artifact.tools | tools)
    show(artifact, as_json, "describe_artifact")
    if found is not None and not as_json:
        show(found, False, "describe_cross_check")


def find_precision(known: tuple[Precision, ...], dtype: str, activations: str | None) -> Precision:
    """The first of a format's precisions that fits. raises: UsageError listing them."""
    fitting = [each for each in known if each.dtype == dtype and activations in (None, each.activations)]
    if not fitting:
        raise UsageError(f"cannot write {dtype} {activations or ''}; known: {', '.join(each.name for each in known)}")
    return fitting[0]


def validate(
    artifact: Annotated[Path, typer.Argument(help="the exported file")], target: TargetName,
    model: Annotated[str, typer.Option(help="the same model in PyTorch: the reference for its outputs")],
    dense: Annotated[Path, typer.Option(help="the exported dense model: the reference for its costs")],
    plan: Annotated[Path, typer.Option(help="from `edgeprune plan`: the budgets and what was predicted")],
    data: Source, out: Out, weights: Weights = None, shapes: Shapes = None, threads: Threads = 1,
    runtime: RuntimeName = None, effort: EffortName = "default", meter: MeterName = None,
    statistic: Annotated[
        str | None, typer.Option(help="of the latency: median, p95; mean, worst of real inputs")
    ] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Run the artifact on the board and hold it against the host, the dense model and the budgets."""
    from edgeprune.core.budget import choose_statistic
    from edgeprune.core.records import Plan

    module, _ = load(model, weights, shapes)
    chosen = edgeprune.read_record(Plan, plan)
    budget = choose_statistic(chosen.budget, statistic)
    files = [load_member("formats", file.suffix.lstrip(".")).inspect(file) for file in (artifact, dense)]
    examples = edgeprune.collect_examples(module, edgeprune.load_data(data, Path.cwd()).require("test"), files[0])
    runtime = edgeprune.choose_runtime(target, runtime, files[0].format)
    with (
        bars() as progress,
        edgeprune.connect(target, threads=threads, runtime=runtime, meter=meter, progress=progress) as session,
    ):
        report = edgeprune.validate_artifact(
            files[0], session, dense=files[1], examples=examples, budget=budget, predicted=chosen.predicted,
            effort=find_effort(effort), progress=progress,
        )  # fmt: skip
    edgeprune.write_record(out, report)
    show(report, as_json, "summary", out.parent)
    raise_unmet(report)


class _BundleCommands(TyperGroup):
    """`edgeprune bundle MODEL ...` is `edgeprune bundle make MODEL ...`, as most of its uses are."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["make", *args]
        return super().parse_args(ctx, args)


bundle_app = typer.Typer(
    cls=_BundleCommands, no_args_is_help=True, help="What an app embeds: made of an artifact (bundle MODEL), verified."
)


@bundle_app.command("make")
def bundle(
    artifact: Annotated[Path, typer.Argument(help="the exported file")],
    plan: Annotated[Path, typer.Option(help="from `edgeprune plan`")],
    report: Annotated[Path, typer.Option(help="from `edgeprune validate`")],
    out: Out = Path("bundle.zip"),
    data: Annotated[str | None, typer.Option(help="takes labels, preprocessing and an example from it")] = None,
    kinds: Annotated[str, typer.Option("--for", help="python, cpp, android, several with commas, or all")] = "all",
    license: Annotated[str | None, typer.Option(help="SPDX identifier of the model's license")] = None,
    sign: Annotated[Path | None, typer.Option(help="PEM file of an Ed25519 private key")] = None,
) -> None:
    """Zip the artifact with its manifest, evidence, a recorded run and runnable examples."""
    from edgeprune.core.records import Plan, Report

    source = edgeprune.load_data(data, Path.cwd()) if data else None
    made = edgeprune.write_bundle(
        artifact, load_member("formats", artifact.suffix.lstrip(".")).inspect(artifact),
        edgeprune.read_record(Plan, plan), edgeprune.read_record(Report, report), out,
        labels=source.labels if source else None, preprocessing=source.preprocessing if source else None,
        kinds=("python", "cpp", "android") if kinds == "all" else kinds.split(","), license=license, key=sign,
        examples=source.example() if source else None,
    )  # fmt: skip
    print(f"{len(made.files)} files: {out}")


@bundle_app.command("verify")
def verify(
    file: Annotated[Path, typer.Argument(help="the bundle")],
    key: Annotated[Path | None, typer.Option(help="PEM file of the public key that it must be signed with")] = None,
    target: Annotated[str | None, typer.Option("--on", help="also run its example on this board")] = None,
) -> None:
    """Check every byte of a bundle, its signature, and what its example gives on a board."""
    made = edgeprune.verify_bundle(file, key=key)
    manifest = made.manifest
    signed = f"signed by {manifest['signer']}" if manifest["signer"] else "not signed"
    checked = "" if key or not manifest["signer"] else ", a key that you did not ask for (--key)"
    print(f"{file}: {len(made.files)} files unaltered, {signed}{checked}")
    if target is None:
        return
    runtime = edgeprune.choose_runtime(target, None, manifest["format"])
    with bars() as progress, edgeprune.connect(target, runtime=runtime, progress=progress) as session:
        check = edgeprune.try_bundle(file, session, key=key)
    print(check.note)
    if not check.passed:
        raise Unmet(f"{check.name}: outputs are {check.measured:.2g} off, relative; allowed {check.limit:g}")
    print(f"{check.name}: outputs as recorded ({check.measured:.2g} off, relative; allowed {check.limit:g})")


def inspect(
    file: Annotated[Path, typer.Argument(help="a model (.onnx, .tflite), a bundle (.zip) or a record (.json)")],
    as_json: AsJson = False,
) -> None:
    """Operations, shapes, types, sizes and MACs of a model or bundle, and what was measured; or a record as JSON."""
    if file.suffix == ".json":
        show(edgeprune.read_any_record(file), True, "")
        return
    if file.suffix == ".zip":
        edgeprune.verify_bundle(file)
    show(edgeprune.inspect_file(file), as_json, "describe_inspection")


def report(
    directory: Annotated[Path, typer.Argument(help="the folder of a run")],
    out: Annotated[Path | None, typer.Option("--out", "-o")] = None,
) -> None:
    """One self-contained HTML page with the evidence of a run."""
    print(edgeprune.report_run(directory, out or directory / "report.html"))


COMMANDS = (trace, profile, score, plan, compact, sparsify, pivot, recover, gate, export, validate, inspect, report)
