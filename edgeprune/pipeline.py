"""All stages in a straight line.

`run_pipeline` is the whole tool: every stage reads what the one before wrote into the run's folder
and writes its own record there, so that a run that was killed goes on at the stage where it stopped.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import msgspec
from safetensors.torch import load_file
from torch import Tensor, nn

from edgeprune.bundle import write_bundle
from edgeprune.compact import compact_model, save_compact
from edgeprune.context import first, weights_digest
from edgeprune.core.cost import predict_cost
from edgeprune.core.effort import find_effort
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import (
    Accuracy,
    Artifact,
    Bracket,
    Cost,
    Gated,
    Graph,
    Importance,
    ModelSpec,
    Pivoted,
    Plan,
    Report,
    Sparsity,
)
from edgeprune.core.rules import apply_rules
from edgeprune.core.runfile import RunFile
from edgeprune.core.runfolder import RunFolder
from edgeprune.core.store import digest, read_record, sha256_file, write_record
from edgeprune.export import check_sparse, export_model
from edgeprune.gate import gate_model, settle_gates
from edgeprune.graphs.ports import get_ports
from edgeprune.load import Data, as_arrays, example_inputs, load_data, load_model
from edgeprune.pivot import plan_pivot
from edgeprune.planning import Planning
from edgeprune.precisions import FLOATS, train_in_8_bits
from edgeprune.profile import read_profile
from edgeprune.recover import evaluate_accuracy, recover_accuracy
from edgeprune.report import write_report
from edgeprune.run_checks import check_recovery, check_run_file, check_unlabelled
from edgeprune.scope import enter_scope, scope_data
from edgeprune.sparsify import order_channels, sparsify_model
from edgeprune.trace import trace_graph
from edgeprune.training.launch import launch_recovery
from edgeprune.training.options import MACS
from edgeprune.training.scratch import epochs_of_equal_work
from edgeprune.transform import restore_layers, settle_plan, transform_run
from edgeprune.validate import check_branches, collect_examples, validate_artifact

Batches = Iterable[tuple[Any, Tensor]]
KEPT_ZEROS = "zeros"
"""The pattern of further training: what is zero stays zero."""


def run_pipeline(run: RunFile, base: Path, progress: Progress = silent, *, beside: Sequence[Path] = ()) -> Report:
    """From a trained model to a validated bundle.

    run: what to do. base: the folder that relative paths in it start from.
    beside: folders of other runs of the same model on the same board, whose stages and measurements are taken over
        where they hold for this run too.
    returns: the report; a budget that is not met is a failed check in it.
    raises: EdgepruneError with what was wrong; what was finished stays in the run's folder.
    """
    check_run_file(run)
    folder = RunFolder(base / run.output.dir, beside)
    with folder.locked():
        model = load_model(run.spec, base)
        inputs, data = example_inputs(run.spec, model), load_data(run.data.source, base, get_ports(model).inputs)
        sources = (weights_digest(model), run.data.source, *file_digest(base / run.data.source.partition(":")[0]))
        if run.model.scope is not None:
            sources = (*sources, run.model.scope)
            model, inputs, data = take_scope(model, run.model.scope, inputs, data)
        check_recovery(run, model, inputs)
        if not data.labelled:
            check_unlabelled(run, model, inputs)
            data = replace(data, train=data.train or data.calibration)
            folder.log("no labels: removed channels are refitted for, and training matches the dense outputs")
        stages = Stages(run, base, folder, sources, model, inputs, data, progress, start=model).transformed().pivoted()
        if run.export.sparse:
            check_sparse(stages.format_name)
        if run.prune.gating is not None:
            check_branches(stages.runtime)
        graph = stages.trace()
        dense = stages.export_dense(graph)
        stages = stages.regularize(graph)
        stages, importance = stages.narrow(graph, stages.score(graph), dense)
        plan = stages.profile_and_plan(graph, importance, dense)
        compact, accuracy = stages.sparsify(*stages.compact(graph, plan))
        recovered, accuracy = stages.recover(plan, compact, accuracy)
        recovered, accuracy = stages.gate(recovered, accuracy)
        recovered, accuracy = stages.train_for_8_bits(graph, plan, recovered, accuracy)
        artifact = stages.export(graph, plan, recovered)
        report = stages.validate(graph, plan, dense, artifact, recovered, accuracy)
        stages.bundle(plan, artifact, report)
        return report


def take_scope(
    model: nn.Module, path: str, inputs: tuple[Tensor, ...], data: Data
) -> tuple[nn.Module, tuple[Tensor, ...], Data]:
    """The submodule in the place of the model, with the inputs that it receives in the model's forward passes."""
    part, received = enter_scope(model, path, inputs)
    seen = scope_data(model, path, data)
    return part, received, Data(train=seen.train, calibration=seen.calibration, test=seen.test, labelled=False)


