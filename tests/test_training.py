"""training: what a recovery may be made of does what it says, survives a kill, and is refused where it cannot be."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from digits import images
from torch import Tensor, nn

from edgeprune.compact import compact_model
from edgeprune.core.errors import ModelError, UsageError
from edgeprune.core.progress import silent
from edgeprune.core.records import FLOAT32, Accuracy, Budget, Cost, Plan, Precision
from edgeprune.core.runfile import RunFile
from edgeprune.core.runfolder import RunFolder
from edgeprune.load import ArrayBatches, Data
from edgeprune.objective import evaluate_accuracy
from edgeprune.pipeline import Stages, check_recovery, check_unlabelled
from edgeprune.recover import recover_accuracy
from edgeprune.trace import trace_graph
from edgeprune.training.scratch import draw_weights, epochs_of_equal_work

torch.set_num_threads(1)
EXAMPLE = (torch.zeros(2, 1, 8, 8),)


def digits() -> Data:
    x, y = images(shuffled=True)
    return Data(
        train=ArrayBatches(x[:600], y[:600], batch=50, shuffle=True),
        calibration=ArrayBatches(x[:200], y[:200], batch=50),
        test=ArrayBatches(x[600:1000], y[600:1000]),
    )


def net(width: int = 8, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.PReLU(16)),
        *(nn.Dropout(0.1), nn.Flatten(), nn.Linear(256, 10)),
    ).eval()


def trained(seed: int = 0) -> nn.Module:
    model = net(seed=seed)
    recover_accuracy(model, digits(), epochs=3, lr=0.1, autocast=False)
    return model


def equal(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True))


def resumes_alike(given: nn.Module, path: Path, **settings: Any) -> nn.Module:
    """Train once through, and once killed in the last epoch; both must end alike. returns: the trained model."""
    settings = {"epochs": 3, "lr": 0.1, "autocast": False, **settings}
    whole, resumed = copy.deepcopy(given), copy.deepcopy(given)
    result = recover_accuracy(whole, digits(), **settings)

    def kill(_: str, done: int, total: int) -> None:
        if done > total - 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover_accuracy(copy.deepcopy(given), digits(), checkpoint=path, progress=kill, **settings)
    assert path.exists()
    torch.rand(7)  # whatever the generators did in between must not matter
    assert recover_accuracy(resumed, digits(), checkpoint=path, **settings) == result
    assert equal(whole, resumed)
    return whole


# --- where it starts from ---


def test_from_scratch_the_given_weights_do_not_matter(tmp_path: Path) -> None:
    good, bad = trained(), net(seed=1)
    before = evaluate_accuracy(good, digits().test)
    settings = {"start": "scratch", "epochs": 3, "lr": 0.1, "autocast": False}
    result = recover_accuracy(good, digits(), **settings)
    assert result.accuracy_before == before > 0.8, "of the weights that were given"
    assert result.accuracy_after is not None and result.accuracy_after > 0.8
    assert result.losses[0] > 0.8, "it began with nothing"
    recover_accuracy(bad, digits(), **settings)
    assert equal(good, bad)
    assert not equal(good, resumes_alike(net(), tmp_path / "c", start="scratch", seed=1))


def test_a_training_from_scratch_that_fails_leaves_what_was_given() -> None:
    model = trained()
    before = copy.deepcopy(model)
    assert recover_accuracy(model, digits(), start="scratch", epochs=1, lr=1e9, autocast=False).note
    assert equal(model, before)


def test_new_weights_reach_every_layer_of_a_compact_model() -> None:
    model = trained()
    graph = trace_graph(model, EXAMPLE)
    compact = compact_model(model, EXAMPLE, graph, {group.name: list(range(6)) for group in graph.prunable})
    before = {name: value.clone() for name, value in compact.named_parameters()}
    state = torch.get_rng_state()
    draw_weights(compact, 3)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in compact.named_parameters():
        assert bool(value.isfinite().all()) and not torch.equal(value, before[name]), name
    norm = compact.get_submodule("1")
    assert torch.equal(norm.running_mean, torch.zeros(6)) and torch.equal(norm.weight, torch.ones(6))


def test_a_parameter_that_no_layer_draws_is_named_and_nothing_is_lost() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gain = nn.Linear(4, 3), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.gain * self.layer(x)

    model = nn.Sequential(Scaled(), nn.Linear(3, 2))
    before = copy.deepcopy(model)
    with pytest.raises(ModelError, match=r"no layer draws new weights for 0\.gain; start from"):
        draw_weights(model, 0)
    assert equal(model, before)


def test_a_smaller_net_does_as_much_in_more_epochs() -> None:
    dense, smaller = (trace_graph(nn.Sequential(nn.Conv2d(1, width, 3)), EXAMPLE) for width in (12, 5))
    assert epochs_of_equal_work(10, dense, smaller) == 24
    assert epochs_of_equal_work(10, dense, dense) == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "nowhere"}, "'pruned' weights or from 'scratch'"),
        ({"start": "scratch", "pattern": "n_m:n=2,m=4"}, "does not go with a pattern"),
        ({"start": "scratch", "regularizer": "greg"}, "does not go with a regularizer"),
        ({"start": "scratch", "gating": "early_exit"}, "does not go with gates"),
        ({"start": "scratch", "precision": Precision(dtype="int8")}, "does not go with simulated 8 bits"),
        ({"start": "scratch", "match_outputs": True, "teacher": nn.Identity()}, "needs labels"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recover_accuracy(net(), digits(), **settings)


# --- in a run ---


def run_of(**sections: Any) -> RunFile:
    parts: dict[str, Any] = {
        "model": {"factory": "nets.py:net"}, "data": {"source": "nets.py:source"}, "target": {"name": "embedded"},
        "budget": {"latency": "0.6x"}, "output": {"dir": "run"},
    }  # fmt: skip
    return msgspec.convert({**parts, **sections}, RunFile)


def stages_of(folder: Path, dense: nn.Module, **recover: Any) -> Stages:
    run, data = run_of(recover=recover), digits()
    return Stages(run, folder, RunFolder(folder), (), dense, EXAMPLE, data, silent, start=dense)


PLAN = Plan(
    graph_sha256="0" * 64, budget=Budget(latency_s=1.0), widths={}, keep={}, predicted=Cost(), solver="milp",
    status="optimal", gap=0.0, loss=0.0,
)  # fmt: skip


def test_a_run_from_scratch_trains_as_long_as_its_budget_says(tmp_path: Path) -> None:
    stages = stages_of(tmp_path, net(16), epochs=2, lr=0.1, start="scratch", budget="macs")
    given = Accuracy(dense=0.9, before_recovery=0.5)
    recovered, accuracy = stages.recover(PLAN, net(8), given)
    log = (tmp_path / "run.log").read_text()
    assert "recover: 4 epochs, as much arithmetic as 2 of the dense model" in log
    assert accuracy.after_recovery is not None and accuracy.after_recovery > 0.8
    assert accuracy == replace(given, after_recovery=accuracy.after_recovery)
    assert evaluate_accuracy(recovered, digits().test) == accuracy.after_recovery


def test_a_run_from_scratch_holds_no_tournament(tmp_path: Path) -> None:
    assert stages_of(tmp_path, net(), start="scratch")._hold_tournament(None, None, FLOAT32) == "float32"
    assert "no tournament: it trains pruned weights" in (tmp_path / "run.log").read_text()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"recover": {"budget": "macs"}}, "is for start = 'scratch'"),
        ({"recover": {"start": "scratch"}, "prune": {"pattern": "n_m:n=2,m=4"}}, r"does not go with \[prune\] pattern"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_it_starts(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_recovery(run_of(**sections))


def test_a_run_without_labels_says_what_to_set() -> None:
    with pytest.raises(UsageError, match=r'\[recover\] start = "pruned"'):
        check_unlabelled(run_of(recover={"start": "scratch"}), "no labels")
