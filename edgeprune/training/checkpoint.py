"""How far a training is, on disk: tensors and JSON in one safetensors file, no code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from edgeprune.core.errors import RecordError
from edgeprune.core.records import RecoverSettings
from edgeprune.core.store import write_atomic

Parts = Mapping[str, Mapping[str, Tensor]]


def write_checkpoint(path: Path, settings: RecoverSettings, parts: Parts, facts: Mapping[str, Any]) -> None:
    """Write it whole or not at all. parts: tensors of the model, the optimiser and so on, by name. facts: for JSON."""
    tensors = {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    known = {"settings": asdict(settings), **facts}
    write_atomic(path, save(tensors, metadata={"recover": json.dumps(known)}))


def read_checkpoint(
    path: Path, settings: RecoverSettings, device: torch.device
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """The parts and the facts; None without a file, or of another training. To be called in `readable`."""
    if not path.is_file():
        return None
    parts: dict[str, dict[str, Tensor]] = {}
    with safetensors.safe_open(path, framework="pt") as file:
        facts = json.loads((file.metadata() or {})["recover"])
        if facts["settings"] != json.loads(json.dumps(asdict(settings))):
            return None
        for key in file.keys():  # noqa: SIM118
            part, name = key.split("/", 1)
            parts.setdefault(part, {})[name] = file.get_tensor(key).to(device)
    return parts, facts


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """raises: RecordError for whatever reading a damaged checkpoint makes of it."""
    try:
        yield
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise RecordError(f"{path} is damaged ({error}); delete it to train from the start") from error
