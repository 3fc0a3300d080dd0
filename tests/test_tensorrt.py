"""TensorRT without a Jetson: parsers on published logs, and the model against a stand-in of TensorRT's module.

The stand-in speaks the two shapes that the module's interface has had (bindings by index before 8.5, tensors by
name since) and doubles its input; CUDA's library is one that copies host memory; trtexec is a script that prints
recorded logs. What it cannot show is whether NVIDIA's own behave so.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgeprune.core.records import KernelTime, Target
from edgeprune.device.facts import find_missing
from edgeprune.device.runtimes import tensorrt as runtime
from edgeprune.formats._onnx_kernels import OnnxKernelMap
from edgeprune.formats._tensorrt_names import find_nodes
from edgeprune.trace import trace_graph

FIXTURES = Path(__file__).parent / "fixtures" / "tensorrt"


def read(name: str) -> str:
    return (FIXTURES / name).read_text()


# --- versions --------------------------------------------------------------------------------------


def test_versions() -> None:
    assert runtime.parse_version("8.2.1.8") == (8, 2)
    assert runtime.parse_version("10.3.0") == (10, 3)
    with pytest.raises(RuntimeError, match=r"8\.2 or newer"):
        runtime.parse_version("8.0.1.6")
    assert runtime.parse_banner("&&&& RUNNING TensorRT.trtexec [TensorRT v8201] # trtexec") == (8, 2)
    assert runtime.parse_banner("&&&& FAILED TensorRT.trtexec [TensorRT v8603] # trtexec") == (8, 6)
    assert runtime.parse_banner("&&&& RUNNING TensorRT.trtexec [TensorRT v100600] [b26] # trtexec") == (10, 6)
    assert runtime.parse_banner("sh: trtexec: not found") is None


@pytest.mark.parametrize(
    ("version", "options", "expected"),
    [
        ((8, 2), {}, ["--workspace=512", "--buildOnly"]),
        ((8, 2), {"workspace": "64", "precision": "fp16"}, ["--fp16", "--workspace=64", "--buildOnly"]),
        ((8, 5), {}, ["--profilingVerbosity=detailed", "--buildOnly"]),
        (
            (8, 6),
            {"workspace": "64"},
            ["--memPoolSize=workspace:64", "--profilingVerbosity=detailed", "--skipInference"],
        ),
        (
            (10, 3),
            {"precision": "best", "dla": "0"},
            ["--fp16", "--profilingVerbosity=detailed", "--skipInference", "--useDLACore=0", "--allowGPUFallback"],
        ),
        (
            (8, 5),
            {"precision": "fp16", "sparsity": "enable"},
            ["--fp16", "--sparsity=enable", "--profilingVerbosity=detailed", "--buildOnly"],
        ),
    ],
)
def test_options_of_trtexec(version: tuple[int, int], options: dict[str, str], expected: list[str]) -> None:
    assert runtime.build_flags(version, quantised=False, **options) == expected


def test_int8_needs_ranges_and_ranges_need_int8() -> None:
    assert runtime.build_flags((10, 3), quantised=True, precision="best")[:2] == ["--fp16", "--int8"]
    assert "--int8" not in runtime.build_flags((10, 3), quantised=False, precision="best")
    with pytest.raises(ValueError, match="no QuantizeLinear"):
        runtime.build_flags((10, 3), quantised=False, precision="int8")
    with pytest.raises(ValueError, match="is quantised"):
        runtime.build_flags((10, 3), quantised=True, precision="fp16")


@pytest.mark.parametrize(
    "options",
    [{"precision": "fp8"}, {"workspace": "1G"}, {"workspace": "0"}, {"dla": "2"}, {"dla": "0"}, {"sparsity": "force"}],
)
def test_options_that_cannot_be_right(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=next(iter(options)) if options != {"dla": "0"} else "fp32"):
        runtime.build_flags((10, 3), quantised=False, **options)


# --- what TensorRT writes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("8.0/unsupported.log", "cannot take Custom (node LeakyRelu_2)"),
        ("8.4/unsupported.log", "cannot take ScatterBEV (node onnx_graphsurgeon_node_0)"),
        ("10/unsupported.log", "cannot take TRTBatchedNMS (node /TRTBatchedNMS)"),
        ("8.5/asymmetric.log", "zero points of 0 only (node QuantizeLinear_3)"),
        ("8.2/no-memory.log", "no implementation of MaxPool_31; the board lacks memory"),
        ("8.5/no-memory.log", "ran out of memory"),
    ],
)
def test_failed_builds(log: str, expected: str) -> None:
    reason = runtime.explain_failure(read(log))
    assert expected in reason and "\n" not in reason


def test_a_failure_without_a_known_reason_is_its_first_error() -> None:
    log = "[W] [TRT] Skipping tactic 3 due to insufficient memory\n[I] Saving\n[E] Saving engine to file failed.\n"
    assert runtime.explain_failure(log) == "Saving engine to file failed."
    assert runtime.explain_failure("") == "it says nothing"


def test_profile_of_trtexec() -> None:
    layers = runtime.parse_profile(read("8.6/profile.json"))
    assert [name for name, _, _ in layers][:3] == [
        "/Constant_4_output_0",
        "Reformatting CopyNode for Input Tensor 0 to PWN(PWN(/Sub), PWN(/Div))",
        "PWN(PWN(/Sub), PWN(/Div))",
    ]
    assert layers[2][2] == pytest.approx(23.7058e-6)
    for text in ("", "{}x", '[{"count": 3}, {"name": "a"}]'):
        with pytest.raises(RuntimeError, match="cannot be read"):
            runtime.parse_profile(text)


def test_layers_of_an_engine() -> None:
    assert runtime.parse_layers(read("8.6/layers.json")) == {}, "names only"
    assert runtime.parse_layers("") == {}
    layers = runtime.parse_layers(read("10/layers.json"))
    assert layers["node_conv2d + node_relu"] == (
        "node_conv2d + node_relu [ONNX Layer: node_conv2d][ONNX Layer: node_relu]",
        "CaskConvolution",
    )
    assert layers["__myl_FcAdd_myl0_1"][0].startswith("__myl_FcAdd_myl0_1 [ONNX Layer: node_linear]")


def test_layers_whose_kernels_skip_zeros_are_told_from_those_whose_weights_would_allow_it() -> None:
    engine = json.loads(read("10/layers.json"))
    conv = next(layer for layer in engine["Layers"] if layer["Name"] == "node_conv2d + node_relu")
    for tactic, kind in (
        ("sm80_xmma_fprop_sparse_conv_interleaved_i8i8i8i32_f32_nchw_vect_c_32kcrs", "CaskConvolution, sparse"),
        ("sm70_xmma_fprop_conv1x1_i8f32_f32_f32_nchw_vect_c_4kcrs", "CaskConvolution"),
    ):
        conv |= {"HasSparseWeights": 1, "TacticName": tactic}
        found = runtime.parse_layers(json.dumps(engine))
        assert found["node_conv2d + node_relu"][1] == kind
        assert found.keys() == runtime.parse_layers(read("10/layers.json")).keys()


# --- layers and operations -------------------------------------------------------------------------

QUANTISED = ["QuantizeLinear_25", "Conv_29", "Clip_33"]
DETR = "/model/model/backbone/conv_encoder/model/"


@pytest.mark.parametrize(
    ("layer", "nodes"),
    [
        ("Conv_5 + Add_6 + Relu_7", ["Conv_5", "Add_6", "Relu_7"]),
        ("Conv_0 + Relu_1 || Conv_5", ["Conv_0", "Relu_1", "Conv_5"]),
        ("Reformatting CopyNode for Input Tensor 0 to Conv_0 + Relu_1", ["Conv_0", "Relu_1"]),
        ("Reformatting CopyNode for Output Tensor 0 to MaxPool_2", ["MaxPool_2"]),
        ("PWN(PWN(/Sub), PWN(/Div))", ["/Sub", "/Div"]),
        ("Reformatting CopyNode for Input Tensor 0 to PWN(PWN(/Sub), PWN(/Div))", ["/Sub", "/Div"]),
        ("features.1.conv.0.0.weight + QuantizeLinear_25 + Conv_29 + PWN(Clip_33)", QUANTISED),
        ("__myl_FcAdd_myl0_1 [ONNX Layer: Conv_5][ONNX Layer: Add_6]", ["Conv_5", "Add_6"]),
        ("{ForeignNode[Conv_5.../Sub]}", ["Conv_5", "Add_6", "Relu_7", "/Sub"]),
        ("{ForeignNode[ONNXTRT_ShapeShuffle_342_output[Constant].../Sub]}", ["/Sub"]),
        ("reshape_before_Conv_5", ["Conv_5"]),
        ("copied_squeeze_after_Conv_5", ["Conv_5"]),
        ("Relu_7_clone_1", ["Relu_7"]),
        ("__myl_Conv_myl0_3", []),
        ("(Unnamed Layer* 4183) [Shuffle]", []),
        ("Reformatting CopyNode for Network Input x", []),
    ],
)  # fmt: skip
def test_names_of_layers(layer: str, nodes: list[str]) -> None:
    known = order("Conv_0", "Relu_1", "MaxPool_2", "Conv_5", "Add_6", "Relu_7", "/Sub", "/Div", *QUANTISED)
    assert find_nodes(layer, known) == nodes


def order(*names: str, prefix: str = "") -> dict[str, int]:
    return {prefix + name: place for place, name in enumerate(names)}


def test_names_in_published_profiles() -> None:
    """Every layer in them names its operations."""
    known = order("Conv_0", "Relu_1", "MaxPool_2", "Conv_3", "Relu_4", "Conv_5", "Add_6", "Relu_7")
    rows = re.findall(r"\[I\] +(\S.*\S) +[\d.]+ +[\d.]+ +[\d.]+$", read("8.0/profile.txt"), re.MULTILINE)
    assert [" ".join(find_nodes(row, known)) for row in rows] == [
        "Conv_0 Relu_1", "Conv_0 Relu_1", "MaxPool_2", "MaxPool_2", "Conv_3 Relu_4", "Conv_5 Add_6 Relu_7",
    ]  # fmt: skip
    known = order("conv1_1", "res_conv1_bn_1", "res_conv1_bn_2", "pool1_1", prefix="node_of_gpu_0/")
    rows = [line.split(maxsplit=6)[-1] for line in read("8.6/profile.txt").splitlines()[2:]]
    assert [find_nodes(row, known) for row in rows] == [[*known][:3], [*known][:3], [*known][3:]]
    known = order("conv1/Conv", "bn1/Mul", "bn1/Add", "act1/Relu", "maxpool/MaxPool", prefix=DETR)
    assert find_nodes(runtime.parse_profile(read("8.6/profile.json"))[-1][0], known) == [*known]


class Residual(nn.Module):
    """Two convolutions with a sum, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.body, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 3)
        self.linear = nn.Linear(4 * 36, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        return self.linear(functional.relu(self.last(functional.relu(self.body(x) + x))).flatten(1))


def residual_proto(module: Residual) -> onnx.ModelProto:
    """`Residual` as its export has it: the batch norm folded, weights under their own names."""
    chain = [
        ("Conv", ["x", "stem.weight"], "stem"), ("Relu", ["stem"], "a"),
        ("Conv", ["a", "body.weight"], "body"), ("Add", ["body", "a"], "sum"), ("Relu", ["sum"], "b"),
        ("Conv", ["b", "last.weight"], "last"), ("Relu", ["last"], "c"),
        ("Flatten", ["c"], "flat"), ("Gemm", ["flat", "linear.weight"], "y"),
    ]  # fmt: skip
    nodes = [onnx.helper.make_node(op, reads, [out], name=f"node_{out}") for op, reads, out in chain]
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], []))


