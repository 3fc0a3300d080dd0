"""Choose among plans by accuracy after a short training, since the loss before training does not predict it.

Successive halving (Jamieson and Talwalkar, AISTATS 2016, arXiv:1502.07943): all contenders are trained a little, the
better third a good deal longer, until one is left. Every heat is a whole short training, with its learning rate down to
zero, on the same batches in the same order for all: what differs is the net.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from edgeprune.core.errors import DataError
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import Bracket, Heat
from edgeprune.core.store import append_record, digest, read_lines
from edgeprune.executors import load_executor
from edgeprune.graphs.portable import Portable
from edgeprune.objective import seeded
from edgeprune.recover import recover_accuracy

Batches = Iterable[tuple[Any, Tensor]]
KEPT = 3
"""One contender in so many goes on, and is trained so many times as long."""
JUDGING_EXAMPLES = 2048
JUDGING_SHARE = 0.2
"""Examples held back of the training batches to judge by: so many, at most this share of an epoch."""
LEAST_STEPS = 8
FAILED = -1.0
"""Accuracy of a contender whose training diverged: below any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A plan in a tournament. made_from: what decides its net, in plain values. plan: what that net is made of."""

    name: str
    made_from: Any
    plan: Any


class Data(Protocol):
    """What a tournament reads of a data source; for workers it can be pickled, as `load.PortableData`."""

    @property
    def train(self) -> Batches | None: ...


def hold_tournament(
    contenders: Sequence[Contender],
    make: Callable[[Any], nn.Module],
    data: Data,
    *,
    teacher: Portable | None = None,
    epochs: int = 5,
    lr: float = 0.02,
    checkpoint: Path | None = None,
    seed: int = 0,
    executor: str = "here",
    progress: Progress = silent,
) -> Bracket:
    """Train contenders a little and keep the best.

    contenders: in the order of preference where accuracies tie. make: of a contender's plan its net, untrained.
    data: with training batches (inputs, labels) that have a length and are the same in every pass under the same seed;
        the first are held back to judge by.
    teacher, lr: as for `recover_accuracy`. epochs: of the training that is to follow: the last rung has a third of
        it, at most one epoch.
    checkpoint: JSONL file that finished heats are appended to and taken from.
    executor: where the heats of a rung are run; a member of `executors/`, as `processes:workers=2`. `make`, `data` and
        the plans travel there.
    returns: the bracket. Where training fails for a contender it is last.
    raises: DataError for training data without a length or with too few batches, or when every training failed; as
        `load_executor`.
    """
    judging, longest = check_training(data.train, epochs, seed)
    lengths = rung_lengths(len(contenders), longest)
    settings = [len(judging), epochs, lr, teacher is not None, seed]
    if not lengths:
        return Bracket(rungs=(), winner=contenders[0].name)
    known = _read_heats(checkpoint)
    rungs: list[tuple[Heat, ...]] = []
    entered = list(contenders)
    start = load_executor(executor)
    with start(_prepare, _Field(make=make, data=data, teacher=teacher, epochs=epochs, lr=lr, seed=seed)) as pool:
        for steps in lengths:
            keys = [digest([contender.made_from, steps, *settings]) for contender in entered]
            heats = [known.get((contender.name, key)) for contender, key in zip(entered, keys, strict=True)]
            new = [place for place, heat in enumerate(heats) if heat is None]
            done = len(entered) - len(new)
            what = f"tournament: rung {len(rungs) + 1} of {len(lengths)}"
            progress(what, done, len(entered))
            for item, heat in pool.run([_Entry(entered[place], keys[place], steps) for place in new]):
                heats[new[item]] = heat
                if checkpoint is not None:
                    append_record(checkpoint, heat)
                done += 1
                progress(what, done, len(entered))
            run = [heat for heat in heats if heat is not None]
            order = sorted(range(len(run)), key=lambda index: -run[index].accuracy)  # stable: the first of a tie
            rungs.append(tuple(run[index] for index in order))
            entered = [entered[index] for index in order[: math.ceil(len(entered) / KEPT)]]
    if rungs[0][0].accuracy < 0:
        raise DataError("the training of every contender failed; try a lower [recover] lr")
    return Bracket(rungs=tuple(rungs), winner=entered[0].name)


def check_training(train: Batches | None, epochs: int, seed: int = 0) -> tuple[list[tuple[Any, Tensor]], int]:
    """Whether training data does for a tournament.

    returns: batches held back to judge by, and the most steps of a heat on what follows them in the pass.
    raises: DataError without a length or with too few batches.
    """
    if train is None or not isinstance(train, Sized):
        raise DataError("a tournament needs training batches with a length; or set [search] contenders = []")
    held: list[tuple[Any, Tensor]] = []
    with seeded(seed + 1):  # as recovery seeds its first epoch
        for batch in itertools.islice(train, max(1, int(len(train) * JUDGING_SHARE))):
            held.append(batch)
            if sum(len(targets) for _, targets in held) >= JUDGING_EXAMPLES:
                break
    longest = min(len(train) - len(held), math.ceil(len(train) * epochs / KEPT))
    if longest < LEAST_STEPS:
        raise DataError(
            f"a tournament needs {LEAST_STEPS} training batches beside those that judge, there are {max(longest, 0)}; "
            "give more data, or set [search] contenders = []"
        )
    return held, longest


def rung_lengths(contenders: int, longest: int) -> list[int]:
    """Training steps of each rung: the last has `longest`, each before it a third of the next.

    returns: none for a single contender.
    """
    lengths: list[int] = []
    while contenders > 1:
        lengths.append(max(LEAST_STEPS, longest // KEPT ** len(lengths)))
        contenders = math.ceil(contenders / KEPT)
    return lengths[::-1]


class _Slice:
    """Batches `start` to `start + count` of each pass."""

    def __init__(self, batches: Batches, start: int, count: int) -> None:
        self.batches, self.start, self.count = batches, start, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        return itertools.islice(iter(self.batches), self.start, self.start + self.count)


@dataclass(frozen=True, slots=True)
class _Split:
    """What `recover_accuracy` reads of a data source."""

    train: Batches
    test: Batches


@dataclass(frozen=True, slots=True, kw_only=True)
class _Field:
    """What all heats have in common."""

    make: Callable[[Any], nn.Module]
    data: Data
    teacher: Portable | None
    epochs: int
    lr: float
    seed: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """One heat to run."""

    contender: Contender
    key: str
    steps: int


def _prepare(field: _Field) -> Callable[[_Entry], Heat]:
    """What runs a heat, in a worker. What judges is read there, as it may be large."""
    train = field.data.train
    assert train is not None
    judging, _ = check_training(train, field.epochs, field.seed)
    teacher = None if field.teacher is None else field.teacher.module

    def run(entry: _Entry) -> Heat:
        started = time.monotonic()
        result = recover_accuracy(
            field.make(entry.contender.plan), _Split(_Slice(train, len(judging), entry.steps), judging),
            teacher=teacher, epochs=1, lr=field.lr, autocast=False, seed=field.seed,
        )  # fmt: skip
        failed = bool(result.note) or result.accuracy_after is None
        return Heat(
            contender=entry.contender.name,
            made_from=entry.key,
            steps=entry.steps,
            accuracy=FAILED if failed else result.accuracy_after or 0.0,
            seconds=time.monotonic() - started,
        )

    return run


def _read_heats(checkpoint: Path | None) -> dict[tuple[str, str], Heat]:
    """Finished heats of an earlier, killed run."""
    if checkpoint is None or not checkpoint.is_file():
        return {}
    return {(heat.contender, heat.made_from): heat for heat in read_lines(checkpoint, Heat)}
