"""Pruning and 8 bits together on real images: accuracy at the same measured latency.

    python tools/bench_int8.py [--quick] [--data DIR] [--net resnet20] [--format onnx|tflite] [--speed-up 2]
                               [--board embedded|icount|icount-a76] [--epochs N]

A share of the dense float32 latency, as measured on the board, is reached twice: by pruning alone, and with
widths planned for int8, which leaves more of them where 8 bits are fast. Beside them stand the dense model in int8, and
the net that was pruned in float32 and then stored in 8 bits: as it is, after further training in float32 (the control),
and after as much training with 8 bits simulated. Every pruned net is trained alike before. Latencies are in turns with
the dense float32 artifact; accuracies are of the artifacts, on test images that decide nothing.
Needs `pip install .[bench]`, and `.[tflite]` for that format.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from bench_accuracy import INPUTS, SPEED_UP, aim
from bench_profile import open_board
from cifar import Cifar, load_net, log, make_parser, read_options, show
from torch import nn

from edgeprune.compact import compact_and_compensate
from edgeprune.core.budget import make_budget
from edgeprune.core.effort import EFFORTS, NOISELESS, Effort
from edgeprune.core.errors import InfeasibleBudget
from edgeprune.core.family import load_member
from edgeprune.core.records import FLOAT32, Graph, Importance, Precision, Quantity, Step
from edgeprune.core.stats import quantity, turn_ratios
from edgeprune.device.session import Session, open_session
from edgeprune.export import export_model
from edgeprune.load import as_arrays
from edgeprune.on_board import dense_cost, plan_on_board
from edgeprune.precisions import Judge, leave_in_float, try_precisions
from edgeprune.profile import profile_target
from edgeprune.recover import recover_accuracy
from edgeprune.score import score_groups
from edgeprune.trace import trace_graph

SPREAD = 1.03
"""A measured latency this much over its limit still counts as equal to it: the timer's own spread."""
LOST_AIM = 0.01
"""Accuracy that pruning and 8 bits together may cost against pruning alone at the same latency."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One artifact: share of the dense float32 latency, top-1 in [0, 1]."""

    name: str
    precision: Precision
    share: Quantity
    accuracy: float
    size_bytes: int
    seconds: float = 0.0