def test_fused_layers_become_kernels() -> None:
    """A network's layers as TensorRT fuses them: each with its weights, layout changes charged to their layer."""
    module, inputs = Residual().eval(), (torch.ones(1, 3, 8, 8),)
    graph = trace_graph(module, inputs)
    model = residual_proto(module)
    nodes = list(model.graph.node)
    follows = {value: node for node in nodes for value in node.input}
    layers, fused = [], set()
    for node in nodes:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            chain = [node]
            # As TensorRT does: the sum goes to the convolution that runs last, an activation behind whatever is there.
            while (behind := follows.get(chain[-1].output[0])) is not None and behind.op_type in ("Add", "Relu"):
                if behind.name in fused:
                    break
                chain.append(behind)
            fused |= {item.name for item in chain}
            layers.append(" + ".join(item.name for item in chain))
    times = [KernelTime(name=f"Reformatting CopyNode for Input Tensor 0 to {layers[0]}", op="Reformat", time_s=0.5)]
    times += [
        KernelTime(name=f"{name} [ONNX Layer: {name.split(' + ')[0]}]", op="Conv", time_s=1.0) for name in layers[:3]
    ]
    times += [KernelTime(name=name, op="", time_s=1.0) for name in layers[2:]]
    times.append(KernelTime(name="Reformatting CopyNode for Network Output y", op="Reformat", time_s=0.25))
    mapped = OnnxKernelMap(model, graph, times)
    charged = mapped.charge(times)
    assert sum(charged.values()) == pytest.approx(sum(time.time_s for time in times))
    assert set(charged) == {kernel.name for kernel in mapped.kernels} == {name.split(" + ")[0] for name in layers}
    assert charged[layers[0].split(" + ")[0]] == 1.5
    assert charged[layers[-1].split(" + ")[0]] == 1.25
    weights = {parameter.name: parameter for parameter in graph.parameters}
    for node in graph.nodes:
        if node.op == "conv2d":
            (kernel,) = [kernel for kernel in mapped.kernels if kernel.nodes[0] == node.name]
            assert kernel.out_extent == weights[node.parameters[0]].extents[0]


