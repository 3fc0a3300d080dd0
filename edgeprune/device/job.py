"""One job of the agent: started, followed to its end over any number of cut connections, stopped."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgeprune.core.errors import AgentError, BoardNotReady
from edgeprune.device.agent import describe
from edgeprune.device.sources import MARK
from edgeprune.device.transports import Transport

MAX_FRUITLESS_DEATHS = 3
"""The agent is started again this often without a new result before we give up."""
SHORTEST_POLL_S = 0.02
LONGEST_POLL_S = 0.25
PAUSE_PER_POLL = 100
"""To answer takes the board from its measuring: the pause after is so many times as long as the answer took."""
LONGEST_PAUSE_S = 3.0
SILENCE_S = 5.0
"""After this long without a line we look whether the agent is alive."""
STALL_S = 3600.0
"""No step takes this long: the agent hangs."""
LOG_TAIL_BYTES = 2000


def identify_client() -> dict[str, Any]:
    """This process, told apart from a later one of the same number."""
    return {"pid": os.getpid(), "started": _start_time(os.getpid())}


def client_is_alive(client: Mapping[str, Any]) -> bool:
    """Whether the process that `identify_client` described still runs on this machine."""
    try:
        os.kill(client["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return bool(_start_time(client["pid"]) == client["started"])


def _start_time(pid: int) -> str | None:
    # Field 22 of proc(5)'s stat, after the name in brackets; None on systems without /proc.
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


class Job:
    """The agent of one job folder on the board."""

    def __init__(self, transport: Transport, *, python: str, agent: str, folder: str, name: str) -> None:
        """python, agent, folder: paths on the board. name: the target's, for messages."""
        self._transport = transport
        self._python = python
        self._agent = agent
        self._folder = folder
        self._name = name

    def follow(self, spec: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Start the agent on `spec` and yield every `result` event, old ones first, until it is done.

        raises: AgentError when the agent dies again and again, hangs, or writes what cannot be read;
            BoardNotReady when another process of this machine runs the same job.
        """
        offset = 0
        fruitless = 0
        while True:
            pid = self._start(spec)
            rc: int | None = None
            heard = time.monotonic()
            poll = SHORTEST_POLL_S
            while rc is None:
                asked = time.monotonic()
                data = self._transport.read(f"{self._folder}/results.jsonl", offset)
                pause = min(PAUSE_PER_POLL * (time.monotonic() - asked), LONGEST_PAUSE_S)
                complete = data[: data.rfind(b"\n") + 1]
                offset += len(complete)
                for event in self._decode(complete):
                    heard, poll = time.monotonic(), SHORTEST_POLL_S
                    if event["event"] == "result":
                        if event["run"] == spec["run"]:
                            fruitless = 0
                        yield event
                    elif event["event"] == "exit" and event["run"] == spec["run"]:
                        rc = event["rc"]
                if rc is not None:
                    break
                silence = time.monotonic() - heard
                if silence > STALL_S:
                    self._stop()
                    raise AgentError(f"target {self._name}: no step came to an end in {STALL_S:g} s. {self.log_tail()}")
                if silence > SILENCE_S and not complete and not self._is_alive(pid):
                    rc = -9  # the supervisor is gone too: a reboot, or the whole group was killed
                    break
                time.sleep(max(poll, pause))
                poll = min(poll * 1.5, LONGEST_POLL_S)
            if rc == 0:
                return
            fruitless += 1
            if rc > 0 or fruitless > MAX_FRUITLESS_DEATHS:
                raise AgentError(f"target {self._name}: {self._describe_death(rc)}. {self.log_tail()}")

    def stop_quietly(self) -> None:
        """Stop the agent if the board can still be reached; on the way out, when something else is wrong."""
        with contextlib.suppress(Exception):  # the error that brought us here is the one to report
            self._stop()

    def log_tail(self) -> str:
        """The last words of the agent, for messages."""
        text = self._transport.read(f"{self._folder}/agent.log")[-LOG_TAIL_BYTES:].decode("utf-8", "replace").strip()
        return f"The agent's log ends: {text}" if text else "The agent's log is empty"

    def _start(self, spec: Mapping[str, Any]) -> int:
        """The process id of an agent that works for us. raises: BoardNotReady; AgentError."""
        answer = self._ask_to_start({**spec, "client": identify_client(), "force": False})
        if "busy" in answer:
            if client_is_alive(client := answer["busy"]):
                raise BoardNotReady(
                    f"target {self._name}: process {client['pid']} of this machine runs the same job there; "
                    "wait for it, stop it, or use another output directory"
                )
            answer = self._ask_to_start({**spec, "client": identify_client(), "force": True})
        return int(answer["pid"])

    def _ask_to_start(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        argv = [self._python, self._agent, "start", self._folder]
        done = self._transport.run(argv, stdin=json.dumps(spec).encode())
        _, mark, text = done.stdout.decode("utf-8", "replace").rpartition(MARK)
        try:
            answer = json.loads(text) if mark and done.rc == 0 else None
            if not isinstance(answer, dict) or not isinstance(answer.get("pid", answer.get("busy")), int | dict):
                raise ValueError("no answer")
        except ValueError as error:
            said = (done.stderr or done.stdout)[-LOG_TAIL_BYTES:].decode("utf-8", "replace").strip()
            raise AgentError(f"target {self._name}: the agent did not start (rc {done.rc}): {said}") from error
        return answer

    def _stop(self) -> None:
        self._transport.run([self._python, self._agent, "stop", self._folder])

    def _is_alive(self, pid: int) -> bool:
        # A zombie that no init collects still has an entry.
        stat = self._transport.read(f"/proc/{pid}/stat")
        return bool(stat) and stat.rpartition(b")")[2].split()[:1] != [b"Z"]

    def _describe_death(self, rc: int) -> str:
        return f"the agent died again and again: {describe(rc)}" if rc < 0 else f"the agent ended with {rc}"

    def _decode(self, data: bytes) -> list[dict[str, Any]]:
        events = []
        for line in data.splitlines():
            try:
                event = json.loads(line)
                if not isinstance(event, dict) or not isinstance(event["event"], str) or "run" not in event:
                    raise ValueError("not an event")
            except (ValueError, KeyError) as error:
                raise AgentError(
                    f"target {self._name}: {self._folder}/results.jsonl holds what the agent did not write: "
                    f"{line[:200]!r}; remove that folder and run again"
                ) from error
            events.append(event)
        return events
