"""The design of configurations, the fit on known costs, and profiling on a real board, killed and resumed."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exactness import randomise
from torch import nn

from edgeprune.core.cost import kernel_latency, predict_cost, predict_latency
from edgeprune.core.describe import describe_profile
from edgeprune.core.effort import Effort
from edgeprune.core.errors import RecordError, UsageError
from edgeprune.core.records import (
    Conditions,
    Extent,
    Graph,
    Group,
    Kernel,
    Measurement,
    PowerSamples,
    Profile,
    Samples,
    Table,
    Target,
)
from edgeprune.core.stats import median
from edgeprune.core.store import read_lines
from edgeprune.device.session import Session, open_session
from edgeprune.device.targets import read_target
from edgeprune.formats.onnx import make_resizer
from edgeprune.profile import measure_widths, measured_energy, profile_target, read_profile, reference_latency
from edgeprune.tables.black_box import BlackBox
from edgeprune.tables.combine import PLANNED, average_rounds, combine, fit_memory, measured_latency
from edgeprune.tables.design import DENSE, Configuration, choose_next, design_configurations
from edgeprune.tables.fit import Observations, fit_kernel, tabulate
from edgeprune.tables.stored import ProfileHeading, derive_profile
from edgeprune.trace import trace_graph

REPOSITORY = Path(__file__).parents[1]

# --- fitting one kernel ----------------------------------------------------------------------------


def _cost(i: np.ndarray, o: np.ndarray, tile_in: int, tile_out: int) -> np.ndarray:
    wide_in, wide_out = -(-i // tile_in) * tile_in, -(-o // tile_out) * tile_out
    return 5e-6 + 2e-8 * wide_in + 3e-8 * wide_out + 4e-9 * wide_in * wide_out


def _observe(tile_in: int, tile_out: int, noise: float, seed: int) -> Observations:
    rng = np.random.default_rng(seed)
    i, o = rng.integers(2, 33, 60) * 4, rng.integers(2, 33, 60) * 4
    time_s = _cost(i, o, tile_in, tile_out) * np.exp(noise * rng.standard_normal(60))
    time_s[:3] *= 2.5  # interrupted
    return Observations(sizes_in=i, sizes_out=o, time_s=time_s, configuration=np.arange(60), weight=np.ones(60))


@pytest.mark.parametrize("tiles", [(1, 16), (8, 8), (16, 32), (1, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_staircase_is_found(tiles: tuple[int, int], seed: int) -> None:
    """Tiles and costs are recovered from noisy timings with outliers, over the whole plane."""
    fit = fit_kernel(_observe(*tiles, noise=0.02, seed=seed))
    # Without a staircase a wrong one is harmless as long as the costs are right.
    assert tiles == (1, 1) or (fit.tile_in, fit.tile_out) == tiles
    table = tabulate(fit, "conv", 128, 128)
    sizes = np.arange(16, 129, 8 if tiles == (1, 1) else 4)
    i, o = (axis.ravel() for axis in np.meshgrid(sizes, sizes))
    error = kernel_latency(table, i, o) / _cost(i, o, *tiles) - 1
    assert np.abs(error).mean() < 0.02
    assert np.abs(error).max() < 0.08
    assert table.out_sizes[-1] == 128
    assert (np.diff(table.latency_s, axis=1) > -1e-12).all() or fit.smoothing is not None


def test_sizes_off_the_alignment_do_not_bend_the_table() -> None:
    """Sizes that leave the blocked layout cost twice as much; the table of the others stays right."""
    data = _observe(1, 16, 0.01, seed=5)
    odd = replace(data, sizes_in=data.sizes_in.copy(), time_s=data.time_s.copy())
    odd.sizes_in[10:18] += 1
    odd.time_s[10:18] *= 2
    table = tabulate(fit_kernel(odd), "conv", 128, 128)
    i, o = np.arange(16, 129, 8), np.full(15, 64)
    assert np.abs(kernel_latency(table, i, o) / _cost(i, o, 1, 16) - 1).max() < 0.05


def test_one_observation_is_a_constant() -> None:
    one = np.ones(1, np.int64)
    data = Observations(
        sizes_in=0 * one, sizes_out=64 * one, time_s=one * 2e-6, configuration=0 * one, weight=one * 1.0
    )
    table = tabulate(fit_kernel(data), "pool", 0, 64)
    assert kernel_latency(table, 0, 64) == pytest.approx(2e-6, rel=0.01)


# --- a whole synthetic board -----------------------------------------------------------------------


def _chain_graph(widths: tuple[int, ...] = (64, 128, 96, 64)) -> Graph:
    groups = tuple(Group(name=f"g{index}", units=units) for index, units in enumerate(widths))
    return Graph(model_sha256="0" * 64, inputs=(), outputs=(), nodes=(), parameters=(), groups=groups)


def _kernels(graph: Graph) -> tuple[Kernel, ...]:
    names = [group.name for group in graph.groups]
    return tuple(
        Kernel(
            name=f"k{index}", nodes=(), signature=f"s{index}",
            in_extent=Extent(groups=((before, 1),)), out_extent=Extent(groups=((after, 1),)),
        )
        for index, (before, after) in enumerate(itertools.pairwise(names))
    )  # fmt: skip


CONDITIONS = Conditions(board="b", arch="x", cpu="c", runtime="r", runtime_version="1")


def _measure(
    graph: Graph, *, noise: float = 0.015, seed: int = 0, inflation: float = 4e-6, configurations: int = 40,
    more: Sequence[Configuration] = (), slower: float = 1.0,
) -> list[Measurement]:  # fmt: skip
    """A board that drifts and jumps between two speeds, with a profiler that adds to each kernel.

    more: configurations besides the usual ones. slower: times as long as usual for every kernel.
    """
    rng = np.random.default_rng(seed)
    kernels = _kernels(graph)
    sweep = [*design_configurations(graph, configurations, 8, seed=seed), *more]
    measurements = []

    def kernel_times(widths: dict[str, int]) -> dict[str, float]:
        times = {}
        for kernel in kernels:
            assert kernel.in_extent is not None
            sizes = [np.array(extent.size(widths, widths)) for extent in (kernel.in_extent, kernel.out_extent)]
            times[kernel.name] = slower * float(_cost(sizes[0], sizes[1], 4, 16))
        return times

    def turns(times: dict[str, float], speed: np.ndarray) -> Samples:
        jitter = np.exp(noise * rng.standard_normal(18))
        return Samples(values=tuple((sum(times.values()) + 3e-6) * jitter * np.repeat(speed, 2)), per_turn=2)

    def profiled(times: dict[str, float], speed: float) -> dict[str, float]:
        jitter = np.exp(noise * rng.standard_normal(len(times)))
        return {name: (t + inflation) * speed * j for (name, t), j in zip(times.items(), jitter, strict=True)}

    dense = kernel_times(graph.units)
    for number in range(3):
        for place, index in enumerate(rng.permutation(len(sweep))):
            item, drift = sweep[index], 1 + 0.33 * np.sin(place / 8) ** 2
            # Within one timing the board changes between two speeds, turn by turn.
            speed = drift * rng.choice([1.0, 1.25], 9)
            mode = drift * rng.choice([1.0, 1.25])
            ours = profiled(kernel_times(item.widths), mode)
            measurements.append(
                Measurement(
                    configuration=item.name, round=number, widths=item.widths, held_out=item.held_out,
                    samples=turns(kernel_times(item.widths), speed), dense=turns(dense, speed), kernels=ours,
                    run_s=sum(ours.values()) * 1.05, dense_run_s=sum(profiled(dense, mode).values()) * 1.05,
                    conditions=CONDITIONS,
                )
            )  # fmt: skip
    return measurements


def test_profile_predicts_what_it_never_saw() -> None:
    """Drift and the profiler's own time are taken out: held-out error within the aim."""
    graph = _chain_graph()
    combined = combine(_kernels(graph), _measure(graph))
    assert combined.held_out is not None
    assert combined.held_out.configurations == 8
    assert combined.held_out.mean < 0.02
    assert combined.held_out.max < 0.05
    assert combined.additivity_gap == pytest.approx(0.05 / 1.05, abs=0.01)
    assert combined.overhead_s >= 0