# --- the model, against the stand-in ---------------------------------------------------------------

SHAPE = (1, 3, 4, 4)
MARK = b"engine of "


class FakeCudart:
    """CUDA's runtime library on host memory."""

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.flags: list[int] = []

    def cudaSetDeviceFlags(self, flags: Any) -> int:  # noqa: N802
        self.flags.append(flags.value)
        return 0

    def cudaStreamCreate(self, stream: Any) -> int:  # noqa: N802
        stream._obj.value = 77
        return 0

    def cudaStreamDestroy(self, stream: Any) -> int:  # noqa: N802
        return 0

    def cudaMalloc(self, address: Any, size: Any) -> int:  # noqa: N802
        buffer = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(buffer)
        self.memory[ctypes.addressof(buffer)] = buffer
        return 0

    def cudaFree(self, address: Any) -> int:  # noqa: N802
        del self.memory[address.value]
        return 0

    def cudaMemcpyAsync(self, to: Any, of: Any, size: Any, kind: Any, stream: Any) -> int:  # noqa: N802
        assert (to if kind.value == 1 else of).value in self.memory, "a device address"
        assert stream.value == 77
        ctypes.memmove(to.value, of.value, size.value)
        return 0

    def cudaStreamSynchronize(self, stream: Any) -> int:  # noqa: N802
        return 0


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.profiler: Any = None
        self.shape = list(engine.shape)

    def execute(self, addresses: list[int], stream: int) -> bool:
        assert stream == 77
        if self.engine.fails:
            self.engine.logger.log(SimpleNamespace(name="ERROR"), "Cuda failure: too slow")
            return False
        count = int(np.prod(SHAPE))
        values = np.frombuffer((ctypes.c_char * (4 * count)).from_address(addresses[0]), np.float32)
        ctypes.memmove(addresses[1], (2 * values).tobytes(), 4 * count)
        for name, milliseconds in self.engine.layers if self.profiler is not None else []:
            self.profiler.report_layer_time(name, milliseconds)
        return True


