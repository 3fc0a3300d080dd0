"""Energy per inference: from the power that a meter told, or from a model of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from edgeprune.core.errors import DataError, UsageError
from edgeprune.core.records import FloatArray, PowerSamples, Quantity

BLOCKS = 10
"""Readings follow each other's noise; means over this many stretches of time hardly do."""


def energy_per_run(
    power: PowerSamples, *, gross: bool = False, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Quantity:
    """Energy of one inference in joules, with a bootstrap interval over blocks of time.

    gross: all that the board drew while it ran; otherwise what the inferences added to its rest.
    confidence: in (0, 1). raises: DataError without runs or readings.
    source: block bootstrap of means, Efron & Tibshirani, An Introduction to the Bootstrap (1993), ch. 8 and 13.
    """
    if power.runs < 1 or not power.active_w or not power.idle_w:
        raise DataError("energy needs at least one run, and readings at rest and in the loop; measure again")
    seconds_per_run = power.seconds / power.runs
    generator = np.random.default_rng(seed)
    active = _bootstrap_means(power.active_w, resamples, generator)
    watts, means = float(np.mean(power.active_w)), active
    if not gross:
        watts -= float(np.mean(power.idle_w))
        means = active - _bootstrap_means(power.idle_w, resamples, generator)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(means, [tail, 100 - tail]) * seconds_per_run
    return Quantity(median=watts * seconds_per_run, low=float(low), high=float(high))


def _bootstrap_means(values: tuple[float, ...], resamples: int, generator: np.random.Generator) -> FloatArray:
    """Means of blocks drawn again and again with replacement, weighted by their readings."""
    blocks = np.array_split(np.asarray(values, dtype=np.float64), min(BLOCKS, len(values)))
    sums, counts = np.array([block.sum() for block in blocks]), np.array([block.size for block in blocks])
    picks = generator.integers(0, len(blocks), (resamples, len(blocks)))
    return np.asarray(sums[picks].sum(axis=1) / counts[picks].sum(axis=1), dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerModel:
    """What a board draws at rest and while a model runs, in watts, where no meter can tell."""

    idle_w: float
    active_w: float

    def energy_per_run(self, latency_s: Quantity) -> Quantity:
        """Energy of one inference, in joules: modelled, not measured."""
        watts = self.active_w - self.idle_w
        return Quantity(median=watts * latency_s.median, low=watts * latency_s.low, high=watts * latency_s.high)

    def __str__(self) -> str:
        return f"modelled, not measured: ({self.active_w:g} W - {self.idle_w:g} W) x latency"


def parse_power_model(text: str) -> PowerModel:
    """Read "idle=2.1W,active=4.8W" (W or mW). raises: UsageError."""
    example = 'write it as "idle=2.1W,active=4.8W"'
    watts: dict[str, float] = {}
    for item in text.split(","):
        match = re.fullmatch(r"\s*(idle|active)\s*=\s*(\d*\.?\d+)\s*(m?)W\s*", item, re.IGNORECASE)
        if match is None or match[1].lower() in watts:
            raise UsageError(f"power model '{text}': cannot read '{item.strip()}'; {example}")
        # Upper-case M would be megawatts, which nobody means.
        watts[match[1].lower()] = float(match[2]) * (1e-3 if match[3] else 1.0)
    if watts.keys() != {"idle", "active"}:
        raise UsageError(f"power model '{text}' lacks {' and '.join({'idle', 'active'} - watts.keys())}; {example}")
    if watts["active"] <= watts["idle"]:
        raise UsageError(f"power model '{text}': a board at work draws more than at rest; {example}")
    return PowerModel(idle_w=watts["idle"], active_w=watts["active"])
