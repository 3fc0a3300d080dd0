"""Latency tables from measured kernels: a bilinear cost on a staircase, found by cross-validation.

A kernel that reads i and writes o channels takes a + b·I + c·O + d·I·O, where I and O are i and o
rounded up to the tile the runtime computes at once, all coefficients >= 0. Only a pairwise term
fits convolutions: an additive f(i) + g(o) misses 3×3 kernels by 17–32 %. What the formula leaves
over is smoothed over the neighbourhood where that predicts left-out configurations better.

Where a table of the kernel is known already, from another board of the kind, another thread count or
another model, the cost is first sought as a multiple of that.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from edgeprune.core.cost import kernel_latency
from edgeprune.core.records import FloatArray, IntArray, Table

TILES = (8, 1, 4, 16, 32)
"""The first is taken until the data say otherwise: widths are mostly sampled on it."""
ALIGNMENT = 4
"""Runtimes leave their blocked layouts for sizes that are no multiple of it; such sizes cost extra."""
OFF_TILE_WEIGHT = 0.05
"""What a timing off the tile counts once the tile is known: runtimes may compute such sizes in another way,
and no plan goes there."""
FOLDS = 5
MARGIN = 0.97
"""A more complex form must predict left-out configurations with at most this share of the error."""
STAIRCASE_MARGIN = 0.99
SMOOTHING = tuple(itertools.product((0.3, 0.7, 1.5), (1.0, 4.0)))
"""Bandwidth in octaves, and how many observations' weight pulls the correction to none."""
FINEST_GRID = 24
"""Points per axis where there is no staircase."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observations:
    """Timings of the kernels of one signature, one entry per kernel and configuration.

    sizes_in: (n,), zeros where only the output counts. configuration: (n,) ids, the unit of
    cross-validation. weight: (n,) > 0, 1 = as usual. known: a table of these kernels under other conditions.
    """

    sizes_in: IntArray
    sizes_out: IntArray
    time_s: FloatArray
    configuration: IntArray
    weight: FloatArray
    known: Table | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A fitted cost: the staircase, its coefficients, and the local correction.

    scaled: the cost is a multiple of the known table and a constant, instead of a formula of its own.
    """

    tile_in: int
    tile_out: int
    scaled: bool
    coefficients: FloatArray
    data: Observations
    residuals: FloatArray
    smoothing: tuple[float, float] | None = None
    error: float = np.inf

    def predict(self, sizes_in: npt.ArrayLike, sizes_out: npt.ArrayLike) -> FloatArray:
        """Seconds for channel counts of equal shape."""
        i, o = np.asarray(sizes_in, np.int64), np.asarray(sizes_out, np.int64)
        known = self.data.known if self.scaled else None
        cost = _features(i, o, self.tile_in, self.tile_out, known) @ self.coefficients
        if self.smoothing is not None:
            cost = cost * (1 + self._correction(i, o, *self.smoothing))
        return np.asarray(cost, dtype=np.float64)

    def leaving_out(self, configurations: npt.ArrayLike) -> Fit:
        """The same form fitted without some configurations; itself where nothing else would be left."""
        rest = ~np.isin(self.data.configuration, configurations)
        if rest.all() or not rest.any():
            return self
        return _solve(_select(self.data, rest), self.tile_in, self.tile_out, self.smoothing, scaled=self.scaled)

    def _correction(self, i: IntArray, o: IntArray, bandwidth: float, shrink: float) -> FloatArray:
        distance = np.zeros((len(i), len(self.residuals)))
        pairs = ((i, self.data.sizes_in, self.tile_in), (o, self.data.sizes_out, self.tile_out))
        for ours, theirs, tile in pairs:
            distance += (_octaves(ours, tile)[:, None] - _octaves(theirs, tile)[None, :]) ** 2
        weights = np.exp(-0.5 * distance / bandwidth**2) * self.data.weight
        return np.asarray(weights @ self.residuals / (weights.sum(axis=1) + shrink))


def fit_kernel(data: Observations) -> Fit:
    """`fit_kernels` of one signature alone."""
    return fit_kernels({"": data})[""]


