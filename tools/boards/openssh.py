"""This machine behind OpenSSH's own server: on loopback, or with no port at all through `sshd -i`."""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from boards._server import die_with_parent, end, free_port, ssh_address, wait_for_banner
from boards.cache import CannotBuild, command
from edgeprune.core.records import Target

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
START_S = 10.0
CONFIG = """\
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile {folder}/client_key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
AllowUsers {user}
UseDNS no
"""
SFTP = "Subsystem sftp internal-sftp\n"
# As root sshd wants the folder that a service manager would have made: made here in a /run of its own.
OWN_RUN = 'mount -t tmpfs -o mode=755 none /run && mkdir -m 755 /run/sshd && exec "$@"'


@contextlib.contextmanager
def openssh_board(folder: Path, *, sftp: bool = True, config: str = "", port: bool = True) -> Iterator[Target]:
    """A target that is reached through a real sshd as the current user, which lives as long as the block.

    folder: an empty one for keys and configuration. sftp: whether it offers it. config: more lines of
    sshd_config. port: False starts an sshd for every connection, on a pair of pipes instead of a port.
    raises: CannotBuild when OpenSSH's server is not installed.
    """
    if SSHD is None:
        raise CannotBuild("OpenSSH's server is not installed: apt-get install openssh-server")
    for name in ("host_key", "client_key"):
        command(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name])
    user, number = getpass.getuser(), free_port()
    text = CONFIG.format(folder=folder, user=user) + (SFTP if sftp else "") + config
    (folder / "sshd_config").write_text(text)
    argv = [*_with_own_run(), SSHD, "-e", "-f", str(folder / "sshd_config")]
    address = ssh_address(folder, number, user, host_key=folder / "host_key.pub", client_key=folder / "client_key")
    target = Target(name="openssh", address=address, python=sys.executable, description="this machine behind OpenSSH")
    if not port:
        proxy = shlex.join([*argv, "-i"])
        (folder / "ssh_config").write_text(f"Host 127.0.0.1\n  ProxyCommand {proxy}\n")
        address["config"] = str(folder / "ssh_config")
        yield target
        return
    with (folder / "sshd.log").open("w") as log:
        argv += ["-D", "-o", "ListenAddress=127.0.0.1", "-p", str(number)]
        server = subprocess.Popen(argv, stderr=log, preexec_fn=die_with_parent)
    try:
        wait_for_banner(number, server, folder / "sshd.log", START_S)
        yield target
    finally:
        end(server)


def _with_own_run() -> list[str]:
    """What starts a program with a /run/sshd, where it is needed; the system's own /run stays as it is."""
    if os.geteuid() != 0 or Path("/run/sshd").is_dir():
        return []
    return ["unshare", "--mount", "sh", "-c", OWN_RUN, "sh"]