class OldContext(FakeContext):
    def get_binding_shape(self, index: int) -> tuple[int, ...]:
        return tuple(self.shape)

    def set_binding_shape(self, index: int, shape: list[int]) -> bool:
        assert index == 0
        self.shape = shape
        return True

    def execute_async_v2(self, bindings: list[int], stream_handle: int) -> bool:
        return self.execute(bindings, stream_handle)


class NewContext(FakeContext):
    def __init__(self, engine: FakeEngine) -> None:
        super().__init__(engine)
        self.addresses: dict[str, int] = {}

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.shape)

    def set_input_shape(self, name: str, shape: list[int]) -> bool:
        assert name == "x"
        self.shape = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        return self.execute([self.addresses["x"], self.addresses["y"]], stream_handle)


class FakeEngine:
    shape = SHAPE
    fails = False
    layers = (
        ("Reformatting CopyNode for Input Tensor 0 to node_conv2d + node_relu", 0.01),
        ("node_conv2d + node_relu", 0.2),
    )
    kind = "FLOAT"
    logger: Any

    def create_engine_inspector(self) -> Any:
        return SimpleNamespace(get_engine_information=lambda _: read("10/layers.json"))


class OldEngine(FakeEngine):
    num_bindings = 2

    def get_binding_name(self, index: int) -> str:
        return "xy"[index]

    def binding_is_input(self, index: int) -> bool:
        return index == 0

    def get_binding_dtype(self, index: int) -> Any:
        return SimpleNamespace(name=self.kind)

    def create_execution_context(self) -> Any:
        return OldContext(self)


class NewEngine(FakeEngine):
    num_io_tensors = 2

    def get_tensor_name(self, index: int) -> str:
        return "xy"[index]

    def get_tensor_mode(self, name: str) -> Any:
        return SimpleNamespace(name="INPUT" if name == "x" else "OUTPUT")

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.kind)

    def create_execution_context(self) -> Any:
        return NewContext(self)


