"""`edgeprune.toml`: one file that describes a whole run. The keys are listed in the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import msgspec

from edgeprune.core.errors import UsageError
from edgeprune.core.records import ModelSpec, Statistic, WidthRules


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the run file; an unknown key is an error, so that a typo cannot be ignored."""


class ModelSection(_Section, frozen=True, kw_only=True):
    """Where the trained model comes from (see `ModelSpec`). scope: the submodule to prune, instead of all."""

    factory: str | None = None
    file: str | None = None
    weights: str | None = None
    inputs: tuple[tuple[int, ...], ...] = ()
    scope: str | None = None


class DataSection(_Section, frozen=True, kw_only=True):
    """`path.py:fn`, `pkg.mod:fn` or an `.npz`."""

    source: str


class TargetSection(_Section, frozen=True, kw_only=True):
    """The board: an entry of the inventory, with the runtime's settings for this run."""

    name: str
    runtime: str | None = None
    threads: int = 1
    meter: str | None = None
    effort: Literal["quick", "default", "thorough"] = "default"


class BudgetSection(_Section, frozen=True, kw_only=True):
    """Limits as text: `12 ms`, `0.5x` of the dense model, `2 MiB`, `30 mJ`.

    statistic: of the latency that is validated; `mean` and `worst` are over real inputs.
    """

    latency: str | None = None
    memory: str | None = None
    size: str | None = None
    energy: str | None = None
    power_model: str | None = None
    statistic: Statistic = "median"


class ProfileSection(_Section, frozen=True, kw_only=True):
    """How much board time the latency tables may take: at most so many widths, fewer once the error is met."""

    configurations: int = 32
    held_out: int = 8
    error: float = 0.01


class PruneSection(_Section, frozen=True, kw_only=True):
    """How importance is measured and widths are chosen.

    regularizer: a training of the dense model, `regularizer_epochs` long, that drives whole units to zero beforehand.
    steps: of a schedule: the way to the budget in so many parts, or the latencies of all steps before the last, which
    has the budget's own; with `step_epochs` of training between.
    pattern: of zeros in the weights that are left; recovery keeps to it.
    gating: of work that is decided per input, trained `gating_epochs` long after recovery.
    plan: one that was made before, in a run's folder; taken as it stands. like: one whose widths solver "scaled"
    scales.
    pivot: numbers of diagonal blocks that layers may run in, before widths are planned; pivot_latency: what that is to
    reach, by default the budget's.
    """

    transform: str | None = None
    criterion: str = "surgeon"
    solver: str = "milp"
    plan: str | None = None
    like: str | None = None
    levels: int = 16
    curves: bool = True
    compensate: bool = True
    allow_inexact: bool = False
    depth: bool = False
    batches: int = 8
    freeze: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    step: int = 1
    min_width: int = 1
    tie: tuple[str, ...] = ()
    regularizer: str | None = None
    regularizer_epochs: int = 5
    steps: int | tuple[str, ...] = 1
    step_epochs: int = 1
    pattern: str | None = None
    gating: str | None = None
    gating_epochs: int = 5
    pivot: tuple[int, ...] = ()
    pivot_latency: str | None = None

    @property
    def step_count(self) -> int:
        """Steps of the schedule, the last among them."""
        return self.steps if isinstance(self.steps, int) else len(self.steps) + 1

    @property
    def rules(self) -> WidthRules:
        """What it says about widths."""
        return WidthRules(freeze=self.freeze, only=self.only, step=self.step, least=self.min_width, tie=self.tie)


class SearchSection(_Section, frozen=True, kw_only=True):
    """How far a plan is looked for beyond the sum of loss curves.

    trials, seconds: whole nets judged to weigh the curves, at most so many and for so long. contenders: plans of which
    a short training, where one is to follow, picks one: "curves", "uniform", "near-1" and on (random neighbours), or a
    criterion whose scores are added.
    """

    trials: int = 16
    seconds: float = 600.0
    contenders: tuple[str, ...] = ("curves", "magnitude", "uniform")


class RecoverSection(_Section, frozen=True, kw_only=True):
    """How the compact model is trained after pruning; epochs = 0 leaves it as it is.

    start: from the pruned weights, or from scratch. budget: of a training from scratch: so many epochs, or as many more
    as the compact model has fewer MACs. ema, label_smoothing, mixup, features: as for `recover_accuracy`; 0 is off.
    seed: of what is trained after pruning, by default the run's.
    launch: what starts the training in several processes, such as ["accelerate", "launch", "--num_processes", "2"].
    """

    epochs: int = 5
    lr: float = 0.02
    distil: bool = True
    start: Literal["pruned", "scratch"] = "pruned"
    budget: Literal["epochs", "macs"] = "epochs"
    ema: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    features: float = 0.0
    seed: int | None = None
    launch: tuple[str, ...] = ()

    @property
    def decisive(self) -> dict[str, Any]:
        """What decides the outcome, in plain values: everything but the seed and who computes it."""
        return {name: value for name, value in msgspec.to_builtins(self).items() if name not in ("launch", "seed")}

    @property
    def options(self) -> dict[str, Any]:
        """What `recover_accuracy` takes as it is."""
        names = ("start", "ema", "label_smoothing", "mixup", "features")
        return {name: getattr(self, name) for name in names}