def fit_kernels(family: Mapping[str, Observations]) -> dict[str, Fit]:
    """Per signature the form that predicts left-out configurations best, simpler ones first.

    family: signatures of one operator, which share the tile: it is the runtime's, not the layer's, and
        one layer alone has too few and too noisy timings to tell.
    raises: ValueError without observations.
    """
    if not all(len(data.time_s) for data in family.values()):
        raise ValueError("a kernel without observations")

    def attempt(tile_in: int, tile_out: int) -> dict[str, Fit]:
        return {name: _cross_validate(data, tile_in, tile_out, None) for name, data in family.items()}

    known = [data.known for data in family.values() if data.known is not None]
    tiles_in = _tiles([data.sizes_in for data in family.values()], [table.tile_in for table in known])
    tiles_out = _tiles([data.sizes_out for data in family.values()], [table.tile_out for table in known])
    tile_in, tile_out = tiles_in[0], tiles_out[0]
    best = attempt(tile_in, tile_out)
    for _ in range(2):
        for tile in tiles_out[1:]:
            if _better(other := attempt(tile_in, tile), best, family):
                best, tile_out = other, tile
        for tile in tiles_in[1:]:
            if _better(other := attempt(tile, tile_out), best, family):
                best, tile_in = other, tile
    for name, data in family.items():
        on_tile = is_on_tile(data.sizes_in, tile_in) & is_on_tile(data.sizes_out, tile_out)
        judged = data.weight * np.where(on_tile, 1.0, OFF_TILE_WEIGHT)
        # What is off the tile may help to fit, or mislead where the runtime computes it in another way.
        forms = itertools.product(
            (True, False) if data.known is not None else (False,), (data.weight, judged), (None, *SMOOTHING)
        )
        fits = (
            _cross_validate(replace(data, weight=weight), tile_in, tile_out, smoothing, judged, scaled=scaled)
            for scaled, weight, smoothing in forms
        )
        best[name] = next(fits)
        for fit in fits:
            if fit.error < MARGIN * best[name].error:
                best[name] = fit
    return best


def is_on_tile(sizes: npt.ArrayLike, tile: int) -> npt.NDArray[np.bool_]:
    """Whether channel counts are multiples of the tile, or the largest there is."""
    sizes = np.asarray(sizes, np.int64)
    return np.asarray((sizes % tile == 0) | (sizes == sizes.max(initial=0)))


def tabulate(fit: Fit, signature: str, largest_in: int, largest_out: int) -> Table:
    """The fitted cost on a grid from the smallest tile to the largest size there is."""
    sizes_in = make_grid(largest_in, fit.tile_in) if largest_in else np.zeros(1, np.int64)
    sizes_out = make_grid(largest_out, fit.tile_out)
    i, o = np.meshgrid(sizes_in, sizes_out, indexing="ij")
    latency = fit.predict(i.ravel(), o.ravel()).reshape(i.shape)
    return Table(
        signature=signature, in_sizes=sizes_in, out_sizes=sizes_out, latency_s=np.maximum(latency, 0.0),
        tile_in=fit.tile_in if largest_in else 1, tile_out=fit.tile_out,
    )  # fmt: skip


def _tiles(axis: Sequence[IntArray], known: Sequence[int]) -> tuple[int, ...]:
    """Candidate staircases along an axis, the likely one first: a known one, and only it if hardly varied."""
    if not any(len(np.unique(sizes)) > 2 for sizes in axis):
        return (known[0] if known else 1,)
    return tuple(dict.fromkeys((*known[:1], *TILES)))


def _better(ours: Mapping[str, Fit], best: Mapping[str, Fit], family: Mapping[str, Observations]) -> bool:
    """Whether the time-weighted error over the whole family is clearly less."""
    seconds = {name: float(data.time_s.sum()) for name, data in family.items()}
    mine, theirs = (sum(fits[name].error * seconds[name] for name in family) for fits in (ours, best))
    return mine < STAIRCASE_MARGIN * theirs