class Board:
    """A version of TensorRT, its module and its trtexec."""

    def __init__(self, version: str, folder: Path) -> None:
        self.engine: FakeEngine = OldEngine() if version < "8.5" and not version.startswith("10") else NewEngine()
        self.folder, self.cudart, self.version = folder, FakeCudart(), version
        major, minor, patch = map(int, version.split(".")[:3])
        self.number = major * 10000 + minor * 100 + patch if major >= 10 else major * 1000 + minor * 100 + patch
        self.model = folder / "model.onnx"
        self.model.write_bytes(b"the graph, its weights in weights.bin")
        (folder / "weights.bin").write_bytes(b"1")
        self.write_trtexec()

    def write_trtexec(self, log: str = "", rc: int = 0, number: int | None = None, wait: float = 0) -> None:
        """A trtexec that makes engines, and a profile where it is asked for one, or fails with a log."""
        program = f"""#!{sys.executable}
import pathlib, shutil, sys, time
options = dict(item.partition("=")[::2] for item in sys.argv[1:])
with open({str(self.folder / "calls")!r}, "a") as file:
    print(*sys.argv[1:], file=file)
print("&&&& RUNNING TensorRT.trtexec [TensorRT v{number or self.number}] # trtexec")
time.sleep({wait})
if {rc}:
    print({log!r})
    sys.exit({rc})
if "--saveEngine" in options:
    pathlib.Path(options["--saveEngine"]).write_bytes({MARK + self.version.encode()!r})
if "--exportProfile" in options:
    shutil.copy({str(FIXTURES / "8.6" / "profile.json")!r}, options["--exportProfile"])
"""
        path = self.folder / "bin" / "trtexec"
        path.parent.mkdir(exist_ok=True)
        path.write_text(program)
        path.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def module(self) -> types.ModuleType:
        board = self

        class ILogger:
            pass

        class IProfiler:
            pass

        class Runtime:
            def __init__(self, logger: Any) -> None:
                board.engine.logger = logger

            def deserialize_cuda_engine(self, content: bytes) -> FakeEngine | None:
                if content == MARK + board.version.encode():
                    return board.engine
                board.engine.logger.log(SimpleNamespace(name="ERROR"), "Serialization assertion failed.")
                return None

        module = types.ModuleType("tensorrt")
        module.__dict__.update(
            __version__=board.version, ILogger=ILogger, IProfiler=IProfiler, Runtime=Runtime,
            LayerInformationFormat=SimpleNamespace(JSON=1),
        )  # fmt: skip
        return module

    def open(self, profile: str | None = None, **options: str) -> runtime.Model:
        return runtime.Model(str(self.model), 1, profile, trtexec=str(self.folder / "bin" / "trtexec"), **options)


