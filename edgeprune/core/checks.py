"""What was asked against what was measured: the checks of a report."""

from __future__ import annotations

from edgeprune.core.records import Budget, Check, Conditions, Cost, NumericError, Quantity

WINDOW = 0.97
"""A plan should use at least this share of its latency budget; below it accuracy was given away."""

SAME_SPEED = 0.03


def check_budget(
    budget: Budget, predicted: Cost, measured: Cost, latency: Quantity, conditions: Conditions, *, slowness: float = 1.0
) -> list[Check]:
    """One check a limit that the budget has.

    latency: the budget's statistic of the latency with its interval, s; the rest is in `measured`.
    slowness: how many times as long everything took as while the board was profiled; a limit that was
        asked as a share of the dense model, and the prediction, have been scaled by it.
    """
    checks: list[Check] = []

    def at_most(name: str, limit: float | None, expected: float | None, value: float | None, unit: str) -> None:
        if limit is not None:
            note = "" if value is not None else "this target cannot measure it"
            passed = value is not None and value <= limit
            checks.append(
                Check(name=name, predicted=expected, measured=value, limit=limit, unit=unit, passed=passed, note=note)
            )

    if budget.latency_s is not None:
        checks.append(
            Check(
                name=f"latency ({budget.statistic})",
                predicted=_middle(predicted.latency_s),
                measured=latency.median,
                limit=budget.latency_s,
                unit="s",
                passed=latency.median <= budget.latency_s,
                note=_describe_latency(latency, budget.latency_s, conditions, slowness),
            )
        )
    at_most("peak memory", budget.peak_memory_bytes, predicted.peak_memory_bytes, measured.peak_memory_bytes, "bytes")
    at_most("artifact size", budget.artifact_bytes, predicted.artifact_bytes, measured.artifact_bytes, "bytes")
    at_most("energy", budget.energy_j, _middle(predicted.energy_j), _middle(measured.energy_j), "J")
    return checks


def check_parity(error: NumericError | None, tolerance: float, agreement: float) -> list[Check]:
    """Whether the board computes what the host computes.

    error: None where the board's outputs were not all finite. tolerance: largest relative error.
    agreement: least share of equal top-1 answers.
    """
    note = "the board's outputs hold NaN or infinity"
    if error is not None:
        note = f"largest difference from the host over {error.examples} examples, of the largest output"
    value = None if error is None else error.max_relative
    passed = value is not None and value <= tolerance
    checks = [
        Check(
            name="numeric error", predicted=None, measured=value, limit=tolerance, unit="relative", passed=passed,
            note=note,
        )
    ]  # fmt: skip
    if error is not None and error.top1_agreement is not None:
        checks.append(
            Check(
                name="top-1 agreement",
                predicted=None,
                measured=error.top1_agreement,
                limit=agreement,
                unit="share",
                passed=error.top1_agreement >= agreement,
                note="at least; same answer on the board and on the host",
            )
        )
    return checks


def _middle(value: Quantity | None) -> float | None:
    return None if value is None else value.median


def _describe_latency(latency: Quantity, limit: float, conditions: Conditions, slowness: float) -> str:
    used, low, high = (f"{value / limit:.1%}" for value in (latency.median, latency.low, latency.high))
    note = f"uses {used} of the budget, interval {low} to {high}"
    if latency.median < WINDOW * limit:
        note += f"; more than {1 - WINDOW:.0%} is unused"
    if abs(slowness - 1) > SAME_SPEED:
        note += f"; the dense model took {slowness:.2f} times as long as while it was profiled"
    if conditions.throttled:
        note += f"; the board was throttled ({conditions.throttled})"
    return note
