"""From a traced model to a plan that its board has confirmed: scores, tables, search, precision, tournament.

The longest part of a run, and the part that decides what comes out. Each step is a record in the run's folder.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import msgspec
from safetensors.torch import load_file, save
from torch import Tensor, nn

from edgeprune.compact import Assembler
from edgeprune.context import Context, first, weights_digest
from edgeprune.core.budget import make_budget, step_budgets
from edgeprune.core.closed_loop import taken_round
from edgeprune.core.errors import DataError, InfeasibleBudget, RecordError, Unmet
from edgeprune.core.records import (
    FLOAT32,
    Artifact,
    Bracket,
    Budget,
    Graph,
    Importance,
    Plan,
    Precision,
    PrecisionChoice,
    Profile,
)
from edgeprune.core.store import digest, read_record, sha256_file, write_atomic, write_record
from edgeprune.device.session import Session
from edgeprune.graphs.portable import Portable
from edgeprune.graphs.ports import get_ports
from edgeprune.graphs.slice import expand_tensors
from edgeprune.load import PortableData
from edgeprune.on_board import dense_cost, plan_on_board
from edgeprune.plan import choose_widths
from edgeprune.precisions import leave_in_float, try_precisions, worth_planning
from edgeprune.profile import profile_target, read_profile
from edgeprune.recover import recover_accuracy
from edgeprune.score import score_groups
from edgeprune.search import scatter_weights, search_curves
from edgeprune.tournament import Contender, check_training, hold_tournament
from edgeprune.training.options import SCRATCH

Batches = Iterable[tuple[Any, Tensor]]
AUTO = "auto"
CURVES, UNIFORM = "curves", "uniform"
NEAR = re.compile(r"near-(\d+)")
"""Contenders of a tournament besides criteria."""


class Planning(Context):
    """The stages that lead to a plan."""

    def score(self, graph: Graph) -> Importance:
        """What each unit is worth."""
        settings = self.run.prune
        return self._score(graph, settings.criterion, "importance", curves=settings.curves, depth=settings.depth)

    def _score(self, graph: Graph, chosen: str, file: str, *, curves: bool, depth: bool = False) -> Importance:
        criterion, _, options = chosen.partition(":")
        batches = self.run.prune.batches

        def make() -> Importance:
            importance = score_groups(
                self.start,
                self.inputs,
                graph,
                self.data.calibration and first(self.data.calibration, batches),
                criterion=criterion,
                options=options,
                curves=curves,
                depth=depth,
                checkpoint=self.folder / f"{file}.jsonl" if curves else None,
                executor=self.run.executor,
                progress=self.progress,
            )
            if importance.by_magnitude:
                groups = ", ".join(importance.by_magnitude)
                self.folder.log(f"{file}: {criterion} cannot score {groups}: their units go by magnitude")
            return importance

        made_from = [digest(graph), *self.sources, chosen, curves, depth, batches]
        return self.folder.record(Importance, f"{file}.json", made_from, make)

    def regularize(self, graph: Graph) -> Self:
        """The stages of the model after a training that drives whole units to zero, if the run asks for one."""
        settings, run = self.run.prune, self.run
        if settings.regularizer is None:
            return self
        weights, checkpoint = self.folder / "regularized.safetensors", self.folder / "regularize.checkpoint"
        start = copy.deepcopy(self.model)

        def make() -> None:
            result = recover_accuracy(
                start,
                self.data,
                epochs=settings.regularizer_epochs,
                lr=run.recover.lr,
                checkpoint=checkpoint,
                seed=run.seed,
                regularizer=settings.regularizer,
                graph=graph,
                progress=self.progress,
            )
            zero = ", ".join(f"{name} {count}" for name, count in result.zeroed.items())
            self.folder.log(f"regularize: units at zero: {zero or 'none'}. {result.note}")
            state = {key: tensor.detach().clone().contiguous() for key, tensor in start.state_dict().items()}
            write_atomic(weights, save(state))
            checkpoint.unlink(missing_ok=True)

        made_from = [digest(graph), *self.sources, settings.regularizer, settings.regularizer_epochs, run.recover.lr]
        self.folder.stage("regularized", [*made_from, run.seed], [weights.name], make)
        start.load_state_dict(load_file(weights))
        return replace(self, start=start.eval(), sources=(*self.sources, weights_digest(start)))

    def narrow(self, graph: Graph, importance: Importance, dense: Artifact) -> tuple[Self, Importance]:
        """The steps of a schedule before the last: a part of the way to the budget each, trained, and scored anew.

        What remains of the model stays in its shape, with zeros, so that graph and tables hold for all steps. Only the
        last step drops whole branches.
        """
        stages, settings = self, self.run.prune
        for step in range(1, settings.step_count):
            start = stages._take_step(graph, importance, dense, step)
            stages = replace(stages, start=start, sources=(*self.sources, weights_digest(start)))
            importance = stages._score(
                graph, settings.criterion, f"importance-{step}", curves=settings.curves,
                depth=settings.depth and step == settings.step_count - 1,
            )  # fmt: skip
        return stages, importance

    def _take_step(self, graph: Graph, importance: Importance, dense: Artifact, step: int) -> nn.Module:
        run, weights = self.run, self.folder / f"step-{step}.safetensors"
        checkpoint = self.folder / "step.checkpoint"
        of_groups = {name: curve for name, curve in importance.curves.items() if name in graph.units}
        importance = replace(importance, curves=of_groups)

        def make() -> Plan:
            with self._board() as session:
                profile = self._profile(graph, session, FLOAT32)
            cost = dense_cost(graph, profile, dense.bytes)
            budget = make_budget(cost, **msgspec.to_builtins(run.budget))
            part = step_budgets(cost, budget, run.prune.steps)[step - 1]
            plan = choose_widths(graph, profile, importance, part, solver=run.prune.solver, levels=run.prune.levels)
            smaller = self._assemble(graph, plan)
            result = recover_accuracy(
                smaller,
                self.data,
                teacher=self.dense if run.recover.distil else None,
                epochs=run.prune.step_epochs,
                lr=run.recover.lr,
                checkpoint=checkpoint,
                seed=run.seed,
                progress=self.progress,
            )
            self.folder.log(f"step {step} of {run.prune.step_count}: {result.note or 'nothing to note'}")
            write_atomic(weights, save(expand_tensors(self.model, smaller, graph, plan.keep)))
            checkpoint.unlink(missing_ok=True)
            return plan

        settings = [msgspec.to_builtins(part) for part in (run.budget, run.profile, run.target)]
        settings += [run.recover.decisive, run.prune.steps, run.prune.step_epochs, run.prune.compensate]
        made_from = [digest(importance), dense.sha256, self.runtime, *settings, *self._planning, *self.sources]
        self.folder.record(Plan, f"step-{step}.json", made_from, make, also=[weights.name])
        start = copy.deepcopy(self.model)
        start.load_state_dict(load_file(weights))
        return start.eval()

    def profile_and_plan(self, graph: Graph, importance: Importance, dense: Artifact) -> Plan:
        """Latency tables from the board, then widths that the board confirms, in the precision that serves best.

        Where training is to follow, a short one picks among plans that came about in several ways.
        """
        if self.run.prune.plan is not None:
            return self._take_plan(graph, self.base / self.run.prune.plan)
        choice = self._choose_precision(graph, importance, dense)
        name = self._hold_tournament(graph, importance, choice.chosen)
        files = [f"plan-{name}.json", f"profile-{name}.jsonl"]

        def make() -> Plan:
            shutil.copyfile(self.folder / files[1], self.folder / "profile.jsonl")
            return read_record(Plan, self.folder / files[0])

        made_from = [sha256_file(self.folder / file) for file in files]
        return self.folder.record(Plan, "plan.json", made_from, make, also=["profile.jsonl"])

    def _take_plan(self, graph: Graph, path: Path) -> Plan:
        """A plan of another run of this model, with the profile beside it."""
        plan, profile = read_record(Plan, path), path.with_name("profile.jsonl")
        if plan.graph_sha256 != graph.model_sha256 or not profile.is_file():
            raise RecordError(f"{path} is no plan of this model with its profile.jsonl beside it; plan it anew")

        def take() -> Plan:
            shutil.copyfile(profile, self.folder / "profile.jsonl")
            return plan

        made_from = [digest(plan), sha256_file(profile)]
        return self.folder.record(Plan, "plan.json", made_from, take, also=["profile.jsonl"])

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
        """A profile in a precision, and the plan that the weighed loss curves lead to."""
        run, path = self.run, self.folder / f"profile-{precision.name}.jsonl"

        def make() -> Plan:
            self.folder.borrow(path.name, ["graph.json", Path(dense.path).name])
            with self._board() as session:
                profile = self._profile(graph, session, precision)
            budget = make_budget(dense_cost(graph, profile, dense.bytes), **msgspec.to_builtins(run.budget))
            weighed = self._weigh(graph, importance, profile, budget)  # takes minutes, and no board
            write_record(self.folder / _weighed_file(precision), weighed)
            with self._board() as session:
                return self._close_loop(graph, profile, weighed, budget, session, path, run.prune.solver)

        settings = [msgspec.to_builtins(part) for part in (run.budget, run.profile, run.target)]
        made_from = [digest(importance), dense.sha256, self.runtime, *settings, *self._planning]
        return self.folder.record(
            Plan, f"plan-{precision.name}.json", made_from, make, also=[path.name, _weighed_file(precision)]
        )

    def _profile(self, graph: Graph, session: Session, precision: Precision) -> Profile:
        """Latency tables; what is in the profile's file is not measured again."""
        run = self.run
        return profile_target(
            self.model,
            self.inputs,
            graph,
            session,
            path=self.folder / f"profile-{precision.name}.jsonl",
            **msgspec.to_builtins(run.profile),
            around=run.budget.latency,
            effort=self._effort,
            seed=run.seed,
            resizer=self._resizer(graph, precision),
            precision=precision,
            progress=self.progress,
        )

    def _weigh(self, graph: Graph, importance: Importance, profile: Profile, budget: Budget) -> Importance:
        """Loss curves that know what groups lose together."""
        run, settings = self.run, self.run.search
        if (other := self._other) is not None:
            return replace(importance, found=other.widths)
        if not importance.curves or settings.trials < 2:
            return importance
        return search_curves(
            self.start,
            self.inputs,
            graph,
            profile,
            importance,
            budget,
            first(self.data.require("calibration"), run.prune.batches),
            trials=settings.trials,
            seconds=settings.seconds,
            solver=run.prune.solver,
            levels=run.prune.levels,
            compensate=run.prune.compensate,
            checkpoint=self.folder / "search.jsonl",
            seed=run.seed,
            executor=run.executor,
            progress=self.progress,
        )

    def _close_loop(
        self, graph: Graph, profile: Profile, importance: Importance, budget: Budget, session: Session, path: Path,
        solver: str,
    ) -> Plan:  # fmt: skip
        return plan_on_board(
            self.model,
            self.inputs,
            graph,
            profile,
            importance,
            budget,
            session,
            path,
            solver=solver,
            levels=self.run.prune.levels,
            effort=self._effort,
            resizer=self._resizer(graph, profile.precision),
            progress=self.progress,
        )

    def _hold_tournament(self, graph: Graph, importance: Importance, precision: Precision) -> str:
        """Name of the plan that is best after a short training; that of the loss curves where there is none."""
        run, curves = self.run, precision.name
        others = [name for name in run.search.contenders if name != CURVES]
        train, file = self.data.train, self.folder / "tournament.json"
        if not run.recover.epochs or train is None or not others or not self.data.labelled:
            file.unlink(missing_ok=True)  # of an earlier run file
            return curves
        if run.recover.start == SCRATCH:
            # Pruned weights say nothing of it, and what learns fastest from nothing in an epoch need not be best.
            self.folder.log("no tournament: it trains pruned weights, and [recover] start = 'scratch' draws new ones")
            file.unlink(missing_ok=True)
            return curves
        try:
            check_training(train, run.recover.epochs, run.seed)
        except DataError as error:  # no reason to end the run
            self.folder.log(f"no tournament: {error}")
            file.unlink(missing_ok=True)
            return curves
        plans = {CURVES: read_record(Plan, self.folder / f"plan-{curves}.json")}
        left_out: dict[str, str] = {}
        for name in others:
            try:
                plan = self._contend(graph, importance, plans[CURVES], name)
            except (Unmet, DataError) as error:
                left_out[name] = str(error)
                continue
            twin = next((other for other, known in plans.items() if digest(known.keep) == digest(plan.keep)), None)
            if twin is None:
                plans[name] = plan
            else:
                left_out[name] = f"keeps the same channels as '{twin}'"
        contenders = [
            Contender(
                name=name,
                made_from=[digest(plan), *self.sources, run.prune.compensate],
                plan=plan,
            )
            for name, plan in plans.items()
        ]
        data = PortableData(self.data, run.data.source, self.base, get_ports(self.dense).inputs)

        def make() -> Bracket:
            bracket = hold_tournament(
                contenders,
                _Nets(Portable(self.start, self.inputs), graph, data, refit=run.prune.compensate),
                data,
                teacher=Portable(self.dense, self.inputs) if run.recover.distil else None,
                epochs=run.recover.epochs,
                lr=run.recover.lr,
                checkpoint=self.folder / "tournament.jsonl",
                seed=run.seed,
                executor=run.executor,
                progress=self.progress,
            )
            latency = {name: taken.measured.median for name, plan in plans.items() if (taken := taken_round(plan))}
            return replace(bracket, latency_s=latency, left_out=left_out)

        made_from = [
            *(digest(plan) for plan in plans.values()),
            *self.sources,
            run.recover.decisive,
            run.seed,
        ]
        bracket = self.folder.record(Bracket, file.name, made_from, make)
        return curves if bracket.winner == CURVES else f"{curves}-{_file_name(bracket.winner)}"

    def _contend(self, graph: Graph, importance: Importance, base: Plan, contender: str) -> Plan:
        """A plan within the same budget that came about in another way, confirmed by the board."""
        name = f"{base.precision.name}-{_file_name(contender)}"
        source, path = self.folder / f"profile-{base.precision.name}.jsonl", self.folder / f"profile-{name}.jsonl"
        solver = UNIFORM if contender == UNIFORM else self.run.prune.solver
        if near := NEAR.fullmatch(contender):
            weighed = read_record(Importance, self.folder / _weighed_file(base.precision))
            scored = scatter_weights(weighed, self.run.seed + int(near[1]))
        elif contender == UNIFORM:
            scored = importance
        else:
            scored = self._score(graph, contender, f"importance-{_file_name(contender)}", curves=False)

        def make() -> Plan:
            shutil.copyfile(source, path)
            with self._board() as session:
                return self._close_loop(graph, read_profile(path), scored, base.budget, session, path, solver)

        made_from = [digest(base), digest(scored), contender, *self._planning]
        return self.folder.record(Plan, f"plan-{name}.json", made_from, make, also=[path.name])

    def _accuracy_of_plan(self, graph: Graph, plan: Plan) -> float:
        """Of its artifact on the host before any training."""
        return self._judge(graph).accuracy(self._assemble(graph, plan), plan.precision)


@dataclass(frozen=True, slots=True)
class _Nets:
    """Makes the net of a plan, in a worker too."""

    model: Portable
    graph: Graph
    data: PortableData
    refit: bool

    def __call__(self, plan: Plan) -> nn.Module:
        assembler = Assembler.of(self.model.captured, self.graph)
        return assembler.assemble(plan, self.data.calibration if self.refit else None)


def _weighed_file(precision: Precision) -> str:
    """Where the importance is kept that a precision's plan was made from."""
    return f"weighed-{precision.name}.json"


def _file_name(contender: str) -> str:
    """A contender's name without what file names should not have (`magnitude:p=1`)."""
    return re.sub(r"[^\w-]+", "-", contender)
