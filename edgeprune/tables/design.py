"""Which widths to measure, so that every kernel's (in, out) plane is covered.

One run of one configuration measures every kernel at once, so a configuration is a point in the
space of all group widths. Scrambled Sobol points spread over all groups together, and so over each
pair of groups that meet in a kernel.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import qmc

from edgeprune.core.cost import predict_latency
from edgeprune.core.records import FloatArray, Graph, Group, Profile

DENSE = "dense"
"""Name of the configuration with all units: the anchor that every round comes back to."""
UNIFORM = (0.75, 0.5, 0.25)
STEPS = (8, 16, 8, 4, 8, 32, 8, 16, 8, 4, 8, 1)
"""Widths of one configuration are multiples of one of these: on the tiles of known runtimes, and off
them, so that the staircase shows."""
FITTED_MEMORY, HELD_OUT_MEMORY = 8, 4
"""Of how many configurations the peak memory is measured."""
CANDIDATES = 128
"""Of each of two kinds, among which the next configurations are chosen."""
NEAR_BUDGET = 0.3
"""Logarithmic distance from the budget at which a configuration matters clearly less."""
APART_OCTAVES = 0.5
"""Mean distance of widths below which two configurations tell much the same."""
SMALLEST = 1 / 8
"""Smallest share of a group's units in a random configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """One point of the design: a name for its files and steps, and all group widths.

    memory: whether its peak memory is measured too, which takes a process of its own, and its energy where
        there is a meter.
    """

    name: str
    widths: dict[str, int]
    held_out: bool = False
    memory: bool = False


def design_configurations(
    graph: Graph, configurations: int, held_out: int, *, step: int | None = None, seed: int = 0
) -> tuple[Configuration, ...]:
    """The dense model, uniform scalings, the smallest model, Sobol points, and a held-out set.

    configurations: how many to fit, dense included. held_out: how many more are never fitted; their
    widths are as plans have them, scattered around a common share of 0.5 to 1 of each group.
    step: makes every width a multiple of it (the default is a mixture, see STEPS; 8 held out).
    """
    groups = graph.prunable
    rng = np.random.default_rng(seed)
    shares: list[tuple[FloatArray, int]] = [(np.full(len(groups), share), step or 8) for share in UNIFORM]
    shares.append((np.zeros(len(groups)), step or 8))
    wanted = max(configurations - 1 - len(shares), 0)
    points = _sobol(wanted, max(len(groups), 1), seed)[:, : len(groups)]
    for index, point in enumerate(points):
        # Every other one is uniform in the logarithm: small widths are few multiples of the tile.
        share = SMALLEST**point if index % 2 else SMALLEST + (1 - SMALLEST) * point
        shares.append((share, step or STEPS[index % len(STEPS)]))
    plans = [
        np.clip(rng.uniform(0.5, 1.0) * rng.uniform(0.65, 1.35, len(groups)), SMALLEST, 1.0) for _ in range(held_out)
    ]
    found = [Configuration(name=DENSE, widths=graph.units, memory=True)]
    for index, (share, multiple) in enumerate(shares[: max(configurations - 1, 0)]):
        widths = _widths(graph, groups, share, multiple)
        found.append(Configuration(name=f"fit-{index:02d}", widths=widths, memory=index < FITTED_MEMORY))
    for index, share in enumerate(plans):
        widths = _widths(graph, groups, share, step or 8)
        found.append(
            Configuration(name=f"held-{index:02d}", widths=widths, held_out=True, memory=index < HELD_OUT_MEMORY)
        )
    return tuple(found)


def _sobol(count: int, dimensions: int, seed: int) -> FloatArray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # balance needs a power of two; spread does not
        sampler = qmc.Sobol(dimensions, scramble=True, rng=np.random.default_rng(seed))
        return np.asarray(sampler.random(count), dtype=np.float64)


def _widths(graph: Graph, groups: tuple[Group, ...], shares: FloatArray, multiple: int) -> dict[str, int]:
    widths = graph.units
    for group, share in zip(groups, shares, strict=True):
        coarse = multiple
        while (step := int(np.lcm(group.step, coarse))) >= group.units and coarse > 1:
            coarse //= 2
        width = step * max(round(share * group.units / step), -(-group.least // step))
        # The full width counts as a multiple of every step.
        widths[group.name] = group.units if width > group.units else width
    return widths


def choose_next(
    graph: Graph, profile: Profile, count: int, *, step: int | None = None, budget_s: float | None = None, seed: int = 0
) -> list[dict[str, int]]:
    """The widths at which the profile is least sure of itself, on its tiles.

    Where tables that were fitted to different parts of the measurements disagree, one more measurement
    tells most: query by committee (Seung, Opper and Sompolinsky, COLT 1992). What is close to what has
    been measured or chosen already is asked for less.

    step: widths are multiples of it (default 8). budget_s: whole-model latency around which plans will
    lie; there it matters more.
    """
    groups = graph.prunable
    rng = np.random.default_rng((seed, len(profile.measurements)))
    shape = (CANDIDATES, len(groups))
    like_plans = np.clip(rng.uniform(0.3, 1.0, (CANDIDATES, 1)) * rng.uniform(0.65, 1.35, shape), SMALLEST, 1.0)
    shares = np.concatenate([like_plans, SMALLEST ** rng.random(shape)])
    candidates = [_widths(graph, groups, share, step or 8) for share in shares]
    said = np.array(
        [[predict_latency(graph, widths, fold, profile.kernels) for fold in profile.folds] for widths in candidates]
    )
    worth = said.std(axis=1) / said.mean(axis=1)
    if budget_s is not None:
        worth = worth * np.exp(-0.5 * (np.log(said.mean(axis=1) / budget_s) / NEAR_BUDGET) ** 2)

    def place(widths: Mapping[str, int]) -> FloatArray:
        return np.array([np.log2(widths[group.name] / group.units) for group in groups])

    places = np.stack([place(widths) for widths in candidates])
    taken = [place(item.widths) for item in profile.measurements]
    chosen = []
    for _ in range(count):
        apart = np.min([np.abs(places - other).mean(axis=1) for other in taken], axis=0)
        best = int(np.argmax(worth * (1 - np.exp(-((apart / APART_OCTAVES) ** 2)))))
        chosen.append(candidates[best])
        taken.append(places[best])
    return chosen
