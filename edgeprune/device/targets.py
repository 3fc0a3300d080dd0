"""The inventory: one TOML file per target, its name the file's; and what a target's board has and lacks.

Looked for in the folders of $EDGEPRUNE_TARGETS (separated as in $PATH), in ./targets, then among
those shipped with edgeprune; the first file of a name wins.
"""

from __future__ import annotations

import os
import site
import sysconfig
import tomllib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec

from edgeprune.core.errors import UnknownMember, UsageError
from edgeprune.core.family import list_members, load_member
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import BoardFacts, Target
from edgeprune.device.facts import gather_facts
from edgeprune.device.install import install_runtime
from edgeprune.device.meters import open_meter
from edgeprune.device.runtimes import open_runtime
from edgeprune.device.transports import Transport

CHECKED_FAMILIES = {"board": "boards", "transport": "transports", "runtime": "runtimes", "meter": "meters"}


def default_directories() -> list[Path]:
    """Where targets are looked for, most specific first."""
    named = [Path(part) for part in os.environ.get("EDGEPRUNE_TARGETS", "").split(os.pathsep) if part]
    checkout = Path(__file__).resolve().parents[2]
    shipped = [checkout / "targets"] if (checkout / "pyproject.toml").is_file() else []
    installed = [
        Path(base) / "share" / "edgeprune" / "targets" for base in (sysconfig.get_path("data"), site.USER_BASE) if base
    ]
    return [*named, Path("targets"), *shipped, *installed]


def list_targets(directories: Sequence[Path] | None = None) -> dict[str, Path]:
    """Name -> file of every target, sorted by name."""
    found: dict[str, Path] = {}
    for directory in default_directories() if directories is None else directories:
        if directory.is_dir():
            for path in directory.glob("*.toml"):
                found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def runtime_format(runtime: str) -> str:
    """The member of `formats` whose files a runtime runs. raises: UnknownMember."""
    name: str = load_member("device.runtimes", runtime.partition(":")[0]).FORMAT
    return name


def load_target(name: str, directories: Sequence[Path] | None = None) -> Target:
    """The target of that name.

    raises: UnknownMember, listing the known ones; UsageError when its file cannot be right.
    """
    known = list_targets(directories)
    if name not in known:
        listed = ", ".join(known) or "none"
        raise UnknownMember(f"unknown target '{name}'; known: {listed}. Add one as targets/NAME.toml")
    return read_target(known[name])


def read_target(path: Path) -> Target:
    """A target from its file. raises: UsageError; UnknownMember for a board, transport ... we do not have."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    known = {field.name for field in fields(Target)} - {"name"}
    if unknown := sorted(table.keys() - known):
        raise UsageError(f"{path}: unknown key {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    try:
        target = msgspec.convert({**table, "name": path.stem}, Target)
    except msgspec.ValidationError as error:
        raise UsageError(f"{path}: {error}") from error
    _check_fields(target, str(path))
    return target


def connect_target(target: Target, *, trust_new_host: bool = False) -> Transport:
    """The bare way to a target's board. raises: HostKeyError; ConnectionLost; UsageError."""
    member = load_member("device.transports", target.transport)
    transport: Transport = member.connect(target.address, name=target.name, trust_new_host=trust_new_host)
    return transport


def check_target(target: Target, *, trust_new_host: bool = False) -> BoardFacts:
    """What a target's board is and has, and in `missing` what it lacks, with the command that mends it.

    trust_new_host: remember a host key never seen before instead of refusing it.
    raises: HostKeyError; ConnectionLost; DeviceError.
    """
    with closing(connect_target(target, trust_new_host=trust_new_host)) as transport:
        return gather_facts(target, transport, thorough=True).facts


def setup_target(target: Target, *, offline: bool = False, progress: Progress = silent) -> BoardFacts:
    """Make a Python environment with the runtime in the target's workdir, and return the facts after it.

    offline: the board has no network; this machine downloads what fits the board, and copies it there.
    raises: BoardNotReady, saying what to do by hand; HostKeyError; ConnectionLost.
    """
    with closing(connect_target(target)) as transport:
        install_runtime(target, transport, gather_facts(target, transport), offline=offline, progress=progress)
        return gather_facts(target, transport, thorough=True).facts


def _check_fields(target: Target, where: str) -> None:
    """See that a target's fields can be right. raises: UsageError; UnknownMember."""
    for field, family in CHECKED_FAMILIES.items():
        value: Any = getattr(target, field)
        value = value.partition(":")[0] if field in ("meter", "runtime") else value
        if value not in (members := list_members(f"device.{family}")):
            raise UnknownMember(f"{where}: unknown {field} '{value}'; known: {', '.join(members)}")
    try:
        open_meter(target.meter)
        open_runtime(target.runtime)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    if target.threads < 1:
        raise UsageError(f"{where}: threads = {target.threads}; at least 1")
    for field in ("workdir", "python"):
        text = getattr(target, field)
        if text is not None and (not text or any(ord(character) < 32 for character in text)):
            raise UsageError(f"{where}: {field} = {text!r} is not a path")
