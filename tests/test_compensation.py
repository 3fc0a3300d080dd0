"""compensation: least squares and batch-norm statistics repair what slicing broke, and never do harm."""

from __future__ import annotations

import copy
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from digits import images
from torch import Tensor, nn

from edgeprune.compensation import least_squares
from edgeprune.compensation.batch_norm import match_batch_norm, reestimate_batch_norm
from edgeprune.compensation.least_squares import compensate
from edgeprune.compensation.obs import collect_gram, explain_removed
from edgeprune.core.records import Graph, IntArray
from edgeprune.graphs.slice import slice_model
from edgeprune.load import ArrayBatches
from edgeprune.recover import evaluate_accuracy, recover_accuracy
from edgeprune.trace import trace_graph

torch.set_num_threads(1)
TOOLS = Path(__file__).parents[1] / "tools"


class Mixed(nn.Module):
    """Plain, grouped and depthwise convolutions, a residual sum behind batch norm, and a flattened linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.expand = nn.Conv2d(16, 24, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)
        self.norm2 = nn.BatchNorm2d(24)
        self.project = nn.Conv2d(24, 16, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(16)
        self.head = nn.Linear(16 * 16, 20)
        self.last = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.stem(x))))
        y = torch.relu(self.norm1(self.expand(x)))
        y = torch.relu(self.norm2(self.depthwise(y)))
        x = torch.relu(self.norm3(self.project(y)) + x)
        x = nn.functional.avg_pool2d(x, 2)
        return self.last(torch.relu(self.head(x.flatten(1))))


def digits() -> tuple[Tensor, Tensor]:
    """Real handwritten digits, 3 x 8 x 8."""
    x, y = images(shuffled=True)
    return x.expand(-1, 3, -1, -1).contiguous(), y


def batches(count: int = 384, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Calibration batches."""
    x, y = digits()
    return list(zip(x[:count].split(size), y[:count].split(size), strict=True))


def unseen() -> Tensor:
    """Images that no test calibrates on."""
    return digits()[0][-300:]


INPUTS = (torch.zeros(2, 3, 8, 8),)


@dataclass
class Splits:
    train: ArrayBatches
    calibration: None = None
    test: None = None


@pytest.fixture(scope="module")
def mixed() -> tuple[nn.Module, Graph]:
    torch.manual_seed(0)
    model, (x, y) = Mixed(), digits()
    recover_accuracy(model, Splits(ArrayBatches(x[:1000], y[:1000], shuffle=True)), epochs=3, lr=0.05, autocast=False)
    return model, trace_graph(model, INPUTS)


def halves(graph: Graph) -> dict[str, IntArray]:
    """Every other step of every prunable group."""
    keep = {}
    for group in graph.prunable:
        kept = np.arange(group.units) // group.step % 2 == 0
        keep[group.name] = np.flatnonzero(kept).astype(np.int64)
    return keep


def error(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        wanted = dense.eval()(x)
        return float((model.eval()(x) - wanted).square().mean() / wanted.var())


def test_every_kind_of_consumer_is_fitted_and_the_output_comes_closer(mixed: tuple[nn.Module, Graph]) -> None:
    dense, graph = mixed
    before = copy.deepcopy(dense.state_dict())
    keep = halves(graph)
    compact = slice_model(dense, INPUTS, graph, keep)
    sliced = error(compact, dense, unseen())
    fitted = compensate(compact, dense, graph, keep, batches())
    repaired = error(compact, dense, unseen())
    assert {"grouped", "depthwise", "project", "head", "last"} <= set(fitted)
    assert repaired < 0.5 * sliced
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


def test_a_unit_that_repeats_another_is_removed_without_loss() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
                          nn.Flatten(), nn.Linear(6 * 36, 4)).eval()  # fmt: skip
    with torch.no_grad():
        dense[0].weight[4:] = dense[0].weight[:4] * torch.tensor([0.5, 1.0, 2.0, 3.0]).view(4, 1, 1, 1)
        dense[0].bias[4:] = dense[0].bias[:4] * torch.tensor([0.5, 1.0, 2.0, 3.0])
    graph = trace_graph(dense, INPUTS)
    keep = {"0": np.arange(4)}
    compact = slice_model(dense, INPUTS, graph, keep)
    assert error(compact, dense, unseen()) > 0.05
    compensate(compact, dense, graph, keep, batches(), damping=1e-9)
    assert error(compact, dense, unseen()) < 1e-6


