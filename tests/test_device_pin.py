"""Settings that are held while the board measures, and put back whatever happens. A file stands for the kernel's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from loopback.models import write_model

from edgeprune.core.records import Step, Target
from edgeprune.device import pin
from edgeprune.device.boards import Fact, linux
from edgeprune.device.procfs import parse_first_value
from edgeprune.device.session import open_session
from edgeprune.device.sources import Source
from edgeprune.device.targets import read_target

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def governor(tmp_path: Path) -> Path:
    path = tmp_path / "scaling_governor"
    path.write_text("ondemand")
    return path


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_is_held_and_put_back(governor: Path, tmp_path: Path) -> None:
    record = tmp_path / "pinned.json"
    with pytest.raises(ZeroDivisionError), pin.held({f"{tmp_path}/scaling_g*": "performance"}, record):
        assert governor.read_text() == "performance"
        assert json.loads(record.read_text()) == {str(governor): "ondemand"}
        1 / 0  # noqa: B018
    assert governor.read_text() == "ondemand" and not record.exists()
    with pin.held({str(governor): "ondemand", str(tmp_path / "absent"): "x"}, record):
        assert not record.exists(), "nothing to change, nothing to put back"


@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
def test_sigkill_puts_it_back(governor: Path, tmp_path: Path, group: bool) -> None:
    script = f"""
        import sys, time
        from pathlib import Path
        from edgeprune.device import pin
        with pin.held({{{str(governor)!r}: "performance"}}, Path({str(tmp_path / "pinned.json")!r})):
            time.sleep(600)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], start_new_session=True)
    wait_until(lambda: governor.read_text() == "performance")
    (os.killpg if group else os.kill)(child.pid, signal.SIGKILL)
    child.wait()
    wait_until(lambda: governor.read_text() == "ondemand" and not (tmp_path / "pinned.json").exists())


def test_what_was_left_behind_is_put_back_first(governor: Path, tmp_path: Path) -> None:
    """Killed together with its guard, as by a power cut."""
    governor.write_text("performance")
    record = tmp_path / "pinned.json"
    record.write_text(json.dumps({str(governor): "ondemand"}))
    with pin.held({str(governor): "performance"}, record):
        assert governor.read_text() == "performance"
    assert governor.read_text() == "ondemand"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_setting_we_may_not_change_stays(governor: Path, tmp_path: Path) -> None:
    governor.chmod(0o444)
    with pin.held({str(governor): "performance"}, tmp_path / "pinned.json"):
        pass
    assert governor.read_text() == "ondemand"


def test_the_agent_measures_under_it(governor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conditions of each result tell what it was measured under; afterwards all is as before."""
    fact = Fact(Source(files=(str(governor),)), parse_first_value)
    monkeypatch.setattr(linux, "FACTS", {**linux.FACTS, "governor": fact})
    monkeypatch.setattr(linux, "PINS", {str(governor): "performance"})
    target: Target = read_target(REPOSITORY / "targets" / "localhost.toml")
    with open_session(replace(target, workdir=str(tmp_path / "board"), python=sys.executable)) as session:
        assert session.facts.governor == "ondemand"
        session.push({"net.onnx": write_model(tmp_path / "net.onnx")})
        (result,) = session.run([Step(key="a", kind="time", artifact="net.onnx", seconds=0.05)], job="pinned")
    assert result.conditions is not None and result.conditions.governor == "performance"
    assert governor.read_text() == "ondemand"
