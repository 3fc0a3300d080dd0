"""What a whole emulated machine boots from: Debian's arm64 kernel, a small initramfs, a disk image."""

from __future__ import annotations

import gzip
import lzma
import tempfile
from pathlib import Path

from boards import cache
from boards.apt import Apt, unpack
from boards.host_tools import find_tool
from boards.rootfs import UID, USER, build_rootfs

KERNEL = "linux-image-cloud-arm64"
KERNEL_VERSION = r"linux-image-[0-9]\S*-cloud-arm64"
MODULES = (
    "virtio_ring", "virtio", "virtio_mmio", "virtio_blk", "failover", "net_failover", "virtio_net", "rng-core",
    "virtio-rng",
)  # fmt: skip
"""In the order in which they need one another; those that a kernel has built in are not there."""
INIT = """\
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
for module in /modules/*; do /bin/busybox insmod $module; done
n=0
while [ ! -b /dev/vdb ] && [ $n -lt 100 ]; do /bin/busybox sleep 0.05; n=$((n+1)); done
/bin/busybox mount -t ext4 -o rw,noatime /dev/vda /new || exec /bin/busybox sh
/bin/busybox cp /board-init /new/sbin/board-init
/bin/busybox mount --move /dev /new/dev
exec /bin/busybox switch_root /new /sbin/board-init
"""
# The added line is what a profile made here says about its processor: nobody shall take it for a real one's.
BOARD_INIT = f"""\
#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o mode=1777 tmp /tmp
mkdir -p /dev/pts /dev/shm /run/sshd
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t ext4 -o rw,noatime /dev/vdb /home/{USER}
chown {UID}:{UID} /home/{USER}
case "$(cat /proc/cmdline)" in *edgeprune.icount*)
  sed 's/^processor.*/&\\nmodel name\\t: instruction count, emulated/' /proc/cpuinfo >/run/cpuinfo
  mount --bind /run/cpuinfo /proc/cpuinfo ;;
esac
hostname -F /etc/hostname
ip link set lo up
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up
echo "board up: $(cat /proc/uptime)"
/usr/sbin/sshd
while :; do wait; sleep 3600; done
"""
DISK_BYTES = 1200 * 1024 * 1024


def build_machine() -> Path:
    """The folder with `kernel`, `initrd`, `disk` and the keys of the board's sshd. raises: CannotBuild."""
    rootfs = build_rootfs()
    digest = cache.recipe_digest(rootfs.name, Path(__file__))
    return cache.built("machine-arm64", digest, lambda folder: _build(folder, rootfs))


def make_disk(path: Path, size_bytes: int, content: Path | None = None) -> None:
    """An ext4 image, with the files of a folder; with a journal only where it will be written to for long."""
    tool = find_tool("mke2fs")
    options = ["-d", str(content), "-O", "^has_journal"] if content else []
    argv: list[str | Path] = [
        tool.path,
        "-q",
        "-t",
        "ext4",
        *options,
        "-E",
        "root_owner=0:0",
        path,
        f"{size_bytes >> 10}k",
    ]
    cache.command(argv, env=tool.environment)


def _build(folder: Path, rootfs: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        apt = Apt(Path(temporary), "arm64")
        package = apt.first_dependency(KERNEL, KERNEL_VERSION)
        kernel = Path(temporary) / "kernel"
        kernel.mkdir()
        unpack(apt.download([package], with_dependencies=False), kernel)
        next(kernel.glob("boot/vmlinuz-*")).rename(folder / "kernel")
        (folder / "initrd").write_bytes(gzip.compress(_initramfs(kernel, rootfs), 6, mtime=0))
    make_disk(folder / "disk", DISK_BYTES, rootfs / "root")
    for name in ("client_key", "host_key.pub"):
        (folder / name).write_bytes((rootfs / name).read_bytes())
        (folder / name).chmod(0o600)


def _initramfs(kernel: Path, rootfs: Path) -> bytes:
    files: dict[str, bytes | None] = {"bin": None, "dev": None, "modules": None, "new": None}
    files |= {"init": INIT.encode(), "board-init": BOARD_INIT.encode()}
    files["bin/busybox"] = next((rootfs / "root").glob("usr/bin/busybox")).read_bytes()
    for number, name in enumerate(MODULES):
        for path in kernel.rglob(f"{name}.ko*"):
            content = path.read_bytes()
            files[f"modules/{number:02}.ko"] = lzma.decompress(content) if path.suffix == ".xz" else content
    return make_cpio(files)


def make_cpio(files: dict[str, bytes | None]) -> bytes:
    """An archive in the kernel's "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst).

    files: path -> content of an executable file, or None for a folder; folders before what is in them.
    """
    archive = bytearray()

    def add(name: str, mode: int, content: bytes) -> None:
        inode = len(archive) + 1
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        archive.extend(b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0")
        archive.extend(b"\0" * (-len(archive) % 4))
        archive.extend(content)
        archive.extend(b"\0" * (-len(archive) % 4))

    for name, content in files.items():
        add(name, 0o040755 if content is None else 0o100755, content or b"")
    add("TRAILER!!!", 0, b"")
    return bytes(archive)
