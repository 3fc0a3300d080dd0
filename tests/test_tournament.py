"""tournament: what is best after a short training wins, on the same batches for all, and a kill loses no heat."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeprune.core.errors import DataError, UsageError
from edgeprune.graphs.portable import Portable
from edgeprune.load import ArrayBatches, Data, PortableData, load_data
from edgeprune.run_checks import check_contenders
from edgeprune.tournament import LEAST_STEPS, Contender, hold_tournament, rung_lengths

torch.set_num_threads(1)


def examples(count: int) -> tuple[Tensor, Tensor]:
    """Noisy points around ten corners of a cube."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.randn(10, 12, generator=generator)
    y = torch.randint(0, 10, (count,), generator=generator)
    return corners[y] + 0.8 * torch.randn(count, 12, generator=generator), y


X, Y = examples(1200)


def train() -> ArrayBatches:
    return ArrayBatches(X, Y, batch=20, shuffle=True)


def data(batches: Any = None) -> Data:
    return Data(train=train() if batches is None else batches)


def net(width: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 10))


def contender(name: str, width: int) -> Contender:
    return Contender(name=name, made_from=["net", width], plan=width)


FIELD = [contender(f"width-{width}", width) for width in (1, 2, 3, 64, 4)]


def test_rungs_grow_threefold() -> None:
    assert rung_lengths(1, 900) == []
    assert rung_lengths(3, 900) == [900]
    assert rung_lengths(9, 900) == [300, 900]
    assert rung_lengths(10, 900) == [100, 300, 900]
    assert rung_lengths(27, 20) == [LEAST_STEPS, LEAST_STEPS, 20]


def test_the_net_that_learns_best_wins_wherever_it_stands() -> None:
    bracket = hold_tournament(FIELD, net, data(), epochs=3, lr=0.2)
    assert bracket.winner == "width-64"
    assert [len(rung) for rung in bracket.rungs] == [5, 2]
    assert bracket.rungs[1][0].steps > 2 * bracket.rungs[0][0].steps
    for rung in bracket.rungs:
        accuracies = [heat.accuracy for heat in rung]
        assert accuracies == sorted(accuracies, reverse=True) and accuracies[0] > 0.5
    assert {heat.contender for heat in bracket.rungs[1]} == {heat.contender for heat in bracket.rungs[0][:2]}


def test_a_single_contender_is_not_trained() -> None:
    def fail(_: int) -> nn.Module:
        raise AssertionError("was made")

    bracket = hold_tournament([contender("only", 1)], fail, data())
    assert bracket.winner == "only" and bracket.rungs == ()


def test_equal_nets_do_equally_and_the_first_wins() -> None:
    bracket = hold_tournament([contender("first", 16), contender("second", 16)], net, data(), epochs=1, lr=0.1)
    assert bracket.rungs[0][0].accuracy == bracket.rungs[0][1].accuracy
    assert bracket.winner == "first"


def test_a_killed_tournament_goes_on_and_ends_alike(tmp_path: Path) -> None:
    made = itertools.count()

    def killed(at: int) -> Callable[[int], nn.Module]:
        def make(width: int) -> nn.Module:
            if next(made) == at:
                raise KeyboardInterrupt
            return net(width)

        return make

    path = tmp_path / "heats.jsonl"
    with pytest.raises(KeyboardInterrupt):
        hold_tournament(FIELD, killed(3), data(), epochs=3, lr=0.2, checkpoint=path)
    made = itertools.count()
    again = hold_tournament(FIELD, killed(-1), data(), epochs=3, lr=0.2, checkpoint=path)
    assert next(made) == 2 + 2  # two of five in the first rung, two in the second
    whole = hold_tournament(FIELD, net, data(), epochs=3, lr=0.2)
    assert again.winner == whole.winner
    for one, other in zip(again.rungs, whole.rungs, strict=True):
        assert [(heat.contender, heat.accuracy) for heat in one] == [(heat.contender, heat.accuracy) for heat in other]
    made = itertools.count()
    hold_tournament(FIELD, killed(-1), data(), epochs=3, lr=0.1, checkpoint=path)  # another training has other heats
    assert next(made) == 7


