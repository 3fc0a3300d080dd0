"""EigenDamage beside the criteria of its paper, at equal numbers of parameters, on real images.

    python tools/bench_eigendamage.py [--quick] [--data DIR] [--net resnet20] [--ratio 4] [--epochs 5] [--rounds 1]

ResNet-20 and WRN-16-2 with a half, a quarter and an eighth of their parameters. Every method ranks all units by its
own score, in one list for the whole net, and removes the lowest, at most 95 % of a group: c_obd, c_obs, kron_obd and
kron_obs the channels of the net, eigen_damage those between the three layers that the transform kfe makes of one, and
so does kfe+kron_obd, whose score knows that the taps of a window are not independent. Layers that save nothing so are
put back whole. Layers behind removed channels are refitted by least squares (`--no-refit`: only batch-norm statistics
are taken anew, as in the paper), accuracy is measured, and then all get the same training, distilling from the dense
net. `--rounds` prunes in steps and trains in between; then the bases are turned again.
Needs `pip install .[bench,demo]`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cifar import NETS, Cifar, load_net, log, make_parser, read_options, show

from edgeprune.compact import compact_model
from edgeprune.compensation.batch_norm import reestimate_batch_norm
from edgeprune.compensation.least_squares import compensate
from edgeprune.core.cost import count_macs, count_parameters
from edgeprune.core.records import Graph, Importance
from edgeprune.plan import keep_units
from edgeprune.recover import evaluate_accuracy, recover_accuracy
from edgeprune.score import score_groups
from edgeprune.trace import trace_graph
from edgeprune.transform import inner_groups, restore_layers, transform_model
from edgeprune.transforms.kfe import savings

RIVALS = ("c_obd", "c_obs", "kron_obd", "kron_obs")
OURS = {"eigen_damage": "eigen_damage", "kfe+kron_obd": "kron_obd"}
"""Methods that prune in the eigenbasis, with their criterion."""
INPUTS = (torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)),)
MOST = 0.95
"""Share of a group that may go, as in the paper."""


@dataclass
class Row:
    """One pruned net: parameters and multiply-adds as shares of the dense net's, top-1 in [0, 1]."""

    method: str
    ratio: float
    parameters: float
    macs: float
    before: float
    after: float | None
    seconds: float


