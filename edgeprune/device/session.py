"""A session with a board: push files, run steps through the agent, fetch what they made.

On the board everything lies under the target's workdir:

    <workdir>/<client>-<space>/agent.py, measure.py, by_input.py, warm_up.py, energy.py, pin.py,
                               runtime.py
                               files/         what was pushed, and outputs; manifest.json beside it
                               jobs/<job>/    results.jsonl, agent.log

The agent runs detached: a cut connection costs nothing but the time to connect again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from edgeprune.core.errors import AgentError, BoardNotReady, DeviceError, InputError, UsageError
from edgeprune.core.family import load_member
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import BoardFacts, Conditions, Step, StepResult, Target
from edgeprune.core.store import sha256_file, to_builtins
from edgeprune.device.boards import MOMENTARY
from edgeprune.device.cooling import run_cool
from edgeprune.device.facts import Board, describe_conditions, gather_facts
from edgeprune.device.job import Job
from edgeprune.device.meters import open_meter
from edgeprune.device.procfs import parse_disk_free
from edgeprune.device.results import Momentary, read_result
from edgeprune.device.runtimes import open_runtime, runtime_name
from edgeprune.device.targets import connect_target, runtime_format
from edgeprune.device.transports import Finished, Transport

HERE = Path(__file__).parent
DISK_MARGIN_BYTES = 16 * 1024 * 1024
COOL_DOWN_S = 60
FULL_DISK_BYTES = 64 * 1024
SYNC_TIMEOUT_S = 600.0


def open_session(
    target: Target, *, space: str | None = None, trust_new_host: bool = False, progress: Progress = silent
) -> Session:
    """Connect to a target's board and see that it is ready to measure.

    space: sessions of one client that share it share their files and jobs on the board; None: those
        that are opened in the same working directory.
    trust_new_host: remember a host key never seen before instead of refusing it.
    raises: HostKeyError; ConnectionLost; BoardNotReady, saying the command that mends it.
    """
    transport = connect_target(target, trust_new_host=trust_new_host)
    try:
        board = gather_facts(target, transport)
        if board.facts.missing:
            raise BoardNotReady(f"target {target.name} lacks {'; '.join(board.facts.missing)}")
        return Session(target, transport, board, space=space or str(Path.cwd()), progress=progress)
    except BaseException:
        transport.close()
        raise


class Session:
    """An open session; a context manager. Made by `open_session`."""

    def __init__(
        self, target: Target, transport: Transport, board: Board, *, space: str, progress: Progress = silent
    ) -> None:
        self.target = target
        self.facts: BoardFacts = board.facts
        self._transport = transport
        self._python = board.python or "python3"
        self._progress = progress
        self._client = f"{os.getuid()}@{platform.node()}"
        self._root = f"{board.workdir.rstrip('/')}/{_folder_name(f'{self._client}-{space}')}"
        self._files = f"{self._root}/files"
        _, self._options = open_runtime(target.runtime)
        self._programs = {
            "agent.py": HERE / "agent.py",
            "measure.py": HERE / "measure.py",
            "by_input.py": HERE / "by_input.py",
            "warm_up.py": HERE / "warm_up.py",
            "energy.py": HERE / "energy.py",
            "pin.py": HERE / "pin.py",
            "runtime.py": HERE / "runtimes" / f"{runtime_name(target.runtime)}.py",
        }
        self._manifest: dict[str, str] | None = None
        self._stays_hot = False
        self._board = load_member("device.boards", target.board)
        self._meter = open_meter(target.meter)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def conditions(self, *, dtype: str = "float32", batch: int = 1) -> Conditions:
        """The conditions of a measurement in this session, without what changes from moment to moment."""
        return describe_conditions(self.target, self.facts, dtype=dtype, batch=batch)

    @property
    def format(self) -> str:
        """The member of `formats` whose files the target's runtime runs."""
        return runtime_format(self.target.runtime)

    def push(self, files: Mapping[str, Path]) -> None:
        """Copy files to the board, except those that are there already with the same content.

        files: name on the board -> local file.
        raises: BoardNotReady when they do not fit on the board's disk; UsageError for a name with a folder.
        """
        for name in files:
            _check_name(name)
        manifest = self._open_root()
        self._check_disk(sum(_local_size(path) for name, path in files.items() if name not in manifest))
        digests = {name: _digest_local(path) for name, path in files.items()}
        present = self._transport.sizes(self._files)
        fresh = {
            name: path
            for name, path in files.items()
            if manifest.get(name) != digests[name] or present.get(name) != _local_size(path)
        }
        if not fresh:
            return
        total = sum(map(_local_size, fresh.values()))
        if any(name in manifest for name in fresh):
            self._check_disk(total)
        sent = 0

        def advance(count: int) -> None:
            nonlocal sent
            sent += count
            self._progress(f"copying to {self.target.name}", min(sent, total), total)

        # Forget first: a file cut off half-way must not count as the old one.
        self._write_manifest({name: digest for name, digest in manifest.items() if name not in fresh})
        for name, path in fresh.items():
            try:
                self._transport.put(path, f"{self._files}/{name}", advance)
            except OSError as error:
                self._check_disk(_local_size(path))
                raise DeviceError(f"target {self.target.name}: cannot write {self._files}/{name}: {error}") from error
        # Before they count as there: a board that loses power now must not keep files full of zeros.
        self._transport.run(["sync", *(f"{self._files}/{name}" for name in fresh)], timeout=SYNC_TIMEOUT_S)
        self._write_manifest({**manifest, **{name: digests[name] for name in fresh}})

    def run(
        self, steps: Sequence[Step], *, job: str, on_result: Callable[[StepResult], None] | None = None
    ) -> list[StepResult]:
        """Carry out steps on the board, detached from the connection, and return their results in order.

        A step that has a result in this job, of the same files and settings, is not measured again; what
        was measured while the board was throttled is, once it has cooled down.
        job: names the folder of results. on_result: called with each result as it is made.
        raises: AgentError when the agent dies again and again or writes what cannot be read;
            ConnectionLost when the board does not come back; BoardNotReady when another process runs
            the same job; UsageError for energy on a target without a meter. Whatever else is raised
            (Ctrl-C too), our agent is stopped.
        """
        if len({step.key for step in steps}) != len(steps):
            raise UsageError(f"job {job}: two steps have the same key")
        results: dict[str, StepResult] = {}

        def deliver(result: StepResult) -> None:
            results[result.key] = result
            if on_result is not None:
                on_result(result)

        if steps:
            run_cool(steps, partial(self._carry_out, job), self._cool_down, deliver)
        return [results[step.key] for step in steps]

    def _cool_down(self) -> bool:
        """Wait until the board is no longer throttled. False when it does not get there, from then on at once."""
        for second in range(0 if self._stays_hot else COOL_DOWN_S):
            self._progress(f"letting {self.target.name} cool down", second, COOL_DOWN_S)
            time.sleep(1)
            if second % 10 == 9 and not gather_facts(self.target, self._transport).facts.throttled:
                return True
        self._stays_hot = True
        return False

    def _carry_out(self, job: str, steps: Sequence[Step], on_result: Callable[[StepResult], None]) -> None:
        manifest = self._open_root()
        folder = f"{self._root}/jobs/{_folder_name(job)}"
        fingerprints = {step.key: self._fingerprint(step, manifest) for step in steps}
        spec = {
            "run": uuid.uuid4().hex,
            "owner": f"user {self._client}, process {os.getpid()}, job {job}",
            "job": folder,
            "files": self._files,
            "threads": self.target.threads,
            "options": self._options,
            "sources": self._sources(),
            "pins": dict(self._board.PINS),
            "meter": self._describe_meter(),
            "steps": [{**to_builtins(step), "fingerprint": fingerprints[step.key]} for step in steps],
        }
        keys = set(fingerprints)
        base = self.conditions()
        found: set[str] = set()
        agent = Job(
            self._transport, python=self._python, agent=f"{self._root}/agent.py", folder=folder, name=self.target.name
        )
        try:
            for event in agent.follow(spec):
                key = event.get("key")
                if key not in keys or key in found or event.get("fingerprint") != fingerprints[key]:
                    continue  # of other files or settings
                if event["run"] != spec["run"] and (event.get("error") is not None or event.get("kind") == "outputs"):
                    continue  # the agent does these again
                result = read_result(
                    event, base, self._momentary, meter=self._meter, where=f"target {self.target.name}"
                )
                found.add(key)
                on_result(result)
        except BoardNotReady:
            raise  # it is someone else's agent
        except BaseException as error:
            agent.stop_quietly()
            if isinstance(error, AgentError):
                self._explain_full_disk(error)
            raise
        if absent := [step.key for step in steps if step.key not in found]:
            raise DeviceError(f"target {self.target.name}: the agent ended without a result of {', '.join(absent)}")

    def fetch(self, name: str, path: Path) -> None:
        """Copy a file of the board here.

        raises: DeviceError when there is none of that name; UsageError when it cannot be written here.
        """
        _check_name(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}; choose another output directory") from error
        try:
            self._transport.get(f"{self._files}/{name}", path)
        except FileNotFoundError as error:
            raise DeviceError(f"target {self.target.name} has no file {name}") from error
        except OSError as error:
            raise DeviceError(f"cannot copy {name} of target {self.target.name} to {path}: {error}") from error

    def try_program(self, folder: Path, arguments: Sequence[str], made: Path, *, timeout: float) -> Finished:
        """Run a program of this machine with the board's Python, in a temporary folder there, and leave nothing.

        folder: copied there, with its subfolders, and where the program runs. arguments: the program's file and what
            it is given. made: a file that it may leave, copied to here under the same name.
        raises: DeviceError when it takes longer than `timeout` seconds, or cannot be copied.
        """
        self._open_root()
        there = f"{self._root}/try-{uuid.uuid4().hex}"
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        self._check_disk(sum(map(_local_size, files.values())))
        try:
            folders = sorted({str(PurePosixPath(there, name).parent) for name in files})
            self._command("mkdir", "-p", "--", there, *folders)
            for name, path in files.items():
                self._transport.put(path, f"{there}/{name}", lambda count: None)  # noqa: ARG005
            script = 'cd "$1" && shift && exec "$@"'
            done = self._transport.run(["sh", "-c", script, "sh", there, self._python, *arguments], timeout=timeout)
            if made.name in self._transport.sizes(there):
                self._transport.get(f"{there}/{made.name}", made)
        except OSError as error:
            raise DeviceError(f"target {self.target.name}: cannot copy to or from {there}: {error}") from error
        finally:
            with suppress(DeviceError):
                self._command("rm", "-rf", "--", there)
        return done

    def remove(self, names: Sequence[str]) -> None:
        """Delete files on the board; those that are not there are gone already."""
        for name in names:
            _check_name(name)
        if names:
            manifest = self._open_root()
            self._write_manifest({name: digest for name, digest in manifest.items() if name not in set(names)})
            self._command("rm", "-f", "--", *(f"{self._files}/{name}" for name in names))

    def clear(self) -> None:
        """Delete everything this space keeps on the board: files, jobs and the agent."""
        self._command("rm", "-rf", "--", self._root)
        self._manifest = None

    def close(self) -> None:
        """Hang up; files and results stay on the board, so that a later session goes on from them."""
        self._transport.close()

    def _open_root(self) -> dict[str, str]:
        """Make the folders, bring the agent up to date and read the manifest, once per session."""
        if self._manifest is None:
            self._command("sh", "-c", 'umask 077; exec mkdir -p -- "$1"', "sh", self._files)
            for name, source in self._programs.items():
                if self._transport.read(f"{self._root}/{name}") != (content := source.read_bytes()):
                    self._transport.write(f"{self._root}/{name}", content)
            try:
                manifest = json.loads(self._transport.read(f"{self._root}/manifest.json") or b"{}")
            except ValueError:
                manifest = {}  # costs pushing again, nothing else
            self._manifest = manifest if isinstance(manifest, dict) else {}
        return dict(self._manifest)

    def _write_manifest(self, manifest: dict[str, str]) -> None:
        self._transport.write(f"{self._root}/manifest.json", json.dumps(manifest).encode())
        self._manifest = manifest

    def _fingerprint(self, step: Step, manifest: Mapping[str, str]) -> str:
        """Digest of all that a step's result depends on."""
        names = [name for name in (step.artifact, step.against, step.inputs) if name is not None]
        for name in names:
            if name not in manifest:
                raise InputError(f"step {step.key}: {name} was not pushed to target {self.target.name}")
        parts = [to_builtins(step), [manifest[name] for name in names], self.target.threads, self.facts.runtimes]
        if self._options:
            parts.append(self._options)
        if step.kind == "energy":
            if self._meter is None:
                raise UsageError(
                    f"target {self.target.name} has no power meter, so energy cannot be measured there; give it one "
                    '(meter = "..." in its file) or a power model'
                )
            parts.append(self.target.meter)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _sources(self) -> dict[str, Any]:
        sources = {name: self._board.FACTS[name].source for name in MOMENTARY}
        return {name: {"argv": source.argv, "files": source.files} for name, source in sources.items()}

    def _describe_meter(self) -> dict[str, Any] | None:
        if (meter := self._meter) is None:
            return None
        source = {"argv": meter.source.argv, "files": meter.source.files}
        return {**source, "stream": meter.stream, "interval_s": meter.interval_s}

    def _momentary(self, before: Mapping[str, str], after: Mapping[str, str]) -> Momentary:
        facts = self._board.FACTS
        return Momentary(
            governor=facts["governor"].parse(after["governor"]),
            freq_hz=facts["freq_hz"].parse(after["freq_hz"]),
            temp_before_c=facts["temp_c"].parse(before["temp_c"]),
            temp_after_c=facts["temp_c"].parse(after["temp_c"]),
            throttled=self._board.find_throttling(before["throttled"], after["throttled"]),
        )

    def _check_disk(self, needed: int) -> None:
        """See that so many bytes fit on the board's disk. raises: BoardNotReady."""
        if needed == 0:
            return
        free = self._disk_free()
        if free is not None and needed + DISK_MARGIN_BYTES > free:
            margin = DISK_MARGIN_BYTES >> 20
            raise BoardNotReady(
                f"target {self.target.name}: needs {needed / 2**20:.1f} MiB and {margin} MiB to spare on the disk of "
                f"{self._files}, has {free / 2**20:.1f} MiB; free some or give the target another workdir"
            )

    def _explain_full_disk(self, error: AgentError) -> None:
        """An agent that cannot write says nothing of use. raises: BoardNotReady when that is the reason."""
        free = self._disk_free()
        if free is not None and free < FULL_DISK_BYTES:
            raise BoardNotReady(
                f"target {self.target.name}: no space left on the disk of {self._files}; free some and run the same "
                "command again: what was measured is kept"
            ) from error

    def _disk_free(self) -> int | None:
        return parse_disk_free(self._transport.run(["df", "-Pk", self._files]).stdout.decode("utf-8", "replace"))

    def _command(self, *argv: str) -> None:
        done = self._transport.run(argv)
        if done.rc != 0:
            said = done.stderr.decode("utf-8", "replace").strip()[-500:]
            raise DeviceError(f"target {self.target.name}: {argv[0]} ended with {done.rc}: {said}")


def _folder_name(text: str) -> str:
    """A file name that says what `text` says and differs where `text` differs."""
    plain = re.sub(r"[^A-Za-z0-9_.@-]", "_", text)[:80]
    if plain == text and not plain.startswith((".", "-")):
        return plain
    return f"_{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _check_name(name: str) -> None:
    if not name or "/" in name or name in (".", "..") or any(ord(character) < 32 for character in name):
        raise UsageError(f"{name!r} cannot be a file name on the board: no folders, no control characters")


def _local_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _digest_local(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
