"""From the measurements of a profile to its tables: ratios, shares, whole-model calibration, error.

The runtime's profiler slows the run and leaves time between kernels, so kernel times are shares:
their sum is calibrated against the whole model timed without the profiler. A runtime without a
profiler leaves only the wholes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls

from edgeprune.core.cost import kernel_latency, kernel_sizes, operator_of
from edgeprune.core.errors import RecordError
from edgeprune.core.records import (
    EnergyModel,
    FloatArray,
    Fold,
    HeldOutError,
    Kernel,
    Measurement,
    MemoryModel,
    Quantity,
    Table,
)
from edgeprune.core.stats import clean_turns, median, pooled_ratio, quantity, turn_ratios
from edgeprune.tables.black_box import BlackBox
from edgeprune.tables.design import DENSE
from edgeprune.tables.energy import fit_energy
from edgeprune.tables.fit import FOLDS, OFF_TILE_WEIGHT, Fit, Observations, fit_kernels, tabulate

LEAST_SHARE = 0.1
"""Of a kernel's profiled time, the least that is left when the profiler's own is taken off."""
FEWEST_FOR_INTERCEPT = 4
MEMORY_PASSES = 30
LEAST_MEMORY_ERROR = 1e-3
"""Pages and counters: below this share a memory measurement is no better."""
FEWEST_FOR_FOLDS = 8
"""Configurations; with fewer, what is left without a fold is no fit."""
PLANNED = "plan-"
"""Names of configurations that were measured because a planner chose them."""
PLANNED_WEIGHT = 4.0
"""How much more the neighbourhood of planned widths counts in the fit, where the next plan will be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Configured:
    """One configuration, all rounds together, at the usual speed of the board."""

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
    additivity_gap: float | None
    held_out: HeldOutError | None
    memory: MemoryModel | None
    energy: EnergyModel | None
    folds: tuple[Fold, ...]


def combine(kernels: Sequence[Kernel], measurements: Sequence[Measurement], known: Sequence[Table] = ()) -> Combined:
    """Fit the tables to every configuration that is not held out.

    known: tables of the same kernels under other conditions.
    raises: RecordError when the dense configuration or any kernel has no measurement.
    """
    configured = average_rounds(measurements)
    told = any(item.kernels for item in configured)
    # Without some of its branches a model has other kernels.
    fitted = [i for i in configured if not i.held_out and (i.kernels or not told) and all(i.widths.values())]
    dense = next((item for item in fitted if item.name == DENSE), None)
    if dense is None:
        raise RecordError("the profile has no complete measurement of the dense model; profile again")
    fit = _fit_from_kernels(kernels, fitted, dense, known) if told else _fit_from_wholes(kernels, fitted, dense)
    tables, overhead = fit(())
    by_signature = {table.signature: table for table in tables}
    on_tile = _weigh_by_tile(fitted, kernels, by_signature, dense)
    errors = [
        abs(overhead + predict_kernels(kernels, by_signature, item.widths) - item.whole_s) / item.whole_s
        for item in configured if item.held_out
    ]  # fmt: skip
    held_out = (
        HeldOutError(mean=float(np.mean(errors)), max=max(errors), configurations=len(errors)) if errors else None
    )
    return Combined(
        tables=tables, overhead_s=overhead, additivity_gap=_additivity_gap(measurements), held_out=held_out,
        memory=fit_memory(measurements),
        energy=fit_energy(kernels, tables, measurements, {item.name: item.whole_s for item in configured}),
        folds=_make_folds(kernels, fit, fitted, on_tile),
    )  # fmt: skip


FitWithout = Callable[[Collection[int]], tuple[tuple[Table, ...], float]]
"""Tables and overhead from all configurations but those of the given places."""


