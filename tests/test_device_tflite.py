"""TFLite on the board: the interpreter, its options, times of single operations, and whole sessions."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from loopback.adb import AdbServer
from loopback.tflite import write_tflite
from torch.nn import functional

from edgeprune.core.errors import UnknownMember, UsageError
from edgeprune.core.records import Step, Target
from edgeprune.device.embedded import EmbeddedBoard
from edgeprune.device.facts import gather_facts
from edgeprune.device.runtimes import open_runtime
from edgeprune.device.runtimes import tflite as runtime
from edgeprune.device.session import Session, open_session
from edgeprune.device.targets import check_target, connect_target, read_target

FIXTURES = Path(__file__).parent / "fixtures" / "tflite"
REPOSITORY = Path(__file__).parents[1]
X = np.random.default_rng(1).standard_normal((1, 32, 32, 3)).astype(np.float32)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tflite(tmp_path / "net.tflite")


def reference(x: np.ndarray, seed: int = 0) -> np.ndarray:
    """What write_tflite's model computes, by another library."""
    generator = np.random.default_rng(seed)
    first, second = (
        torch.from_numpy(generator.standard_normal(shape).astype(np.float32)).permute(0, 3, 1, 2)
        for shape in ((16, 3, 3, 3), (8, 3, 3, 16))
    )
    y = functional.conv2d(torch.from_numpy(x).permute(0, 3, 1, 2), first, padding=1)
    return functional.conv2d(y.relu(), second, padding=1).permute(0, 2, 3, 1).numpy()


# --- one model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"delegate": "xnnpack"}, {"delegate": "none"}])
def test_model_computes_what_it_says(model: Path, options: dict[str, str]) -> None:
    opened = runtime.Model(str(model), 1, **options)
    assert opened.inputs == {"x": ([1, 32, 32, 3], "float32")}
    assert opened.outputs == ["y"]
    for _ in range(2):
        (y,) = opened.run({"x": X})
        np.testing.assert_allclose(y, reference(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        ({}, [("delegate:0", "Convolution"), ("delegate:1", "Convolution")]),
        ({"delegate": "none"}, [("node:0", "CONV_2D"), ("node:1", "CONV_2D")]),
    ],
)
def test_times_of_operations_show_what_was_delegated(
    model: Path, options: dict[str, str], kernels: list[tuple[str, str]]
) -> None:
    opened = runtime.Model(str(model), 1, "profile", **options)
    for _ in range(5):
        opened.run({"x": X})
    runs = opened.end_profile()
    assert len(runs) == 5
    for seconds, found in runs:
        assert [name for name, _, _ in found] == [name for name, _ in kernels]
        assert all(op.startswith(start) for (_, op, _), (_, start) in zip(found, kernels, strict=True))
        assert 0 < sum(time for _, _, time in found) <= seconds + 1e-6 < 1


def test_profiled_models_leave_nothing_behind(model: Path) -> None:
    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])

    sizes = []
    for _ in range(30):
        opened = runtime.Model(str(model), 1, "profile")
        opened.run({"x": X})
        del opened
        sizes.append(resident())
    assert sizes[-1] - sizes[9] < 2000