def _profile(graph: Graph, measurements: Sequence[Measurement], known: Sequence[Table] = ()) -> Profile:
    heading = ProfileHeading(
        target="t", conditions=CONDITIONS, graph_sha256=graph.model_sha256, artifact_sha256="", dense_bytes=0,
        kernels=_kernels(graph), job="j", known=tuple(known),
    )  # fmt: skip
    return derive_profile(heading, measurements)


def _true_latency(graph: Graph, widths: Mapping[str, int], slower: float = 1.0) -> float:
    """Of the synthetic board at its usual speed, up to a factor."""
    total = 3e-6
    for kernel in _kernels(graph):
        assert kernel.in_extent is not None
        sizes = [np.array(extent.size(widths, widths)) for extent in (kernel.in_extent, kernel.out_extent)]
        total += slower * float(_cost(sizes[0], sizes[1], 4, 16))
    return total


@pytest.mark.parametrize("seed", range(3))
def test_intervals_hold_what_is_true(seed: int) -> None:
    """Of latencies that were never measured nine of ten lie within the interval, and it is not wide."""
    graph = _chain_graph()
    profile = _profile(graph, _measure(graph, seed=seed))
    dense = reference_latency(profile).median / _true_latency(graph, graph.units)
    plans = [item.widths for item in design_configurations(graph, 2, 100, seed=50 + seed) if item.held_out]
    told = [predict_cost(graph, widths, profile).latency_s for widths in plans]
    assert all(quantity is not None for quantity in told)
    inside = [q.low <= dense * _true_latency(graph, w) <= q.high for q, w in zip(told, plans, strict=True) if q]
    assert np.mean(inside) >= 0.85
    assert np.mean([(q.high - q.low) / q.median for q in told if q]) < 0.12
    # Without folds and held-out configurations nothing is known of the error.
    bare = replace(profile, folds=(), held_out=None)
    nothing = predict_cost(graph, plans[0], bare).latency_s
    assert nothing is not None and nothing.low == nothing.median == nothing.high


