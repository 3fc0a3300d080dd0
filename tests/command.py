"""The command line as tests run it: here, without the time that importing PyTorch takes, or in a process of its own."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from edgeprune.__main__ import main


def edgeprune(*arguments: str, cwd: Path, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in this process."""
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as errors,
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
    ):
        patch.chdir(cwd)
        patch.setenv("COLUMNS", "120")
        if home is not None:
            patch.setenv("HOME", str(home))
        patch.setattr(sys, "argv", ["edgeprune", *arguments])
        patch.setattr(logging, "raiseExceptions", False)  # PyTorch's handlers hold what was stderr at an earlier test
        with _into(1, out), _into(2, errors), pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", errors)
            main()
        return subprocess.CompletedProcess(arguments, int(ended.value.code or 0), _all_of(out), _all_of(errors))


def edgeprune_process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, "-m", "edgeprune", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


@contextmanager
def _into(descriptor: int, file: IO[str]) -> Iterator[None]:
    """Let what native code and child processes write go there, too."""
    kept = os.dup(descriptor)
    os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        file.flush()
        os.dup2(kept, descriptor)
        os.close(kept)


def _all_of(file: IO[str]) -> str:
    file.seek(0)
    return file.read()
