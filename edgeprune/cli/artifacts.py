"""From the model to what ships: `export`, `validate`, `bundle`, `inspect`, `report`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import edgeprune
from edgeprune.cli.common import (
    AsJson,
    Dtype,
    EffortName,
    MeterName,
    Model,
    Out,
    RuntimeName,
    Shapes,
    Source,
    TargetName,
    Threads,
    Weights,
    bars,
    load,
    raise_unmet,
    show,
)
from edgeprune.core.effort import find_effort
from edgeprune.core.errors import Unmet, UsageError
from edgeprune.core.family import load_member

if TYPE_CHECKING:
    from edgeprune.core.records import Precision

CALIBRATION_BATCHES = 8


def export(
    model: Model, out: Out, weights: Weights = None, shapes: Shapes = None,
    format: Annotated[str | None, typer.Option(help="onnx or tflite; by default as the file's name says")] = None,
    dtype: Dtype = "float32",
    activations: Annotated[str | None, typer.Option(help="of int8: uint8, int8, symmetric (TensorRT)")] = None,
    data: Annotated[str | None, typer.Option(help="int8 takes the ranges of activations from it")] = None,
    sparse: Annotated[bool, typer.Option("--sparse", help="1x1 convolutions without their zeros (tflite)")] = False,
    opset: Annotated[
        int | None, typer.Option(help="of an ONNX file; 17, which most boards read, where its operators allow")
    ] = None,
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
        module,
        inputs,
        out,
        format=name,
        precision=precision,
        calibration=calibration,
        sparse=sparse,
        opset=opset,
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
    sparsity: Annotated[
        Path | None, typer.Option(help="from `edgeprune sparsify`: the model's zeros, for the report")
    ] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Run the artifact on the board and hold it against the host, the dense model and the budgets."""
    from edgeprune.core.budget import choose_statistic
    from edgeprune.core.records import Plan, Sparsity

    module, _ = load(model, weights, shapes)
    chosen = edgeprune.read_record(Plan, plan)
    zeros = edgeprune.read_record(Sparsity, sparsity) if sparsity is not None else None
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
            effort=find_effort(effort), sparsity=zeros, progress=progress,
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


COMMANDS = (export, validate, inspect, report)
