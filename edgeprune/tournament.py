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
from typing import Any

from torch import Tensor, nn

from edgeprune.core.errors import DataError
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import Bracket, Heat
from edgeprune.core.store import append_record, digest, read_lines
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
    """A plan in a tournament. made_from: what decides its net, in plain values. make: that net, untrained."""

    name: str
    made_from: Any
    make: Callable[[], nn.Module]


def hold_tournament(
    contenders: Sequence[Contender],
    train: Batches,
    *,
    teacher: nn.Module | None = None,
    epochs: int = 5,
    lr: float = 0.02,
    checkpoint: Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Bracket:
    """Train contenders a little and keep the best.

    contenders: in the order of preference where accuracies tie. train: batches (inputs, labels) with a length,
        the same in every pass under the same seed; the first are held back to judge by.
    teacher, lr: as for `recover_accuracy`. epochs: of the training that is to follow: the last rung has a third of
        it, at most one epoch.
    checkpoint: JSONL file that finished heats are appended to and taken from.
    returns: the bracket. Where training fails for a contender it is last.
    raises: DataError for training data without a length or with too few batches, or when every training failed.
    """
    judging, longest = check_training(train, epochs, seed)
    judged = len(judging)
    lengths = rung_lengths(len(contenders), longest)
    settings = [judged, epochs, lr, teacher is not None, seed]
    known = _read_heats(checkpoint)
    rungs: list[tuple[Heat, ...]] = []
    entered = list(contenders)
    for steps in lengths:
        heats: list[Heat] = []
        for done, contender in enumerate(entered):
            progress(f"tournament: rung {len(rungs) + 1} of {len(lengths)}", done, len(entered))
            key = digest([contender.made_from, steps, *settings])
            if (heat := known.get((contender.name, key))) is None:
                heat = _run(contender, key, _Slice(train, judged, steps), judging, teacher, lr, seed)
                if checkpoint is not None:
                    append_record(checkpoint, heat)
            heats.append(heat)
        order = sorted(range(len(heats)), key=lambda index: -heats[index].accuracy)  # stable: the first of a tie
        rungs.append(tuple(heats[index] for index in order))
        entered = [entered[index] for index in order[: math.ceil(len(entered) / KEPT)]]
    if rungs and rungs[0][0].accuracy < 0:
        raise DataError("the training of every contender failed; try a lower [recover] lr")
    return Bracket(rungs=tuple(rungs), winner=entered[0].name)


def check_training(train: Batches, epochs: int, seed: int = 0) -> tuple[list[tuple[Any, Tensor]], int]:
    """Whether training data does for a tournament.

    returns: batches held back to judge by, and the most steps of a heat on what follows them in the pass.
    raises: DataError without a length or with too few batches.
    """
    if not isinstance(train, Sized):
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


def _run(
    contender: Contender,
    key: str,
    train: _Slice,
    judging: list[tuple[Any, Tensor]],
    teacher: nn.Module | None,
    lr: float,
    seed: int,
) -> Heat:
    started = time.monotonic()
    result = recover_accuracy(
        contender.make(), _Split(train, judging), teacher=teacher, epochs=1, lr=lr, autocast=False, seed=seed
    )
    failed = bool(result.note) or result.accuracy_after is None
    return Heat(
        contender=contender.name,
        made_from=key,
        steps=train.count,
        accuracy=FAILED if failed else result.accuracy_after or 0.0,
        seconds=time.monotonic() - started,
    )


def _read_heats(checkpoint: Path | None) -> dict[tuple[str, str], Heat]:
    """Finished heats of an earlier, killed run."""
    if checkpoint is None or not checkpoint.is_file():
        return {}
    return {(heat.contender, heat.made_from): heat for heat in read_lines(checkpoint, Heat)}
