"""Whole runs: built-in or described by a run file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import edgeprune
from edgeprune.cli.common import AsJson, Limit, Out, bars, raise_unmet, show
from edgeprune.core.errors import Unmet


def demo(out: Out = Path("runs/demo"), latency: Limit = "0.5x") -> None:
    """The whole pipeline on built-in data and an embedded SSH board."""
    from edgeprune.demo import write_demo

    with bars() as progress:
        run_file = write_demo(out, latency or "0.5x", progress)
    run(run_file)


def run(
    file: Annotated[Path, typer.Argument(help="the run file")] = Path("edgeprune.toml"),
    format: Annotated[str | None, typer.Option(help="onnx or tflite, instead of what the file says")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16, dynamic, int8 or auto, likewise")] = None,
    as_json: AsJson = False,
) -> None:
    """The whole pipeline on yours; resumes where it stopped."""
    from edgeprune.core.runfile import read_run_file

    settings = read_run_file(file, format=format, dtype=dtype)
    with bars() as progress:
        report = edgeprune.run_pipeline(settings, file.parent, progress)
    show(report, as_json, "summary", file.parent / settings.output.dir)
    raise_unmet(report)


def compare(
    file: Annotated[Path, typer.Argument(help="the run file")] = Path("edgeprune.toml"),
    executor: Annotated[
        str | None, typer.Option(help="where recipes are carried out, instead of the run file's: here, processes, ray")
    ] = None,
    targets: Annotated[str | None, typer.Option(help="boards of a kind that share them, such as pi4-a,pi4-b")] = None,
    as_json: AsJson = False,
) -> None:
    """The run and its recipes to one measured latency: which is best, and did pruning pay?"""
    from edgeprune.core.runfile import read_run_file

    settings = read_run_file(file)
    boards = [name for name in (targets or "").split(",") if name]
    with bars() as progress:
        comparison = edgeprune.compare_recipes(
            settings, file.parent, executor=executor, targets=boards, progress=progress
        )
    show(comparison, as_json, "describe_comparison")
    page = file.parent / settings.output.dir / "compare.html"
    print(f"\n{page}", file=sys.stderr)
    if missed := [one for one in comparison.outcomes if not one.met]:
        raise Unmet("not met: " + "; ".join(f"{one.recipe}: {one.note}" for one in missed))


COMMANDS = (demo, run, compare)
