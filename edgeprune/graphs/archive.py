"""Whether a `.pt2` archive from outside is safe to hand to torch.export.load.

torch.export.load unpickles whatever an archive marks as pickled, evaluates the size expressions of
the graph with sympy, and resolves operator names below `torch`; any of them can run code. An archive
that torch.export.save wrote of an ordinary network needs none of that, so anything else is refused.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from edgeprune.core.errors import ModelError

MEMBERS = re.compile(
    r"(models/\w+\.json|data/weights/\w+|data/constants/tensor_\w+|data/(weights|constants)/\w+_config\.json"
    r"|data/sample_inputs/\w+\.pt|extra/[\w./-]*|archive_format|archive_version|byteorder|\.data/\w+|\.format_version"
    r"|\.storage_alignment|version)"
)
OPERATORS = re.compile(
    r"torch\.ops\.(aten|prims)\.\w+\.\w+|torch\._higher_order_ops\.\w+|torch\.ops\.higher_order\.\w+"
    r"|torch\.sym_\w+|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_)"
    r"|math\.\w+"
)
SYMBOL = re.compile(r"Symbol\('[su]\d+'(, (positive|nonnegative|integer)=True)*\)")
"""A free size as torch 2.13 writes it."""
SIZE_EXPRESSION = re.compile(r"(?!.*__)[A-Za-z0-9_+\-*/%(), <>=]*")


def check_archive(path: Path) -> None:
    """Refuse a `.pt2` that is damaged or holds more than a graph and tensors.

    raises: ModelError, naming the part that was refused; nothing in the archive is executed.
    """
    if not path.is_file():
        raise ModelError(f"no model at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            refused = next(_refused_parts(archive), None)
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not a .pt2 written by torch.export.save: {error}") from error
    if refused is not None:
        raise ModelError(
            f"{path} was refused: {refused}, and loading it could run code; "
            "write the model with torch.export.save, or give it as a factory with weights"
        )


def _refused_parts(archive: zipfile.ZipFile) -> Iterator[str]:
    names = archive.namelist()
    roots = {name.split("/", 1)[0] for name in names}
    if len(roots) != 1 or len(set(names)) != len(names):
        yield "its members are not those of one torch.export archive"
        return
    parts = {name.split("/", 1)[-1]: name for name in names}
    if not any(part.startswith("models/") for part in parts):
        raise ValueError("it holds no models/*.json (torch older than 2.8 wrote another form)")
    for part, name in parts.items():
        if not MEMBERS.fullmatch(part):
            yield f"it holds '{part}'"
        elif part.endswith("_config.json"):
            entries = json.loads(archive.read(name))["config"]
            yield from (f"'{key}' is pickled" for key, entry in entries.items() if entry["use_pickle"])
        elif part.startswith("data/sample_inputs/") and not _only_tensors(archive.read(name)):
            yield f"'{part}' holds more than tensors"
        elif part.startswith("models/"):
            yield from _refused_values(json.loads(archive.read(name)))


def _only_tensors(data: bytes) -> bool:
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception:  # whatever it raises, the answer is no
        return False
    return True


def _refused_values(value: Any) -> Iterator[str]:
    """Operators outside ATen and size expressions that are more than arithmetic, anywhere in the graph."""
    if isinstance(value, list):
        for item in value:
            yield from _refused_values(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key == "target" and isinstance(item, str) and "inputs" in value and not OPERATORS.fullmatch(item):
                yield f"its graph calls '{item}'"
            elif key == "expr_str" and not SIZE_EXPRESSION.fullmatch(SYMBOL.sub("s", str(item))):
                yield f"its graph holds the size '{item}'"
            else:
                yield from _refused_values(item)