def test_the_intercept_of_a_layer_without_bias_goes_to_its_batch_norm() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softplus(), nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4),
                          nn.Flatten(), nn.Linear(4 * 36, 2)).eval()  # fmt: skip
    with torch.no_grad():
        dense[0].weight[4:] = 0  # these units are constants: only an intercept can replace them
        dense[0].bias[4:] = 5.0
    graph = trace_graph(dense, INPUTS)
    keep = {"0": np.arange(4)}
    compact = slice_model(dense, INPUTS, graph, keep)
    compensate(compact, dense, graph, keep, batches(), damping=1e-9)
    assert error(compact, dense, unseen()) < 1e-6


def test_channels_of_a_linear_layer_on_tokens_are_the_last_axis() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    tokens = torch.randn(32, 5, 6)
    graph = trace_graph(dense, (tokens[:2],))
    first, second, *_ = (group.name for group in graph.prunable)
    keep = {first: np.arange(6), second: np.array([0, 2, 3, 5, 7])}
    sliced, fitted = (slice_model(dense, (tokens[:2],), graph, keep).eval() for _ in range(2))
    assert compensate(fitted, dense, graph, keep, [(tokens, torch.zeros(32))], damping=1e-6) == ["1", "3"]
    with torch.no_grad():
        # The first layer's 9 outputs are of rank 6, so that the 6 that are left say as much.
        wanted = dense[:2](tokens)[..., keep[second]]
        assert torch.allclose(fitted.get_submodule("1")(fitted.get_submodule("0")(tokens)), wanted, atol=1e-3)
        errors = [(model(tokens) - dense(tokens)).square().mean() for model in (fitted, sliced)]
    assert errors[0] < 0.5 * errors[1]


def test_nothing_removed_changes_nothing(mixed: tuple[nn.Module, Graph]) -> None:
    dense, graph = mixed
    compact = slice_model(dense, INPUTS, graph, {})
    before = copy.deepcopy(compact.state_dict())
    assert compensate(compact, dense, graph, {}, batches()) == []
    assert all(torch.equal(value, before[key]) for key, value in compact.state_dict().items())


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan"), float("inf"), 1e30])
def test_inputs_that_say_nothing_do_no_harm(mixed: tuple[nn.Module, Graph], value: float) -> None:
    dense, graph = mixed
    keep = halves(graph)
    compact = slice_model(dense, INPUTS, graph, keep)
    compensate(compact, dense, graph, keep, [(torch.full((4, 3, 8, 8), value), torch.zeros(4))])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in compact.state_dict().values())
    with torch.no_grad():
        assert bool(torch.isfinite(compact(unseen())).all())


def test_fewer_examples_than_inputs_still_help(mixed: tuple[nn.Module, Graph]) -> None:
    dense, graph = mixed
    keep = halves(graph)
    compact = slice_model(dense, INPUTS, graph, keep)
    sliced = error(compact, dense, unseen())
    compensate(compact, dense, graph, keep, batches(24, size=6))
    assert error(compact, dense, unseen()) < sliced


def test_the_batch_size_does_not_matter(mixed: tuple[nn.Module, Graph]) -> None:
    dense, graph = mixed
    keep, outcomes = halves(graph), []
    for size in (48, 7):
        compact = slice_model(dense, INPUTS, graph, keep)
        compensate(compact, dense, graph, keep, batches(96, size=size))
        outcomes.append(compact(unseen()).detach())
    assert torch.allclose(*outcomes, rtol=1e-3, atol=1e-3)


def test_one_layer_stands_in_for_its_removed_inputs() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 3, 3, padding=1)
    x = torch.randn(16, 4, 8, 8)
    x[:, 3] = 0.5 * x[:, 0] - 2 * x[:, 1]
    with torch.no_grad():
        wanted = layer(x)
        gram = collect_gram(layer, x)
        assert gram is not None and gram.shape == (1, 37, 37)
        explain_removed(layer, gram[0], torch.tensor([3]), 1e-9)
        layer.weight[:, 3] = 0
        assert torch.allclose(layer(x), wanted, atol=1e-4)


# --- batch norm ----------------------------------------------------------------------------------


