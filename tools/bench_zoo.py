"""Which models of torchvision and timm are traced, compacted and exported exactly, and how much of each can be pruned.

Each model is built without weights, its parameters made as training would leave them, and traced. Then random units
of every prunable group go, in three draws of which the last leaves one unit a group; `error` is the largest
difference between the smaller model and the dense one with those units masked, relative to the largest output; in
float64 where float32 comes near the limit.
The first draw is exported to ONNX and run on the host against the module; `in place` says whether the user's own
module can be sliced. Seconds are those of the processor, with one thread. `MACs` is the share of multiply-adds in
prunable groups; what keeps the others is listed below.
A model has a process and a time limit of its own; results are kept in a JSONL file, where a second call goes on.

With --onnx each model is first exported to ONNX, by torch's exporter or its older one, and taken from that file alone.

    python tools/bench_zoo.py [--quick] [--models PATTERN ...] [--log FILE] [--no-export] [--peer] [--onnx EXPORTER]
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import io
import json
import multiprocessing
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from exactness import LIMIT, random_keep, randomise, relative_error
from zoo import torchvision_models
from zoo_models import zoo

from edgeprune.compact import compact_model
from edgeprune.core.cost import mac_terms
from edgeprune.core.describe import prunable_macs
from edgeprune.core.errors import EdgepruneError
from edgeprune.core.records import Graph
from edgeprune.export import export_model
from edgeprune.formats.onnx import import_model
from edgeprune.graphs.capture import capture
from edgeprune.graphs.slice import mask_model, slice_captured
from edgeprune.trace import trace_captured

TIME_LIMIT_S = 240.0


def outputs(module: nn.Module, images: Tensor) -> list[Tensor]:
    """Every tensor that the module returns."""
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(module(images)) if isinstance(leaf, Tensor)]


def difference(ours: list[Tensor], reference: list[Tensor]) -> float:
    """Largest relative error over all outputs; infinite where one is not a number."""
    errors = [relative_error(a, b) for a, b in zip(ours, reference, strict=True)]
    return max(error if np.isfinite(error) else float("inf") for error in errors)


def through_onnx(module: nn.Module, images: Tensor, exporter: str) -> nn.Module:
    """The model as it comes back from an ONNX file that one of torch's exporters wrote for one example."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        path = Path(folder) / "model.onnx"
        if exporter == "dynamo":
            torch.onnx.export(module, (images,), path, dynamo=True, external_data=False, verbose=False)
        else:
            torch.onnx.export(module, (images,), str(path), dynamo=False, opset_version=17)
        return import_model(path)


def examine(name: str, export: bool, peer: bool, exporter: str | None = None) -> dict[str, Any]:
    """One row of the table; exporter: takes the model from an ONNX file of it."""
    build, shape = zoo()[name]
    torch.manual_seed(0)
    row: dict[str, Any] = {"model": name, "stage": "build"}
    try:
        module = randomise(build())
        images = torch.randn(2, *shape[1:])
        row |= {"stage": "trace", "parameters": sum(p.numel() for p in module.parameters())}
        dense = outputs(module, images)
        if exporter is not None:
            row["stage"] = "import"
            module = through_onnx(module, images[:1], exporter)
            row["import_error"] = difference(outputs(module, images), dense)
            row["stage"] = "trace"
        started = time.process_time()
        captured = capture(module, (images[:1],))
        graph = trace_captured(captured)
        row["trace_s"] = time.process_time() - started
        row |= {"stage": "compact", "groups": len(graph.prunable), "macs": prunable_macs(graph)}
        row |= {"kept": kept_macs(graph), "unsupported": dict(Counter(op for op, _ in graph.unsupported))}
        rng = np.random.default_rng(0)
        draws = [random_keep(graph, rng), random_keep(graph, rng, 0.0)]
        draws.append({group.name: np.array([rng.integers(group.units)]) for group in graph.prunable})
        row["errors"], row["changes"] = [], []
        for number, keep in enumerate(draws):
            started = time.process_time()
            compact = slice_captured(copy.deepcopy(captured), graph, keep).eval()
            row["compact_s"] = time.process_time() - started
            masked = mask_model(module, graph, keep)
            expected = outputs(masked, images)
            row["changes"].append(difference(dense, expected))
            error = difference(outputs(compact, images), expected)
            if error > LIMIT / 10:  # rounding, or more?
                wide = copy.deepcopy(compact).double(), masked.double()
                error = difference(*(outputs(each, images.double()) for each in wide))
            row["errors"].append(error)
            if not number:
                first = compact
        if export:
            row["stage"] = "export"
            with tempfile.TemporaryDirectory() as folder:
                export_model(first, (images[:1],), Path(folder) / "model.onnx", graph=graph)
            row |= {"stage": "in place", "onnx": True}
            row["in_place"] = exporter is None and sliced_in_place(module, images, graph, draws[0])
        row["stage"] = "done"
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        row["trace"] = traceback.format_exc().splitlines()[-12:]
    if peer:
        row["peer"] = examine_peer(build, shape)
    return row