class Bench:
    """One net on one board, and what its variants are judged by."""

    def __init__(
        self, net: nn.Module, limit: float, data: Cifar, session: Session, effort: Effort, configurations: int
    ) -> None:
        self.net, self.limit, self.data, self.session = net, limit, data, session
        self.effort, self.configurations = effort, configurations
        self.graph: Graph = trace_graph(net, INPUTS)
        calibration = as_arrays(list(data.calibration))
        self.judge = Judge(
            inputs=INPUTS, graph=self.graph, format=session.format, calibration=calibration, batches=data.calibration
        )
        self.folder = tempfile.TemporaryDirectory()
        self.suffix = load_member("formats", session.format).SUFFIX
        # Under a name of its own: a profile puts the dense net, in its precision, where files are called `dense`.
        self.dense = self._file(net, FLOAT32, "bench-dense")
        session.push({self.dense.name: self.dense})
        self.count = 0

    def _file(self, model: nn.Module, precision: Precision, name: str) -> Path:
        path = Path(self.folder.name) / f"{name}{self.suffix}"
        export_model(
            model, INPUTS, path, format=self.session.format, precision=precision, calibration=self.judge.calibration,
            graph=self.graph,
        )  # fmt: skip
        return path

    def row(
        self, name: str, model: nn.Module, precision: Precision, seconds: float = 0.0, share: Quantity | None = None
    ) -> Row:
        """The accuracy of an artifact of the model on the test images, and its latency unless that is known."""
        made = Row(
            name=name, precision=precision, share=share or self.share(model, precision),
            size_bytes=self._file(model, precision, "candidate").stat().st_size,
            accuracy=self.judge.accuracy(model, precision, self.data.test), seconds=seconds,
        )  # fmt: skip
        log(f"  {made.name}: {made.share.median:.3f} of dense, {made.accuracy:.2%}")
        return made

    def share(self, model: nn.Module, precision: Precision) -> Quantity:
        """Latency of an artifact of the model, in turns with the dense float32 one."""
        self.count += 1
        path = self._file(model, precision, f"candidate{self.count}")
        self.session.push({path.name: path})
        steps = [
            Step(key=str(number), kind="time", artifact=path.name, against=self.dense.name, seconds=self.effort.seconds,
                 precision=self.effort.precision, min_samples=self.effort.samples, steady=self.effort.steady)
            for number in range(2 * self.effort.repeats)
        ]  # fmt: skip
        results = list(self.session.run(steps, job=f"int8-{time.time_ns():x}"))
        self.session.remove([path.name])
        ratios = [turn_ratios(r.samples, r.against) for r in results if r.samples is not None and r.against is not None]
        return quantity(np.concatenate(ratios))

    def prune(self, importance: Importance, precision: Precision) -> tuple[nn.Module, str]:
        """The net with widths planned for the share of the float32 latency in a precision, refitted, not trained."""
        resizer = load_member("formats", self.session.format).make_resizer(
            self.net, INPUTS, self.graph, precision=precision
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "profile.jsonl"
            profile = profile_target(
                self.net, INPUTS, self.graph, self.session, path=path, configurations=self.configurations, held_out=4,
                effort=self.effort, resizer=resizer, precision=precision, progress=show,
            )  # fmt: skip
            budget = make_budget(dense_cost(self.graph, profile), latency=f"{self.limit:.4f}x")
            plan = plan_on_board(
                self.net, INPUTS, self.graph, profile, importance, budget, self.session, path, effort=self.effort,
                resizer=resizer, progress=show,
            )  # fmt: skip
        kept = " ".join(f"{width}/{self.graph.units[name]}" for name, width in plan.widths.items())
        model = compact_and_compensate(self.net, INPUTS, self.graph, plan, self.data.calibration, progress=show)
        return model, kept


def bench_net(
    net: nn.Module, limit: float, data: Cifar, session: Session, effort: Effort, epochs: int, quick: bool
) -> list[Row]:
    """Every row of one net."""
    bench = Bench(net, limit, data, session, effort, 12 if quick else 24)
    rows = [bench.row("dense", net, FLOAT32)]
    trial = try_precisions(net, INPUTS, session, "int8", effort=effort)[0]
    resizer = load_member("formats", session.format).make_resizer(net, INPUTS, bench.graph, precision=trial.precision)
    precision = leave_in_float(
        net, INPUTS, bench.graph, session, trial, resizer, bench.judge, tolerance=0.01, effort=effort
    ).precision
    log(f"  int8 on this board: {precision.name} {precision.float_nodes}")
    rows.append(bench.row("dense, 8 bits", net, precision))
    importance = score_groups(net, INPUTS, bench.graph, data.calibration, examples=128 if quick else 512, progress=show)
    # Weights do not change a latency: all is measured before the first training, which may then share the machine.
    pruned: dict[Precision, nn.Module] = {}
    shares: dict[tuple[Precision, Precision], Quantity] = {}  # (planned for, stored in)
    for planned in (FLOAT32, precision):
        try:
            model, kept = bench.prune(importance, planned)
        except InfeasibleBudget as reason:
            print(f"pruned for {planned.name}: {reason}", flush=True)
            continue
        pruned[planned] = model
        for stored in {planned, precision}:
            shares[planned, stored] = bench.share(model, stored)
            log(f"  planned for {planned.name}, stored in {stored.name}: {shares[planned, stored].median:.3f} of dense")
        log(f"    kept {kept}")
    log("  measured; only training is left")
    for planned, model in pruned.items():
        start = time.monotonic()
        recover_accuracy(model, data, teacher=net, epochs=epochs, lr=0.02, progress=show)
        name = "pruned" if planned == FLOAT32 else "pruned for 8 bits"
        rows.append(bench.row(name, model, planned, time.monotonic() - start, shares[planned, planned]))
    if FLOAT32 not in pruned:
        return rows
    half, share = pruned[FLOAT32], shares[FLOAT32, precision]
    rows.append(bench.row("pruned, then 8 bits", half, precision, share=share))
    for name, simulated in (("  trained on in float32", None), ("  trained on in 8 bits", precision)):
        model, start = copy.deepcopy(half), time.monotonic()
        recover_accuracy(model, data, teacher=net, epochs=max(epochs // 2, 1), lr=0.002, precision=simulated)
        rows.append(bench.row(name, model, precision, time.monotonic() - start, share))
    return rows


def main() -> None:
    """Print the table and the RESULT line."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--net", choices=("resnet20", "wrn16_2"), default="resnet20")
    parser.add_argument("--format", choices=("onnx", "tflite"), default="onnx")
    parser.add_argument("--board", choices=["embedded", "icount", "icount-a76"], default="embedded")
    parser.add_argument("--speed-up", type=float, help="of the dense float32 latency, above 1")
    parser.add_argument("--quick", action="store_true", help="one epoch on 6 400 images, fewer measurements")
    parser.add_argument("--epochs", type=int, help="epochs of recovery (default 4, quick 1)")
    options, folder = read_options(parser)
    data = Cifar(folder, train=6_400, test=2_000) if options.quick else Cifar(folder)
    limit = 1 / (options.speed_up or SPEED_UP[options.net])
    effort = EFFORTS["quick" if options.quick else "default"] if options.board == "embedded" else NOISELESS
    runtime = "tflite" if options.format == "tflite" else "onnxruntime"
    with (
        open_board(options.board) as target,
        open_session(replace(target, runtime=runtime), space="bench-int8") as session,
    ):
        rows = bench_net(
            load_net(options.net, folder), limit, data, session, effort, options.epochs or (1 if options.quick else 4),
            options.quick,
        )  # fmt: skip
    print(f"\n{options.net}, {options.format}, {options.board}: {len(data.test.y)} test images; limit {limit:.3f}")
    print(f"{'':26} {'precision':>16} {'latency/dense':>22} {'top-1':>8} {'KiB':>7} {'training s':>10}")
    for row in rows:
        share = f"{row.share.median:.3f} [{row.share.low:.3f}, {row.share.high:.3f}]"
        print(f"{row.name:26} {row.precision.name:>16} {share:>22} {row.accuracy:8.2%} {row.size_bytes / 1024:7.0f}"
              f" {row.seconds:10.0f}")  # fmt: skip
    found = {row.name.strip(): row for row in rows}
    if "pruned" not in found or "pruned for 8 bits" not in found:
        print("RESULT " + json.dumps({"aims": {}, "skipped": "no widths are that fast"}))
        return
    planned, alone = found["pruned for 8 bits"], found["pruned"]
    aims = {
        "latency": aim(planned.share.median, "<=", limit * SPREAD),
        "together against pruning alone": aim(planned.accuracy, ">=", alone.accuracy - LOST_AIM),
        "training in 8 bits against the control": aim(
            found["trained on in 8 bits"].accuracy, ">=", found["trained on in float32"].accuracy
        ),
    }
    print("RESULT " + json.dumps({"aims": aims}))


if __name__ == "__main__":
    main()
