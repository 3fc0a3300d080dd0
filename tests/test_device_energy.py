"""Energy: a meter read beside a loop on a real session, its errors, and what comes of the readings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from loopback.models import write_model
from torch import nn

from edgeprune.core.budget import make_budget
from edgeprune.core.describe import describe_plan, describe_profile
from edgeprune.core.effort import Effort
from edgeprune.core.energy import PowerModel, energy_per_run, parse_power_model
from edgeprune.core.errors import DataError, UsageError
from edgeprune.core.records import PowerSamples, Quantity, Step, StepResult, Target
from edgeprune.device.meters import open_meter
from edgeprune.device.results import read_power
from edgeprune.device.session import open_session
from edgeprune.on_board import dense_cost, plan_on_board
from edgeprune.profile import profile_target
from edgeprune.score import score_groups
from edgeprune.trace import trace_graph

IDLE_W, BUSY_W = 2.0, 3.0
# A board that draws IDLE_W at rest and BUSY_W more while a processor works for the agent.
SIMULATED_METER = f"""#!/usr/bin/env python3
import os, pathlib, time
tick = os.sysconf("SC_CLK_TCK")
def used():
    total = 0
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            if b"agent.py\\0start" in (stat.parent / "cmdline").read_bytes():
                total += sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13]))
        except OSError:
            pass
    return total / tick
print("# simulated", flush=True)
before, at = used(), time.monotonic()
while True:
    time.sleep(0.05)
    after, now = used(), time.monotonic()
    print(f"{{now - 1000}} {{{IDLE_W} + {BUSY_W} * (after - before) / (now - at)}}", flush=True)
    before, at = after, now
"""


def write_program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def measure(tmp_path: Path, meter: str, seconds: float = 1.0) -> StepResult:
    target = Target(name="here", transport="local", meter=meter, workdir=str(tmp_path / "work"))
    with open_session(target) as session:
        session.push({"net.onnx": write_model(tmp_path / "net.onnx", channels=256)})
        (result,) = session.run([Step(key="e", kind="energy", artifact="net.onnx", seconds=seconds)], job="energy")
    return result


def test_program_that_feeds_watts(tmp_path: Path) -> None:
    program = write_program(tmp_path / "my meter", SIMULATED_METER)
    result = measure(tmp_path, f"command:'{program}' --any 'argument $(touch pwned)'", seconds=2)
    assert result.error is None and result.power is not None
    power = result.power
    assert min(power.idle_times_s) < 0 < power.seconds < max(power.idle_times_s)
    assert all(0 <= time_s <= power.seconds for time_s in power.active_times_s)
    net, gross = energy_per_run(power), energy_per_run(power, gross=True)
    per_run = power.seconds / power.runs
    # The loop has the processor for some of the time that others share it, and never more than all of it.
    assert 0 < net.median < 1.2 * BUSY_W * per_run
    assert net.low <= net.median <= net.high
    assert gross.median - net.median == pytest.approx(np.mean(power.idle_w) * per_run)
    assert np.mean(power.idle_w) < IDLE_W + 0.3 * BUSY_W


def test_polled_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A board on which `vcgencmd` answers as a Raspberry Pi 5's does."""
    (tmp_path / "bin").mkdir()
    lines = "     VDD_CORE_A current(7)=2.00000000A\\n     VDD_CORE_V volt(15)=0.90000000V\\n  EXT5V_V volt(24)=5.1V"
    write_program(tmp_path / "bin" / "vcgencmd", f"#!/bin/sh\nprintf '{lines}\\n'\n")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    result = measure(tmp_path, "pmic", seconds=2)
    assert result.power is not None
    assert set(result.power.active_w) == set(result.power.idle_w) == {1.8}
    assert energy_per_run(result.power).median == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("meter", "message"),
    [
        ("command:/no/such/program", "cannot be started: No such file"),
        ("command:sh -c 'echo no sensor >&2; exit 3'", "ended with 3: no sensor"),
        ("command:sh -c 'echo 1.0; sleep 1.2; exit 4'", "ended with 4"),
        ("command:sh -c 'while sleep 0.02; do echo hello; done'", "0 readings at rest .*said last: 'hello'"),
    ],
)
def test_meter_that_fails_says_why(tmp_path: Path, meter: str, message: str) -> None:
    result = measure(tmp_path, meter, seconds=0.6)
    assert result.power is None
    assert result.error is not None
    assert re.search(message, result.error), result.error


def test_meter_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeprune.device import session as module

    program = (Path(module.__file__).parent / "energy.py").read_text()
    (tmp_path / "device").mkdir()
    for name in ("agent.py", "measure.py", "by_input.py", "warm_up.py", "pin.py", "runtimes"):
        (tmp_path / "device" / name).symlink_to(Path(module.__file__).parent / name)
    (tmp_path / "device" / "energy.py").write_text(program.replace("FIRST_READING_S = 10.0", "FIRST_READING_S = 0.3"))
    monkeypatch.setattr(module, "HERE", tmp_path / "device")
    result = measure(tmp_path, "command:sleep 60")
    assert result.error == "RuntimeError: the meter said nothing in 0.3 s"


def test_without_a_meter_energy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="target here has no power meter"):
        measure(tmp_path, "none")


def test_another_meter_measures_again(tmp_path: Path) -> None:
    first = measure(tmp_path, "command:sh -c 'while sleep 0.02; do echo 1; done'", seconds=0.5)
    again = measure(tmp_path, "command:sh -c 'while sleep 0.02; do echo 1; done'", seconds=0.5)
    other = measure(tmp_path, "command:sh -c 'while sleep 0.02; do echo 2; done'", seconds=0.5)
    assert first.power == again.power
    assert other.power is not None and set(other.power.active_w) == {2.0}


