"""What each kind of operator draws, from the energy of whole models of many widths.

A meter is far too slow to see a kernel. But configurations spend their time on different operators, so that
the energy of a few of them, with the time each spends where, tells the power of each kind: a regression of
energy on seconds per operator. Where the measurements cannot tell two apart, both draw what the whole does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import nnls

from edgeprune.core.cost import kernel_latency, kernel_sizes, operator_of
from edgeprune.core.energy import energy_per_run
from edgeprune.core.records import EnergyModel, HeldOutError, Kernel, Measurement, Table

RIDGE = 0.06
"""Relative noise of a measured energy (3 %) over how far operators' powers lie apart (half of their mean)."""


def fit_energy(
    kernels: Sequence[Kernel],
    tables: Sequence[Table],
    measurements: Sequence[Measurement],
    latency_s: Mapping[str, float],
) -> EnergyModel | None:
    """Watts above rest per operator; None where no energy was measured.

    latency_s: whole-model latency of each configuration, as measured.
    """
    by_signature = {table.signature: table for table in tables}
    # Without some of its branches a model has other kernels.
    measured = [item for item in measurements if item.power is not None and all(item.widths.values())]
    if not any(not item.held_out for item in measured):
        return None
    operators = sorted({operator_of(kernel) for kernel in kernels})
    spent = np.zeros((len(measured), len(operators)))
    for row, item in enumerate(measured):
        for kernel in kernels:
            seconds = kernel_latency(by_signature[kernel.signature], *kernel_sizes(kernel, item.widths, item.widths))
            spent[row, operators.index(operator_of(kernel))] += seconds
        # Time outside kernels draws as the whole does; and an error of the tables is no energy.
        spent[row] *= latency_s[item.configuration] / spent[row].sum()
    joules = np.array([energy_per_run(item.power).median for item in measured if item.power is not None])
    used = np.array([not item.held_out and joule > 0 for item, joule in zip(measured, joules, strict=True)])
    if not used.any():
        return None
    mean_w = float(joules[used].sum() / spent[used].sum())
    rows = np.concatenate([spent[used] / joules[used, None], np.eye(len(operators)) * RIDGE / mean_w])
    power_w, _ = nnls(rows, np.concatenate([np.ones(int(used.sum())), np.full(len(operators), RIDGE)]))
    held = np.array([item.held_out for item in measured]) & (joules > 0)
    errors = np.abs(spent[held] @ power_w / joules[held] - 1)
    return EnergyModel(
        power_w=dict(zip(operators, power_w.tolist(), strict=True)), mean_w=mean_w,
        error=HeldOutError(mean=float(errors.mean()), max=float(errors.max()), configurations=len(errors))
        if len(errors) else None,
    )  # fmt: skip
