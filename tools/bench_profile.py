"""How well a profile predicts models it never saw, next to a table of kernels timed one by one.

    python tools/bench_profile.py [--quick] [--model resnet18 mobilenet_v2] [--target NAME] [--out DIR]

Both have the same number of timings on the board. The isolated table is what NetAdapt (Yang et al.,
ECCV 2018) uses: each layer alone, at a grid of widths, interpolated and summed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from scipy.interpolate import RegularGridInterpolator

from edgeprune.core.cost import kernel_sizes
from edgeprune.core.effort import EFFORTS
from edgeprune.core.records import Graph, Kernel, Node, Profile, Step, Target
from edgeprune.core.stats import median
from edgeprune.device.embedded import EmbeddedBoard
from edgeprune.device.session import Session, open_session
from edgeprune.device.targets import load_target
from edgeprune.profile import profile_target
from edgeprune.tables.combine import average_rounds
from edgeprune.trace import trace_graph

MEAN_AIM, MAX_AIM = 0.03, 0.08


def load_zoo_model(name: str) -> torch.nn.Module:
    """A torchvision model with random weights and statistics; the wheel's operators are declared first."""
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        load_zoo_model.library = library  # type: ignore[attr-defined]  # it must outlive the import
    import torchvision

    torch.manual_seed(0)
    module: torch.nn.Module = getattr(torchvision.models, name)(weights=None)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.running_var, 0.5, 1.5)
            torch.nn.init.normal_(part.bias, 0.0, 0.1)
    return module.eval()


