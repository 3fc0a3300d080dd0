"""Where an SSH board is: the target's [address] table together with the user's OpenSSH configuration."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paramiko

from edgeprune.core.errors import UsageError

DEFAULT_PORT = 22
KEYS = ("host", "port", "user", "key", "known_hosts", "config", "timeout_s", "patience_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where the board is and who we are there.

    keys: private key files; empty to try the agent and the usual ones. known_hosts: files of trusted
    host keys; a newly trusted one is added to the first. proxy: a command that stands for the socket.
    timeout_s: to connect. patience_s: to go on trying when a connection was lost.
    """

    host: str
    port: int
    user: str | None
    keys: tuple[str, ...]
    known_hosts: tuple[Path, ...]
    proxy: str | None
    timeout_s: float
    patience_s: float

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        return f"{user}{self.host}:{self.port}"


def resolve_address(address: Mapping[str, Any], *, name: str) -> Address:
    """An [address] table together with what ~/.ssh/config says of its host. raises: UsageError."""
    where = f"target {name}: [address]"
    if unknown := sorted(address.keys() - set(KEYS)):
        raise UsageError(f"{where} has unknown {', '.join(unknown)}; known: {', '.join(KEYS)}")
    alias = address.get("host")
    if not isinstance(alias, str) or not alias or alias.startswith("-"):
        raise UsageError(f'{where} needs host = "...", a name, an IP address or an alias of ~/.ssh/config')
    known = read_config(Path(address.get("config", "~/.ssh/config")).expanduser(), alias, where)
    try:
        port = int(address.get("port", known.get("port", DEFAULT_PORT)))
        timeout_s, patience_s = float(address.get("timeout_s", 15)), float(address.get("patience_s", 120))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: port, timeout_s and patience_s are numbers") from error
    keys = [address["key"]] if "key" in address else list(known.get("identityfile", []))
    keys = [str(Path(key).expanduser()) for key in keys]
    if "key" in address and not Path(keys[0]).is_file():
        raise UsageError(f"{where}: there is no key file {keys[0]}")
    files = [address["known_hosts"]] if "known_hosts" in address else known.get("userknownhostsfile", "").split()
    host = known.get("hostname", alias)
    proxy = known.get("proxycommand")
    if proxy is None and "proxyjump" in known and known["proxyjump"].lower() != "none":
        proxy = shlex.join(["ssh", "-W", f"{host}:{port}", "--", known["proxyjump"]])
    return Address(
        host=host,
        port=port,
        user=address.get("user", known.get("user")),
        keys=tuple(key for key in keys if Path(key).is_file()),
        known_hosts=tuple(Path(file).expanduser() for file in files or ["~/.ssh/known_hosts"]),
        proxy=None if proxy in (None, "none") else proxy,
        timeout_s=timeout_s,
        patience_s=patience_s,
    )


def read_config(path: Path, alias: str, where: str) -> dict[str, Any]:
    """What an OpenSSH client configuration says of one host. raises: UsageError when it cannot be read."""
    if not path.is_file():
        return {}
    try:
        return dict(paramiko.SSHConfig.from_path(str(path)).lookup(alias))
    except (
        paramiko.ConfigParseError,
        paramiko.CouldNotCanonicalize,
        OSError,
        UnicodeDecodeError,
        ImportError,
    ) as error:
        raise UsageError(f"{where}: cannot read {path}: {error}") from error