class ExportSection(_Section, frozen=True, kw_only=True):
    """What kind of file runs on the board; by default what the target's runtime runs, in float32.

    tolerance: accuracy that 8 bits may cost before the model is trained for them, `epochs` long.
    sparse: store 1x1 convolutions without their zeros, in a format that can.
    """

    format: str | None = None
    dtype: Literal["float32", "float16", "dynamic", "int8", "auto"] = "float32"
    tolerance: float = 0.01
    epochs: int = 2
    sparse: bool = False


class BundleSection(_Section, frozen=True, kw_only=True):
    """What kinds of apps the bundle is for, its SPDX licence, and the private key (PEM) that it is signed with."""

    kinds: tuple[Literal["python", "cpp", "android"], ...] = ("python", "cpp")
    license: str | None = None
    key: str | None = None


class CompareSection(_Section, frozen=True, kw_only=True):
    """What `edgeprune compare` carries out beside the run itself, all to the same latency.

    criteria, solvers, recoveries: every combination of them; one that is not given is as in the run. baselines: see
    `compare.BASELINES`. latencies: further limits; everything is carried out for each.
    scratch_epochs: of what is trained from nothing; 0: as many as recovery has. seeds: trainings of every recipe.
    recipes: further ones by name, each some keys of the run file's tables that are other than in the run.
    """

    criteria: tuple[str, ...] = ()
    solvers: tuple[str, ...] = ()
    recoveries: tuple[Literal["distil", "fine_tune", "scratch"], ...] = ()
    baselines: tuple[Literal["uniform", "scratch", "reduced", "copycat"], ...] = ("uniform", "scratch", "reduced")
    latencies: tuple[str, ...] = ()
    scratch_epochs: int = 0
    seeds: int = 1
    recipes: dict[str, dict[str, dict[str, Any]]] = {}


class OutputSection(_Section, frozen=True, kw_only=True):
    """Where everything is written."""

    dir: str


class RunFile(_Section, frozen=True, kw_only=True):
    """A whole run. Paths in it are relative to the folder the file stands in.

    executor: where independent work is done, a member of `executors/`.
    """

    model: ModelSection
    data: DataSection
    target: TargetSection
    budget: BudgetSection
    output: OutputSection
    profile: ProfileSection = ProfileSection()
    prune: PruneSection = PruneSection()
    search: SearchSection = SearchSection()
    recover: RecoverSection = RecoverSection()
    export: ExportSection = ExportSection()
    bundle: BundleSection = BundleSection()
    compare: CompareSection = CompareSection()
    seed: int = 0
    executor: str = "here"

    @property
    def training_seed(self) -> int:
        """Of what is trained after pruning."""
        return self.seed if self.recover.seed is None else self.recover.seed

    @property
    def spec(self) -> ModelSpec:
        """The model section as a record."""
        return ModelSpec(
            factory=self.model.factory, file=self.model.file, weights=self.model.weights, inputs=self.model.inputs
        )


def read_run_file(path: Path, *, format: str | None = None, dtype: str | None = None) -> RunFile:
    """Read and check `edgeprune.toml`.

    format, dtype: instead of those of its [export]. raises: UsageError naming the key that is wrong.
    """
    try:
        run = msgspec.toml.decode(path.read_bytes(), type=RunFile)
    except FileNotFoundError as error:
        raise UsageError(
            f"there is no {path}; write one (keys: README, 'The run file') or try `edgeprune demo`"
        ) from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except msgspec.ValidationError as error:
        raise UsageError(f"{path}: {error}") from error
    except msgspec.DecodeError as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
    if (run.model.factory is None) == (run.model.file is None):
        raise UsageError(f"{path}: [model] needs either factory or file")
    if dtype is not None and dtype not in (known := get_args(get_type_hints(ExportSection)["dtype"])):
        raise UsageError(f"unknown dtype '{dtype}'; known: {', '.join(known)}")
    asked = {name: value for name, value in (("format", format), ("dtype", dtype)) if value is not None}
    run = msgspec.structs.replace(run, export=msgspec.structs.replace(run.export, **asked))
    budget = run.budget
    if not any((budget.latency, budget.memory, budget.size, budget.energy)):
        raise UsageError(f"{path}: [budget] is empty; give at least one of latency, memory, size, energy")
    return run
