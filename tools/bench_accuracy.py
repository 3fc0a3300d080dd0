"""Accuracy at the same measured latency on real images: every way to choose what goes, beside Torch-Pruning.

    python tools/bench_accuracy.py [--quick] [--data DIR] [--net wrn16_2] [--net resnet20] [--speed-up 2]
                                   [--row weighed --row criterion:lamp --row tp:taylor ...] [--seeds 2]
                                   [--board embedded|icount|icount-a76] [--calibration 512]

WRN-16-2 to half and ResNet-20 to two thirds of its latency, as measured on the loopback board (ONNX Runtime, one
thread), unless --speed-up and --board say otherwise. A row is one net:

    curves             measured loss curves, as `[search] trials = 0` plans
    weighed            the same after the search, which mixes them with magnitudes and equal shares
    depth              the curves and the loss without each residual branch, which the plan may drop whole
    criterion:NAME     summed scores of a criterion instead of curves
    solver:NAME        the curves, with another search for widths
    regularizer:NAME   the dense net trained first with a regularizer that drives units to zero, as long as the recovery
                       is, then summed magnitudes, by which what is zero goes first; refitted from that net
    trained            the same without a regularizer: what the longer training alone does
    uniform            uniform widths within the latency, units by L1
    reduced            the same widths, trained from nothing: what pruning has to beat
    tp:NAME            Torch-Pruning 1.6.1 with one of its criteria, its ratio bisected against the board

Everything then gets the same short training, which also distils from the dense net, once per seed; `trained` and
`regularizer` have had as much before. The tournament's pick, `[search] contenders`, is the row that is best after it.
The default trains 5 epochs on 50 000 images, `--quick` one epoch on 6 400. With --out a row that was trained is kept
and not trained again. Needs `pip install .[bench,demo]`.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_profile import open_board
from cifar import ACCURACY, NETS, Cifar, load_net, log, make_parser, read_options, show

from edgeprune.compact import compact_and_compensate
from edgeprune.compensation.batch_norm import reestimate_batch_norm
from edgeprune.core.budget import make_budget
from edgeprune.core.effort import EFFORTS, NOISELESS, Effort
from edgeprune.core.family import list_members
from edgeprune.core.records import Budget, Importance, Plan, Profile, Step
from edgeprune.core.stats import median, turn_ratios
from edgeprune.device.session import Session, open_session
from edgeprune.formats import onnx as onnx_format
from edgeprune.on_board import dense_cost, plan_on_board
from edgeprune.profile import profile_target
from edgeprune.recover import evaluate_accuracy, recover_accuracy
from edgeprune.score import score_groups
from edgeprune.search import search_curves
from edgeprune.trace import trace_graph

SPEED_UP = {"wrn16_2": 2.0, "resnet20": 1.5}
ROUND_TO = {"wrn16_2": 16, "resnet20": 8}
OURS = ("curves", "weighed")
QUICK_ROWS = ["weighed", "curves", "uniform", "criterion:magnitude", "tp:magnitude", "tp:taylor"]
ALL_ROWS = [
    *QUICK_ROWS, "depth", "reduced", "tp:bn_scale", "tp:hessian",
    *(f"criterion:{name}" for name in list_members("criteria") if name != "magnitude"),
    *(f"solver:{name}" for name in ("dp", "greedy", "knapsack", "bandit")),
    "trained", *(f"regularizer:{name}" for name in list_members("regularizers")),
]  # fmt: skip
INPUTS = (torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)),)
TOLERANCE = 1.02
"""A measured latency this much over its limit still counts as equal to it: the timer's own spread."""


@dataclass
class Row:
    """One pruned net: how it was made, its latency as a share of the dense one's, and top-1 in [0, 1].

    seconds: of choosing and making it, without the board's measurements of Torch-Pruning. after: a training per seed.
    """

    name: str
    share: float
    before: float = 0.0
    after: list[float] = field(default_factory=list)
    seconds: float = 0.0
    widths: str = ""


