"""Programs of this machine that the boards need: those installed, else unpacked beside the boards."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from boards import cache
from boards.apt import Apt, native_architecture, unpack

PACKAGES = {"qemu-system-aarch64": "qemu-system-arm", "qemu-aarch64-static": "qemu-user-static", "mke2fs": "e2fsprogs"}


@dataclass(frozen=True, slots=True)
class Tool:
    """A program and what it needs to run from where it lies."""

    path: Path
    environment: dict[str, str]
    share: Path


def find_tool(name: str) -> Tool:
    """The program of that name, downloaded where it is not installed. raises: CannotBuild."""
    installed = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if installed is not None:
        return Tool(Path(installed), dict(os.environ), Path("/usr/share"))
    package = PACKAGES[name]

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            unpack(Apt(Path(temporary), native_architecture()).download([package]), folder)
        for other in folder.glob("usr/bin/qemu-*"):
            if other.name != name:
                other.unlink()  # emulators of every architecture there is: hundreds of megabytes

    folder = cache.built(package, cache.recipe_digest(package, Path(__file__)), build)
    found = (folder / place / name for place in ("usr/bin", "usr/sbin", "bin", "sbin"))
    path = next((path for path in found if path.exists()), None)
    if path is None:
        raise cache.CannotBuild(f"the package {package} has no {name}")
    libraries = sorted({str(library.parent) for library in folder.rglob("*.so*")})
    searched = [*libraries, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return Tool(path, {**os.environ, "LD_LIBRARY_PATH": ":".join(searched)}, folder / "usr/share")
