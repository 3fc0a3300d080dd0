"""Records on disk, families, the run file and the run folder."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeprune.core.errors import RecordError, UnknownMember, UsageError
from edgeprune.core.family import configure, list_members, load_member
from edgeprune.core.records import Constant, Extent, Graph, Group, LossCurve, Member, Node
from edgeprune.core.runfile import read_run_file
from edgeprune.core.runfolder import RunFolder
from edgeprune.core.store import (
    append_record,
    digest,
    encode_envelope,
    read_lines,
    read_record,
    replacing,
    write_atomic,
    write_record,
)

GRAPH = Graph(
    model_sha256="0" * 64,
    inputs=("x",),
    outputs=("conv2d",),
    nodes=(
        Node(name="conv2d", path="conv", op="conv2d", attributes={"stride": [2, 2]}, out_extents=(Extent(fixed=1),)),
    ),
    parameters=(),
    groups=(
        Group(
            name="conv",
            units=3,
            members=(Member(parameter="conv.weight", axis=0, index=np.arange(6).reshape(3, 2)),),
            constants=(Constant(node="view", argument=(1, 2), count=np.ones(3, dtype=np.int64)),),
        ),
    ),
)


def test_a_record_reads_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    write_record(path, GRAPH)
    back = read_record(Graph, path)
    assert digest(back) == digest(GRAPH)
    assert back.groups[0].members[0].index.dtype == np.int64
    assert back.nodes[0].out_extents == (Extent(fixed=1),)
    curve = LossCurve(widths=np.array([1, 2]), loss=np.array([2.0, 1.0]))
    write_record(path, curve)
    assert read_record(LossCurve, path).loss.dtype == np.float64


def test_empty_arrays_keep_their_type(tmp_path: Path) -> None:
    path = tmp_path / "curve.json"
    write_record(path, LossCurve(widths=np.array([], dtype=np.int64), loss=np.array([])))
    assert read_record(LossCurve, path).widths.dtype == np.int64


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_truncated_record_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "graph.json"
    path.write_bytes(encode_envelope(GRAPH)[:-cut])
    with pytest.raises(RecordError, match="not a complete record"):
        read_record(Graph, path)


def test_an_altered_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    path.write_bytes(encode_envelope(GRAPH).replace(b'"units": 3', b'"units": 4'))
    with pytest.raises(RecordError, match="altered"):
        read_record(Graph, path)


def test_another_kind_of_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    write_record(path, GRAPH)
    with pytest.raises(RecordError, match=r"holds edgeprune\.Graph/1, expected edgeprune\.LossCurve/1"):
        read_record(LossCurve, path)
    path.write_text("[1, 2]")
    with pytest.raises(RecordError, match="not an edgeprune record"):
        read_record(Graph, path)


def test_a_record_with_a_wrong_field_is_refused_by_name(tmp_path: Path) -> None:
    from edgeprune.core import store

    path = tmp_path / "graph.json"
    envelope = json.loads(encode_envelope(GRAPH))
    envelope["record"]["groups"][0]["units"] = "many"
    envelope["sha256"] = store.sha256_bytes(store._canonical(envelope["record"]))
    path.write_text(json.dumps(envelope))
    with pytest.raises(RecordError, match=r"groups\[0\]\.units|groups\[\.\.\.\]\.units"):
        read_record(Graph, path)


def test_nan_never_reaches_a_file(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="NaN"):
        write_record(tmp_path / "x.json", LossCurve(widths=np.array([1]), loss=np.array([np.nan])))
    assert not list(tmp_path.iterdir())


def test_a_half_written_last_line_is_dropped_and_closed(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    first, second = (LossCurve(widths=np.array([n]), loss=np.array([float(n)])) for n in (1, 2))
    append_record(path, first)
    path.write_bytes(path.read_bytes() + encode_envelope(second)[:50])
    assert [digest(line) for line in read_lines(path, LossCurve)] == [digest(first)]
    append_record(path, second)
    assert [digest(line) for line in read_lines(path, LossCurve)] == [digest(first), digest(second)]


def test_damage_inside_a_jsonl_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    for n in (1, 2, 3):
        append_record(path, LossCurve(widths=np.array([n]), loss=np.array([1.0])))
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], lines[1][:-9], lines[2], b""]))
    with pytest.raises(RecordError, match="line 2"):
        list(read_lines(path, LossCurve))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="choose another output directory"):
        write_atomic(tmp_path / "file" / "record.json", b"x")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_atomic(path, b"old")
    with pytest.raises(UsageError, match="No space left"), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_families_list_and_load_their_members() -> None:
    assert {"magnitude", "taylor"} <= set(list_members("criteria"))
    assert load_member("criteria", "magnitude").__name__ == "edgeprune.criteria.magnitude"
    with pytest.raises(UnknownMember, match=r"unknown criteria 'nope'; known: .*magnitude.*taylor"):
        load_member("criteria", "nope")


def test_member_options_are_typed() -> None:
    def score(views: object, *, p: float = 2.0, squared: bool = False) -> tuple[float, bool]:
        return p, squared

    assert configure(score, "p=1,squared=true")(None) == (1.0, True)
    assert configure(score, "")(None) == (2.0, False)
    with pytest.raises(UsageError, match="'q' is not an option"):
        configure(score, "q=1")
    with pytest.raises(UsageError, match="expected float"):
        configure(score, "p=many")


RUN_FILE = """
[model]
factory = "nets.py:net"
inputs = [[1, 3, 32, 32]]
[data]
source = "data.py:batches"
[target]
name = "pi4"
[budget]
latency = "0.5x"
[output]
dir = "runs/x"
"""


def test_run_file_and_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "edgeprune.toml"
    path.write_text(RUN_FILE)
    run = read_run_file(path)
    assert run.spec.inputs == ((1, 3, 32, 32),)
    assert run.prune.criterion == "surgeon"
    assert run.target.threads == 1


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("latency =", "latencey =", "latencey"),
        ('"0.5x"', "3", r"\$\.budget\.latency"),
        ('latency = "0.5x"', "", r"\[budget\] is empty"),
        ('factory = "nets.py:net"', "", "either factory or file"),
        ("[budget]", "[budget", "not valid TOML"),
    ],
)
def test_a_wrong_run_file_names_what_is_wrong(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = tmp_path / "edgeprune.toml"
    path.write_text(RUN_FILE.replace(old, new))
    with pytest.raises(UsageError, match=said):
        read_run_file(path)
    with pytest.raises(UsageError, match="there is no"):
        read_run_file(tmp_path / "absent.toml")


def test_stages_run_once_and_again_when_their_inputs_or_outputs_change(tmp_path: Path) -> None:
    folder, made = RunFolder(tmp_path / "run"), []

    def make() -> None:
        made.append(1)
        (folder / "out.txt").write_text("result")

    with folder.locked():
        for _ in range(2):
            folder.stage("first", ["a", 1], ["out.txt"], make)
        assert len(made) == 1
        folder.stage("first", ["a", 2], ["out.txt"], make)
        (folder / "out.txt").write_text("altered")
        folder.stage("first", ["a", 2], ["out.txt"], make)
        (folder / "out.txt").unlink()
        folder.stage("first", ["a", 2], ["out.txt"], make)
    assert len(made) == 4
    assert "first: already done" in (folder / "run.log").read_text()


def test_what_is_there_beside_a_run_is_taken_over_with_what_was_done_within(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b", [tmp_path / "none", tmp_path / "a"])
    made: list[str] = []

    def write(folder: RunFolder, name: str, *, inner: bool = False) -> Callable[[], None]:
        def make() -> None:
            made.append(name)
            if inner:
                folder.stage("inner", [1], ["inner.txt"], write(folder, "inner"))
            (folder / f"{name}.txt").write_text(name)
            time.sleep(0.05)

        return make

    with first.locked():
        first.stage("outer", ["same"], ["outer.txt"], write(first, "outer", inner=True))
    with second.locked():
        second.stage("outer", ["same"], ["outer.txt"], write(second, "outer", inner=True))
        assert made == ["outer", "inner"]
        assert (second / "outer.txt").read_text() == "outer" and (second / "inner.txt").read_text() == "inner"
        assert f"outer: taken from {first.path}" in (second / "run.log").read_text()
        second.stage("inner", [1], ["inner.txt"], write(second, "inner"))
        assert made == ["outer", "inner"]
        assert second.seconds == first.seconds >= 0.1  # each stage's own time, once

        (first / "inner.txt").write_text("altered")
        second.stage("outer", ["other"], ["outer.txt"], write(second, "outer"))
    third = RunFolder(tmp_path / "c", [first.path])
    with third.locked():
        third.stage("outer", ["same"], ["outer.txt"], write(third, "outer"))
    assert made == ["outer", "inner", "outer", "outer"]


def test_a_growing_file_is_begun_with_that_of_a_folder_with_the_same_model(tmp_path: Path) -> None:
    for name, model in (("a", "small"), ("b", "large"), ("c", "large")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").write_text(model)
    for name in "ab":
        (tmp_path / name / "lines").write_text(f"of {name}")
    folder = RunFolder(tmp_path / "c", [tmp_path / "a", tmp_path / "b"])
    folder.borrow("lines", ["model"])
    assert (folder / "lines").read_text() == "of b"
    (folder / "lines").write_text("of b, and more")
    folder.borrow("lines", ["model"])
    assert (folder / "lines").read_text() == "of b, and more"
    folder.borrow("other", ["model"])
    assert not (folder / "other").exists()


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from edgeprune.core.runfolder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).locked(): print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(UsageError, match="another edgeprune is running"), RunFolder(tmp_path).locked():
        pass
    other.communicate()
    with RunFolder(tmp_path).locked():
        pass


def test_digest_depends_on_the_content_alone() -> None:
    assert digest(GRAPH) == digest(replace(GRAPH))
    assert digest(GRAPH) != digest(replace(GRAPH, inputs=("y",)))
