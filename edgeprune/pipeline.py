"""All stages in a straight line, and the two loops that need several of them.

`run_pipeline` is the whole tool: every stage reads what the one before wrote into the run's folder
and writes its own record there, so that a run that was killed goes on at the stage where it stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from edgeprune.bundle import write_bundle
from edgeprune.compact import compact_model, save_compact
from edgeprune.compensation.batch_norm import reestimate_batch_norm
from edgeprune.compensation.least_squares import compensate
from edgeprune.core.budget import make_budget, parse_limit
from edgeprune.core.cost import predict_cost
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import (
    Accuracy,
    Artifact,
    Budget,
    Graph,
    Importance,
    Plan,
    PlanRound,
    Profile,
    Report,
)
from edgeprune.core.runfile import RunFile
from edgeprune.core.runfolder import RunFolder
from edgeprune.core.store import digest, read_record, write_record
from edgeprune.device.embedded import EmbeddedBoard
from edgeprune.device.inventory import load_target
from edgeprune.device.session import Session, open_session
from edgeprune.export import export_model
from edgeprune.load import Data, example_inputs, load_data, load_model
from edgeprune.plan import choose_widths, next_request
from edgeprune.profile import measure_widths, profile_target, read_profile
from edgeprune.recover import evaluate_accuracy, recover_accuracy
from edgeprune.report import write_report
from edgeprune.score import score_groups
from edgeprune.trace import trace_graph
from edgeprune.validate import collect_examples, validate_artifact

Batches = Iterable[tuple[Any, Tensor]]
MAX_ROUNDS = 8
"""Turns of the closed loop before the best plan so far is taken and the report says by how much it misses."""


def run_pipeline(run: RunFile, base: Path, progress: Progress = silent) -> Report:
    """From a trained model to a validated bundle.

    run: what to do. base: the folder that relative paths in it start from.
    returns: the report; a budget that is not met is a failed check in it.
    raises: EdgepruneError with what was wrong; what was finished stays in the run's folder.
    """
    folder = RunFolder(base / run.output.dir)
    with folder.locked():
        model = load_model(run.spec, base)
        inputs = example_inputs(run.spec, model)
        data = load_data(run.data.source, base)
        return _run_stages(run, folder, model, inputs, data, progress)


def _run_stages(
    run: RunFile, folder: RunFolder, model: nn.Module, inputs: tuple[Tensor, ...], data: Data, progress: Progress
) -> Report:
    """Each stage names what decides its result; it is skipped when that and its files are unchanged."""
    prune, recover = msgspec.to_builtins(run.prune), msgspec.to_builtins(run.recover)
    source = [run.data.source, weights_digest(model)]

    traced = [weights_digest(model), run.prune.allow_inexact]
    folder.stage("trace", traced, ["graph.json"], lambda: write_record(
        folder / "graph.json", trace_graph(model, inputs, allow_inexact=run.prune.allow_inexact)))  # fmt: skip
    graph = read_record(Graph, folder / "graph.json")

    folder.stage("export dense", traced, ["dense.onnx", "dense.json"], lambda: write_record(
        folder / "dense.json", export_model(model, inputs, folder / "dense.onnx", graph=graph)))  # fmt: skip
    dense = read_record(Artifact, folder / "dense.json")

    def score() -> None:
        name, _, options = run.prune.criterion.partition(":")
        write_record(folder / "importance.json", score_groups(
            model, inputs, graph, first(data.require("calibration"), run.prune.batches), criterion=name,
            options=options, curves=run.prune.curves, seed=run.seed, progress=progress))  # fmt: skip

    with connect(run.target.name, threads=run.target.threads, runtime=run.target.runtime, progress=progress) as session:
        planned = [digest(graph), source, prune, msgspec.to_builtins(run.budget), msgspec.to_builtins(run.profile),
                   msgspec.to_builtins(run.target), run.seed]  # fmt: skip
        if not folder.done("plan", planned):
            profile = profile_target(
                model, inputs, graph, session, path=folder / "profile.jsonl", progress=progress, seed=run.seed,
                configurations=run.profile.configurations, held_out=run.profile.held_out, rounds=run.profile.rounds,
                seconds=run.profile.seconds)  # fmt: skip
            budget = make_budget(predict_cost(graph, {}, profile), **msgspec.to_builtins(run.budget))
            folder.stage("score", [digest(graph), source, prune, run.seed], ["importance.json"], score)
            importance = read_record(Importance, folder / "importance.json")
            folder.stage("plan", planned, ["plan.json"], lambda: write_record(
                folder / "plan.json", plan_on_board(
                    model, inputs, graph, profile, importance, budget, session, folder / "profile.jsonl",
                    solver=run.prune.solver, levels=run.prune.levels, progress=progress)))  # fmt: skip
        plan = read_record(Plan, folder / "plan.json")

        def compact() -> None:
            calibration = data.require("calibration") if run.prune.compensate else None
            made = compact_and_compensate(model, inputs, graph, plan, calibration, progress=progress)
            save_compact(made, inputs, folder.path)
            write_record(folder / "accuracy.json", Accuracy(
                dense=_accuracy(model, data), before_recovery=_accuracy(made, data)))  # fmt: skip

        compacted = [digest(plan), source, prune]
        compact_files = ["compact.pt2", "compact.safetensors", "accuracy.json"]
        folder.stage("compact", compacted, compact_files, compact)
        smaller = compact_model(model, inputs, graph, plan.keep)
        smaller.load_state_dict(load_file(folder / "compact.safetensors"))
        accuracy = read_record(Accuracy, folder / "accuracy.json")

        def retrain() -> None:
            result = recover_accuracy(
                smaller, data, teacher=model if run.recover.distil else None, epochs=run.recover.epochs,
                lr=run.recover.lr, checkpoint=folder / "recover.checkpoint", seed=run.seed,
                progress=progress)  # fmt: skip
            folder.log(f"recover: {result.note}" if result.note else "recover: every epoch was finite")
            save_compact(smaller, inputs, folder.path, name="recovered")
            write_record(folder / "recovered.json", replace(accuracy, after_recovery=_accuracy(smaller, data)))

        recovered = [*compacted, recover, run.seed]
        if run.recover.epochs and data.train is not None:
            files = ["recovered.pt2", "recovered.safetensors", "recovered.json"]
            folder.stage("recover", recovered, files, retrain)
            smaller.load_state_dict(load_file(folder / "recovered.safetensors"))
            accuracy = read_record(Accuracy, folder / "recovered.json")
        smaller.eval()

        folder.stage("export", recovered, ["model.onnx", "model.json"], lambda: write_record(
            folder / "model.json", export_model(smaller, inputs, folder / "model.onnx", graph=graph)))  # fmt: skip
        artifact = read_record(Artifact, folder / "model.json")

        folder.stage("validate", [artifact.sha256, planned], ["report.json"], lambda: write_record(
            folder / "report.json", validate_artifact(
                artifact, session, dense=dense, examples=collect_examples(smaller, data.require("test"), artifact),
                budget=plan.budget, predicted=plan.predicted, dense_counts=predict_cost(graph, {}), accuracy=accuracy,
                latency_ratio=relative_latency(run.budget.latency),
                provenance={"plan_sha256": digest(plan)}, progress=progress)))  # fmt: skip
    report = read_record(Report, folder / "report.json")

    evidence = [digest(report), digest(plan)]
    folder.stage("bundle", evidence, ["bundle.zip"], lambda: write_bundle(
        folder / "model.onnx", artifact, plan, report, folder / "bundle.zip", labels=data.labels,
        preprocessing=data.preprocessing))  # fmt: skip
    folder.stage("report", evidence, ["report.html"], lambda: report_run(folder.path, folder / "report.html"))
    return report


@contextmanager
def connect(
    name: str, *, threads: int = 1, runtime: str = "onnxruntime", progress: Progress = silent
) -> Iterator[Session]:
    """An open session on a board of the inventory; `embedded` starts a board of its own on loopback."""
    target = replace(load_target(name), threads=threads, runtime=runtime)
    with ExitStack() as stack:
        if target.transport == "embedded":
            board = stack.enter_context(EmbeddedBoard())
            target = replace(board, name=target.name, threads=threads, runtime=runtime)
        yield stack.enter_context(open_session(target, progress=progress))


def plan_on_board(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    graph: Graph,
    profile: Profile,
    importance: Importance,
    budget: Budget,
    session: Session,
    path: Path,
    *,
    solver: str = "milp",
    levels: int = 16,
    max_rounds: int = MAX_ROUNDS,
    progress: Progress = silent,
) -> Plan:
    """Plan, measure the planned network on the board, correct the tables, plan again.

    path: the profile's file; what is measured here is appended to it.
    returns: the plan whose measured latency is within the budget and closest to it; its `rounds`
        are the evidence, and `finer_step` says why where it stays below 0.97 of the budget.
    """
    rounds: list[PlanRound] = []
    plans: list[Plan] = []
    asked: float | None = budget.latency_s
    if asked is None:
        return choose_widths(graph, profile, importance, budget, solver=solver, levels=levels, progress=progress)
    while asked is not None and len(rounds) < max_rounds:
        progress("closing the loop on the board", len(rounds), 0)
        plan = choose_widths(
            graph,
            profile,
            importance,
            replace(budget, latency_s=asked),
            solver=solver,
            levels=levels,
            progress=progress,
        )
        profile, measured = measure_widths(
            model, inputs, graph, session, profile, path, [plan.widths], progress=progress
        )
        assert plan.predicted.latency_s is not None
        rounds.append(
            PlanRound(
                asked_s=asked, predicted_s=plan.predicted.latency_s.median, measured=measured[0], widths=plan.widths
            )
        )
        plans.append(plan)
        asked = next_request(rounds, budget)
    best = best_round(rounds, budget.latency_s)
    return replace(plans[best], budget=budget, rounds=tuple(rounds))


def best_round(rounds: list[PlanRound], latency_s: float | None) -> int:
    """Index of the slowest round within the budget, or of the fastest when none is."""
    assert latency_s is not None
    within = [i for i, r in enumerate(rounds) if r.measured.median <= latency_s]
    if within:
        return max(within, key=lambda i: rounds[i].measured.median)
    return min(range(len(rounds)), key=lambda i: rounds[i].measured.median)


def compact_and_compensate(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    graph: Graph,
    plan: Plan,
    calibration: Batches | None,
    *,
    progress: Progress = silent,
) -> nn.Module:
    """The smaller model; with calibration batches its consumers are refitted and its statistics taken anew."""
    smaller = compact_model(model, inputs, graph, plan.keep)
    if calibration is not None:
        compensate(smaller, model, graph, plan.keep, calibration, progress=progress)
        reestimate_batch_norm(smaller, calibration)
    return smaller.eval()


def relative_latency(asked: str | None) -> float | None:
    """0.5 for `0.5x`; None for an absolute latency or none."""
    request = parse_limit(asked, "time") if asked else None
    return request.value if request and request.relative else None


def weights_digest(model: nn.Module) -> str:
    """sha256 over names, shapes and values of everything in the state dict."""
    whole = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        whole.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        whole.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def first(batches: Batches, count: int) -> list[tuple[Any, Tensor]]:
    """The first `count` batches, kept in memory."""
    return [batch for batch, _ in zip(batches, range(count), strict=False)]


def report_run(directory: Path, path: Path) -> Path:
    """Write the HTML page of a finished run from the records in its folder. returns: `path`."""
    folder = RunFolder(directory)
    write_report(
        path,
        report=read_record(Report, folder / "report.json"),
        plan=read_record(Plan, folder / "plan.json"),
        graph=read_record(Graph, folder / "graph.json"),
        profile=read_profile(folder / "profile.jsonl"),
        importance=read_record(Importance, folder / "importance.json"),
    )
    return path


def _accuracy(module: nn.Module, data: Data) -> float | None:
    return evaluate_accuracy(module, data.test) if data.test is not None else None
