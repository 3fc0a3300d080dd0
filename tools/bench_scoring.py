"""Memory and time of what happens on this machine before any training: trace, score, compact, refit.

    python tools/bench_scoring.py [--quick] [--net resnet50] [--examples 64]

A net with random weights at 224 x 224 and random images. Each row is the stage's time, and the peak of the whole
process so far, PyTorch itself included. `--quick` takes ResNet-18 and 16 examples.
Needs `pip install .[bench]`.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_profile import zoo

from edgeprune.compact import compact_model
from edgeprune.compensation.batch_norm import match_batch_norm
from edgeprune.compensation.least_squares import compensate
from edgeprune.core.records import Graph, IntArray
from edgeprune.score import score_groups
from edgeprune.trace import trace_graph

LIMIT_GIB = 3.0
NETS = ("resnet50", "resnet18", "mobilenet_v2")
R = TypeVar("R")


def main() -> None:
    """Print the table and the RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--net", choices=NETS)
    parser.add_argument("--examples", type=int, help="calibration images (default 64, quick 16)")
    parser.add_argument("--curve-examples", type=int, default=4, help="of them for loss curves; 0: no curves")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    name = options.net or ("resnet18" if options.quick else "resnet50")
    examples = options.examples or (16 if options.quick else 64)
    torch.manual_seed(0)
    net = zoo(name).eval()
    x, y = torch.randn(examples, 3, 224, 224), torch.randint(0, 1000, (examples,))
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, examples, 16)]
    print(f"{name}, {examples} images\n{'stage':>24} {'s':>8} {'peak GiB':>9}\n{'loaded':>24} {'':8} {peak_gib():9.2f}")
    graph = stage("trace", lambda: trace_graph(net, (x[:1],)))
    for criterion in ("magnitude", "taylor", "surgeon"):
        scored = stage(
            f"score by {criterion}",
            lambda criterion=criterion: score_groups(net, (x[:1],), graph, batches, criterion=criterion, curves=False),
        )
    if options.curve_examples:
        stage("loss curves", lambda: score_groups(net, (x[:1],), graph, batches, criterion="magnitude", levels=2,
                                                  examples=options.curve_examples))  # fmt: skip
    keep = half(graph, scored.scores)
    compact = stage("compact", lambda: compact_model(net, (x[:1],), graph, keep).eval())
    stage("refit", lambda: compensate(compact, net, graph, keep, batches))
    stage("match batch norms", lambda: match_batch_norm(compact, batches))
    peak = peak_gib()
    aims = {f"{name}_peak_gib": {"value": round(peak, 3), "aim": f"<= {LIMIT_GIB}", "met": peak <= LIMIT_GIB}}
    print("RESULT", json.dumps({"aims": aims}))


def stage(name: str, work: Callable[[], R]) -> R:
    """Do it and print its row."""
    start = time.perf_counter()
    result = work()
    print(f"{name:>24} {time.perf_counter() - start:8.1f} {peak_gib():9.2f}", flush=True)
    return result


def peak_gib() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def half(graph: Graph, scores: dict[str, Any]) -> dict[str, IntArray]:
    """The better half of every group's units."""
    keep = {}
    for group in graph.prunable:
        width = max(group.step, group.units // 2 // group.step * group.step)
        keep[group.name] = np.sort(np.argsort(-scores[group.name], kind="stable")[:width])
    return keep


if __name__ == "__main__":
    main()