def test_the_next_configurations_are_where_the_tables_are_least_sure() -> None:
    """Nothing narrow of one group was measured: that is what is asked for; near the budget if there is one."""
    graph = _chain_graph()
    wide = [item for item in _measure(graph, noise=0.03) if item.widths["g1"] >= 96]
    profile = _profile(graph, wide)
    assert len(profile.folds) == 5
    chosen = choose_next(graph, profile, 8)
    assert len({tuple(widths.values()) for widths in chosen}) == 8
    assert all(widths[group.name] % 8 == 0 for widths in chosen for group in graph.groups)
    assert sum(widths["g1"] < 96 for widths in chosen) >= 6
    budget_s = 0.5 * reference_latency(profile).median
    near = choose_next(graph, profile, 8, budget_s=budget_s)
    shares = [predict_latency(graph, widths, profile) / budget_s for widths in near]
    assert 0.6 < np.median(shares) < 1.5
    assert choose_next(graph, profile, 4, budget_s=budget_s) == near[:4], "the same measurements, the same choice"
    assert {widths["g0"] % 16 for widths in choose_next(graph, profile, 4, step=16)} == {0}


def test_known_tables_make_few_configurations_enough() -> None:
    """Tables of a board 1.7 times as fast: eight configurations do as well as many, and better than by themselves."""
    graph = _chain_graph()
    elsewhere = _profile(graph, _measure(graph, seed=9, slower=1 / 1.7))
    few = _measure(graph, configurations=8)
    alone, helped = _profile(graph, few), _profile(graph, few, elsewhere.tables)
    assert alone.held_out is not None and helped.held_out is not None
    assert helped.held_out.mean < 0.015 < 0.03 and helped.held_out.mean < alone.held_out.mean
    # Where the kernels behave otherwise here, enough measurements win over what was known.
    bent = [replace(table, latency_s=table.latency_s[::-1].copy()) for table in elsewhere.tables]
    misled = _profile(graph, _measure(graph), bent)
    assert misled.held_out is not None and misled.held_out.mean < 0.02


