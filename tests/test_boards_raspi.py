"""arm64 programs behind an arm64 sshd, with a Raspberry Pi's sensors: everything but the speed is a Pi's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from boards.cache import CannotBuild
from boards.raspi import THROTTLED, RaspiBoard
from evidence import make_evidence
from loopback.models import write_model
from tflite_files import write_classifier

from edgeprune.bundle import KINDS, try_bundle, write_bundle
from edgeprune.core.errors import AgentError
from edgeprune.core.family import load_member
from edgeprune.core.records import Step, StepResult, Target
from edgeprune.device.session import open_session
from edgeprune.device.targets import check_target, runtime_format

pytestmark = [pytest.mark.device, pytest.mark.board]
NOISE = "printf 'Bem-vindo \\377\\376 ao quadro\\n'; printf 'warning: setlocale: \\351\\n' >&2\n"


@pytest.fixture(scope="module")
def raspi() -> Iterator[tuple[RaspiBoard, Target]]:
    board = RaspiBoard()
    with ExitStack() as stack:
        try:
            target = stack.enter_context(board)
        except CannotBuild as reason:
            pytest.skip(str(reason))
        yield board, target


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "net.onnx")


def steps(*keys: str) -> list[Step]:
    return [Step(key=key, kind="time", artifact="net.onnx", seconds=0.1, min_samples=3) for key in keys]


def test_a_raspberry_pi_as_far_as_it_says(raspi: tuple[RaspiBoard, Target]) -> None:
    facts = check_target(raspi[1])
    assert facts.missing == ()
    assert (facts.arch, facts.cpu, facts.governor) == ("aarch64", "Cortex-A72", "ondemand")
    assert (facts.temp_c, facts.freq_hz, facts.throttled) == (48.3, 1.5e9, "")
    assert facts.runtimes["onnxruntime"] == onnxruntime.__version__


@pytest.mark.slow
def test_its_runtime_computes_what_ours_does(raspi: tuple[RaspiBoard, Target], model: Path, tmp_path: Path) -> None:
    inputs = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    np.savez(tmp_path / "inputs.npz", x=inputs)
    with open_session(raspi[1], space="outputs") as session:
        session.push({"net.onnx": model, "inputs.npz": tmp_path / "inputs.npz"})
        step = Step(key="outputs", kind="outputs", artifact="net.onnx", inputs="inputs.npz")
        (result,) = session.run([step], job="outputs")
        assert result.error is None and result.outputs is not None
        session.fetch(result.outputs, tmp_path / "outputs.npz")
    (ours,) = onnxruntime.InferenceSession(model).run(None, {"x": inputs})
    with np.load(tmp_path / "outputs.npz") as theirs:
        np.testing.assert_allclose(theirs["y"], ours, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_tflite_computes_and_tells_its_kernels(raspi: tuple[RaspiBoard, Target], tmp_path: Path) -> None:
    """The arm64 build of LiteRT, its profiler behind the C interface too."""
    runtime = pytest.importorskip("edgeprune.device.runtimes.tflite")
    from loopback.tflite import write_tflite

    model = write_tflite(tmp_path / "net.tflite")
    inputs = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    np.savez(tmp_path / "inputs.npz", x=inputs)
    target = replace(raspi[1], runtime="tflite")
    assert check_target(target).missing == ()
    with open_session(target, space="tflite") as session:
        session.push({"net.tflite": model, "inputs.npz": tmp_path / "inputs.npz"})
        steps = [
            Step(key="outputs", kind="outputs", artifact="net.tflite", inputs="inputs.npz"),
            Step(key="time", kind="time", artifact="net.tflite", seconds=0.1, min_samples=3),
            Step(key="kernels", kind="kernels", artifact="net.tflite", runs=3),
            Step(key="memory", kind="memory", artifact="net.tflite"),
        ]
        results = session.run(steps, job="tflite")
        assert [result.error for result in results] == [None] * 4
        outputs, timed, kernels, memory = results
        assert outputs.outputs is not None
        session.fetch(outputs.outputs, tmp_path / "outputs.npz")
    ours = runtime.Model(str(model), 1)
    with np.load(tmp_path / "outputs.npz") as theirs:
        for x, y in zip(inputs, theirs["y"], strict=True):
            np.testing.assert_allclose(y, ours.run({"x": x[None]})[0][0], rtol=1e-4, atol=1e-4)
    assert timed.samples is not None
    assert [kernel.name for kernel in kernels.kernels] == ["delegate:0", "delegate:1"]
    assert memory.activation_bytes is not None and memory.activation_bytes >= 16 * 32 * 32 * 4


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "tflite"])
def test_a_bundles_own_example_runs_there(
    runtime: str, raspi: tuple[RaspiBoard, Target], model: Path, tmp_path: Path
) -> None:
    """What an app embeds, unpacked and run by its own example on arm64: the outputs that were recorded here."""
    format = load_member("formats", runtime_format(runtime))
    path = model
    if runtime == "tflite":
        path = tmp_path / "model.tflite"
        write_classifier(path, "int8")
    artifact = format.inspect(path)
    evidence = make_evidence()
    report = replace(evidence.report, artifact_sha256=artifact.sha256)
    made = write_bundle(path, artifact, evidence.plan, report, tmp_path / "bundle.zip", kinds=KINDS)
    with open_session(replace(raspi[1], runtime=runtime), space="bundle") as session:
        check = try_bundle(Path(made.path), session)
    assert check.passed and check.measured is not None and check.measured < 1e-4


@pytest.mark.slow
def test_throttling_while_measuring_is_in_the_conditions(raspi: tuple[RaspiBoard, Target], model: Path) -> None:
    """Under-voltage at the second step's beginning; the firmware remembers it at the third's."""
    board, target = raspi
    flags = iter(("50005", "50000"))

    def next_flags(result: StepResult) -> None:
        del result
        board.set_sensor(THROTTLED, next(flags, "50000"))

    with open_session(target, space="throttled") as session:
        session.push({"net.onnx": model})
        results = [session.run(steps(key), job="throttled", on_result=next_flags)[0] for key in ("a", "b", "c")]
    board.set_sensor(THROTTLED, "0")
    said = [result.conditions.throttled for result in results if result.conditions is not None]
    assert said == ["", "under-voltage, throttled", ""]


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["/bin/bash", "/bin/tcsh", "/bin/dash"])
def test_login_shells_that_talk_in_latin_1(shell: str, model: Path) -> None:
    """A greeting that is not UTF-8, before every command, in the words of the shell at hand."""
    with RaspiBoard(shell=shell) as target:
        board_home = next(Path(target.address["known_hosts"]).parent.glob("home"))
        for name in (".bashrc", ".tcshrc", ".profile"):
            (board_home / name).write_text(NOISE if "tcsh" not in name else NOISE.replace(" >&2", ""))
        with open_session(target) as session:
            session.push({"net.onnx": model})
            assert session.run(steps("a"), job="noise")[0].error is None


@pytest.mark.slow
def test_wheel_of_another_architecture(raspi: tuple[RaspiBoard, Target], model: Path) -> None:
    """This machine's numpy, copied there by hand: it says that it is there until it is imported."""
    board, target = raspi
    site, wrong = Path(np.__file__).parents[1], board.home / "wrong"
    for name in ("numpy", f"numpy-{np.__version__}.dist-info"):
        shutil.copytree(site / name, wrong / name, ignore=shutil.ignore_patterns("tests", "*.pyc"))
    (board.home / ".bashrc").write_text("export PYTHONPATH=/home/pi/wrong\n")
    try:
        facts = check_target(target)
        assert facts.missing == ("onnxruntime and numpy: edgeprune targets setup raspi",)
        with open_session(target, space="wrong") as session, pytest.raises(AgentError, match="numpy") as caught:
            session.push({"net.onnx": model})
            session.run(steps("a"), job="wrong")
        assert "import" in str(caught.value).lower()
    finally:
        shutil.rmtree(wrong)
        (board.home / ".bashrc").unlink()


def test_reboot_in_the_middle_of_a_job(raspi: tuple[RaspiBoard, Target], model: Path) -> None:
    """Every process of the board gone, sshd too; the home folder stays. Nothing is measured twice."""
    board, target = raspi
    pending = [board.reboot]

    def once(result: StepResult) -> None:
        del result
        if pending:
            pending.pop()()

    with open_session(target, space="reboot") as session:
        session.push({"net.onnx": model})
        results = session.run(steps("a", "b", "c"), job="reboot", on_result=once)
        again = session.run(steps("a", "b", "c"), job="reboot")
    assert [result.error for result in results] == [None] * 3
    assert [r.samples for r in again] == [r.samples for r in results]
