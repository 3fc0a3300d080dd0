"""Records on disk: JSON envelopes and append-only JSON lines, written so that a kill loses nothing.

An envelope is `{"schema": "edgeprune.Plan/1", "sha256": ..., "record": {...}}`; the digest is of the
record's canonical JSON, so a truncated or altered file is told apart from a good one. A JSONL file
holds one envelope a line; a last line cut by a kill is dropped, any other damage is an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import msgspec
import numpy as np

from edgeprune.core.errors import RecordError, UsageError

SCHEMA_VERSION = 1
MAX_RECORD_BYTES = 512 * 1024 * 1024

R = TypeVar("R")


def sha256_bytes(data: bytes) -> str:
    """Hex digest of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compressed_bytes(path: Path) -> int:
    """Size of a file as an app store or a firmware image packs it: deflate at level 9, read in pieces."""
    packer, size = zlib.compressobj(9), 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            size += len(packer.compress(piece))
    return size + len(packer.flush())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well, and vanishes otherwise.

    A reader sees the old content or the new, never half.
    raises: UsageError when the folder cannot be written (read-only, full), naming it.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror or error}; choose another output directory or free space"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all. raises: UsageError."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def _encode_hook(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"records hold plain values, not {type(value).__name__}")


def _decode_hook(kind: type[Any], value: Any) -> Any:
    if get_origin(kind) is not np.ndarray:
        raise TypeError(f"cannot read {kind}")
    array = np.asarray(value)
    if array.size and array.dtype.kind not in "if":
        raise ValueError("expected a rectangular array of numbers")
    (element,) = get_args(get_args(kind)[1])
    return array.astype(element)


def to_builtins(record: Any) -> Any:
    """The record as plain dicts, lists and numbers, as it stands in JSON."""
    return msgspec.to_builtins(record, enc_hook=_encode_hook)


def digest(record: Any) -> str:
    """sha256 of a record's canonical JSON: its identity, wherever it is stored."""
    return sha256_bytes(_canonical(to_builtins(record)))


def _canonical(value: Any) -> bytes:
    # allow_nan=False: a NaN in a record is a broken promise; find it when writing, not when reading.
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except ValueError as error:
        raise RecordError(f"a record may not hold NaN or infinity: {error}") from error


def encode_envelope(record: Any) -> bytes:
    """One line of JSON: schema, digest and record."""
    body = to_builtins(record)
    envelope = {
        "schema": f"edgeprune.{type(record).__name__}/{SCHEMA_VERSION}",
        "sha256": sha256_bytes(_canonical(body)),
        "record": body,
    }
    return json.dumps(envelope, allow_nan=False).encode()


def decode_envelope(kind: type[R], data: bytes, where: str) -> R:
    """Read back what `encode_envelope` wrote.

    raises: RecordError when it is truncated, altered, of another schema or another record.
    """
    try:
        envelope = json.loads(data)
    except (ValueError, UnicodeDecodeError) as error:
        raise RecordError(f"{where} is not a complete record ({error}); make it again") from error
    if not isinstance(envelope, dict) or not {"schema", "sha256", "record"} <= envelope.keys():
        raise RecordError(f"{where} is not an edgeprune record")
    expected = f"edgeprune.{kind.__name__}/{SCHEMA_VERSION}"
    if envelope["schema"] != expected:
        raise RecordError(f"{where} holds {envelope['schema']}, expected {expected}")
    if sha256_bytes(_canonical(envelope["record"])) != envelope["sha256"]:
        raise RecordError(f"{where} was altered after it was written (sha256 differs); make it again")
    try:
        return msgspec.convert(envelope["record"], kind, dec_hook=_decode_hook)
    except msgspec.ValidationError as error:
        raise RecordError(
            f"{where} does not fit {expected}: {error}; another version of edgeprune may have written it: remove it "
            "and make it again"
        ) from error


def write_record(path: Path, record: Any) -> None:
    """Write one record as a JSON envelope, atomically."""
    write_atomic(path, encode_envelope(record) + b"\n")


def read_record(kind: type[R], path: Path) -> R:
    """Read one record. raises: RecordError."""
    return decode_envelope(kind, read_bytes(path), str(path))


def read_bytes(path: Path) -> bytes:
    """A whole file, size-limited. raises: RecordError when it cannot be read."""
    try:
        if path.stat().st_size > MAX_RECORD_BYTES:
            raise RecordError(f"{path} is larger than {MAX_RECORD_BYTES} bytes; it is not a record of ours")
        return path.read_bytes()
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from error


def append_record(path: Path, record: Any) -> None:
    """Append one envelope as a line and flush it to disk."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            # A kill may have left half a line; close it so that the new one stands alone.
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    _drop_partial_line(file)
            file.write(encode_envelope(record) + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror}; choose another output directory or free space"
        ) from error


def _drop_partial_line(file: Any) -> None:
    file.seek(0)
    content = file.read()
    file.truncate(content.rfind(b"\n") + 1)
    file.seek(0, os.SEEK_END)


def read_lines(path: Path, *kinds: type[Any]) -> Iterator[Any]:
    """Records of a JSONL file in order; each line may be of any of `kinds`.

    A last line without newline (cut by a kill) is dropped.
    raises: RecordError for any other damage.
    """
    data = read_bytes(path)
    lines = data.split(b"\n")
    by_schema = {f"edgeprune.{kind.__name__}/{SCHEMA_VERSION}": kind for kind in kinds}
    for number, line in enumerate(lines[:-1], start=1):
        where = f"{path} line {number}"
        try:
            schema = json.loads(line)["schema"]
        except (ValueError, KeyError, TypeError) as error:
            raise RecordError(f"{where} is not a complete record; make the file again") from error
        if schema not in by_schema:
            raise RecordError(f"{where} holds {schema}, expected one of {', '.join(by_schema)}")
        yield decode_envelope(by_schema[schema], line, where)
