"""What a user says about widths: groups to leave alone, multiples to keep to, and how few channels may be left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import gcd, lcm

from edgeprune.core.errors import UsageError
from edgeprune.core.records import Branch, Graph, Group, WidthRules


def apply_rules(graph: Graph, rules: WidthRules) -> Graph:
    """The same graph with groups frozen and tied, their steps and their least widths set as the rules say.

    raises: UsageError for a pattern that no group matches, a step or a least width below one, and a tie of groups that
        cannot have one width.
    """
    if rules.step < 1 or rules.least < 1:
        raise UsageError(f"step={rules.step} and the least width {rules.least} must be at least 1")
    for pattern in (*rules.freeze, *rules.only, *rules.tie):
        if not any(matches(group, pattern) for group in graph.groups):
            names = ", ".join(group.name for group in graph.prunable)
            raise UsageError(f"no group of channels matches '{pattern}'; groups that can be pruned: {names}")
    groups = [_ruled(group, rules) for group in graph.groups]
    for pattern in rules.tie:
        groups = _tie(groups, pattern)
    return replace(
        graph,
        groups=tuple(groups),
        branches=tuple(branch for branch in graph.branches if _may_go(branch, rules)),
    )


def matches(group: Group, pattern: str) -> bool:
    """Whether a shell pattern names the group, a module that makes its channels, or a module around that one."""
    made_by = {member.parameter.rpartition(".")[0] for member in group.members if member.role == "out"}
    return any(fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}.*") for path in {group.name, *made_by})


def _may_go(branch: Branch, rules: WidthRules) -> bool:
    """Whether a branch may be dropped: nothing in it is frozen, and all of it may lose channels."""
    paths = {parameter.rpartition(".")[0] for parameter in branch.parameters}

    def named(path: str, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}.*") for pattern in patterns)

    return not any(named(path, rules.freeze) for path in paths) and (
        not rules.only or all(named(path, rules.only) for path in paths)
    )


def _ruled(group: Group, rules: WidthRules) -> Group:
    if group.frozen_because is not None:
        return group
    because = None
    if (pattern := _first_match(group, rules.freeze)) is not None:
        because = f"is frozen by '{pattern}'"
    elif rules.only and _first_match(group, rules.only) is None:
        because = f"is not among {', '.join(rules.only)}"
    step, least = lcm(group.step, units_of(group, rules.step)), -(-rules.least // channels_per_unit(group))
    if because is None and max(step, least) >= group.units:
        because = f"has {group.units} units, which the step {rules.step} and the least width {rules.least} all keep"
    return replace(group, frozen_because=because) if because else replace(group, step=step, least=max(least, 1))


def _tie(groups: Sequence[Group], pattern: str) -> list[Group]:
    """The same groups, those that the pattern names and that can be pruned with one step and one least width."""
    tied = [group for group in groups if group.frozen_because is None and matches(group, pattern)]
    sizes = sorted({group.units for group in tied})
    if len(tied) < 2 or len(sizes) > 1 or any(group.tie for group in tied):
        found = ", ".join(f"{group.name} ({group.tie or group.units})" for group in tied) or "none"
        raise UsageError(
            f"'{pattern}' cannot tie widths: it takes two groups or more that can be pruned, all of one size and in no "
            f"other tie; it names {found}"
        )
    step = lcm(*(group.step for group in tied))
    least = max(group.least for group in tied)
    return [replace(g, tie=pattern, step=step, least=least) if g in tied else g for g in groups]


def _first_match(group: Group, patterns: Sequence[str]) -> str | None:
    return next((pattern for pattern in patterns if matches(group, pattern)), None)


def channels_per_unit(group: Group) -> int:
    """Fewest channels of a layer's output that one unit takes (8 for a head of 8 channels)."""
    return min((member.index.shape[1] for member in group.members if member.role == "out"), default=1)


def units_of(group: Group, channels: int) -> int:
    """The least number of units that changes every output they are part of by a multiple of `channels`."""
    counts = [member.index.shape[1] for member in group.members if member.role == "out"]
    return lcm(*(channels // gcd(channels, count) for count in counts)) if counts else channels
