"""How well a profile predicts models it never saw, next to a table of kernels timed one by one.

    python tools/bench_profile.py [--quick] [--board embedded|icount|icount-a76] [--net NAME ...]
                                  [--target NAME] [--configurations N] [--grid N] [--out DIR]

The isolated table is what NetAdapt (Yang et al., ECCV 2018) uses: each layer alone, at a grid of widths,
interpolated and summed. On the embedded board both have the same number of timings. On the instruction-count
boards a run takes the same time every time, so that what is left is the tables' own error: there the layers
are timed on a grid of N by N widths, and on every second and fourth of its lines, to see what a grid costs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cifar
import numpy as np
import onnx
import torch
from boards.icount import IcountBoard
from onnx import TensorProto, helper, numpy_helper
from scipy.interpolate import RegularGridInterpolator

from edgeprune.core.cost import kernel_sizes
from edgeprune.core.effort import EFFORTS, NOISELESS, Effort
from edgeprune.core.records import Graph, Kernel, Node, Profile, Step, Target
from edgeprune.core.stats import median
from edgeprune.device.embedded import EmbeddedBoard
from edgeprune.device.session import Session, open_session
from edgeprune.device.targets import connect_target, load_target
from edgeprune.profile import profile_target
from edgeprune.tables.combine import average_rounds
from edgeprune.trace import trace_graph

AIMS = {"embedded": (0.03, 0.08), "icount": (0.01, 0.03)}
"""Held-out error of the whole model, mean and maximum: on a machine that others share, and on one without noise."""
FEWER_AIM = 10
NETS: dict[str, tuple[Callable[[], torch.nn.Module], int]] = {
    "resnet18": (lambda: zoo("resnet18"), 224),
    "mobilenet_v2": (lambda: zoo("mobilenet_v2"), 224),
    "mobilenet_v2_035_96": (lambda: zoo("mobilenet_v2", width_mult=0.35), 96),
    "resnet20_32": (cifar.ResNet20, 32),
    "resnet18_64": (lambda: zoo("resnet18"), 64),
}
"""Name -> how it is made, side of its input."""
DEFAULT_NETS = {
    "embedded": ["resnet18", "mobilenet_v2"],
    "icount": ["mobilenet_v2_035_96", "resnet20_32", "resnet18_64"],
}


def zoo(name: str, **options: float) -> torch.nn.Module:
    """A torchvision model; the wheel's operators are declared first."""
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        zoo.library = library  # type: ignore[attr-defined]  # it must outlive the import
    import torchvision

    module: torch.nn.Module = getattr(torchvision.models, name)(weights=None, **options)
    return module


def load_net(name: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """A net with random weights and statistics, and an example input."""
    make, side = NETS[name]
    torch.manual_seed(0)
    module = make()
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.running_var, 0.5, 1.5)
            torch.nn.init.normal_(part.bias, 0.0, 0.1)
    return module.eval(), (torch.randn(1, 3, side, side),)


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


@dataclass(frozen=True)
class Layers:
    """Timings of each kind of layer alone, on a grid of its widths."""

    kernels: tuple[Kernel, ...]
    grids: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
    """Signature -> widths in (n,), widths out (m,), seconds (n, m)."""
    units: Mapping[str, int]

    def thinned(self, stride: int) -> Layers:
        """Only every so many lines of the grid."""
        return Layers(self.kernels, {k: (i[::stride], o[::stride], t[::stride, ::stride]) for k, (i, o, t) in
                                     self.grids.items()}, self.units)  # fmt: skip

    @property
    def timings(self) -> int:
        return sum(times.size for _, _, times in self.grids.values())

    def predictor(self) -> Callable[[Mapping[str, int]], float]:
        """The sum of interpolated layers, as a function of the widths."""
        tables: dict[str, Any] = {}
        for signature, (ins, outs, times) in self.grids.items():
            if len(ins) == 1:  # two equal rows, so that one interpolator serves both shapes
                ins, times = np.array([ins[0], ins[0] + 1]), np.repeat(times, 2, axis=0)
            tables[signature] = RegularGridInterpolator((ins, outs), times, bounds_error=False, fill_value=None)
        return lambda widths: sum(tables[k.signature](kernel_sizes(k, widths, self.units)).item() for k in self.kernels)


