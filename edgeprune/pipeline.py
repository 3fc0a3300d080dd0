"""All stages in a straight line, and the two loops that need several of them.

`run_pipeline` is the whole tool: every stage reads what the one before wrote into the run's folder
and writes its own record there, so that a run that was killed goes on at the stage where it stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
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
from edgeprune.core.budget import make_budget
from edgeprune.core.closed_loop import best_round, corrected_limit
from edgeprune.core.cost import predict_cost
from edgeprune.core.effort import DEFAULT, Effort, find_effort
from edgeprune.core.errors import InfeasibleBudget
from edgeprune.core.family import load_member
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import (
    Accuracy,
    Artifact,
    Budget,
    Cost,
    Graph,
    Importance,
    Plan,
    PlanRound,
    Profile,
    Report,
)
from edgeprune.core.runfile import RunFile
from edgeprune.core.runfolder import RunFolder
from edgeprune.core.store import digest, read_record, sha256_file
from edgeprune.device.embedded import EmbeddedBoard
from edgeprune.device.session import Session, open_session
from edgeprune.device.targets import load_target
from edgeprune.export import export_model
from edgeprune.formats import Resizer
from edgeprune.load import Data, example_inputs, load_data, load_model
from edgeprune.plan import choose_widths, next_request, no_finer_step
from edgeprune.profile import (
    dense_latency,
    measure_widths,
    measured_energy,
    measured_memory,
    profile_target,
    read_profile,
)
from edgeprune.recover import evaluate_accuracy, recover_accuracy
from edgeprune.report import write_report
from edgeprune.score import score_groups
from edgeprune.trace import trace_graph
from edgeprune.validate import collect_examples, validate_artifact

Batches = Iterable[tuple[Any, Tensor]]
EMBEDDED = "embedded"
"""The target that is started on the spot: this machine behind an SSH server on loopback."""
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
        inputs, data = example_inputs(run.spec, model), load_data(run.data.source, base)
        sources = (weights_digest(model), run.data.source, *file_digest(base / run.data.source.partition(":")[0]))
        stages = Stages(run, folder, sources, model, inputs, data, progress)
        graph = stages.trace()
        dense = stages.export_dense(graph)
        importance = stages.score(graph)
        plan = stages.profile_and_plan(graph, importance)
        compact, accuracy = stages.compact(graph, plan)
        recovered, accuracy = stages.recover(plan, compact, accuracy)
        artifact = stages.export(graph, recovered)
        report = stages.validate(graph, plan, dense, artifact, recovered, accuracy)
        stages.bundle(plan, artifact, report)
        return report


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages of one run. Each is skipped when what it is made from and its files are what they were.

    sources: what identifies the model's weights and the data.
    """

    run: RunFile
    folder: RunFolder
    sources: tuple[str, ...]
    model: nn.Module
    inputs: tuple[Tensor, ...]
    data: Data
    progress: Progress

    def trace(self) -> Graph:
        """What can be pruned."""
        made_from = [*self.sources, self.run.prune.allow_inexact]
        return self.folder.record(
            Graph,
            "graph.json",
            made_from,
            lambda: trace_graph(self.model, self.inputs, allow_inexact=self.run.prune.allow_inexact),
        )

    def export_dense(self, graph: Graph) -> Artifact:
        """What the pruned model is measured against."""
        path = self.folder / "dense.onnx"
        made_from = [digest(graph), *self.sources]
        artifact = self.folder.record(
            Artifact,
            "dense.json",
            made_from,
            lambda: export_model(self.model, self.inputs, path, graph=graph),
            also=[path.name],
        )
        return replace(artifact, path=str(path))

    def score(self, graph: Graph) -> Importance:
        """What each unit is worth."""
        settings, (criterion, _, options) = self.run.prune, self.run.prune.criterion.partition(":")
        calibration = self.data.calibration and first(self.data.calibration, settings.batches)
        made_from = [digest(graph), *self.sources, settings.criterion, settings.curves, settings.batches]
        return self.folder.record(
            Importance,
            "importance.json",
            made_from,
            lambda: score_groups(
                self.model,
                self.inputs,
                graph,
                calibration,
                criterion=criterion,
                options=options,
                curves=settings.curves,
                checkpoint=self.folder / "importance.jsonl",
                progress=self.progress,
            ),
        )

    def profile_and_plan(self, graph: Graph, importance: Importance) -> Plan:
        """Latency tables from the board, then widths that the board confirms."""
        run, path = self.run, self.folder / "profile.jsonl"

        def make() -> Plan:
            resizer = load_member("formats", "onnx").make_resizer(self.model, self.inputs, graph)
            with self._board() as session:
                profile = profile_target(
                    self.model,
                    self.inputs,
                    graph,
                    session,
                    path=path,
                    **msgspec.to_builtins(run.profile),
                    around=run.budget.latency,
                    effort=find_effort(run.target.effort),
                    seed=run.seed,
                    resizer=resizer,
                    progress=self.progress,
                )
                budget = make_budget(dense_cost(graph, profile), **msgspec.to_builtins(run.budget))
                return plan_on_board(
                    self.model,
                    self.inputs,
                    graph,
                    profile,
                    importance,
                    budget,
                    session,
                    path,
                    solver=run.prune.solver,
                    levels=run.prune.levels,
                    effort=find_effort(run.target.effort),
                    resizer=resizer,
                    progress=self.progress,
                )

        settings = [msgspec.to_builtins(part) for part in (run.budget, run.profile, run.target)]
        made_from = [digest(importance), *settings, run.prune.solver, run.prune.levels, run.seed]
        return self.folder.record(Plan, "plan.json", made_from, make, also=[path.name])

    def compact(self, graph: Graph, plan: Plan) -> tuple[nn.Module, Accuracy]:
        """The smaller model, refitted, and how accurate it is before any training."""

        def make() -> Accuracy:
            calibration = self.data.require("calibration") if self.run.prune.compensate else None
            smaller = compact_and_compensate(self.model, self.inputs, graph, plan, calibration, progress=self.progress)
            save_compact(smaller, self.inputs, self.folder.path)
            return Accuracy(dense=self._accuracy(self.model), before_recovery=self._accuracy(smaller))

        made_from = [digest(plan), *self.sources, self.run.prune.compensate]
        files = ["compact.pt2", "compact.safetensors"]
        accuracy = self.folder.record(Accuracy, "compact.json", made_from, make, also=files)
        smaller = compact_model(self.model, self.inputs, graph, plan.keep)
        smaller.load_state_dict(load_file(self.folder / "compact.safetensors"))
        return smaller.eval(), accuracy

    def recover(self, plan: Plan, smaller: nn.Module, accuracy: Accuracy) -> tuple[nn.Module, Accuracy]:
        """The smaller model, trained."""
        settings, checkpoint = self.run.recover, self.folder / "recover.checkpoint"
        if not settings.epochs or self.data.train is None:
            return smaller, accuracy

        def make() -> Accuracy:
            result = recover_accuracy(
                smaller,
                self.data,
                teacher=self.model if settings.distil else None,
                epochs=settings.epochs,
                lr=settings.lr,
                checkpoint=checkpoint,
                seed=self.run.seed,
                progress=self.progress,
            )
            self.folder.log(f"recover: {result.note or 'nothing to note'}")
            save_compact(smaller, self.inputs, self.folder.path, name="recovered")
            checkpoint.unlink(missing_ok=True)
            return replace(accuracy, after_recovery=result.accuracy_after)

        made_from = [digest(plan), digest(accuracy), *self.sources, msgspec.to_builtins(settings), self.run.seed]
        files = ["recovered.pt2", "recovered.safetensors"]
        accuracy = self.folder.record(Accuracy, "recovered.json", made_from, make, also=files)
        smaller.load_state_dict(load_file(self.folder / "recovered.safetensors"))
        return smaller.eval(), accuracy

    def export(self, graph: Graph, smaller: nn.Module) -> Artifact:
        """What runs on the board."""
        path = self.folder / "model.onnx"
        artifact = self.folder.record(
            Artifact,
            "model.json",
            [weights_digest(smaller), digest(graph)],
            lambda: export_model(smaller, self.inputs, path, graph=graph),
            also=[path.name],
        )
        return replace(artifact, path=str(path))

    def validate(
        self, graph: Graph, plan: Plan, dense: Artifact, artifact: Artifact, smaller: nn.Module, accuracy: Accuracy
    ) -> Report:
        """The evidence, from the board."""

        def make() -> Report:
            examples = collect_examples(smaller, self.data.require("test"), artifact)
            with self._board() as session:
                return validate_artifact(
                    artifact,
                    session,
                    dense=dense,
                    examples=examples,
                    budget=plan.budget,
                    predicted=plan.predicted,
                    dense_counts=predict_cost(graph, {}),
                    accuracy=accuracy,
                    effort=find_effort(self.run.target.effort),
                    provenance={"plan_sha256": digest(plan)},
                    progress=self.progress,
                )

        made_from = [artifact.sha256, dense.sha256, digest(plan), digest(accuracy), *self.sources]
        return self.folder.record(Report, "report.json", made_from, make)

    def bundle(self, plan: Plan, artifact: Artifact, report: Report) -> None:
        """What an app embeds, and the page with the evidence."""
        made_from = [artifact.sha256, digest(report), digest(plan), self.data.labels, self.data.preprocessing]
        bundle, page = self.folder / "bundle.zip", self.folder / "report.html"
        self.folder.stage(
            "bundle",
            made_from,
            [bundle.name],
            lambda: write_bundle(
                Path(artifact.path),
                artifact,
                plan,
                report,
                bundle,
                labels=self.data.labels,
                preprocessing=self.data.preprocessing,
            ),
        )
        self.folder.stage("page", made_from, [page.name], lambda: report_run(self.folder.path, page))

    def _board(self) -> AbstractContextManager[Session]:
        target = self.run.target
        return connect(
            target.name,
            threads=target.threads,
            runtime=target.runtime,
            meter=target.meter,
            space=self.folder.path,
            progress=self.progress,
        )

    def _accuracy(self, module: nn.Module) -> float | None:
        return evaluate_accuracy(module, self.data.test) if self.data.test is not None else None