@pytest.mark.parametrize(
    ("delegate", "message"),
    [
        ("xnpack", "xnnpack, none, gpu, nnapi or a path"),
        ("gpu", "libtensorflowlite_gpu_delegate.so cannot be loaded"),
        ("/nowhere/lib.so", "delegate=/nowhere/lib.so: /nowhere/lib.so cannot be loaded"),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # LiteRT's own, of half a delegate
def test_delegate_that_cannot_be_had(model: Path, delegate: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runtime.Model(str(model), 1, delegate=delegate)


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.tflite").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"broken\.tflite"):
        runtime.Model(str(tmp_path / "broken.tflite"), 1)


def test_profiler_of_another_version_is_tried_in_a_process_of_its_own(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runtime.try_profiler.cache_clear()
    assert runtime.try_profiler() == ""
    monkeypatch.setattr(runtime, "PROFILED_VERSIONS", ())
    assert len(runtime.Model(str(model), 1, "profile").inputs) == 1
    # A package whose library is another one altogether.
    fake = tmp_path / "ai_edge_litert"
    fake.mkdir()
    (fake / "__init__.py").touch()
    shutil.copy(sys.executable, fake / "libLiteRt.so")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    runtime.try_profiler.cache_clear()
    with pytest.raises(runtime.NoKernels, match=r"profiler of ai_edge_litert .* is another one"):
        runtime.Model(str(model), 1, "profile")
    runtime.try_profiler.cache_clear()


def test_first_package_that_opens_a_model_is_taken(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    """tflite-runtime beside numpy 2 can be imported, and then dies."""
    litert = sys.modules["ai_edge_litert.interpreter"]

    def dies(**_: object) -> None:
        raise SystemError("CreateWrapperFromFile returned a result with an exception set")

    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", types.SimpleNamespace(Interpreter=dies))
    monkeypatch.setitem(sys.modules, "tflite_runtime", types.ModuleType("tflite_runtime"))
    monkeypatch.setitem(sys.modules, "tflite_runtime.interpreter", litert)
    runtime.find_library.cache_clear()
    assert runtime.find_library()[0] == "tflite_runtime"
    assert runtime.Model(str(model), 1).run({"x": X})[0].shape == (1, 32, 32, 8)
    with pytest.raises(runtime.NoKernels, match="tflite_runtime has no profiler"):
        runtime.Model(str(model), 1, "profile")
    monkeypatch.setitem(sys.modules, "tflite_runtime.interpreter", None)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    runtime.find_library.cache_clear()
    with pytest.raises(ImportError, match="ai_edge_litert is installed and does not work: SystemError"):
        runtime.find_library()
    runtime.find_library.cache_clear()


def test_interpreter_without_xnnpack(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    package, library = runtime.find_library()

    class Plain(library.Interpreter):  # type: ignore[misc,name-defined]
        def __init__(self, **options: object) -> None:
            resolver = library.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
            super().__init__(**{**options, "experimental_op_resolver_type": resolver})

    plain = types.SimpleNamespace(Interpreter=Plain, OpResolverType=library.OpResolverType)
    monkeypatch.setattr(runtime, "find_library", lambda: (package, plain))
    assert runtime.check() == "without XNNPACK"
    (y,) = runtime.Model(str(model), 1).run({"x": X})
    np.testing.assert_allclose(y, reference(X), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="delegate=xnnpack: this interpreter has none"):
        runtime.Model(str(model), 1, delegate="xnnpack")


# --- benchmark_model -----------------------------------------------------------------------------


def parsed(name: str) -> tuple[float, list[tuple[str, str, float]]]:
    return runtime.parse_benchmark((FIXTURES / name).read_text())


def test_tables_of_benchmark_model() -> None:
    seconds, kernels = parsed("benchmark-2.4.txt")
    assert seconds == pytest.approx(3209.4e-6)
    assert kernels == [
        ("node:0", "CONV_2D", pytest.approx(1.254e-3)),
        ("node:1", "DEPTHWISE_CONV_2D", pytest.approx(0.905e-3)),
        ("node:2", "SOFTMAX", pytest.approx(1.049e-3)),
    ]
    seconds, kernels = parsed("benchmark-2.16.txt")
    assert seconds == pytest.approx(1406.5e-6)
    assert kernels == [
        ("delegate:0", "Convolution (NHWC, F32) IGEMM", pytest.approx(0.407e-3)),
        ("delegate:1", "Average Pooling (NHWC, F32) Average Pooling", pytest.approx(0.151e-3)),
        ("node:7", "ARG_MAX", pytest.approx(0.848e-3)),
    ]
    seconds, kernels = parsed("benchmark-2.16.csv")
    assert seconds == pytest.approx(0.979e-3)
    assert kernels == [
        ("delegate:0", "Convolution (NHWC, F32) IGEMM", pytest.approx(0.407e-3)),
        ("node:12", "ADD", pytest.approx(0.572e-3)),
    ]


def test_row_that_adds_up_several_operations_is_refused() -> None:
    with pytest.raises(runtime.NoKernels, match="adds up 13 operations in one row"):
        parsed("benchmark-2.16-two-partitions.txt")


@pytest.mark.parametrize("text", ["", "Segmentation fault", (FIXTURES / "benchmark-2.4.txt").read_text()[:600]])
def test_output_without_a_table_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="no times of operations"):
        runtime.parse_benchmark(text)


def test_benchmark_model_is_asked_for_what_we_run(model: Path, tmp_path: Path) -> None:
    program = tmp_path / "benchmark_model"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncat {FIXTURES}/benchmark-2.4.txt\n')
    program.chmod(0o755)
    opened = runtime.Model(str(model), 3, "profile", delegate="none", benchmark=str(program))
    for _ in range(4):
        opened.run({"x": X})
    runs = opened.end_profile()
    assert len(runs) == 4 and [op for _, op, _ in runs[0][1]] == ["CONV_2D", "DEPTHWISE_CONV_2D", "SOFTMAX"]
    asked = (tmp_path / "asked").read_text().split()
    assert {f"--graph={model}", "--num_threads=3", "--use_xnnpack=false", "--enable_op_profiling=true"} <= set(asked)


# --- options of a target -------------------------------------------------------------------------


def test_options_of_a_runtime() -> None:
    member, options = open_runtime("tflite:delegate=/opt/a b.so,benchmark=/x")
    assert (member.FORMAT, options) == ("tflite", {"delegate": "/opt/a b.so", "benchmark": "/x"})
    assert open_runtime("onnxruntime")[1] == {}
    with pytest.raises(
        UsageError, match="'threads' is not an option of the runtime tflite; known: delegate, benchmark"
    ):
        open_runtime("tflite:threads=3")
    with pytest.raises(UsageError, match="not an option of the runtime onnxruntime; known: none"):
        open_runtime("onnxruntime:delegate=none")
    with pytest.raises(UsageError, match="give delegate one value"):
        open_runtime("tflite:delegate")
    with pytest.raises(UsageError, match="give delegate one value"):
        open_runtime("tflite:delegate=none,delegate=xnnpack")
    with pytest.raises(UnknownMember, match="unknown runtimes 'tpu'"):
        open_runtime("tpu:x=1")


def test_bad_options_in_a_target_name_its_file(tmp_path: Path) -> None:
    (tmp_path / "lab.toml").write_text('runtime = "tflite:speed=11"')
    with pytest.raises(UsageError, match=r"lab\.toml: 'speed' is not an option"):
        read_target(tmp_path / "lab.toml")


# --- whole sessions ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["local", "embedded", "adb"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with contextlib.ExitStack() as stack:
        if request.param == "local":
            target = read_target(REPOSITORY / "targets" / "localhost.toml")
        elif request.param == "embedded":
            target = stack.enter_context(EmbeddedBoard())
        else:
            target = replace(stack.enter_context(AdbServer()), board="android")
        yield replace(target, runtime="tflite", workdir=str(tmp_path_factory.mktemp("board")))


@pytest.fixture
def here(tmp_path: Path) -> Target:
    target = read_target(REPOSITORY / "targets" / "localhost.toml")
    return replace(target, runtime="tflite", workdir=str(tmp_path / "work"))


@pytest.fixture
def session(target: Target) -> Iterator[Session]:
    with open_session(target) as opened:
        yield opened


def quick(key: str, kind: str, artifact: str = "net.tflite", **fields: object) -> Step:
    return Step(key=key, kind=kind, artifact=artifact, **{"seconds": 0.02, "min_samples": 3, "runs": 3, **fields})


def test_every_kind_of_step(session: Session, model: Path, tmp_path: Path) -> None:
    x = np.concatenate([X, -X, 2 * X])
    np.savez(tmp_path / "x.npz", x=x)
    write_tflite(tmp_path / "wide.tflite", channels=512)
    (tmp_path / "broken.tflite").write_bytes(b"not a model")
    names = ["net.tflite", "wide.tflite", "x.npz", "broken.tflite"]
    session.push({name: tmp_path / name for name in names})
    steps = [
        quick("time", "time", against="wide.tflite"),
        quick("kernels", "kernels", against="wide.tflite"),
        quick("broken", "time", "broken.tflite"),
        quick("outputs", "outputs", inputs="x.npz"),
        quick("memory", "memory"),
        quick("more", "memory", "wide.tflite"),
    ]
    timed, kernels, broken, outputs, memory, more = session.run(steps, job="all")

    assert timed.error is None and timed.samples is not None and timed.against is not None
    assert all(0 < value < 1 for value in timed.samples.values)
    assert timed.conditions is not None
    assert (timed.conditions.runtime, timed.conditions.runtime_version[:15]) == ("tflite", "ai_edge_litert ")
    assert [kernel.name for kernel in kernels.kernels] == ["delegate:0", "delegate:1"]
    assert kernels.run_s is not None and kernels.against_run_s is not None
    assert 0 < sum(kernel.time_s for kernel in kernels.kernels) <= 1.1 * kernels.run_s
    assert broken.error is not None and "broken.tflite" in broken.error and not broken.no_kernels

    assert outputs.outputs is not None
    session.fetch(outputs.outputs, tmp_path / "y.npz")
    with np.load(tmp_path / "y.npz") as archive:
        np.testing.assert_allclose(archive["y"], reference(x), rtol=1e-4, atol=1e-4)

    assert memory.activation_bytes is not None and more.activation_bytes is not None
    hidden = (512 - 16) * 32 * 32 * 4
    assert more.activation_bytes - memory.activation_bytes == pytest.approx(hidden, rel=0.1)


def test_options_are_conditions_and_are_measured_anew(here: Target, model: Path) -> None:
    results = []
    for text in ("tflite", "tflite:delegate=none", "tflite:delegate=gpu"):
        with open_session(replace(here, runtime=text)) as session:
            session.push({"net.tflite": model})
            results.append(session.run([quick("k", "kernels"), quick("t", "time")], job="options"))
            assert session.conditions().runtime == text
    (default, _), (plain, timed), (gpu, _) = results
    assert [kernel.name for kernel in default.kernels] == ["delegate:0", "delegate:1"]
    assert [kernel.name for kernel in plain.kernels] == ["node:0", "node:1"]
    assert timed.conditions is not None and timed.conditions.runtime == "tflite:delegate=none"
    assert gpu.error is not None and "cannot be loaded" in gpu.error


def test_a_runtime_without_kernels_says_so(here: Target, model: Path, tmp_path: Path) -> None:
    program = tmp_path / "benchmark_model"
    program.write_text(f"#!/bin/sh\ncat {FIXTURES}/benchmark-2.16-two-partitions.txt\n")
    program.chmod(0o755)
    with open_session(replace(here, runtime=f"tflite:benchmark={program}")) as session:
        session.push({"net.tflite": model})
        kernels, timed = session.run([quick("k", "kernels"), quick("t", "time")], job="none")
    assert kernels.no_kernels and not timed.no_kernels
    assert timed.error is None


def test_board_with_and_without_the_runtime(here: Target, tmp_path: Path) -> None:
    facts = check_target(here)
    assert facts.missing == ()
    assert facts.runtimes["tflite"].startswith("ai_edge_litert 2.")
    # A Python with a package of that name which cannot open a model.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    python = str(tmp_path / "bare" / "bin" / "python")
    (site,) = (tmp_path / "bare" / "lib").glob("python*/site-packages")
    with contextlib.closing(connect_target(here)) as transport:
        bare = replace(here, python=python, workdir=str(tmp_path))
        lacks = gather_facts(bare, transport).facts
        for name in ("tflite_runtime", "numpy"):
            (site / name).mkdir()
            (site / name / "__init__.py").write_text("__version__ = '2.14.0'")
        assert gather_facts(bare, transport).facts.runtimes == {"tflite": "tflite_runtime 2.14.0"}
        broken = gather_facts(bare, transport, thorough=True).facts
    assert "ai_edge_litert or tflite_runtime or tensorflow and numpy: edgeprune targets setup" in lacks.missing[0]
    assert "a working tflite (no TFLite runtime: " in broken.missing[0]
