"""planning: what decides a plan is planned anew when it changes; a contender without a plan ends nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from edgeprune.core.errors import RecordError, Unmet
from edgeprune.core.progress import silent
from edgeprune.core.records import FLOAT32, Artifact, Bracket, Budget, Cost, Importance, Plan, PrecisionChoice
from edgeprune.core.runfile import RunFile
from edgeprune.core.runfolder import RunFolder
from edgeprune.core.store import read_record, write_record
from edgeprune.load import ArrayBatches, Data
from edgeprune.planning import Planning
from edgeprune.trace import trace_graph

IMPORTANCE = Importance(criterion="taylor", graph_sha256="0" * 64, scores={})
DENSE = Artifact(path="", format="onnx", dtype="float32", sha256="0" * 64, bytes=1, inputs=(), outputs=())
PLAN = Plan(
    graph_sha256="0" * 64, budget=Budget(latency_s=1.0), widths={}, keep={}, predicted=Cost(), solver="milp",
    status="optimal", gap=0.0, loss=0.0,
)  # fmt: skip


class Counted(Planning):
    """Notes what is planned, and finds no widths for any contender."""

    planned = 0

    def _plan_all(self, *_: Any) -> PrecisionChoice:
        type(self).planned += 1
        return PrecisionChoice(trials=(), candidates=(), chosen=FLOAT32)

    def _contend(self, *_: Any) -> Plan:
        raise Unmet("solver 'uniform' found no widths")


def stages(folder: Path, **sections: Any) -> Counted:
    parts: dict[str, Any] = {
        "model": {"factory": "nets.py:net"}, "data": {"source": "nets.py:source"}, "target": {"name": "embedded"},
        "budget": {"latency": "0.6x"}, "output": {"dir": "run"},
    }  # fmt: skip
    run, net = msgspec.convert({**parts, **sections}, RunFile), nn.Linear(2, 2)
    train = ArrayBatches(torch.randn(200, 2), torch.zeros(200, dtype=torch.long), batch=10)
    return Counted(run, folder, RunFolder(folder), (), net, (torch.zeros(1, 2),), Data(train=train), silent, start=net)


def test_what_decides_the_widths_is_planned_anew_when_it_changes(tmp_path: Path) -> None:
    changes = [{}, {"search": {"trials": 3}}, {"search": {"seconds": 5.0}}, {"prune": {"compensate": False}}]
    for number, sections in enumerate(changes, 1):
        for _ in range(2):  # and the second time nothing is
            stages(tmp_path, **sections)._choose_precision(None, IMPORTANCE, DENSE)
        assert Counted.planned == number


def test_a_contender_for_which_there_is_no_plan_is_left_out(tmp_path: Path) -> None:
    write_record(tmp_path / "plan-float32.json", PLAN)
    assert stages(tmp_path)._hold_tournament(None, IMPORTANCE, FLOAT32) == "float32"
    bracket = read_record(Bracket, tmp_path / "tournament.json")
    assert bracket.winner == "curves" and not bracket.rungs
    assert bracket.left_out == dict.fromkeys(("magnitude", "uniform"), "solver 'uniform' found no widths")


def test_the_log_says_which_groups_went_by_magnitude(tmp_path: Path) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 2), nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(5, 3),
    ).eval()  # fmt: skip
    x = torch.randn(3, 3, 8, 8)
    graph, data = trace_graph(net, (x,)), Data(calibration=[(x, torch.arange(3))])
    planning = replace(stages(tmp_path), model=net, start=net, inputs=(x,), data=data)
    importance = planning.score(graph)
    assert planning.score(graph).by_magnitude == importance.by_magnitude
    lines = [line for line in (tmp_path / "run.log").read_text().splitlines() if "by magnitude" in line]
    assert len(lines) == 1 and lines[0].endswith(
        f"importance: surgeon cannot score {', '.join(importance.by_magnitude)}: their units go by magnitude"
    )
    assert 0 < len(importance.by_magnitude) < len(graph.prunable)


def test_another_runs_plan_is_of_this_model_and_has_its_profile(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), (torch.zeros(1, 2),)
    graph, other = trace_graph(net, x), tmp_path / "other"
    planning = replace(stages(tmp_path, prune={"plan": "other/plan.json"}), model=net, start=net, inputs=x)
    plan = replace(PLAN, graph_sha256=graph.model_sha256)
    for known, lines in ((PLAN, "{}"), (plan, None)):  # a plan of another model, and one without its profile
        write_record(other / "plan.json", known)
        (other / "profile.jsonl").unlink(missing_ok=True)
        if lines is not None:
            (other / "profile.jsonl").write_text(lines)
        with pytest.raises(RecordError, match="no plan of this model with its profile"):
            planning.profile_and_plan(graph, IMPORTANCE, DENSE)
        assert not (tmp_path / "plan.json").exists()
    (other / "profile.jsonl").write_text("measured")
    assert planning.profile_and_plan(graph, IMPORTANCE, DENSE) == plan
    assert read_record(Plan, tmp_path / "plan.json") == plan
    assert (tmp_path / "profile.jsonl").read_text() == "measured"
