"""recover: training helps, resumes exactly, and does not ruin what it was given."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits import images
from torch import Tensor, nn

from edgeprune.core.errors import DataError, ModelError, RecordError, UsageError
from edgeprune.core.records import Precision
from edgeprune.formats import onnx
from edgeprune.load import ArrayBatches
from edgeprune.objective import evaluate_difference
from edgeprune.recover import evaluate_accuracy, recover_accuracy

torch.set_num_threads(1)


@dataclass
class Splits:
    train: Any
    calibration: Any = None
    test: Any = None


@pytest.fixture(scope="module")
def splits() -> Splits:
    x, y = images(shuffled=True)
    return Splits(
        train=ArrayBatches(x[:600], y[:600], batch=50, shuffle=True),
        calibration=ArrayBatches(x[:128], y[:128]),
        test=ArrayBatches(x[600:1000], y[600:1000]),
    )


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Dropout(0.1), nn.Flatten(), nn.Linear(128, 10),
    ).eval()  # fmt: skip


def test_training_raises_accuracy(splits: Splits) -> None:
    model = net()
    result = recover_accuracy(model, splits, epochs=3, lr=0.1, autocast=False)
    assert result.accuracy_before is not None and result.accuracy_after is not None
    assert result.accuracy_after > 0.8 > result.accuracy_before + 0.3
    assert result.losses[-1] < result.losses[0] and result.epochs == 3 and not result.note
    assert not model.training
    assert evaluate_accuracy(model, splits.test) == result.accuracy_after


def test_distillation_needs_no_right_labels(splits: Splits) -> None:
    teacher = net()
    recover_accuracy(teacher, splits, epochs=3, lr=0.1, autocast=False)
    wrong = Splits(
        ArrayBatches(splits.train.inputs, torch.zeros_like(splits.train.targets), batch=50), None, splits.test
    )
    before = copy.deepcopy(teacher.state_dict())
    result = recover_accuracy(net(1), wrong, teacher=teacher, distil_weight=1.0, epochs=3, lr=0.1, autocast=False)
    assert result.accuracy_after is not None and result.accuracy_after > 0.8
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


class StopAfter:
    """Batches that break off, as a kill would, after so many of them."""

    def __init__(self, batches: ArrayBatches, count: int) -> None:
        self.batches, self.left = batches, count

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        for batch in self.batches:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            yield batch


@pytest.mark.parametrize("killed_after", [5, 17, 30])
def test_a_killed_recovery_resumes_to_the_same_weights(splits: Splits, tmp_path: Path, killed_after: int) -> None:
    whole, resumed = net(), net()
    result = recover_accuracy(whole, splits, epochs=3, lr=0.1, autocast=False)
    path = tmp_path / "recover.safetensors"
    cut = Splits(StopAfter(splits.train, killed_after), splits.calibration, splits.test)
    with pytest.raises(KeyboardInterrupt):
        recover_accuracy(net(), cut, epochs=3, lr=0.1, autocast=False, checkpoint=path)
    assert path.exists() == (killed_after > 12)
    torch.rand(7)  # whatever the generators did in between must not matter
    again = recover_accuracy(resumed, splits, epochs=3, lr=0.1, autocast=False, checkpoint=path)
    assert again == result
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_a_finished_recovery_is_not_repeated(splits: Splits, tmp_path: Path) -> None:
    path = tmp_path / "recover.safetensors"
    first = recover_accuracy(net(), splits, epochs=1, lr=0.1, autocast=False, checkpoint=path)
    stopped = Splits(StopAfter(splits.train, 0), splits.calibration, splits.test)
    assert recover_accuracy(net(), stopped, epochs=1, lr=0.1, autocast=False, checkpoint=path) == first


def test_a_checkpoint_of_other_settings_is_not_resumed_and_a_damaged_one_is_refused(
    splits: Splits, tmp_path: Path
) -> None:
    path = tmp_path / "recover.safetensors"
    recover_accuracy(net(), splits, epochs=1, lr=0.1, autocast=False, checkpoint=path)
    assert recover_accuracy(net(), splits, epochs=2, lr=0.1, autocast=False, checkpoint=path).epochs == 2
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RecordError, match="damaged"):
        recover_accuracy(net(), splits, epochs=2, lr=0.1, autocast=False, checkpoint=path)


def test_the_callers_random_state_is_left_alone(splits: Splits) -> None:
    model = net()
    state = torch.get_rng_state()
    recover_accuracy(model, splits, epochs=1, autocast=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_batch_norms_fit_the_trained_weights(splits: Splits) -> None:
    """However slowly their running statistics follow: after few steps these still describe the old weights."""
    model = net()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1e-4
    result = recover_accuracy(model, splits, epochs=3, lr=0.1, autocast=False)
    assert result.accuracy_after is not None and result.accuracy_after > 0.85
    norm = next(layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d))
    assert norm.momentum == 1e-4
    assert norm.running_mean is not None and float(norm.running_mean.abs().max()) > 1e-3


def test_diverging_training_keeps_the_best_epoch(splits: Splits) -> None:
    model = net()
    recover_accuracy(model, splits, epochs=2, lr=0.1, autocast=False)
    good = evaluate_accuracy(model, splits.test)
    result = recover_accuracy(model, splits, epochs=2, lr=1e6, autocast=False)
    assert result.note
    assert evaluate_accuracy(model, splits.test) == result.accuracy_after == good


def test_a_nan_loss_stops_training_with_the_weights_still_finite(splits: Splits) -> None:
    inputs = splits.train.inputs.clone()
    inputs[300] = float("nan")
    model = net()
    result = recover_accuracy(
        model, Splits(ArrayBatches(inputs, splits.train.targets, batch=50)), epochs=2, autocast=False
    )
    assert "diverged (loss nan in epoch 1)" in result.note and result.epochs == 1
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
    assert all(torch.equal(value, net().state_dict()[key]) for key, value in model.state_dict().items())


def test_the_faster_precision_is_chosen_and_reported(splits: Splits) -> None:
    assert recover_accuracy(net(), splits, epochs=1, lr=0.1).autocast in (True, False)
    half = recover_accuracy(net(), splits, epochs=2, lr=0.1, autocast=True)
    assert half.autocast and half.accuracy_after is not None and half.accuracy_after > 0.6


def test_a_precision_that_is_far_slower_is_given_up_at_once(splits: Splits) -> None:
    class SlowInHalf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.tried = net(), [0, 0]

        def forward(self, x: Tensor) -> Tensor:
            half = torch.is_autocast_enabled("cpu")
            self.tried[half] += 1
            time.sleep(1.0 if half else 0)
            return self.net(x)

        def __deepcopy__(self, memo: dict[int, object]) -> SlowInHalf:
            copied = SlowInHalf()
            copied.tried = self.tried  # of the trial too
            return copied

    model = SlowInHalf()
    assert not recover_accuracy(model, splits, epochs=1, lr=0.1).autocast
    layouts = 2 if next(iter(splits.train))[0].ndim == 4 else 1
    assert model.tried[True] == layouts < model.tried[False]


class SlowWhere(nn.Module):
    """A small net that takes its time with images laid out in one way, and remembers how they came."""

    def __init__(self, channels_last: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        self.slow, self.seen = channels_last, set[bool]()

    def forward(self, x: Tensor) -> Tensor:
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        if self.training:
            self.seen.add(channels_last)
            time.sleep(0.05 if channels_last == self.slow else 0)
        return self.layers(x)


@pytest.mark.parametrize("slow", [False, True])
def test_the_faster_layout_is_chosen_and_survives_a_kill(splits: Splits, tmp_path: Path, slow: bool) -> None:
    path = tmp_path / "recover.safetensors"
    images = splits.train.inputs.repeat(1, 2, 1, 1)
    train = ArrayBatches(images, splits.train.targets, batch=200, shuffle=True)
    with pytest.raises(KeyboardInterrupt):
        recover_accuracy(SlowWhere(slow), Splits(StopAfter(train, 5)), epochs=2, lr=0.1, checkpoint=path)
    model = SlowWhere(not slow)  # had it chosen again, the other layout would have won
    result = recover_accuracy(model, Splits(train), epochs=2, lr=0.1, checkpoint=path)
    assert result.channels_last is not slow and model.seen == {not slow}
    assert result.losses[-1] < result.losses[0]


def test_batches_without_a_length_train_too(splits: Splits) -> None:
    class Endlessly:
        def __iter__(self) -> Any:
            return iter(list(splits.train))

    result = recover_accuracy(net(), Splits(Endlessly(), None, splits.test), epochs=3, lr=0.1, autocast=False)
    assert result.accuracy_after is not None and result.accuracy_after > 0.8


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (None, "needs training data"),
        ([], "gave no batches"),
        ([(torch.ones(2, 1, 8, 8), torch.tensor([3, 10]))], "label 10, the model only 10 classes"),
        ([(torch.ones(2, 1, 8, 8), torch.tensor([0.5, 1.0]))], "float32"),
    ],
)
def test_data_that_cannot_train_says_why(train: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        recover_accuracy(net(), Splits(train), epochs=1, autocast=False)


def test_accuracy_of_nothing_is_an_error() -> None:
    with pytest.raises(DataError, match="no test examples"):
        evaluate_accuracy(net(), [])


INT8 = Precision(dtype="int8", activations="uint8")


def broken_net(splits: Splits) -> nn.Module:
    """Right in float32; in int8 one channel 100 times the others takes the range of an activation for itself."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    recover_accuracy(model, splits, epochs=10, lr=0.1, autocast=False)
    with torch.no_grad():
        for tensor in (model[1].weight, model[1].bias):
            tensor[0] *= 100
        model[3].weight[0] /= 100
    return model