def _fit_from_kernels(
    kernels: Sequence[Kernel], fitted: Sequence[Configured], dense: Configured, known: Sequence[Table]
) -> FitWithout:
    """Each kernel's own times, scaled so that their sum is the whole model unprofiled."""
    priors = {table.signature: table for table in known}
    on_tile = np.ones(len(fitted))
    # The tiles are found on the way, and then tell which configurations calibrate the rest.
    for _ in range(2):
        fits = _fit_kernels(kernels, _unprofiled(fitted, on_tile), dense, priors)
        by_signature = {table.signature: table for table in _tabulate(kernels, fits, dense)}
        before, on_tile = on_tile, _weigh_by_tile(fitted, kernels, by_signature, dense)
        if np.array_equal(before, on_tile):
            break

    def fit(left_out: Collection[int]) -> tuple[tuple[Table, ...], float]:
        rest = [place for place in range(len(fitted)) if place not in left_out]
        parts = {signature: each.leaving_out(list(left_out)) for signature, each in fits.items()}
        return _calibrated(kernels, parts, dense, [fitted[place] for place in rest], on_tile[rest])

    return fit


def _fit_from_wholes(kernels: Sequence[Kernel], fitted: Sequence[Configured], dense: Configured) -> FitWithout:
    """Where the runtime does not tell where its time goes: from whole-model times alone."""
    box = BlackBox(kernels, dense.widths)
    widths, wholes = [item.widths for item in fitted], np.array([item.whole_s for item in fitted])
    form = box.choose_form(widths, wholes)

    def fit(left_out: Collection[int]) -> tuple[tuple[Table, ...], float]:
        rest = [place for place in range(len(fitted)) if place not in left_out]
        return box.fit([widths[place] for place in rest], wholes[rest], form)

    return fit


def fit_memory(measurements: Sequence[Measurement]) -> MemoryModel | None:
    """What a run takes per byte that the runtime's arena is thought to take, and on top; None where not measured.

    A line through the measured peaks. Widths at which the runtime falls back to other kernels lie far off
    it, with memory of their own: least absolute deviations leave them there.
    """
    seen = {m.configuration: m for m in measurements if m.activation_bytes and m.arena_bytes}
    fitted = [m for m in seen.values() if not m.held_out]
    if not fitted:
        return None
    arena, measured = (
        np.array([getattr(m, name) for m in fitted], float) for name in ("arena_bytes", "activation_bytes")
    )
    if len(fitted) < FEWEST_FOR_INTERCEPT:
        scale, base = float(np.median(measured / arena)), 0.0
    else:
        # Relative errors; neither part can be negative.
        rows, weight = np.stack([arena / measured, 1 / measured], axis=1), np.ones(len(fitted))
        for _ in range(MEMORY_PASSES):
            (scale, base), _ = nnls(rows * weight[:, None], weight)
            weight = 1 / np.sqrt(np.maximum(np.abs(rows @ (scale, base) - 1), LEAST_MEMORY_ERROR))
    if scale <= 0:
        return None
    held = [m for m in seen.values() if m.held_out]
    errors = [float(abs((base + scale * (m.arena_bytes or 0)) / (m.activation_bytes or 1) - 1)) for m in held]
    error = HeldOutError(mean=float(np.mean(errors)), max=max(errors), configurations=len(errors)) if errors else None
    return MemoryModel(base_bytes=float(base), scale=float(scale), error=error)


def predict_kernels(kernels: Sequence[Kernel], tables: Mapping[str, Table], widths: Mapping[str, int]) -> float:
    """Seconds in all kernels at `widths`, which name every group."""
    return sum(kernel_latency(tables[k.signature], *kernel_sizes(k, widths, widths)) for k in kernels)


def average_rounds(measurements: Sequence[Measurement]) -> list[Configured]:
    """Each configuration's medians over rounds, in the order of first measurement.

    Whole models by their ratio to the dense one in the turns between theirs, kernels by how fast the
    profiled dense model was at that moment: so the board's changes of speed fall out.
    """
    if not measurements:
        return []
    dense_s = _dense_latency(measurements).median
    usual_run_s = median([item.dense_run_s for item in measurements if item.dense_run_s] or [1.0])
    result = []
    for name in dict.fromkeys(item.configuration for item in measurements):
        ours = [item for item in measurements if item.configuration == name]
        seen: dict[str, list[float]] = {}
        for item in ours:
            speed = usual_run_s / item.dense_run_s if item.dense_run_s else 1.0
            for kernel, seconds in item.kernels.items():
                seen.setdefault(kernel, []).append(seconds * speed)
        result.append(
            Configured(
                name=name, widths=dict(ours[0].widths), held_out=ours[0].held_out,
                whole_s=dense_s * median([median(turn_ratios(item.samples, item.dense)) for item in ours]),
                kernels={kernel: median(values) for kernel, values in seen.items()},
            )
        )  # fmt: skip
    return result


