"""The units of a graph in one row: which of them each axis holds, and how sizes fall with them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from edgeprune.core.errors import ModelError
from edgeprune.core.records import Graph, IntArray
from edgeprune.core.tensors import Array

Mask = npt.NDArray[np.bool_]
TRIES = 60
MOST_PROBES = 4


class Unresizable(ModelError):
    """The widths of an exported file cannot be changed in place; export each width instead."""


class UnitSpace:
    """All units of a graph numbered in one row, -1 for what is fixed.

    layouts: (parameter, axis) -> unit of each position. forms: (forms, units), by how much a size
    falls for each removed unit. starts: (n, units), the same for where a slice of an axis starts,
    which is at `stops` (n,) in the dense model.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._offsets: dict[str, int] = {}
        self.total = 0
        for group in graph.groups:
            self._offsets[group.name] = self.total
            self.total += group.units
        self.layouts = self._layouts()
        # One position per unit: what a normalisation keeps for each of its groups of channels.
        single = [self._offsets[group.name] + np.arange(group.units) for group in graph.prunable]
        self.distinct = list({layout.tobytes(): layout for layout in (*self.layouts.values(), *single)}.values())
        self.forms = list({form.tobytes(): form for form in self._forms()}.values())
        self.starts = list(self._starts())

    def kept(self, keep: Mapping[str, IntArray]) -> Mask:
        """(units,) mask; a group that is not named keeps all."""
        mask = np.ones(self.total, np.bool_)
        for group in self.graph.groups:
            if group.name in keep:
                units = np.zeros(group.units, np.bool_)
                units[keep[group.name]] = True
                mask[self._at(group.name, group.units)] = units
        return mask

    def probes(self, rng: np.random.Generator) -> list[dict[str, IntArray]]:
        """Two sets of kept units, or more, in which no two forms have equal values; none where no unit can go."""
        if not self.graph.prunable:
            return []
        movable = np.zeros(self.total, np.bool_)
        for group in self.graph.prunable:
            movable[self._at(group.name, group.units)] = group.units > group.step
        # What no probe can move stays as it is, and what moves alike need not be told apart.
        forms = np.unique([form * movable for form in self.forms if form[movable].any()], axis=0)
        keeps: list[dict[str, IntArray]] = []
        for count in range(2, MOST_PROBES + 1):
            for _ in range(TRIES):
                keeps = [self.probe(rng) for _ in range(count)]
                removed = ~np.stack([self.kept(keep) for keep in keeps], axis=1)
                if not len(forms) or len(np.unique(forms @ removed, axis=0)) == len(forms):
                    return keeps
        return keeps

    def probe(self, rng: np.random.Generator) -> dict[str, IntArray]:
        """Random units of random widths between a quarter and all but one step of each group."""
        keep: dict[str, IntArray] = {}
        for group in self.graph.prunable:
            steps = -(-group.units // group.step)
            if steps > 1:
                width = group.step * int(rng.integers(max(1, steps // 4), steps))
                keep[group.name] = np.sort(rng.permutation(group.units)[:width]).astype(np.int64)
        return keep

    def number_forms(self, dense: int) -> Iterable[IntArray]:
        """Forms that a number of this value in the dense model may follow, likeliest first."""
        yield from self.forms
        yield from (form for stop, form in self.starts if stop == dense)

    def _at(self, name: str, units: int) -> slice:
        return slice(self._offsets[name], self._offsets[name] + units)

    def _layouts(self) -> dict[tuple[str, int], IntArray]:
        shapes = {parameter.name: parameter.shape for parameter in self.graph.parameters}
        layouts: dict[tuple[str, int], IntArray] = {}
        for group in self.graph.groups:
            units = self._offsets[group.name] + np.arange(group.units)
            for member in group.members:
                key = (member.parameter, member.axis)
                if key not in layouts:
                    layouts[key] = np.full(shapes[member.parameter][member.axis], -1, np.int64)
                layouts[key][member.index] = units[:, None]
        return layouts

    def _forms(self) -> Iterable[IntArray]:
        extents = itertools.chain(
            (extent for node in self.graph.nodes for extent in node.out_extents),
            (extent for parameter in self.graph.parameters for extent in parameter.extents),
        )
        units = self.graph.units
        for extent in extents:
            form = np.zeros(self.total, np.int64)
            for name, count in extent.groups:
                form[self._at(name, units[name])] += count
            if form.any():
                yield form
        for group in self.graph.prunable:
            form = np.zeros(self.total, np.int64)
            form[self._at(group.name, group.units)] = 1
            yield form
        constants: dict[tuple[str, tuple[int, ...]], IntArray] = {}
        for group in self.graph.groups:
            for constant in group.constants:
                form = constants.setdefault((constant.node, constant.argument), np.zeros(self.total, np.int64))
                form[self._at(group.name, group.units)] += constant.count
        yield from constants.values()

    def _starts(self) -> Iterable[tuple[int, IntArray]]:
        for layout in self.distinct:
            for stop in np.flatnonzero(np.diff(layout)) + 1:
                before = layout[:stop]
                yield int(stop), np.bincount(before[before >= 0], minlength=self.total)


def positions(layout: IntArray, kept: Mask) -> Mask:
    """Which positions of an axis stay."""
    return np.append(kept, True)[layout]  # layout -1, fixed, reads the appended True


def take(array: Array, axis: int, layout: IntArray, kept: Mask) -> Array:
    """The positions along an axis whose units are kept."""
    return np.compress(positions(layout, kept), array, axis=axis)


def same(ours: Array, theirs: Array) -> bool:
    """Equal up to what an exporter's folding rounds."""
    return ours.shape == theirs.shape and bool(np.allclose(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True))


class Evidence:
    """What a dense file and its probes, files with known units removed, say of each number.

    kept: (units,) mask of each probe.
    """

    def __init__(self, space: UnitSpace, kept: Sequence[Mask]) -> None:
        self.space = space
        self.kept = kept

    def number(self, values: Sequence[int], where: str) -> IntArray | None:
        """By how much a number falls for each removed unit; None where it stays. raises: Unresizable.

        values: in the dense file, then in each probe.
        """
        dense, *probes = values
        if all(value == dense for value in probes):
            return None
        for form in self.space.number_forms(dense):
            if all(dense - form[~kept].sum() == value for value, kept in zip(probes, self.kept, strict=True)):
                return form
        raise Unresizable(f"{where}: no widths explain the constant {dense}, which becomes {probes}")

    def numbers(self, arrays: Sequence[Array], where: str) -> list[IntArray | None]:
        """`number` of each element."""
        return [self.number(values, where) for values in zip(*(a.ravel().tolist() for a in arrays), strict=True)]

    def axes(
        self, dense: Array, probes: Sequence[Array], where: str, named: Callable[[int], IntArray | None] | None = None
    ) -> dict[int, IntArray]:
        """Axis -> layout that takes every probe out of the dense array. raises: Unresizable.

        named: the layout that an axis has by its parameter's name, tried first.
        """
        changed = [axis for axis in range(dense.ndim) if any(p.shape[axis] != dense.shape[axis] for p in probes)]
        choices = []
        for axis in changed:
            first = None if named is None else named(axis)
            layouts = ([] if first is None else [first]) + self.space.distinct
            sizes = [probe.shape[axis] for probe in probes]
            choices.append(
                [
                    layout
                    for layout in layouts
                    if len(layout) == dense.shape[axis]
                    and all(positions(layout, kept).sum() == size for kept, size in zip(self.kept, sizes, strict=True))
                ]
            )
        for chosen in itertools.product(*choices):
            found = dict(zip(changed, chosen, strict=True))
            if all(self._explains(dense, probe, found, kept) for probe, kept in zip(probes, self.kept, strict=True)):
                return found
        raise Unresizable(f"{where}: no channels explain its shape at other widths")

    @staticmethod
    def _explains(dense: Array, probe: Array, axes: dict[int, IntArray], kept: Mask) -> bool:
        for axis, layout in axes.items():
            dense = take(dense, axis, layout, kept)
        return same(dense, probe)