@pytest.fixture(params=["8.2.1.8", "8.4.1.5", "8.5.2.2", "8.6.2.3", "10.3.0"])
def board(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    made = Board(request.param, tmp_path)
    monkeypatch.setitem(sys.modules, "tensorrt", made.module())
    monkeypatch.setattr(runtime, "load_cudart", lambda: made.cudart)
    yield made


def test_outputs(board: Board) -> None:
    model = board.open()
    assert model.inputs == {"x": ([*SHAPE], "float32")}
    assert model.outputs == ["y"]
    first = model.run({"x": np.ones(SHAPE, np.float32)})
    second = model.run({"x": np.arange(48, dtype=np.float64).reshape(SHAPE)})
    np.testing.assert_array_equal(first[0], np.full(SHAPE, 2, np.float32))
    np.testing.assert_array_equal(second[0].ravel(), 2 * np.arange(48, dtype=np.float32))
    with pytest.raises(ValueError, match="input x has the shape"):
        model.run({"x": np.ones((1, 3, 4, 5), np.float32)})
    assert board.cudart.flags == [runtime.BLOCKING_SYNC]
    assert len(board.cudart.memory) == 2
    del model
    assert not board.cudart.memory, "an agent opens hundreds of models"


def test_free_sizes_are_one(board: Board) -> None:
    board.engine.shape = (-1, *SHAPE[1:])
    assert board.open().inputs == {"x": ([*SHAPE], "float32")}


def test_profile(board: Board) -> None:
    model = board.open("prefix")
    for _ in range(3):
        model.run({"x": np.ones(SHAPE, np.float32)})
    runs = model.end_profile()
    assert len(runs) == 3
    for seconds, layers in runs:
        assert seconds > 0
        assert layers == [
            ("Reformatting CopyNode for Input Tensor 0 to node_conv2d + node_relu", "Reformat", pytest.approx(1e-5)),
            (
                "node_conv2d + node_relu [ONNX Layer: node_conv2d][ONNX Layer: node_relu]",
                "CaskConvolution",
                pytest.approx(2e-4),
            ),
        ]


def test_profile_of_an_engine_that_reports_nothing(board: Board) -> None:
    board.engine.layers = ()
    model = board.open("prefix")
    for _ in range(2):
        model.run({"x": np.ones(SHAPE, np.float32)})
    (_, first), (_, second) = model.end_profile()
    assert first == second and len(first) == 4
    assert "--loadEngine=" in board.calls[-1]


def test_an_engine_is_built_once_per_model_and_settings(board: Board) -> None:
    board.open()
    board.open()
    assert len(board.calls) == 1
    board.open(precision="fp16")
    assert len(board.calls) == 2 and "--fp16" in board.calls[1]
    (board.folder / "weights.bin").write_bytes(b"2")
    board.open(precision="fp16")
    assert len(board.calls) == 3, "the weights beside it are part of the model"
    board.model.write_bytes(b"another graph")
    board.open(precision="fp16")
    assert len(board.calls) == 4
    assert len(list(board.folder.glob("*.engine"))) == 1, "engines of former contents are gone"
    assert not list(board.folder.glob("*.part"))


def test_a_build_that_fails(board: Board) -> None:
    board.write_trtexec(read("10/unsupported.log"), rc=1)
    with pytest.raises(RuntimeError, match=r"could not build model.onnx: .*TRTBatchedNMS \(node /TRTBatchedNMS\)"):
        board.open()
    assert not list(board.folder.glob("*.engine"))


def test_a_build_that_hangs(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "BUILD_TIMEOUT_S", 0.2)
    board.write_trtexec(wait=30)
    with pytest.raises(RuntimeError, match=r"did not build model\.onnx in 0 s"):
        board.open()


def test_two_versions_on_one_board(board: Board) -> None:
    board.write_trtexec(number=7203)
    with pytest.raises(RuntimeError, match=r"trtexec is TensorRT 7.2, the Python module"):
        board.open()


def test_an_engine_that_cannot_be_loaded_is_built_anew(board: Board) -> None:
    board.open()
    next(board.folder.glob("*.engine")).write_bytes(b"cut off")
    with pytest.raises(RuntimeError, match=r"cannot load the engine .*Serialization assertion failed"):
        board.open()
    board.open()
    assert len(board.calls) == 2


def test_a_run_that_fails_says_why(board: Board) -> None:
    model = board.open()
    board.engine.fails = True
    with pytest.raises(RuntimeError, match="Cuda failure: too slow"):
        model.run({"x": np.ones(SHAPE, np.float32)})


def test_a_type_numpy_has_not(board: Board) -> None:
    board.engine.kind = "BF16"
    with pytest.raises(RuntimeError, match="tensor x is BF16"):
        board.open()


def test_no_trtexec_says_what_to_install() -> None:
    with pytest.raises(RuntimeError, match="sudo apt-get install -y libnvinfer-bin"):
        runtime.find_trtexec("/no/such/trtexec")


def test_memory_the_gpu_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeCudart()
    monkeypatch.setattr(library, "cudaMalloc", lambda address, size: 2)
    monkeypatch.setattr(runtime, "load_cudart", lambda: library)
    with pytest.raises(RuntimeError, match=r"cudaMalloc: CUDA error 2 \(out of memory\)"):
        runtime.Cuda().allocate(8)


def test_a_quantised_model_is_known_by_its_nodes(tmp_path: Path) -> None:
    """The operation's name stands in the file as it is."""
    node = onnx.helper.make_node("DequantizeLinear", ["q", "scale"], ["x"], name="any")
    assert b"DequantizeLinear" in onnx.helper.make_graph([node], "g", [], []).SerializeToString()


def test_a_board_without_it_is_told_what_pip_cannot_do() -> None:
    target = Target(name="jetson", board="jetson", transport="ssh", runtime="tensorrt")
    python = {"python": [3, 10, 12], "path": "/usr/bin/python3", "found": {}}
    tensorrt, numpy = find_missing(target, python, runtime.MODULES, runtime.BY_HAND)
    assert "sudo apt-get install -y python3-libnvinfer" in tensorrt and "/usr/bin/python3" in tensorrt
    assert numpy == "numpy: edgeprune targets setup jetson"
    assert json.dumps(runtime.BY_HAND)
