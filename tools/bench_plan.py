"""How exact the planner is and how long it takes: ResNet-50, every group, three budgets at once.

Real graph (traced), synthetic latency tables (a staircase of 16 channels, multiply-adds and bytes moved),
synthetic loss curves, several seeds. `of CPU` is the processor time of the whole plan: on a busy machine the
seconds are longer, and the time limit is of seconds. Small nets are compared with brute force.

    python tools/bench_plan.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from synthetic import synthetic_importance, synthetic_profile
from zoo import torchvision_models

from edgeprune.core.budget import make_budget
from edgeprune.core.cost import predict_cost
from edgeprune.core.records import Budget, Graph, Plan, Profile, SolverResult
from edgeprune.plan import choose_widths
from edgeprune.trace import trace_graph

BUDGETS = (
    {"latency": "0.5x", "size": "0.5x", "memory": "0.7x"},
    {"latency": "0.35x", "size": "0.4x", "memory": "0.6x"},
    {"latency": "0.7x", "size": "0.6x", "memory": "0.85x"},
)
AIMS = {16: (1e-3, 5.0), 32: (2e-3, 20.0)}
"""Levels per group: proven gap and seconds to stay within."""


def plan(graph: Graph, profile: Profile, budget: Budget, seed: int, **options: object) -> Plan:
    """One plan with synthetic scores of a seed."""
    importance = synthetic_importance(graph, seed=seed)
    return choose_widths(graph, profile, importance, budget, **options)  # type: ignore[arg-type]


def bench_resnet50(seeds: int) -> dict[str, tuple[float, float, bool]]:
    """Prints one line per level count, budget and seed. returns: aims with (value, aim, met)."""
    graph = trace_graph(torchvision_models().resnet50(), (torch.randn(1, 3, 224, 224),))
    print(f"ResNet-50: {len(graph.prunable)} groups; latency + size + memory together; one thread\n")
    print("levels  latency  size  memory  seed     gap   seconds  of CPU  status      greedy   uniform")
    aims: dict[str, tuple[float, float, bool]] = {}
    for levels, (gap_aim, time_aim) in AIMS.items():
        gaps, times, cpu = [], [], []
        for seed in range(seeds):
            shares = BUDGETS[seed % len(BUDGETS)]
            profile = synthetic_profile(graph, seed=seed)
            budget = make_budget(predict_cost(graph, {}, profile), **shares)  # type: ignore[arg-type]
            started = time.process_time()
            chosen = plan(graph, profile, budget, seed, levels=levels, time_limit_s=time_aim, compare=())
            cpu.append(time.process_time() - started)
            (exact,) = chosen.alternatives
            others = plan(graph, profile, budget, seed, levels=levels, solver="greedy", compare=("uniform",))
            results = {result.solver: result for result in others.alternatives}
            gap = exact.gap if exact.gap is not None else 1.0
            gaps.append(gap)
            times.append(exact.seconds)
            print(
                f"{levels:6d}  {shares['latency']:>7}  {shares['size']:>4}  {shares['memory']:>6}  {seed:4d}"
                f"  {gap:6.3%}  {exact.seconds:7.2f}  {cpu[-1]:6.2f}  {exact.status:10s}"
                f"  {more(results.get('greedy'), exact):>7}  {more(results.get('uniform'), exact):>8}"
            )
        print(
            f"{levels:6d}  over {seeds} seeds: gap median {statistics.median(gaps):.3%}, max {max(gaps):.3%};"
            f" seconds median {statistics.median(times):.2f}, max {max(times):.2f};"
            f" of CPU median {statistics.median(cpu):.2f}, max {max(cpu):.2f}\n"
        )
        aims[f"gap_{levels}_levels"] = (max(gaps), gap_aim, max(gaps) <= gap_aim)
        aims[f"seconds_{levels}_levels"] = (max(times), time_aim, max(times) <= time_aim)
    return aims


def more(other: SolverResult | None, exact: SolverResult) -> str:
    """How much more loss another solver accepts."""
    return "none" if other is None else f"{other.loss / exact.loss - 1:+.2%}"


def bench_brute_force(seeds: int) -> tuple[float, float, bool]:
    """Largest relative difference between the exact solver and trying everything."""
    models = torchvision_models()
    block = models.resnet.BasicBlock
    nets: dict[str, tuple[nn.Module, int]] = {
        "AlexNet": (models.alexnet(), 5),
        "ResNet-10": (models.ResNet(block, [1, 1, 1, 1]), 4),
        "SqueezeNet stem": (nn.Sequential(*list(models.squeezenet1_1().features)[:5]), 6),
    }
    worst = 0.0
    print("net              groups  levels  seed   milp loss   brute force")
    for name, (module, levels) in nets.items():
        graph = trace_graph(module.eval(), (torch.randn(1, 3, 224, 224),))
        profile = synthetic_profile(graph)
        budget = make_budget(predict_cost(graph, {}, profile), latency="0.6x", size="0.7x", memory="0.9x")
        for seed in range(seeds):
            chosen = plan(graph, profile, budget, seed, levels=levels, compare=("brute_force",), time_limit_s=120)
            loss = {result.solver: result.loss for result in chosen.alternatives}
            worst = max(worst, abs(loss["milp"] / loss["brute_force"] - 1))
            print(
                f"{name:16s} {len(graph.prunable):6d} {levels:7d} {seed:5d}"
                f" {loss['milp']:11.6f} {loss['brute_force']:13.6f}"
            )
    print()
    return worst, 1e-4, worst <= 1e-4


def main() -> None:
    """Run both and print the result line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer seeds")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    aims = bench_resnet50(3 if quick else 12)
    aims["difference_from_brute_force"] = bench_brute_force(1 if quick else 3)
    entries = {name: {"value": value, "aim": f"<= {aim:g}", "met": met} for name, (value, aim, met) in aims.items()}
    print("RESULT " + json.dumps({"aims": entries}))


if __name__ == "__main__":
    main()
