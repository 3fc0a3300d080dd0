"""What else changes a model, by training or before it: `sparsify`, `pivot`, `recover`, `gate`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import edgeprune
from edgeprune.cli.common import (
    UNMEASURED,
    AsJson,
    EffortName,
    Limit,
    Model,
    Out,
    RuntimeName,
    Shapes,
    Source,
    Threads,
    Weights,
    bars,
    load,
    load_calibration,
    load_graph,
    shapes_of,
    show,
)
from edgeprune.core.effort import find_effort
from edgeprune.core.errors import Unmet, UsageError
from edgeprune.training.options import EPOCHS, MACS, PRUNED, check_options

if TYPE_CHECKING:
    from edgeprune.recover import Data


def recover(
    model: Model, data: Source, out: Out, weights: Weights = None, shapes: Shapes = None, epochs: int = 5,
    lr: float = 0.02, teacher: Annotated[str | None, typer.Option(help="distil from this model as well")] = None,
    teacher_weights: Weights = None,
    regularizer: Annotated[str | None, typer.Option(
        help="drive whole units of the model to zero, for a plan to remove: a name, or name:option=value,..."
    )] = None,
    scope: Annotated[str | None, typer.Option(help="the submodule of --teacher that the model is to replace")] = None,
    start: Annotated[str, typer.Option(help="from the weights it has (pruned), or from new ones (scratch)")] = PRUNED,
    budget: Annotated[str, typer.Option(
        help="of a training from scratch: epochs, or macs: as many epochs more as --teacher has more MACs"
    )] = EPOCHS,
    ema: Annotated[float, typer.Option(help="decay of an average of the weights, such as 0.999; 0: none")] = 0.0,
    label_smoothing: Annotated[float, typer.Option(help="share of the labels that is spread over all")] = 0.0,
    mixup: Annotated[float, typer.Option(help="alpha of examples that are mixed, such as 0.2; 0: none")] = 0.0,
    features: Annotated[float, typer.Option(help="weight of attention transfer from --teacher, such as 1")] = 0.0,
    seed: int = 0,
) -> None:  # fmt: skip
    """Train a model, compact or not; goes on where it was stopped. Writes recovered.pt2, recover.json in --out.

    Without labels, and for a scope, it learns the outputs of --teacher alone. `accelerate launch -m edgeprune recover`
    trains in several processes, each on a part of every batch.
    """
    from edgeprune.core.runfolder import RunFolder
    from edgeprune.training.processes import find_processes

    if scope is not None and teacher is None:
        raise UsageError("--scope is a submodule of the model whose outputs are learnt: name that with --teacher")
    options: dict[str, Any] = {
        "start": start, "ema": ema, "label_smoothing": label_smoothing, "mixup": mixup, "features": features,
    }  # fmt: skip
    check_options(
        **options, budget=budget, taught=teacher is not None, match_outputs=scope is not None, regularizer=regularizer
    )
    if budget == MACS and teacher is None:
        raise UsageError("--budget macs compares with the dense model: name that with --teacher")
    processes = find_processes()
    if scope is not None and processes.device is not None:
        raise UsageError("--scope is trained by one process, without a launcher")
    module, inputs = load(model, weights, shapes if scope is None else None)
    graph = None if regularizer is None else edgeprune.trace_graph(module, inputs)
    taught = shapes or (shapes_of(inputs) if scope is None else None)  # a .pt2 knows its own, a factory does not
    guide, seen = load(teacher, teacher_weights, taught) if teacher else (None, ())
    source = edgeprune.load_data(data, Path.cwd())
    batches: Data = source
    if scope is not None and guide is not None:
        batches, guide = edgeprune.scope_data(guide, scope, source), edgeprune.enter_scope(guide, scope, seen)[0]
    if budget == MACS and guide is not None:
        from edgeprune.training.scratch import epochs_of_equal_work

        dense, ours = (edgeprune.trace_graph(each, inputs) for each in (guide, module))
        epochs = epochs_of_equal_work(epochs, dense, ours)
        if processes.main:
            print(f"{epochs} epochs, as much arithmetic as those of the dense model")
    for each in (module, guide):
        if each is not None and processes.device is not None:
            each.to(processes.device)
    # Of a run that was killed the launched training may still be there, and would write into this one.
    with bars() as progress, RunFolder(out).locked(".recover.lock") if processes.main else nullcontext():
        result = edgeprune.recover_accuracy(
            module, batches, teacher=guide, epochs=epochs, lr=lr, checkpoint=out / "recover.checkpoint",
            progress=progress, regularizer=regularizer, graph=graph, seed=seed,
            processes=processes, **options,
            match_outputs=scope is not None or not (source.labelled or guide is None),
        )  # fmt: skip
        processes.end()
        if processes.main:
            edgeprune.save_compact(module.cpu(), inputs, out, name="recovered")
            edgeprune.write_record(out / "recover.json", result)
    if not processes.main:
        return
    if regularizer is not None:
        print(f"{sum(result.zeroed.values())} units in {len(result.zeroed)} groups are zero")
    said = f"accuracy {_arrow(result.accuracy_before, result.accuracy_after)}"
    if result.difference_after is not None:
        said = f"difference from the dense outputs {_arrow(result.difference_before, result.difference_after)}"
    print(f"{said}: {out}/recovered.pt2{result.note and '; ' + result.note}")


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
    guide = load(teacher, teacher_weights, shapes or shapes_of(inputs))[0] if teacher else module
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


COMMANDS = (sparsify, pivot, recover, gate)