def measured_latency(measurements: Sequence[Measurement], configuration: str | None = None) -> Quantity:
    """Whole-model latency of one configuration at the usual speed of the board; None: of the dense float32 model.

    raises: RecordError when it was not measured.
    """
    dense = _dense_latency(measurements)
    if configuration is None:
        return dense
    ratios = [turn_ratios(item.samples, item.dense) for item in measurements if item.configuration == configuration]
    if not ratios:
        raise RecordError(f"the profile has no configuration '{configuration}'; measure it first")
    share = pooled_ratio(ratios)
    return Quantity(median=share.median * dense.median, low=share.low * dense.median, high=share.high * dense.median)


def _dense_latency(measurements: Sequence[Measurement]) -> Quantity:
    """Of the profile's own rounds: what a planner asks for later must not move what it is held against."""
    own = [item for item in measurements if not item.configuration.startswith(PLANNED)]
    if not any(item.configuration == DENSE for item in own):
        raise RecordError("the profile has no measurement of the dense model; profile again")
    return quantity([median(clean_turns(item.dense)) for item in own])


def _weigh_by_tile(
    fitted: Sequence[Configured], kernels: Sequence[Kernel], tables: Mapping[str, Table], dense: Configured
) -> FloatArray:
    """(n,): 1 where every kernel has sizes on its tile or its full size, else OFF_TILE_WEIGHT."""

    def is_on_tile(item: Configured) -> bool:
        for kernel in kernels:
            table = tables[kernel.signature]
            for extent, tile in ((kernel.in_extent, table.tile_in), (kernel.out_extent, table.tile_out)):
                size = extent.size(item.widths, item.widths) if extent is not None else 0
                if size % tile and extent is not None and size != extent.size(dense.widths, dense.widths):
                    return False
        return True

    return np.array([1.0 if is_on_tile(item) else OFF_TILE_WEIGHT for item in fitted])


def _unprofiled(fitted: Sequence[Configured], weights: FloatArray) -> list[Configured]:
    """Kernel times without what the profiler adds to each: in small models it is half of the sum.

    The sum over kernels against the unprofiled whole gives a scale and an intercept. A negative
    intercept is the profiler's own time, taken off every kernel alike.
    """
    sums = np.array([sum(item.kernels.values()) for item in fitted])
    scale, intercept = _calibrate(sums, np.array([item.whole_s for item in fitted]), weights)
    result = []
    for item in fitted:
        added = max(-intercept / scale, 0.0) / len(item.kernels)
        kernels = {name: scale * max(time - added, LEAST_SHARE * time) for name, time in item.kernels.items()}
        result.append(replace(item, kernels=kernels))
    return result


def _calibrate(
    parts: FloatArray, wholes: FloatArray, weights: FloatArray, *, intercept: bool = True
) -> tuple[float, float]:
    """(scale, intercept) of whole = scale x part + intercept: least relative error, Huber weights."""
    # With few configurations the intercept cannot be told from the scale.
    used = 2 if intercept and len(wholes) >= FEWEST_FOR_INTERCEPT else 1
    rows = (np.stack([parts, np.full(len(parts), parts.mean())], axis=1) / wholes[:, None])[:, :used]
    # Plans are seldom tiny: a model of a tenth of the time counts a tenth.
    usual = np.sqrt(weights * wholes / wholes.max())
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


