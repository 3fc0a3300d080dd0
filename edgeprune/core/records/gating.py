"""Work that is decided per input."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """share: of the model's multiply-accumulates, those that the gate guards. runs: share of the examples for which it
    lets them be done.
    """

    share: float
    runs: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Gated:
    """What the gates of a model do on `examples` calibration examples.

    gating: `name:option=value,...`. gates: by their path in the model, in the order of its graph.
    """

    gating: str
    gates: dict[str, Gate]
    examples: int

    @property
    def macs_share(self) -> float:
        """Of the model's multiply-accumulates, those that an example needs on average."""
        return 1 - sum(gate.share * (1 - gate.runs) for gate in self.gates.values())

    @property
    def collapsed(self) -> dict[str, str]:
        """Gates that decide the same for every example: `always on`, `always off`."""
        said = {0.0: "always off", 1.0: "always on"}
        return {name: said[gate.runs] for name, gate in self.gates.items() if gate.runs in said}


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Latency over real inputs, each timed on its own.

    mean_s, median_s, p95_s: over the inputs, of what each typically takes (`latencies_s`, in their order). worst_s: of
    the slowest input, told from all for which the same gates run; without gates from it alone.
    shares: each over what the dense model took beside it. gates: share of the inputs for which each gate runs.
    """

    mean_s: float
    median_s: float
    p95_s: float
    worst_s: float
    mean_share: float
    worst_share: float
    latencies_s: tuple[float, ...]
    shares: tuple[float, ...]
    gates: dict[str, float]
