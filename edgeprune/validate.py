"""Run an artifact on the board beside the dense one and hold what it does against what was asked."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgeprune.core.checks import check_budget, check_parity
from edgeprune.core.effort import DEFAULT, Effort
from edgeprune.core.energy import energy_per_run
from edgeprune.core.errors import AgentError, DataError, DeviceError, RecordError, UsageError
from edgeprune.core.family import load_member
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import (
    Accuracy,
    Artifact,
    Budget,
    Conditions,
    Cost,
    Distribution,
    IntArray,
    NumericError,
    Quantity,
    Report,
    Samples,
    Sparsity,
    Step,
    StepResult,
)
from edgeprune.core.stats import clean_turns, median, over_inputs, pooled_ratio, quantity, statistic, turn_ratios
from edgeprune.core.store import sha256_file
from edgeprune.core.tensors import Array, decode, encode

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.device.session import Session

NO_METER = "none"
QUANTISED = ("dynamic", "int8")
TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "dynamic": 0.1, "int8": 0.1}
"""Largest |board - host| / max |host|: numbers of 8 bits may be rounded otherwise by another processor's kernels."""


BY_INPUT = ("mean", "worst")
"""Statistics over inputs."""
INPUTS_TIMES = 20
"""How many times as long as one model over and over takes it to time many inputs, each on its own."""
MOST_ROUNDS = 4
"""How many times the usual rounds are measured while it is undecided whether a limit is met."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Real inputs and what the host makes of them.

    inputs: the artifact's input names -> arrays as it wants them, leading axis = examples, one length for all.
    reference: outputs on the host in the artifact's order, as the module has them, leading axis = examples.
    targets: (examples,) class indices, or None where the task is not classification.
    gates: of a gated model, whether each gate runs, (examples,).
    """

    inputs: dict[str, Array]
    reference: tuple[Array, ...]
    targets: IntArray | None = None
    gates: dict[str, npt.NDArray[np.bool_]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def sha256(self) -> str:
        """Of the inputs, as the artifact wants them, and the targets: what an accuracy was measured on."""
        whole = hashlib.sha256()
        for array in (*self.inputs.values(), *(() if self.targets is None else (self.targets,))):
            whole.update(f"{array.dtype} {array.shape}\n".encode())
            whole.update(np.ascontiguousarray(array).tobytes())
        return whole.hexdigest()


def collect_examples(
    module: nn.Module, batches: Iterable[tuple[Any, Any]], artifact: Artifact, *, limit: int = 512
) -> Examples:
    """The first `limit` examples of `batches` with the outputs that the board is held against.

    module: in evaluation mode; its outputs are the reference, or of an artifact with numbers of 8 bits the artifact's
    own on the host: what those numbers cost is a matter of accuracy, not of the board.
    batches: (inputs, targets) of tensors; inputs may be a tuple where the model takes several.
    raises: DataError when there is no example, or the inputs are not the artifact's.
    """
    import torch
    from torch.utils._pytree import tree_leaves

    from edgeprune.graphs.choices import decide_runs
    from edgeprune.graphs.ports import get_ports

    seen: list[tuple[Any, Any]] = []
    inputs: list[list[Array]] = []
    outputs: list[list[Array]] = []
    targets: list[Array] = []
    taken = 0
    for given, wanted in batches:
        tensors = [part[: limit - taken] for part in (given if isinstance(given, tuple | list) else (given,))]
        if len(tensors) != len(artifact.inputs):
            raise DataError(f"the data gives {len(tensors)} inputs, {artifact.path} takes {len(artifact.inputs)}")
        arrays = [tensor.numpy(force=True) for tensor in tensors]
        if artifact.dtype in QUANTISED:
            outputs.append(load_member("formats", artifact.format).run(Path(artifact.path), arrays))
        else:
            with torch.no_grad():
                leaves = [leaf for leaf in tree_leaves(module(*tensors)) if isinstance(leaf, torch.Tensor)]
            outputs.append([leaf.float().numpy(force=True) for leaf in leaves])
        seen.append((tensors, None))
        inputs.append([encode(array, info) for array, info in zip(arrays, artifact.inputs, strict=True)])
        targets.append(np.asarray(wanted)[: limit - taken])
        taken += len(tensors[0])
        if taken >= limit:
            break
    if taken == 0:
        raise DataError("the data gives no examples to validate on; check its test split")
    joined = np.concatenate(targets)
    return Examples(
        inputs={i.name: np.concatenate(a) for i, a in zip(artifact.inputs, zip(*inputs, strict=True), strict=True)},
        reference=tuple(np.concatenate(arrays) for arrays in zip(*outputs, strict=True)),
        targets=joined.astype(np.int64) if joined.ndim == 1 and joined.dtype.kind in "iu" else None,
        gates=decide_runs(module, tuple(seen[0][0]), seen) if get_ports(module).gates else {},
    )


def validate_artifact(
    artifact: Artifact,
    session: Session,
    *,
    dense: Artifact,
    examples: Examples,
    budget: Budget,
    predicted: Cost,
    dense_counts: Cost | None = None,
    accuracy: Accuracy | None = None,
    tolerance: float | None = None,
    agreement: float = 0.99,
    effort: Effort = DEFAULT,
    provenance: Mapping[str, str] | None = None,
    sparsity: Sparsity | None = None,
    progress: Progress = silent,
) -> Report:
    """Measure dense and compact on the board, compare outputs with the host, check every limit.

    predicted: the plan's cost of the compact model; its parameters and MACs are carried over, as
        `dense_counts` gives them for the dense one. accuracy: what is known before the board.
    budget: where its latency was asked as a share of the dense model, that share is held against the
        ratio of neighbouring turns, since a machine that others share changes its speed from second to
        second. The limit in seconds, and the prediction, are then at the speed of this validation.
        Its statistic `mean` or `worst` is over the examples, each timed on its own; so are the others of a gated
        model, and `mean` takes the place of `median`, which would be that of whatever most examples do.
    tolerance: largest |board - host| / max |host|; None: by the artifact's dtype. agreement: least share of equal
        top-1 answers.
    effort: its repeats are rounds in which both artifacts are timed in turns; up to MOST_ROUNDS as
        many while the limit lies inside the measured interval.
    sparsity: of the model's weights, for the report.
    returns: the report. A limit that is not met is a failed check in it, not an exception.
    raises: RecordError when an artifact was altered since it was exported; AgentError when one does
        not run on the board; DeviceError from the session.
    """
    for each in (artifact, dense):
        _check_unaltered(each)
    # A job of its own: a second validation measures again instead of repeating the first one's answer.
    if examples.gates and budget.statistic == "median":
        budget = replace(budget, statistic="mean")
    by_input = bool(examples.gates) or budget.statistic in BY_INPUT
    if examples.gates:
        check_branches(session.target.runtime)
    board = _Board(session, f"validate-{artifact.sha256[:12]}-{time.time_ns():x}", progress, by_input=by_input)
    try:
        board.push(artifact, dense, examples)
        board.measure(effort, first=True)
        outputs = board.fetch_outputs(artifact)
        while True:
            measured = {
                name: quantity(np.concatenate([clean_turns(s) for s in samples]))
                for name, samples in board.samples.items()
            }
            spread = over_inputs(board.samples["compact"], board.samples["dense"], examples.gates) if by_input else None
            limit, asked = budget.latency_s, _latency(board.samples["compact"], budget, spread)
            if spread is not None:
                measured["compact"] = _latency(board.samples["compact"], replace(budget, statistic="mean"), spread)
            undecided = limit is not None and asked.low <= limit <= asked.high
            if budget.latency_share is not None:
                share = _share_of_dense(board.samples, budget, spread)
                limit = budget.latency_share * asked.median / share.median
                undecided = share.low <= budget.latency_share <= share.high
            if not undecided or len(board.samples["compact"]) >= MOST_ROUNDS * effort.repeats:
                break
            board.measure(effort)
    finally:
        board.clear()

    before = accuracy or Accuracy()
    error, on_board = _compare(outputs, examples)
    counts = {"dense": dense_counts or Cost(), "compact": predicted}
    costs = {
        name: Cost(
            latency_s=measured[name],
            peak_memory_bytes=board.memory[name],
            energy_j=board.energy.get(name),
            artifact_bytes=file.bytes,
            compressed_bytes=file.compressed_bytes,
            parameters=counts[name].parameters,
            macs=counts[name].macs,
        )
        for name, file in (("dense", dense), ("compact", artifact))
    }
    slowness = limit / budget.latency_s if limit and budget.latency_s else 1.0
    predicted = replace(predicted, latency_s=_scale(predicted.latency_s, slowness))
    checks = [
        *check_budget(
            replace(budget, latency_s=limit), predicted, costs["compact"], asked, board.conditions, slowness=slowness
        ),
        *check_parity(error, TOLERANCES[artifact.dtype] if tolerance is None else tolerance, agreement),
    ]
    return Report(
        artifact_sha256=artifact.sha256,
        target=session.target.name,
        budget=replace(budget, latency_s=limit),
        dense=costs["dense"],
        compact=costs["compact"],
        predicted=predicted,
        accuracy=replace(before, on_board=on_board),
        numeric_error=error,
        checks=tuple(checks),
        conditions=board.conditions,
        provenance={
            **artifact.tools,
            "dense_sha256": dense.sha256,
            "test_sha256": examples.sha256,
            **({"graph_sha256": artifact.graph_sha256} if artifact.graph_sha256 else {}),
            **(provenance or {}),
        },
        samples={name: tuple(samples) for name, samples in board.samples.items()},
        sparsity=sparsity,
        distribution=spread,
    )


def check_branches(runtime: str) -> None:
    """raises: UsageError for a runtime without branches, in which gates would skip nothing."""
    name = runtime.partition(":")[0]
    if not load_member("device.runtimes", name).BRANCHES:
        raise UsageError(
            f"gates need a runtime that executes `If`: set [target] runtime = 'onnxruntime' instead of {name}"
        )


class _Board:
    """The two artifacts on the board, and what was measured of them so far."""

    def __init__(self, session: Session, job: str, progress: Progress, *, by_input: bool = False) -> None:
        self.session, self.job, self.progress, self.by_input = session, job, progress, by_input
        self.files: dict[str, str] = {}
        self.samples: dict[str, list[Samples]] = {"dense": [], "compact": []}
        self.memory: dict[str, int | None] = {}
        self.energy: dict[str, Quantity | None] = {}
        self.conditions: Conditions = session.conditions()
        self.done = self.total = 0

    def push(self, artifact: Artifact, dense: Artifact, examples: Examples) -> None:
        """Both artifacts and the inputs."""
        with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
            inputs = Path(folder) / "inputs.npz"
            # numpy 2 takes options among the names, so that mypy sees a bool where an array is meant
            np.savez(inputs, **examples.inputs)  # type: ignore[arg-type]
            suffix = Path(artifact.path).suffix
            self.files = {
                "dense": f"dense-{dense.sha256[:12]}{suffix}",
                "compact": f"compact-{artifact.sha256[:12]}{suffix}",
                "inputs": f"inputs-{sha256_file(inputs)[:12]}.npz",
            }
            paths = {"dense": Path(dense.path), "compact": Path(artifact.path), "inputs": inputs}
            self.session.push({self.files[key]: path for key, path in paths.items()})

    def measure(self, effort: Effort, *, first: bool = False) -> None:
        """Time both artifacts for more rounds; `first`: outputs and memory before that."""
        steps: list[Step] = []
        if first:
            inputs = self.files["inputs"]
            steps.append(Step(key="outputs compact", kind="outputs", artifact=self.files["compact"], inputs=inputs))
            steps += [Step(key=f"memory {name}", kind="memory", artifact=self.files[name]) for name in self.samples]
            if self.session.target.meter != NO_METER and not self.by_input:
                steps += [
                    Step(key=f"energy {name}", kind="energy", artifact=self.files[name], seconds=effort.energy_s)
                    for name in self.samples
                ]
        start = len(self.samples["dense"])
        steps += [
            Step(
                key=f"time compact {number}", kind="inputs" if self.by_input else "time",
                artifact=self.files["compact"], against=self.files["dense"],
                inputs=self.files["inputs"] if self.by_input else None,
                seconds=INPUTS_TIMES * effort.seconds if self.by_input else effort.seconds,
                precision=effort.precision, steady=self.by_input and effort.steady,
            )
            for number in range(start, start + effort.repeats)
        ]  # fmt: skip
        self.total += len(steps)
        for result in self.session.run(steps, job=self.job, on_result=self._advance):
            self._keep(result)

    def _keep(self, result: StepResult) -> None:
        kind, name = result.key.split(" ")[:2]
        if kind == "memory":  # a board that cannot tell has not failed
            self.memory[name] = result.activation_bytes
            return
        if kind == "energy":
            self.energy[name] = energy_per_run(result.power) if result.power is not None else None
            return
        if result.error is not None:
            raise AgentError(f"target {self.session.target.name}: {kind} of the {name} model failed: {result.error}")
        if result.samples is not None and result.against is not None:
            self.samples["compact"].append(result.samples)
            self.samples["dense"].append(result.against)
        if result.outputs is not None:
            self.files["outputs"] = result.outputs
        if result.conditions is not None:
            self._note_conditions(result.conditions)

    def fetch_outputs(self, artifact: Artifact) -> list[Array]:
        """The compact model's outputs on the examples, as the board computed them."""
        with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
            path = Path(folder) / "outputs.npz"
            self.session.fetch(self.files["outputs"], path)
            return _read_outputs(path, artifact)

    def clear(self) -> None:
        """Take our files off the board; one that cannot be reached any more keeps them."""
        with suppress(DeviceError):
            self.session.remove(list(self.files.values()))

    def _note_conditions(self, now: Conditions) -> None:
        """The latest conditions, with the first temperature and every throttling of the run."""
        first, throttled = self.conditions.temp_before_c, self.conditions.throttled
        self.conditions = replace(
            now,
            temp_before_c=now.temp_before_c if first is None else first,
            throttled=now.throttled or throttled,
        )

    def _advance(self, _: StepResult) -> None:
        self.done += 1
        self.progress(f"validating on {self.session.target.name}", self.done, self.total)


def _check_unaltered(artifact: Artifact) -> None:
    path = Path(artifact.path)
    try:
        found = sha256_file(path)
    except OSError as error:
        raise RecordError(f"cannot read the artifact {path}: {error.strerror}; export it again") from error
    if found != artifact.sha256:
        raise RecordError(f"{path} was altered after it was exported (sha256 differs); export it again")


def _read_outputs(path: Path, artifact: Artifact) -> list[Array]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return [decode(arrays[output.name], output) for output in artifact.outputs]
    except (KeyError, ValueError, OSError) as error:
        raise AgentError(f"the board's outputs cannot be read ({error}); run the validation again") from error


def _share_of_dense(
    samples: Mapping[str, list[Samples]], budget: Budget, spread: Distribution | None = None
) -> Quantity:
    """The budget's statistic of the compact model over the dense median, turn by turn or round by round.

    spread: over inputs, where each was timed on its own beside the dense model.
    """
    if spread is not None:
        return _of_inputs(spread.shares, spread.worst_share, budget.statistic)
    pairs = list(zip(samples["compact"], samples["dense"], strict=True))
    if budget.statistic == "median":
        return pooled_ratio([turn_ratios(c, d) for c, d in pairs])
    return quantity([statistic(c.values, budget.statistic) / median(d.values) for c, d in pairs])


def _latency(rounds: list[Samples], budget: Budget, spread: Distribution | None = None) -> Quantity:
    """The budget's statistic: of turns that nothing interrupted the median, of rounds the 95th percentile.

    spread: over inputs, where each was timed on its own.
    """
    if spread is not None:
        return _of_inputs(spread.latencies_s, spread.worst_s, budget.statistic)
    if budget.statistic == "median":
        return quantity(np.concatenate([clean_turns(samples) for samples in rounds]))
    return quantity([statistic(samples.values, budget.statistic) for samples in rounds])


def _of_inputs(values: Sequence[float], worst: float, name: str) -> Quantity:
    """A statistic over inputs; the mean with its 95 % interval for others like them."""
    if name == "median":
        return quantity(values)
    if name == "mean":
        middle = float(np.mean(values))
        reach = 1.96 * float(np.std(values)) / len(values) ** 0.5
        return Quantity(median=middle, low=middle - reach, high=middle + reach)
    value = worst if name == "worst" else statistic(values, name)
    return Quantity(median=value, low=value, high=value)


def _scale(value: Quantity | None, factor: float) -> Quantity | None:
    return value and Quantity(median=factor * value.median, low=factor * value.low, high=factor * value.high)


def _compare(outputs: list[Array], examples: Examples) -> tuple[NumericError | None, float | None]:
    """Numeric error against the host, and the top-1 accuracy on the board.

    raises: AgentError when the board's outputs have other shapes than the host's.
    """
    shapes, expected = [a.shape for a in outputs], [a.shape for a in examples.reference]
    if shapes != expected:
        raise AgentError(f"the board's outputs have shapes {shapes}, the host's {expected}; export the model again")
    top1 = outputs[0].argmax(axis=1) if outputs[0].ndim == 2 and outputs[0].shape[1] > 1 else None
    classified = top1 is not None and examples.targets is not None and examples.targets.shape == top1.shape
    on_board = float(np.mean(top1 == examples.targets)) if classified else None
    if not all(np.isfinite(output).all() for output in outputs):
        return None, on_board
    pairs = list(zip(outputs, examples.reference, strict=True))
    absolute = [float(np.abs(mine - theirs).max()) for mine, theirs in pairs]
    relative = [a / max(float(np.abs(theirs).max()), 1e-12) for a, (_, theirs) in zip(absolute, pairs, strict=True)]
    same = None if top1 is None else float(np.mean(top1 == examples.reference[0].argmax(axis=1)))
    return NumericError(
        max_absolute=max(absolute), max_relative=max(relative), top1_agreement=same, examples=len(examples)
    ), on_board