def test_heats_in_other_processes_end_alike(tmp_path: Path) -> None:
    """There the data are loaded anew and the teacher arrives as a program."""
    np.savez(tmp_path / "data.npz", x=X.numpy(), y=Y.numpy())
    source = PortableData(load_data("data.npz", tmp_path), "data.npz", tmp_path)
    teacher = Portable(net(64, seed=1).eval(), (X[:2],))
    path = tmp_path / "heats.jsonl"
    apart = hold_tournament(
        FIELD, net, source, teacher=teacher, epochs=3, lr=0.2, checkpoint=path, executor="processes:workers=2"
    )
    alone = hold_tournament(FIELD, net, source, teacher=teacher, epochs=3, lr=0.2)
    assert apart.winner == alone.winner
    for one, other in zip(apart.rungs, alone.rungs, strict=True):
        assert {heat.contender for heat in one} == {heat.contender for heat in other}
        found = {heat.contender: heat.accuracy for heat in other}
        for heat in one:
            assert heat.accuracy == pytest.approx(found[heat.contender], abs=0.02)

    def fail(_: int) -> nn.Module:
        raise AssertionError("was made again")

    again = hold_tournament(FIELD, fail, source, teacher=teacher, epochs=3, lr=0.2, checkpoint=path)
    assert again == apart


class Recorded:
    """Batches that note which examples a pass has given."""

    def __init__(self) -> None:
        self.batches = ArrayBatches(torch.cat([X, torch.arange(float(len(X)))[:, None]], 1), Y, batch=20, shuffle=True)
        self.passes: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes.append([])
        for x, y in self.batches:
            self.passes[-1] += x[:, -1].long().tolist()
            yield x[:, :-1], y


def test_nobody_is_trained_on_what_judges() -> None:
    recorded = Recorded()
    hold_tournament([contender("a", 8), contender("b", 9)], net, data(recorded), epochs=1, lr=0.1)
    judging, heats = recorded.passes[0], [p for p in recorded.passes[1:] if len(p) > len(recorded.passes[0])]
    assert len(heats) == 2 and heats[0] == heats[1]
    # A heat's pass begins with what was held back, and trains on what follows.
    assert heats[0][: len(judging)] == judging
    assert not set(heats[0][len(judging) :]) & set(judging)


def test_a_contender_whose_training_diverges_is_last() -> None:
    def broken(width: int) -> nn.Module:
        module = net(width)
        if width == 64:
            with torch.no_grad():
                module[0].weight.fill_(float("nan"))
        return module

    bracket = hold_tournament([contender("broken", 64), FIELD[0]], broken, data(), epochs=1)
    assert bracket.winner == FIELD[0].name and bracket.rungs[0][-1].accuracy < 0
    with pytest.raises(DataError, match="every contender failed"):
        hold_tournament([contender("a", 64), contender("b", 64)], broken, data(), epochs=1)


def test_training_data_that_does_not_do_is_refused() -> None:
    with pytest.raises(DataError, match="with a length"):
        hold_tournament(FIELD, net, data(batch for batch in train()), epochs=1)
    with pytest.raises(DataError, match="with a length"):
        hold_tournament(FIELD, net, Data(), epochs=1)
    few = ArrayBatches(X[:60], Y[:60], batch=20)
    with pytest.raises(DataError, match=f"needs {LEAST_STEPS} training batches"):
        hold_tournament(FIELD, net, data(few), epochs=1)


def test_a_teacher_is_listened_to() -> None:
    teacher = net(64, seed=1)
    before = copy.deepcopy(teacher.state_dict())
    field = [contender("a", 8), contender("b", 9)]
    alone = hold_tournament(field, net, data(), epochs=1, lr=0.1)
    taught = hold_tournament(field, net, data(), epochs=1, lr=0.1, teacher=Portable(teacher, (X[:2],)))
    accuracies = [[heat.accuracy for heat in bracket.rungs[0]] for bracket in (alone, taught)]
    assert accuracies[0] != accuracies[1]
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_contenders_are_checked_before_anything_is_measured() -> None:
    check_contenders(["curves", "uniform", "near-3", "magnitude:p=1", "lamp"])
    check_contenders([])
    for name, why in (
        ("nonsense", "unknown criteria 'nonsense'"),
        ("near-x", "near-x"),
        ("magnitude:q=1", "'q' is not"),
    ):
        with pytest.raises(UsageError, match=why):
            check_contenders(["curves", name])
