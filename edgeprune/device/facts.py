"""What a board is and has: every fact of its kind, its disk, Python and runtime, in one round trip."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.core.errors import DeviceError
from edgeprune.core.family import load_member
from edgeprune.core.records import BoardFacts, Conditions, Target
from edgeprune.device.procfs import parse_disk_free
from edgeprune.device.runtimes import open_runtime, runtime_name
from edgeprune.device.sources import section_script, split_sections
from edgeprune.device.transports import Transport

OLDEST_PYTHON = (3, 9)
GATHER_TIMEOUT_S = 120.0

PYTHON_MARK = "edgeprune-python"
# Runs under whatever Python the board has. argv: the runtime's own file, to try it out (slow, sure), or nothing;
# modules, of which `a|b` are alternatives. found: of each that is there, its name and version.
PROBE = f"""
import sys, json
found, note, wrong = {{}}, "", ""
for names in sys.argv[2:]:
    for name in names.split("|"):
        try:
            from importlib import import_module, metadata
            try:
                version = metadata.version(name)
            except metadata.PackageNotFoundError:
                version = import_module(name).__version__  # a package of another name, such as onnxruntime-gpu
            found.setdefault(names, [name, version])
        except Exception:
            pass
try:
    if sys.argv[1]:
        runtime = {{"__name__": "runtime"}}
        exec(sys.argv[1], runtime)
        note = runtime["check"]()
except Exception as error:
    wrong = str(error)[:500]
print("{PYTHON_MARK}", json.dumps({{"python": list(sys.version_info[:3]), "path": sys.executable, "found": found,
    "note": note, "wrong": wrong}}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """The board as a session needs it: its facts, and where things are on it.

    python: the interpreter to use, None when there is none. home: the user's folder there.
    workdir: the target's, without `~`. libc: such as "glibc 2.36", for choosing wheels.
    """

    facts: BoardFacts
    python: str | None
    python_version: tuple[int, ...]
    workdir: str
    libc: str | None


def gather_facts(target: Target, transport: Transport, *, thorough: bool = False) -> Board:
    """Read every fact of a target's board.

    thorough: try the runtime out instead of looking whether it is installed (seconds on a small board).
    raises: DeviceError when the board's answer cannot be read.
    """
    member = load_member("device.boards", target.board)
    runtime, _ = open_runtime(target.runtime)
    scripts = {name: fact.source.script() for name, fact in member.FACTS.items()}
    scripts["libc"] = "getconf GNU_LIBC_VERSION || ls /lib/ld-musl-*"
    scripts["workdir"] = _workdir_script(target.workdir)
    scripts["disk"] = 'd="$edgeprune_workdir"; while [ ! -e "$d" ]; do d=$(dirname "$d"); done; df -Pk "$d"'
    trial = Path(str(runtime.__file__)).read_text(encoding="utf-8") if thorough else ""
    candidates = [target.python] if target.python else [sys.executable] if target.transport == "local" else []
    for number, interpreter in enumerate(
        [*map(shlex.quote, candidates), '"$edgeprune_workdir"/venv/bin/python', "python3"]
    ):
        scripts[f"python{number}"] = f"{interpreter} -c {shlex.quote(PROBE)} {shlex.join([trial, *runtime.MODULES])}"
    done = transport.run(["sh", "-s"], stdin=section_script(scripts), timeout=GATHER_TIMEOUT_S)
    raw = split_sections(done.stdout, f"target {target.name}")

    values = {name: fact.parse(raw[name]) for name, fact in member.FACTS.items()}
    if not values["arch"]:
        raise DeviceError(f"target {target.name}: `uname -m` printed nothing; is it a Linux board?")
    values["throttled"] = member.find_throttling(raw["throttled"], raw["throttled"])
    python = _choose_python(raw, runtime.MODULES)
    missing = find_missing(target, python, runtime.MODULES, runtime.BY_HAND)
    facts = BoardFacts(
        **{name: value for name, value in values.items() if value is not None},
        disk_free_bytes=parse_disk_free(raw["disk"]),
        python=".".join(map(str, python["python"])) if python else None,
        runtimes=_describe_runtime(runtime_name(target.runtime), python, runtime.MODULES),
        missing=missing,
    )
    return Board(
        facts=facts,
        python=python["path"] if python else None,
        python_version=tuple(python["python"]) if python else (),
        workdir=raw["workdir"],
        libc=raw["libc"] or None,
    )


def _workdir_script(workdir: str) -> str:
    # Only `~` of the board's own user is expanded; everything else stands for itself.
    if workdir == "~" or workdir.startswith("~/"):
        path = f'"$HOME"{shlex.quote(workdir[1:])}' if workdir != "~" else '"$HOME"'
    elif workdir.startswith("/"):
        path = shlex.quote(workdir)
    else:
        path = f'"$HOME"/{shlex.quote(workdir)}'
    return f'edgeprune_workdir={path}; printf %s "$edgeprune_workdir"'


def _choose_python(raw: dict[str, str], modules: tuple[str, ...]) -> dict[str, Any] | None:
    """The first interpreter that has the modules, else the first that is new enough."""
    usable = []
    for name in sorted(name for name in raw if name.startswith("python")):
        match = re.search(rf"^{PYTHON_MARK} (\{{.*\}})$", raw[name], re.MULTILINE)
        if match:
            answer = json.loads(match[1])
            if tuple(answer["python"]) >= OLDEST_PYTHON:
                usable.append(answer)
    complete = [answer for answer in usable if all(module in answer["found"] for module in modules)]
    working = [answer for answer in complete if not answer["wrong"]]
    return next(iter(working + complete + usable), None)


def _describe_runtime(name: str, python: dict[str, Any] | None, modules: tuple[str, ...]) -> dict[str, str]:
    """Name -> version of the runtime that is there, with its package where that is called otherwise."""
    if python is None or modules[0] not in python["found"]:
        return {}
    package, version = python["found"][modules[0]]
    return {name: " ".join(filter(None, ["" if package == name else package, version, python["note"]]))}


def find_missing(
    target: Target, python: dict[str, Any] | None, modules: tuple[str, ...], by_hand: Mapping[str, str]
) -> tuple[str, ...]:
    """What a run needs and the board lacks, each with the command that mends it."""
    if python is None:
        version = ".".join(map(str, OLDEST_PYTHON))
        return (f"Python {version} or newer: on the board, sudo apt-get install -y python3 python3-venv",)
    lacking = [module for module in modules if module not in python["found"]]
    ours = " and ".join(module.replace("|", " or ") for module in lacking if module not in by_hand)
    mend = f"edgeprune targets setup {shlex.quote(target.name)}"
    if lacking:
        return (
            *(f"{module}: {by_hand[module]}" for module in lacking if module in by_hand),
            *([f"{ours}: {mend}"] if ours else []),
        )
    return (f"a working {runtime_name(target.runtime)} ({python['wrong']}): {mend}",) if python["wrong"] else ()


def describe_conditions(target: Target, facts: BoardFacts, *, dtype: str, batch: int) -> Conditions:
    """The conditions of a measurement on this board, without what changes from moment to moment."""
    return Conditions(
        board=target.board,
        arch=facts.arch,
        cpu=facts.cpu,
        runtime=target.runtime,
        runtime_version=facts.runtimes.get(runtime_name(target.runtime), ""),
        dtype=dtype,
        batch=batch,
        threads=target.threads,
        cpus=facts.cpus,
        governor=facts.governor,
        freq_hz=facts.freq_hz,
    )