def _fit_kernels(
    kernels: Sequence[Kernel], fitted: Sequence[Configured], dense: Configured, known: Mapping[str, Table]
) -> dict[str, Fit]:
    """Signature -> the cost of its kernels."""
    weights = _closeness(fitted, dense)
    families: dict[str, dict[str, Observations]] = {}
    for signature, members in _pool(kernels).items():
        rows = [
            (*kernel_sizes(kernel, item.widths, item.widths), item.kernels[kernel.name], index, weights[index])
            for index, item in enumerate(fitted)
            for kernel in members
            if item.kernels.get(kernel.name, 0.0) > 0
        ]
        if not rows:
            raise RecordError(f"the profile has no timing of {members[0].name}; profile again")
        columns = list(zip(*rows, strict=True))
        families.setdefault(operator_of(members[0]), {})[signature] = Observations(
            sizes_in=np.array(columns[0], np.int64), sizes_out=np.array(columns[1], np.int64),
            time_s=np.array(columns[2], np.float64), configuration=np.array(columns[3], np.int64),
            weight=np.array(columns[4], np.float64), known=known.get(signature),
        )  # fmt: skip
    return {signature: fit for family in families.values() for signature, fit in fit_kernels(family).items()}


def _tabulate(kernels: Sequence[Kernel], fits: Mapping[str, Fit], dense: Configured) -> tuple[Table, ...]:
    tables = []
    for signature, members in _pool(kernels).items():
        full = [kernel_sizes(kernel, dense.widths, dense.widths) for kernel in members]
        tables.append(tabulate(fits[signature], signature, max(i for i, _ in full), max(o for _, o in full)))
    return tuple(tables)


def _calibrated(
    kernels: Sequence[Kernel], fits: Mapping[str, Fit], dense: Configured, fitted: Sequence[Configured],
    weights: FloatArray,
) -> tuple[tuple[Table, ...], float]:  # fmt: skip
    """Tables whose sum, with the time outside any kernel, is the whole model unprofiled."""
    tables = _tabulate(kernels, fits, dense)
    by_signature = {table.signature: table for table in tables}
    predicted = np.array([predict_kernels(kernels, by_signature, item.widths) for item in fitted])
    wholes = np.array([item.whole_s for item in fitted])
    scale, overhead = _calibrate(predicted, wholes, weights)
    if overhead < 0:
        scale, overhead = _calibrate(predicted, wholes, weights, intercept=False)
    return tuple(replace(table, latency_s=table.latency_s * scale) for table in tables), overhead


def _make_folds(
    kernels: Sequence[Kernel], fit: FitWithout, fitted: Sequence[Configured], on_tile: FloatArray
) -> tuple[Fold, ...]:
    """The same forms fitted without every so many of the configurations, and their errors on just those.

    Errors are of configurations on the tiles only: no plan lies between them.
    """
    if len(fitted) < FEWEST_FOR_FOLDS:
        return ()
    folds = []
    for fold in range(FOLDS):
        out = range(fold, len(fitted), FOLDS)
        tables, overhead = fit(out)
        by_signature = {table.signature: table for table in tables}
        errors = [
            abs(item.whole_s / (overhead + predict_kernels(kernels, by_signature, item.widths)) - 1)
            for item, weight in ((fitted[place], on_tile[place]) for place in out)
            if weight == 1.0
        ]
        folds.append(Fold(tables=tables, overhead_s=overhead, errors=tuple(errors)))
    return tuple(folds)


def _pool(kernels: Sequence[Kernel]) -> dict[str, list[Kernel]]:
    """Kernels by what they share a table by."""
    pooled: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        pooled.setdefault(kernel.signature, []).append(kernel)
    return pooled


def _closeness(fitted: Sequence[Configured], dense: Configured) -> FloatArray:
    """Weight of each configuration: more, the closer it is to widths that a planner chose."""
    shares = np.array([[item.widths[name] / max(full, 1) for name, full in dense.widths.items()] for item in fitted])
    planned = [index for index, item in enumerate(fitted) if item.name.startswith(PLANNED)]
    if not planned or not shares.size:
        return np.ones(len(fitted))
    distance = np.abs(shares[:, None, :] - shares[None, planned, :]).mean(axis=2).min(axis=1)
    return np.asarray(1 + (PLANNED_WEIGHT - 1) * np.exp(-((distance / 0.1) ** 2)), dtype=np.float64)


def _additivity_gap(measurements: Sequence[Measurement]) -> float | None:
    """|sum of kernels - profiled run| / profiled run, median over what was measured."""
    gaps = [abs(sum(m.kernels.values()) - m.run_s) / m.run_s for m in measurements if m.kernels and m.run_s]
    return median(gaps) if gaps else None
