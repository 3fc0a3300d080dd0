"""Accuracy at the same measured latency on real images: edgeprune beside Torch-Pruning.

    python tools/bench_cifar.py [--quick] [--data DIR] [--net wrn16_2] [--net resnet20]

WRN-16-2 to half and ResNet-20 to two thirds of its latency, as measured on the loopback board (ONNX
Runtime, one thread). Torch-Pruning 1.6.1's criteria are each pruned to the same measured latency: its
pruning ratio is bisected against the board. Everything then gets the same short training, which also
distils from the dense net. The default trains 5 epochs on 50 000 images, `--quick` one epoch on 6 400.
Needs `pip install .[bench,demo]`.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cifar import ACCURACY, NETS, Cifar, find_data, load_net

from edgeprune.compensation.batch_norm import reestimate_batch_norm
from edgeprune.core.budget import make_budget
from edgeprune.core.effort import EFFORTS, Effort
from edgeprune.core.records import Plan, Step
from edgeprune.core.stats import median, turn_ratios
from edgeprune.device.session import Session
from edgeprune.formats import onnx as onnx_format
from edgeprune.on_board import compact_and_compensate, connect, dense_cost, plan_on_board
from edgeprune.profile import profile_target
from edgeprune.recover import evaluate_accuracy, recover_accuracy
from edgeprune.score import score_groups
from edgeprune.trace import trace_graph

SPEED_UP = {"wrn16_2": 2.0, "resnet20": 1.5}
ROUND_TO = {"wrn16_2": 16, "resnet20": 8}
CRITERIA = ("magnitude", "taylor", "bn_scale", "hessian")
INPUTS = (torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)),)
TOLERANCE = 1.02
"""A measured latency this much over its limit still counts as equal to it: the timer's own spread."""


@dataclass
class Row:
    """One pruned net: how it was made, its latency as a share of the dense one's, and top-1 in [0, 1]."""

    name: str
    model: nn.Module
    share: float
    before: float = 0.0
    after: float = 0.0
    seconds: float = 0.0
    widths: str = ""