def isolated_model(node: Node, graph: Graph, cin: int, cout: int) -> onnx.ModelProto:
    """One layer alone, with the activation behind it, at the given channels."""
    rng = np.random.default_rng(0)
    parameters = {parameter.name: parameter for parameter in graph.parameters}
    weight = parameters[node.parameters[0]].shape
    source = next(other for other in graph.nodes if other.name == node.inputs[0]).out_shape
    if node.op == "linear":
        shape, into = [cout, cin], [1, cin]
        layer = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)
        nodes = [layer]
    else:
        depthwise = weight[1] == 1 and source[1] > 1
        shape = [cout, 1 if depthwise else cin, *weight[2:]]
        into = [1, cout if depthwise else cin, *source[2:]]
        stride = -(-source[2] // node.out_shape[2])
        pads = [side // 2 for side in weight[2:]] * 2
        layer = helper.make_node(
            "Conv", ["x", "w", "b"], ["c"], pads=pads, strides=[stride] * 2, group=cout if depthwise else 1
        )
        nodes = [layer, helper.make_node("Relu", ["c"], ["y"])]
    initialisers = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) * 0.05, "w"),
        numpy_helper.from_array(np.zeros(cout, np.float32), "b"),
    ]
    graph_proto = helper.make_graph(
        nodes, "layer", [helper.make_tensor_value_info("x", TensorProto.FLOAT, into)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], initialisers,
    )  # fmt: skip
    return helper.make_model(graph_proto, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def isolated_table(
    graph: Graph, profile: Profile, session: Session, timings: int, seconds: float, folder: Path
) -> Callable[[Mapping[str, int]], float]:
    """Time each kind of layer alone on a grid; returns the sum of interpolated layers for widths."""
    nodes = {node.name: node for node in graph.nodes}
    layers = [k for k in profile.kernels if k.nodes and nodes[k.nodes[0]].op in ("conv2d", "linear")]
    kinds: dict[str, Kernel] = {kernel.signature: kernel for kernel in layers}
    largest: dict[str, tuple[int, int]] = {}
    for kernel in layers:
        sizes = kernel_sizes(kernel, graph.units, graph.units)
        before = largest.get(kernel.signature, (0, 0))
        largest[kernel.signature] = (max(before[0], sizes[0]), max(before[1], sizes[1]))
    both = sum(1 for k in kinds.values() if k.in_extent is not None and k.in_extent.groups)
    # Layers with one varying size have points on a line, the others on a square.
    side = max(2, int(np.sqrt(timings / max(len(kinds), 1))) if both else timings)
    grids, steps, files = {}, [], {}
    for number, (signature, kernel) in enumerate(kinds.items()):
        top_in, top_out = largest[signature]
        varies = kernel.in_extent is not None and bool(kernel.in_extent.groups) and top_in > 4
        ins = np.unique(np.linspace(max(top_in // 8, 1), top_in, side).astype(int)) if varies else np.array([top_in])
        outs = np.unique(np.linspace(max(top_out // 8, 1), top_out, side).astype(int))
        grids[signature] = (ins, outs)
        for cin in ins:
            for cout in outs:
                name = f"layer-{number}-{cin}-{cout}.onnx"
                (folder / name).write_bytes(
                    isolated_model(nodes[kernel.nodes[0]], graph, int(cin), int(cout)).SerializeToString()
                )
                files[name] = folder / name
                steps.append(Step(key=name, kind="time", artifact=name, seconds=seconds))
    session.push(files)
    order = np.random.default_rng(0).permutation(len(steps))
    results = session.run([steps[index] for index in order], job=f"isolated-{folder.name}")
    times = {result.key: median(result.samples.values) for result in results if result.samples is not None}
    session.remove(list(files))
    tables: dict[str, Any] = {}
    for number, (signature, (ins, outs)) in enumerate(grids.items()):
        values = np.array([[times[f"layer-{number}-{i}-{o}.onnx"] for o in outs] for i in ins])
        if len(ins) == 1:  # two equal rows, so that one interpolator serves both shapes
            ins, values = np.array([ins[0], ins[0] + 1]), np.repeat(values, 2, axis=0)
        tables[signature] = RegularGridInterpolator((ins, outs), values, bounds_error=False, fill_value=None)

    def predict(widths: Mapping[str, int]) -> float:
        return sum(tables[k.signature](kernel_sizes(k, widths, graph.units)).item() for k in layers)

    return predict


def bench(name: str, session: Session, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Errors of both tables on the held-out configurations."""
    module, inputs = load_zoo_model(name), (torch.randn(1, 3, 224, 224),)
    graph = trace_graph(module, inputs)
    profile = profile_target(
        module, inputs, graph, session, path=folder / f"{name}.jsonl", configurations=40, held_out=options.held_out,
        effort=options.effort,
    )  # fmt: skip
    assert profile.held_out is not None
    layers = folder / f"{name}-{profile.artifact_sha256[:8]}"
    layers.mkdir(exist_ok=True)
    timings = 2 * len(profile.measurements)
    predict = isolated_table(graph, profile, session, timings, options.effort.seconds, layers)
    held = [item for item in average_rounds(profile.measurements) if item.held_out]
    isolated = [abs(predict(item.widths) / item.whole_s - 1) for item in held]
    return {
        "mean": profile.held_out.mean, "max": profile.held_out.max, "isolated_mean": float(np.mean(isolated)),
        "isolated_max": max(isolated), "configurations": 40, "held_out": len(held), "timings": timings,
    }  # fmt: skip


def main() -> None:
    """Print the table and the result line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter samples, fewer rounds: under 10 minutes")
    parser.add_argument("--model", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--target", help="a target of the inventory (default: the embedded board)")
    parser.add_argument("--out", type=Path, help="keep the profiles here, and go on from them")
    options = parser.parse_args()
    options.effort, options.held_out = (EFFORTS["quick"], 8) if options.quick else (EFFORTS["default"], 16)
    torch.set_num_threads(1)
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)

        def measure(target: Target) -> None:
            for name in options.model:
                with open_session(target) as session:
                    rows[name] = bench(name, session, options, folder)

        if options.target:
            measure(load_target(options.target))
        else:
            with EmbeddedBoard() as target:
                measure(target)
    heads = (("model", 16), ("fitted", 8), ("held out", 10), ("timings", 9), ("profile mean", 14), ("max", 8))
    print("".join(f"{head:>{width}}" for head, width in (*heads, ("isolated mean", 15), ("max", 8))))
    for name, row in rows.items():
        print(
            f"{name:>16}{row['configurations']:8.0f}{row['held_out']:10.0f}{row['timings']:9.0f}"
            f"{row['mean']:14.1%}{row['max']:8.1%}{row['isolated_mean']:15.1%}{row['isolated_max']:8.1%}"
        )
    aims = {}
    for name, row in rows.items():
        for key, limit in (("mean", MEAN_AIM), ("max", MAX_AIM)):
            aims[f"{name}_held_out_{key}"] = {"value": row[key], "aim": f"<= {limit}", "met": row[key] <= limit}
    print("RESULT", json.dumps({"aims": aims}))


if __name__ == "__main__":
    main()
