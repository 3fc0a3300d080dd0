"""Where built things are kept: outside the repository, each built once, whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from edgeprune.core.errors import DeviceError


class CannotBuild(DeviceError):
    """Something that a stand-in board is made of is not to be had here; the message says what and why."""


def root() -> Path:
    """The folder of everything that is built."""
    return Path(os.environ.get("EDGEPRUNE_BOARDS") or Path.home() / ".cache" / "edgeprune" / "boards")


def recipe_digest(*parts: str | Path) -> str:
    """Digest of what something is built from: text, and the files that say how."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part.read_bytes() if isinstance(part, Path) else part.encode())
        whole.update(b"\0")
    return whole.hexdigest()[:12]


def built(name: str, digest: str, build: Callable[[Path], None]) -> Path:
    """The folder of one built thing; `build` fills it when it is not there yet. raises: CannotBuild."""
    base = root()
    folder = base / f"{name}-{digest}"
    if folder.is_dir():
        return folder
    base.mkdir(parents=True, exist_ok=True)
    with (base / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder
        partial = base / f".{name}-{digest}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        began = time.monotonic()
        print(f"building {name} under {base} ...", file=sys.stderr, flush=True)
        try:
            build(partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        print(f"building {name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return folder


def command(argv: Sequence[str | Path], **options: object) -> bytes:
    """Output of a command that has to succeed. raises: CannotBuild, with its last words."""
    try:
        done = subprocess.run(list(map(str, argv)), capture_output=True, check=False, **options)  # type: ignore[call-overload]
    except OSError as error:
        raise CannotBuild(f"cannot run {argv[0]}: {error.strerror}; install it") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).decode("utf-8", "replace").strip()[-600:]
        raise CannotBuild(f"{' '.join(map(str, argv[:4]))} ... ended with {done.returncode}: {said}")
    output: bytes = done.stdout
    return output
