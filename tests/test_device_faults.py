"""What goes wrong between here and the board, for real on the embedded board: one clear sentence each."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import paramiko
import pytest
from boards.openssh import SSHD, openssh_board
from loopback.models import write_model

from edgeprune.core.errors import AgentError, BoardNotReady, ConnectionLost, DeviceError, HostKeyError, UsageError
from edgeprune.core.records import Conditions, Step, StepResult, Target
from edgeprune.device import job as job_module
from edgeprune.device.agent import find_deaths
from edgeprune.device.boards import Fact, linux
from edgeprune.device.embedded import EmbeddedBoard
from edgeprune.device.embedded_server import list_processes
from edgeprune.device.results import Momentary, read_result
from edgeprune.device.session import open_session
from edgeprune.device.sources import Source
from edgeprune.device.targets import check_target


@pytest.fixture(scope="module")
def embedded() -> Iterator[tuple[EmbeddedBoard, Target]]:
    board = EmbeddedBoard()
    with board as target:
        yield board, target


@pytest.fixture
def target(embedded: tuple[EmbeddedBoard, Target], tmp_path: Path) -> Target:
    """The embedded board with a workdir of this test's own."""
    return replace(embedded[1], workdir=str(tmp_path / "work"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "net.onnx")


def steps(*keys: str, seconds: float = 0.4) -> list[Step]:
    return [Step(key=key, kind="time", artifact="net.onnx", seconds=seconds, min_samples=3) for key in keys]


def endless_steps() -> list[Step]:
    """More than a test waits for. One is over within seconds, whatever its limit: so many samples are enough.

    A busy machine may hear of several results at once; then of these some are left.
    """
    return steps(*(f"b{number}" for number in range(100)), seconds=120.0)


def events(target: Target) -> list[dict[str, Any]]:
    """What the agent wrote on the board, in order."""
    (path,) = Path(target.workdir).rglob("results.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def supervisor(target: Target) -> int:
    (path,) = Path(target.workdir).rglob("agent.pid")
    return int(path.read_text())


def worker(target: Target) -> int:
    return next(pid for pid, parent, _ in list_processes() if parent == supervisor(target))


def agent_is_gone(target: Target) -> bool:
    (path,) = Path(target.workdir).rglob("agent.lock")
    with path.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def once(action: Callable[[], object]) -> Callable[[StepResult], None]:
    """Act on the first result only, while the next step is under way, which has to outlast a busy machine's delays."""
    pending = [action]

    def on_result(result: StepResult) -> None:
        del result
        if pending:
            pending.pop()()

    return on_result


# --- while measuring -----------------------------------------------------------------------------


def test_cut_connection_costs_nothing(embedded: tuple[EmbeddedBoard, Target], target: Target, model: Path) -> None:
    with open_session(target) as session:
        session.push({"net.onnx": model})
        results = session.run(steps("a", "b", "c"), job="cut", on_result=once(embedded[0].cut_connections))
    assert [result.error for result in results] == [None, None, None]
    done = [event["event"] for event in events(target)]
    assert done == ["begin", "result"] * 3 + ["exit"]


def test_connection_that_does_not_come_back(tmp_path: Path, model: Path) -> None:
    board = EmbeddedBoard()
    with board as target:
        address = {**target.address, "patience_s": 1}
        with open_session(replace(target, address=address)) as session:
            session.push({"net.onnx": model})
            with pytest.raises(ConnectionLost, match=r"did not come back in 1 s.*run the same command again"):
                session.run([*steps("a"), *endless_steps()], job="gone", on_result=once(board.close))


def test_killed_agent_goes_on_where_it_was(target: Target, model: Path) -> None:
    with open_session(target) as session:
        session.push({"net.onnx": model})
        kill = once(lambda: os.kill(worker(target), signal.SIGKILL))
        results = session.run([*steps("a"), *steps("b", "c", seconds=2.0)], job="kill", on_result=kill)
    assert [result.error for result in results] == [None, None, None]
    written = events(target)
    assert [event["key"] for event in written if event["event"] == "result"] == ["a", "b", "c"]
    assert [event["rc"] for event in written if event["event"] == "exit"] == [-signal.SIGKILL, 0]


def test_board_that_lost_every_process(target: Target, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a reboot: nobody is left to say that the agent ended."""
    monkeypatch.setattr(job_module, "SILENCE_S", 0.5)
    with open_session(target) as session:
        session.push({"net.onnx": model})
        kill = once(lambda: os.killpg(supervisor(target), signal.SIGKILL))
        results = session.run([*steps("a"), *steps("b", seconds=3.0)], job="reboot", on_result=kill)
    assert [result.error for result in results] == [None, None]
    assert [event["event"] for event in events(target)].count("exit") == 1


def test_step_that_always_kills_the_agent(target: Target, model: Path) -> None:
    stop = threading.Event()

    def kill_at_b() -> None:
        killed = 0
        while not stop.is_set():
            time.sleep(0.01)
            with contextlib.suppress(ValueError, StopIteration, ProcessLookupError):
                begun = [event for event in events(target) if event["event"] == "begin" and event["key"] == "b"]
                if len(begun) > killed:
                    os.kill(worker(target), signal.SIGKILL)
                    killed += 1

    killer = threading.Thread(target=kill_at_b)
    with open_session(target) as session:
        session.push({"net.onnx": model})
        killer.start()
        try:
            results = session.run(steps("a", "b", "c", seconds=1.0), job="oom")
        finally:
            stop.set()
            killer.join()
    assert [result.key for result in results if result.error is None] == ["a", "c"]
    assert results[1].error is not None and "out of memory" in results[1].error


def test_agent_that_cannot_work(target: Target, model: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "numpy.py").write_text("raise ImportError('numpy was built for another board')\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/broken exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with open_session(target) as session:
        session.push({"net.onnx": model})
        session._python = str(python)
        with pytest.raises(AgentError, match="numpy was built for another board"):
            session.run(steps("a"), job="broken")


def test_interrupt_stops_the_agent(target: Target, model: Path) -> None:
    with open_session(target) as session:
        session.push({"net.onnx": model})
        press = once(lambda: threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start())
        with pytest.raises(KeyboardInterrupt):
            session.run([*steps("a"), *endless_steps()], job="stop", on_result=press)
        assert agent_is_gone(target)
        assert session.run(steps("d", seconds=0.05), job="stop")[0].error is None


def test_same_job_twice_at_once(target: Target, model: Path, tmp_path: Path) -> None:
    """The second is told of the first; once the first was killed, its detached agent is replaced."""
    program = (
        "import sys, pickle\n"
        "from edgeprune.core.records import Step\n"
        "from edgeprune.device.session import open_session\n"
        "with open_session(pickle.load(sys.stdin.buffer), space='shared') as session:\n"
        "    step = dict(kind='time', artifact='net.onnx')\n"
        "    steps = [Step(key=f'{number}', seconds=0.01 if number == 0 else 600, **step) for number in range(100)]\n"
        "    session.run(steps, job='same', on_result=lambda result: print(result.key, flush=True))\n"
    )
    with open_session(target, space="shared") as session:
        session.push({"net.onnx": model})
        argv = [sys.executable, "-c", program]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path) as first:
            assert first.stdin is not None and first.stdout is not None
            first.stdin.write(pickle.dumps(target))
            first.stdin.close()
            assert first.stdout.readline() == b"0\n"
            with pytest.raises(BoardNotReady, match=f"process {first.pid} of this machine runs the same job"):
                session.run(steps("c", seconds=0.05), job="same")
            assert not agent_is_gone(target)
            first.kill()
        assert session.run(steps("c", seconds=0.05), job="same")[0].error is None


def test_results_that_cannot_be_read(target: Target, model: Path) -> None:
    with open_session(target) as session:
        session.push({"net.onnx": model})
        session.run(steps("a", seconds=0.05), job="noise")
        (path,) = Path(target.workdir).rglob("results.jsonl")
        path.write_bytes(path.read_bytes() + b"Segmentation fault\n")
        with pytest.raises(AgentError, match=r"Segmentation fault.*remove that folder"):
            session.run(steps("b", seconds=0.05), job="noise")
        assert agent_is_gone(target)


def test_line_cut_by_a_crash_is_written_again(target: Target, model: Path) -> None:
    with open_session(target) as session:
        session.push({"net.onnx": model})
        first = session.run(steps("a", seconds=0.05), job="half")
        (path,) = Path(target.workdir).rglob("results.jsonl")
        path.write_bytes(path.read_bytes() + b'{"run": "x", "event": "res')
        assert session.run(steps("a", "b", seconds=0.05), job="half")[0] == first[0]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("time", {"values": [0.0], "loops": 1, "warmups": 1, "stopped_because": ""}),
        ("time", {"values": [], "loops": 1, "warmups": 1, "stopped_because": ""}),
        ("time", {"values": ["1e-3"], "loops": 1, "warmups": 1, "stopped_because": ""}),
        ("time", {"values": [float("nan")], "loops": 1, "warmups": 1, "stopped_because": ""}),
        ("time", None),
        ("kernels", {"kernels": [], "run_s": 1e-3}),
        ("kernels", {"kernels": [{"name": "a", "op": "Conv", "time_s": -1e-6}], "run_s": 1e-3}),
        ("memory", {"activation_bytes": -1, "process_bytes": 1}),
        ("unheard-of", {}),
    ],
)
def test_impossible_numbers_are_an_error_never_zero(kind: str, value: object) -> None:
    event = {"key": "a", "kind": kind, "error": None, "before": {}, "after": {}, "value": value}
    base = Conditions(board="linux", arch="x", cpu="x", runtime="onnxruntime", runtime_version="1")
    nothing = Momentary(governor=None, freq_hz=None, temp_before_c=None, temp_after_c=None, throttled=None)
    with pytest.raises(AgentError, match="cannot be read"):
        read_result(event, base, lambda before, after: nothing, where="target x")


def python_with(folder: Path, modules: Mapping[str, str], environment: str = "") -> str:
    """A Python on the board that finds these files first, with this in its environment."""
    for name, text in modules.items():
        (folder / "modules" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "modules" / name).write_text(text)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\n{environment} PYTHONPATH={folder}/modules exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)


CRASHING_RUNTIME = """
import ctypes, importlib, sys
from pathlib import Path
sys.path.remove(str(Path(__file__).parent))
del sys.modules["onnxruntime"]
real = importlib.import_module("onnxruntime")
class InferenceSession(real.InferenceSession):
    def __init__(self, path, *arguments, **options):
        if "bad" in str(path):
            ctypes.string_at(0)
        super().__init__(path, *arguments, **options)
real.InferenceSession = InferenceSession
"""


def test_runtime_that_crashes_on_one_model(target: Target, model: Path, tmp_path: Path) -> None:
    """A segmentation fault in native code: named, and the other models are still measured."""
    python = python_with(tmp_path, {"onnxruntime.py": CRASHING_RUNTIME})
    bad = Step(key="b", kind="time", artifact="bad.onnx", seconds=0.05)
    with open_session(target) as session:
        session._python = python
        session.push({"net.onnx": model, "bad.onnx": model})
        a, b, c = session.run([*steps("a", seconds=0.05), bad, *steps("c", seconds=0.05)], job="crash")
    assert (a.error, c.error) == (None, None)
    assert b.error == "the agent died 2 times at this step: signal 11 (SIGSEGV): the runtime crashes on this model"


def test_board_that_dies_of_one_step_every_time(tmp_path: Path) -> None:
    """What is left of a step at which the whole board went down: a beginning, and no word of its end."""
    begin, done = {"event": "begin", "key": "a"}, {"event": "result", "key": "a"}
    assert find_deaths([begin, done, {"event": "exit", "rc": 0}]) == {}
    assert find_deaths([begin, begin, {"event": "exit", "rc": -11}]) == {"a": [-9, -11]}
    assert find_deaths([begin, done, {**begin, "key": "b"}]) == {"b": [-9]}


CLOCK_SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int done = real(clock, now);
    if (clock == CLOCK_REALTIME && access(JUMPED, F_OK) == 0) now->tv_sec -= 400000;
    return done;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: apt-get install gcc")
def test_clock_that_jumps(target: Target, model: Path, tmp_path: Path) -> None:
    """Days back in the middle of a job, as when a board without a battery hears of the time."""
    source, shim, jumped = tmp_path / "shim.c", tmp_path / "shim.so", tmp_path / "jumped"
    source.write_text(CLOCK_SHIM)
    argv = ["cc", "-shared", "-fPIC", f'-DJUMPED="{jumped}"', "-o", str(shim), str(source), "-ldl"]
    subprocess.run(argv, check=True)
    python = python_with(tmp_path, {}, f"LD_PRELOAD={shim}")
    told = subprocess.run([python, "-c", "import time; print(time.time())"], stdout=subprocess.PIPE, check=True)
    with open_session(target) as session:
        session._python = python
        session.push({"net.onnx": model})
        results = session.run(steps("a", "b", seconds=0.2), job="clock", on_result=once(jumped.touch))
    assert float(told.stdout) - 300_000 > float(
        subprocess.run([python, "-c", "import time; print(time.time())"], stdout=subprocess.PIPE, check=True).stdout
    )
    for result in results:
        assert result.error is None and result.samples is not None
        assert 0 < min(result.samples.values) <= max(result.samples.values) < 10


@pytest.mark.parametrize("shell", ["dash", "busybox", "tcsh", "zsh", "fish"])
@pytest.mark.skipif(SSHD is None, reason="OpenSSH's server is not installed")
def test_login_shell_that_is_not_bash_and_talks(shell: str, model: Path, tmp_path: Path) -> None:
    """Every command runs in it, behind a greeting that is not UTF-8."""
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"{shell} is not installed")
    program = f"{found} sh" if shell == "busybox" else found
    login = tmp_path / "login"
    login.write_text(
        "#!/bin/sh\ncase $SSH_ORIGINAL_COMMAND in internal-sftp) exec /usr/lib/openssh/sftp-server ;; esac\n"
        "printf 'Ol\\341 do quadro \\377\\n'; printf 'setlocale: LC_ALL \\351\\n' >&2\n"
        f'exec {program} -c "$SSH_ORIGINAL_COMMAND"\n'
    )
    login.chmod(0o755)
    (tmp_path / "sshd").mkdir()
    with (
        openssh_board(tmp_path / "sshd", config=f"ForceCommand {login}\n") as board,
        open_session(replace(board, workdir=str(tmp_path / "a 'work' dir"))) as session,
    ):
        session.push({"net.onnx": model})
        assert session.run(steps("a", seconds=0.05), job="shell")[0].error is None


def test_home_with_spaces_and_a_dollar(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strange = tmp_path / "my board's $HOME"
    strange.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(strange))
    with EmbeddedBoard() as target, open_session(target) as session:
        session.push({"net.onnx": model})
        assert session.run(steps("a", seconds=0.05), job="home")[0].error is None
        assert list(strange.rglob("home/.edgeprune/*/jobs/home/results.jsonl"))


def test_sensor_that_is_not_text(target: Target, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that are no UTF-8 from a command and from a file: a sensor that is not known, not an error."""
    facts = dict(linux.FACTS)
    garbage = Source(argv=("printf", "\\377\\376 temp=\\240"))
    facts["temp_c"], facts["governor"] = Fact(garbage, linux.FACTS["temp_c"].parse), facts["governor"]
    monkeypatch.setattr(linux, "FACTS", facts)
    with open_session(target) as session:
        session.push({"net.onnx": model})
        (result,) = session.run(steps("a", seconds=0.05), job="garbage")
    assert result.error is None and result.conditions is not None
    assert result.conditions.temp_before_c is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a small disk")
def test_disk_that_fills_up_while_measuring(
    embedded: tuple[EmbeddedBoard, Target], model: Path, tmp_path: Path
) -> None:
    """The error says so; once there is room, the same command goes on where it was."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(disk)], check=True)
    try:
        target = replace(embedded[1], workdir=str(disk / "work"))

        def fill() -> None:
            with contextlib.suppress(OSError), (disk / "full").open("wb") as file:
                while True:
                    file.write(bytes(4096))
                    file.flush()

        with open_session(target) as session:
            session.push({"net.onnx": model})
            with pytest.raises(BoardNotReady, match=r"no space left .* run the same command again"):
                session.run([*steps("a"), *steps("b", "c", seconds=2.0)], job="full", on_result=once(fill))
            (disk / "full").unlink()
            results = session.run([*steps("a"), *steps("b", "c", seconds=2.0)], job="full")
        assert [result.error for result in results] == [None] * 3
        written = [event["key"] for event in events(target) if event["event"] == "result"]
        assert sorted(written) == ["a", "b", "c"]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_wheel_of_another_processor(target: Target, model: Path, tmp_path: Path) -> None:
    """A shared library for AArch64 where this machine's should be, as a wheel unpacked by hand leaves it."""
    library = next(Path(np.__file__).parent.rglob("*.so"))
    machine = bytearray(library.read_bytes())
    machine[18:20] = b"\xb7\x00" if machine[18:20] != b"\xb7\x00" else b"\x3e\x00"  # e_machine of elf(5)
    python = python_with(tmp_path, {"onnxruntime/__init__.py": "from onnxruntime import native\n"})
    (tmp_path / "modules/onnxruntime" / f"native{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(machine)
    with open_session(target) as session:
        session._python = python
        session.push({"net.onnx": model})
        (result,) = session.run(steps("a"), job="wheel")
    assert result.error is not None and result.error.startswith("ImportError: ") and "native" in result.error


# --- the way there -------------------------------------------------------------------------------


def test_unreachable_host(target: Target) -> None:
    nobody = replace(target, address={**target.address, "port": 1})
    with pytest.raises(ConnectionLost, match=r"127\.0\.0\.1:1 cannot be reached.*is it on"):
        open_session(nobody)


def test_refused_key(target: Target, tmp_path: Path) -> None:
    paramiko.RSAKey.generate(2048).write_private_key_file(str(tmp_path / "stranger"))
    stranger = replace(target, address={**target.address, "key": str(tmp_path / "stranger")})
    with pytest.raises(ConnectionLost, match=r"does not accept .*stranger.*ssh-copy-id"):
        open_session(stranger)


def test_encrypted_key_is_named_and_not_asked_for(target: Target, tmp_path: Path) -> None:
    paramiko.RSAKey.generate(2048).write_private_key_file(str(tmp_path / "locked"), password="secret words")
    locked = replace(target, address={**target.address, "key": str(tmp_path / "locked")})
    with pytest.raises(ConnectionLost, match="ssh-add") as caught:
        open_session(locked)
    assert "secret" not in str(caught.value)


def test_unknown_host_key_is_shown_and_trusted_on_demand(target: Target, tmp_path: Path) -> None:
    fresh = replace(target, address={**target.address, "known_hosts": str(tmp_path / "ssh" / "known_hosts")})
    with pytest.raises(HostKeyError, match=r"SHA256:\S+.*edgeprune targets check embedded --trust"):
        check_target(fresh)
    assert check_target(fresh, trust_new_host=True).arch
    assert check_target(fresh).arch


@pytest.mark.parametrize("kind", ["same", "other"])
def test_changed_host_key_is_refused_even_when_told_to_trust(target: Target, tmp_path: Path, kind: str) -> None:
    other = paramiko.ECDSAKey.generate() if kind == "same" else paramiko.RSAKey.generate(2048)
    port = target.address["port"]
    known_hosts = tmp_path / "known_hosts"
    known_hosts.write_text(f"[127.0.0.1]:{port} {other.get_name()} {other.get_base64()}\n")
    before = known_hosts.read_text()
    changed = replace(target, address={**target.address, "known_hosts": str(known_hosts)})
    with pytest.raises(HostKeyError, match=r"CHANGED.*ssh-keygen .*-R"):
        open_session(changed, trust_new_host=True)
    assert known_hosts.read_text() == before


# --- the board -----------------------------------------------------------------------------------


@pytest.fixture
def bare_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Target, Path]]:
    """A board whose PATH holds a shell's tools and nothing else, and that PATH's folder."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "cat", "uname", "grep", "df", "dirname", "nproc", "getconf", "mkdir", "rm"):
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(tools))
    with EmbeddedBoard() as target:
        yield replace(target, python=None, workdir=str(tmp_path / "work")), tools


def test_no_python_on_the_board(bare_board: tuple[Target, Path]) -> None:
    target, _ = bare_board
    with pytest.raises(BoardNotReady, match=r"Python 3\.9 or newer: on the board, sudo apt-get install -y python3"):
        open_session(target)
    facts = check_target(target)
    assert facts.python is None and facts.arch


def test_no_runtime_on_the_board(bare_board: tuple[Target, Path], tmp_path: Path) -> None:
    target, tools = bare_board
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    (tools / "python3").write_text(f'#!{tools}/sh\nexec {tmp_path}/bare/bin/python "$@"\n')
    (tools / "python3").chmod(0o755)
    with pytest.raises(BoardNotReady, match="onnxruntime and numpy: edgeprune targets setup embedded"):
        open_session(target)


def test_disk_that_is_too_small(target: Target, tmp_path: Path) -> None:
    huge = tmp_path / "huge.onnx"
    with huge.open("wb") as file:
        file.truncate(shutil.disk_usage(tmp_path).free + 2**30)  # sparse: it takes no room here
    with open_session(target) as session:
        with pytest.raises(BoardNotReady, match=r"needs [\d.]+ MiB .* has [\d.]+ MiB; free some"):
            session.push({"huge.onnx": huge})
        assert not [path for path in Path(target.workdir).rglob("*") if "huge" in path.name]


def test_workdir_that_cannot_be_written(target: Target) -> None:
    unwritable = replace(target, workdir="/proc/edgeprune")
    with open_session(unwritable) as session, pytest.raises(DeviceError, match=r"target embedded: .*/proc/edgeprune"):
        session.push({"x": Path(__file__)})


def test_fetch_to_where_nothing_can_be_written(target: Target, model: Path, tmp_path: Path) -> None:
    with open_session(target) as session:
        session.push({"net.onnx": model})
        session.fetch("net.onnx", tmp_path / "new" / "folder" / "net.onnx")
        with pytest.raises(UsageError, match="choose another output directory"):
            session.fetch("net.onnx", model / "net.onnx")
    assert (tmp_path / "new" / "folder" / "net.onnx").read_bytes() == model.read_bytes()


@pytest.mark.skipif(SSHD is None, reason="OpenSSH's server is not installed")
def test_server_without_files(tmp_path: Path) -> None:
    with (
        openssh_board(tmp_path, sftp=False) as bare,
        open_session(replace(bare, workdir=str(tmp_path))) as session,
        pytest.raises(DeviceError, match="offers no SFTP; on the board: sudo apt-get install"),
    ):
        session.push({"x": Path(__file__)})


def test_board_takes_everything_with_it(model: Path) -> None:
    """A detached agent does not outlive the embedded board, not even when its parent is killed."""
    program = (
        "import sys, os, signal\n"
        "from pathlib import Path\n"
        "from edgeprune.core.records import Step\n"
        "from edgeprune.device.embedded import EmbeddedBoard\n"
        "from edgeprune.device.session import open_session\n"
        "with EmbeddedBoard() as target, open_session(target) as session:\n"
        "    session.push({'net.onnx': Path(sys.argv[1])})\n"
        "    step = dict(kind='time', artifact='net.onnx')\n"
        "    steps = [Step(key=f'{number}', seconds=0.01 if number == 0 else 600, **step) for number in range(100)]\n"
        "    def die(result):\n"
        "        print(session._root, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    session.run(steps, job='orphan', on_result=die)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(model)], stdout=subprocess.PIPE, text=True, timeout=120)
    root = done.stdout.strip()
    assert done.returncode == -signal.SIGKILL and root
    left = [root]
    for _ in range(100):
        left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if root.encode() in _read(path)]
        if not left and not Path(root).exists():
            break
        time.sleep(0.1)
    assert left == []
    assert not Path(root).exists()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
