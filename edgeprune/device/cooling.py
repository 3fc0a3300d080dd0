"""Measure again what a board measured while it was throttled, once it has cooled down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from edgeprune.core.records import Step, StepResult

TIMED = frozenset({"time", "kernels", "energy"})
ATTEMPTS = 2
"""How often a throttled measurement is repeated before it is taken as it is, with its flags."""

CarryOut = Callable[[Sequence[Step], Callable[[StepResult], None]], object]


def run_cool(
    steps: Sequence[Step], carry_out: CarryOut, cool_down: Callable[[], bool], deliver: Callable[[StepResult], None]
) -> None:
    """Carry out steps; results of a throttled board are withheld and measured again.

    carry_out: runs steps and hands over each result. cool_down: waits; False where the board does not
        get cool, which ends the attempts. deliver: takes each result under its step's own key, once.
    """
    pending = list(steps)
    for attempt in range(ATTEMPTS + 1):
        keys = {_key(step, attempt): step.key for step in pending}
        withheld: dict[str, StepResult] = {}

        def take(result: StepResult, *, keys: dict[str, str] = keys, last: bool = attempt == ATTEMPTS) -> None:
            own = replace(result, key=keys[result.key])
            if not last and own.kind in TIMED and own.conditions is not None and own.conditions.throttled:
                withheld[own.key] = own  # noqa: B023  called in this turn of the loop only
            else:
                deliver(own)

        carry_out([replace(step, key=_key(step, attempt)) for step in pending], take)
        pending = [step for step in pending if step.key in withheld]
        if not pending:
            return
        if not cool_down():
            for step in pending:
                deliver(withheld[step.key])
            return


def _key(step: Step, attempt: int) -> str:
    return f"{step.key}~{attempt}" if attempt else step.key