def sliced_in_place(module: nn.Module, images: Tensor, graph: Graph, keep: Any) -> bool:
    """Whether the module's own code runs on its sliced layers."""
    try:
        compact_model(module, (images[:1],), graph, keep, in_place=True)
    except EdgepruneError:
        return False
    return True


def kept_macs(graph: Graph) -> dict[str, float]:
    """Share of the multiply-adds that no prunable group shrinks, by the reason that keeps them."""
    prunable = {group.name for group in graph.prunable}
    reasons = {group.name: group.frozen_because or "" for group in graph.groups}
    units, kept, total = graph.units, Counter[str](), 0.0
    for node, polynomial in mac_terms(graph).items():
        for names, coefficient in polynomial.items():
            macs = coefficient * float(np.prod([units[name] for name in names]))
            total += macs
            if not prunable & set(names):
                why = {reasons[name].rpartition(" at '")[0] or reasons[name] for name in names}
                kept[" | ".join(sorted(why)) or f"no channels at '{node}'"] += macs
    return {why: share / total for why, share in kept.most_common(6) if total}


def examine_peer(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> dict[str, Any]:
    """Torch-Pruning on the same model: half of every layer by magnitude; does the model still run?"""
    import torch_pruning

    images = torch.randn(shape)
    try:
        module = build().eval()
        started = time.process_time()
        heads = [part for part in module.modules() if isinstance(part, nn.Linear)][-1:]
        importance = torch_pruning.importance.MagnitudeImportance(p=2)
        options: dict[str, Any] = {"importance": importance, "pruning_ratio": 0.5, "ignored_layers": heads}
        torch_pruning.pruner.MetaPruner(module, images, **options).step()
        seconds = time.process_time() - started
        outputs(module, images)
    except Exception as error:
        return {"runs": False, "error": f"{type(error).__name__}: {str(error).strip()[:120]}"}
    return {"runs": True, "seconds": seconds}


def run_all(
    names: list[str], log: Path, export: bool, peer: bool, limit_s: float, exporter: str | None = None
) -> Iterator[dict[str, Any]]:
    """Rows as they come, those in the log first."""
    known = {row["model"]: row for row in map(json.loads, log.read_text().splitlines())} if log.exists() else {}
    torchvision_models()
    context = multiprocessing.get_context("fork")  # the libraries are imported once
    for name in names:
        if name not in known:
            receiving, sending = context.Pipe(duplex=False)
            send = lambda: sending.send(examine(name, export, peer, exporter))  # noqa: B023, E731
            process = context.Process(target=send, daemon=True)  # ends with this one
            process.start()
            sending.close()
            try:
                row = receiving.recv() if receiving.poll(limit_s) else {"error": f"took more than {limit_s:.0f} s"}
            except EOFError:
                row = {"error": "the process died"}
            process.kill()
            process.join()
            known[name] = {"model": name, **row}
            with log.open("a") as file:
                file.write(json.dumps(known[name]) + "\n")
        yield known[name]


def verdict(row: dict[str, Any]) -> str:
    """exact, frozen (nothing can be pruned), wrong, or what failed."""
    if "error" in row:
        return f"{row.get('stage', 'process')}: {row['error']}"
    if max(*row["errors"], row.get("import_error", 0.0)) >= LIMIT:
        return "WRONG"
    return "exact" if row["groups"] else "frozen"


def main() -> None:
    """Print the table, what keeps multiply-adds, and the result line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every fourth model, without export")
    parser.add_argument("--models", nargs="*", default=["*"], help="patterns of names, such as timm/*vit*")
    parser.add_argument("--log", type=Path, help="where rows are kept; those in it are not made again")
    parser.add_argument("--no-export", action="store_true", help="trace and compact only")
    parser.add_argument("--onnx", choices=("dynamo", "torchscript"), help="take each model from an ONNX file of it")
    parser.add_argument("--peer", action="store_true", help="Torch-Pruning beside it")
    parser.add_argument("--limit", type=float, default=TIME_LIMIT_S, help="seconds a model may take")
    options = parser.parse_args()
    if options.peer and find_spec("torch_pruning") is None:
        parser.error("--peer needs Torch-Pruning: pip install torch-pruning==1.6.1")
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; a second call with the same --log goes on"))
    names = [name for name in zoo() if any(fnmatch.fnmatch(name, pattern) for pattern in options.models)]
    names = names[::4] if options.quick else names
    export = not (options.quick or options.no_export)
    print(f"{'model':44s} groups   MACs     error  trace s  cut s  ONNX  in place  peer  verdict")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        log = options.log or Path(folder) / "zoo.jsonl"
        for row in run_all(names, log, export, options.peer, options.limit, options.onnx):
            rows.append(row)
            print(describe(row), flush=True)
    reasons = Counter[str]()
    for row in rows:
        reasons.update(row.get("kept", {}))
    print("\nwhat keeps multiply-adds, summed over the models (1 = all of one model)")
    for why, share in reasons.most_common(25):
        print(f"{share:7.2f}  {why}")
    print("\noperators without a rule:", dict(sum((Counter(r.get("unsupported", {})) for r in rows), Counter())))
    print("RESULT " + json.dumps({"aims": aims(rows)}))


def describe(row: dict[str, Any]) -> str:
    """A line of the table."""
    error = max(row["errors"], default=0.0) if row.get("errors") else None
    peer = row.get("peer")
    cells = (
        f"{row['model']:44s}",
        f"{row.get('groups', '-')!s:>6}",
        f"{row['macs']:6.1%}" if "macs" in row else f"{'-':>6}",
        f"{error:9.1e}" if error is not None else f"{'-':>9}",
        f"{row['trace_s']:8.1f}" if "trace_s" in row else f"{'-':>8}",
        f"{row['compact_s']:6.1f}" if "compact_s" in row else f"{'-':>6}",
        f"{'yes' if row.get('onnx') else '-':>5}",
        f"{ {True: 'yes', False: 'no'}.get(row.get('in_place'), '-'):>9}",  # type: ignore[call-overload]
        f"{'-' if peer is None else 'yes' if peer['runs'] else 'no':>5}",
        f" {verdict(row)}",
    )
    return " ".join(cells)


def aims(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of the models, against what they should be."""
    found: dict[str, Any] = {}
    for library, aim in (("torchvision", 1.0), ("timm", 0.95)):
        verdicts = [verdict(row) for row in rows if row["model"].startswith(library)]
        if verdicts:
            share = verdicts.count("exact") / len(verdicts)
            found[f"{library}_exact"] = {"value": share, "aim": f">= {aim:g}", "met": share >= aim}
    wrong = sum(verdict(row) == "WRONG" for row in rows)
    found["wrong"] = {"value": wrong, "aim": "== 0", "met": not wrong}
    return found


if __name__ == "__main__":
    main()