def main() -> None:
    """Run the nets, print the tables and the RESULT line."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--net", action="append", choices=sorted(NETS), help="only this net (repeatable)")
    parser.add_argument("--row", action="append", help="only this row (repeatable)")
    parser.add_argument("--board", choices=["embedded", "icount", "icount-a76"], default="embedded")
    parser.add_argument("--speed-up", type=float, help="of the measured latency, above 1")
    parser.add_argument("--quick", action="store_true", help="one epoch on 6 400 images, fewer measurements and rows")
    parser.add_argument("--epochs", type=int, help="epochs of recovery (default 5, quick 1); 0: no training")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each row")
    parser.add_argument(
        "--calibration", type=int, default=512, help="images that layers are refitted on, without labels"
    )
    parser.add_argument("--out", type=Path, help="keep results and the profile here, and go on from them")
    options, folder = read_options(parser)
    train, test = (6_400, 2_000) if options.quick else (50_000, 5_000)
    data = Cifar(folder, train=train, test=test, calibration=options.calibration)
    options.epochs = options.epochs if options.epochs is not None else 1 if options.quick else 5
    every = [row for row in ALL_ROWS if options.epochs or not trains_before(row)]
    options.row = options.row or (QUICK_ROWS if options.quick else every)
    if any(row.startswith("tp:") for row in options.row) and find_spec("torch_pruning") is None:
        parser.error("rows tp:NAME need Torch-Pruning: pip install .[bench]")
    if not options.epochs and any(map(trains_before, options.row)):
        parser.error("rows trained and regularizer:NAME are trained as long as --epochs before they are pruned: not 0")
    aims: dict[str, dict[str, object]] = {}
    for name in options.net or list(SPEED_UP):
        with (
            open_board(options.board) as target,
            open_session(target, space="bench-accuracy") as session,
            tempfile.TemporaryDirectory() as temporary,
        ):
            kept = options.out / options.board if options.out else Path(temporary)
            kept.mkdir(parents=True, exist_ok=True)
            aims |= bench_net(name, folder, data, session, kept, options)
    print("RESULT " + json.dumps({"aims": aims}))


def bench_net(
    name: str, folder: Path, data: Cifar, session: Session, kept: Path, options: argparse.Namespace
) -> dict[str, dict[str, object]]:
    """Prune one net every way, train every outcome alike, print its table and give its aims."""
    net, limit = load_net(name, folder), 1 / (options.speed_up or SPEED_UP[name])
    dense = evaluate_accuracy(net, data.test)
    images = len(data.test.y)
    log(f"{name}: dense {dense:.2%} on {images} test images (its notes say {ACCURACY[name]:.1%} on 5000)")
    effort = EFFORTS["quick" if options.quick else "default"] if options.board == "embedded" else NOISELESS
    board = Board(session, net, effort)
    ours = Ours(name, net, data, session, limit, kept, epochs=options.epochs, quick=options.quick, effort=effort)
    rows: list[Row] = []
    models: dict[str, nn.Module] = {}

    def kept_row(kind: str) -> Path:
        return kept / f"{name}-{limit:.3f}-{kind.replace(':', '-')}.json"

    def made_from(kind: str) -> list[object]:
        return [kind, limit, options.epochs, options.seeds, options.calibration, len(data.train.y), images]

    for kind in options.row:
        file = kept_row(kind)
        if file.is_file() and (known := json.loads(file.read_text()))["made_from"] == made_from(kind):
            rows.append(Row(**known["row"]))
            continue
        start = time.perf_counter()
        if kind.startswith("tp:"):
            row, model = prune_there(name, net, kind[3:], data, board, limit, steps=5 if options.quick else 8)
        else:
            row, model = ours.prune(kind, board)
        row.seconds = time.perf_counter() - start
        log(f"  {row.name}: {row.share:.3f} of the dense latency, {row.before:.2%} before recovery; {row.widths}")
        rows.append(row)
        models[kind] = model
    log("  measured; only training is left")  # which may share the machine
    for row in rows:
        model = models.pop(row.name, None)
        if model is None:
            continue
        for seed in range(options.seeds if options.epochs else 0):
            trained = copy.deepcopy(model)
            result = recover_accuracy(
                trained, data, teacher=net, epochs=options.epochs, lr=0.02, seed=seed, progress=show
            )
            row.after.append(result.accuracy_after or 0.0)
            log(f"  {row.name}, seed {seed}: {row.after[-1]:.2%} {result.note}")
        kept_row(row.name).write_text(json.dumps({"made_from": made_from(row.name), "row": asdict(row)}))
    return report(name, dense, limit, rows, options.epochs)


def trains_before(kind: str) -> bool:
    """Whether a row's net is trained before it is pruned, too."""
    return kind == "trained" or kind.startswith("regularizer:")


