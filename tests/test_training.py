"""training: what a recovery may be made of does what it says, survives a kill, and is refused where it cannot be."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import safetensors
import together
import torch
from digits import images
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.compact import compact_model, save_compact
from edgeprune.compensation.batch_norm import reestimate_batch_norm
from edgeprune.core.errors import ConnectionLost, DataError, ModelError, UsageError
from edgeprune.core.family import MissingLibrary
from edgeprune.core.progress import silent
from edgeprune.core.records import FLOAT32, Accuracy, Budget, Cost, Plan, Precision
from edgeprune.core.runfile import RunFile
from edgeprune.core.runfolder import RunFolder
from edgeprune.load import ArrayBatches, Data
from edgeprune.objective import Objective, evaluate_accuracy, evaluate_difference, label_loss, seeded
from edgeprune.pipeline import Stages
from edgeprune.recover import JUDGING_STEPS, recover_accuracy
from edgeprune.run_checks import check_recovery, check_unlabelled
from edgeprune.trace import trace_graph
from edgeprune.training.attention import attention_loss, shared_layers, watch
from edgeprune.training.batch import Batch, mix_batch
from edgeprune.training.launch import run_command
from edgeprune.training.processes import ALONE, Processes, find_processes
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
        ({"start": "scratch", "match_outputs": True, "teacher": nn.Identity()}, "start = 'scratch' needs labels"),
        ({"ema": 1.0}, "ema = 1.0: it must be at least 0"),
        ({"ema": 0.9, "pattern": "n_m:n=2,m=4"}, "ema does not go with a pattern"),
        ({"label_smoothing": -0.1}, "label_smoothing = -0.1"),
        ({"label_smoothing": 0.1, "match_outputs": True, "teacher": nn.Identity()}, "label_smoothing needs labels"),
        ({"label_smoothing": 0.1, "gating": "early_exit"}, "gates are trained by themselves"),
        ({"mixup": float("inf")}, "mixup = inf"),
        ({"features": float("nan")}, "features = nan"),
        ({"features": 1.0}, "features are learnt from the dense model"),
        ({"features": 1.0, "teacher": nn.Flatten()}, "share no layer"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recover_accuracy(net(), digits(), **settings)


# --- averaged weights ---


class Followed:
    """A progress callback that averages what it sees of a model's parameters after each step, on its own account."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.steps = model, decay, 0
        self.values = {name: value.detach().double() for name, value in model.named_parameters()}

    def __call__(self, what: str, done: int, total: int) -> None:
        keep = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, value in self.model.named_parameters():
            self.values[name] = keep * self.values[name] + (1 - keep) * value.detach().double()
        self.steps += 1

    def met(self) -> bool:
        return all(
            torch.allclose(v.double(), self.values[name], atol=1e-5) for name, v in self.model.named_parameters()
        )


def test_the_average_of_the_weights_is_returned_with_statistics_of_its_own() -> None:
    model = net()
    followed = Followed(model, 0.9)
    result = recover_accuracy(model, digits(), epochs=3, lr=0.1, autocast=False, ema=0.9, progress=followed)
    assert followed.steps == 36 and followed.met()
    plain = net()
    recover_accuracy(plain, digits(), epochs=3, lr=0.1, autocast=False)
    assert not torch.allclose(plain[0].weight, model[0].weight, atol=1e-4), "the last weights are others"
    assert result.accuracy_after == evaluate_accuracy(model, digits().test) > 0.8
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    with seeded(0):
        reestimate_batch_norm(model, digits().train)
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


def test_of_a_training_that_fails_the_average_of_the_best_epoch_is_kept() -> None:
    class Spoilt:
        """NaN in the second epoch."""

        spoil = torch.tensor(0.0)

        def __len__(self) -> int:
            return 12

        def set_epoch(self, epoch: int) -> None:
            self.spoil = torch.tensor(0.0 if epoch == 0 else torch.nan)

        def __iter__(self) -> Any:
            return ((x + self.spoil, y) for x, y in digits().train)

    model = net()
    followed = Followed(model, 0.5)
    result = recover_accuracy(model, Data(train=Spoilt()), epochs=2, lr=0.1, autocast=False, ema=0.5, progress=followed)
    assert "diverged" in result.note and followed.steps == 12 and followed.met()


def test_the_average_is_judged_by_its_own_loss() -> None:
    model, seen = net(), list[Tensor]()
    model.register_forward_pre_hook(lambda own, _: seen.append(own[0].weight.clone()) if own.training else None)
    recover_accuracy(model, digits(), epochs=1, lr=0.1, autocast=False, ema=0.9)
    assert len(seen) == 12 + JUDGING_STEPS
    assert all(torch.equal(weight, model[0].weight) for weight in seen[12:]) and not torch.equal(seen[11], seen[12])