def accuracy_of_int8(model: nn.Module, splits: Splits, path: Path) -> float:
    inputs, targets = splits.test.inputs.numpy(), splits.test.targets.numpy()
    calibration = [(splits.train.inputs.numpy(),)]
    example = (splits.test.inputs[:50],)
    onnx.export(model, example, path, precision=INT8, calibration=calibration)
    outputs = [onnx.run(path, [inputs[at : at + 50]])[0] for at in range(0, len(inputs), 50)]
    return float((np.concatenate(outputs).argmax(1) == targets).mean())


def test_training_for_int8_raises_the_accuracy_of_the_artifact(splits: Splits, tmp_path: Path) -> None:
    model = broken_net(splits)
    before = accuracy_of_int8(model, splits, tmp_path / "before.onnx")
    keys, kinds = list(model.state_dict()), [type(part) for part in model.modules()]
    statistics = model[1].running_mean.clone()
    result = recover_accuracy(model, splits, epochs=4, lr=0.02, precision=INT8)
    assert list(model.state_dict()) == keys and [type(part) for part in model.modules()] == kinds
    assert torch.equal(model[1].running_mean, statistics) and not model.training
    assert result.accuracy_before is not None and result.accuracy_after is not None
    assert result.accuracy_after > result.accuracy_before
    assert accuracy_of_int8(model, splits, tmp_path / "after.onnx") > before + 0.03