def main() -> None:
    """Run the nets, print the tables and the RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="folder with cifar10-*.npz (default: $EDGEPRUNE_DATA, ../shared/data)"
    )
    parser.add_argument("--net", action="append", choices=sorted(NETS), help="only this net (repeatable)")
    parser.add_argument("--criterion", action="append", choices=CRITERIA, help="only this rival (repeatable)")
    parser.add_argument("--quick", action="store_true", help="one epoch on 6 400 images, fewer measurements")
    parser.add_argument("--epochs", type=int, help="epochs of recovery (default 5, quick 1)")
    parser.add_argument("--threads", type=int, default=2, help="threads of training on this machine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = find_data(options.data)
    if folder is None:
        print("no cifar10-test.npz in --data, $EDGEPRUNE_DATA or ../shared/data: nothing to measure")
        print("RESULT " + json.dumps({"aims": {}, "skipped": "no data"}))
        return
    data = Cifar(folder, train=6_400, test=2_000) if options.quick else Cifar(folder)
    aims: dict[str, dict[str, object]] = {}
    for name in options.net or list(SPEED_UP):
        with connect("embedded") as session:
            rivals = options.criterion or list(CRITERIA)
            epochs = options.epochs or (1 if options.quick else 5)
            aims |= bench_net(name, folder, data, session, rivals, quick=options.quick, epochs=epochs)
    print("RESULT " + json.dumps({"aims": aims}))


def bench_net(
    name: str, folder: Path, data: Cifar, session: Session, rivals: list[str], *, quick: bool, epochs: int
) -> dict[str, dict[str, object]]:
    """Prune one net every way, train every outcome alike, print its table and give its aims."""
    net, limit = load_net(name, folder), 1 / SPEED_UP[name]
    dense = evaluate_accuracy(net, data.test)
    images = len(data.test.y)
    log(f"{name}: dense {dense:.2%} on {images} test images (its notes say {ACCURACY[name]:.1%} on 5000)")
    board = Board(session, net, EFFORTS["quick" if quick else "default"])
    rows = [prune_here(name, net, data, session, board, limit, quick)]
    for criterion in rivals:
        rows.append(prune_there(name, net, criterion, data, board, limit, steps=5 if quick else 8))
    for row in rows:
        start = time.perf_counter()
        result = recover_accuracy(row.model, data, teacher=net, epochs=epochs, lr=0.02, progress=show)
        row.after, row.seconds = result.accuracy_after or 0.0, time.perf_counter() - start
        log(f"  {row.name}: {row.before:.2%} -> {row.after:.2%} {result.note}")
    return report(name, dense, limit, rows)


def report(name: str, dense: float, limit: float, rows: list[Row]) -> dict[str, dict[str, object]]:
    """The table of one net, and its aims against the best rival at the same latency."""
    print(f"\n{name}: top-1 before and after recovery; dense {dense:.2%}; limit {limit:.3f} of the dense latency")
    print(f"{'method':28} {'latency/dense':>13} {'before':>8} {'after':>8} {'training s':>10}  kept")
    for row in rows:
        print(f"{row.name:28} {row.share:13.3f} {row.before:8.2%} {row.after:8.2%} {row.seconds:10.0f}  {row.widths}")
    ours, rivals = rows[0], [row for row in rows[1:] if fits_limit(row, limit)]
    if not rivals:
        print("Torch-Pruning reached the limit with no criterion; compared with its fastest")
        rivals = [min(rows[1:], key=lambda row: row.share)]
    before, after = max(row.before for row in rivals), max(row.after for row in rivals)
    return {
        f"{name} latency": aim(ours.share, "<=", limit * TOLERANCE),
        f"{name} before recovery": aim(ours.before, ">=", before),
        f"{name} after recovery": aim(ours.after, ">=", after),
    }


def aim(value: float, relation: str, wanted: float) -> dict[str, object]:
    """One entry of the RESULT line."""
    met = value <= wanted if relation == "<=" else value >= wanted
    return {"value": round(value, 4), "aim": f"{relation} {wanted:.4f}", "met": met}


# --- the two ways --------------------------------------------------------------------------------


def prune_here(
    name: str, net: nn.Module, data: Cifar, session: Session, board: Board, limit: float, quick: bool
) -> Row:
    """Profile, score, plan in a closed loop with the board, compact and compensate."""
    graph = trace_graph(net, INPUTS)
    log(f"  {name}: traced; scoring {len(graph.prunable)} groups")
    importance = score_groups(net, INPUTS, graph, data.calibration, examples=128 if quick else 512, progress=show)
    log("  scored; profiling")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.jsonl"
        profile = profile_target(
            net, INPUTS, graph, session, path=path, progress=show,
            configurations=24 if quick else 40, held_out=4 if quick else 8,
        )  # fmt: skip
        log("  profiled; planning")
        budget = make_budget(dense_cost(graph, profile), latency=f"{limit:.4f}x")
        plan: Plan = plan_on_board(net, INPUTS, graph, profile, importance, budget, session, path, progress=show)
    model = compact_and_compensate(net, INPUTS, graph, plan, data.calibration, progress=show)
    kept = " ".join(f"{width}/{graph.units[group]}" for group, width in plan.widths.items()
                    if width < graph.units[group])  # fmt: skip
    row = Row(f"edgeprune ({name})", model, board.share(model), evaluate_accuracy(model, data.test), widths=kept)
    log(f"  {row.name}: {row.share:.3f} of the dense latency, {row.before:.2%} before recovery; kept {kept}")
    return row


def prune_there(name: str, net: nn.Module, criterion: str, data: Cifar, board: Board, limit: float, steps: int) -> Row:
    """Torch-Pruning with one criterion, its global ratio bisected to the same measured latency."""
    low, high, best = 0.0, 0.95, None
    for _ in range(steps):
        ratio = (low + high) / 2
        model = torch_pruning(name, net, criterion, data, ratio)
        row = Row(f"torch-pruning {criterion}", model, board.share(model), widths=f"ratio {ratio:.3f}")
        fits = fits_limit(row, limit)
        # The slowest that fits; while none does, the fastest.
        best = (
            row if best is None else max(best, row, key=lambda one: one.share if fits_limit(one, limit) else -one.share)
        )
        low, high = (low, ratio) if fits else (ratio, high)
    assert best is not None
    plain = evaluate_accuracy(best.model, data.test)
    repaired = copy.deepcopy(best.model)
    reestimate_batch_norm(repaired, data.calibration)
    again = evaluate_accuracy(repaired, data.test)
    # It has no calibration step of its own; ours is lent to it, and the better start counts.
    best.before, best.model = (again, repaired) if again > plain else (plain, best.model)
    starts = f"{plain:.2%} as it comes, {again:.2%} with its statistics redone"
    log(f"  {best.name}: {best.share:.3f} of the dense latency at {best.widths}; {starts}")
    return best


def fits_limit(row: Row, limit: float) -> bool:
    """Whether a net is as fast as asked, within the timer's spread."""
    return row.share <= limit * TOLERANCE