def main() -> None:
    """Run the nets, print the tables and the RESULT line."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--net", action="append", choices=sorted(NETS), help="only this net (repeatable)")
    parser.add_argument("--ratio", action="append", type=float, help="how many times fewer parameters (repeatable)")
    parser.add_argument("--method", action="append", choices=[*OURS, *RIVALS], help="only this one (repeatable)")
    parser.add_argument("--quick", action="store_true", help="one net, two ratios, one epoch of 6 400 images")
    parser.add_argument("--epochs", type=int, help="epochs of training (default 5, quick 1; 0: none)")
    parser.add_argument("--rounds", type=int, default=1, help="steps in which to prune")
    parser.add_argument(
        "--refit", action=argparse.BooleanOptionalAction, default=True, help="refit layers behind removed channels"
    )
    parser.add_argument("--examples", type=int, default=512, help="calibration examples that scores are taken on")
    options, folder = read_options(parser)
    sizes = {"train": 6_400, "test": 2_000} if options.quick else {}
    data = Cifar(folder, calibration=options.examples, **sizes)
    epochs = options.epochs if options.epochs is not None else (1 if options.quick else 5)
    aims: dict[str, dict[str, object]] = {}
    for name in options.net or (["resnet20"] if options.quick else list(NETS)):
        net = load_net(name, folder)
        dense = evaluate_accuracy(net, data.test)
        rows = []
        for ratio in options.ratio or ([2.0, 4.0] if options.quick else [2.0, 4.0, 8.0]):
            for method in options.method or [*OURS, *RIVALS]:
                rows.append(bench(net, data, method, ratio, epochs, options.rounds, refit=options.refit))
                log(f"  {name} {rows[-1]}")
        print_table(name, dense, rows)
        aims |= compare(name, rows)
    print("RESULT " + json.dumps({"aims": aims}))


def bench(net: nn.Module, data: Cifar, method: str, ratio: float, epochs: int, rounds: int, *, refit: bool) -> Row:
    """Prune and train one net by one method."""
    start, model, graph = time.perf_counter(), net, trace_graph(net, INPUTS)
    dense, after = count_parameters(graph, {}), None
    for step in range(1, rounds + 1):
        model = prune(model, data, method, int(dense / ratio ** (step / rounds)), refit=refit)
        before = evaluate_accuracy(model, data.test)
        if epochs:
            after = recover_accuracy(model, data, teacher=net, epochs=epochs, lr=0.02, progress=show).accuracy_after
    small = trace_graph(model, INPUTS)
    return Row(
        method=method, ratio=ratio, before=before, after=after, seconds=time.perf_counter() - start,
        parameters=count_parameters(small, {}) / dense, macs=count_macs(small, {}) / count_macs(graph, {}),
    )  # fmt: skip


def prune(model: nn.Module, data: Cifar, method: str, limit: int, *, refit: bool) -> nn.Module:
    """A copy with at most `limit` parameters: the lowest scores of the whole net go."""
    ours = method in OURS
    if ours:
        model, _ = transform_model(model, data.calibration)
    graph = trace_graph(model, INPUTS)
    importance = score_groups(
        model, INPUTS, graph, data.calibration, criterion=OURS.get(method, method), curves=False, progress=show
    )
    names = inner_groups(graph, list(savings(graph, {}))) if ours else {group.name for group in graph.prunable}
    widths = lowest_removed(graph, importance, names, limit)
    unpaid = [path for path, saved in savings(graph, widths).items() if saved <= 0]
    whole = inner_groups(graph, unpaid)
    keep = {name: kept for name, kept in keep_units(importance, widths, graph).items() if name not in whole}
    smaller = compact_model(model, INPUTS, graph, keep)
    if not (refit and compensate(smaller, model, graph, keep, data.calibration)):
        reestimate_batch_norm(smaller, data.calibration)
    if unpaid:
        restore_layers(smaller, unpaid, "kfe")
    return smaller.eval()


def lowest_removed(graph: Graph, importance: Importance, names: set[str], limit: int) -> dict[str, int]:
    """Widths after removing as few of the lowest-scored units as bring the parameters down to the limit.

    raises: SystemExit when even the most that may go leaves more.
    """
    ranked: list[tuple[float, str]] = []
    for name in names:
        scores = np.sort(importance.scores[name])
        ranked += [(float(value), name) for value in scores[: math.floor(MOST * len(scores))]]
    ranked.sort()

    def widths(removed: int) -> dict[str, int]:
        gone = Counter(name for _, name in ranked[:removed])
        return {name: graph.units[name] - gone[name] for name in names}

    def parameters(removed: int) -> float:
        at = widths(removed)
        return count_parameters(graph, at) + sum(min(saved, 0) for saved in savings(graph, at).values())

    if parameters(len(ranked)) > limit:
        raise SystemExit(f"{importance.criterion} cannot reach {limit} parameters")
    low, high = 0, len(ranked)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if parameters(middle) <= limit else (middle + 1, high)
    return widths(low)


def print_table(name: str, dense: float, rows: list[Row]) -> None:
    """One net's rows, by ratio."""
    print(f"\n{name}: top-1 before and after training; dense {dense:.2%}")
    print(f"{'fewer':>5} {'method':14} {'parameters':>10} {'MACs':>7} {'before':>8} {'after':>8} {'s':>6}")
    for row in rows:
        after = "-" if row.after is None else f"{row.after:.2%}"
        print(f"{row.ratio:4.0f}x {row.method:14} {row.parameters:10.3f} {row.macs:7.3f} {row.before:8.2%} {after:>8} "
              f"{row.seconds:6.0f}")  # fmt: skip


def compare(name: str, rows: list[Row]) -> dict[str, dict[str, object]]:
    """Pruning in the eigenbasis against the best of the others at each ratio."""
    aims: dict[str, dict[str, object]] = {}
    for ours in (row for row in rows if row.method in OURS):
        rivals = [row for row in rows if row.ratio == ours.ratio and row.method not in OURS]
        for when in ("before", "after"):
            values = [value for row in rivals if (value := getattr(row, when)) is not None]
            if values and (mine := getattr(ours, when)) is not None:
                aims[f"{name} {ours.ratio:g}x {ours.method} {when} training"] = {
                    "value": round(mine, 4), "aim": f">= {max(values):.4f}", "met": mine >= max(values),
                }  # fmt: skip
    return aims


if __name__ == "__main__":
    main()
