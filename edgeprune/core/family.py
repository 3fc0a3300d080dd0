"""Families: a folder of modules that share a contract. A member's file name is its name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from edgeprune.core.errors import EdgepruneError, UnknownMember, UsageError


class MissingLibrary(EdgepruneError):
    """A member needs a library that is not installed; the message says what to install."""

    exit_code = 2


def list_members(family: str) -> list[str]:
    """Names of a family's members, sorted.

    family: the package below `edgeprune`, such as "criteria" or "device.boards".
    """
    spec = importlib.util.find_spec(f"edgeprune.{family}")
    if spec is None or spec.submodule_search_locations is None:
        raise UsageError(f"edgeprune has no family '{family}'")
    found = pkgutil.iter_modules(list(spec.submodule_search_locations))
    return sorted(module.name for module in found if not module.name.startswith("_"))


def load_member(family: str, name: str) -> ModuleType:
    """The module of one member.

    raises: UnknownMember (lists the known ones); MissingLibrary when its library is not installed.
    """
    if name not in (known := list_members(family)):
        kind = family.rsplit(".", 1)[-1]
        raise UnknownMember(f"unknown {kind} '{name}'; known: {', '.join(known)}")
    try:
        return importlib.import_module(f"edgeprune.{family}.{name}")
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing == "edgeprune":
            raise
        raise MissingLibrary(f"{family} '{name}' needs {missing}: pip install {missing}") from error


def configure(function: Callable[..., Any], options: str) -> Callable[..., Any]:
    """Bind `p=1,absolute=true` to a member function's keyword-only parameters.

    raises: UsageError for an option it does not have or a value of the wrong type.
    """
    signature = inspect.signature(function)
    known = {p.name: p.default for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
    bound: dict[str, Any] = {}
    for item in filter(None, options.split(",")):
        key, _, text = item.partition("=")
        if key not in known:
            names = ", ".join(known) or "none"
            raise UsageError(f"'{key}' is not an option of {function.__module__.rsplit('.', 1)[-1]}; known: {names}")
        default = known[key]
        try:
            if isinstance(default, bool):
                bound[key] = {"true": True, "1": True, "false": False, "0": False}[text.lower()]
            else:
                bound[key] = type(default)(text)
        except (KeyError, ValueError, TypeError) as error:
            raise UsageError(f"option {key}={text!r}: expected {type(default).__name__}") from error
    return partial(function, **bound) if bound else function
