"""The board is reached over SSH: commands through exec, files through SFTP, one connection for both.

Host keys are always verified. A connection that is lost is made again, for as long as `patience_s`
says, and what was going on is repeated.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import paramiko

from edgeprune.core.errors import ConnectionLost, DeviceError, HostKeyError
from edgeprune.device.transports import Finished
from edgeprune.device.transports._ssh_address import DEFAULT_PORT, Address, resolve_address

KEEPALIVE_S = 15
FILE_TIMEOUT_S = 60.0
FIRST_BACKOFF_S = 0.2
LONGEST_BACKOFF_S = 5.0
MAX_REPEATS = 5

# Without a handler of its own, paramiko's tracebacks of refused connections would land on stderr.
logging.getLogger("paramiko").addHandler(logging.NullHandler())

T = TypeVar("T")


def connect(address: Mapping[str, Any], *, name: str, trust_new_host: bool = False) -> SshTransport:
    """Log in to a board.

    address: host (or an alias of ~/.ssh/config), and optionally port, user, key, known_hosts, config,
        timeout_s, patience_s.
    name, trust_new_host, raises: see `transports.Member`.
    """
    transport = SshTransport(resolve_address(address, name=name), name, trust_new_host)
    transport.log_in()
    return transport


class _HostKeyPolicy(paramiko.MissingHostKeyPolicy):
    """Refuse a host key that is not known, or remember it where the user said so."""

    def __init__(self, address: Address, name: str, trust_new_host: bool) -> None:
        self._address = address
        self._name = name
        self._trust_new_host = trust_new_host

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        del client
        if _trusted_keys(self._address).lookup(hostname):
            # A key of another kind than the trusted one: to a client that is a changed key too.
            raise _changed_key(self._address, self._name, key)
        file = self._address.known_hosts[0]
        if not self._trust_new_host:
            raise HostKeyError(
                f"target {self._name}: {self._address} shows a host key that is not in {file}: {key.get_name()} "
                f"{key.fingerprint}. Compare it with the board's own (ssh-keygen -lf /etc/ssh/ssh_host_*_key.pub), "
                f"then: edgeprune targets check {shlex.quote(self._name)} --trust"
            )
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with file.open("a+") as known_hosts:
            known_hosts.seek(max(0, known_hosts.seek(0, os.SEEK_END) - 1))
            ended = known_hosts.read() in ("", "\n")
            known_hosts.write(f"{'' if ended else os.linesep}{hostname} {key.get_name()} {key.get_base64()}\n")


def _trusted_keys(address: Address) -> paramiko.HostKeys:
    keys = paramiko.HostKeys()
    for file in address.known_hosts:
        if file.is_file():
            keys.load(str(file))
    return keys


def _changed_key(address: Address, name: str, key: paramiko.PKey) -> HostKeyError:
    host = address.host if address.port == DEFAULT_PORT else f"[{address.host}]:{address.port}"
    return HostKeyError(
        f"target {name}: the host key of {address} CHANGED: it shows {key.get_name()} {key.fingerprint}, "
        f"{address.known_hosts[0]} has another. Either the board was set up anew or someone stands in between. "
        f"When you know that it is the board: ssh-keygen -f {shlex.quote(str(address.known_hosts[0]))} "
        f"-R {shlex.quote(host)}"
    )


def _explain_refusal(address: Address) -> str:
    for key in address.keys:
        try:
            paramiko.PKey.from_path(key)
        except (paramiko.PasswordRequiredException, TypeError):
            # cryptography says TypeError of a key that needs a password.
            return f"needs the key {key}, which is encrypted; unlock it first: ssh-add {shlex.quote(key)}"
        except (OSError, ValueError, paramiko.SSHException) as error:
            return f"needs the key {key}, which cannot be read: {error}"
    shown = " or ".join(address.keys) or "any key of the SSH agent or of ~/.ssh"
    return f"does not accept {shown}; let it: ssh-copy-id -p {address.port} {address.user or 'USER'}@{address.host}"


class SshTransport:
    """See `transports.Transport`."""

    def __init__(self, address: Address, name: str, trust_new_host: bool) -> None:
        self._address = address
        self._name = name
        self._trust_new_host = trust_new_host
        self._client: paramiko.SSHClient | None = None
        self._sftp: paramiko.SFTPClient | None = None

    def log_in(self) -> None:
        """Connect once. raises: HostKeyError; ConnectionLost, saying what to do."""
        address = self._address
        client = paramiko.SSHClient()
        try:
            for file in address.known_hosts:
                if file.is_file():
                    client.load_system_host_keys(str(file))
            client.set_missing_host_key_policy(_HostKeyPolicy(address, self._name, self._trust_new_host))
            client.connect(
                address.host,
                address.port,
                address.user,
                key_filename=list(address.keys) or None,  # type: ignore[arg-type]  # the stubs know of one only
                look_for_keys=not address.keys,
                sock=paramiko.ProxyCommand(address.proxy) if address.proxy else None,
                timeout=address.timeout_s,
                banner_timeout=address.timeout_s,
                auth_timeout=address.timeout_s,
            )
        except paramiko.BadHostKeyException as error:
            client.close()
            raise _changed_key(address, self._name, error.key) from error
        except (OSError, EOFError, paramiko.SSHException) as error:
            link = client.get_transport()
            refused = link is not None and link.initial_kex_done and link.is_active()
            client.close()
            if refused:
                raise ConnectionLost(f"target {self._name}: {address} {_explain_refusal(address)}") from error
            raise ConnectionLost(
                f"target {self._name}: {address} cannot be reached ({str(error) or type(error).__name__}); "
                "is it on, and does it run an SSH server?"
            ) from error
        except BaseException:
            client.close()
            raise
        transport = client.get_transport()
        assert transport is not None
        transport.set_keepalive(KEEPALIVE_S)
        if isinstance(transport.sock, socket.socket):
            # SFTP is small questions and answers: without this each waits 40 ms for an acknowledgement.
            transport.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._client = client

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60.0) -> Finished:
        command = shlex.join(argv)

        def execute() -> Finished:
            deadline = time.monotonic() + timeout
            with contextlib.closing(self._link().open_session(timeout=self._address.timeout_s)) as channel:
                channel.settimeout(timeout)
                channel.exec_command(command)
                errors: list[bytes] = []
                drain = threading.Thread(target=_drain_errors, args=(channel, errors), daemon=True)
                drain.start()
                channel.sendall(stdin)
                channel.shutdown_write()
                output = b"".join(_chunks(channel, deadline))
                drain.join(max(0.0, deadline - time.monotonic()))
                if not channel.status_event.wait(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                rc = channel.recv_exit_status()
                if rc < 0 and not self._link().is_active():
                    raise EOFError("cut before the command ended")
                return Finished(rc, output, b"".join(errors))

        return self._persist(f"{argv[0]} ({timeout:g} s)", execute)

    def put(self, source: Path, path: str, advance: Callable[[int], None]) -> None:
        def copy() -> None:
            sent = 0

            def progress(done: int, total: int) -> None:
                nonlocal sent
                del total
                advance(done - sent)
                sent = done

            with source.open("rb") as file:
                self._files().putfo(file, f"{path}.part", callback=progress)
            self._files().posix_rename(f"{path}.part", path)

        self._persist(f"copying {source.name}", copy)

    def get(self, path: str, destination: Path) -> None:
        def copy() -> None:
            handle, temporary = tempfile.mkstemp(dir=destination.parent, prefix=f".{destination.name[:64]}.")
            try:
                with os.fdopen(handle, "wb") as file:
                    self._files().getfo(path, file)
                os.replace(temporary, destination)
            except BaseException:
                Path(temporary).unlink()
                raise

        self._persist(f"fetching {path}", copy)

    def write(self, path: str, data: bytes) -> None:
        def store() -> None:
            with self._files().open(f"{path}.part", "wb") as file:
                file.write(data)
            self._files().posix_rename(f"{path}.part", path)

        self._persist(f"writing {path}", store)

    def read(self, path: str, offset: int = 0) -> bytes:
        def load() -> bytes:
            try:
                with self._files().open(path, "rb") as file:
                    file.seek(offset)
                    return file.read()
            except FileNotFoundError:
                return b""

        return self._persist(f"reading {path}", load)

    def sizes(self, folder: str) -> dict[str, int]:
        def look() -> dict[str, int]:
            try:
                return {entry.filename: entry.st_size or 0 for entry in self._files().listdir_attr(folder)}
            except FileNotFoundError:
                return {}

        return self._persist(f"listing {folder}", look)

    def close(self) -> None:
        client, self._client, self._sftp = self._client, None, None
        if client is not None:
            client.close()

    def _link(self) -> paramiko.Transport:
        link = self._client.get_transport() if self._client is not None else None
        if link is None:
            raise EOFError("not connected")
        return link

    def _files(self) -> paramiko.SFTPClient:
        if self._sftp is None:
            self._link()
            assert self._client is not None
            try:
                sftp = self._client.open_sftp()
            except (EOFError, paramiko.SSHException) as error:
                if not self._link().is_active():
                    raise
                raise DeviceError(
                    f"target {self._name}: {self._address} offers no SFTP; on the board: "
                    "sudo apt-get install -y openssh-sftp-server"
                ) from error
            channel = sftp.get_channel()
            assert channel is not None
            channel.settimeout(FILE_TIMEOUT_S)
            self._sftp = sftp
        return self._sftp

    def _persist(self, what: str, operation: Callable[[], T]) -> T:
        """Do it, and again after connecting again, as long as it is the connection that fails."""
        timed_out = False
        for _ in range(MAX_REPEATS):
            try:
                return operation()
            except DeviceError:
                raise
            except TimeoutError as error:
                # Either it takes too long or nobody is there any more: a new connection tells.
                if timed_out:
                    raise DeviceError(f"target {self._name}: {what} did not come to an end") from error
                timed_out = True
                cause: Exception = error
            except (EOFError, OSError, paramiko.SSHException) as error:
                if isinstance(error, OSError) and self._is_up():
                    raise  # the file, not the connection
                cause = error
            self._reconnect(cause)
        raise ConnectionLost(
            f"target {self._name}: {self._address} hangs up during {what}, {MAX_REPEATS} times in a row"
        )

    def _is_up(self) -> bool:
        link = self._client.get_transport() if self._client is not None else None
        channel = self._sftp.get_channel() if self._sftp is not None else None
        return link is not None and link.is_active() and channel is not None and not channel.closed

    def _reconnect(self, cause: Exception) -> None:
        limit = time.monotonic() + self._address.patience_s
        pause = FIRST_BACKOFF_S
        while True:
            self.close()
            try:
                self.log_in()
                return
            except HostKeyError:
                raise
            except ConnectionLost as error:
                if time.monotonic() + pause > limit:
                    reason = str(cause) or type(cause).__name__
                    raise ConnectionLost(
                        f"target {self._name}: the connection to {self._address} was lost ({reason}) and did not come "
                        f"back in {self._address.patience_s:g} s. What the agent has measured is kept on the board: "
                        "run the same command again to go on"
                    ) from error
            time.sleep(pause)
            pause = min(pause * 2, LONGEST_BACKOFF_S)


def _chunks(channel: paramiko.Channel, deadline: float) -> Iterator[bytes]:
    """What a command prints until it closes its output. raises: TimeoutError at the deadline."""
    while True:
        channel.settimeout(max(0.01, deadline - time.monotonic()))
        if not (data := channel.recv(65536)):
            return
        yield data


def _drain_errors(channel: paramiko.Channel, into: list[bytes]) -> None:
    # Read beside stdout: a command that fills one pipe while we wait on the other would stand still.
    with contextlib.suppress(OSError, EOFError):
        while data := channel.recv_stderr(65536):
            into.append(data)
