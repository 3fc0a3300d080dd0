"""What each solver's plan is predicted to lose, and what its net loses in truth, at four latencies.

    python tools/bench_solvers.py [--quick] [--data DIR] [--net resnet20] [--out DIR]
                                  [--board embedded|icount|icount-a76]

One profile of the board, by default the loopback one, and one set of loss curves for all; the plans come from the
tables alone. Predicted: the sum of the curves' rises, which the solvers minimise (cross-entropy, nats). True: by how
much the cross-entropy of the assembled net, refitted on 128 calibration images, rises above the dense net's on others.
Needs `pip install .[bench,demo]`.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_accuracy import INPUTS, Ours
from bench_profile import open_board
from cifar import NETS, Cifar, load_net, log, make_parser, read_options
from torch import Tensor
from torch.nn import functional

from edgeprune.compact import Assembler
from edgeprune.core.budget import make_budget
from edgeprune.core.effort import EFFORTS, NOISELESS
from edgeprune.core.errors import EdgepruneError
from edgeprune.device.session import open_session
from edgeprune.on_board import dense_cost
from edgeprune.plan import choose_widths
from edgeprune.search import outputs_of, split_examples

SOLVERS = ("milp", "dp", "greedy", "knapsack", "bandit", "uniform")
BUDGETS = (0.8, 0.6, 0.4, 0.25)


def main() -> None:
    """Print the table and the RESULT line."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--net", choices=sorted(NETS), default="resnet20")
    parser.add_argument("--board", choices=["embedded", "icount", "icount-a76"], default="embedded")
    parser.add_argument("--quick", action="store_true", help="a shorter profile, and two budgets")
    parser.add_argument("--out", type=Path, help="keep the profile here, and go on from it")
    options, folder = read_options(parser)
    data, net = Cifar(folder, train=512, test=1), load_net(options.net, folder)
    with (
        open_board(options.board) as target,
        open_session(target, space="bench-solvers") as session,
        tempfile.TemporaryDirectory() as temporary,
    ):
        kept = options.out / options.board if options.out else Path(temporary)
        kept.mkdir(parents=True, exist_ok=True)
        effort = EFFORTS["quick" if options.quick else "default"] if options.board == "embedded" else NOISELESS
        ours = Ours(options.net, net, data, session, 1.0, kept, quick=options.quick, effort=effort)
        heads = f"{'latency':>8} {'solver':>9} {'status':>9} {'predicted':>10} {'true':>8} {'of it':>7} {'s':>6}"
        print(f"{options.net}\n{heads}")
        rows = [row for share in (BUDGETS[1::2] if options.quick else BUDGETS) for row in bench(ours, share)]
    print("RESULT " + json.dumps({"aims": find_aims(rows), "rows": rows}))


def bench(ours: Ours, share: float) -> list[dict[str, Any]]:
    """A row a solver, printed as it comes."""
    fitting, judging = split_examples(ours.data.calibration)
    labels = [targets for _, targets in judging]
    dense = cross_entropy(outputs_of(ours.net, judging), labels)
    budget = make_budget(dense_cost(ours.graph, ours.profile), latency=f"{share}x")
    nets, curves = Assembler(ours.net, INPUTS, ours.graph), ours.curves  # measured here, not in a solver's time
    rows = []
    for solver in SOLVERS:
        start = time.perf_counter()
        row: dict[str, Any] = {"budget": share, "solver": solver}
        try:
            plan = choose_widths(ours.graph, ours.profile, curves, budget, solver=solver, compare=())
        except EdgepruneError as error:
            log(f"{solver} at {share}: {error}")
            continue
        row |= {"seconds": time.perf_counter() - start, "status": plan.status, "predicted": plan.loss}
        assert plan.predicted.latency_s is not None and budget.latency_s is not None
        row["of_budget"] = plan.predicted.latency_s.median / budget.latency_s
        pruned = nets.assemble(plan, fitting)
        row["true"] = cross_entropy(outputs_of(pruned, judging), labels) - dense
        print(f"{share:8.2f} {solver:>9} {row['status']:>9} {row['predicted']:10.4f} {row['true']:8.4f} "
              f"{row['of_budget']:7.1%} {row['seconds']:6.2f}", flush=True)  # fmt: skip
        rows.append(row)
    return rows


def cross_entropy(outputs: list[Tensor], labels: list[Tensor]) -> float:
    """Mean over the examples, nats."""
    return float(functional.cross_entropy(torch.cat(outputs), torch.cat(labels)))


def find_aims(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """No solver may predict less than the exact one that has proven its plan."""
    aims = {}
    for share in sorted({row["budget"] for row in rows}):
        here = {row["solver"]: row for row in rows if row["budget"] == share}
        least = min((row["predicted"] for row in here.values()), default=math.nan)
        exact = here.get("milp", {}).get("predicted", math.nan)
        aims[f"milp_at_{share}"] = {"value": exact, "aim": f"<= {least * 1.001:.5f}", "met": exact <= least * 1.001}
    return aims


if __name__ == "__main__":
    main()
