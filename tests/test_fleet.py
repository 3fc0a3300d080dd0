"""Boards that share a profile: on real sessions, and boards that do not fit in."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import edgeprune.fleet
from edgeprune.core.effort import Effort
from edgeprune.core.errors import RecordError, UsageError
from edgeprune.core.records import Quantity, Target
from edgeprune.device.session import open_session
from edgeprune.fleet import check_alike, find_unlike, merge_profiles, profile_fleet
from edgeprune.profile import choose_batches, read_profile
from edgeprune.tables.stored import read_measured
from edgeprune.trace import trace_graph

BRIEF = Effort(rounds=2, repeats=2, seconds=0.01, precision=None, samples=5)


def board(name: str, tmp_path: Path, threads: int = 1) -> Target:
    workdir = str(tmp_path / f"board {name}")
    return Target(name=name, transport="local", workdir=workdir, python=sys.executable, threads=threads)


@pytest.mark.timeout(300)
def test_three_boards_share_the_widths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each measures the dense model and a third of every batch; together it is one profile, and a rerun adds nothing.

    The second batch is of widths that the tables were least sure of after the first.
    """
    monkeypatch.setattr(edgeprune.fleet, "choose_batches", partial(choose_batches, first=4))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 48, 3), nn.ReLU(), nn.Conv2d(48, 8, 1)).eval()
    inputs, path = (torch.randn(1, 3, 16, 16),), tmp_path / "profile.jsonl"
    graph = trace_graph(net, inputs)
    names = ("a", "b", "c")

    def run() -> None:
        with ExitStack() as stack:
            sessions = [stack.enter_context(open_session(board(name, tmp_path))) for name in names]
            # These three share two processors: how far they agree says nothing here.
            fleet = profile_fleet(
                net,
                inputs,
                graph,
                sessions,
                path=path,
                configurations=8,
                held_out=2,
                error=None,
                effort=BRIEF,
                agreement=10.0,
            )
        assert fleet.left_out == () and set(fleet.anchors) == set(names)
        assert "b: dense" in str(fleet) and "left out" not in str(fleet)
        assert fleet.profile.held_out is not None and fleet.profile.held_out.configurations == 2

    run()
    own = {name: read_measured(tmp_path / f"profile.{name}.jsonl") for name in names}
    shares = [{item.configuration for item in measurements} - {"dense"} for _, measurements in own.values()]
    assert sorted(map(len, shares)) == [2, 3, 4] and len(set.union(*shares)) == 9
    assert sum(name.startswith("next-") for name in set.union(*shares)) == 4
    profile = read_profile(path, graph)
    assert profile.target == "a,b,c"
    places = [(item.round, item.configuration) for item in profile.measurements]
    assert len(places) == len(set(places)) == 2 * (9 + 3)
    assert len(list(choose_batches(graph, path, first=4, configurations=8, held_out=2, error=10.0))) == 1
    before = {file.name: file.read_bytes() for file in tmp_path.glob("*.jsonl")}
    run()
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.jsonl")} == before


def test_the_odd_board_is_named() -> None:
    def anchors(*medians_s: float) -> dict[str, Quantity]:
        return {f"pi{i}": Quantity(median=m, low=m, high=m) for i, m in enumerate(medians_s)}

    assert find_unlike(anchors(0.010, 0.0102, 0.0099)) == ()
    assert find_unlike(anchors(0.010, 0.0102, 0.013, 0.0099)) == ("pi2",)
    with pytest.raises(RecordError, match=r"do not agree.*pi0 10 ms, pi1 13 ms"):
        find_unlike(anchors(0.010, 0.013))


def test_fleets_that_are_none(tmp_path: Path) -> None:
    net, inputs = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)).eval(), (torch.randn(1, 3, 8, 8),)
    graph = trace_graph(net, inputs)
    with open_session(board("a", tmp_path)) as a, open_session(board("b", tmp_path, threads=2)) as b:
        with pytest.raises(UsageError, match="two or more boards"):
            profile_fleet(net, inputs, graph, [a], path=tmp_path / "p.jsonl")
        with pytest.raises(UsageError, match="different names, not a, a"):
            profile_fleet(net, inputs, graph, [a, a], path=tmp_path / "p.jsonl")
        with pytest.raises(RecordError, match=r"b is no board like a \(threads was 1, is 2\)"):
            check_alike([a, b])
    assert not list(tmp_path.glob("*.jsonl"))


def test_merging_refuses_other_kernels(tmp_path: Path) -> None:
    from test_profile import CONDITIONS, _chain_graph, _kernels, _measure

    from edgeprune.core.store import append_record
    from edgeprune.tables.stored import ProfileHeading

    graph = _chain_graph()
    for name, kernels in (("a", _kernels(graph)), ("b", _kernels(graph)[1:])):
        heading = ProfileHeading(
            target=name, conditions=CONDITIONS, graph_sha256=graph.model_sha256, artifact_sha256="", dense_bytes=0,
            kernels=kernels, job="j",
        )  # fmt: skip
        for record in (heading, *_measure(graph)[:3]):
            append_record(tmp_path / f"{name}.jsonl", record)
    with pytest.raises(RecordError, match="other kernels"):
        merge_profiles([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "m.jsonl", 1)
    assert not (tmp_path / "m.jsonl").exists()
    merge_profiles([tmp_path / "a.jsonl", tmp_path / "a.jsonl"], tmp_path / "m.jsonl", 3)
    heading, measurements = read_measured(tmp_path / "m.jsonl")
    assert len(measurements) == 6 and heading == replace(read_measured(tmp_path / "a.jsonl")[0], target="a,a")