def test_whole_models_alone_make_tables() -> None:
    """No kernel was timed: unseen widths are told as well, the tile is found, tables rise with both sizes."""
    graph = _chain_graph()
    wholes = [replace(item, kernels={}, run_s=None, dense_run_s=None) for item in _measure(graph)]
    profile = _profile(graph, wholes)
    assert profile.held_out is not None and profile.held_out.configurations == 8
    assert profile.held_out.mean < 0.03 and profile.held_out.max < 0.06
    assert profile.additivity_gap is None and "whole models alone" in describe_profile(profile)
    assert len(profile.folds) == 5 and profile.overhead_s >= 0
    for table in profile.tables:
        assert (np.diff(table.latency_s, axis=0) >= 0).all() and (np.diff(table.latency_s, axis=1) >= 0).all()
    # Sizes rounded up to 16 make 17 units cost what 32 do.
    staircase = BlackBox(_kernels(graph), graph.units)
    sweep = [item.widths for item in design_configurations(graph, 40, 0)]
    sums = np.array([
        sum(float(_cost(*(np.array(e.size(w, w)) for e in (k.in_extent, k.out_extent) if e), 16, 16))
            for k in _kernels(graph)) for w in sweep
    ])  # fmt: skip
    assert staircase.choose_form(sweep, sums).tile == 16


def test_power_of_each_operator_is_found() -> None:
    """Three operators draw 2, 5 and 3 W, the meter errs by 2 %: energies of unseen widths are within 3 %."""
    graph, rng = _chain_graph(), np.random.default_rng(1)
    kernels, watts = _kernels(graph), {"k0": 2.0, "k1": 5.0, "k2": 3.0}
    fast = reference_latency(_profile(graph, _measure(graph))).median / _true_latency(graph, graph.units)

    def metered(item: Measurement) -> Measurement:
        joules = 3.0 * fast * 3e-6
        for kernel in kernels:
            assert kernel.in_extent is not None
            sizes = [np.array(e.size(item.widths, item.widths)) for e in (kernel.in_extent, kernel.out_extent)]
            joules += fast * watts[kernel.name] * float(_cost(sizes[0], sizes[1], 4, 16))
        runs, seconds = 1000, 1000 * fast * _true_latency(graph, item.widths)
        added = joules * runs / seconds * (1 + 0.02 * rng.standard_normal(40))
        power = PowerSamples(
            idle_times_s=(-1.0, 99.0), idle_w=(1.5, 1.5), active_times_s=tuple(np.linspace(0, seconds, 40)),
            active_w=tuple(1.5 + added), seconds=seconds, runs=runs,
        )  # fmt: skip
        return replace(item, power=power)

    measurements = [metered(item) if item.round == 0 else item for item in _measure(graph)]
    profile = _profile(graph, measurements)
    assert profile.energy is not None and profile.energy.error is not None
    assert profile.energy.error.configurations == 8 and profile.energy.error.max < 0.03
    powers = list(profile.energy.power_w.values())
    assert powers[1] > 1.5 * powers[0] and powers[1] > 1.2 * powers[2]
    told = predict_cost(graph, graph.units, profile).energy_j
    true = measured_energy(profile.measurements, {}, graph)
    assert told is not None and true is not None and told.median == pytest.approx(true.median, rel=0.03)
    assert told.low < told.median < told.high
    # What no measurement can tell apart draws what the whole does; what was not measured is not known.
    alone = _profile(graph, [metered(item) if item.configuration == DENSE else item for item in _measure(graph)])
    assert alone.energy is not None and alone.energy.error is None
    assert list(alone.energy.power_w.values()) == pytest.approx([alone.energy.mean_w] * 3, rel=0.02)
    assert _profile(graph, _measure(graph)).energy is None


def test_held_out_configurations_are_not_fitted() -> None:
    graph = _chain_graph()
    measurements = _measure(graph)
    # Kernel times only: whole times of all configurations tell the drift, which is no fit to widths.
    altered = [
        replace(item, kernels={name: 3 * seconds for name, seconds in item.kernels.items()}) if item.held_out else item
        for item in measurements
    ]
    without = [item for item in measurements if not item.held_out]
    kernels = _kernels(graph)
    full, changed, alone = combine(kernels, measurements), combine(kernels, altered), combine(kernels, without)
    assert alone.held_out is None
    for table, other, third in zip(full.tables, changed.tables, alone.tables, strict=True):
        np.testing.assert_allclose(table.latency_s, other.latency_s, rtol=0.03)
        np.testing.assert_allclose(table.latency_s, third.latency_s, rtol=0.03)


