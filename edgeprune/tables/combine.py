"""From the measurements of a profile to its tables: drift, shares, whole-model calibration, error.

The runtime's profiler slows the run and leaves time between kernels, so kernel times are shares:
their sum is calibrated against the whole model timed without the profiler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgeprune.core.cost import kernel_latency, kernel_sizes
from edgeprune.core.errors import RecordError
from edgeprune.core.records import FloatArray, HeldOutError, Kernel, Measurement, Quantity, Table
from edgeprune.core.stats import bootstrap_interval, median
from edgeprune.tables.design import DENSE
from edgeprune.tables.fit import Observations, fit_kernel, tabulate

DRIFT_STIFFNESS = 3.0
"""Variance of one timing over that of the board's change of speed from one timing to the next."""
LEAST_SHARE = 0.1
"""Of a kernel's profiled time, the least that is left when the profiler's own is taken off."""
FEWEST_FOR_INTERCEPT = 4
PLANNED = "plan-"
"""Names of configurations that were measured because a planner chose them."""
PLANNED_WEIGHT = 4.0
"""How much more the neighbourhood of planned widths counts in the fit, where the next plan will be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Configured:
    """One configuration, all rounds together, drift taken out."""

    name: str
    widths: dict[str, int]
    held_out: bool
    whole_s: float
    kernels: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Combined:
    """What a profile derives from its measurements."""

    tables: tuple[Table, ...]
    overhead_s: float
    additivity_gap: float
    held_out: HeldOutError | None


def combine(kernels: Sequence[Kernel], measurements: Sequence[Measurement]) -> Combined:
    """Fit the tables to every configuration that is not held out.

    raises: RecordError when the dense configuration or any kernel has no measurement.
    """
    configured = average_rounds(measurements)
    fitted = [item for item in configured if not item.held_out and item.kernels]
    dense = next((item for item in fitted if item.name == DENSE), None)
    if dense is None:
        raise RecordError("the profile has no complete measurement of the dense model; profile again")
    tables = _fit_tables(kernels, _unprofiled(fitted), dense)
    by_signature = {table.signature: table for table in tables}
    wholes = np.array([item.whole_s for item in fitted])
    predicted = np.array([predict_kernels(kernels, by_signature, item.widths) for item in fitted])
    scale, overhead = _calibrate(predicted, wholes)
    if overhead < 0:
        scale, overhead = _calibrate(predicted, wholes, intercept=False)
    tables = tuple(_scale(table, scale) for table in tables)
    by_signature = {table.signature: table for table in tables}
    errors = [
        abs(overhead + predict_kernels(kernels, by_signature, item.widths) - item.whole_s) / item.whole_s
        for item in configured if item.held_out
    ]  # fmt: skip
    held_out = (
        HeldOutError(mean=float(np.mean(errors)), max=max(errors), configurations=len(errors)) if errors else None
    )
    return Combined(
        tables=tables, overhead_s=overhead, additivity_gap=_additivity_gap(measurements), held_out=held_out,
    )  # fmt: skip


def predict_kernels(kernels: Sequence[Kernel], tables: Mapping[str, Table], widths: Mapping[str, int]) -> float:
    """Seconds in all kernels at `widths`, which name every group."""
    return sum(kernel_latency(tables[k.signature], *kernel_sizes(k, widths, widths)) for k in kernels)


def estimate_drift(names: Sequence[str], times: Sequence[float]) -> FloatArray:
    """By what factor the board was slower than usual at each of a sequence of timings.

    names: what was timed, repeats under one name. times: seconds, in the order they were taken.
    Solves log time = configuration + drift, the drift a random walk, robustly (Huber weights): the
    repeats of all configurations tell how the board's speed moved, not the anchor alone.
    returns: (n,), median 1.
    """
    _, index = np.unique(np.asarray(names), return_inverse=True)
    n, m = len(times), len(set(names))
    y = np.log(np.asarray(times, dtype=np.float64))
    if n == m:
        return np.ones(n)
    design = np.zeros((n, m + n))
    design[np.arange(n), index] = 1.0
    design[:, m:] = np.eye(n)
    walk = np.zeros((n - 1, m + n))
    walk[np.arange(n - 1), m + np.arange(n - 1)] = -1.0
    walk[np.arange(n - 1), m + 1 + np.arange(n - 1)] = 1.0
    level = np.zeros((1, m + n))
    level[0, m:] = 1.0
    weight = np.ones(n)
    drift: FloatArray = np.zeros(n)
    for _ in range(4):
        normal = design.T @ (design * weight[:, None]) + DRIFT_STIFFNESS * walk.T @ walk + level.T @ level
        normal[np.diag_indices(m + n)] += 1e-9
        solution = np.linalg.solve(normal, design.T @ (weight * y))
        drift = np.asarray(solution[m:], dtype=np.float64)
        residual = np.abs(y - solution[index] - drift)
        spread = 1.4826 * float(np.median(residual)) + 1e-4
        weight = np.minimum(1.0, 2.0 * spread / np.maximum(residual, 1e-12))
    return np.asarray(np.exp(drift - np.median(drift)), dtype=np.float64)


def average_rounds(measurements: Sequence[Measurement]) -> list[Configured]:
    """Each configuration's medians over rounds, drift taken out, in the order of first measurement."""
    if not measurements:
        return []
    names = [item.configuration for item in measurements]
    raw = [median(item.samples.values) for item in measurements]
    whole = np.asarray(raw) / estimate_drift(names, raw)
    profiled = [index for index, item in enumerate(measurements) if item.kernels]
    sums = [sum(measurements[index].kernels.values()) for index in profiled]
    drift = estimate_drift([names[index] for index in profiled], sums) if profiled else np.ones(0)
    slowness = dict(zip(profiled, drift.tolist(), strict=True))
    result = []
    for name in dict.fromkeys(names):
        places = [index for index, other in enumerate(names) if other == name]
        seen: dict[str, list[float]] = {}
        for index in places:
            for kernel, seconds in measurements[index].kernels.items():
                seen.setdefault(kernel, []).append(seconds / slowness[index])
        first = measurements[places[0]]
        result.append(
            Configured(
                name=name, widths=dict(first.widths), held_out=first.held_out, whole_s=float(np.median(whole[places])),
                kernels={kernel: float(np.median(values)) for kernel, values in seen.items()},
            )
        )  # fmt: skip
    return result


