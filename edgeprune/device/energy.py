"""Power of the board, at rest and while a model runs in a loop. Copied there beside measure.py.

Python 3.9 and its standard library. What the meter says is passed on as it was; the host parses it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeprune.device import agent
else:
    import agent

SETTLE_S = 0.5
"""Meters average: so long after a change they still show what was before."""
FIRST_READING_S = 10.0
REST_SHARE = 0.25
"""Rest before the loop and after it, of the loop's time: the mean of both is where a drift was half-way."""
REST_READINGS = 5
"""A rest is at least so many readings of the meter long."""


def measure_power(run: Callable[[], Any], seconds: float, meter: dict[str, Any]) -> dict[str, Any]:
    """Readings of a meter while nothing runs, while `run` does for `seconds`, and while nothing does again.

    meter: argv, files, stream, interval_s, as the session sends it. returns: readings [seconds, text] on
    the monotonic clock, the windows idle and active on it, and the runs made. raises: RuntimeError.
    """
    rest_s = max(seconds * REST_SHARE, REST_READINGS * meter["interval_s"])
    with Sampler(meter) as sampler:
        idle = [_rest(rest_s)]
        limit = time.monotonic() + SETTLE_S
        while time.monotonic() < limit:
            run()
        runs, began = 0, time.monotonic()
        while time.monotonic() - began < seconds:
            run()
            runs += 1
        active = [began, time.monotonic()]
        idle.append(_rest(rest_s))
        sampler.check()
    return {"readings": sampler.readings, "idle": idle, "active": active, "runs": runs}


def _rest(seconds: float) -> list[float]:
    time.sleep(SETTLE_S)
    began = time.monotonic()
    time.sleep(seconds)
    return [began, time.monotonic()]


class Sampler:
    """Reads a meter beside the measurement, from entering the `with` block until leaving it.

    It costs a little power itself, at rest as in the loop, so that the difference is free of it.
    """

    def __init__(self, meter: dict[str, Any]) -> None:
        self.readings: list[tuple[float, str]] = []
        self._meter = meter
        self._over = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed with the sampler

    def __enter__(self) -> Sampler:
        """raises: RuntimeError when the meter says nothing."""
        if self._meter["stream"]:
            try:
                self._process = subprocess.Popen(
                    self._meter["argv"],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=self._errors,
                    encoding="utf-8",
                    errors="replace",
                    start_new_session=True,  # what it starts itself must end with it
                )
            except OSError as error:
                raise RuntimeError(f"the meter {self._meter['argv'][0]} cannot be started: {error.strerror}") from error
        threading.Thread(target=self._listen if self._process else self._poll, daemon=True).start()
        limit = time.monotonic() + FIRST_READING_S
        try:
            while not self.readings:
                self.check()
                if time.monotonic() > limit:
                    raise RuntimeError(f"the meter said nothing in {FIRST_READING_S:g} s")
                time.sleep(0.01)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def check(self) -> None:
        """raises: RuntimeError with the last words of the meter's program, when it has ended."""
        if self._process is not None and self._process.poll() is not None:
            self._errors.seek(0)
            said = self._errors.read()[-300:].decode("utf-8", "replace").strip()
            raise RuntimeError(f"the meter {self._meter['argv'][0]} ended with {self._process.returncode}: {said}")

    def _end(self) -> None:
        self._over.set()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _listen(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            if self._over.is_set():
                return
            self.readings.append((time.monotonic(), line.strip()))

    def _poll(self) -> None:
        source = {"argv": self._meter["argv"], "files": self._meter["files"]}
        while not self._over.is_set():
            began = time.monotonic()
            text = agent.read_sources({"power": source})["power"]
            ended = time.monotonic()
            if text:
                self.readings.append(((began + ended) / 2, text))
            self._over.wait(max(0.0, self._meter["interval_s"] - (ended - began)))
