"""The agent's results as records. What cannot be parsed is an error, never 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgeprune.core.errors import AgentError
from edgeprune.core.records import Conditions, KernelTime, Samples, StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Momentary:
    """What the board said before and after a measurement."""

    governor: str | None
    freq_hz: float | None
    temp_before_c: float | None
    temp_after_c: float | None
    throttled: str | None
    energy_j: float | None


def read_result(
    event: Mapping[str, Any],
    base: Conditions,
    momentary: Callable[[Mapping[str, str], Mapping[str, str]], Momentary],
    *,
    where: str,
) -> StepResult:
    """One `result` event of the agent as a record.

    base: the conditions that hold for the whole session. momentary: reads the sensors' raw text.
    raises: AgentError when a field is missing or cannot be what it says.
    """
    try:
        if event["error"] is not None:
            return StepResult(key=event["key"], kind=event["kind"], error=str(event["error"]))
        now = momentary(event["before"], event["after"])
        conditions = replace(
            base,
            governor=now.governor,
            freq_hz=now.freq_hz,
            temp_before_c=now.temp_before_c,
            temp_after_c=now.temp_after_c,
            throttled=now.throttled,
        )
        fields = READERS[event["kind"]](event["value"])
        return StepResult(key=event["key"], kind=event["kind"], conditions=conditions, energy_j=now.energy_j, **fields)
    except (KeyError, TypeError, ValueError) as error:
        raise AgentError(f"{where}: the agent's result {str(event)[:300]} cannot be read: {error!r}") from error


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is not a duration")
    return float(value)


def _bytes(value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or value < 0):
        raise ValueError(f"{value!r} is not a size")
    return value


def _read_samples(value: Mapping[str, Any]) -> Samples:
    values = tuple(map(_seconds, value["values"]))
    if not values or min(values) == 0:
        raise ValueError("a latency of 0")
    return Samples(
        values=values,
        per_turn=int(value["per_turn"]),
        loops=int(value["loops"]),
        warmups=int(value["warmups"]),
        stopped_because=str(value["stopped_because"]),
    )


def _read_time(value: Mapping[str, Any]) -> dict[str, Any]:
    samples, against = _read_samples(value["samples"]), value["against"]
    if against is None:
        return {"samples": samples}
    against = _read_samples(against)
    if len(samples.values) * against.per_turn != len(against.values) * samples.per_turn:
        raise ValueError("two models had different numbers of turns")
    return {"samples": samples, "against": against}


def _read_kernels(value: Mapping[str, Any]) -> dict[str, Any]:
    # A kernel below the profiler's microsecond may be 0; the run as a whole may not.
    kernels = tuple(
        KernelTime(name=str(kernel["name"]), op=str(kernel["op"]), time_s=_seconds(kernel["time_s"]))
        for kernel in value["kernels"]
    )
    if not kernels or _seconds(value["run_s"]) == 0:
        raise ValueError("no kernels, or a run of 0 s")
    against = value["against_run_s"]
    return {
        "kernels": kernels,
        "run_s": _seconds(value["run_s"]),
        "against_run_s": None if against is None else _seconds(against),
    }


def _read_outputs(value: Mapping[str, Any]) -> dict[str, Any]:
    return {"outputs": str(value["outputs"])}


def _read_memory(value: Mapping[str, Any]) -> dict[str, Any]:
    return {"activation_bytes": _bytes(value["activation_bytes"]), "process_bytes": _bytes(value["process_bytes"])}


READERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "time": _read_time,
    "kernels": _read_kernels,
    "outputs": _read_outputs,
    "memory": _read_memory,
}