def test_changes_of_speed_fall_out_of_ratios() -> None:
    """The board is up to two thirds slower from one timing to the next; what is left is a per cent."""
    graph = _chain_graph()
    calm = {item.name: item.whole_s for item in average_rounds(_measure(graph, noise=0.0))}
    rough = {item.name: item.whole_s for item in average_rounds(_measure(graph, noise=0.015))}
    raw = {item.configuration: median(item.samples.values) for item in _measure(graph)}
    dense = calm[DENSE] / rough[DENSE]
    errors = [abs(rough[name] * dense / calm[name] - 1) for name in calm]
    assert max(errors) < 0.03
    assert max(abs(raw[name] / raw[DENSE] / (calm[name] / calm[DENSE]) - 1) for name in calm) > 0.2


def test_planned_widths_do_not_move_the_reference_latency() -> None:
    measurements = _measure(_chain_graph())
    slow = Samples(values=tuple(3 * value for value in measurements[0].dense.values), per_turn=2)
    planned = replace(measurements[0], configuration=PLANNED + "x", dense=slow)
    assert measured_latency([*measurements, planned]) == measured_latency(measurements)
    half = Samples(values=tuple(value / 2 for value in slow.values), per_turn=2)
    found = measured_latency([*measurements, replace(planned, samples=half)], PLANNED + "x")
    assert found.median == pytest.approx(measured_latency(measurements).median / 2)


