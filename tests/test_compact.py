"""Compaction: lifted, in place, and on disk."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from exactness import LIMIT, random_keep, randomise, relative_error
from safetensors.torch import load_file
from small_nets import NETS, ResNet20, WideResNet
from torch import nn

from edgeprune.compact import compact_model, save_compact
from edgeprune.core.errors import ModelError, RecordError, UsageError
from edgeprune.graphs.capture import import_program
from edgeprune.graphs.lift import lift
from edgeprune.graphs.slice import expand_tensors, mask_model
from edgeprune.trace import trace_graph

torch.set_num_threads(1)
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    "name", ["depthwise", "grouped", "group_norm", "depthwise_transposed", "squeeze_excite", "upsampled"]
)
def test_in_place_slices_the_users_own_module(name: str) -> None:
    module = randomise(NETS[name]())
    graph = trace_graph(module, (IMAGES[:1],))
    keep = random_keep(graph, np.random.default_rng(5))
    masked = mask_model(module, graph, keep)
    before = sum(p.numel() for p in module.parameters())
    result = compact_model(module, (IMAGES[:1],), graph, keep, in_place=True)
    assert result is module
    assert sum(p.numel() for p in module.parameters()) < before
    with torch.no_grad():
        assert relative_error(module(IMAGES), masked(IMAGES)) < LIMIT
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            assert part.weight.shape[:2] == (part.out_channels, part.in_channels // part.groups)
        if isinstance(part, nn.Linear):
            assert tuple(part.weight.shape) == (part.out_features, part.in_features)


def test_in_place_wide_resnet_equals_lifted() -> None:
    module, example = randomise(WideResNet()), torch.randn(2, 3, 32, 32)
    graph = trace_graph(module, (example,))
    keep = random_keep(graph, np.random.default_rng(6))
    lifted = compact_model(module, (example,), graph, keep).eval()
    own = compact_model(copy.deepcopy(module), (example,), graph, keep, in_place=True)
    assert own.groups[0].bn1.num_features == len(keep["conv1"])
    with torch.no_grad():
        assert relative_error(own(example), lifted(example)) < LIMIT


@pytest.mark.parametrize(
    ("build", "size", "where"), [(ResNet20, 32, "pad in 'layer2.0'"), (NETS["fixed_shuffle"], 8, "reshape")]
)
def test_in_place_refuses_written_channel_counts(build: type[nn.Module], size: int, where: str) -> None:
    module, example = randomise(build()), torch.randn(2, 3, size, size)
    before = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    graph = trace_graph(module, (example,))
    keep = {group.name: np.arange(group.units // 2) for group in graph.prunable}
    with pytest.raises(ModelError, match=rf"cannot be sliced in place.*{where}.*lifted form"):
        compact_model(module, (example,), graph, keep, in_place=True)
    assert {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()} == before
    with torch.no_grad():
        ours = compact_model(module, (example,), graph, keep).eval()(example)
        assert relative_error(ours, mask_model(module, graph, keep)(example)) < LIMIT


def test_saved_model_loads_without_the_plan(tmp_path: Path) -> None:
    module = randomise(NETS["skip_and_cut"]())
    graph = trace_graph(module, (IMAGES[:1],))
    compact = compact_model(module, (IMAGES[:1],), graph, random_keep(graph, np.random.default_rng(7)))
    save_compact(compact, (IMAGES[:1],), tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"compact.pt2", "compact.safetensors"}
    loaded = lift(import_program(torch.export.load(tmp_path / "run" / "compact.pt2"))).eval()
    state = load_file(tmp_path / "run" / "compact.safetensors")
    loaded.load_state_dict(state, strict=True)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), compact.eval()(IMAGES))


def test_saving_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match="cannot write"):
        save_compact(randomise(NETS["depthwise"]()), (IMAGES[:1],), tmp_path / "file")


@pytest.mark.parametrize("name", [*NETS, "resnet20", "wide"])
def test_a_trained_compact_model_fits_back_into_the_dense_one(name: str) -> None:
    module = randomise({"resnet20": ResNet20, "wide": WideResNet, **NETS}[name]())
    images = torch.randn(2, 3, 32, 32) if name in ("resnet20", "wide") else IMAGES
    graph = trace_graph(module, (images[:1],))
    keep = random_keep(graph, np.random.default_rng(7))
    compact = compact_model(module, (images[:1],), graph, keep).eval()
    for number, parameter in enumerate(compact.parameters()):  # as training would
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.data.add_(0.05 * noise)
    state = expand_tensors(module, compact, graph, keep)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    full = copy.deepcopy(module)
    full.load_state_dict(state)
    with torch.no_grad():
        assert relative_error(full(images), compact(images)) < LIMIT
        # What was removed is worth nothing, so that it goes first in the next step.
        assert relative_error(mask_model(full, graph, keep)(images), full(images)) < LIMIT
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_a_compact_model_of_other_widths_does_not_fit() -> None:
    module = randomise(ResNet20())
    example = torch.randn(1, 3, 32, 32)
    graph = trace_graph(module, (example,))
    keep = random_keep(graph, np.random.default_rng(8))
    compact = compact_model(module, (example,), graph, keep)
    with pytest.raises(RecordError, match="does not fit"):
        expand_tensors(module, compact, graph, {})