# --- labels and inputs that are mixed ---


def test_smoothed_labels_make_a_model_less_sure() -> None:
    logits, targets = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]]), torch.tensor([0, 1])
    wanted = torch.full((2, 3), 0.3 / 3) + 0.7 * functional.one_hot(targets, 3)
    assert torch.allclose(label_loss(logits, targets, smoothing=0.3), functional.cross_entropy(logits, wanted))
    sure, unsure = net(), net()
    recover_accuracy(sure, digits(), epochs=2, lr=0.1, autocast=False)
    recover_accuracy(unsure, digits(), epochs=2, lr=0.1, autocast=False, label_smoothing=0.3)
    x = digits().test.inputs
    with torch.no_grad():
        most = [float(model(x).softmax(1).amax(1).mean()) for model in (sure, unsure)]
    assert most[1] < most[0] - 0.1
    assert evaluate_accuracy(unsure, digits().test) > 0.8


def test_mixed_examples_have_both_targets() -> None:
    x, targets = torch.arange(6.0).view(6, 1, 1) * torch.ones(6, 2, 3), torch.arange(6)
    with seeded(3):
        mixed = mix_batch(Batch((x,), targets), 0.4)
    assert mixed.others is not None and 0 < mixed.share < 1 and not torch.equal(mixed.others, targets)
    wanted = mixed.share * targets + (1 - mixed.share) * mixed.others
    assert torch.allclose(mixed.inputs[0], wanted.view(6, 1, 1) * torch.ones(6, 2, 3))
    with seeded(3):
        assert mix_batch(Batch((x,), targets), 0.4).share == mixed.share
    logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    both = mixed.share * label_loss(logits, targets) + (1 - mixed.share) * label_loss(logits, mixed.others)
    objective = Objective(None, match=False, share=0.0, temperature=2.0)
    found, _ = objective.loss(nn.Identity(), Batch((logits,), targets, mixed.others, mixed.share), False)
    assert torch.allclose(found, both)


def test_the_teacher_sees_what_the_model_sees() -> None:
    model, teacher = net(), net(seed=1)
    seen: dict[str, list[Tensor]] = {"model": [], "teacher": []}
    for name, each in (("model", model), ("teacher", teacher)):
        each.register_forward_pre_hook(lambda module, given, name=name: seen[name].append(given[0].clone()))
    recover_accuracy(model, Data(train=digits().train), teacher=teacher, epochs=1, autocast=False, mixup=1.0)
    assert len(seen["teacher"]) == 12
    assert all(torch.equal(a, b) for a, b in zip(seen["model"], seen["teacher"], strict=False))
    real = digits().train.inputs.flatten(1)
    nearest = torch.cdist(torch.cat(seen["teacher"]).flatten(1), real).amin(1)
    assert float(nearest.median()) > 0.3, "mixed: no example of the data is near"


@pytest.mark.parametrize("inputs", [torch.zeros(4, 12), torch.zeros(4, 3, 8, 8, dtype=torch.long)])
def test_what_is_no_image_is_not_mixed(inputs: Tensor) -> None:
    batch = Batch((inputs,), torch.zeros(4, dtype=torch.long))
    with pytest.raises(DataError, match="mixup mixes images"):
        mix_batch(batch, 0.2)
    assert mix_batch(batch, 0.0) is batch


# --- features ---


def test_a_map_of_attention_knows_no_channels() -> None:
    x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    assert float(attention_loss({"a": torch.cat([x, -3 * x], 1)}, {"a": x})) < 1e-6
    one, other = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    one[..., 0, 0], other[..., 1, 1] = 5.0, 0.1
    assert float(attention_loss({"a": one, "b": x}, {"a": other, "b": x})) == pytest.approx(2.0)


def test_the_last_shared_layer_of_each_resolution_is_compared() -> None:
    model = net()
    graph = trace_graph(model, EXAMPLE)
    compact = compact_model(model, EXAMPLE, graph, {group.name: list(range(6)) for group in graph.prunable})
    assert shared_layers(compact, model, EXAMPLE) == ("1", "6")
    with pytest.raises(UsageError, match="share no layer"):
        shared_layers(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), model, EXAMPLE)


