"""Debian packages of any architecture, from the sources that apt here is set up for; nothing is installed.

apt's own configuration (sources, proxies, certificates) is kept, its state, cache and hooks are not:
those lie in a folder of ours, so that the system's package lists and caches stay as they are.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from boards.cache import CannotBuild, command

NATIVE = {"x86_64": "amd64", "aarch64": "arm64"}
INSTALLED = Path("/var/lib/dpkg/status")
OURS = re.compile(r"^(APT::Architecture|Dir::State|Dir::Cache|Dir::Etc::(parts|main)|.*Invoke|APT::Sandbox)")


def native_architecture() -> str:
    """Debian's name for this machine's architecture."""
    return NATIVE.get(platform.machine(), platform.machine())


class Apt:
    """apt with a state of its own."""

    def __init__(self, folder: Path, architecture: str) -> None:
        """folder: for lists and downloads. architecture: Debian's name.

        For this machine's own architecture, what is installed here counts as there; for another nothing does.
        raises: CannotBuild when there is no apt, or it cannot reach its sources.
        """
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            raise CannotBuild("stand-in boards are made of Debian packages: this machine has no apt-get and dpkg-deb")
        for name in ("state/lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True)
        status = folder / "status"
        status.write_bytes(INSTALLED.read_bytes() if architecture == native_architecture() else b"")
        system = command(["apt-config", "dump"]).decode().splitlines()
        ours = {
            "APT::Architecture": architecture,
            "APT::Architectures": architecture,
            "APT::Sandbox::User": "",
            "Acquire::Languages": "none",
            "Dir::State": folder / "state",
            "Dir::State::status": status,
            "Dir::Cache": folder / "cache",
            "Dir::Etc::parts": "/dev/null",
            "Dir::Etc::main": "/dev/null",
        }
        lines = [line for line in system if not OURS.match(line)]
        (folder / "apt.conf").write_text("\n".join([*lines, *(f'{key} "{value}";' for key, value in ours.items())]))
        self._folder = folder
        self._environment = {**os.environ, "APT_CONFIG": str(folder / "apt.conf"), "LC_ALL": "C.UTF-8"}
        self._run("apt-get", "update", "--quiet", "--error-on=any")

    def download(self, packages: Sequence[str], *, with_dependencies: bool = True) -> list[Path]:
        """The .deb files of packages, and of all that they need and is not there. raises: CannotBuild."""
        if with_dependencies:
            self._run("apt-get", "install", "--yes", "--quiet", "--download-only", "--no-install-recommends", *packages)
            return sorted((self._folder / "cache/archives").glob("*.deb"))
        folder = self._folder / f"only-{packages[0]}"
        folder.mkdir()
        self._run("apt-get", "download", "--quiet", *packages, cwd=folder)
        return sorted(folder.glob("*.deb"))

    def first_dependency(self, package: str, pattern: str) -> str:
        """The dependency of a package whose name fits: what a name without a version stands for."""
        listed = self._run("apt-cache", "depends", package).decode()
        match = re.search(rf"Depends: ({pattern})$", listed, re.MULTILINE)
        if match is None:
            raise CannotBuild(f"apt knows no {package} that depends on {pattern}")
        return match[1]

    def _run(self, *argv: str, cwd: Path | None = None) -> bytes:
        return command(argv, env=self._environment, cwd=cwd, stdin=subprocess.DEVNULL)


def unpack(debs: Sequence[Path], into: Path) -> None:
    """Put the files of packages into a folder; their scripts do not run."""
    for deb in debs:
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as archive:
            # Without the option a package with /bin would replace the link /bin -> usr/bin.
            command(["tar", "-x", "--keep-directory-symlink", "-C", into], stdin=archive.stdout)
        if archive.returncode != 0:
            raise CannotBuild(f"{deb.name} cannot be unpacked")
