"""The programs that run on the board, without a board."""

from __future__ import annotations

import ast
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.core.family import list_members
from edgeprune.device import agent
from edgeprune.device.runtimes import onnxruntime as runtime
from edgeprune.device.warm_up import find_change, warm_up

DEVICE = Path(agent.__file__).parent
FIXTURES = Path(__file__).parent / "fixtures"
RUNTIMES = [f"runtimes/{name}.py" for name in list_members("device.runtimes")]
PROGRAMS = ["agent", "measure", "by_input", "warm_up", "energy", "pin"]
STANDARD = sys.stdlib_module_names | {"numpy", "runtime", *PROGRAMS}


@pytest.mark.parametrize("name", [*(f"{name}.py" for name in PROGRAMS), *RUNTIMES])
def test_programs_need_only_old_python_and_numpy(name: str) -> None:
    tree = ast.parse((DEVICE / name).read_text(), feature_version=(3, 9))
    imported = set()
    for statement in tree.body:
        if isinstance(statement, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            imported.add((statement.module or "").split(".")[0])
    assert imported <= STANDARD


def test_profile_of_onnxruntime() -> None:
    events = json.loads((FIXTURES / "onnxruntime" / "profile-1.31.json").read_text())
    runs = runtime.parse_profile(events)
    assert len(runs) == 3
    for seconds, kernels in runs:
        assert [op for _, op, _ in kernels] == ["Conv", "Conv", "ReorderOutput"]
        assert 0 < sum(kernel for _, _, kernel in kernels) <= seconds < 1


def test_profile_without_runs_is_empty() -> None:
    assert runtime.parse_profile([]) == []
    assert runtime.parse_profile([{"cat": "Node", "name": "x_fence_before"}]) == []


def test_results_survive_a_cut_line(tmp_path: Path) -> None:
    results = agent.Results(tmp_path, "run")
    results.append({"event": "begin", "key": "a"})
    with results.path.open("ab") as file:
        file.write(b'{"run": "run", "ev')
    results.close_line()
    results.append({"event": "begin", "key": "b"})
    assert [event["key"] for event in results.read()] == ["a", "b"]


def test_sources_are_read_and_absent_ones_are_empty(tmp_path: Path) -> None:
    for number in (0, 1):
        (tmp_path / f"zone{number}").write_text(f"{number}000\n")
    readings = agent.read_sources(
        {
            "files": {"argv": [], "files": [f"{tmp_path}/zone*"]},
            "command": {"argv": ["echo", "$(touch pwned)"], "files": []},
            "absent": {"argv": ["no-such-command"], "files": ["/no/such/file"]},
        }
    )
    assert readings["files"] == f"{tmp_path}/zone0:0000\n{tmp_path}/zone1:1000"
    assert readings["command"] == "$(touch pwned)"
    assert readings["absent"] == ""


# --- warming up ------------------------------------------------------------------------------------


class Series:
    """Runs that take given seconds, and the clock that they move on."""

    def __init__(self, durations: Iterable[float]) -> None:
        self.durations = iter(durations)
        self.now = 0.0

    def run(self) -> None:
        self.now += next(self.durations)

    def clock(self) -> float:
        return self.now


def endless(level: Callable[[int], float], *, noise: float = 0.0, seed: int = 0) -> Iterator[float]:
    """Run number -> seconds, with log-normal noise."""
    rng = np.random.default_rng(seed)
    return (level(number) * float(np.exp(noise * rng.standard_normal())) for number in itertools.count())


@given(seconds=st.floats(2e-5, 0.25), seed=st.integers(0, 99))
def test_a_warm_up_of_a_steady_model_is_short(seconds: float, seed: int) -> None:
    series = Series(endless(lambda _: seconds, noise=0.005, seed=seed))
    warm = warm_up(series.run, clock=series.clock)
    assert warm.ended == "stable"
    assert warm.run_s == pytest.approx(seconds, rel=0.01)
    assert series.now < 0.09 + 12 * seconds


@given(seconds=st.floats(2e-5, 0.05), slower=st.floats(1.1, 5), warm_s=st.floats(0.02, 1.5), seed=st.integers(0, 99))
def test_what_lies_before_a_step_is_warm_up(seconds: float, slower: float, warm_s: float, seed: int) -> None:
    """Where the step is too early or too late for the blocks to show it, they lie nearly all on one side of it."""
    series = Series(())
    noise = endless(lambda _: seconds, noise=0.003, seed=seed)
    series.durations = (next(noise) * (slower if series.now < warm_s else 1) for _ in itertools.count())
    warm = warm_up(series.run, clock=series.clock)
    assert warm.ended == "stable"
    if series.now < warm_s:  # it was as steady as can be before the step came
        assert warm.run_s == pytest.approx(slower * seconds, rel=0.01)
    elif series.now > warm_s + 8 * (0.008 + slower * seconds):
        assert warm.run_s == pytest.approx(seconds, rel=0.01)


def test_a_decay_is_waited_for() -> None:
    """Halved every 0.1 s, the excess is below 10 % when the warm-up ends."""
    for seconds in (5e-5, 1e-3, 2e-2):
        series = Series(())
        series.durations = (seconds * (1 + 2 * 0.5 ** (series.now / 0.1)) for _ in itertools.count())
        warm = warm_up(series.run, clock=series.clock)
        assert warm.ended == "stable" and seconds < warm.run_s < 1.1 * seconds


@given(seed=st.integers(0, 99))
def test_what_jumps_between_two_speeds_is_not_waited_for(seed: int) -> None:
    """Jumps from run to run are how the board is, not a warm-up."""
    rng = np.random.default_rng(seed)
    series = Series(1e-3 * (1.3 if rng.random() < 0.4 else 1.0) for _ in itertools.count())
    warm = warm_up(series.run, clock=series.clock)
    assert warm.ended == "stable" and 1e-3 <= warm.run_s <= 1.3e-3
    assert series.now < 0.5


def test_it_ends_though_the_board_never_settles() -> None:
    series = Series(())
    series.durations = (1e-3 * 2 ** (series.now / 0.3) for _ in itertools.count())
    warm = warm_up(series.run, clock=series.clock, limit_s=1.0)
    assert warm.ended == "changing after 1 s" and 1.0 < series.now < 1.1


def test_a_slow_model_costs_its_limit_and_says_that_this_is_too_little() -> None:
    for seconds, runs in ((2.0, 2), (0.7, 5), (200.0, 2)):
        series = Series(endless(lambda _, seconds=seconds: seconds))
        warm = warm_up(series.run, clock=series.clock)
        assert (warm.ended, warm.runs) == ("too few runs in 3 s", runs)
        assert warm.run_s == pytest.approx(seconds)


def test_noise_alone_is_seldom_taken_for_a_change() -> None:
    """Exchangeable values: 7 % by the count of permutations, so at most 10 % of 1000 here."""
    rng = np.random.default_rng(3)
    found = [find_change(list(1 + 0.1 * rng.random(10))) for _ in range(1000)]
    assert sum(place is not None for place in found) <= 100
    for place in range(3, 8):
        assert find_change([1.1] * place + [1.0] * (10 - place)) == place
        assert find_change([1.015] * place + [1.0] * (10 - place)) is None, "too little to matter"
    assert find_change([1.0] * 10) is None
