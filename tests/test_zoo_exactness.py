"""Compacted output = masked output = ONNX Runtime's output, on the architectures people prune."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exactness import LIMIT, random_keep, randomise, relative_error
from small_nets import NETS, ResNet20, WideResNet
from torch import nn
from zoo import timm_model, torchvision_models

from edgeprune.graphs.capture import capture
from edgeprune.graphs.slice import mask_model, slice_captured, slice_model
from edgeprune.trace import trace_captured, trace_graph

torch.set_num_threads(1)


def _zoo(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision_models(), name)(weights=None, **options)


def _bottlenecks(**options: Any) -> Callable[[], nn.Module]:
    """The 50-layer nets with one block a stage: the same couplings, a quarter of the time."""
    models = torchvision_models
    return lambda: models().ResNet(models().resnet.Bottleneck, [1, 1, 1, 1], **options)


def _densenet() -> nn.Module:
    return torchvision_models().DenseNet(growth_rate=12, block_config=(3, 4, 3), num_init_features=24)


def _vit() -> nn.Module:
    return torchvision_models().VisionTransformer(32, 8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128)


def _swin() -> nn.Module:
    return torchvision_models().SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4])


def _maxvit() -> nn.Module:
    return torchvision_models().MaxVit((32, 32), 16, 4, [16], [1], 8, 0.0)


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm_model(name, **options)


# name -> (builder, input size, groups that must be prunable at least)
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet20_option_a": (ResNet20, 32, 12),
    "wrn16_2": (WideResNet, 32, 10),
    "resnet18": (_zoo("resnet18"), 64, 12),
    "resnet_bottleneck": (_bottlenecks(), 64, 13),
    "resnext_32x4d": (_bottlenecks(groups=32, width_per_group=4), 64, 13),
    "wide_resnet": (_bottlenecks(width_per_group=128), 32, 13),
    "vgg11_bn": (_zoo("vgg11_bn"), 32, 10),
    "vgg13": (_zoo("vgg13"), 32, 12),
    "alexnet": (_zoo("alexnet"), 64, 7),
    "squeezenet1_0": (_zoo("squeezenet1_0"), 64, 25),
    "squeezenet1_1": (_zoo("squeezenet1_1"), 64, 25),
    "densenet": (_densenet, 32, 20),
    "googlenet": (_zoo("googlenet", init_weights=False), 64, 57),
    "inception_v3": (_zoo("inception_v3", init_weights=False), 80, 90),
    "mobilenet_v2": (_zoo("mobilenet_v2"), 64, 25),
    "mobilenet_v3_small": (_zoo("mobilenet_v3_small"), 64, 27),
    "mnasnet0_5": (_zoo("mnasnet0_5"), 64, 25),
    "efficientnet_b0": (_zoo("efficientnet_b0"), 64, 40),
    "shufflenet_v2_x0_5": (_zoo("shufflenet_v2_x0_5"), 64, 33),
    "regnet_x_400mf": (_zoo("regnet_x_400mf"), 64, 40),
    "regnet_y_400mf": (_zoo("regnet_y_400mf"), 64, 50),
    "convnext_tiny": (_zoo("convnext_tiny"), 32, 18),
    "swin": (_swin, 32, 8),
    "vit": (_vit, 32, 4),
    "maxvit": (_maxvit, 32, 8),
    "timm_convnextv2": (_timm("convnextv2_atto", depths=(1, 1, 1, 1)), 32, 4),
    "timm_eva02": (_timm("eva02_tiny_patch14_224", depth=1, img_size=28), 28, 2),
    "timm_xcit": (_timm("xcit_nano_12_p16_224", depth=1, img_size=32), 32, 9),
    "timm_levit": (_timm("levit_128s", depth=(1, 1, 1), img_size=64), 64, 16),
    "timm_coatnet": (_timm("coatnet_nano_rw_224", depths=(1, 1, 1, 1), img_size=64), 64, 12),
}
ON_RUNTIME = {"resnet20_option_a", "resnext_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_compacted_equals_masked(name: str, tmp_path: Path) -> None:
    build, size, prunable = ARCHITECTURES[name]
    torch.manual_seed(0)
    module = randomise(build())
    example = torch.randn(1, 3, size, size)
    captured = capture(module, (example,))  # once for both, because it takes most of the time
    graph = trace_captured(captured)
    assert len(graph.prunable) >= prunable
    keep = random_keep(graph, np.random.default_rng(len(name)))
    compact = slice_captured(captured, graph, keep).eval()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        ours, masked, dense = compact(images), mask_model(module, graph, keep)(images), module(images)
    assert relative_error(ours, masked) < LIMIT
    assert relative_error(dense, masked) > 10 * LIMIT, "nothing was removed that mattered"
    assert set(compact.state_dict()) <= set(module.state_dict())
    for record in graph.parameters:
        kept = {group: len(units) for group, units in keep.items()}
        expected = tuple(extent.size(kept, graph.units) for extent in record.extents)
        if record.name in compact.state_dict():
            assert tuple(compact.state_dict()[record.name].shape) == expected
    if name in ON_RUNTIME:
        assert relative_error(_onnx_runtime(compact, images, tmp_path / "model.onnx"), ours) < LIMIT


ON_RUNTIME_SMALL = [
    "transposed",
    "skip_and_cut",
    "response_norm",
    "lstm",
    "one_head",
    "einsum_heads",
    "outlook",
    "shared",
    "standardised",
]


@pytest.mark.parametrize("name", ON_RUNTIME_SMALL)
def test_onnx_runtime_agrees_on_small_nets(name: str, tmp_path: Path) -> None:
    module = randomise(NETS[name]())
    images = torch.randn(2, 3, 8, 8)
    graph = trace_graph(module, (images,))
    compact = slice_model(module, (images,), graph, random_keep(graph, np.random.default_rng(1))).eval()
    with torch.no_grad():
        ours = compact(images)
    assert relative_error(_onnx_runtime(compact, images, tmp_path / "model.onnx"), ours) < LIMIT


def _onnx_runtime(module: nn.Module, images: torch.Tensor, path: Path) -> torch.Tensor:
    import onnxruntime

    torch.onnx.export(module, (images,), path, dynamo=True, external_data=False, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(output)