def _cross_validate(
    data: Observations,
    tile_in: int,
    tile_out: int,
    smoothing: tuple[float, float] | None,
    judged: FloatArray | None = None,
    *,
    scaled: bool = False,
) -> Fit:
    """Fit to everything; the error is of predictions for configurations left out in turn, weighted by `judged`."""
    folds = data.configuration % FOLDS
    errors = np.zeros(len(data.time_s))
    for fold in np.unique(folds):
        inside, outside = folds != fold, folds == fold
        if not inside.any():
            errors[outside] = np.inf
            continue
        fit = _solve(_select(data, inside), tile_in, tile_out, smoothing, scaled=scaled, passes=1)
        errors[outside] = fit.predict(data.sizes_in[outside], data.sizes_out[outside]) / data.time_s[outside] - 1
    # Absolute, not squared: one interrupted timing must not choose the tile.
    error = float(np.average(np.abs(errors), weights=(data.weight if judged is None else judged) * data.time_s))
    return replace(_solve(data, tile_in, tile_out, smoothing, scaled=scaled), error=error)


def _solve(
    data: Observations,
    tile_in: int,
    tile_out: int,
    smoothing: tuple[float, float] | None,
    *,
    scaled: bool = False,
    passes: int = 3,
) -> Fit:
    """Non-negative least squares on relative errors, reweighted between passes against outliers (Huber)."""
    features = _features(data.sizes_in, data.sizes_out, tile_in, tile_out, data.known if scaled else None)
    scale = features.max(axis=0)
    scale[scale == 0] = 1.0
    relative = features / scale / data.time_s[:, None]
    # Large kernels decide the latency: an error counts by the root of the time it is a share of.
    usual = np.sqrt(data.weight * data.time_s / data.time_s.max())
    weight = usual
    coefficients = np.zeros(features.shape[1])
    residuals = np.zeros(len(data.time_s))
    for _ in range(passes):
        coefficients, _ = nnls(relative * weight[:, None], weight)
        residuals = 1 - relative @ coefficients
        spread = 1.4826 * float(np.median(np.abs(residuals))) + 1e-9
        weight = usual * np.sqrt(np.minimum(1.0, 2.5 * spread / np.maximum(np.abs(residuals), 1e-12)))
    predicted = np.maximum(relative @ coefficients, 1e-12)
    limit = 5 * (1.4826 * float(np.median(np.abs(residuals))) + 1e-9)
    return Fit(
        tile_in=tile_in, tile_out=tile_out, scaled=scaled, coefficients=coefficients / scale, data=data,
        residuals=np.clip(1 / predicted - 1, -limit, limit), smoothing=smoothing,
    )  # fmt: skip


def _features(i: IntArray, o: IntArray, tile_in: int, tile_out: int, known: Table | None = None) -> FloatArray:
    """(n, 6): 1, I, O, I·O, and for sizes off the alignment 1 and I·O once more; (n, 2): 1 and the known table."""
    if known is not None:
        return np.stack([np.ones(len(i)), kernel_latency(known, i, o)], axis=1)
    wide_in, wide_out = -(-i // tile_in) * tile_in, -(-o // tile_out) * tile_out
    columns = [np.ones_like(i), wide_in, wide_out, wide_in * wide_out]
    odd = (((i % ALIGNMENT) | (o % ALIGNMENT)) > 0).astype(np.int64)
    volume = np.where(wide_in > 0, wide_in, 1) * wide_out
    columns += [odd, odd * volume]
    return np.stack(columns, axis=1).astype(np.float64)


def _select(data: Observations, mask: npt.NDArray[np.bool_]) -> Observations:
    return Observations(
        sizes_in=data.sizes_in[mask], sizes_out=data.sizes_out[mask], time_s=data.time_s[mask],
        configuration=data.configuration[mask], weight=data.weight[mask], known=data.known,
    )  # fmt: skip


def _octaves(sizes: IntArray, tile: int) -> FloatArray:
    return np.asarray(np.log2(np.maximum(-(-sizes // tile) * tile, 1)), dtype=np.float64)


def make_grid(largest: int, tile: int) -> IntArray:
    """Multiples of the tile up to the largest size, which is the last point."""
    if tile == 1:
        step = max(-(-largest // FINEST_GRID), 1)
        step = -(-step // ALIGNMENT) * ALIGNMENT if largest > ALIGNMENT else 1
    else:
        step = tile
    return np.unique(np.append(np.arange(step, largest, step), largest)).astype(np.int64)
