"""Names and shapes of a model's inputs and outputs, for files that had some before and are to have them again; and
where it decides for each input what to compute."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, fx, nn

KEY = "edgeprune.ports"
PORTS = "edgeprune_ports.json"
"""The part of a `.pt2` archive that keeps them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """In the order of the model's arguments and results; empty where not known.

    shapes: of the inputs, batch first. dtypes: theirs, such as `float32`, which they are where nothing is known.
    gates: what decides for each input whether to compute something, in the order of the graph.
    """

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] = ()
    gates: tuple[str, ...] = ()

    def to_json(self) -> str:
        """As text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Ports:
        """Back from text, without types. raises: ValueError, TypeError, KeyError for what is none."""
        found = json.loads(text)
        names = {key: tuple(str(name) for name in found.get(key, ())) for key in ("inputs", "outputs", "gates")}
        return cls(**names, shapes=tuple(tuple(int(size) for size in shape) for shape in found["shapes"]))


def dtype_names(tensors: Iterable[Tensor]) -> tuple[str, ...]:
    """As `Ports` has them."""
    return tuple(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)


def example(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """An input: standard normal; bytes of their whole range; larger whole numbers, which may be indices, of 0 to 7."""
    if dtype.is_floating_point:
        return torch.randn(*shape, generator=generator, dtype=dtype)
    high = {torch.bool: 2, torch.uint8: 256, torch.int8: 128}.get(dtype, 8)
    return torch.randint(high, tuple(shape), generator=generator).to(dtype)


def get_ports(module: nn.Module) -> Ports:
    """What is known of a module's ports."""
    found = module.meta.get(KEY) if isinstance(module, fx.GraphModule) else None
    return found if isinstance(found, Ports) else Ports()


def set_ports(module: fx.GraphModule, ports: Ports) -> None:
    """Remember ports with a module; copies of it keep them."""
    module.meta[KEY] = ports
