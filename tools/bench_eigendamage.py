"""EigenDamage beside the criteria of its paper, at equal numbers of parameters or at equal latency, on real images.

    python tools/bench_eigendamage.py [--quick] [--data DIR] [--net resnet20] [--ratio 4] [--epochs 5] [--rounds 1]
    python tools/bench_eigendamage.py --speed-up 1.5 [--board embedded|icount|icount-a76] [...]

ResNet-20 and WRN-16-2 with a half, a quarter and an eighth of their parameters, or with --speed-up that many times
faster as measured on the board (ONNX Runtime, one thread; widths on multiples of four). Every method ranks all units by
its own score, in one list for the whole net, and removes the lowest, at most 95 % of a group: c_obd, c_obs, kron_obd
and kron_obs the channels of the net, eigen_damage those between the three layers that the transform kfe makes of one,
and so does kfe+kron_obd, whose score knows that the taps of a window are not independent. Layers that save nothing so
are put back whole. Layers behind removed channels are refitted by least squares (`--no-refit`: only batch-norm
statistics are taken anew, as in the paper), accuracy is measured, and then all get the same training, distilling from
the dense net. `--rounds` prunes in steps and trains in between; then the bases are turned again.
Needs `pip install .[bench,demo]`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_accuracy import Board
from bench_profile import open_board
from cifar import NETS, Cifar, load_net, log, make_parser, read_options, show

from edgeprune.compact import compact_model
from edgeprune.compensation.batch_norm import reestimate_batch_norm
from edgeprune.compensation.least_squares import compensate
from edgeprune.core.cost import count_macs, count_parameters
from edgeprune.core.effort import EFFORTS, NOISELESS
from edgeprune.core.records import Graph, Importance
from edgeprune.device.session import open_session
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
Train = Callable[[nn.Module], float | None]
STEP = 4
"""Channels of a layer are multiples of it where latency counts: others leave ONNX Runtime's blocked layout."""


@dataclass
class Row:
    """One pruned net: parameters, multiply-adds and latency as shares of the dense net's, top-1 in [0, 1].

    ratio: how many times fewer parameters, or how many times faster, were asked for.
    """

    method: str
    ratio: float
    parameters: float
    macs: float
    latency: float | None
    before: float
    after: float | None
    seconds: float


def main() -> None:
    """Run the nets, print the tables and the RESULT line."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--net", action="append", choices=sorted(NETS), help="only this net (repeatable)")
    parser.add_argument("--ratio", action="append", type=float, help="how many times fewer parameters (repeatable)")
    parser.add_argument("--speed-up", action="append", type=float, help="how many times faster instead (repeatable)")
    parser.add_argument("--board", choices=["embedded", "icount", "icount-a76"], default="embedded")
    parser.add_argument("--method", action="append", choices=[*OURS, *RIVALS], help="only this one (repeatable)")
    parser.add_argument("--quick", action="store_true", help="one net, two ratios, one epoch of 6 400 images")
    parser.add_argument("--epochs", type=int, help="epochs of training (default 5, quick 1; 0: none)")
    parser.add_argument("--lr", type=float, default=0.02, help="of that training")
    parser.add_argument("--rounds", type=int, default=1, help="steps in which to prune")
    parser.add_argument(
        "--refit", action=argparse.BooleanOptionalAction, default=True, help="refit layers behind removed channels"
    )
    parser.add_argument("--examples", type=int, default=512, help="calibration examples that scores are taken on")
    options, folder = read_options(parser)
    if options.speed_up and (options.ratio or options.rounds > 1):
        parser.error("--speed-up goes with neither --ratio nor --rounds")
    sizes = {"train": 6_400, "test": 2_000} if options.quick else {}
    data = Cifar(folder, calibration=options.examples, **sizes)
    epochs = options.epochs if options.epochs is not None else (1 if options.quick else 5)
    aims: dict[str, dict[str, object]] = {}
    for name in options.net or (["resnet20"] if options.quick else list(NETS)):
        net = load_net(name, folder)
        dense = evaluate_accuracy(net, data.test)
        rows: list[Row] = []

        def train(model: nn.Module, teacher: nn.Module = net) -> float | None:
            if not epochs:
                return None
            settings = {"teacher": teacher, "epochs": epochs, "lr": options.lr}
            return recover_accuracy(model, data, progress=show, **settings).accuracy_after

        methods = options.method or [*OURS, *RIVALS]
        with open_board(options.board) if options.speed_up else nullcontext() as target:
            if target is None:
                for ratio in options.ratio or ([2.0, 4.0] if options.quick else [2.0, 4.0, 8.0]):
                    for method in methods:
                        rows.append(bench(net, data, method, ratio, train, options.rounds, refit=options.refit))
                        log(f"  {name} {rows[-1]}")
            else:
                with open_session(target, space="bench-eigendamage") as session:
                    board = Board(session, net, EFFORTS["quick"] if options.board == "embedded" else NOISELESS)
                    for method in methods:
                        rows += bench_latency(net, data, method, options.speed_up, train, board, refit=options.refit)
        rows.sort(key=lambda row: row.ratio)
        print_table(name, dense, rows)
        aims |= compare(name, rows)
    print("RESULT " + json.dumps({"aims": aims}))


def bench(net: nn.Module, data: Cifar, method: str, ratio: float, train: Train, rounds: int, *, refit: bool) -> Row:
    """Prune and train one net by one method."""
    start, model, graph = time.perf_counter(), net, trace_graph(net, INPUTS)
    dense, after = count_parameters(graph, {}), None
    for step in range(1, rounds + 1):
        pruner = Pruner(model, data, method)
        model = pruner.make(pruner.fewest(pruner.has_parameters(int(dense / ratio ** (step / rounds)))), refit=refit)
        before = evaluate_accuracy(model, data.test)
        after = train(model)
    return describe(graph, model, method, ratio, before, after, time.perf_counter() - start)


def bench_latency(
    net: nn.Module, data: Cifar, method: str, speed_ups: list[float], train: Train, board: Board, *, refit: bool
) -> list[Row]:
    """Prune one net by one method to several latencies that the board measures, and train what is left."""
    pruner, graph, rows = Pruner(net, data, method, step=STEP), trace_graph(net, INPUTS), []
    shares: dict[int, float] = {}

    def share(removed: int) -> float:
        if removed not in shares:
            shares[removed] = board.share(pruner.make(pruner.widths(removed), refit=None))
        return shares[removed]

    for speed_up in speed_ups:
        start = time.perf_counter()
        widths = pruner.fewest(lambda removed, limit=1 / speed_up: share(removed) <= limit)
        model = pruner.make(widths, refit=refit)
        latency, before = board.share(model), evaluate_accuracy(model, data.test)
        after = train(model)
        rows.append(describe(graph, model, method, speed_up, before, after, time.perf_counter() - start, latency))
        log(f"  {rows[-1]}")
    return rows


def describe(
    graph: Graph, model: nn.Module, method: str, ratio: float, before: float, after: float | None, seconds: float,
    latency: float | None = None,
) -> Row:  # fmt: skip
    """The row of a net. graph: the dense net's."""
    small = trace_graph(model, INPUTS)
    return Row(
        method=method, ratio=ratio, before=before, after=after, seconds=seconds, latency=latency,
        parameters=count_parameters(small, {}) / count_parameters(graph, {}),
        macs=count_macs(small, {}) / count_macs(graph, {}),
    )  # fmt: skip


