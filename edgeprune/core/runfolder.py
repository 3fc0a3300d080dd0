"""A run's folder: which stages are done, from what, and a log. A killed run goes on from here."""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from edgeprune.core.errors import RecordError, UsageError
from edgeprune.core.store import read_record, sha256_bytes, sha256_file, write_atomic, write_record

LEDGER = "stages.json"
LEFTOVER = re.compile(r"\.\w+[\w-]*\.\w+\.[a-z0-9_]{8}")
"""A temporary file of `store.replacing`."""

R = TypeVar("R")


class RunFolder:
    """Stages that are skipped when their inputs and outputs are what they were.

    path: the folder; made when it does not exist. beside: folders of other runs: what was made there from the same
    things is taken over instead of made again.
    """

    def __init__(self, path: Path, beside: Sequence[Path] = ()) -> None:
        self.path, self.beside = path, tuple(beside)
        self._within: list[str] = []  # stages that were done within the one that is being made
        self._within_s = 0.0  # and for how long

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextmanager
    def locked(self, name: str = ".lock") -> Iterator[None]:
        """Hold the folder, so that two runs do not write into one another.

        name: of the file that is held, one for each kind of work.
        raises: UsageError when another process holds it or the folder cannot be written.
        """
        with self._open_lock(name) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(
                    f"another edgeprune is running in {self.path}; wait for it or choose another output directory"
                ) from error
            self._clear_leftovers()
            yield

    def _clear_leftovers(self) -> None:
        """Delete what a killed run was writing: with the lock held nobody is."""
        for file in self.path.iterdir():
            if LEFTOVER.fullmatch(file.name):
                file.unlink(missing_ok=True)

    def _open_lock(self, name: str) -> IO[str]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return (self.path / name).open("w")
        except OSError as error:
            raise UsageError(
                f"cannot write to {self.path}: {error.strerror}; choose another output directory"
            ) from error

    def stage(self, name: str, made_from: Sequence[Any], files: Sequence[str], make: Callable[[], object]) -> None:
        """Run a stage unless its files are there, unaltered, and made from the same things.

        made_from: plain values that decide the result. files: what it writes, relative to the folder.
        """
        key = sha256_bytes(json.dumps(list(made_from), sort_keys=True, default=str).encode())
        entry = self._read_ledger().get(name, {})
        self._within.append(name)
        if entry.get("made_from") == key and self._unaltered(entry.get("files", {}), files):
            self.log(f"{name}: already done")
            return
        if self._take_over(name, key, files):
            return
        started, outer, outer_s = time.monotonic(), self._within, self._within_s
        self._within, self._within_s = [], 0.0
        self.log(f"{name}: started")
        make()
        took = time.monotonic() - started
        self.log(f"{name}: done in {took:.1f} s")
        made = {"made_from": key, "seconds": took - self._within_s, "within": self._within}
        self._enter({name: {**made, "files": {file: sha256_file(self.path / file) for file in files}}})
        self._within, self._within_s = outer, outer_s + took

    def _enter(self, entries: dict[str, Any]) -> None:
        write_atomic(self.path / LEDGER, json.dumps({**self._read_ledger(), **entries}, indent=1).encode())

    def _take_over(self, name: str, key: str, files: Sequence[str]) -> bool:
        """The stage, and what was done within it, from a folder beside this one where it was made from the same."""
        for other in map(RunFolder, self.beside):
            ledger = other._read_ledger()
            entry = ledger.get(name, {})
            if entry.get("made_from") != key or entry["files"].keys() != set(files) or "within" not in entry:
                continue  # the last: of a version that did not tell
            taken = {name: entry}
            for each in (waiting := list(entry["within"])):
                taken[each] = ledger[each]
                waiting += ledger[each].get("within", ())
            if not all(other._unaltered(each["files"], list(each["files"])) for each in taken.values()):
                continue
            for file in {file for each in taken.values() for file in each["files"]}:
                write_atomic(self.path / file, (other / file).read_bytes())
            if all(self._unaltered(each["files"], list(each["files"])) for each in taken.values()):
                self.log(f"{name}: taken from {other.path}")
                self._enter(taken)
                return True
        return False

    def borrow(self, file: str, made_for: Sequence[str]) -> None:
        """Begin a file that grows while work goes on with what it holds in a folder beside this one.

        made_for: files that have to be the same there. Does nothing where the file is here.
        """
        if (self.path / file).is_file():
            return
        wanted = [sha256_file(self.path / name) for name in made_for]
        for other in self.beside:
            theirs = [other / name for name in made_for]
            if not (other / file).is_file() or not all(path.is_file() for path in theirs):
                continue
            if [sha256_file(path) for path in theirs] == wanted:
                write_atomic(self.path / file, (other / file).read_bytes())
                self.log(f"{file}: begun with that of {other}")
                return

    @property
    def seconds(self) -> float:
        """What its stages took together, those that were taken from folders beside it as long as they took there."""
        return float(sum(entry.get("seconds", 0.0) for entry in self._read_ledger().values()))

    def record(
        self, kind: type[R], file: str, made_from: Sequence[Any], make: Callable[[], R], also: Sequence[str] = ()
    ) -> R:
        """A stage that makes one record, stored in `file`. also: what else it writes. returns: the record."""
        self.stage(Path(file).stem, made_from, [file, *also], lambda: write_record(self.path / file, make()))
        return read_record(kind, self.path / file)

    def _unaltered(self, digests: dict[str, str], files: Sequence[str]) -> bool:
        return digests.keys() == set(files) and all(
            (self.path / file).is_file() and sha256_file(self.path / file) == digest for file, digest in digests.items()
        )

    def _read_ledger(self) -> dict[str, Any]:
        try:
            ledger = json.loads((self.path / LEDGER).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (ValueError, OSError) as error:
            raise RecordError(
                f"{self.path / LEDGER} cannot be read ({error}); delete it to start the run again"
            ) from error
        if not isinstance(ledger, dict):
            raise RecordError(f"{self.path / LEDGER} is not ours; delete it to start the run again")
        return ledger

    def log(self, text: str) -> None:
        """Append a line with the time to run.log; a log that cannot be written stops nothing."""
        with contextlib.suppress(OSError), (self.path / "run.log").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text}\n")
