"""arm64 programs under qemu-user behind an arm64 sshd: `uname -m` says aarch64, the sensors are a Raspberry Pi's.

Every program is the board's own, from sshd to Python and the runtime, so that wheels, paths, libc and sensors are
what they are on a Pi. Times are the host's, some hundred times too long and noisy: nothing is to be read from them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

from boards._namespace import UNAVAILABLE
from boards._server import die_with_parent, end, free_port, ssh_address, wait_for_banner
from boards.cache import CannotBuild
from boards.host_tools import find_tool
from boards.rootfs import UID, USER, build_rootfs
from edgeprune.core.errors import DeviceError
from edgeprune.core.records import Target

START_S = 60.0
NAMESPACE = Path(__file__).with_name("_namespace.py")
CORES = 4
CPU = "cortex-a72"
"""What programs see; qemu's own choice has extensions that no Pi has, and runtimes then take other kernels."""
# As a Raspberry Pi 4's /proc/cpuinfo under a 64-bit kernel; the serial number is made up.
CORE = """\
processor	: {number}
BogoMIPS	: 108.00
Features	: fp asimd evtstrm crc32 cpuid
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x0
CPU part	: 0xd08
CPU revision	: 3

"""
MODEL = "Raspberry Pi 4 Model B Rev 1.2"
REVISION = f"Revision	: c03112\nSerial		: 10000000abcdef01\nModel		: {MODEL}\n"
THROTTLED = "devices/platform/soc/soc:firmware/get_throttled"
SYS = {
    "class/thermal/thermal_zone0/type": "cpu-thermal",
    "class/thermal/thermal_zone0/temp": "48312",
    "devices/system/cpu/online": f"0-{CORES - 1}",
    "devices/system/cpu/possible": f"0-{CORES - 1}",
    "devices/system/cpu/present": f"0-{CORES - 1}",
    "devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand",
    "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1500000",
    THROTTLED: "0",
}
# The firmware's command in what of it edgeprune asks; formats as in edgeprune/device/boards/raspberry_pi.py.
VCGENCMD = f"""\
#!/bin/sh
case "$1" in
measure_temp) t=$(cat /sys/class/thermal/thermal_zone0/temp); echo "temp=$((t / 1000)).$((t % 1000 / 100))'C" ;;
get_throttled) echo "throttled=0x$(cat /sys/{THROTTLED})" ;;
measure_clock) echo "frequency(48)=$(cat /sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq)000" ;;
measure_volts) echo "volt=0.8563V" ;;
*) echo 'error=1 error_msg="Command not registered"'; exit 255 ;;
esac
"""


class RaspiBoard:
    """A board that lives as long as the `with` block, and gives the target that reaches it."""

    def __init__(self, *, name: str = "raspi", shell: str = "/bin/bash") -> None:
        """shell: of the user, who logs in with it; `/bin/tcsh` and `/bin/dash` are there too."""
        self._name = name
        self._shell = shell
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._port = 0

    def __enter__(self) -> Target:
        """Start, in a second. raises: CannotBuild; DeviceError when it does not start."""
        if os.geteuid() != 0:
            raise CannotBuild("the raspi board needs root, for namespaces in which arm64 programs run")
        built = build_rootfs()
        self._folder = tempfile.TemporaryDirectory(prefix="edgeprune-raspi-")
        folder = Path(self._folder.name)
        folder.chmod(0o755)
        try:
            for name in ("sys", "bin", "home"):
                (folder / name).mkdir()
            os.chown(folder / "home", UID, UID)
            passwd = (built / "root/etc/passwd").read_text()
            (folder / "passwd").write_text(passwd.replace(f"/home/{USER}:/bin/bash", f"/home/{USER}:{self._shell}"))
            cores = "".join(CORE.format(number=number) for number in range(CORES))
            (folder / "cpuinfo").write_text(cores + REVISION)
            for path, text in SYS.items():
                (folder / "sys" / path).parent.mkdir(parents=True, exist_ok=True)
                self.set_sensor(path, text)
            (folder / "bin/vcgencmd").write_text(VCGENCMD)
            (folder / "bin/vcgencmd").chmod(0o755)
            self._port = free_port()
            self.power_on()
        except BaseException:
            self.close()
            raise
        address = ssh_address(
            folder, self._port, USER, host_key=built / "host_key.pub", client_key=built / "client_key", timeout_s=30
        )
        return Target(
            name=self._name, board="raspberry_pi", transport="ssh", address=address, python="/usr/bin/python3",
            description="arm64 programs under qemu-user, a Raspberry Pi's sensors; times mean nothing",
        )  # fmt: skip

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def home(self) -> Path:
        """The folder here that is the user's home there."""
        assert self._folder is not None
        return Path(self._folder.name) / "home"

    def set_sensor(self, path: str, text: str) -> None:
        """Write a file under the board's /sys; THROTTLED takes the firmware's flags in hexadecimal."""
        assert self._folder is not None
        (Path(self._folder.name) / "sys" / path).write_text(f"{text}\n")

    def power_on(self) -> None:
        """Start sshd and wait for it. What was written under the user's home is still there. raises: DeviceError."""
        assert self._folder is not None and self._server is None
        folder = Path(self._folder.name)
        emulator = find_tool("qemu-aarch64-static").path
        argv = [
            sys.executable,
            str(Path(__file__).with_name("_namespace.py")),
            str(build_rootfs() / "root"),
            str(folder),
        ]
        argv += [str(emulator), "/usr/sbin/sshd", "-D", "-e", "-p", str(self._port), "-o", "ListenAddress=127.0.0.1"]
        argv += ["-o", f"SetEnv=QEMU_CPU={CPU}"]
        with (folder / "sshd.log").open("ab") as log:
            self._server = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_parent
            )
        try:
            wait_for_banner(self._port, self._server, folder / "sshd.log", START_S)
        except DeviceError as error:
            if self._server.poll() == UNAVAILABLE:
                said = (folder / "sshd.log").read_text(errors="replace").strip()
                raise CannotBuild(f"this machine cannot run arm64 programs in namespaces: {said[-300:]}") from error
            raise

    def power_off(self) -> None:
        """Kill every process of the board at once."""
        server, self._server = self._server, None
        if server is not None:
            end(server)
            assert self._folder is not None
            (Path(self._folder.name) / "root").rmdir()  # its mounts went with the namespace

    def reboot(self) -> None:
        """All processes gone, and sshd started again. raises: DeviceError."""
        self.power_off()
        self.power_on()

    def close(self) -> None:
        """Stop, and delete what was written."""
        if self._folder is not None:
            if self._server is not None:
                end(self._server)
                self._server = None
            self._folder.cleanup()
            self._folder = None