class Pruner:
    """One net and all its units in the order of a method's scores, the lowest first.

    step: channels of a layer are multiples of it.
    """

    def __init__(self, model: nn.Module, data: Cifar, method: str, *, step: int = 1) -> None:
        self.ours, self.data, self.step = method in OURS, data, step
        self.model = transform_model(model, data.calibration)[0] if self.ours else model
        self.graph = trace_graph(self.model, INPUTS)
        self.importance = score_groups(
            self.model, INPUTS, self.graph, data.calibration, criterion=OURS.get(method, method), curves=False,
            progress=show,
        )  # fmt: skip
        inner = inner_groups(self.graph, list(savings(self.graph, {})))
        self.names = inner if self.ours else {group.name for group in self.graph.prunable}
        self.ranked: list[str] = self._rank(self.importance)

    def _rank(self, importance: Importance) -> list[str]:
        found: list[tuple[float, str]] = []
        for name in self.names:
            scores = np.sort(importance.scores[name])
            found += [(float(value), name) for value in scores[: math.floor(MOST * len(scores))]]
        return [name for _, name in sorted(found)]

    def widths(self, removed: int) -> dict[str, int]:
        """Of every group when so many units are gone, and as many more as fill up a step are not."""
        gone, units = Counter(self.ranked[:removed]), self.graph.units
        return {name: min(units[name], -(-(units[name] - gone[name]) // self.step) * self.step) for name in self.names}

    def has_parameters(self, limit: int) -> Callable[[int], bool]:
        """Whether a net without so many units has at most so many parameters, layers that save nothing put back."""

        def fits(removed: int) -> bool:
            at = self.widths(removed)
            return count_parameters(self.graph, at) + sum(min(s, 0) for s in savings(self.graph, at).values()) <= limit

        return fits

    def fewest(self, fits: Callable[[int], bool]) -> dict[str, int]:
        """Widths after removing as few units as do. raises: SystemExit when even the most that may go do not."""
        if not fits(len(self.ranked)):
            raise SystemExit(f"{self.importance.criterion} does not get that far")
        low, high = 0, len(self.ranked)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle + 1, high)
        return self.widths(low)

    def make(self, widths: Mapping[str, int], *, refit: bool | None) -> nn.Module:
        """The smaller net. refit: its layers, or else only take its statistics anew; None: leave it as cut."""
        unpaid = [path for path, saved in savings(self.graph, widths).items() if saved <= 0]
        whole = inner_groups(self.graph, unpaid)
        keep = {
            name: kept
            for name, kept in keep_units(self.importance, dict(widths), self.graph).items()
            if name not in whole
        }
        smaller = compact_model(self.model, INPUTS, self.graph, keep)
        calibration = self.data.calibration
        if refit is not None and not (refit and compensate(smaller, self.model, self.graph, keep, calibration)):
            reestimate_batch_norm(smaller, calibration)
        if unpaid:
            restore_layers(smaller, unpaid, "kfe")
        return smaller.eval()


def print_table(name: str, dense: float, rows: list[Row]) -> None:
    """One net's rows, by ratio."""
    print(f"\n{name}: top-1 before and after training; dense {dense:.2%}")
    header = (f"{title:>8}" for title in ("latency", "params", "MACs", "before", "after", "s"))
    print(f"{'asked':>6} {'method':14}", *header)
    for row in rows:
        after = "-" if row.after is None else f"{row.after:.2%}"
        latency = "-" if row.latency is None else f"{row.latency:.3f}"
        print(f"{row.ratio:5.3g}x {row.method:14} {latency:>8} {row.parameters:8.3f} {row.macs:8.3f} {row.before:8.2%} "
              f"{after:>8} {row.seconds:8.0f}")  # fmt: skip


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