def isolated_layers(
    graph: Graph, profile: Profile, session: Session, side: int | None, timings: int, effort: Effort, folder: Path
) -> Layers:
    """Time each kind of layer alone on a grid.

    side: points along each width; None: as many as give about `timings` in all.
    """
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
    side = side or max(2, int(np.sqrt(timings / max(len(kinds), 1))) if both else timings)
    axes, steps, files = {}, [], {}
    for number, (signature, kernel) in enumerate(kinds.items()):
        top_in, top_out = largest[signature]
        varies = kernel.in_extent is not None and bool(kernel.in_extent.groups) and top_in > 4
        ins = np.unique(np.linspace(max(top_in // 8, 1), top_in, side).astype(int)) if varies else np.array([top_in])
        outs = np.unique(np.linspace(max(top_out // 8, 1), top_out, side).astype(int))
        axes[signature] = (ins, outs)
        for cin in ins:
            for cout in outs:
                name = f"layer-{number}-{cin}-{cout}.onnx"
                (folder / name).write_bytes(
                    isolated_model(nodes[kernel.nodes[0]], graph, int(cin), int(cout)).SerializeToString()
                )
                files[name] = folder / name
                steps.append(
                    Step(
                        key=name,
                        kind="time",
                        artifact=name,
                        seconds=effort.seconds,
                        min_samples=3,
                        steady=effort.steady,
                    )
                )
    session.push(files)
    order = np.random.default_rng(0).permutation(len(steps))
    results = session.run([steps[index] for index in order], job=f"isolated-{folder.name}")
    times = {result.key: median(result.samples.values) for result in results if result.samples is not None}
    session.remove(list(files))
    grids = {
        signature: (ins, outs, np.array([[times[f"layer-{number}-{i}-{o}.onnx"] for o in outs] for i in ins]))
        for number, (signature, (ins, outs)) in enumerate(axes.items())
    }
    return Layers(tuple(layers), grids, graph.units)


def board_seconds(target: Target) -> float:
    """Seconds of work so far: of an instruction-count board its own, without what it idled; else of the clock."""
    if not target.name.startswith("icount"):
        return time.monotonic()
    with contextlib.closing(connect_target(target)) as transport:
        up, idle = transport.read("/proc/uptime").split()  # proc(5); one processor
    return float(up) - float(idle)


def bench(name: str, session: Session, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Errors of both tables on the held-out configurations, and what they took."""
    module, inputs = load_net(name)
    graph = trace_graph(module, inputs)
    began = board_seconds(session.target)
    profile = profile_target(
        module, inputs, graph, session, path=folder / f"{name}.jsonl", configurations=options.configurations,
        held_out=options.held_out, effort=options.effort,
    )  # fmt: skip
    assert profile.held_out is not None
    profiled = board_seconds(session.target)
    row: dict[str, Any] = {
        "mean": profile.held_out.mean, "max": profile.held_out.max,
        "configurations": len({item.configuration for item in profile.measurements if not item.held_out}),
        "held_out": profile.held_out.configurations, "timings": 2 * len(profile.measurements),
        "board_s": profiled - began, "grids": [],
    }  # fmt: skip
    if options.grid == 0:
        return row
    layers = folder / f"{name}-{profile.artifact_sha256[:8]}"
    layers.mkdir(exist_ok=True)
    grid = isolated_layers(graph, profile, session, options.grid, row["timings"], options.effort, layers)
    grid_s = board_seconds(session.target) - profiled
    kept = {"board_s": grid_s, **asdict(grid)}
    (folder / f"{name}-grid.json").write_text(json.dumps(kept, default=np.ndarray.tolist))
    held = [item for item in average_rounds(profile.measurements) if item.held_out]
    for stride in (4, 2, 1) if options.grid else (1,):
        part = grid.thinned(stride)
        if min(len(outs) for _, outs, _ in part.grids.values()) < 2:
            continue
        predict = part.predictor()
        errors = [abs(predict(item.widths) / item.whole_s - 1) for item in held]
        row["grids"].append({
            "timings": part.timings, "mean": float(np.mean(errors)), "max": max(errors),
            "board_s": grid_s * part.timings / grid.timings,
        })  # fmt: skip
    return row


def open_board(name: str) -> AbstractContextManager[Target]:
    """The board of that name, for as long as the block."""
    if name == "embedded":
        return EmbeddedBoard()
    return IcountBoard(name=name, cpu="cortex-a76" if name.endswith("a76") else "cortex-a72")


@contextlib.contextmanager
def find_board(options: argparse.Namespace) -> Iterator[Target]:
    """The target to measure on."""
    if options.target:
        yield load_target(options.target)
        return
    with open_board(options.board) as target:
        yield target


def show(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """The tables: profile against as many isolated timings; then what each grid of isolated timings gives."""
    heads = (("model", 20), ("fitted", 8), ("held out", 10), ("timings", 9), ("profile mean", 14), ("max", 8))
    print("".join(f"{head:>{width}}" for head, width in (*heads, ("isolated mean", 15), ("max", 8))))
    for name, row in rows.items():
        last = row["grids"][-1] if row["grids"] else None
        print(
            f"{name:>20}{row['configurations']:8.0f}{row['held_out']:10.0f}{row['timings']:9.0f}"
            f"{row['mean']:14.2%}{row['max']:8.2%}" + (f"{last['mean']:15.2%}{last['max']:8.2%}" if last else "")
        )
    print(f"\n{'':>20}{'':>10}{'timings':>9}{'board s':>9}{'mean':>8}{'max':>8}")
    for name, row in rows.items():
        for kind, part in (("profile", row), *(("isolated", part) for part in row["grids"])):
            print(
                f"{name:>20}{kind:>10}{part['timings']:9.0f}{part['board_s']:9.1f}{part['mean']:8.2%}{part['max']:8.2%}"
            )


def find_aims(rows: Mapping[str, Mapping[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    """What was to be shown, and whether it was."""
    aims = {}
    for name, row in rows.items():
        for key, limit in zip(("mean", "max"), AIMS[kind], strict=True):
            aims[f"{name}_held_out_{key}"] = {"value": row[key], "aim": f"<= {limit}", "met": row[key] <= limit}
        if kind == "icount" and row["grids"]:
            enough = next((part for part in row["grids"] if part["mean"] <= row["mean"]), None)
            # Where no grid comes as close, the finest is what at least it would take.
            timings = (enough or row["grids"][-1])["timings"]
            fewer = timings / row["configurations"]
            aims[f"{name}_isolated_timings_per_configuration"] = {
                "value": fewer, "aim": f">= {FEWER_AIM}", "met": fewer >= FEWER_AIM,
                "same_error_reached": enough is not None,
            }  # fmt: skip
    return aims


def main() -> None:
    """Print the tables and the result line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter samples, fewer rounds: under 10 minutes")
    parser.add_argument("--model", "--net", dest="model", nargs="+", choices=NETS, help="which nets")
    parser.add_argument("--board", choices=["embedded", "icount", "icount-a76"], default="embedded")
    parser.add_argument("--target", help="a target of the inventory instead of a stand-in board")
    parser.add_argument("--configurations", type=int, help="most widths to fit (default 40, quick 24, icount 30)")
    parser.add_argument("--grid", type=int, help="isolated timings along each width; 0: none")
    parser.add_argument("--out", type=Path, help="keep the profiles and grids here; go on from the profiles")
    options = parser.parse_args()
    options.effort, options.held_out = (EFFORTS["quick"], 8) if options.quick else (EFFORTS["default"], 16)
    kind = "embedded"
    if options.board.startswith("icount"):
        kind, options.effort, options.held_out = "icount", NOISELESS, 6 if options.quick else 8
        options.grid = options.grid if options.grid is not None else 3 if options.quick else 5
        options.model = options.model or (DEFAULT_NETS[kind][:1] if options.quick else None)
    options.configurations = options.configurations or (30 if kind == "icount" else 24 if options.quick else 40)
    torch.set_num_threads(1)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary, find_board(options) as target:
        folder = options.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.model or DEFAULT_NETS[kind]:
            with open_session(target, space=str(folder)) as session:
                rows[name] = bench(name, session, options, folder)
    show(rows)
    print("RESULT", json.dumps({"aims": find_aims(rows, kind)}))


if __name__ == "__main__":
    main()
