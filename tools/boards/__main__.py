"""Stand-in boards from the command line.

    python tools/boards build [BOARD...]   make what boards are made of: about a minute, kept for all later runs
    python tools/boards up BOARD           start one, and say how edgeprune finds it
    python tools/boards down [BOARD...]    stop (default: all)
    python tools/boards status             what is built and what runs
    python tools/boards clean              delete everything that was built

BOARD: openssh, raspi, icount (cortex-a72), icount-a76.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
if sys.path[0] == str(HERE):
    sys.path[0] = str(HERE.parent)

from boards import cache  # noqa: E402  the line above says where
from edgeprune.core.errors import EdgepruneError, UsageError  # noqa: E402
from edgeprune.core.records import Target  # noqa: E402

START_S = 600.0
SCALARS = ("board", "transport", "runtime", "threads", "meter", "workdir", "python", "description")


def open_board(name: str) -> AbstractContextManager[Target]:
    """A stand-in board by its name. raises: UsageError listing the known ones."""
    from boards.icount import IcountBoard
    from boards.raspi import RaspiBoard

    boards: dict[str, Callable[[], AbstractContextManager[Target]]] = {
        "openssh": _openssh,
        "raspi": RaspiBoard,
        "icount": IcountBoard,
        "icount-a76": lambda: IcountBoard(name="icount-a76", cpu="cortex-a76"),
    }
    if name not in boards:
        raise UsageError(f"unknown stand-in board '{name}'; known: {', '.join(boards)}")
    return boards[name]()


@contextmanager
def _openssh() -> Iterator[Target]:
    from boards.openssh import openssh_board

    with tempfile.TemporaryDirectory(prefix="edgeprune-openssh-") as folder, openssh_board(Path(folder)) as target:
        yield target


def write_target(target: Target, path: Path) -> None:
    """A target as the TOML file that `edgeprune` reads; JSON's strings and numbers are TOML's too."""
    lines = [f"{key} = {json.dumps(getattr(target, key))}" for key in SCALARS if getattr(target, key) is not None]
    lines += ["", "[address]", *(f"{key} = {json.dumps(value)}" for key, value in target.address.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n")
    partial.replace(path)


# --- boards that stay up -------------------------------------------------------------------------


def targets() -> Path:
    """The folder of the targets of running boards."""
    return cache.root() / "targets"


def holder(name: str) -> int | None:
    """The process that keeps a board up."""
    try:
        number = int((targets() / f"{name}.pid").read_text())
        command = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    return number if b"hold" in command and name.encode() in command else None


def hold(name: str) -> None:
    """Keep a board up until this process is told to end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    entry = targets() / f"{name}.toml"
    try:
        with open_board(name) as target:
            write_target(target, entry)
            signal.pause()
    finally:
        entry.unlink(missing_ok=True)
        entry.with_suffix(".pid").unlink(missing_ok=True)


def up(name: str) -> None:
    """Start a board that outlives this command."""
    entry, log = targets() / f"{name}.toml", cache.root() / f"{name}.log"
    open_board(name)  # refuses a name that is none
    if holder(name) is None:
        entry.parent.mkdir(parents=True, exist_ok=True)
        entry.unlink(missing_ok=True)
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, str(HERE), "hold", name], stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip
        entry.with_suffix(".pid").write_text(str(process.pid))
        deadline = time.monotonic() + START_S
        while not entry.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                with suppress(ProcessLookupError):
                    process.terminate()
                raise cache.CannotBuild(f"{name} did not start: {log.read_text().strip()[-600:]}")
            time.sleep(0.1)
    print(f"{name} is up. Now, for example:\n  export EDGEPRUNE_TARGETS={targets()}\n  edgeprune targets check {name}")


def down(names: list[str]) -> None:
    """Stop boards, and wait until they are gone."""
    for name in names or sorted(path.stem for path in targets().glob("*.pid")):
        number = holder(name)
        if number is None:
            print(f"{name} is not up")
            continue
        os.kill(number, signal.SIGTERM)
        while holder(name) == number:
            time.sleep(0.05)
        print(f"{name} is down")


def build(names: list[str]) -> None:
    """Make what the boards are made of, where it is not there yet."""
    from boards.host_tools import find_tool
    from boards.image import build_machine
    from boards.rootfs import build_rootfs

    for name in names or ["raspi", "icount"]:
        open_board(name)
        if name == "raspi":
            print(build_rootfs(), find_tool("qemu-aarch64-static").path)
        elif name.startswith("icount"):
            print(build_machine(), find_tool("qemu-system-aarch64").path)


def status() -> None:
    """What is built and what runs."""
    base = cache.root()
    for folder in sorted(path for path in base.glob("*-*") if path.is_dir()):
        size = sum(path.lstat().st_blocks * 512 for path in folder.rglob("*") if not path.is_symlink())
        print(f"built  {folder.name:40}{size / 2**20:8.0f} MiB")
    for entry in sorted(targets().glob("*.toml")):
        print(f"up     {entry.stem:40}process {holder(entry.stem)}")
    if not base.is_dir():
        print(f"nothing is built under {base}")


def main() -> int:
    """Carry out the command; 3 when a board cannot be had here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["build", "up", "down", "status", "clean", "hold"])
    parser.add_argument("board", nargs="*")
    options = parser.parse_args()
    if options.command in ("up", "hold") and len(options.board) != 1:
        parser.error(f"{options.command} needs one board")
    try:
        match options.command:
            case "build":
                build(options.board)
            case "up":
                up(options.board[0])
            case "hold":
                hold(options.board[0])
            case "down":
                down(options.board)
            case "status":
                status()
            case "clean":
                down([])
                shutil.rmtree(cache.root(), ignore_errors=True)
    except EdgepruneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
