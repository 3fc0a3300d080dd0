"""The fault loop of `tools/bench_faults.py`, a few kills long: no sample is lost, doubled or altered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_faults import CONFIGURATIONS, HELD_OUT, ROUNDS, Outcome, account, run_faults

from edgeprune.core.records import Conditions, Measurement, Samples
from edgeprune.core.store import append_record

pytest.importorskip("asyncssh")
pytestmark = pytest.mark.device


@pytest.mark.board
@pytest.mark.timeout(1200)
def test_a_profile_survives_killed_hosts_and_a_troubled_board() -> None:
    outcome = run_faults("embedded", kills=3)
    assert outcome.faults["host killed"] == 3
    assert (outcome.lost, outcome.doubled, outcome.altered) == (0, 0, 0)
    assert outcome.measurements >= ROUNDS * (CONFIGURATIONS + HELD_OUT)


def test_what_was_lost_doubled_or_altered_is_found(tmp_path: Path) -> None:
    """The accounting itself: one measurement twice in the file, one twice on the board, one not what was measured."""
    conditions = Conditions(board="linux", arch="x", cpu="x", runtime="onnxruntime", runtime_version="1")

    def held(name: str, value: float) -> Measurement:
        samples = Samples(values=(value,))
        return Measurement(
            configuration=name,
            round=0,
            widths={},
            held_out=False,
            samples=samples,
            dense=samples,
            conditions=conditions,
        )

    def made(name: str, value: float) -> str:
        samples = {"values": [value]}
        event = {
            "event": "result",
            "key": f"0-{name}-time",
            "error": None,
            "kind": "time",
            "value": {"samples": samples},
        }
        return "\n".join(map(json.dumps, ({"event": "begin", "key": f"0-{name}-time"}, event)))

    for item in (held("a", 1.0), held("b", 2.0), held("b", 2.0), held("c", 3.0)):
        append_record(tmp_path / "profile.jsonl", item)
    board = "\n".join([made("a", 1.0), made("a", 1.5), made("b", 2.0), made("c", 3.5)])
    outcome = Outcome()
    account(tmp_path / "profile.jsonl", board.encode(), 1, outcome)
    assert outcome.lost == CONFIGURATIONS + HELD_OUT - 3
    assert (outcome.doubled, outcome.altered, outcome.begun_again) == (2, 1, 1)