def measured_latency(measurements: Sequence[Measurement], configuration: str = DENSE) -> Quantity:
    """Whole-model latency of one configuration over all its rounds, drift taken out.

    raises: RecordError when it was not measured.
    """
    names = [item.configuration for item in measurements]
    if configuration not in names:
        raise RecordError(f"the profile has no configuration '{configuration}'; measure it first")
    medians = [median(item.samples.values) for item in measurements]
    drift = estimate_drift(names, medians)
    places = [index for index, name in enumerate(names) if name == configuration]
    samples = np.concatenate([np.asarray(measurements[index].samples.values) / drift[index] for index in places])
    center = median([medians[index] / drift[index] for index in places])
    low, high = bootstrap_interval(samples)
    return Quantity(median=center, low=min(low, center), high=max(high, center))


def _unprofiled(fitted: Sequence[Configured]) -> list[Configured]:
    """Kernel times without what the profiler adds to each: in small models it is half of the sum.

    The sum over kernels against the unprofiled whole gives a scale and an intercept. A negative
    intercept is the profiler's own time, taken off every kernel alike.
    """
    sums = np.array([sum(item.kernels.values()) for item in fitted])
    scale, intercept = _calibrate(sums, np.array([item.whole_s for item in fitted]))
    result = []
    for item in fitted:
        added = max(-intercept / scale, 0.0) / len(item.kernels)
        kernels = {name: scale * max(time - added, LEAST_SHARE * time) for name, time in item.kernels.items()}
        result.append(replace(item, kernels=kernels))
    return result


def _calibrate(parts: FloatArray, wholes: FloatArray, *, intercept: bool = True) -> tuple[float, float]:
    """(scale, intercept) of whole = scale x part + intercept: least relative error, Huber weights."""
    # With few configurations the intercept cannot be told from the scale.
    used = 2 if intercept and len(wholes) >= FEWEST_FOR_INTERCEPT else 1
    rows = (np.stack([parts, np.full(len(parts), parts.mean())], axis=1) / wholes[:, None])[:, :used]
    # Plans are seldom tiny: a model of a tenth of the time counts a tenth.
    usual = np.sqrt(wholes / wholes.max())
    weight = usual
    solution = np.zeros(2)
    for _ in range(5):
        solution = np.zeros(2)
        solution[:used] = np.linalg.lstsq(rows * weight[:, None], weight, rcond=None)[0]
        residual = np.abs(1 - rows @ solution[:used])
        spread = 1.4826 * float(np.median(residual)) + 1e-4
        weight = usual * np.sqrt(np.minimum(1.0, 2.0 * spread / np.maximum(residual, 1e-12)))
    if solution[0] <= 0:
        return float(np.median(wholes / parts)), 0.0
    return float(solution[0]), float(solution[1] * parts.mean())


def _fit_tables(kernels: Sequence[Kernel], fitted: Sequence[Configured], dense: Configured) -> tuple[Table, ...]:
    weights = _closeness(fitted, dense)
    pooled: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        pooled.setdefault(kernel.signature, []).append(kernel)
    tables = []
    for signature, members in pooled.items():
        rows = [
            (*kernel_sizes(kernel, item.widths, item.widths), item.kernels[kernel.name], index, weights[index])
            for index, item in enumerate(fitted)
            for kernel in members
            if item.kernels.get(kernel.name, 0.0) > 0
        ]
        if not rows:
            raise RecordError(f"the profile has no timing of {members[0].name}; profile again")
        columns = list(zip(*rows, strict=True))
        data = Observations(
            sizes_in=np.array(columns[0], np.int64), sizes_out=np.array(columns[1], np.int64),
            time_s=np.array(columns[2], np.float64), configuration=np.array(columns[3], np.int64),
            weight=np.array(columns[4], np.float64),
        )  # fmt: skip
        full = [kernel_sizes(kernel, dense.widths, dense.widths) for kernel in members]
        tables.append(tabulate(fit_kernel(data), signature, max(i for i, _ in full), max(o for _, o in full)))
    return tuple(tables)


def _closeness(fitted: Sequence[Configured], dense: Configured) -> FloatArray:
    """Weight of each configuration: more, the closer it is to widths that a planner chose."""
    shares = np.array([[item.widths[name] / max(full, 1) for name, full in dense.widths.items()] for item in fitted])
    planned = [index for index, item in enumerate(fitted) if item.name.startswith(PLANNED)]
    if not planned or not shares.size:
        return np.ones(len(fitted))
    distance = np.abs(shares[:, None, :] - shares[None, planned, :]).mean(axis=2).min(axis=1)
    return np.asarray(1 + (PLANNED_WEIGHT - 1) * np.exp(-((distance / 0.1) ** 2)), dtype=np.float64)


def _additivity_gap(measurements: Sequence[Measurement]) -> float:
    """|sum of kernels - profiled run| / profiled run, median over what was measured."""
    gaps = [abs(sum(m.kernels.values()) - m.run_s) / m.run_s for m in measurements if m.kernels and m.run_s]
    return median(gaps) if gaps else 0.0


def _scale(table: Table, factor: float) -> Table:
    return replace(table, latency_s=table.latency_s * factor)