class Stages(Planning):
    """The stages of one run. Each is skipped when what it is made from and its files are what they were."""

    def transformed(self) -> Self:
        """The stages of the model as the run's transform rewrites it; what they are measured against stays."""
        chosen = self.run.prune.transform
        if chosen is None:
            return self
        calibration = first(self.data.require("calibration"), self.run.prune.batches)
        made_from = [*self.sources, self.run.prune.batches]
        model = transform_run(self.model, calibration, self.folder, made_from, chosen)
        return replace(self, model=model, start=model, original=self.model, sources=(*self.sources, chosen))

    def pivoted(self) -> Self:
        """The stages of the model with layers in diagonal blocks, where the run asks for some and the board gains.

        Before widths are planned, since these are then priced for grouped kernels and confirmed with all the rest.
        """
        settings = self.run.prune
        if not settings.pivot:
            return self
        calibration = first(self.data.require("calibration"), settings.batches)
        latency = settings.pivot_latency or self.run.budget.latency
        assert latency is not None

        def make() -> Pivoted:
            with self._board() as session:
                model, record = plan_pivot(
                    self.model, self.inputs, calibration, session, latency=latency, groups=settings.pivot,
                    refit=settings.compensate, solver=settings.solver, effort=self._effort, seed=self.run.seed,
                    progress=self.progress,
                )  # fmt: skip
            save_compact(model, self.inputs, self.folder.path, name="pivoted")
            return record

        made_from = [*self.sources, settings.pivot, latency, settings.batches, settings.compensate, settings.solver]
        made_from += [self.runtime, msgspec.to_builtins(self.run.target), self.run.seed]
        files = ["pivoted.pt2", "pivoted.safetensors"]
        record = self.folder.record(Pivoted, "pivoted.json", made_from, make, also=files)
        self.folder.log(f"pivot: {len(record.layers)} layers in blocks, {record.macs / record.whole_macs:.0%} of MACs")
        model = load_model(ModelSpec(file="pivoted.pt2"), self.folder.path)
        sources = (*self.sources, weights_digest(model))
        return replace(self, model=model, start=model, original=self.model, sources=sources)

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

    def export_dense(self, graph: Graph) -> Artifact:
        """What the pruned model is measured against."""
        path = self.folder / f"dense{self.format.SUFFIX}"
        made_from = [digest(graph), *self.sources, self._described]
        artifact = self.folder.record(
            Artifact,
            "dense.json",
            made_from,
            lambda: export_model(
                self.dense, self.inputs, path, format=self.format_name, graph=graph, **self._described
            ),
            also=[path.name],
        )
        return replace(artifact, path=str(path))

    def compact(self, graph: Graph, plan: Plan) -> tuple[nn.Module, Accuracy]:
        """The smaller model, refitted, and how accurate it is before any training."""
        kept, unpaid = self._settled(graph, plan)

        def make() -> Accuracy:
            smaller = self._restore(self._assemble(graph, kept), unpaid)
            save_compact(smaller, self.inputs, self.folder.path)
            return Accuracy(dense=self._accuracy(self.dense), before_recovery=self._accuracy(smaller))

        made_from = [digest(plan), *self.sources, self.run.prune.compensate]
        files = ["compact.pt2", "compact.safetensors"]
        accuracy = self.folder.record(Accuracy, "compact.json", made_from, make, also=files)
        smaller = self._restore(compact_model(self.start, self.inputs, graph, kept.keep), unpaid)
        smaller.load_state_dict(load_file(self.folder / "compact.safetensors"))
        return smaller.eval(), accuracy

    def sparsify(self, smaller: nn.Module, accuracy: Accuracy) -> tuple[nn.Module, Accuracy]:
        """The compact model in the order of channels that the run's pattern wants, and how accurate zeros leave it.

        Where training follows, it puts the zeros in; they stay to the end.
        """
        if (pattern := self.run.prune.pattern) is None:
            return smaller, accuracy

        def make() -> Accuracy:
            permuted = order_channels(smaller, self.inputs, trace_graph(smaller, self.inputs), pattern)
            sparse = copy.deepcopy(smaller)
            write_record(self.folder / "sparsity.json", replace(sparsify_model(sparse, pattern), permuted=permuted))
            save_compact(smaller if self._trains else sparse, self.inputs, self.folder.path, name="sparse")
            return replace(accuracy, before_recovery=self._accuracy(sparse))

        made_from = [weights_digest(smaller), digest(accuracy), *self.sources, pattern, self._trains]
        files = ["sparsity.json", "sparse.pt2", "sparse.safetensors"]
        accuracy = self.folder.record(Accuracy, "sparse.json", made_from, make, also=files)
        smaller.load_state_dict(load_file(self.folder / "sparse.safetensors"))
        return smaller.eval(), accuracy

    @property
    def _trains(self) -> bool:
        return bool(self.run.recover.epochs) and self.data.train is not None

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

    def _expected(self, predicted: Cost, smaller: nn.Module) -> Cost:
        """What the validated model should cost.

        Of a gated one the MACs of the average calibration example, and no latency: tables do not know its ways.
        """
        if self.run.prune.gating is None:
            return self._counted(predicted, smaller)
        gated, parameters = (
            read_record(Gated, self.folder / "gating.json"),
            sum(p.numel() for p in smaller.parameters()),
        )
        macs = None if predicted.macs is None else round(gated.macs_share * predicted.macs)
        return replace(predicted, parameters=parameters, macs=macs, latency_s=None)

    def recover(self, plan: Plan, smaller: nn.Module, accuracy: Accuracy) -> tuple[nn.Module, Accuracy]:
        """The smaller model, trained."""
        settings, checkpoint = self.run.recover, self.folder / "recover.checkpoint"
        if not self._trains:
            return smaller, accuracy

        def make() -> Accuracy:
            epochs = self._recovery_epochs(smaller)
            if settings.launch:
                result = launch_recovery(self.run, self.base, self.folder, epochs)
            else:
                result = recover_accuracy(
                    smaller,
                    self.data,
                    teacher=self.dense if settings.distil else None,
                    epochs=epochs,
                    lr=settings.lr,
                    checkpoint=checkpoint,
                    seed=self.run.training_seed,
                    pattern=self.run.prune.pattern,
                    match_outputs=not self.data.labelled,
                    progress=self.progress,
                    **settings.options,
                )
                save_compact(smaller, self.inputs, self.folder.path, name="recovered")
            self.folder.log(f"recover: {result.note or 'nothing to note'}")
            if result.difference_before is not None and result.difference_after is not None:
                shares = f"{result.difference_before:.3g} before and {result.difference_after:.3g} after training"
                self.folder.log(f"recover: outputs differ from the dense ones by {shares}, as shares of their power")
            checkpoint.unlink(missing_ok=True)
            return replace(accuracy, after_recovery=result.accuracy_after)

        made_from = [digest(plan), digest(accuracy), *self.sources, settings.decisive, self.run.training_seed]
        made_from += [pattern] if (pattern := self.run.prune.pattern) is not None else []
        files = ["recovered.pt2", "recovered.safetensors"]
        accuracy = self.folder.record(Accuracy, "recovered.json", made_from, make, also=files)
        smaller.load_state_dict(load_file(self.folder / "recovered.safetensors"))
        return smaller.eval(), accuracy

    def _recovery_epochs(self, smaller: nn.Module) -> int:
        settings = self.run.recover
        if settings.budget != MACS:
            return settings.epochs
        dense, ours = (trace_graph(model, self.inputs) for model in (self.dense, smaller))
        epochs = epochs_of_equal_work(settings.epochs, dense, ours)
        self.folder.log(f"recover: {epochs} epochs, as much arithmetic as {settings.epochs} of the dense model")
        return epochs

    def gate(self, smaller: nn.Module, accuracy: Accuracy) -> tuple[nn.Module, Accuracy]:
        """The model with gates that decide for every input what to compute, trained and set."""
        settings, checkpoint = self.run.prune, self.folder / "gate.checkpoint"
        if (gating := settings.gating) is None:
            return smaller, accuracy
        gated = gate_model(smaller, self.inputs, gating)

        def make() -> Accuracy:
            result = recover_accuracy(
                gated,
                self.data,
                teacher=self.dense if self.run.recover.distil else None,
                epochs=settings.gating_epochs,
                lr=self.run.recover.lr,
                checkpoint=checkpoint,
                seed=self.run.training_seed,
                gating=gating,
                progress=self.progress,
            )
            record = settle_gates(gated, self.inputs, self.data.require("calibration"), gating)
            self.folder.log(f"gate: {result.note or 'nothing to note'}")
            for name, what in record.collapsed.items():
                self.folder.log(f"gate: {name} is {what} on the calibration data")
            write_record(self.folder / "gating.json", record)
            save_compact(gated, self.inputs, self.folder.path, name="gated")
            checkpoint.unlink(missing_ok=True)
            return replace(accuracy, after_recovery=self._accuracy(gated))

        made_from = [weights_digest(smaller), digest(accuracy), *self.sources, gating, settings.gating_epochs]
        made_from += [self.run.recover.decisive, self.run.training_seed]
        files = ["gating.json", "gated.pt2", "gated.safetensors"]
        accuracy = self.folder.record(Accuracy, "gated.json", made_from, make, also=files)
        gated.load_state_dict(load_file(self.folder / "gated.safetensors"))
        return gated.eval(), accuracy

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
                teacher=self.dense if self.run.recover.distil else None,
                checkpoint=checkpoint,
                seed=self.run.training_seed,
                pattern=None if self.run.prune.pattern is None else KEPT_ZEROS,
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
            [
                weights_digest(smaller),
                digest(graph),
                digest(plan.precision),
                self.format_name,
                self._described,
                self.run.export.sparse,
            ],
            lambda: export_model(
                smaller,
                self.inputs,
                path,
                format=self.format_name,
                graph=graph,
                precision=plan.precision,
                calibration=None if plan.precision.dtype in FLOATS else self._calibration,
                sparse=self.run.export.sparse,
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
                    predicted=self._expected(plan.predicted, smaller),
                    dense_counts=predict_cost(
                        graph if self.original is None else trace_graph(self.original, self.inputs), {}
                    ),
                    accuracy=accuracy,
                    effort=find_effort(self.run.target.effort),
                    provenance={"plan_sha256": digest(plan)},
                    sparsity=None if self.run.prune.pattern is None else self._sparsity(),
                    progress=self.progress,
                )

        made_from = [artifact.sha256, dense.sha256, digest(plan), digest(accuracy), *self.sources]
        return self.folder.record(Report, "report.json", made_from, make)

    def _sparsity(self) -> Sparsity:
        return read_record(Sparsity, self.folder / "sparsity.json")

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

    def _accuracy(self, module: nn.Module) -> float | None:
        labelled = self.data.labelled and self.data.test is not None
        return evaluate_accuracy(module, self.data.require("test")) if labelled else None


def file_digest(path: Path) -> list[str]:
    """The digest of a file that may change under its name; nothing for what is not a file."""
    return [sha256_file(path)] if path.is_file() else []


def report_run(directory: Path, path: Path) -> Path:
    """Write the HTML page of a finished run from the records in its folder. returns: `path`."""
    folder = RunFolder(directory)
    # Of the steps of a schedule; a contender's criterion has a name.
    scored = sorted(directory.glob("importance-[0-9]*.json"), key=lambda path: int(path.stem.rpartition("-")[2]))
    write_report(
        path,
        report=read_record(Report, folder / "report.json"),
        plan=read_record(Plan, folder / "plan.json"),
        graph=read_record(Graph, folder / "graph.json"),
        profile=read_profile(folder / "profile.jsonl"),
        importance=read_record(Importance, scored[-1] if scored else folder / "importance.json"),
        bracket=read_record(Bracket, held) if (held := folder / "tournament.json").is_file() else None,
    )
    return path