def test_a_model_learns_where_its_teacher_looks() -> None:
    teacher, batch = trained(), digits().test.inputs[:100]
    far: dict[float, float] = {}
    for weight in (0.0, 5.0):
        model = net(seed=1)
        settings = {"teacher": teacher, "distil_weight": 0.0, "epochs": 3, "lr": 0.1, "autocast": False}
        result = recover_accuracy(model, digits(), features=weight, **settings)
        assert result.accuracy_after is not None and result.accuracy_after > 0.8
        with torch.no_grad(), watch(model, ("1", "4")) as ours, watch(teacher, ("1", "4")) as theirs:
            model(batch), teacher(batch)
        far[weight] = float(attention_loss(ours, theirs))
        assert not any(module._forward_hooks for each in (model, teacher) for module in each.modules())
    assert far[5.0] < 0.7 * far[0.0]


# --- together ---

ALL = {"ema": 0.9, "label_smoothing": 0.1, "mixup": 0.3, "features": 1.0}


def test_all_of_it_together_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    model = resumes_alike(net(seed=1), tmp_path / "c", teacher=trained(), start="scratch", **ALL)
    assert evaluate_accuracy(model, digits().test) > 0.8


def test_outputs_are_matched_on_mixed_inputs_and_averaged(tmp_path: Path) -> None:
    teacher, near = trained(), trained()
    with torch.no_grad():
        near[0].weight.add_(0.1 * torch.randn(near[0].weight.shape, generator=torch.Generator().manual_seed(0)))
    settings = {key: value for key, value in ALL.items() if key != "label_smoothing"}
    model = resumes_alike(near, tmp_path / "c", teacher=teacher, match_outputs=True, **settings)
    before, after = (evaluate_difference(each, teacher, digits().test) for each in (near, model))
    assert after < 0.5 * before


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


