"""`edgeprune advise` on real nets and a real runtime: what it says, the page, and models that cannot be pruned."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from edgeprune.advise import advise_pruning
from edgeprune.core.describe import describe_advice
from edgeprune.core.effort import Effort
from edgeprune.core.records import Advice, Step, StepResult
from edgeprune.core.store import read_record, write_record
from edgeprune.device.session import Session, open_session
from edgeprune.device.targets import read_target
from edgeprune.report import write_advice
from edgeprune.trace import trace_graph

REPOSITORY = Path(__file__).parent.parent
BRIEF = Effort(rounds=1, repeats=1, seconds=0.1, precision=None, samples=9, profiled_runs=9)
INPUTS = (torch.zeros(1, 3, 32, 32),)


def local_session(folder: Path, runtime: str = "onnxruntime") -> Session:
    local = read_target(REPOSITORY / "targets" / "localhost.toml")
    return open_session(replace(local, workdir=str(folder), python=sys.executable, runtime=runtime))


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    with local_session(tmp_path_factory.mktemp("board")) as opened:
        yield opened


def top_heavy() -> nn.Module:
    """A net whose second layer has nearly all of the work."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()  # fmt: skip


@pytest.fixture(scope="module")
def advice(session: Session) -> Advice:
    net = top_heavy()
    return advise_pruning(net, INPUTS, trace_graph(net, INPUTS), session, threads=[2], effort=BRIEF)


def test_what_it_finds(advice: Advice, session: Session, tmp_path: Path) -> None:
    assert advice.kernels[0].name == "2"
    assert advice.kernels[0].macs == 64 * 64 * 9 * 32 * 32
    assert advice.kernels[0].limited_by == "compute" and advice.kernels[0].prunable
    times = [kernel.time_s for kernel in advice.kernels]
    assert times == sorted(times, reverse=True)
    assert sum(times) + advice.outside_s == pytest.approx(advice.latency_s.median, rel=0.5)
    assert [less for less, _ in advice.kernels[0].steps] == [1, 4, 8, 12, 16, 32]
    assert advice.kernels[0].steps[-1][1] < 0.8, "half of the channels on both sides is a quarter of the work"
    assert advice.smallest_s is not None and advice.smallest_s.median < 0.5 * advice.latency_s.median
    assert advice.prunable_share > 0.9
    assert [count for count, _ in advice.threads] == [2]
    assert [name for name, _ in advice.dtypes] == ["int8 (uint8 activations)", "int8 (int8 activations)"]
    assert all(0.05 < share.median < 10 for _, share in advice.dtypes)
    assert all("had the processor" in note for note in advice.notes), "a busy machine says so, and nothing is skipped"
    assert "Pruning can pay here" in advice.verdict
    write_record(tmp_path / "advice.json", advice)
    assert read_record(Advice, tmp_path / "advice.json") == advice


def test_it_is_told_in_words(advice: Advice) -> None:
    text = describe_advice(advice)
    assert advice.verdict in text
    assert "int8 (uint8 activations): " in text and "accuracy not evaluated" in text
    assert "2 threads:" in text and "outside kernels:" in text and "-16" in text
    assert "more kernels" in describe_advice(advice, most=1)


def test_the_page_draws(advice: Advice, tmp_path: Path) -> None:
    """In a real browser both plots appear and nothing is fetched."""
    write_advice(tmp_path / "advice.html", replace(advice, target="<b>board</b>"))
    page = (tmp_path / "advice.html").read_text()
    assert "<b>board</b>" not in page and "&lt;b&gt;board" in page
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser: apt-get install chromium")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom",
         f"--user-data-dir={tmp_path}/browser", (tmp_path / "advice.html").as_uri()],
        capture_output=True, timeout=120,
    )  # fmt: skip
    drawn = done.stdout.decode("utf-8", "replace")
    assert drawn.count("main-svg") >= 2, done.stderr[-500:]
    assert "share of the kernel" in drawn


class WithoutKernels:
    """A session whose runtime cannot tell its kernels apart; all else is the real one's."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __getattr__(self, name: str) -> object:
        return getattr(self._session, name)

    def run(self, steps: Sequence[Step], *, job: str, on_result: Callable[[StepResult], None]) -> list[StepResult]:
        silent = [
            StepResult(key=step.key, kind="kernels", error="NoKernels: no profiler")
            for step in steps if step.kind == "kernels"
        ]  # fmt: skip
        for result in silent:
            on_result(result)
        return silent + self._session.run([s for s in steps if s.kind != "kernels"], job=job, on_result=on_result)


def test_a_runtime_that_tells_no_kernels(session: Session, tmp_path: Path) -> None:
    """The model is timed as a whole at every width instead: its staircase, and the same conclusion."""
    net = top_heavy()
    advice = advise_pruning(net, INPUTS, trace_graph(net, INPUTS), WithoutKernels(session), effort=BRIEF, int8=False)
    (whole,) = advice.kernels
    assert (whole.name, whole.time_s, whole.limited_by) == ("the whole model", advice.latency_s.median, "")
    assert whole.macs == 32 * 32 * 9 * (3 * 64 + 64 * 64) + 64 * 10 and whole.prunable
    assert [less for less, _ in whole.steps] == [1, 4, 8, 12, 16, 32]
    assert whole.steps[-1][1] < 0.6
    assert advice.prunable_share is None and advice.outside_s == 0
    assert [note for note in advice.notes if "NoKernels: no profiler" in note]
    assert "Pruning can pay here" in advice.verdict and "kernels that shrink" not in advice.verdict
    assert "the whole model" in describe_advice(advice)
    write_record(tmp_path / "advice.json", advice)
    assert read_record(Advice, tmp_path / "advice.json") == advice
    write_advice(tmp_path / "advice.html", advice)
    assert '"name": "whole"' in (tmp_path / "advice.html").read_text()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("litert_torch") is None, reason="pip install 'edgeprune[tflite]'")
@pytest.mark.long
def test_the_format_is_that_of_the_runtime(tmp_path: Path) -> None:
    """The same net as TFLite: XNNPACK's kernels, and the one int8 that TFLite has."""
    net = top_heavy()
    with local_session(tmp_path, "tflite") as session:
        advice = advise_pruning(net, INPUTS, trace_graph(net, INPUTS), session, effort=BRIEF)
    assert advice.conditions.runtime == "tflite"
    assert advice.kernels[0].name == "2" and advice.kernels[0].op.endswith("CONV_2D+RELU")
    assert advice.kernels[0].macs == 64 * 64 * 9 * 32 * 32
    assert advice.smallest_s is not None and advice.smallest_s.median < 0.3 * advice.latency_s.median
    assert [name for name, _ in advice.dtypes] == ["int8 (int8 activations)"]


def test_a_model_without_prunable_units(session: Session) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)).eval()
    advice = advise_pruning(net, INPUTS, trace_graph(net, INPUTS), session, effort=BRIEF)
    assert advice.smallest_s is None and advice.prunable_share == 0
    assert "Nothing of this model can be pruned" in advice.verdict
    assert advice.verdict in describe_advice(advice)
