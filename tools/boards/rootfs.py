"""An arm64 Debian of the release that apt here is set up for, with Python, the runtime and sshd.

Packages are unpacked, their scripts never run, so that building needs no emulation: what the scripts
would have made and a board needs is written here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from boards import cache
from boards.apt import Apt, unpack
from edgeprune.device.install import platform_tags
from edgeprune.device.runtimes import onnxruntime, tflite

PACKAGES = (
    "base-files", "bash", "busybox-static", "coreutils", "dash", "findutils", "grep", "gzip", "hostname", "iproute2",
    "libc-bin", "libgcc-s1", "libgomp1", "libstdc++6", "mount", "netbase", "openssh-server", "openssh-sftp-server",
    "procps", "python3", "python3-venv", "sed", "tar", "tcsh", "util-linux",
)  # fmt: skip
USER, UID = "pi", 1000
ETC = {
    "passwd": f"""\
root:*:0:0:root:/root:/bin/bash
nobody:*:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
sshd:*:100:65534:sshd:/run/sshd:/usr/sbin/nologin
{USER}:*:{UID}:{UID}:stand-in board:/home/{USER}:/bin/bash
""",
    "group": f"root:*:0:\ntty:*:5:\nvideo:*:44:{USER}\n{USER}:*:{UID}:\nnogroup:*:65534:\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "hosts": "127.0.0.1 localhost board\n",
    "hostname": "board\n",
    # The sandbox of a server that serves one key on loopback buys nothing, and qemu-user has no seccomp.
    "ssh/sshd_config": f"""\
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/authorized_keys
AllowUsers {USER}
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UseDNS no
PidFile none
Subsystem sftp internal-sftp
""",
}
REQUIREMENTS = sorted({text for member in (onnxruntime, tflite) for text in member.WHEELS[0]["requirements"]})
GLIBC = re.compile(rb"GNU C Library \(.*?\) stable release version (\d+)\.(\d+)")


def build_rootfs() -> Path:
    """The folder with `root/` and the keys of its sshd; built when it is not there. raises: CannotBuild."""
    digest = cache.recipe_digest(Path(__file__), *REQUIREMENTS)
    return cache.built("rootfs-arm64", digest, _build)


def _build(folder: Path) -> None:
    rootfs = folder / "root"
    for name in ("bin", "sbin", "lib"):
        (rootfs / "usr" / name).mkdir(parents=True)
        (rootfs / name).symlink_to(f"usr/{name}")
    with tempfile.TemporaryDirectory() as temporary:
        unpack(Apt(Path(temporary), "arm64").download(PACKAGES), rootfs)
    for name in ("dev", "proc", "sys", "run", "tmp", "root", "usr/local/bin", f"home/{USER}"):
        (rootfs / name).mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0:
        os.chown(rootfs / f"home/{USER}", UID, UID)
    (rootfs / "tmp").chmod(0o1777)
    for name, text in ETC.items():
        (rootfs / "etc" / name).parent.mkdir(exist_ok=True)
        (rootfs / "etc" / name).write_text(text)
    for name in ("host_key", "client_key"):
        cache.command(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "stand-in", "-f", folder / name])
    shutil.copy(folder / "host_key", rootfs / "etc/ssh/host_key")
    shutil.copy(folder / "client_key.pub", rootfs / "etc/ssh/authorized_keys")
    _install_runtime(rootfs)
    shutil.rmtree(rootfs / "usr/share/doc")
    shutil.rmtree(rootfs / "usr/share/locale", ignore_errors=True)


def _install_runtime(rootfs: Path) -> None:
    """Put the runtime's wheels where the board's Python looks, and compile everything once."""
    interpreter = next((rootfs / "usr/bin").glob("python3.[0-9]*"))
    version = interpreter.name.removeprefix("python")
    match = GLIBC.search((rootfs / "usr/lib/aarch64-linux-gnu/libc.so.6").read_bytes())
    if match is None:
        raise cache.CannotBuild("the board's libc does not say its version")
    site = rootfs / f"usr/local/lib/python{version}/dist-packages"
    argv = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    argv += ["--target", str(site), "--only-binary=:all:", "--implementation", "cp", "--python-version", version]
    for tag in platform_tags("aarch64", (int(match[1]), int(match[2]))):
        argv += ["--platform", tag]
    cache.command([*argv, *_like_here()])
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        # Else every start of the agent compiles everything anew, in emulation.
        folders = [str(rootfs / f"usr/lib/python{version}"), str(site)]
        argv = [sys.executable, "-m", "compileall", "-qq", "-j0", "--invalidation-mode", "unchecked-hash"]
        subprocess.run([*argv, "-s", str(rootfs), "-p", "/", *folders], check=False, capture_output=True)


def _like_here() -> list[str]:
    """The runtimes in the versions installed here, so that artifacts made here run there."""
    from importlib.metadata import PackageNotFoundError, version

    wanted = []
    for requirement in REQUIREMENTS:
        module = re.split("[<>=]", requirement)[0]
        try:
            wanted.append(f"{module}=={version(module)}")
        except PackageNotFoundError:
            wanted.append(requirement)
    return wanted
