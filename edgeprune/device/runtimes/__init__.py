"""What executes artifacts on the board: what to install there, and how the agent runs a model.

A member is copied to the board as it is, beside the agent: at import it may need Python 3.9 and the
standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, Protocol, TypedDict

from edgeprune.core.errors import UsageError
from edgeprune.core.family import load_member


def open_runtime(text: str) -> tuple[ModuleType, dict[str, str]]:
    """The member that a target's `runtime` field names, and its options (`NAME:key=value,...`).

    raises: UnknownMember; UsageError for an option that it does not have.
    """
    name, _, rest = text.partition(":")
    member = load_member("device.runtimes", name)
    options: dict[str, str] = {}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        if key not in member.OPTIONS:
            known = ", ".join(member.OPTIONS) or "none"
            raise UsageError(f"'{key}' is not an option of the runtime {name}; known: {known}")
        if not value or key in options:
            raise UsageError(f"runtime '{text}': give {key} one value, as in {name}:{key}=VALUE")
        options[key] = value
    return member, options


def runtime_name(text: str) -> str:
    """The member's name in a target's `runtime` field."""
    return text.partition(":")[0]


class Wheels(TypedDict):
    """A set of pip requirements, and the boards that there are wheels of all of them for."""

    requirements: tuple[str, ...]
    architectures: tuple[str, ...]
    """`uname -m`."""
    pythons: tuple[tuple[int, int], tuple[int, int]]
    """Oldest and newest."""
    glibc: tuple[int, int]
    """The C library that the oldest usable wheels were built against."""


class Model(Protocol):
    """A loaded model. Made as `Model(path, threads, profile, **options)`.

    profile: prefix of the profiler's files, or None.
    options: text values, from the target's `runtime = "NAME:key=value,..."`.
    """

    inputs: dict[str, tuple[list[int], str]]
    """Name -> shape, with 1 for what is free, and numpy's name of the type."""

    outputs: list[str]

    def run(self, feed: Mapping[str, Any]) -> list[Any]:
        """One run; arrays in the order of `outputs`."""
        ...

    def end_profile(self) -> list[tuple[float, list[tuple[str, str, float]]]]:
        """Per run made so far: its seconds, and (name, op, seconds) of each kernel in order.

        A runtime that cannot tell, on this board or with these options, raises an exception of its own called
        `NoKernels`, here or when it is made with `profile` (see `StepResult.no_kernels`).
        """
        ...


class Runtime(Protocol):
    """What a runtime module offers."""

    FORMAT: str
    """The member of `formats` whose files it runs."""

    OPTIONS: tuple[str, ...]
    """Names of the options that `Model` takes."""

    ACTIVATIONS: tuple[str, ...]
    """Of `Precision.activations`, those it runs int8 files of; which is fastest is measured."""

    MODULES: tuple[str, ...]
    """Python modules that must be there, the runtime's own first; `a|b`: either, the first that is found."""

    BY_HAND: dict[str, str]
    """Those among them that pip does not bring but the board's system, and how they get there."""

    WHEELS: tuple[Wheels, ...]
    """What can be installed, best first."""

    BRANCHES: bool
    """Whether it leaves out what the branch of an `If` that was not chosen would compute."""

    HOLDS_ACTIVATIONS: bool
    """Whether an open model has all its memory already, so that running it takes no more."""

    def check(self) -> str:
        """See, on the board, that the runtime works; returns what else is worth knowing. raises: whatever is wrong."""
        ...

    Model: type[Any]
    """See `Model`."""