# --- from readings to energy ----------------------------------------------------------------------


def test_readings_are_cut_into_windows() -> None:
    meter = open_meter("command:x")
    readings = [[100 + 0.1 * i, "5.0" if 20 <= i < 40 else "2.0"] for i in range(60)]
    value = {"readings": readings, "idle": [[100.5, 101.5], [104.5, 105.5]], "active": [102.0, 103.95], "runs": 39}
    power = read_power(value, meter)
    assert set(power.idle_w) == {2.0} and len(power.idle_w) >= 20
    assert set(power.active_w) == {5.0} and len(power.active_w) == 20
    net = energy_per_run(power)
    assert (net.median, net.low, net.high) == pytest.approx((0.15, 0.15, 0.15))
    assert energy_per_run(power, gross=True).median == pytest.approx(0.25)


def test_interval_covers_the_truth() -> None:
    """Correlated noise of known mean: a 95 % interval holds it about that often."""
    held = 0
    for seed in range(100):
        generator = np.random.default_rng(seed)
        noise = np.convolve(generator.standard_normal(1020), np.ones(5) / 5, "valid")
        power = PowerSamples(
            idle_times_s=(), idle_w=tuple(2 + noise[:500]), active_times_s=(), active_w=tuple(5 + noise[-500:]),
            seconds=10.0, runs=1000,
        )  # fmt: skip
        energy = energy_per_run(power)
        held += energy.low <= 0.03 <= energy.high
    assert 82 <= held <= 100


def test_nothing_is_not_zero() -> None:
    power = PowerSamples(idle_times_s=(0.0,), idle_w=(1.0,), active_times_s=(), active_w=(), seconds=1.0, runs=5)
    with pytest.raises(DataError, match="measure again"):
        energy_per_run(power)


def test_power_model() -> None:
    model = parse_power_model("idle=2.1W,active=4.8W")
    assert model == PowerModel(idle_w=2.1, active_w=4.8)
    assert parse_power_model(" active = 480mW , idle=.05w ") == PowerModel(idle_w=0.05, active_w=0.48)
    energy = model.energy_per_run(Quantity(median=0.010, low=0.009, high=0.012))
    assert (energy.median, energy.low, energy.high) == pytest.approx((0.027, 0.0243, 0.0324))
    assert str(model) == "modelled, not measured: (4.8 W - 2.1 W) x latency"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("idle=2.1W", "lacks active"),
        ("", "cannot read ''"),
        ("idle=2.1,active=4.8W", "cannot read 'idle=2.1'"),
        ("idle=2W,active=4W,active=5W", "cannot read 'active=5W'"),
        ("idle=5W,active=4W", "draws more"),
        ("idle=-1W,active=4W", "cannot read 'idle=-1W'"),
        ("idle=2W,active=4W,peak=9W", "cannot read 'peak=9W'"),
    ],
)
def test_bad_power_model(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_power_model(text)


def test_meters_program_does_not_outlive_a_killed_agent(tmp_path: Path) -> None:
    """Nobody reads its lines any more: the next one ends it."""
    device = Path(open_session.__code__.co_filename).parent
    meter = {"argv": ["sh", "-c", f"echo $$ > {tmp_path}/pid; while sleep 0.05; do echo 1; done"], "stream": True}
    program = f"import energy, time\nwith energy.Sampler({meter!r}): print('on', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], cwd=device, stdout=subprocess.PIPE) as agent:
        assert agent.stdout is not None and agent.stdout.readline() == b"on\n"
        agent.kill()
    stat = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    for _ in range(200):
        # A zombie that no init collects has ended too.
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.02)
    else:
        pytest.fail("the meter's program goes on")


def test_plan_within_an_energy_budget(tmp_path: Path) -> None:
    """A profile with a meter tells energies, and the planned network's own energy is measured against the budget."""
    program = write_program(tmp_path / "meter", SIMULATED_METER)
    target = Target(
        name="here",
        transport="local",
        meter=f"command:'{program}'",
        workdir=str(tmp_path / "work"),
        python=sys.executable,
    )
    effort = Effort(rounds=1, repeats=1, seconds=0.02, precision=None, energy_s=1.0)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 8, 1)
    ).eval()  # fmt: skip
    inputs, path = (torch.randn(1, 3, 24, 24),), tmp_path / "profile.jsonl"
    graph = trace_graph(net, inputs)
    importance = score_groups(net, inputs, graph, None, criterion="magnitude", curves=False)
    with open_session(target) as session:
        profile = profile_target(net, inputs, graph, session, path=path, configurations=3, held_out=0, effort=effort)
        assert profile.energy is not None and all(power > 0 for power in profile.energy.power_w.values())
        dense = dense_cost(graph, profile)
        assert dense.energy_j is not None
        budget = make_budget(dense, energy="0.6x")
        assert budget.latency_s is None and budget.energy_j == pytest.approx(0.6 * dense.energy_j.median)
        plan = plan_on_board(
            net, inputs, graph, profile, importance, budget, session, path, effort=effort, max_rounds=1
        )
    told, last = plan.predicted.energy_j, plan.rounds[-1]
    assert told is not None and told.median <= 0.6 * dense.energy_j.median * (1 + 1e-9)
    assert last.asked_s is None and last.energy_j is not None and last.energy_j.median > 0
    assert last.energy_j.median <= budget.energy_j or len(plan.rounds) == 1
    assert "W" in describe_profile(profile) and "not measured" in describe_plan(graph, plan)
