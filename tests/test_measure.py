"""`edgeprune measure`: one file, two files, what disturbs them, and what cannot be measured."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from evidence import make_graph, make_profile
from loopback.models import write_model

from edgeprune.core.describe import describe_facts, describe_measured
from edgeprune.core.effort import Effort
from edgeprune.core.errors import DataError, InputError, UsageError
from edgeprune.core.records import BoardFacts, Measured, Quantity, Samples
from edgeprune.core.stats import find_drift, find_modes, round_ratio, turn_medians, turn_ratios
from edgeprune.core.store import read_record, write_record
from edgeprune.device import by_input
from edgeprune.device.session import Session, open_session
from edgeprune.device.targets import read_target
from edgeprune.measure import describe_ratio, find_disturbances, is_settled, measure_files

REPOSITORY = Path(__file__).parent.parent
BRIEF = Effort(rounds=1, repeats=4, seconds=0.05, precision=None)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    local = read_target(REPOSITORY / "targets" / "localhost.toml")
    workdir = tmp_path_factory.mktemp("board")
    with open_session(replace(local, workdir=str(workdir), python=sys.executable)) as opened:
        yield opened


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for name, channels in (("small", 8), ("large", 256)):
        write_model(folder / f"{name}.onnx", channels=channels)
    shutil.copy(folder / "small.onnx", folder / "copy of small.onnx")
    return {path.stem: path for path in folder.iterdir()}


# --- on a board ------------------------------------------------------------------------------------


def test_one_file(session: Session, models: dict[str, Path], tmp_path: Path) -> None:
    measured = measure_files([models["small"]], session, effort=BRIEF)
    (timing,) = measured.timings
    assert timing.name == "small.onnx"
    assert timing.size_bytes == models["small"].stat().st_size
    assert 0 < timing.latency_s.low <= timing.latency_s.median <= timing.latency_s.high
    assert timing.quartiles_s[0] <= timing.quartiles_s[1] <= timing.p95_s
    assert len(timing.rounds) == BRIEF.repeats
    assert timing.activation_bytes is None or timing.activation_bytes > 0
    assert measured.ratio is None and measured.verdict == ""
    text = describe_measured(measured)
    assert "small.onnx" in text and "onnxruntime" in text
    write_record(tmp_path / "measured.json", measured)
    assert read_record(Measured, tmp_path / "measured.json") == measured


def test_two_files_are_timed_in_turns(session: Session, models: dict[str, Path]) -> None:
    """A net of 30 times the work is slower, whatever the machine does meanwhile; both had equally many turns."""
    measured = measure_files([models["small"], models["large"]], session, effort=BRIEF)
    first, second = measured.timings
    assert (first.name, second.name) == ("small.onnx", "large.onnx")
    for ours, theirs in zip(first.rounds, second.rounds, strict=True):
        assert len(turn_medians(ours)) == len(turn_medians(theirs)) >= 5
        for samples in (ours, theirs):
            # One thread: its processor time is the work, and no more than the clock saw, reading the clocks apart. A
            # machine that never leaves it a millisecond gives none.
            turns = np.reshape(samples.values, (-1, samples.per_turn)).mean(axis=1)
            assert len(samples.at_work) == len(turns) or len(samples.interrupted) > len(turns) / 2
            assert all(0 < work <= 1.1 * turn for work, turn in zip(samples.at_work, turns, strict=False))
    assert measured.ratio is not None and measured.ratio.median > 3
    assert "large.onnx is" in measured.verdict and "slower than small.onnx" in measured.verdict
    assert measured.verdict in describe_measured(measured)
    assert session.run([], job="x") == []


def test_several_threads_have_no_processor_time_to_compare(session: Session, models: dict[str, Path]) -> None:
    """The thread that is timed waits for the others now and then."""
    with open_session(replace(session.target, threads=2)) as threaded:
        measured = measure_files([models["small"], models["large"]], threaded, effort=BRIEF)
    assert all(samples.at_work == () for timing in measured.timings for samples in timing.rounds)
    assert measured.ratio is not None and measured.ratio.median > 1


def test_energy_by_a_meter(session: Session, models: dict[str, Path], tmp_path: Path) -> None:
    """A meter that says 4 W always: at work no more than at rest, so that an inference adds about nothing."""
    program = tmp_path / "meter.py"
    program.write_text("import time\nwhile True:\n    print(4.0, flush=True)\n    time.sleep(0.02)\n")
    target = replace(session.target, meter=f"command:{sys.executable} {program}")
    brief = replace(BRIEF, energy_s=1.0)
    with open_session(target) as metered:
        measured = measure_files([models["small"]], metered, effort=brief)
        assert measured.timings[0].energy_j is not None, measured.notes
        assert measured.timings[0].energy_j.median == pytest.approx(0, abs=1e-9)
    with open_session(replace(target, meter="command:/bin/true")) as broken:
        silent = measure_files([models["small"]], broken, effort=brief)
    assert silent.timings[0].energy_j is None
    assert any(note.startswith("no energy:") for note in silent.notes)


def test_nothing_stays_on_the_board(session: Session, models: dict[str, Path]) -> None:
    measure_files([models["small"]], session, effort=BRIEF)
    with pytest.raises(Exception, match=r"no file measure-0\.onnx"):
        session.fetch("measure-0.onnx", models["small"].with_name("back"))


def test_what_cannot_be_measured(session: Session, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        measure_files([tmp_path / "absent.onnx"], session)
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(UsageError, match="txt"):
        measure_files([tmp_path / "notes.txt"], session)
    with pytest.raises(UsageError, match="one file, or two"):
        measure_files([], session)


# --- what the samples say --------------------------------------------------------------------------


def test_ratios_are_of_neighbouring_turns() -> None:
    """The speed changes by half between turns, and the ratio does not see it."""
    speed = np.array([1.0, 1.5, 1.0, 1.5, 1.0])
    first = Samples(values=tuple(np.repeat(speed, 2) * ([1, 3] * 5)), per_turn=2)
    second = Samples(values=tuple(speed * 4), per_turn=1)
    assert turn_medians(first).tolist() == (2 * speed).tolist()
    assert turn_ratios(second, first) == pytest.approx([2.0] * 5)
    with pytest.raises(DataError, match="different numbers of turns"):
        turn_ratios(second, replace(first, per_turn=1))


def test_interrupted_turns_are_left_out_of_the_ratio() -> None:
    """Half of the turns took twice as long because something else ran; too few others are no reason to use them."""
    ours = Samples(values=tuple(np.tile([2.0, 4.0], 10)), interrupted=tuple(range(1, 20, 2)))
    theirs = Samples(values=(1.0,) * 20)
    assert turn_ratios(ours, theirs).tolist() == [2.0] * 10
    assert turn_ratios(theirs, ours).tolist() == [0.5] * 10
    assert len(turn_ratios(ours, replace(theirs, interrupted=tuple(range(0, 14, 2))))) == 20
    ours, theirs = replace(ours, at_work=(1.9,) * 20), replace(theirs, at_work=(0.95,) * 20)
    assert turn_ratios(ours, theirs).tolist() == [2.0] * 10, "the thread's own time needs no turn left out"
    ordered = replace(ours, at_work=tuple(np.tile([1.9 * 1.03, 1.9 / 1.03], 10)))
    assert turn_ratios(ordered, theirs) == pytest.approx([2.0] * 10), "who goes first falls out"
    notes = find_disturbances([[ours, ours]], [])
    assert any("something else had the processor in 50% of the turns" in note for note in notes)


def test_the_interval_of_a_ratio_covers_the_truth() -> None:
    """Rounds differ by 1 %: in 300 comparisons of equal files at most 2 % find a difference; 5 % is always found."""
    rng = np.random.default_rng(0)

    def compare(truth: float) -> Quantity:
        rounds = truth * np.exp(0.01 * rng.standard_normal((6, 1)) + 0.03 * rng.standard_normal((6, 80)))
        return round_ratio(list(rounds))

    same = [compare(1.0) for _ in range(300)]
    assert sum(not q.low <= 1 <= q.high for q in same) <= 6
    assert all(compare(1.05).low > 1 for _ in range(100))
    with pytest.raises(DataError, match="two rounds"):
        round_ratio([[1.0, 1.1]])


@pytest.mark.parametrize("spread", [0.003, 0.02])
def test_more_rounds_do_not_find_differences_that_are_none(spread: float) -> None:
    """The stop rule looks after every three rounds: still at most 4 % of 300 equal pairs differ, and 3 % is found."""
    rng = np.random.default_rng(4)

    def compare(truth: float) -> tuple[Quantity, int]:
        ratios = list(truth * np.exp(spread * rng.standard_normal(6)))
        while not is_settled(found := round_ratio([[ratio] for ratio in ratios]), 0.01) and len(ratios) < 24:
            ratios += list(truth * np.exp(spread * rng.standard_normal(3)))
        return found, len(ratios)

    same, slower = ([compare(truth) for _ in range(300)] for truth in (1.0, 1.03))
    assert sum(not q.low <= 1 <= q.high for q, _ in same) <= 12
    assert sum(q.low > 1 for q, _ in slower) >= 290
    if spread < 0.01:
        assert np.mean([rounds for _, rounds in (*same, *slower)]) < 7, "what is plain needs no more rounds"


def test_two_speeds_are_found_and_tails_are_not_taken_for_one() -> None:
    rng = np.random.default_rng(1)
    found = find_modes(1e-3 * np.exp(0.02 * rng.standard_normal(300)) * rng.choice([1, 1.2], 300, p=[0.7, 0.3]))
    assert found is not None
    (fast, fast_s), (slow, slow_s) = found
    assert fast + slow == pytest.approx(1)
    assert (fast, fast_s, slow_s) == pytest.approx((0.7, 1e-3, 1.2e-3), rel=0.08)
    tails = [find_modes(1e-3 * np.exp(0.05 * rng.exponential(size=300))) for _ in range(100)]
    assert sum(tail is not None for tail in tails) <= 5
    assert find_modes([1.0] * 300) is None
    assert find_modes([1.0, 2.0] * 10) is None


def test_drift_is_found_and_jumps_are_not_taken_for_it() -> None:
    rng = np.random.default_rng(2)
    assert find_drift(np.linspace(1, 1.1, 200) * np.exp(0.02 * rng.standard_normal(200))) == pytest.approx(
        0.1, abs=0.03
    )
    jumps = [np.exp(0.02 * rng.standard_normal(200)) * np.repeat(rng.choice([1, 1.3], 10), 20) for _ in range(100)]
    assert sum(find_drift(values) is not None for values in jumps) <= 2
    assert find_drift([1.0] * 5) is None


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [(0.9, 0.95, "b is 7.5% faster than a"), (1.02, 1.04, "b is 3.0% slower than a"), (0.99, 1.03, "no difference")],
)
def test_verdicts(low: float, high: float, says: str) -> None:
    assert says in describe_ratio(Quantity(median=(low + high) / 2, low=low, high=high), "a", "b")


def test_a_warm_up_that_did_not_settle_is_told() -> None:
    steady = Samples(values=(1e-3,) * 5, warm_up_ended="stable")
    moving = replace(steady, warm_up_ended="changing after 3 s")
    assert find_disturbances([[steady, steady]], []) == []
    (note,) = find_disturbances([[steady, moving], [steady, moving]], [])
    assert note == "2 of 4 warm-ups were not seen to become stable: changing after 3 s"


@pytest.mark.parametrize(("throttled", "says"), [("", "no"), (None, "not known"), ("soft limit", "soft limit")])
def test_throttling_is_told_apart_from_not_knowing(throttled: str | None, says: str) -> None:
    text = describe_facts(BoardFacts(arch="aarch64", throttled=throttled))
    (line,) = (line for line in text.splitlines() if line.startswith("throttled"))
    assert line.split(maxsplit=1)[1] == says


def test_the_pictures_of_how_we_measure_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """From any profile; well-formed, small, and with a point for each configuration."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools" / "docs"))
    draw = importlib.import_module("draw")
    profile = make_profile(make_graph())
    assert draw.draw_staircase(profile) is None, "every table there has two axes"
    first = profile.tables[0]
    one_axis = replace(first, in_sizes=first.in_sizes[:1], latency_s=first.latency_s[:1])
    profile = replace(profile, tables=(one_axis, *profile.tables[1:]))
    for name, function in draw.DRAWINGS.items():
        picture, says = function(profile)
        assert ElementTree.fromstring(picture).tag.endswith("svg") and says
        assert len(picture) < 150_000
        assert "nan" not in picture and "inf" not in picture
        if name == "predictions":
            configurations = {item.configuration for item in profile.measurements}
            assert picture.count("h0") == len(configurations) + len(("fitted", "held out"))


@pytest.mark.parametrize(("steady", "timed"), [(True, 40), (False, by_input.FEWEST_INPUTS)])
def test_every_input_is_timed_where_a_run_takes_the_same_time_every_time(steady: bool, timed: int) -> None:
    """No time is planned for such a board; elsewhere it decides how many inputs there can be."""
    seen: list[int] = []
    values, rounds = by_input.time_inputs(
        [seen.append, seen.append], range(40), 0.0, run_s=1.0, loops=1, working=False, steady=steady
    )
    assert [len(each) for each in values] == [timed, timed]
    assert set(seen) == set(range(timed))
    assert rounds == (1 if steady else by_input.MIN_ROUNDS)
