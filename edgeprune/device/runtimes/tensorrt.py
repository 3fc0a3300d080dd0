"""TensorRT on a Jetson: an engine built there by `trtexec`, run and profiled through TensorRT's Python module.

JetPack brings both, for the Python of its own Ubuntu. The agent needs Python 3.9: JetPack 6 (3.10) has it;
JetPack 5 (3.8) and 4 (3.6) do not, and their TensorRT module loads in no other Python.
Its ONNX parser knows operations up to opset 13 in 8.2, 17 in 8.5 and 8.6, 20 in 10.

The agent gets this file as runtime.py: Python 3.9 and the standard library only, until a model is opened.
source: NVIDIA TensorRT developer guide and trtexec's own help, versions 8.2 to 10.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

FORMAT = "onnx"
OPTIONS = ("precision", "workspace", "dla", "sparsity", "trtexec")
ACTIVATIONS = ("symmetric",)
MODULES = ("tensorrt", "numpy")
BY_HAND = {
    "tensorrt": "it comes with JetPack and not from pip: on the board, sudo apt-get install -y "
    "python3-libnvinfer libnvinfer-bin; it is made for Ubuntu's own Python, so leave `python` out of the target "
    'or set it to "/usr/bin/python3"; JetPack 4 and 5 have it for a Python older than 3.9 only'
}
BRANCHES = False
HOLDS_ACTIVATIONS = False
WHEELS = (
    {
        "requirements": ("numpy>=1.26,<3",),
        "architectures": ("aarch64", "x86_64"),
        "pythons": ((3, 9), (3, 14)),
        "glibc": (2, 27),
    },
)

OLDEST_VERSION = (8, 2)
"""The first trtexec with the options used here."""
PRECISIONS = {"fp32": (), "fp16": ("--fp16",), "int8": ("--int8",), "best": ("--fp16", "--int8")}
OLD_WORKSPACE_MIB = 512
"""Before 8.4 trtexec's default is 16 MiB, too little for the faster convolutions; since then all there is."""
TRTEXEC = "/usr/src/tensorrt/bin/trtexec"
BUILD_TIMEOUT_S = 3600.0
PROFILE_TIMEOUT_S = 300.0
CUDART = ("libcudart.so", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so.10.2", "libcudart.so.13")
BLOCKING_SYNC = 4
"""cudaDeviceScheduleBlockingSync, as trtexec waits: a thread that spins would pass for one that computes."""
TO_DEVICE, TO_HOST = 1, 2
NUMPY_TYPES = {
    "FLOAT": "float32", "HALF": "float16", "INT8": "int8", "UINT8": "uint8", "INT32": "int32", "INT64": "int64",
    "BOOL": "bool",
}  # fmt: skip

Layers = list[tuple[str, str, float]]


class Model:
    """An engine as an app would load it, inputs and outputs in ordinary memory. See `runtimes.Model`.

    precision: fp32 (with TF32 where the GPU has it), fp16, int8 or best, what the engine may compute in; int8 takes
        a file with QuantizeLinear. workspace: MiB that building may take. dla: core of the deep learning
        accelerator, the GPU does what it cannot. sparsity: "enable" lets it try kernels for weights of 2:4
        where the file has such. trtexec: its path.
    raises: RuntimeError; ValueError for an option that cannot be right.
    """

    def __init__(
        self,
        path: str,
        threads: int,  # noqa: ARG002 - the GPU does the work
        profile: str | None = None,
        *,
        precision: str = "fp32",
        workspace: str = "",
        dla: str = "",
        sparsity: str = "",
        trtexec: str = "",
    ) -> None:
        import numpy as np
        import tensorrt  # type: ignore[import-not-found,unused-ignore]

        settings = {"precision": precision, "workspace": workspace, "dla": dla, "sparsity": sparsity}
        self._trtexec = find_trtexec(trtexec)
        self._engine_path = build_engine(Path(path).absolute(), self._trtexec, tensorrt.__version__, **settings)
        self._errors: list[str] = []
        self._cuda = Cuda()
        self._logger = make_logger(tensorrt, self._errors)
        self._runtime = tensorrt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(self._engine_path.read_bytes())
        if self._engine is None:
            self._engine_path.unlink()
            raise RuntimeError(
                f"TensorRT {tensorrt.__version__} cannot load the engine of {path}: {self._last_error()}"
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise RuntimeError(f"TensorRT cannot make a context for {path}: {self._last_error()}")
        self._numpy = np
        self._tensors: list[tuple[str, bool, tuple[int, ...], Any, int]] = []
        for name, reads, shape, kind in list_tensors(self._engine, self._context):
            dtype = np.dtype(numpy_type(name, kind))
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            self._tensors.append((name, reads, shape, dtype, self._cuda.allocate(size)))
        self.inputs: dict[str, tuple[list[int], str]] = {
            name: (list(shape), dtype.name) for name, reads, shape, dtype, _ in self._tensors if reads
        }
        self.outputs: list[str] = [name for name, reads, *_ in self._tensors if not reads]
        self._execute = bind(self._context, [(name, address) for name, *_, address in self._tensors], self._cuda.stream)
        self._runs: list[tuple[float, Layers]] = []
        self._described: dict[str, tuple[str, str]] = {}
        self._profiler: Any = None
        if profile is not None:
            self._described = describe_layers(tensorrt, self._engine)
            self._profiler = self._context.profiler = make_profiler(tensorrt)

    def run(self, feed: Mapping[str, Any]) -> list[Any]:
        """One run; arrays in the order of `outputs`."""
        np, cuda, began = self._numpy, self._cuda, time.perf_counter()
        outputs, kept = [], []
        for name, reads, shape, dtype, address in self._tensors:
            if reads:
                array = np.ascontiguousarray(feed[name], dtype)
                if array.shape != shape:
                    raise ValueError(f"input {name} has the shape {array.shape}, the engine reads {shape}")
                kept.append(array)  # until the copy is done
                cuda.copy(address, array.ctypes.data, array.nbytes, TO_DEVICE)
        if not self._execute():
            raise RuntimeError(f"TensorRT could not run the engine: {self._last_error()}")
        for _, reads, shape, dtype, address in self._tensors:
            if not reads:
                outputs.append(np.empty(shape, dtype))
                cuda.copy(outputs[-1].ctypes.data, address, outputs[-1].nbytes, TO_HOST)
        cuda.synchronize()
        if self._profiler is not None:
            self._runs.append((time.perf_counter() - began, self._profiler.take()))
        return outputs

    def end_profile(self) -> list[tuple[float, Layers]]:
        """Per run made so far: its seconds, and (name, type of layer, seconds) of each layer in order.

        From trtexec's own profile where TensorRT reports none (all of it on the DLA): then alike for every run.
        """
        runs, self._runs = self._runs, []
        if runs and not runs[0][1]:
            layers = profile_engine(self._trtexec, self._engine_path)
            runs = [(seconds, layers) for seconds, _ in runs]
        return [
            (seconds, [(*self._described.get(name, (name, "")), layer_s) for name, _, layer_s in layers])
            for seconds, layers in runs
        ]

    def _last_error(self) -> str:
        return self._errors[-1] if self._errors else "it does not say why"


def check() -> str:
    """See that TensorRT is one we know and that engines can be built. raises: ImportError, RuntimeError."""
    import tensorrt

    parse_version(tensorrt.__version__)
    find_trtexec("")
    return ""


# --- what differs from version to version ----------------------------------------------------------


def parse_version(text: str) -> tuple[int, int]:
    """(10, 3) of `10.3.0`. raises: RuntimeError when it is too old."""
    major, minor = text.split(".")[:2]
    version = (int(major), int(minor))
    if version < OLDEST_VERSION:
        raise RuntimeError(f"TensorRT {text} is too old: 8.2 or newer, which is JetPack 4.6.1 or newer")
    return version


def parse_banner(log: str) -> tuple[int, int] | None:
    """(8, 2) of trtexec's `[TensorRT v8201]`, (10, 3) of `[TensorRT v100300]`."""
    match = re.search(r"TensorRT\.trtexec \[TensorRT v(\d{4,6})\]", log)
    if match is None:
        return None
    number = int(match[1])
    # NV_TENSORRT_VERSION got a digit more with 10.
    return (number // 10000, number // 100 % 100) if number >= 100000 else (number // 1000, number // 100 % 10)


def build_flags(
    version: tuple[int, int],
    *,
    quantised: bool,
    precision: str = "fp32",
    workspace: str = "",
    dla: str = "",
    sparsity: str = "",
) -> list[str]:
    """trtexec's options for these settings.

    quantised: the model holds QuantizeLinear. Only then int8 is allowed: trtexec would make up random ranges
        for it, and say so in a line of its log.
    raises: ValueError.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision}: one of {', '.join(PRECISIONS)}")
    if precision == "int8" and not quantised:
        raise ValueError("precision=int8, but the model has no QuantizeLinear, so no ranges: export it as int8")
    if quantised and "--int8" not in PRECISIONS[precision]:
        raise ValueError(f"precision={precision}, but the model is quantised: int8, or best to allow fp16 for the rest")
    if workspace and not (workspace.isdigit() and int(workspace)):
        raise ValueError(f"workspace={workspace}: a number of MiB")
    if dla not in ("", "0", "1"):
        raise ValueError(f"dla={dla}: 0 or 1, the core's number")
    if dla and precision == "fp32":
        raise ValueError("the deep learning accelerator has no fp32: give precision=fp16 or int8")
    if sparsity not in ("", "enable"):
        raise ValueError(f"sparsity={sparsity}: enable, or leave it out (force would overwrite the weights)")
    flags = [flag for flag in PRECISIONS[precision] if quantised or flag != "--int8"]
    flags += [f"--sparsity={sparsity}"] if sparsity else []
    if version >= (8, 4):
        flags += [f"--memPoolSize=workspace:{workspace}"] if workspace else []
        flags += ["--profilingVerbosity=detailed"]
    else:
        flags += [f"--workspace={workspace or OLD_WORKSPACE_MIB}"]
    flags += ["--skipInference" if version >= (8, 6) else "--buildOnly"]
    return [*flags, f"--useDLACore={dla}", "--allowGPUFallback"] if dla else flags


def list_tensors(engine: Any, context: Any) -> list[tuple[str, bool, tuple[int, ...], str]]:
    """(name, is an input, shape with 1 for what is free, TensorRT's name of the type), in the engine's order."""
    if hasattr(engine, "num_io_tensors"):
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        reads = [engine.get_tensor_mode(name).name == "INPUT" for name in names]
        types = [engine.get_tensor_dtype(name).name for name in names]
        shape, fix, keys = context.get_tensor_shape, context.set_input_shape, names
    else:  # before 8.5
        indices = range(engine.num_bindings)
        names = [engine.get_binding_name(index) for index in indices]
        reads = [engine.binding_is_input(index) for index in indices]
        types = [engine.get_binding_dtype(index).name for index in indices]
        shape, fix, keys = context.get_binding_shape, context.set_binding_shape, list(indices)
    for key, is_input in zip(keys, reads):  # noqa: B905 - Python 3.9 has no strict
        if is_input and any(size < 0 for size in shape(key)):
            fix(key, [max(1, size) for size in shape(key)])
    shapes = [tuple(shape(key)) for key in keys]
    return list(zip(names, reads, shapes, types))  # noqa: B905


def bind(context: Any, addresses: Sequence[tuple[str, int]], stream: int) -> Callable[[], bool]:
    """A call that starts a run on these device addresses, in the order of `list_tensors`."""
    if hasattr(context, "execute_async_v3"):
        for name, address in addresses:
            context.set_tensor_address(name, address)
        return functools.partial(context.execute_async_v3, stream)
    return functools.partial(context.execute_async_v2, [address for _, address in addresses], stream)


def describe_layers(tensorrt: Any, engine: Any) -> dict[str, tuple[str, str]]:
    """As `parse_layers`."""
    inspector = engine.create_engine_inspector()
    return parse_layers(inspector.get_engine_information(tensorrt.LayerInformationFormat.JSON))


def parse_layers(text: str) -> dict[str, tuple[str, str]]:
    """Layer -> (name with the ONNX nodes it says it covers, its type) in the engine inspector's JSON.

    The type ends in ", sparse" where the kernel skips the zeros of 2:4, as its own name says: `HasSparseWeights`
    tells only that the weights would allow it. An engine without detailed verbosity has names only; since 8.6
    `Metadata` names the nodes even of layers whose own name is of the compiler's making (`__myl_...`).
    """
    try:
        layers = json.loads(text, strict=False)["Layers"]
    except (ValueError, KeyError, TypeError):
        return {}  # names alone will do
    described = {}
    for layer in layers:
        if isinstance(layer, dict):
            name, metadata = layer.get("Name", ""), layer.get("Metadata", "")
            nodes = "".join(re.findall(r"\[ONNX Layer: [^\]]+\]", metadata))
            sparse = ", sparse" if "sparse" in str(layer.get("TacticName", "")) else ""
            described[name] = (f"{name} {nodes}" if nodes else name, layer.get("LayerType", "") + sparse)
    return described


def parse_profile(text: str) -> list[tuple[str, str, float]]:
    """(name, "", mean seconds) of each layer in trtexec's --exportProfile. raises: RuntimeError."""
    try:
        return [(entry["name"], "", entry["averageMs"] * 1e-3) for entry in json.loads(text) if "name" in entry]
    except (ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"trtexec's profile cannot be read: {text[:200]!r}") from error


def numpy_type(name: str, dtype: str) -> str:
    """Numpy's name of a tensor's type. raises: RuntimeError where it has none."""
    if dtype not in NUMPY_TYPES:
        raise RuntimeError(f"tensor {name} is {dtype}, which numpy cannot hold; export it as float32")
    return NUMPY_TYPES[dtype]


# --- trtexec ---------------------------------------------------------------------------------------


def find_trtexec(given: str) -> str:
    """Its path. raises: RuntimeError, saying what to install."""
    for candidate in [given] if given else [TRTEXEC, "trtexec"]:
        if (found := shutil.which(candidate)) is not None:
            return found
    raise RuntimeError(
        f"no trtexec at {given or TRTEXEC}{'' if given else ' or on PATH'}: on the board, sudo apt-get install -y "
        "libnvinfer-bin, or name it: trtexec=PATH among the runtime's options"
    )


def engine_key(path: Path, content: bytes, version: str, flags: Sequence[str]) -> str:
    """Digest of all that an engine depends on: the model and its weights' file, the settings, TensorRT."""
    digest = hashlib.sha256(json.dumps([version, list(flags)]).encode())
    digest.update(content)
    for other in sorted(path.parent.iterdir()):
        # External data lie beside the model, which holds their file's name.
        if other.is_file() and other != path and other.suffix != ".engine" and other.name.encode() in content:
            with other.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def build_engine(path: Path, trtexec: str, version: str, **settings: str) -> Path:
    """The engine of a model, built now where there is none of it yet.

    settings: precision, workspace, dla, sparsity. raises: RuntimeError, saying why; ValueError for a setting.
    """
    content = path.read_bytes()
    flags = build_flags(parse_version(version), quantised=b"DequantizeLinear" in content, **settings)
    engine = path.with_name(f"{path.name}.{engine_key(path, content, version, flags)[:16]}.engine")
    if engine.exists():
        return engine
    part = engine.with_suffix(".part")
    # One memory of which kernel was the fastest for which layer: two widths that share a layer share its kernel,
    # and a build takes seconds instead of minutes.
    cache = path.with_name(f"tensorrt-{version}.timing")
    argv = [trtexec, f"--onnx={path}", f"--saveEngine={part}", f"--timingCacheFile={cache}", *flags]
    log = call_trtexec(argv, BUILD_TIMEOUT_S, f"build {path.name}")
    built = parse_banner(log)
    if built is not None and built != parse_version(version):
        raise RuntimeError(
            f"trtexec is TensorRT {'.'.join(map(str, built))}, the Python module {version}: only engines of its own "
            "version can be loaded; name the other trtexec: trtexec=PATH among the runtime's options"
        )
    if not part.exists():
        raise RuntimeError(f"trtexec wrote no engine of {path.name}: {explain_failure(log)}")
    for old in path.parent.glob(f"{path.name}.*.engine"):
        old.unlink()  # of a former content of this file
    os.replace(part, engine)
    return engine


def profile_engine(trtexec: str, engine: Path) -> list[tuple[str, str, float]]:
    """(name, "", seconds) of each layer as trtexec profiles them."""
    with tempfile.TemporaryDirectory(dir=engine.parent) as folder:
        profile = Path(folder) / "profile.json"
        argv = [
            trtexec,
            f"--loadEngine={engine}",
            f"--exportProfile={profile}",
            "--separateProfileRun",
            "--dumpProfile",
        ]
        call_trtexec(argv, PROFILE_TIMEOUT_S, f"profile {engine.name}")
        return parse_profile(profile.read_text(encoding="utf-8", errors="replace"))


def call_trtexec(argv: Sequence[str], timeout_s: float, purpose: str) -> str:
    """Its log. raises: RuntimeError when it fails, with the reason in its log."""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"trtexec did not {purpose} in {timeout_s:.0f} s") from error
    except OSError as error:
        raise RuntimeError(f"cannot run {argv[0]}: {error.strerror}") from error
    log = done.stdout.decode("utf-8", "replace")
    if done.returncode != 0:
        killed = " (killed: is the board out of memory?)" if done.returncode < 0 else ""
        raise RuntimeError(f"trtexec could not {purpose}{killed}: {explain_failure(log)}")
    return log


def explain_failure(log: str) -> str:
    """The reason in a log of trtexec that failed, in a sentence.

    Lines about skipped tactics and memory that one of them could not get are usual in builds that succeed.
    """
    unsupported = parse_unsupported(log)
    if "symmetric quantization" in log:
        where = f" (node {unsupported[0][0]})" if unsupported else ""
        return f"TensorRT takes zero points of 0 only{where}: quantise symmetrically, to signed int8"
    if unsupported:
        named = ", ".join(f"{op} (node {name})" for name, op in dict.fromkeys(unsupported))
        reason = re.search(r"Assertion failed: .*|No importer registered.*|Plugin not found.*", log)
        return f"its ONNX parser cannot take {named}{f': {reason[0].strip()}' if reason else ''}"
    if "int8 is not configured" in log:
        return "the model is quantised: precision=int8 or best"
    short = "insufficient memory" in log or "insuficient memory" in log or "insufficient to use tactic" in log
    if match := re.search(r"Could not find any implementation for node (.+?)\.?\)?\]?$", log, re.MULTILINE):
        hint = "; the board lacks memory for it: close what else runs, or set workspace=MiB" if short else ""
        return f"there is no implementation of {match[1]}{hint}"
    if re.search(r"OutOfMemory|out of memory|Cannot allocate memory|std::bad_alloc", log):
        return "the board ran out of memory: close what else runs there, or set workspace=MiB among the options"
    errors = re.findall(r"\[E\] (.+)", log)
    return errors[0].strip() if errors else (log.strip().splitlines() or ["it says nothing"])[-1]


def parse_unsupported(log: str) -> list[tuple[str, str]]:
    """(name, operation) of the nodes that the ONNX parser stopped at."""
    found = []
    pattern = r"While parsing node number \d+ \[(\w+)(?: -> \"([^\"]*)\")?\]:?(.*?)(?:--- End node ---|\Z)"
    for match in re.finditer(pattern, log, re.DOTALL):
        # `name:` of the node itself stands at the line's beginning, of its attributes deeper.
        name = re.search(r"^name: \"([^\"]+)\"", match[3], re.MULTILINE)
        found.append((name[1] if name else match[2] or "without a name", match[1]))
    return found


# --- CUDA and the classes that TensorRT calls back -------------------------------------------------


class Cuda:
    """A stream and memory of the GPU, through CUDA's runtime library. raises: RuntimeError."""

    def __init__(self) -> None:
        self._addresses: list[int] = []
        self.stream = 0
        self._library = load_cudart()
        # Before TensorRT makes the device's context.
        self._call("cudaSetDeviceFlags", ctypes.c_uint(BLOCKING_SYNC))
        stream = ctypes.c_void_p()
        self._call("cudaStreamCreate", ctypes.byref(stream))
        self.stream = int(stream.value or 0)

    def allocate(self, size: int) -> int:
        """Address of that many bytes, for as long as this object lives."""
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(max(1, size)))
        self._addresses.append(int(address.value or 0))
        return self._addresses[-1]

    def __del__(self) -> None:
        # One agent opens hundreds of models.
        for address in self._addresses:
            self._library.cudaFree(ctypes.c_void_p(address))
        if self.stream:
            self._library.cudaStreamDestroy(ctypes.c_void_p(self.stream))

    def copy(self, to: int, of: int, size: int, kind: int) -> None:
        self._call(
            "cudaMemcpyAsync", ctypes.c_void_p(to), ctypes.c_void_p(of), ctypes.c_size_t(size), ctypes.c_int(kind),
            ctypes.c_void_p(self.stream),
        )  # fmt: skip

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", ctypes.c_void_p(self.stream))

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            raise RuntimeError(f"{name}: CUDA error {code}{' (out of memory)' if code == 2 else ''}")


def load_cudart() -> Any:
    """CUDA's runtime library. raises: RuntimeError, saying where it was looked for."""
    names = [ctypes.util.find_library("cudart"), *CUDART, *(f"/usr/local/cuda/lib64/{name}" for name in CUDART)]
    for name in filter(None, names):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise RuntimeError("no libcudart on the board: sudo apt-get install -y nvidia-cuda, or add CUDA to ld.so.conf")


def make_logger(tensorrt: Any, errors: list[str]) -> Any:
    """A logger that keeps the errors and drops the rest."""

    class Logger(tensorrt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                errors.append(text)

    return Logger()


def make_profiler(tensorrt: Any) -> Any:
    """A profiler; its `take` gives (name, "", seconds) of the layers reported since, in order."""

    class Profiler(tensorrt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            tensorrt.IProfiler.__init__(self)
            self.layers: Layers = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.layers.append((layer_name, "", ms * 1e-3))

        def take(self) -> Layers:
            taken, self.layers = self.layers, []
            return taken

    return Profiler()