def test_interrupted_turns_do_not_count() -> None:
    """Two of three turns took an interruption along, and are known to have: latencies are those of the others."""
    graph = _chain_graph()
    calm = _measure(graph, noise=0.0)
    hit = {place for place in range(9) if place % 3}  # nine turns of two samples

    def disturbed(samples: Samples) -> Samples:
        values = [value * (1.3 if place // 2 in hit else 1.0) for place, value in enumerate(samples.values)]
        return replace(samples, values=tuple(values * 2), interrupted=tuple(sorted(hit | {n + 9 for n in hit})))

    rough = [replace(item, samples=disturbed(item.samples), dense=disturbed(item.dense)) for item in calm]
    assert measured_latency(rough).median == pytest.approx(measured_latency(calm).median, rel=0.1)
    unknown = [replace(item, dense=replace(item.dense, interrupted=())) for item in rough]
    assert measured_latency(unknown).median > 1.1 * measured_latency(rough).median
    name = calm[5].configuration
    assert measured_latency(rough, name).median / measured_latency(rough).median == pytest.approx(
        measured_latency(calm, name).median / measured_latency(calm).median, rel=0.02
    )


def test_dense_model_must_have_been_measured() -> None:
    graph = _chain_graph()
    others = [item for item in _measure(graph) if item.configuration != DENSE]
    with pytest.raises(RecordError, match="dense"):
        combine(_kernels(graph), others)
    with pytest.raises(RecordError, match="nowhere"):
        measured_latency(_measure(graph), "nowhere")


# --- the design ------------------------------------------------------------------------------------


def test_design_covers_the_plane_and_obeys_steps() -> None:
    groups = (
        Group(name="a", units=64),
        Group(name="b", units=48, step=3),
        Group(name="c", units=10, frozen_because="x"),
    )
    graph = Graph(model_sha256="", inputs=(), outputs=(), nodes=(), parameters=(), groups=groups)
    sweep = design_configurations(graph, 40, 8)
    assert sweep[0].widths == graph.units
    assert [item.held_out for item in sweep] == [False] * 40 + [True] * 8
    assert len({item.name for item in sweep}) == 48
    for item in sweep:
        assert item.widths["c"] == 10
        assert item.widths["b"] % 3 == 0
        assert all(1 <= item.widths[group.name] <= group.units for group in groups)
    a = np.array([item.widths["a"] for item in sweep if not item.held_out])
    b = np.array([item.widths["b"] for item in sweep if not item.held_out])
    quarters = set(zip((a - 1) // 16, (b - 1) // 12, strict=True))
    assert len(quarters) >= 9, "the plane of two groups that meet in a kernel is not covered"
    assert (a % 16 == 0).any() and (a % 16 != 0).any()
    assert {item.widths["a"] % 16 for item in design_configurations(graph, 20, 4, step=16)} == {0}
    longer = design_configurations(graph, 44, 8)
    assert [item.widths for item in longer[:40]] == [item.widths for item in sweep[:40]]


# --- on a board ------------------------------------------------------------------------------------

MODEL = """
import torch
from torch import nn
def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 8, 1)
    ).eval()
def inputs():
    return (torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)),)
"""
BRIEF = Effort(rounds=2, repeats=2, seconds=0.01, precision=None)
OPTIONS = {"configurations": 18, "held_out": 2, "effort": BRIEF, "error": None}
FIRST_BATCH = 2 * (16 + 2)
EXPECTED = FIRST_BATCH + 2 * 2


def _make() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    scope: dict[str, Callable[[], object]] = {}
    exec(MODEL, scope)
    module, inputs = scope["make"](), scope["inputs"]()
    assert isinstance(module, nn.Module) and isinstance(inputs, tuple)
    return module, inputs


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    local = read_target(REPOSITORY / "targets" / "localhost.toml")
    return replace(local, workdir=str(tmp_path_factory.mktemp("board")), python=sys.executable)


@pytest.fixture(scope="module")
def session(target: Target) -> Session:
    with open_session(target) as opened:
        yield opened


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_profiling_goes_on(session: Session, target: Target, tmp_path: Path) -> None:
    """SIGKILL in the second batch; the same rest is measured, nothing twice, nothing lost, and it can be added to."""
    path = tmp_path / "profile.jsonl"
    (tmp_path / "net.py").write_text(MODEL)
    script = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import torch, net
        from pathlib import Path
        from edgeprune.core.effort import Effort
        from edgeprune.core.records import Target
        from edgeprune.device.session import open_session
        from edgeprune.profile import profile_target
        from edgeprune.trace import trace_graph
        torch.set_num_threads(1)
        graph = trace_graph(net.make(), net.inputs())
        target = Target(name="localhost", transport="local", workdir={target.workdir!r}, python=sys.executable)
        with open_session(target) as session:
            profile_target(net.make(), net.inputs(), graph, session, path=Path({str(path)!r}), **{OPTIONS!r})
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], start_new_session=True)
    deadline = time.monotonic() + 280
    while time.monotonic() < deadline and child.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") > FIRST_BATCH + 1:
            break
        time.sleep(0.005)
    assert child.poll() is None, "the child ended before it could be killed"
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    before = path.read_bytes()
    complete = before[: before.rfind(b"\n") + 1]
    assert complete.count(b"\n") - 1 < EXPECTED
    path.write_bytes(complete + b'{"schema": "edgeprune.Measu')  # as a kill in mid-write leaves it

    module, inputs = _make()
    graph = trace_graph(module, inputs)
    resizer = make_resizer(module, inputs, graph)
    profile = profile_target(module, inputs, graph, session, path=path, resizer=resizer, **OPTIONS)
    assert path.read_bytes().startswith(complete)
    assert len(profile.measurements) == EXPECTED
    places = [(item.round, item.configuration) for item in profile.measurements]
    assert len(set(places)) == EXPECTED
    assert all(len(item.dense.values) // item.dense.per_turn >= 5 for item in profile.measurements)
    assert profile.held_out is not None and profile.held_out.configurations == 2
    assert all(item.kernels and item.run_s for item in profile.measurements)
    assert predict_latency(graph, {}, profile) > 0
    assert profile.memory is not None and profile.memory.scale > 0
    with_memory = [item for item in profile.measurements if item.arena_bytes]
    assert len(with_memory) == 1 + 8 + 2 and all(item.activation_bytes and item.round == 0 for item in with_memory)

    again = profile_target(module, inputs, graph, session, path=path, **OPTIONS)
    assert again.measurements == profile.measurements

    half = {group.name: group.units // 2 for group in graph.prunable}
    grown, (latency, dense) = measure_widths(
        module, inputs, graph, session, profile, path, [half, {}], effort=BRIEF, resizer=resizer
    )
    assert len(grown.measurements) == EXPECTED + 2
    assert latency.low <= latency.median <= latency.high
    assert dense == reference_latency(grown)
    unchanged, repeated = measure_widths(module, inputs, graph, session, grown, path, [half], effort=BRIEF)
    assert unchanged.measurements == grown.measurements
    assert repeated == [latency]

    # The same file does not take another graph, other widths or other conditions.
    other = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)))
    with pytest.raises(RecordError, match="another model"):
        read_profile(path, trace_graph(other, inputs))
    with pytest.raises(RecordError, match="other options"):
        profile_target(module, inputs, graph, session, path=path, **{**OPTIONS, "step": 16})
    lines = list(read_lines(path, ProfileHeading, Measurement))
    with open_session(replace(target, threads=2)) as unlike, pytest.raises(RecordError, match="threads was 1, is 2"):
        profile_target(module, inputs, graph, unlike, path=path, **{**OPTIONS, "effort": replace(BRIEF, rounds=3)})
    assert list(read_lines(path, ProfileHeading, Measurement)) == lines


@pytest.mark.timeout(300)
def test_a_runtime_that_tells_no_kernels(session: Session, tmp_path: Path) -> None:
    """Kernels as the artifact's structure has them; whole models only; planned widths are measured alike."""
    module, inputs = _make()
    graph = trace_graph(module, inputs)
    path, brief = tmp_path / "profile.jsonl", replace(BRIEF, rounds=1, repeats=1)
    options = {"path": path, "configurations": 9, "held_out": 2, "effort": brief}
    profile = profile_target(module, inputs, graph, session, black_box=True, **options)
    convolutions = [kernel for kernel in profile.kernels if kernel.in_extent is not None]
    assert [(kernel.positions, kernel.taps) for kernel in convolutions] == [(256, 9), (256, 9), (256, 1)]
    assert all(not item.kernels and item.run_s is None for item in profile.measurements)
    assert profile.held_out is not None and predict_latency(graph, {}, profile) > 0
    half = {group.name: group.units // 2 for group in graph.prunable}
    grown, (latency,) = measure_widths(module, inputs, graph, session, profile, path, [half], effort=brief)
    assert latency.median > 0 and not grown.measurements[-1].kernels
    # Without being told again: the file knows.
    assert profile_target(module, inputs, graph, session, **options).measurements == grown.measurements


def test_refusals(session: Session, tmp_path: Path) -> None:
    module, inputs = _make()
    graph = trace_graph(module, inputs)
    with pytest.raises(UsageError, match="at least 2"):
        profile_target(module, inputs, graph, session, path=tmp_path / "p.jsonl", configurations=1)
    with pytest.raises(RecordError, match="holds no profile"):
        read_profile(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text("not a profile\n")
    with pytest.raises(RecordError, match="line 1"):
        read_profile(tmp_path / "p.jsonl")


def test_memory_is_a_line_through_what_was_measured() -> None:
    """1.2 bytes per byte and 40 KiB on top, within 3 %; held-out ones are not fitted, a fallback is not believed."""
    rng = np.random.default_rng(0)
    live = rng.integers(100_000, 900_000, 12)
    some = _measure(_chain_graph())[:12]

    def measured(scale: float, held: int) -> list[Measurement]:
        return [
            replace(item, configuration=str(i), held_out=i >= held, arena_bytes=int(bytes_),
                    activation_bytes=int((40_960 + scale * bytes_) * (1 + 0.03 * rng.uniform(-1, 1))))
            for i, (item, bytes_) in enumerate(zip(some, live, strict=True))
        ]  # fmt: skip

    ours = measured(1.2, 8)
    ours[3] = replace(ours[3], activation_bytes=3 * (ours[3].activation_bytes or 0))
    model = fit_memory(ours)
    assert model is not None and model.error is not None
    assert model.scale == pytest.approx(1.2, abs=0.08)
    assert model.error.configurations == 4 and model.error.max < 0.06
    alone = fit_memory(measured(1.5, 2))
    assert alone is not None and alone.base_bytes == 0 and alone.scale > 1.5
    assert fit_memory(some) is None


def test_rounds_are_averaged_by_medians() -> None:
    graph = _chain_graph()
    measurements = _measure(graph)
    index = next(i for i, item in enumerate(measurements) if item.configuration == "fit-05")
    samples = measurements[index].samples
    broken = replace(measurements[index], samples=replace(samples, values=tuple(5 * v for v in samples.values)))
    disturbed = [*measurements[:index], broken, *measurements[index + 1 :]]
    calm = {item.name: item.whole_s for item in average_rounds(measurements)}
    rough = {item.name: item.whole_s for item in average_rounds(disturbed)}
    assert rough["fit-05"] == pytest.approx(calm["fit-05"], rel=0.05)
