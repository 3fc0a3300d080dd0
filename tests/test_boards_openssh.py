"""The OpenSSH board, its way without a port, and a bad network in front of a board."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from boards.__main__ import write_target
from boards.image import make_cpio
from boards.link import Link
from boards.openssh import SSHD, openssh_board
from loopback.models import write_model

from edgeprune.core.records import Step, Target
from edgeprune.device.session import open_session
from edgeprune.device.targets import check_target, read_target

pytestmark = pytest.mark.device
needs_sshd = pytest.mark.skipif(
    SSHD is None, reason="OpenSSH's server is not installed: apt-get install openssh-server"
)


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Target]:
    (tmp_path / "sshd").mkdir()
    with openssh_board(tmp_path / "sshd") as target:
        yield replace(target, workdir=str(tmp_path / "work"))


@needs_sshd
def test_without_a_port(tmp_path: Path) -> None:
    """`sshd -i` on a pair of pipes, which the target's configuration names as the way there."""
    with openssh_board(tmp_path, port=False) as target:
        assert check_target(target).runtimes


@needs_sshd
def test_slow_link_only_takes_longer(board: Target, tmp_path: Path) -> None:
    model = write_model(tmp_path / "net.onnx")
    with (
        Link(board, bytes_per_s=200_000, delay_s=0.02) as slow,
        open_session(slow) as session,
    ):
        session.push({"net.onnx": model})
        steps = [Step(key=key, kind="time", artifact="net.onnx", seconds=0.02, min_samples=3) for key in ("a", "b")]
        assert [result.error for result in session.run(steps, job="slow")] == [None, None]


@needs_sshd
def test_link_cut_while_a_file_is_on_its_way(board: Target, tmp_path: Path) -> None:
    """What arrives is whole, over a second connection."""
    content = bytes(range(256)) * 2048
    (tmp_path / "big").write_bytes(content)
    link = Link(board, bytes_per_s=1_000_000)
    cuts: list[int] = []

    def cut_half_way(what: str, done: int, total: int) -> None:
        if total == len(content) and done > total // 2 and not cuts:
            cuts.append(done)
            link.cut()

    with link as target, open_session(target, progress=cut_half_way) as session:
        session.push({"big": tmp_path / "big"})
        session.fetch("big", tmp_path / "back")
    assert cuts and link.connections > 1
    assert (tmp_path / "back").read_bytes() == content


def test_target_file_of_a_running_board(tmp_path: Path) -> None:
    target = Target(
        name="x",
        board="raspberry_pi",
        address={"host": "127.0.0.1", "port": 22, "key": 'a "b"\\'},
        python=sys.executable,
    )
    write_target(target, tmp_path / "x.toml")
    assert read_target(tmp_path / "x.toml") == target


def test_cpio_archive_is_what_cpio_reads(tmp_path: Path) -> None:
    """Sizes and padding of the kernel's format, read back by its own rules."""
    files = {"bin": None, "bin/a": b"12345", "init": b"#!\n"}
    data, found, place = make_cpio(files), {}, 0
    while True:
        fields = [int(data[place + 6 + 8 * i : place + 14 + 8 * i], 16) for i in range(13)]
        assert data[place : place + 6] == b"070701"
        name = data[place + 110 : place + 110 + fields[11] - 1].decode()
        start = place + 110 + fields[11] + -(110 + fields[11]) % 4
        if name == "TRAILER!!!":
            break
        found[name] = data[start : start + fields[6]] if fields[1] & 0o100000 else None
        place = start + fields[6] + -fields[6] % 4
    assert found == files