def test_a_run_trains_as_its_file_says(tmp_path: Path) -> None:
    def kill(what: str, done: int, total: int) -> None:
        if done > total - 4:
            raise KeyboardInterrupt

    stages = replace(stages_of(tmp_path, net(16), epochs=2, **ALL), progress=kill)
    with pytest.raises(KeyboardInterrupt):
        stages.recover(PLAN, net(8), Accuracy())
    with safetensors.safe_open(tmp_path / "recover.checkpoint", framework="pt") as file:
        settings = json.loads(file.metadata()["recover"])["settings"]
    assert {name: settings[name] for name in ALL} == ALL


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"recover": {"ema": 0.9}, "prune": {"pattern": "n_m:n=2,m=4"}}, r"ema does not go with a pattern"),
        ({"recover": {"features": 1.0, "distil": False}}, "features are learnt from the dense model"),
        ({"recover": {"budget": "macs"}}, "is for start = 'scratch'"),
        ({"recover": {"start": "scratch"}, "prune": {"pattern": "n_m:n=2,m=4"}}, r"does not go with a pattern"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_it_starts(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_recovery(run_of(**sections), net(), EXAMPLE)


# --- in several processes ---


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = Path(together.__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, script, tmp_path], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr

    def kept(name: str) -> list[dict[str, Tensor]]:
        return [load_file(tmp_path / f"{name}-{index}-of-2.safetensors") for index in range(2)]

    alone = together.plain()
    recover_accuracy(alone, together.digits(), **together.PLAIN)
    for name, value in alone.state_dict().items():
        left, right = (each[name] for each in kept("plain"))
        assert torch.equal(left, right)
        assert torch.allclose(left, value, atol=1e-3), "a step is that of the whole batch"
    normed = together.normed()
    recover_accuracy(normed, together.digits(), teacher=together.normed(1), **together.FULL)
    whole, resumed = kept("whole"), kept("resumed")
    for name, value in normed.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(whole[0][name], whole[1][name]), name
        assert all(torch.equal(each[name], whole[0][name]) for each in resumed), name
    normed.load_state_dict(whole[0])
    assert evaluate_accuracy(normed, together.digits().test) > 0.7
    assert torch.equal(normed.unused, together.normed().unused), "what has no gradient does not decay either"


def test_a_batch_is_divided_and_counts_by_its_examples() -> None:
    batch = Batch((torch.arange(7.0).view(7, 1, 1),), torch.arange(7), torch.arange(7).flip(0), 0.3)
    parts, shares = zip(*(Processes(count=3, index=index).part(batch) for index in range(3)), strict=True)
    assert [part.targets.tolist() for part in parts] == [[0, 1, 2], [3, 4], [5, 6]]
    assert [part.others.tolist() for part in parts] == [[6, 5, 4], [3, 2], [1, 0]] and parts[1].share == 0.3
    assert all(torch.equal(part.inputs[0].flatten(), part.targets.float()) for part in parts)
    assert shares == (3 / 7, 2 / 7, 2 / 7)
    assert Processes(count=4, index=1).part(batch) == (None, 0.0) and Processes(count=4).part(batch) == (batch, 1.0)


@pytest.mark.slow
def test_a_run_trains_in_the_processes_of_its_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nets.py").write_text("from together import digits as source, plain as net\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    dense, data, folder = together.plain(), together.digits(), tmp_path / "run"
    recover_accuracy(dense, data, epochs=3, lr=0.1, autocast=False)
    save_file(dense.state_dict(), tmp_path / "dense.safetensors")
    save_compact(together.plain(), EXAMPLE, folder)
    settings = {"epochs": 3, "lr": 0.1, "ema": 0.8}
    run = run_of(
        model={"factory": "nets.py:net", "weights": "dense.safetensors", "inputs": [[1, 1, 8, 8]]},
        recover={**settings, "launch": (*launch, "--main_process_port", "0")},
    )
    stages = Stages(run, tmp_path, RunFolder(folder), (), dense, EXAMPLE, data, silent, start=dense)
    recovered, accuracy = stages.recover(PLAN, together.plain(), Accuracy(before_recovery=0.1))
    alone = recover_accuracy(together.plain(), data, teacher=dense, autocast=False, **settings)
    assert accuracy.after_recovery == pytest.approx(alone.accuracy_after, abs=0.03) and alone.accuracy_after > 0.8
    assert evaluate_accuracy(recovered, data.test) == pytest.approx(accuracy.after_recovery, abs=0.01)
    assert accuracy.before_recovery == 0.1 and not (folder / "recover.checkpoint").exists()
    assert "--num_processes 2" in (folder / "run.log").read_text()
    assert capfd.readouterr().out.count("recovered.pt2") == 1, "one of the processes speaks"
    again = msgspec.structs.replace(run, recover=msgspec.structs.replace(run.recover, launch=()))
    replace(stages, run=again).recover(PLAN, together.plain(), Accuracy(before_recovery=0.1))
    assert "recovered: already done" in (folder / "run.log").read_text(), "who computes it decides nothing"


def test_a_launcher_that_fails_or_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no program 'nosuch'"):
        check_recovery(run_of(recover={"launch": ["nosuch", "launch"]}), net(), EXAMPLE)
    with pytest.raises(UsageError, match="several processes do not train a pattern"):
        run = run_of(recover={"launch": [sys.executable]}, prune={"pattern": "n_m:n=2,m=4"})
        check_recovery(run, net(), EXAMPLE)
    with pytest.raises(UsageError, match=r"recover .*compact.pt2.* ended with exit code 1"):
        stages_of(tmp_path, net(), launch=[sys.executable, "-c", "raise SystemExit(1)"]).recover(
            PLAN, net(), Accuracy()
        )


def test_an_interrupted_run_ends_what_it_launched(tmp_path: Path) -> None:
    pid = tmp_path / "pid"

    def interrupt() -> None:
        while not pid.is_file() or not pid.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_command(["sh", "-c", f"echo $$ > {pid}; exec sleep 300"], tmp_path)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_processes_end_with_their_launcher() -> None:
    assert Processes(launcher=os.getppid() + 1).total(2.0) == 2.0, "one alone exchanges nothing"
    with pytest.raises(ConnectionLost, match="what launched this process has ended"):
        Processes(count=2, launcher=os.getppid() + 1).total(2.0)


def test_one_process_needs_no_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)  # its import fails
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert find_processes() is ALONE
    recover_accuracy(net(), digits(), epochs=1, autocast=False, processes=find_processes())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MissingLibrary, match=r"pip install 'edgeprune\[accelerate\]'"):
        find_processes()


def test_a_run_looks_at_its_model_and_inputs_before_it_starts() -> None:
    flat, inputs = nn.Sequential(nn.Linear(12, 4)), (torch.zeros(2, 12),)
    with pytest.raises(DataError, match="mixup mixes images"):
        check_recovery(run_of(recover={"mixup": 0.2}), flat, inputs)
    with pytest.raises(UsageError, match="share no layer"):
        check_recovery(run_of(recover={"features": 1.0}), flat, inputs)
    check_recovery(run_of(recover=ALL), net(), EXAMPLE)


def test_a_run_without_labels_says_what_to_set() -> None:
    with pytest.raises(UsageError, match=r'start = "pruned" .*, \[recover\] label_smoothing = 0\.'):
        check_unlabelled(run_of(recover={"start": "scratch", "label_smoothing": 0.1}), net(), EXAMPLE)
