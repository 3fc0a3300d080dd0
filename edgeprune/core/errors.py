"""Every error edgeprune raises on purpose.

EdgepruneError
├── UsageError          exit 2: an argument, option or run file that cannot be right
│   └── UnknownMember       a criterion, solver, board, runtime ... that does not exist
├── DeviceError         exit 3: the board, the way to it, or what runs on it
│   ├── HostKeyError        the host key is unknown or has changed
│   ├── ConnectionLost      unreachable, refused, or cut and not coming back
│   ├── BoardNotReady       no Python, no runtime, no space: says the command that mends it
│   └── AgentError          the agent died or printed what cannot be parsed
├── InputError          exit 4: a model, data set or record that cannot be used
│   ├── ModelError          factory, weights or torch.export
│   ├── DataError           data source, labels, NaN
│   │   └── NothingToScore      a criterion was given nothing of a group
│   └── RecordError         truncated, altered, of another schema, or made from something else
└── Unmet               exit 1: the work was done and the answer is no
    └── InfeasibleBudget    names the binding budget and the best reachable cost

A message says what, where (target, node, file) and what to do next. Expected outcomes are values,
not errors: one configuration that fails in a sweep, a report over its budget.
"""

from __future__ import annotations


class EdgepruneError(Exception):
    """Root of the tree; `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(EdgepruneError):
    """An argument, option or run file that cannot be right."""

    exit_code = 2


class UnknownMember(UsageError):
    """A family has no member of that name; the message lists those it has."""


class DeviceError(EdgepruneError):
    """The board, the way to it, or what runs on it."""

    exit_code = 3


class HostKeyError(DeviceError):
    """The board's host key is unknown, or is not the one that was trusted."""


class ConnectionLost(DeviceError):
    """The board cannot be reached, refuses us, or was cut off and does not come back."""


class BoardNotReady(DeviceError):
    """Something the run needs is missing on the board; the message says the command that mends it."""


class AgentError(DeviceError):
    """The agent on the board died, or printed what cannot be parsed."""


class InputError(EdgepruneError):
    """A model, data set or record that cannot be used."""

    exit_code = 4


class ModelError(InputError):
    """A factory, its weights, or what torch.export makes of it."""


class DataError(InputError):
    """A data source, its labels or its values."""


class NothingToScore(DataError):
    """Nothing was collected of a group that its criterion could score it by."""


class RecordError(InputError):
    """A record or artifact that is truncated, altered, of another schema or made from something else."""


class Unmet(EdgepruneError):
    """The work was done and the answer is no: a budget or a validation is not met."""

    exit_code = 1


class InfeasibleBudget(Unmet):
    """No widths meet the budgets; the message names the binding one and the best reachable cost."""


def first_line(error: BaseException) -> str:
    """The first line of an error that says anything, else its kind: what others write over many lines, in one."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