def torch_pruning(name: str, net: nn.Module, criterion: str, data: Cifar, ratio: float) -> nn.Module:
    """A copy of the net pruned by Torch-Pruning at a global ratio, widths on multiples of ROUND_TO."""
    import torch_pruning as tp

    model = copy.deepcopy(net)
    importance = {
        "magnitude": tp.importance.GroupMagnitudeImportance(p=2),
        "taylor": tp.importance.GroupTaylorImportance(),
        "bn_scale": tp.importance.BNScaleImportance(),
        "hessian": tp.importance.GroupHessianImportance(),
    }[criterion]
    ignored = [model.get_submodule("linear")]
    if name == "resnet20":
        # The option-A shortcut breaks its dependency graph unless the residual stream stays whole.
        ignored += [layer for path, layer in model.named_modules() if path == "conv1" or path.endswith(".conv2")]
    pruner = tp.pruner.BasePruner(
        model, INPUTS[0], importance, global_pruning=True, pruning_ratio=ratio, max_pruning_ratio=0.95,
        ignored_layers=ignored, round_to=ROUND_TO[name],
    )  # fmt: skip
    GRADIENTS.get(criterion, lambda *_: None)(model, importance, data)
    pruner.step()
    model.zero_grad(set_to_none=True)
    return model.eval()


def _taylor_gradients(model: nn.Module, importance: object, data: Cifar) -> None:
    del importance
    for inputs, targets in data.calibration:
        functional.cross_entropy(model(inputs), targets).backward()


def _hessian_gradients(model: nn.Module, importance: object, data: Cifar) -> None:
    inputs, targets = next(iter(data.calibration))
    importance.zero_grad()
    for loss in functional.cross_entropy(model(inputs), targets, reduction="none"):
        model.zero_grad()
        loss.backward(retain_graph=True)
        importance.accumulate_grad(model)


GRADIENTS: dict[str, Callable[[nn.Module, object, Cifar], None]] = {
    "taylor": _taylor_gradients,
    "hessian": _hessian_gradients,
}


# --- the board -----------------------------------------------------------------------------------


class Board:
    """Measures nets in one session, each in turns with the dense net."""

    def __init__(self, session: Session, dense: nn.Module, effort: Effort) -> None:
        self.session, self.effort, self.measured = session, effort, 0
        self.folder = tempfile.TemporaryDirectory()
        self._push("dense.onnx", dense)

    def _push(self, name: str, model: nn.Module) -> None:
        path = Path(self.folder.name) / name
        onnx_format.export(model, INPUTS, path)
        self.session.push({name: path})

    def share(self, model: nn.Module) -> float:
        """Median of the net's latency divided by the dense net's in the neighbouring turn."""
        self.measured += 1
        name = f"candidate{self.measured}.onnx"
        self._push(name, model)
        steps = [
            Step(
                key=f"{number}", kind="time", artifact=name, against="dense.onnx",
                seconds=self.effort.seconds, precision=self.effort.precision,
            )
            for number in range(self.effort.repeats)
        ]  # fmt: skip
        ratios = []
        for result in self.session.run(steps, job=f"share{self.measured}"):
            if result.error is not None or result.samples is None or result.against is None:
                raise RuntimeError(f"{name}: {result.error}")
            ratios.append(turn_ratios(result.samples, result.against))
        self.session.remove([name])
        return median(np.concatenate(ratios))


def log(text: str) -> None:
    """A line for whoever watches."""
    print(text, file=sys.stderr, flush=True)


def show(what: str, done: int, total: int) -> None:
    """Progress as one line that is overwritten, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r{what} {done}/{total}   ", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
