"""All stages in a straight line.

`run_pipeline` is the whole tool: every stage reads what the one before wrote into the run's folder
and writes its own record there, so that a run that was killed goes on at the stage where it stopped.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from edgeprune.bundle import write_bundle
from edgeprune.compact import compact_model, save_compact
from edgeprune.core.budget import make_budget
from edgeprune.core.cost import predict_cost
from edgeprune.core.effort import Effort, find_effort
from edgeprune.core.errors import InfeasibleBudget
from edgeprune.core.family import load_member
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import (
    FLOAT32,
    Accuracy,
    Artifact,
    Cost,
    Graph,
    Importance,
    Plan,
    Precision,
    PrecisionChoice,
    Report,
)
from edgeprune.core.rules import apply_rules
from edgeprune.core.runfile import RunFile
from edgeprune.core.runfolder import RunFolder
from edgeprune.core.store import digest, read_record, sha256_file
from edgeprune.core.tensors import Calibration
from edgeprune.device.session import Session
from edgeprune.device.targets import runtime_format
from edgeprune.export import export_model
from edgeprune.formats import Resizer
from edgeprune.load import Data, as_arrays, example_inputs, load_data, load_model
from edgeprune.on_board import (
    choose_runtime,
    compact_and_compensate,
    connect,
    dense_cost,
    plan_on_board,
)
from edgeprune.precisions import FLOATS, Judge, leave_in_float, train_in_8_bits, try_precisions, worth_planning
from edgeprune.profile import profile_target, read_profile
from edgeprune.recover import evaluate_accuracy, recover_accuracy
from edgeprune.report import write_report
from edgeprune.score import score_groups
from edgeprune.trace import trace_graph
from edgeprune.transform import check_run, restore_layers, settle_plan, transform_run
from edgeprune.validate import collect_examples, validate_artifact

Batches = Iterable[tuple[Any, Tensor]]
AUTO = "auto"


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
        stages = Stages(run, base, folder, sources, model, inputs, data, progress).transformed()
        graph = stages.trace()
        dense = stages.export_dense(graph)
        importance = stages.score(graph)
        plan = stages.profile_and_plan(graph, importance, dense)
        compact, accuracy = stages.compact(graph, plan)
        recovered, accuracy = stages.recover(plan, compact, accuracy)
        recovered, accuracy = stages.train_for_8_bits(graph, plan, recovered, accuracy)
        artifact = stages.export(graph, plan, recovered)
        report = stages.validate(graph, plan, dense, artifact, recovered, accuracy)
        stages.bundle(plan, artifact, report)
        return report


@dataclass(frozen=True)
class Stages:
    """The stages of one run. Each is skipped when what it is made from and its files are what they were.

    sources: what identifies the model's weights and the data. original: the model before its transform, if any.
    """

    run: RunFile
    base: Path
    folder: RunFolder
    sources: tuple[str, ...]
    model: nn.Module
    inputs: tuple[Tensor, ...]
    data: Data
    progress: Progress
    original: nn.Module | None = None

    def transformed(self) -> Stages:
        """The stages of the model as the run's transform rewrites it; what they are measured against stays."""
        chosen = self.run.prune.transform
        if chosen is None:
            return self
        check_run(self.run)
        calibration = first(self.data.require("calibration"), self.run.prune.batches)
        made_from = [*self.sources, self.run.prune.batches]
        model = transform_run(self.model, calibration, self.folder, made_from, chosen)
        return replace(self, model=model, original=self.model, sources=(*self.sources, chosen))

    def trace(self) -> Graph:
        """What can be pruned."""
        inexact, rules = self.run.prune.allow_inexact, self.run.prune.rules
        made_from = [*self.sources, inexact, rules]
        return self.folder.record(
            Graph,
            "graph.json",
            made_from,
            lambda: apply_rules(trace_graph(self.model, self.inputs, allow_inexact=inexact), rules),
        )

    @property
    def _dense(self) -> nn.Module:
        """What the pruned model is measured against."""
        return self.model if self.original is None else self.original

    def export_dense(self, graph: Graph) -> Artifact:
        """What the pruned model is measured against."""
        path = self.folder / f"dense{self.format.SUFFIX}"
        made_from = [digest(graph), *self.sources, self._described]
        artifact = self.folder.record(
            Artifact,
            "dense.json",
            made_from,
            lambda: export_model(
                self._dense, self.inputs, path, format=self.format_name, graph=graph, **self._described
            ),
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

    def profile_and_plan(self, graph: Graph, importance: Importance, dense: Artifact) -> Plan:
        """Latency tables from the board, then widths that the board confirms, in the precision that serves best."""
        choice = self._choose_precision(graph, importance, dense)
        name = choice.chosen.name
        files = [f"plan-{name}.json", f"profile-{name}.jsonl"]

        def make() -> Plan:
            shutil.copyfile(self.folder / files[1], self.folder / "profile.jsonl")
            return read_record(Plan, self.folder / files[0])

        made_from = [sha256_file(self.folder / file) for file in files]
        return self.folder.record(Plan, "plan.json", made_from, make, also=["profile.jsonl"])

    def _choose_precision(self, graph: Graph, importance: Importance, dense: Artifact) -> PrecisionChoice:
        """Of the dtype that was asked for; of `auto` the one whose plan for the same budget is most accurate.

        Judged before any training, by the artifact itself, on the data that the refitting saw.
        """
        run = self.run
        dtype = "int8" if run.export.dtype == AUTO else run.export.dtype

        def make() -> PrecisionChoice:
            if dtype == FLOAT32.dtype:
                return self._plan_all(graph, importance, dense, (), (FLOAT32,))
            with self._board() as session:
                trials = try_precisions(
                    self.model, self.inputs, session, dtype, effort=self._effort, progress=self.progress
                )
                if dtype == "int8":
                    mixed = leave_in_float(
                        self.model, self.inputs, graph, session, trials[0], self._resizer(graph, trials[0].precision),
                        self._judge(graph), tolerance=run.export.tolerance, effort=self._effort, progress=self.progress,
                    )  # fmt: skip
                    trials = tuple(dict.fromkeys((mixed, *trials)))
            if run.export.dtype != AUTO:
                return self._plan_all(graph, importance, dense, trials, (trials[0].precision,))
            limits = msgspec.to_builtins(run.budget)
            latency_only = not any(limits[name] for name in ("memory", "size", "energy"))
            candidates = worth_planning(trials, latency_only=latency_only)
            return self._plan_all(graph, importance, dense, trials, candidates)

        settings = [msgspec.to_builtins(part) for part in (run.budget, run.profile, run.target, run.export)]
        made_from = [digest(importance), dense.sha256, self.runtime, *settings, *self._planning]
        return self.folder.record(PrecisionChoice, "precision.json", made_from, make)

    def _plan_all(
        self, graph: Graph, importance: Importance, dense: Artifact, trials: Any, candidates: tuple[Precision, ...]
    ) -> PrecisionChoice:
        found: list[tuple[Precision, float | None]] = []
        for precision in candidates:
            try:
                plan = self._plan(graph, importance, dense, precision)
            except InfeasibleBudget:
                if precision == candidates[-1] and not found:
                    raise
                continue  # what another precision may reach
            found.append((precision, self._accuracy_of_plan(graph, plan) if len(candidates) > 1 else None))
        best = max(found, key=lambda item: item[1] or 0.0)[0]
        return PrecisionChoice(trials=tuple(trials), candidates=tuple(found), chosen=best)

    def _plan(self, graph: Graph, importance: Importance, dense: Artifact, precision: Precision) -> Plan:
        run, path = self.run, self.folder / f"profile-{precision.name}.jsonl"

        def make() -> Plan:
            resizer = self._resizer(graph, precision)
            with self._board() as session:
                profile = profile_target(
                    self.model,
                    self.inputs,
                    graph,
                    session,
                    path=path,
                    **msgspec.to_builtins(run.profile),
                    around=run.budget.latency,
                    effort=self._effort,
                    seed=run.seed,
                    resizer=resizer,
                    precision=precision,
                    progress=self.progress,
                )
                cost = dense_cost(graph, profile, dense.bytes)
                budget = make_budget(cost, **msgspec.to_builtins(run.budget))
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
                    effort=self._effort,
                    resizer=resizer,
                    progress=self.progress,
                )

        settings = [msgspec.to_builtins(part) for part in (run.budget, run.profile, run.target)]
        made_from = [digest(importance), dense.sha256, self.runtime, *settings, *self._planning]
        return self.folder.record(Plan, f"plan-{precision.name}.json", made_from, make, also=[path.name])

    def _accuracy_of_plan(self, graph: Graph, plan: Plan) -> float:
        """Of its artifact on the host before any training."""
        calibration = self.data.require("calibration")
        smaller = compact_and_compensate(self.model, self.inputs, graph, plan, calibration, progress=self.progress)
        return self._judge(graph).accuracy(smaller, plan.precision)

    def _judge(self, graph: Graph) -> Judge:
        return Judge(
            inputs=self.inputs, graph=graph, format=self.format_name, calibration=self._calibration,
            batches=self.data.require("calibration"),
        )  # fmt: skip

    def _resizer(self, graph: Graph, precision: Precision) -> Resizer:
        """Other widths of the model in a precision: made once, which takes several exports."""
        if precision not in self._resizers:
            made: Resizer = self.format.make_resizer(self.model, self.inputs, graph, precision=precision)
            made.dense_bytes += read_record(Artifact, self.folder / "dense.json").metadata_bytes
            self._resizers[precision] = made
        return self._resizers[precision]

    def compact(self, graph: Graph, plan: Plan) -> tuple[nn.Module, Accuracy]:
        """The smaller model, refitted, and how accurate it is before any training."""
        kept, unpaid = self._settled(graph, plan)

        def make() -> Accuracy:
            calibration = self.data.require("calibration") if self.run.prune.compensate else None
            smaller = compact_and_compensate(self.model, self.inputs, graph, kept, calibration, progress=self.progress)
            self._restore(smaller, unpaid)
            save_compact(smaller, self.inputs, self.folder.path)
            return Accuracy(dense=self._accuracy(self._dense), before_recovery=self._accuracy(smaller))

        made_from = [digest(plan), *self.sources, self.run.prune.compensate]
        files = ["compact.pt2", "compact.safetensors"]
        accuracy = self.folder.record(Accuracy, "compact.json", made_from, make, also=files)
        smaller = self._restore(compact_model(self.model, self.inputs, graph, kept.keep), unpaid)
        smaller.load_state_dict(load_file(self.folder / "compact.safetensors"))
        return smaller.eval(), accuracy

    def _settled(self, graph: Graph, plan: Plan) -> tuple[Plan, list[str]]:
        """The plan with layers whole whose rewritten form saves nothing, and their paths."""
        if (chosen := self.run.prune.transform) is None:
            return plan, []
        timed = plan.budget.latency_s is not None or plan.budget.energy_j is not None
        profile = read_profile(self.folder / "profile.jsonl") if timed else None
        return settle_plan(graph, plan, chosen.partition(":")[0], profile)

    def _restore(self, module: nn.Module, layers: list[str]) -> nn.Module:
        chosen = self.run.prune.transform
        return module if chosen is None else restore_layers(module, layers, chosen.partition(":")[0])

    def _counted(self, predicted: Cost, smaller: nn.Module) -> Cost:
        """With the parameters and MACs of the compact model, which a plan does not know where layers were put back."""
        if self.original is None:
            return predicted
        counted = predict_cost(trace_graph(smaller, self.inputs), {})
        return replace(predicted, parameters=counted.parameters, macs=counted.macs)

    def recover(self, plan: Plan, smaller: nn.Module, accuracy: Accuracy) -> tuple[nn.Module, Accuracy]:
        """The smaller model, trained."""
        settings, checkpoint = self.run.recover, self.folder / "recover.checkpoint"
        if not settings.epochs or self.data.train is None:
            return smaller, accuracy

        def make() -> Accuracy:
            result = recover_accuracy(
                smaller,
                self.data,
                teacher=self._dense if settings.distil else None,
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

    def train_for_8_bits(
        self, graph: Graph, plan: Plan, smaller: nn.Module, accuracy: Accuracy
    ) -> tuple[nn.Module, Accuracy]:
        """Further training with 8 bits simulated, where they cost more accuracy than the run tolerates."""
        settings, checkpoint = self.run.export, self.folder / "quantise.checkpoint"
        if plan.precision.dtype in FLOATS or self.data.test is None:
            return smaller, accuracy

        def make() -> Accuracy:
            judge = self._judge(graph)
            outcome = train_in_8_bits(
                smaller,
                plan.precision,
                judge,
                self.data,
                tolerance=settings.tolerance,
                epochs=settings.epochs,
                lr=self.run.recover.lr / 10,
                teacher=self.model if self.run.recover.distil else None,
                checkpoint=checkpoint,
                seed=self.run.seed,
                progress=self.progress,
            )
            self.folder.log(outcome)
            checkpoint.unlink(missing_ok=True)
            save_compact(smaller, self.inputs, self.folder.path, name="quantised")
            return replace(accuracy, quantised=judge.accuracy(smaller, plan.precision, self.data.test))

        made_from = [weights_digest(smaller), digest(plan), digest(accuracy), msgspec.to_builtins(settings)]
        files = ["quantised.pt2", "quantised.safetensors"]
        accuracy = self.folder.record(Accuracy, "quantised.json", made_from, make, also=files)
        smaller.load_state_dict(load_file(self.folder / "quantised.safetensors"))
        return smaller.eval(), accuracy

    def export(self, graph: Graph, plan: Plan, smaller: nn.Module) -> Artifact:
        """What runs on the board."""
        path = self.folder / f"model{self.format.SUFFIX}"
        artifact = self.folder.record(
            Artifact,
            "model.json",
            [weights_digest(smaller), digest(graph), digest(plan.precision), self.format_name, self._described],
            lambda: export_model(
                smaller,
                self.inputs,
                path,
                format=self.format_name,
                graph=graph,
                precision=plan.precision,
                calibration=None if plan.precision.dtype in FLOATS else self._calibration,
                **self._described,
            ),
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
                    predicted=self._counted(plan.predicted, smaller),
                    dense_counts=predict_cost(
                        graph if self.original is None else trace_graph(self.original, self.inputs), {}
                    ),
                    accuracy=accuracy,
                    effort=find_effort(self.run.target.effort),
                    provenance={"plan_sha256": digest(plan)},
                    progress=self.progress,
                )

        made_from = [artifact.sha256, dense.sha256, digest(plan), digest(accuracy), *self.sources]
        return self.folder.record(Report, "report.json", made_from, make)

    def bundle(self, plan: Plan, artifact: Artifact, report: Report) -> None:
        """What an app embeds, and the page with the evidence."""
        settings = self.run.bundle
        made_from = [artifact.sha256, digest(report), digest(plan), self.data.labels, self.data.preprocessing]
        made_from.append(msgspec.to_builtins(settings))
        example = as_arrays(first(self.data.require("test"), 1))[0]
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
                kinds=settings.kinds,
                license=settings.license,
                key=None if settings.key is None else self.base / settings.key,
                examples=[array[:1] for array in example],
            ),
        )
        self.folder.stage("page", made_from, [page.name], lambda: report_run(self.folder.path, page))

    def _board(self) -> AbstractContextManager[Session]:
        target = self.run.target
        return connect(
            target.name,
            threads=target.threads,
            runtime=self.runtime,
            meter=target.meter,
            space=self.folder.path,
            progress=self.progress,
        )

    @cached_property
    def _resizers(self) -> dict[Precision, Resizer]:
        return {}

    @cached_property
    def runtime(self) -> str:
        """What executes the artifacts on the board."""
        return choose_runtime(self.run.target.name, self.run.target.runtime, self.run.export.format)

    @cached_property
    def format_name(self) -> str:
        """The member of `formats` that it runs."""
        return runtime_format(self.runtime)

    @property
    def format(self) -> ModuleType:
        """That member."""
        return load_member("formats", self.format_name)

    @property
    def _described(self) -> dict[str, Any]:
        """What an artifact says of itself to apps."""
        return {"labels": self.data.labels, "preprocessing": self.data.preprocessing}

    @property
    def _effort(self) -> Effort:
        return find_effort(self.run.target.effort)

    @property
    def _planning(self) -> list[Any]:
        return [self.run.prune.solver, self.run.prune.levels, self.run.seed]

    @property
    def _calibration(self) -> Calibration:
        """What ranges of activations come from."""
        return as_arrays(first(self.data.require("calibration"), self.run.prune.batches))

    def _accuracy(self, module: nn.Module) -> float | None:
        return evaluate_accuracy(module, self.data.test) if self.data.test is not None else None


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
