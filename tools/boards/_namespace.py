"""Start a program of another architecture in a root file system, in namespaces of its own.

    python _namespace.py ROOTFS RUN_FOLDER EMULATOR PROGRAM...

Needs root, and Linux 6.7 for binfmt_misc in a user namespace (Documentation/admin-guide/binfmt-misc.rst): the
emulator is registered for the programs in there alone. RUN_FOLDER holds what differs from run to run, all
seen by the program: `cpuinfo`, `passwd`, `sys/`, `home/` and `bin/` (which becomes /usr/local/bin). Everything started
in there ends with PROGRAM, and PROGRAM with this process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

LIBC: Any = ctypes.CDLL(None, use_errno=True)
# clone(2), mount(2), prctl(2)
NEW_USER, NEW_MOUNTS, NEW_PIDS, NEW_NAME, NEW_IPC = 0x10000000, 0x20000, 0x20000000, 0x4000000, 0x8000000
READ_ONLY, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 32, 4096, 16384, 1 << 18
DIE_WITH_PARENT = 1
UNAVAILABLE = 69
"""Exit code where the kernel or our rights do not allow what is needed; EX_UNAVAILABLE of sysexits.h."""
# An ELF header of 64 bits, little-endian, executable or shared, for machine 0xb7 (AArch64), and what of it counts.
MAGIC = "7f454c460201010000000000000000000200b700"
MASK = "ffffffffffffff00fffffffffffffffffeffffff"


def check(result: int, what: str) -> None:
    """raises: OSError saying what a system call was to do."""
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def mount(source: Path | str, target: Path, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2)."""
    done = LIBC.mount(str(source).encode(), str(target).encode(), kind.encode(), flags, options.encode())
    check(done, f"mounting {kind or source} on {target}")


def register_emulator(emulator: str) -> None:
    """Let the kernel run AArch64 programs with `emulator`, in this user namespace only."""
    folder = Path("/proc/sys/fs/binfmt_misc")
    try:
        mount("binfmt_misc", folder, "binfmt_misc")
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; it needs Linux 6.7 or newer") from error

    def escaped(digits: str) -> str:
        return "".join(f"\\x{digits[place : place + 2]}" for place in range(0, len(digits), 2))

    # O, C: open the program with its own rights. F: the emulator is opened now, and need not lie in the chroot.
    (folder / "register").write_text(f":aarch64:M::{escaped(MAGIC)}:{escaped(MASK)}:{emulator}:OCF")


def furnish(rootfs: Path, run: Path, root: Path) -> None:
    """Mount the file system that the program sees at `root`."""
    mount(rootfs, root, flags=BIND)
    mount(rootfs, root, flags=BIND | REMOUNT | READ_ONLY)
    mount("proc", root / "proc", "proc")
    mount(run / "cpuinfo", root / "proc/cpuinfo", flags=BIND)
    mount(run / "sys", root / "sys", flags=BIND)
    mount(run / "passwd", root / "etc/passwd", flags=BIND)
    mount(run / "bin", root / "usr/local/bin", flags=BIND)
    mount(run / "home", next((root / "home").iterdir()), flags=BIND)
    mount("dev", root / "dev", "tmpfs", options="mode=755")
    for name in ("null", "zero", "full", "random", "urandom", "tty"):
        (root / "dev" / name).touch()
        mount(Path("/dev") / name, root / "dev" / name, flags=BIND)
    (root / "dev/fd").symlink_to("/proc/self/fd")
    for name in ("dev/shm", "tmp"):
        (root / name).mkdir(exist_ok=True)
        mount("tmpfs", root / name, "tmpfs", options="mode=1777")
    mount("tmpfs", root / "run", "tmpfs", options="mode=755")
    (root / "run/sshd").mkdir()


def inside(rootfs: Path, run: Path, emulator: str, program: list[str]) -> None:
    """As process 1 of the new namespaces: mount, change root, become the program."""
    os.setgid(0)
    os.setuid(0)
    socket.sethostname("raspberrypi")
    mount("none", Path("/"), flags=RECURSIVE | PRIVATE)
    mount("proc", Path("/proc"), "proc")
    register_emulator(emulator)
    root = run / "root"
    root.mkdir()
    furnish(rootfs, run, root)
    os.chroot(root)
    os.chdir("/")
    os.execve(program[0], program, {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "LANG": "C.UTF-8"})


def main(argv: list[str]) -> int:
    rootfs, run, emulator, *program = argv[1:]
    child_is_ready, map_is_written = os.pipe(), os.pipe()
    parent = os.fork()
    if parent:
        os.close(child_is_ready[1])
        os.read(child_is_ready[0], 1)
        try:
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{parent}/{name}").write_text("0 0 65536")
        except OSError as error:
            print(error, file=sys.stderr, flush=True)
            return UNAVAILABLE
        os.write(map_is_written[1], b"x")
        signal.signal(signal.SIGTERM, lambda *_: os.kill(parent, signal.SIGKILL))
        return os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) & 255
    try:
        LIBC.prctl(DIE_WITH_PARENT, signal.SIGKILL)
        os.close(map_is_written[1])
        check(LIBC.unshare(NEW_USER | NEW_MOUNTS | NEW_PIDS | NEW_NAME | NEW_IPC), "making namespaces")
        os.close(child_is_ready[1])
        if not os.read(map_is_written[0], 1):
            os._exit(UNAVAILABLE)  # the user map was refused
        # The change of user cleared it.
        LIBC.prctl(DIE_WITH_PARENT, signal.SIGKILL)
        if process := os.fork():
            os._exit(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) & 255)
        LIBC.prctl(DIE_WITH_PARENT, signal.SIGKILL)
        inside(Path(rootfs), Path(run), emulator, program)
    except BaseException as error:
        print(error, file=sys.stderr, flush=True)
    os._exit(UNAVAILABLE)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
