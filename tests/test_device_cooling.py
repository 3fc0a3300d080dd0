"""What a throttled board measured is measured again, and delivered once, under its own name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from loopback.models import write_model

from edgeprune.core.records import Conditions, Step, StepResult
from edgeprune.device import session as session_module
from edgeprune.device.boards import linux
from edgeprune.device.cooling import ATTEMPTS, run_cool
from edgeprune.device.session import open_session
from edgeprune.device.targets import read_target

REPOSITORY = Path(__file__).parent.parent
CONDITIONS = Conditions(board="b", arch="x", cpu="c", runtime="r", runtime_version="1")


class Board:
    """Throttled for the first `hot` measurements of each step."""

    def __init__(self, hot: dict[str, int]) -> None:
        self.hot = dict(hot)
        self.measured: list[str] = []

    def carry_out(self, steps: Sequence[Step], on_result: Callable[[StepResult], None]) -> None:
        for step in steps:
            self.measured.append(step.key)
            name = step.key.split("~")[0]
            self.hot[name] = self.hot.get(name, 0) - 1
            throttled = "too hot" if self.hot[name] >= 0 else ""
            conditions = replace(CONDITIONS, throttled=throttled)
            on_result(StepResult(key=step.key, kind=step.kind, conditions=conditions))


def run(board: Board, *, cools: bool = True) -> list[StepResult]:
    steps = [Step(key="a", kind="time", artifact="x"), Step(key="b", kind="kernels", artifact="x"),
             Step(key="c", kind="outputs", artifact="x")]  # fmt: skip
    delivered: list[StepResult] = []
    run_cool(steps, board.carry_out, lambda: cools, delivered.append)
    assert sorted(result.key for result in delivered) == ["a", "b", "c"]
    return delivered


def throttled(results: Sequence[StepResult]) -> list[str]:
    return sorted(result.key for result in results if result.conditions is not None and result.conditions.throttled)


def test_a_cool_board_is_measured_once() -> None:
    board = Board({})
    assert throttled(run(board)) == []
    assert board.measured == ["a", "b", "c"]


def test_only_what_was_throttled_is_repeated() -> None:
    """Outputs do not depend on the clock."""
    board = Board({"b": 1, "c": 1})
    assert throttled(run(board)) == ["c"]
    assert board.measured == ["a", "b", "c", "b~1"]


def test_a_board_that_stays_hot_says_so() -> None:
    board = Board({"a": 99})
    assert throttled(run(board)) == ["a"]
    assert board.measured.count("a") + sum(key.startswith("a~") for key in board.measured) == ATTEMPTS + 1
    patient = Board({"a": 99})
    assert throttled(run(patient, cools=False)) == ["a"]
    assert patient.measured == ["a", "b", "c"], "no use in measuring a board again that did not get cool"


def test_on_a_real_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first reading tells of throttling; both measurements are on the board, the second is the answer."""
    readings, ticks = iter(["frequency capped", *[""] * 20]), iter(range(1000))
    monkeypatch.setattr(session_module.Session, "_cool_down", lambda self: next(ticks) >= 0)
    target = read_target(REPOSITORY / "targets" / "localhost.toml")
    with open_session(replace(target, workdir=str(tmp_path / "board"), python=sys.executable)) as session:
        monkeypatch.setattr(linux, "find_throttling", lambda before, after: next(readings))
        session.push({"net.onnx": write_model(tmp_path / "net.onnx")})
        (result,) = session.run([Step(key="a", kind="time", artifact="net.onnx", seconds=0.05)], job="hot")
    assert next(ticks) == 1, "cooled down once"
    assert result.key == "a" and result.conditions is not None and result.conditions.throttled == ""
    lines = next((tmp_path / "board").rglob("results.jsonl")).read_text()
    assert '"key": "a~1"' in lines and '"key": "a"' in lines
