"""Names and shapes of a model's inputs and outputs, for files that had some before and are to have them again; and
where it decides for each input what to compute."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from torch import fx, nn

KEY = "edgeprune.ports"
PORTS = "edgeprune_ports.json"
"""The part of a `.pt2` archive that keeps them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """In the order of the model's arguments and results; empty where not known. shapes: of the inputs, batch first.

    gates: what decides for each input whether to compute something, in the order of the graph.
    """

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    gates: tuple[str, ...] = ()

    def to_json(self) -> str:
        """As text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Ports:
        """Back from text. raises: ValueError, TypeError, KeyError for what is none."""
        found = json.loads(text)
        names = {key: tuple(str(name) for name in found.get(key, ())) for key in ("inputs", "outputs", "gates")}
        return cls(**names, shapes=tuple(tuple(int(size) for size in shape) for shape in found["shapes"]))


def get_ports(module: nn.Module) -> Ports:
    """What is known of a module's ports."""
    found = module.meta.get(KEY) if isinstance(module, fx.GraphModule) else None
    return found if isinstance(found, Ports) else Ports()


def set_ports(module: fx.GraphModule, ports: Ports) -> None:
    """Remember ports with a module; copies of it keep them."""
    module.meta[KEY] = ports
