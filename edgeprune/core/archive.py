"""The one zip that files give, so that reading it back and packing again shows every altered byte.

Stored (weights do not compress), sorted, fixed dates: the bytes are a function of the files alone.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import PurePosixPath

from edgeprune.core.errors import RecordError

EPOCH = (1980, 1, 1, 0, 0, 0)
MAX_BYTES = 2**31 - 1
"""Without ZIP64; an archive is held in memory while it is made and checked."""
MAX_FILES = 1000


def pack(contents: Mapping[str, bytes], where: str) -> bytes:
    """The zip of these files. raises: RecordError when they are too many or too large, naming `where`."""
    if len(contents) > MAX_FILES or sum(map(len, contents.values())) > MAX_BYTES:
        raise RecordError(f"{where} would hold more than {MAX_FILES} files or {MAX_BYTES} bytes; split the model")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(contents):
            info = zipfile.ZipInfo(name, EPOCH)
            info.create_system = 3
            info.external_attr = 0o100644 << 16
            archive.writestr(info, contents[name])
    return buffer.getvalue()


def unpack(data: bytes, where: str) -> dict[str, bytes]:
    """The files of a zip that `pack` made, by name.

    raises: RecordError, naming `where`, when it is damaged, when a path leads out of it, or when it is not byte for
        byte what `pack` makes of these files.
    """
    contents: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_FILES:
                raise RecordError(f"{where} holds more than {MAX_FILES} files; it is not ours")
            for info in entries:
                _check_path(info.filename, where)
                # Stored entries only: what is read is never more than the file's own size.
                if info.compress_type != zipfile.ZIP_STORED or info.file_size > len(data) or info.flag_bits & 1:
                    raise RecordError(f"{where}: {info.filename} is packed in a way that we never use; make it again")
                if info.filename in contents:
                    raise RecordError(f"{where} holds {info.filename} twice; make it again")
                contents[info.filename] = archive.read(info)
    except (
        zipfile.BadZipFile,  # no zip, directory and entries differ, or a checksum is wrong
        EOFError,  # an entry ends behind the end of the file
        ValueError,  # an entry or the directory begins before its start, or a name is no text (UnicodeDecodeError)
        NotImplementedError,  # a version or a compression that zipfile does not know
    ) as error:
        raise RecordError(f"{where} is truncated or altered ({error}); make it again") from error
    return contents


def _check_path(name: str, where: str) -> None:
    """See that a name stays below the folder it is unpacked in, on every system. raises: RecordError."""
    path = PurePosixPath(name)
    odd = "\\" in name or ":" in name or not name.isprintable()
    if odd or not name or path.is_absolute() or ".." in path.parts or str(path) != name:
        raise RecordError(f"{where}: {name!r} leads out of the bundle; do not unpack it")