@contextmanager
def connect(
    name: str,
    *,
    threads: int = 1,
    runtime: str = "onnxruntime",
    meter: str | None = None,
    space: Path | None = None,
    progress: Progress = silent,
) -> Iterator[Session]:
    """An open session on a board of the inventory, or on an embedded one of its own.

    meter: instead of the target's own. space: whose files on the board are shared and reused; the
        current folder's when not given.
    """
    with ExitStack() as stack:
        target = stack.enter_context(EmbeddedBoard()) if name == EMBEDDED else load_target(name)
        target = replace(target, threads=threads, runtime=runtime, meter=meter or target.meter)
        where = str((space or Path.cwd()).resolve())
        yield stack.enter_context(open_session(target, space=where, progress=progress))


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
    effort: Effort = DEFAULT,
    resizer: Resizer | None = None,
    progress: Progress = silent,
) -> Plan:
    """Plan, measure the planned network on the board, correct the tables, plan again.

    path: the profile's file; what is measured here is appended to it. resizer: the one it was
        profiled with, made here when not given.
    returns: the plan whose measured latency is within the budget and closest to it, of those whose
        measured peak memory and energy are within their own. Its `rounds` are the evidence, and `finer_step` says
        why where it stays below 0.97 of the budget.
    """
    rounds: list[PlanRound] = []
    plans: list[Plan] = []
    within: list[PlanRound] = []  # the memory and energy budgets, as far as they were measured
    memory, energy = budget.peak_memory_bytes, budget.energy_j
    limit, asked = budget.latency_s, next_request(rounds, budget)
    if limit is None and energy is None:
        return choose_widths(graph, profile, importance, budget, solver=solver, levels=levels, progress=progress)
    resizer = resizer or load_member("formats", "onnx").make_resizer(model, inputs, graph)
    while (asked is not None or limit is None) and len(rounds) < max_rounds:
        progress("closing the loop on the board", len(rounds), 0)
        request = replace(budget, latency_s=asked, peak_memory_bytes=memory, energy_j=energy)
        try:
            plan = choose_widths(graph, profile, importance, request, solver=solver, levels=levels, progress=progress)
        except InfeasibleBudget:
            # Of the budget itself it is the answer; a corrected one only ends the search for something closer.
            if rounds:
                break
            if asked == limit:
                raise
            asked = limit
            continue
        profile, measured = measure_widths(
            model, inputs, graph, session, profile, path, [plan.widths],
            effort=effort, resizer=resizer, progress=progress,
        )  # fmt: skip
        assert plan.predicted.latency_s is not None
        peak = measured_memory(profile.measurements, plan.widths, graph)
        joules = measured_energy(profile.measurements, plan.widths, graph)
        turn = PlanRound(
            asked_s=asked, predicted_s=plan.predicted.latency_s.median, measured=measured[0], widths=plan.widths,
            peak_memory_bytes=peak, energy_j=joules,
        )  # fmt: skip
        rounds.append(turn)
        plans.append(plan)
        less = corrected_limit(budget.peak_memory_bytes, plan.predicted.peak_memory_bytes, peak)
        predicted_j = plan.predicted.energy_j.median if plan.predicted.energy_j is not None else None
        weaker = corrected_limit(budget.energy_j, predicted_j, joules.median if joules is not None else None)
        if less is not None or weaker is not None:  # and the same latency once more
            memory, energy = int(less) if less is not None else memory, weaker if weaker is not None else energy
            continue
        within.append(turn)
        if limit is None:
            break
        asked = next_request(within, budget)
    fitting = within or rounds
    if limit is None:
        return replace(plans[rounds.index(fitting[-1])], budget=budget, rounds=tuple(rounds))
    best = plans[rounds.index(fitting[best_round(fitting, limit)])]
    return replace(best, budget=budget, rounds=tuple(rounds), finer_step=no_finer_step(fitting, budget))


def compact_and_compensate(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    graph: Graph,
    plan: Plan,
    calibration: Batches | None,
    *,
    progress: Progress = silent,
) -> nn.Module:
    """The smaller model; with calibration batches the layers that read removed channels are refitted.

    Refitted outputs match the dense model's, so its batch-norm statistics still hold: taking them anew
    costs accuracy. Only where nothing could be refitted they are.
    """
    smaller = compact_model(model, inputs, graph, plan.keep)
    if calibration is not None and not compensate(smaller, model, graph, plan.keep, calibration, progress=progress):
        reestimate_batch_norm(smaller, calibration)
    return smaller.eval()


def dense_cost(graph: Graph, profile: Profile) -> Cost:
    """What the dense model takes: its latency and energy as measured, the rest from its graph."""
    return replace(
        predict_cost(graph, {}, profile),
        latency_s=dense_latency(profile),
        energy_j=measured_energy(profile.measurements, {}, graph),
    )


def weights_digest(model: nn.Module) -> str:
    """sha256 over names, shapes and values of everything in the state dict."""
    whole = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        whole.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        whole.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def file_digest(path: Path) -> list[str]:
    """The digest of a file that may change under its name; nothing for what is not a file."""
    return [sha256_file(path)] if path.is_file() else []


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
