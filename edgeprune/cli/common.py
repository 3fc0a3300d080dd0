"""Options and helpers that the commands share."""

from __future__ import annotations

import json
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
    from edgeprune.core.records import Graph, Report
    from edgeprune.load import Batches

Model = Annotated[str, typer.Argument(help="path.py:function, package.module:function, a .pt2 or an .onnx file")]
Weights = Annotated[Path | None, typer.Option(help=".safetensors, or a state dict")]
Shapes = Annotated[list[str] | None, typer.Option("--input", help="shape of an input, batch first: 1x3x224x224")]
Inexact = Annotated[bool, typer.Option("--allow-inexact", help="also prune across layer norms")]
Scope = Annotated[str | None, typer.Option(help="a submodule to take instead of a model that cannot be exported")]
Freeze = Annotated[list[str] | None, typer.Option(help="group or module that keeps all channels, such as head*")]
Only = Annotated[list[str] | None, typer.Option(help="groups or modules that may lose channels, and no others")]
Step = Annotated[int, typer.Option(help="channels of a layer fall by multiples of it")]
Tie = Annotated[list[str] | None, typer.Option(help="groups that keep as many channels each, such as layer1.*")]
MinWidth = Annotated[int, typer.Option(help="channels that are left of a layer at least")]
TargetName = Annotated[str, typer.Option("--target", help="a board of the inventory (edgeprune targets list)")]
EffortName = Annotated[str, typer.Option("--effort", help="board time: quick, default or thorough")]
Threads = Annotated[int, typer.Option(min=1, help="threads of the runtime on the board")]
MeterName = Annotated[str | None, typer.Option("--meter", help="what measures power, instead of the target's own")]
RuntimeName = Annotated[
    str | None, typer.Option("--runtime", help="what executes it on the board, instead of the target's own")
]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, float16, dynamic or int8")]
Out = Annotated[Path, typer.Option("--out", "-o", help="where to write the result")]
Source = Annotated[str, typer.Option("--data", help="path.py:function, package.module:function or .npz")]
Executor = Annotated[str, typer.Option(help="where independent work is done: here, processes:workers=4, ray")]
AsJson = Annotated[bool, typer.Option("--json", help="print the record as JSON")]
UNMEASURED = "not measured"
Limit = Annotated[str | None, typer.Option(help="absolute, such as 12ms or 2MiB, or 0.5x of the dense model")]


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
    place = {"file": model} if model.endswith((".pt2", ".onnx")) else {"factory": model}
    spec = ModelSpec(**place, weights=str(weights) if weights else None, inputs=inputs)
    module = edgeprune.load_model(spec, Path.cwd())
    return module, edgeprune.example_inputs(spec, module)


def shapes_of(inputs: tuple[Tensor, ...]) -> list[str]:
    """As `--input` takes them."""
    return ["x".join(str(size) for size in tensor.shape) for tensor in inputs]


def load_graph(
    model: str, weights: Path | None, shapes: list[str] | None, allow_inexact: bool, scope: str | None = None
) -> tuple[nn.Module, tuple[Tensor, ...], Graph]:
    """The module, or the submodule that is its scope, its example inputs and its graph."""
    module, inputs = load(model, weights, shapes)
    if scope is not None:
        module, inputs = edgeprune.enter_scope(module, scope, inputs)
    return module, inputs, edgeprune.trace_graph(module, inputs, allow_inexact=allow_inexact)


def load_calibration(
    data: str, taken: nn.Module, model: str, weights: Path | None, shapes: list[str] | None, scope: str | None
) -> Batches:
    """The calibration batches, as the scope sees them. taken: the module that was loaded, or its scope."""
    from edgeprune.graphs.ports import get_ports

    batches = edgeprune.load_data(data, Path.cwd(), get_ports(taken).inputs).require("calibration")
    return batches if scope is None else edgeprune.scope_batches(load(model, weights, shapes)[0], scope, batches)


def rule_widths(
    graph: Graph, freeze: list[str] | None, only: list[str] | None, tie: list[str] | None, step: int, min_width: int
) -> Graph:
    """The graph with what the user says about widths."""
    from edgeprune.core.records import WidthRules
    from edgeprune.core.rules import apply_rules

    patterns = {"freeze": tuple(freeze or ()), "only": tuple(only or ()), "tie": tuple(tie or ())}
    return apply_rules(graph, WidthRules(**patterns, step=step, least=min_width))


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