def report(name: str, dense: float, limit: float, rows: list[Row], epochs: int) -> dict[str, dict[str, object]]:
    """The table of one net, and its aims against the best rival at the same latency."""
    print(f"\n{name}: top-1 before and after recovery; dense {dense:.2%}; limit {limit:.3f} of the dense latency")
    print(f"{'method':24} {'latency/dense':>13} {'before':>8} {'after':>8} {'spread':>7} {'made in s':>10}  kept")
    for row in rows:
        after = f"{np.mean(row.after):8.2%} {np.ptp(row.after):7.2%}" if row.after else f"{'-':>8} {'-':>7}"
        print(f"{row.name:24} {row.share:13.3f} {row.before:8.2%} {after} {row.seconds:10.0f}  {row.widths}")
    if longer := [row.name for row in rows if trains_before(row.name)]:
        print(f"trained twice as long as the others, {epochs} epochs before pruning: {', '.join(longer)}")
    ours = [row for row in rows if row.name in OURS and fits_limit(row, limit)]
    rivals = [row for row in rows if (row.name.startswith("tp:") or row.name == "uniform") and fits_limit(row, limit)]
    if not ours or not rivals:
        return {}
    aims = {
        f"{name} latency": aim(max(row.share for row in ours), "<=", limit * TOLERANCE),
        f"{name} before recovery": aim(max(row.before for row in ours), ">=", max(row.before for row in rivals)),
    }
    if all(row.after for row in (*ours, *rivals)):
        best = max(float(np.mean(row.after)) for row in rivals)
        aims[f"{name} after recovery"] = aim(max(float(np.mean(row.after)) for row in ours), ">=", best)
    return aims


def aim(value: float, relation: str, wanted: float) -> dict[str, object]:
    """One entry of the RESULT line."""
    met = value <= wanted if relation == "<=" else value >= wanted
    return {"value": round(value, 4), "aim": f"{relation} {wanted:.4f}", "met": met}


# --- the two ways --------------------------------------------------------------------------------


