"""The instruction-count board: an emulated arm64 machine on which one instruction takes one nanosecond.

qemu counts the instructions it emulates and derives the machine's clock from them (`-icount shift=0`), so
that a latency repeats to a few hundredths of a percent, however busy the host is. It knows no caches, no memory
bandwidth and no pipeline: memory-bound layers look too cheap. Rankings, budgets and the error of latency
tables can be tested on it; it says nothing about how fast a real Cortex is.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

from boards._server import die_with_parent, end, free_port, ssh_address, wait_for_banner
from boards.host_tools import find_tool
from boards.image import build_machine, make_disk
from boards.rootfs import USER
from edgeprune.core.records import Target

MEMORY_MIB = 1024
HOME_BYTES = 512 * 1024 * 1024
BOOT_S = 240.0
PATIENCE_S = 300
CPUS = ("cortex-a72", "cortex-a76")


class IcountBoard:
    """A machine that runs as long as the `with` block, and gives the target that reaches it.

    with IcountBoard() as target, open_session(target) as session:
        ...
    """

    def __init__(self, *, name: str = "icount", cpu: str = "cortex-a72", icount: bool = True) -> None:
        """cpu: what qemu emulates; `cortex-a76` has the int8 dot product, `cortex-a72` has not.

        icount: False gives a machine whose clock is the host's, a little faster to run and not repeatable.
        """
        self._name = name
        self._cpu = cpu
        self._icount = icount
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._machine: subprocess.Popen[bytes] | None = None
        self._port = 0

    def __enter__(self) -> Target:
        """Boot, about 10 s. raises: CannotBuild; DeviceError when it does not come up."""
        built = build_machine()
        self._folder = tempfile.TemporaryDirectory(prefix="edgeprune-icount-")
        folder = Path(self._folder.name)
        try:
            make_disk(folder / "home", HOME_BYTES)
            self._port = free_port()
            self.power_on()
        except BaseException:
            self.close()
            raise
        address = ssh_address(
            folder, self._port, USER, host_key=built / "host_key.pub", client_key=built / "client_key", timeout_s=60,
            patience_s=PATIENCE_S,
        )  # fmt: skip
        counting = "1 instruction = 1 ns, of no real board" if self._icount else "host's clock"
        return Target(
            name=self._name, board="linux", transport="ssh", address=address, python="/usr/bin/python3",
            description=f"emulated {self._cpu}, {counting}",
        )  # fmt: skip

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def console(self) -> str:
        """What the machine printed on its serial line, all boots together."""
        assert self._folder is not None
        return (Path(self._folder.name) / "console.log").read_text(errors="replace")

    def power_on(self) -> None:
        """Boot and wait for sshd. What was written under the user's home is still there. raises: DeviceError."""
        assert self._folder is not None and self._machine is None
        built, folder = build_machine(), Path(self._folder.name)
        tool = find_tool("qemu-system-aarch64")
        argv = [
            str(tool.path), "-L", str(tool.share / "qemu"), "-M", "virt,gic-version=2", "-cpu", self._cpu, "-smp", "1",
            "-m", str(MEMORY_MIB), "-nodefaults", "-no-reboot", "-display", "none", "-monitor", "none",
            "-chardev", f"file,id=console,path={folder}/console.log,append=on", "-serial", "chardev:console",
            "-kernel", str(built / "kernel"), "-initrd", str(built / "initrd"),
            "-append", f"console=ttyAMA0 panic=-1 quiet loglevel=3{' edgeprune.icount' if self._icount else ''}",
            "-drive", f"file={built}/disk,if=none,format=raw,id=disk,snapshot=on",
            "-drive", f"file={folder}/home,if=none,format=raw,id=home",
            # Later devices are found first: this makes the disk /dev/vda.
            "-device", "virtio-blk-device,drive=home", "-device", "virtio-blk-device,drive=disk",
            "-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{self._port}-:22",
            "-device", "virtio-net-device,netdev=net", "-device", "virtio-rng-device",
        ]  # fmt: skip
        if self._icount:
            argv += ["-icount", "shift=0"]
        with (folder / "qemu.log").open("ab") as log:
            self._machine = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**tool.environment, "TMPDIR": str(folder)},
                preexec_fn=die_with_parent,
            )  # fmt: skip
        wait_for_banner(self._port, self._machine, folder / "qemu.log", BOOT_S)

    def power_off(self) -> None:
        """Pull the plug: what the machine had not yet written to its disk is lost."""
        machine, self._machine = self._machine, None
        if machine is not None:
            machine.kill()
            machine.wait()

    def reboot(self) -> None:
        """Pull the plug and boot again. raises: DeviceError."""
        self.power_off()
        self.power_on()

    def close(self) -> None:
        """Switch off and delete what was written."""
        if self._machine is not None:
            end(self._machine)
            self._machine = None
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.cleanup()