def test_training_for_int8_resumes_to_the_same_weights(splits: Splits, tmp_path: Path) -> None:
    whole, resumed, path = net(), net(), tmp_path / "recover.safetensors"
    result = recover_accuracy(whole, splits, epochs=2, lr=0.1, precision=INT8)
    # Twelve batches an epoch, and four from which the ranges start.
    cut = Splits(StopAfter(splits.train, 20), None, splits.test)
    with pytest.raises(KeyboardInterrupt):
        recover_accuracy(net(), cut, epochs=2, lr=0.1, checkpoint=path, precision=INT8)
    assert path.exists()
    assert recover_accuracy(resumed, splits, epochs=2, lr=0.1, checkpoint=path, precision=INT8) == result
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_int8_training_refuses_nodes_it_does_not_know(splits: Splits) -> None:
    with pytest.raises(ModelError, match="no node 'conv2d_99'"):
        recover_accuracy(net(), splits, epochs=1, precision=Precision(dtype="int8", float_nodes=("conv2d_99",)))


# --- the dense model's outputs alone ---


class Features(nn.Module):
    """Two outputs of unlike size; dropout and batch norm, which training must leave alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x)
        return {"left": self.left(x), "right": 1000 * self.right(x)}


def _unlabelled() -> Splits:
    torch.manual_seed(1)
    batches = [(torch.randn(8, 1, 8, 8), torch.zeros(8)) for _ in range(9)]
    return Splits(batches[:8], None, batches[8:])


def _disturbed(teacher: nn.Module, by: float = 0.2) -> nn.Module:
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return student


def test_outputs_are_matched_without_labels() -> None:
    torch.manual_seed(0)
    teacher = Features().eval()
    start = _disturbed(teacher).eval()
    student = copy.deepcopy(start)
    settings = {"teacher": teacher, "match_outputs": True, "epochs": 6, "autocast": False}
    result = recover_accuracy(student, _unlabelled(), **settings)
    assert result.accuracy_before is None and result.accuracy_after is None
    assert result.difference_before is not None and result.difference_after is not None
    assert result.difference_after < 0.3 * result.difference_before
    assert evaluate_difference(student, teacher, _unlabelled().test) == pytest.approx(result.difference_after)
    for ours, theirs in zip(student.body[1].buffers(), teacher.body[1].buffers(), strict=True):
        assert torch.equal(ours, theirs), "statistics stay"
    with torch.no_grad():
        ((images, _),) = _unlabelled().test
        before, ours, theirs = start(images), student(images), teacher(images)
    for name in ours:  # large and small outputs alike
        assert (ours[name] - theirs[name]).norm() < 0.6 * (before[name] - theirs[name]).norm()


def test_matching_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = Features().eval()
    settings = {"teacher": teacher, "match_outputs": True, "epochs": 3, "autocast": False}
    start, path = _disturbed(teacher), tmp_path / "checkpoint"
    whole = copy.deepcopy(start)
    result = recover_accuracy(whole, _unlabelled(), **settings)

    def kill(_: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover_accuracy(copy.deepcopy(start), _unlabelled(), checkpoint=path, progress=kill, **settings)
    resumed = copy.deepcopy(start)
    assert recover_accuracy(resumed, _unlabelled(), checkpoint=path, **settings) == result
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_matching_that_does_harm_is_undone() -> None:
    torch.manual_seed(0)
    teacher = Features().eval()
    student = _disturbed(teacher, 0.01)
    before = copy.deepcopy(student.state_dict())
    result = recover_accuracy(
        student, _unlabelled(), teacher=teacher, match_outputs=True, epochs=1, lr=5.0, autocast=False
    )
    assert "undone" in result.note and result.difference_after == result.difference_before
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_what_cannot_be_matched_is_refused() -> None:
    with pytest.raises(UsageError, match="give the dense model as the teacher"):
        recover_accuracy(Features(), _unlabelled(), match_outputs=True)
    other = nn.Conv2d(1, 3, 1)
    with pytest.raises(DataError, match=r"shapes .* cannot be matched"):
        recover_accuracy(Features(), _unlabelled(), teacher=other, match_outputs=True, epochs=1, autocast=False)
    with pytest.raises(DataError, match="no examples"):
        evaluate_difference(other, other, [])
