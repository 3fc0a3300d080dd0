"""The agent's results as records. What cannot be parsed is an error, never 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgeprune.core.errors import AgentError, DeviceError
from edgeprune.core.records import Conditions, KernelTime, PowerSamples, Samples, StepResult
from edgeprune.device.meters import Meter

FEWEST_READINGS = 5
"""With fewer there is no saying how well the mean power is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Momentary:
    """What the board said before and after a measurement."""

    governor: str | None
    freq_hz: float | None
    temp_before_c: float | None
    temp_after_c: float | None
    throttled: str | None


def read_result(
    event: Mapping[str, Any],
    base: Conditions,
    momentary: Callable[[Mapping[str, str], Mapping[str, str]], Momentary],
    *,
    meter: Meter | None = None,
    where: str,
) -> StepResult:
    """One `result` event of the agent as a record.

    base: the conditions that hold for the whole session. momentary: reads the sensors' raw text.
    meter: the target's, which the agent read (energy).
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
        if event["kind"] == "energy":
            fields: dict[str, Any] = {"power": read_power(event["value"], meter)}
        else:
            fields = READERS[event["kind"]](event["value"])
        return StepResult(key=event["key"], kind=event["kind"], conditions=conditions, **fields)
    except DeviceError as error:
        return StepResult(key=event["key"], kind=event["kind"], error=str(error))
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
        interrupted=tuple(map(int, value.get("interrupted", ()))),
        at_work=tuple(map(_seconds, value.get("at_work", ()))),
        loops=int(value["loops"]),
        warmups=int(value["warmups"]),
        warm_up_ended=str(value.get("warm_up_ended", "")),  # results of an older agent may lie on the board
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


def read_power(value: Mapping[str, Any], meter: Meter | None) -> PowerSamples:
    """Power at rest and in the loop, from what the meter said. raises: DeviceError when that is too little."""
    if meter is None:
        raise ValueError("energy of a target without a meter")
    readings = sorted((float(time_s), str(text)) for time_s, text in value["readings"])
    began, ended = map(float, value["active"])
    powers = meter.watts(readings)
    active = [(time_s - began, watts) for time_s, watts in powers if began <= time_s <= ended]
    idle = [
        (time_s - began, watts) for time_s, watts in powers if any(low <= time_s <= high for low, high in value["idle"])
    ]
    if min(len(active), len(idle)) < FEWEST_READINGS:
        last = readings[-1][1][-200:] if readings else ""
        raise DeviceError(
            f"the meter gave {len(idle)} readings at rest and {len(active)} in the loop, {FEWEST_READINGS} are needed; "
            f"measure longer, or look at the meter: {meter.hint}. It said last: {last!r}"
        )
    return PowerSamples(
        idle_times_s=tuple(time_s for time_s, _ in idle),
        idle_w=tuple(watts for _, watts in idle),
        active_times_s=tuple(time_s for time_s, _ in active),
        active_w=tuple(watts for _, watts in active),
        seconds=ended - began,
        runs=int(value["runs"]),
    )


READERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "time": _read_time,
    "inputs": _read_time,
    "kernels": _read_kernels,
    "outputs": _read_outputs,
    "memory": _read_memory,
}