class Ours:
    """One net on the board: profiled once, then pruned in any of our ways within the same latency."""

    def __init__(
        self,
        name: str,
        net: nn.Module,
        data: Cifar,
        session: Session,
        limit: float,
        kept: Path,
        *,
        epochs: int = 0,
        quick: bool,
        effort: Effort = EFFORTS["default"],
    ) -> None:
        self.net, self.data, self.session, self.limit, self.quick = net, data, session, limit, quick
        self.epochs, self.effort = epochs, effort
        self.path = kept / f"{name}-profile.jsonl"
        self.kept = kept / f"{name}-search-{limit:.3f}.jsonl"
        self.graph = trace_graph(net, INPUTS)

    @cached_property
    def profile(self) -> Profile:
        log("  profiling")
        return profile_target(
            self.net, INPUTS, self.graph, self.session, path=self.path, progress=show,
            configurations=24 if self.quick else 40, held_out=4 if self.quick else 8, effort=self.effort,
        )  # fmt: skip

    @cached_property
    def budget(self) -> Budget:
        return make_budget(dense_cost(self.graph, self.profile), latency=f"{self.limit:.4f}x")

    @cached_property
    def curves(self) -> Importance:
        return self.measure_curves()

    def measure_curves(self, *, depth: bool = False) -> Importance:
        """What is measured for one row is there for the next."""
        log("  measuring loss curves")
        examples = 128 if self.quick else 512
        return score_groups(
            self.net, INPUTS, self.graph, self.data.calibration, examples=examples, depth=depth,
            checkpoint=self.path.with_name(f"{self.path.stem}-curves-{examples}.jsonl"), progress=show,
        )  # fmt: skip

    @cached_property
    def weighed(self) -> Importance:
        log("  weighing the curves")
        return search_curves(
            self.net, INPUTS, self.graph, self.profile, self.curves, self.budget, self.data.calibration,
            trials=16 if self.quick else 32, checkpoint=self.kept, progress=show,
        )  # fmt: skip

    def prune(self, kind: str, board: Board) -> tuple[Row, nn.Module]:
        """Plan in a closed loop with the board, compact and compensate."""
        way, _, which = kind.partition(":")
        solver = which if way == "solver" else "uniform" if way in ("uniform", "reduced") else "milp"
        start = self.train(which) if trains_before(kind) else self.net
        model = self.assemble(self.plan(self.importance(way, which, start), solver), start)
        if way == "reduced":
            start_anew(model)
        # Of a branch that is dropped the width is 0.
        kept = " ".join(f"{width}/{self.graph.units[name]}" if name in self.graph.units else f"no {name}"
                        for name, width in self.widths.items() if width < self.graph.units.get(name, 1))  # fmt: skip
        return Row(kind, board.share(model), evaluate_accuracy(model, self.data.test), widths=kept), model

    def train(self, regularizer: str) -> nn.Module:
        """The dense net after a training as long as the recovery; an empty name: without a regularizer."""
        start = copy.deepcopy(self.net)
        result = recover_accuracy(
            start, self.data, epochs=self.epochs, lr=0.02, regularizer=regularizer or None, graph=self.graph,
            progress=show,
        )  # fmt: skip
        log(f"  {regularizer or 'trained'}: {result.accuracy_after:.2%} before pruning, at zero: {result.zeroed}")
        return start

    def importance(self, way: str, which: str, start: nn.Module) -> Importance:
        """What a row plans with. start: the net whose units go."""
        if way == "weighed":
            return self.weighed
        if way == "depth":
            return self.measure_curves(depth=True)
        if way in ("curves", "solver"):
            return self.curves
        criterion = which if way == "criterion" else "magnitude" if start is not self.net else "magnitude:p=1"
        name, _, options = criterion.partition(":")
        return score_groups(
            start, INPUTS, self.graph, self.data.calibration, criterion=name, options=options, curves=False
        )

    def plan(self, importance: Importance, solver: str) -> Plan:
        """Widths that the board confirms; its measurements are not added to the profile of the other rows."""
        profile = self.profile
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "profile.jsonl"
            shutil.copyfile(self.path, path)
            made = plan_on_board(
                self.net, INPUTS, self.graph, profile, importance, self.budget, self.session, path,
                solver=solver, effort=self.effort, progress=show,
            )  # fmt: skip
        if made.solver != solver:
            log(f"  {solver} found nothing in time: the plan is {made.solver}'s")
        self.widths = made.widths
        return made

    def assemble(self, plan: Plan, start: nn.Module) -> nn.Module:
        """The net of a plan, refitted from the one whose units go."""
        return compact_and_compensate(start, INPUTS, self.graph, plan, self.data.calibration, progress=show)


def start_anew(model: nn.Module) -> None:
    """Random weights in every layer."""
    torch.manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            layer.reset_parameters()


def prune_there(
    name: str, net: nn.Module, criterion: str, data: Cifar, board: Board, limit: float, steps: int
) -> tuple[Row, nn.Module]:
    """Torch-Pruning with one criterion, its global ratio bisected to the same measured latency."""
    low, high = 0.0, 0.95
    found: list[tuple[Row, nn.Module]] = []
    for _ in range(steps):
        ratio = (low + high) / 2
        model = torch_pruning(name, net, criterion, data, ratio)
        found.append((Row(f"tp:{criterion}", board.share(model), widths=f"ratio {ratio:.3f}"), model))
        low, high = (low, ratio) if fits_limit(found[-1][0], limit) else (ratio, high)
    # The slowest that fits; where none does, the fastest.
    fitting = [item for item in found if fits_limit(item[0], limit)]
    row, model = max(fitting, key=lambda item: item[0].share) if fitting else min(found, key=lambda item: item[0].share)
    plain = evaluate_accuracy(model, data.test)
    repaired = copy.deepcopy(model)
    reestimate_batch_norm(repaired, data.calibration)
    again = evaluate_accuracy(repaired, data.test)
    log(f"  {row.name}: {plain:.2%} as it comes, {again:.2%} with its statistics redone")
    # It has no calibration step of its own; ours is lent to it, and the better start counts.
    row.before, model = (again, repaired) if again > plain else (plain, model)
    return row, model


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
        self._push("bench-dense.onnx", dense)  # a profile has a `dense.onnx` too, in its own precision

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
                key=f"{number}", kind="time", artifact=name, against="bench-dense.onnx",
                seconds=self.effort.seconds, precision=self.effort.precision, min_samples=self.effort.samples,
                steady=self.effort.steady,
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


if __name__ == "__main__":
    main()