def test_statistics_become_those_of_the_batches_and_all_else_stays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(0.9), nn.BatchNorm2d(4))
    model[0].train()
    model[2].eval()
    modes, momenta = [part.training for part in model.modules()], [model[1].momentum, model[3].momentum]
    weights = {key: value.clone() for key, value in model.named_parameters()}
    given = batches(64)
    reestimate_batch_norm(model, given)
    with torch.no_grad():
        seen = model[0](given[0][0])
    assert torch.allclose(model[1].running_mean, seen.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(model[1].running_var, seen.var((0, 2, 3)), rtol=1e-4)
    assert torch.allclose(model[3].running_mean, torch.zeros(4), atol=1e-5), "dropout was on"
    assert [part.training for part in model.modules()] == modes
    assert [model[1].momentum, model[3].momentum] == momenta
    assert all(torch.equal(value, weights[key]) for key, value in model.named_parameters())


@pytest.mark.parametrize("given", [[], [(torch.full((4, 3, 2, 2), float("nan")), torch.zeros(4))]])
def test_without_usable_batches_the_old_statistics_stay(given: list[tuple[Tensor, Tensor]]) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    reestimate_batch_norm(model, batches(64))
    before = copy.deepcopy(model.state_dict())
    reestimate_batch_norm(model, given)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- real images ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_half_of_a_real_net_is_repaired_without_training() -> None:
    sys.path.insert(0, str(TOOLS))
    cifar = pytest.importorskip("cifar", reason="needs Pillow")
    folder = cifar.find_data()
    if folder is None:
        pytest.skip(f"no CIFAR images in $EDGEPRUNE_DATA ({os.environ.get('EDGEPRUNE_DATA')}) or ../shared/data")
    pytest.importorskip("PIL", reason="needs Pillow to decode the images")
    x, y = cifar.read_images(folder / "cifar10-test.npz")
    test = cifar.Images(x[:300], y[:300], batch=100)
    calibration = cifar.Images(x[-128:], y[-128:], batch=64)
    dense = cifar.load_net("resnet20", folder)
    inputs = (torch.randn(2, 3, 32, 32),)
    graph = trace_graph(dense, inputs)
    keep = {}
    for group in graph.prunable:
        if ".conv1" in group.name:  # inside the blocks; every second filter, with no regard to its worth
            keep[group.name] = np.arange(0, group.units, 2)
    compact = slice_model(dense, inputs, graph, keep)
    sliced = evaluate_accuracy(compact, test)
    compensate(compact, dense, graph, keep, calibration)
    assert evaluate_accuracy(compact, test) > max(0.55, sliced + 0.25)


def test_no_more_examples_are_held_than_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the memory fits as a quarter of the examples does: the first ones."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 64, 4),
    ).eval()  # fmt: skip
    x = torch.randn(64, 3, 8, 8)
    graph = trace_graph(net, (x[:1],))
    keep = {group.name: np.arange(group.units // 2) for group in graph.prunable}

    def fitted(examples: int) -> dict[str, Tensor]:
        compact = slice_model(net, (x[:1],), graph, keep).eval()
        batches = [(x[i : i + 16], torch.zeros(16)) for i in range(0, examples, 16)]
        assert compensate(compact, net, graph, keep, batches)
        return {name: value.clone() for name, value in compact.state_dict().items()}

    compact = slice_model(net, (x[:1],), graph, keep).eval()
    one = (x[:1],)
    reference = least_squares.lift(least_squares.capture(net, one))
    per_example = least_squares._live_bytes(compact, one) + least_squares._live_bytes(reference, one)
    # The dense model holds its first convolution and what ReLU makes of it: 2 x 16 x 64 floats.
    assert per_example >= 2 * 16 * 64 * 4
    few, whole = fitted(16), fitted(64)
    monkeypatch.setattr(least_squares, "MEMORY_BYTES", 16 * per_example)
    limited = fitted(64)
    assert all(torch.equal(limited[name], few[name]) for name in few)
    assert any(not torch.equal(limited[name], whole[name]) for name in whole)


@pytest.mark.parametrize("dead", [False, True])
def test_batch_norms_say_the_same_with_statistics_of_what_they_see(dead: bool) -> None:
    """In eval mode nothing changes; in train mode, on the batch that was seen, the model is the same too."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 6), nn.BatchNorm1d(6),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.5, 3)
                layer.weight.uniform_(0.5, 2)
                layer.bias.normal_()
        if dead:
            net[0].weight[3] = 0  # does not vary, so that no scale and shift of its statistics say the same
        x = torch.randn(256, 3, 8, 8)
        before, state = net(x), copy.deepcopy(net[1].state_dict())
        assert not dead or torch.equal(net[0](x)[:, 3], torch.zeros(256, 6, 6))
        spread = before.std()
        assert (net.train()(x) - before).abs().max() > 0.2 * spread
        net[1].load_state_dict(state)
    net = copy.deepcopy(net).eval()
    with torch.no_grad():
        before = net(x)
        match_batch_norm(net, [(x[:128], None), (x[128:], None)])
        assert not net.training
        assert (net(x) - before).abs().max() < 1e-4 * before.abs().max()
        if dead:
            assert all(
                torch.equal(value[3], state[name][3]) for name, value in net[1].state_dict().items() if value.ndim
            )
        else:
            trained = net.train()(x)
            assert (trained - before).abs().max() < 0.03 * before.std()


def test_batch_norms_that_cannot_be_matched_stay() -> None:
    plain = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    state = copy.deepcopy(plain.state_dict())
    match_batch_norm(plain, [(torch.randn(8, 3, 4, 4), None)])
    match_batch_norm(plain, [])
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
