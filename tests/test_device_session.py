"""One battery over every way to a board: the same session, on this machine, embedded, behind OpenSSH, behind adb."""

from __future__ import annotations

import contextlib
import fcntl
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from boards.openssh import SSHD, openssh_board
from loopback.adb import AdbServer
from loopback.models import write_model

from edgeprune.core.errors import DeviceError, InputError, UsageError
from edgeprune.core.records import Step, Target
from edgeprune.device.agent import BOARD_LOCK
from edgeprune.device.embedded import EmbeddedBoard
from edgeprune.device.session import Session, open_session
from edgeprune.device.targets import connect_target, read_target
from edgeprune.device.transports import Transport

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module", params=["local", "embedded", "openssh", "adb"])
def board(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A target of each kind; its workdir has every character that a careless shell trips over."""
    workdir = tmp_path_factory.mktemp("board") / 'it\'s a "work" $(touch pwned) `dir`; é'
    with contextlib.ExitStack() as stack:
        if request.param == "local":
            target = read_target(REPOSITORY / "targets" / "localhost.toml")
        elif request.param == "embedded":
            target = stack.enter_context(EmbeddedBoard())
        elif request.param == "adb":
            target = stack.enter_context(AdbServer())
        else:
            if SSHD is None:
                pytest.skip("OpenSSH's server is not installed: apt-get install openssh-server")
            target = stack.enter_context(openssh_board(tmp_path_factory.mktemp("sshd")))
        yield replace(target, workdir=str(workdir))


@pytest.fixture(scope="module")
def session(board: Target) -> Iterator[Session]:
    with open_session(board) as opened:
        yield opened


@pytest.fixture(scope="module")
def transport(board: Target) -> Iterator[Transport]:
    with contextlib.closing(connect_target(board)) as opened:
        yield opened


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "net.onnx")


def quick(key: str, artifact: str = "net.onnx", kind: str = "time", **fields: object) -> Step:
    return Step(key=key, kind=kind, artifact=artifact, **{"seconds": 0.02, "min_samples": 3, "runs": 3, **fields})


# --- the transport -------------------------------------------------------------------------------


def test_command_comes_back_as_it_was(transport: Transport) -> None:
    script = "cat; printf '\\377\\000é' >&2; exit 7"
    done = transport.run(["sh", "-c", script], stdin=b"\x00\xff in")
    assert done == (7, b"\x00\xff in", b"\xff\x00\xc3\xa9")


def test_arguments_are_never_read_by_a_shell(transport: Transport) -> None:
    words = ["$(touch pwned)", "`id`", "a b", "it's", '"', "*", "~", "-n", "", "é;|&", "a\\b"]
    done = transport.run(["sh", "-c", 'for word; do printf "%s\\0" "$word"; done', "sh", *words])
    assert done.stdout.decode().split("\0")[:-1] == words


def test_both_outputs_may_be_large(transport: Transport) -> None:
    script = "head -c 5000000 /dev/zero >&2; head -c 5000000 /dev/zero"
    done = transport.run(["sh", "-c", script])
    assert (done.rc, len(done.stdout), len(done.stderr)) == (0, 5_000_000, 5_000_000)


def test_missing_command_is_127(transport: Transport) -> None:
    assert transport.run(["no-such-command"]).rc == 127


def test_command_that_takes_too_long(transport: Transport) -> None:
    with pytest.raises(DeviceError, match="sleep"):
        transport.run(["sleep", "30"], timeout=0.3)
    assert transport.run(["echo", "on"]).stdout == b"on\n"


def test_files_there_and_back(transport: Transport, tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "here").write_bytes(content)
    advanced: list[int] = []
    transport.put(tmp_path / "here", str(tmp_path / "there"), advanced.append)
    transport.get(str(tmp_path / "there"), tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content
    assert sum(advanced) == len(content)
    assert transport.read(str(tmp_path / "there"), offset=2_999_990) == content[-10:]
    assert transport.sizes(str(tmp_path)) == {"here": 3_000_000, "there": 3_000_000, "back": 3_000_000}
    transport.write(str(tmp_path / "there"), b"new")
    assert transport.read(str(tmp_path / "there")) == b"new"


def test_absent_files(transport: Transport, tmp_path: Path) -> None:
    assert transport.read(str(tmp_path / "absent")) == b""
    assert transport.sizes(str(tmp_path / "absent")) == {}
    with pytest.raises(FileNotFoundError):
        transport.get(str(tmp_path / "absent"), tmp_path / "back")
    assert list(tmp_path.iterdir()) == []


# --- the session ---------------------------------------------------------------------------------


def test_facts_and_conditions(session: Session) -> None:
    facts = session.facts
    assert facts.arch
    assert facts.cpu
    assert facts.cpus is not None and facts.cpus >= 1
    assert facts.ram_bytes is not None and facts.ram_bytes > facts.ram_free_bytes > 0
    assert facts.disk_free_bytes is not None and facts.disk_free_bytes > 0
    assert facts.runtimes == {"onnxruntime": onnxruntime.__version__}
    assert facts.missing == ()
    conditions = session.conditions(batch=2)
    assert (conditions.batch, conditions.threads, conditions.runtime_version) == (2, 1, onnxruntime.__version__)


def test_push_skips_what_is_there(session: Session, board: Target, model: Path) -> None:
    copied: list[int] = []
    with open_session(board, progress=lambda what, done, total: copied.append(done)) as again:
        again.push({"a.onnx": model, "b $(touch pwned).onnx": model})
        assert copied[-1] == 2 * model.stat().st_size
        copied.clear()
        again.push({"a.onnx": model, "b $(touch pwned).onnx": model})
        assert copied == []
        write_model(model, seed=1)
        again.push({"a.onnx": model})
        assert copied[-1] == model.stat().st_size
    again_later = open_session(board, progress=lambda what, done, total: copied.append(done))
    copied.clear()
    with again_later:
        again_later.push({"a.onnx": model})
        assert copied == []
        again_later.fetch("a.onnx", model.with_name("back"))
        again_later.remove(["a.onnx", "b $(touch pwned).onnx", "never there"])
        with pytest.raises(DeviceError, match=r"no file a\.onnx"):
            again_later.fetch("a.onnx", model.with_name("gone"))
    assert model.with_name("back").read_bytes() == model.read_bytes()


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", "", "..", "a\nb"])
def test_names_stay_in_their_folder(session: Session, model: Path, name: str) -> None:
    with pytest.raises(UsageError, match="file name"):
        session.push({name: model})
    with pytest.raises(UsageError, match="file name"):
        session.remove([name])


def test_every_kind_of_step(session: Session, model: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((3, 3, 32, 32)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    session.push({"net.onnx": model, "x.npz": tmp_path / "x.npz", "broken.onnx": tmp_path / "broken.onnx"})
    steps = [
        quick("$(touch pwned)"),
        quick("kernels", kind="kernels"),
        quick("broken", artifact="broken.onnx"),
        quick("outputs", kind="outputs", inputs="x.npz"),
        quick("memory", kind="memory"),
    ]
    seen: list[str] = []
    results = session.run(steps, job="job; $(touch pwned)", on_result=lambda result: seen.append(result.key))
    assert seen == [step.key for step in steps]
    time_, kernels, broken, outputs, memory = results

    assert time_.error is None and time_.samples is not None
    assert len(time_.samples.values) >= 3
    assert all(0 < value < 1 for value in time_.samples.values)
    assert time_.conditions is not None and time_.conditions.arch == session.facts.arch

    assert kernels.run_s is not None
    assert [kernel.op for kernel in kernels.kernels].count("Conv") == 2
    assert 0 < sum(kernel.time_s for kernel in kernels.kernels) <= 1.05 * kernels.run_s

    assert broken.samples is None
    assert broken.error is not None and "broken.onnx" in broken.error

    assert outputs.outputs is not None
    session.fetch(outputs.outputs, tmp_path / "y.npz")
    (reference,) = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    with np.load(tmp_path / "y.npz") as archive:
        np.testing.assert_allclose(archive["y"], reference, rtol=1e-4, atol=1e-4)

    assert memory.activation_bytes is not None and memory.process_bytes is not None
    assert 0 <= memory.activation_bytes < memory.process_bytes


def test_energy_by_a_program_on_the_board(board: Target, model: Path) -> None:
    meter = "command:sh -c 'while sleep 0.02; do echo 2.5; done'"
    with open_session(replace(board, meter=meter)) as session:
        session.push({"net.onnx": model})
        (result,) = session.run([quick("e", kind="energy", seconds=0.4)], job="energy")
    assert result.error is None and result.power is not None
    assert set(result.power.active_w) == set(result.power.idle_w) == {2.5}
    assert result.power.runs > 0 and result.power.seconds >= 0.4


def test_result_is_never_measured_twice(session: Session, model: Path) -> None:
    session.push({"net.onnx": model})
    first = session.run([quick("a"), quick("b")], job="twice")
    again = session.run([quick("b"), quick("a"), quick("c")], job="twice")
    assert again[:2] == [first[1], first[0]]
    other_settings = session.run([quick("a", seconds=0.03)], job="twice")
    assert other_settings[0].samples != first[0].samples
    write_model(model, channels=32)
    session.push({"net.onnx": model})
    assert session.run([quick("a")], job="twice")[0].samples != first[0].samples


def test_step_needs_its_files(session: Session) -> None:
    with pytest.raises(InputError, match=r"absent\.onnx was not pushed"):
        session.run([quick("a", artifact="absent.onnx")], job="absent")
    with pytest.raises(UsageError, match="same key"):
        session.run([quick("a"), quick("a")], job="absent")
    assert session.run([], job="absent") == []


def test_memory_grows_with_activations(session: Session, tmp_path: Path) -> None:
    for channels in (16, 4096):
        write_model(tmp_path / f"{channels}.onnx", channels=channels)
    session.push({f"{channels}.onnx": tmp_path / f"{channels}.onnx" for channels in (16, 4096)})
    small, large = session.run(
        [quick(f"m{channels}", artifact=f"{channels}.onnx", kind="memory") for channels in (16, 4096)], job="memory"
    )
    assert small.activation_bytes is not None and large.activation_bytes is not None
    hidden = 4096 * 32 * 32 * 4
    assert hidden <= large.activation_bytes - small.activation_bytes < 3 * hidden


def test_one_measurement_at_a_time(session: Session, model: Path) -> None:
    session.push({"net.onnx": model})
    session.run([quick("a")], job="lock")  # makes the lock file where there is none
    results: list[str] = []
    with BOARD_LOCK.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(
            target=session.run,
            args=([quick("b")],),
            kwargs={"job": "lock", "on_result": lambda r: results.append(r.key)},
        )
        thread.start()
        time.sleep(1.5)
        assert results == []
        fcntl.flock(lock, fcntl.LOCK_UN)
        thread.join(60)
    assert results == ["b"]


def test_nothing_was_taken_for_a_command(session: Session, board: Target) -> None:
    """Last: every name above held a `$(touch pwned)`."""
    workdir = Path(board.workdir)
    pwned = [*workdir.parent.rglob("pwned"), *Path.cwd().glob("pwned"), *Path.home().glob("pwned")]
    assert pwned == []
    logs = [json.loads(line) for path in workdir.rglob("results.jsonl") for line in path.read_text().splitlines()]
    assert {event["event"] for event in logs} == {"begin", "result", "exit"}
    session.clear()
    assert list(workdir.iterdir()) == []
