"""A Python environment with the runtime on a board, from the network or from wheels this machine brings.

source of the tags: PEP 425, 600 (manylinux_X_Y_ARCH runs where glibc is X.Y or newer) and 599.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from edgeprune.core.errors import BoardNotReady, DeviceError
from edgeprune.core.progress import Progress
from edgeprune.core.records import Target
from edgeprune.device.facts import Board
from edgeprune.device.runtimes import Wheels, open_runtime, runtime_name
from edgeprune.device.transports import Transport

INSTALL_TIMEOUT_S = 1800.0
DISK_NEEDED_BYTES = 400 * 1024 * 1024
OLDEST_MANYLINUX_MINOR = 17


def install_runtime(target: Target, transport: Transport, board: Board, *, offline: bool, progress: Progress) -> None:
    """Make `<workdir>/venv` on the board and install the target's runtime into it.

    raises: BoardNotReady when the board cannot have it, saying why and what to do.
    """
    runtime, _ = open_runtime(target.runtime)
    where = f"target {target.name}"
    requirements, glibc = choose_wheels(target, board, runtime.WHEELS)
    venv, python = f"{board.workdir}/venv", f"{board.workdir}/venv/bin/python"
    make = [str(board.python), "-m", "venv", "--clear", *(["--system-site-packages"] if runtime.BY_HAND else [])]
    progress(f"{where}: making the environment", 0, 3)
    _run(transport, where, ["mkdir", "-p", "--", board.workdir])
    if offline:
        # pip runs from its own wheel, so that the board needs neither ensurepip nor the network.
        _run(transport, where, [*make, "--without-pip", venv])
        with tempfile.TemporaryDirectory() as folder:
            progress(f"{where}: downloading wheels", 1, 3)
            wheels = download_wheels(requirements, board, glibc, Path(folder))
            progress(f"{where}: copying and installing", 2, 3)
            remote = f"{venv}/wheels"
            _run(transport, where, ["mkdir", "-p", "--", remote])
            for wheel in wheels:
                transport.put(wheel, f"{remote}/{wheel.name}", lambda count: None)  # noqa: ARG005
        pip = next(wheel.name for wheel in wheels if wheel.name.startswith("pip-"))
        install = [python, f"{remote}/{pip}/pip", "install", "--no-index", "--find-links", remote]
        _run(transport, where, [*install, "--disable-pip-version-check", *requirements])
        _run(transport, where, ["rm", "-rf", "--", remote])
    else:
        done = transport.run([*make, venv], timeout=INSTALL_TIMEOUT_S)
        if done.rc != 0:
            raise BoardNotReady(
                f"{where}: python3 -m venv failed ({_last_line(done.stdout + done.stderr)}); on the board: "
                "sudo apt-get install -y python3-venv, or use --offline, which needs no pip there"
            )
        progress(f"{where}: installing {' '.join(requirements)}", 1, 3)
        install = [python, "-m", "pip", "install", "--only-binary=:all:", "--disable-pip-version-check"]
        done = transport.run([*install, *requirements], timeout=INSTALL_TIMEOUT_S)
        if done.rc != 0:
            raise BoardNotReady(
                f"{where}: pip could not install on the board ({_last_line(done.stderr)}); "
                "if the board has no network: edgeprune targets setup --offline"
            )
    progress(f"{where}: ready", 3, 3)


def choose_wheels(target: Target, board: Board, choice: Sequence[Wheels]) -> tuple[tuple[str, ...], tuple[int, int]]:
    """The best requirements that the board can have, and its glibc version. raises: BoardNotReady, saying why none."""
    where, name = f"target {target.name}", runtime_name(target.runtime)
    if board.python is None:
        raise BoardNotReady(f"{where} lacks {'; '.join(board.facts.missing)}")
    known = list(dict.fromkeys(arch for wheels in choice for arch in wheels["architectures"]))
    choice = [wheels for wheels in choice if board.facts.arch in wheels["architectures"]]
    if not choice:
        raise BoardNotReady(
            f"{where}: there are no {name} wheels for {board.facts.arch}, only for {', '.join(known)}; "
            "a 64-bit system on the same board may do"
        )
    match = re.match(r"glibc (\d+)\.(\d+)", board.libc or "")
    if match is None:
        raise BoardNotReady(f"{where}: {name} wheels need glibc, the board has {board.libc or 'another libc'}")
    glibc = (int(match[1]), int(match[2]))
    python = board.python_version[:2]
    fitting = [wheels for wheels in choice if wheels["pythons"][0] <= python <= wheels["pythons"][1]]
    if not fitting:
        spans = " or ".join(
            dict.fromkeys(f"{_dotted(low)} to {_dotted(high)}" for low, high in (w["pythons"] for w in choice))
        )
        raise BoardNotReady(
            f"{where}: {name} needs Python {spans} on {board.facts.arch}, the board has {_dotted(python)}; "
            "name another one as `python` in the target"
        )
    wheels = next((wheels for wheels in fitting if wheels["glibc"] <= glibc), None)
    if wheels is None:
        needed = min(wheels["glibc"] for wheels in fitting)
        raise BoardNotReady(
            f"{where}: {name} needs glibc {_dotted(needed)}, the board has {_dotted(glibc)}; "
            "a newer release of its system has it"
        )
    free = board.facts.disk_free_bytes
    if free is not None and free < DISK_NEEDED_BYTES:
        raise BoardNotReady(
            f"{where}: the environment needs {DISK_NEEDED_BYTES >> 20} MiB on the disk of {board.workdir}, "
            f"has {free >> 20} MiB; free some or give the target another workdir"
        )
    return wheels["requirements"], glibc


def platform_tags(arch: str, glibc: tuple[int, int]) -> list[str]:
    """Wheel platforms that a board can run, best first; pip takes only those it is told.

    arch: `uname -m`. glibc: the board's version.
    """
    newest = glibc[1]
    tags = [f"manylinux_2_{minor}_{arch}" for minor in range(newest, OLDEST_MANYLINUX_MINOR - 1, -1)]
    return [*tags, f"manylinux2014_{arch}"]


def download_wheels(requirements: Sequence[str], board: Board, glibc: tuple[int, int], folder: Path) -> list[Path]:
    """Wheels of the requirements, of all they need and of pip, for the board's Python and platform.

    raises: DeviceError with pip's reason.
    """
    major, minor = board.python_version[:2]
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
    argv += ["--implementation", "cp", "--python-version", f"{major}.{minor}", "--dest", str(folder)]
    for tag in platform_tags(board.facts.arch, glibc):
        argv += ["--platform", tag]
    done = subprocess.run([*argv, "pip", *requirements], capture_output=True, check=False)
    if done.returncode != 0:
        raise DeviceError(
            f"cannot download {' '.join(requirements)} for {board.facts.arch}, Python {major}.{minor}, "
            f"glibc {'.'.join(map(str, glibc))} on {platform.node()}: {_last_line(done.stderr)}"
        )
    return sorted(folder.glob("*.whl"))


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _run(transport: Transport, where: str, argv: Sequence[str]) -> None:
    done = transport.run(argv, timeout=INSTALL_TIMEOUT_S)
    if done.rc != 0:
        raise BoardNotReady(f"{where}: {argv[0]} ended with {done.rc}: {_last_line(done.stderr or done.stdout)}")


def _last_line(output: bytes) -> str:
    lines = output.decode("utf-8", "replace").strip().splitlines()
    return next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "no output")[:300]
