"""Whole runs: built-in or described by a run file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import edgeprune
from edgeprune.cli.common import AsJson, Limit, Out, bars, raise_unmet, show


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


COMMANDS = (demo, run)
