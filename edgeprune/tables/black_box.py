"""Latency tables from whole-model times alone, for runtimes that do not tell where their time goes.

The whole is a sum over kernels, each of which takes time per call, per element it reads and writes, and
per multiply-add, with sizes rounded up to the tile. How much of each is the same for all kernels of one
operator, but for how fast its multiply-adds are, which may differ from layer to layer as far as the
measurements say so: a few dozen models do not tell a hundred coefficients apart by themselves. No
coefficient is negative, so that every table rises with its sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from edgeprune.core.cost import kernel_sizes, operator_of
from edgeprune.core.records import FloatArray, IntArray, Kernel, Table
from edgeprune.tables.fit import FOLDS, MARGIN, TILES, make_grid

RIDGES = (0.3, 0.1, 0.03, 0.01)
"""How strongly kernels of one operator are held together, the strongest first."""
FEWEST = 6
"""Whole models below which nothing is left out to choose the form by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What is chosen before the coefficients are fitted: the tile of both sizes, and the ridge."""

    tile: int
    ridge: float


@dataclass(frozen=True, slots=True)
class BlackBox:
    """The kernels of a model, and their cost as a sum of unknown coefficients times known amounts.

    units: full widths of all groups.
    """

    kernels: Sequence[Kernel]
    units: Mapping[str, int]

    def choose_form(self, widths: Sequence[Mapping[str, int]], wholes_s: FloatArray) -> Form:
        """The form that predicts left-out models best; a more flexible one only where it is clearly better."""
        best = Form(tile=TILES[0], ridge=RIDGES[0])
        if len(wholes_s) < FEWEST:
            return best
        least = self._left_out(widths, wholes_s, best)
        for form in (Form(tile=tile, ridge=ridge) for ridge in RIDGES for tile in TILES):
            error = self._left_out(widths, wholes_s, form)
            if error < MARGIN * least:
                best, least = form, error
        return best

    def fit(
        self, widths: Sequence[Mapping[str, int]], wholes_s: FloatArray, form: Form
    ) -> tuple[tuple[Table, ...], float]:
        """Tables of every signature, and the time outside any kernel.

        widths: of each model, all groups. wholes_s: (n,), seconds each took.
        """
        solution = self._solve(widths, wholes_s, form)
        columns = self._columns()
        tables = []
        for signature in dict.fromkeys(kernel.signature for kernel in self.kernels):
            members = [kernel for kernel in self.kernels if kernel.signature == signature]
            full = [kernel_sizes(kernel, self.units, self.units) for kernel in members]
            sizes_in = make_grid(max(i for i, _ in full), form.tile) if members[0].in_extent else np.zeros(1, np.int64)
            sizes_out = make_grid(max(o for _, o in full), form.tile)
            i, o = np.meshgrid(sizes_in, sizes_out, indexing="ij")
            amounts = _amounts(members[0], i.ravel(), o.ravel(), form.tile)
            latency = sum(
                solution[columns[name]] * amount for name, amount in zip(_names(members[0]), amounts, strict=True)
            )
            tables.append(
                Table(
                    signature=signature, in_sizes=sizes_in, out_sizes=sizes_out,
                    latency_s=np.asarray(latency).reshape(i.shape), tile_in=form.tile if members[0].in_extent else 1,
                    tile_out=form.tile,
                )
            )  # fmt: skip
        return tuple(tables), float(solution[columns["overhead"]])

    def predict(
        self, widths: Sequence[Mapping[str, int]], wholes_s: FloatArray, form: Form, wanted: Sequence[Mapping[str, int]]
    ) -> FloatArray:
        """Seconds of models of `wanted` widths, fitted to the others."""
        return self._design(wanted, form.tile) @ self._solve(widths, wholes_s, form)

    def _left_out(self, widths: Sequence[Mapping[str, int]], wholes_s: FloatArray, form: Form) -> float:
        folds = np.arange(len(wholes_s)) % FOLDS
        errors = np.zeros(len(wholes_s))
        for fold in range(FOLDS):
            out = folds == fold
            rest_widths, out_widths = (
                [each for each, left in zip(widths, out, strict=True) if left == is_left] for is_left in (False, True)
            )
            told = self.predict(rest_widths, wholes_s[~out], form, out_widths)
            errors[out] = np.abs(told / wholes_s[out] - 1)
        return float(errors.mean())

    def _solve(self, widths: Sequence[Mapping[str, int]], wholes_s: FloatArray, form: Form) -> FloatArray:
        """Least relative errors with Huber's weights; a kernel's rate is drawn to that of its operator."""
        design = self._design(widths, form.tile)
        relative = design / wholes_s[:, None]
        scale = np.maximum(np.abs(relative).max(axis=0), 1e-300)
        ties = self._ties(design.shape[1], relative, scale)
        weight = np.ones(len(wholes_s))
        solution = np.zeros(design.shape[1])
        for _ in range(3):
            rows = np.concatenate([relative / scale * weight[:, None], form.ridge * ties])
            solution, _ = nnls(rows, np.concatenate([weight, np.zeros(len(ties))]), maxiter=50 * rows.shape[1])
            residual = np.abs(1 - relative / scale @ solution)
            spread = 1.4826 * float(np.median(residual)) + 1e-9
            weight = np.sqrt(np.minimum(1.0, 2.5 * spread / np.maximum(residual, 1e-12)))
        return np.asarray(solution / scale, dtype=np.float64)

    def _ties(self, columns: int, relative: FloatArray, scale: FloatArray) -> FloatArray:
        """Rows that say: the rate of a signature is that of the signatures of its operator together."""
        names = self._columns()
        operators: dict[str, list[int]] = {}
        for kernel in self.kernels:
            place = names[_names(kernel)[-1]]
            if place not in operators.setdefault(operator_of(kernel), []):
                operators[operator_of(kernel)].append(place)
        rows = []
        for places in operators.values():
            shares = relative[:, places].mean(axis=0)
            shares = shares / max(float(shares.sum()), 1e-300)
            for place in places:
                row = np.zeros(columns)
                row[places] -= shares / scale[places]
                row[place] += 1 / scale[place]
                # In the share of the whole that the signature has: a small one may differ more.
                rows.append(row * scale[place])
        return np.array(rows)

    def _design(self, widths: Sequence[Mapping[str, int]], tile: int) -> FloatArray:
        """(models, coefficients): how much of each a model has."""
        names = self._columns()
        design = np.zeros((len(widths), len(names)))
        design[:, names["overhead"]] = 1.0
        for kernel in self.kernels:
            sizes = np.array([kernel_sizes(kernel, each, self.units) for each in widths], np.int64)
            for name, amount in zip(_names(kernel), _amounts(kernel, sizes[:, 0], sizes[:, 1], tile), strict=True):
                design[:, names[name]] += amount
        return design

    def _columns(self) -> dict[str, int]:
        names = ["overhead", *(name for kernel in self.kernels for name in _names(kernel))]
        return {name: place for place, name in enumerate(dict.fromkeys(names))}


def _names(kernel: Kernel) -> tuple[str, str, str]:
    """The coefficients that a kernel's amounts belong to: two of its operator, one of its signature."""
    operator = operator_of(kernel)
    return f"{operator} call", f"{operator} element", f"{kernel.signature} multiply-add"


def _amounts(kernel: Kernel, i: IntArray, o: IntArray, tile: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Calls, elements read and written, multiply-adds, for channel counts in (n,) and out (n,)."""
    wide_in, wide_out = (-(-sizes // tile) * tile for sizes in (i, o))
    pairs: npt.NDArray[np.int64] = np.where(wide_in > 0, wide_in, 1) * wide_out
    return (
        np.ones(len(i)),
        np.asarray(kernel.positions * (wide_in + wide_out), np.float64),
        np.asarray(kernel.positions * kernel.taps * pairs, np.float64),
    )
