"""The programs that run on the board, without a board."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

from edgeprune.core.family import list_members
from edgeprune.device import agent
from edgeprune.device.runtimes import onnxruntime as runtime

DEVICE = Path(agent.__file__).parent
FIXTURES = Path(__file__).parent / "fixtures"
RUNTIMES = [f"runtimes/{name}.py" for name in list_members("device.runtimes")]
STANDARD = sys.stdlib_module_names | {"numpy", "agent", "measure", "energy", "pin", "runtime"}


@pytest.mark.parametrize("name", ["agent.py", "measure.py", "energy.py", "pin.py", *RUNTIMES])
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
