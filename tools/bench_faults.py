"""A profile that survives everything: the host killed, connections cut, the agent killed, the board restarted.

    python tools/bench_faults.py [--quick] [--board embedded icount] [--kills N] [--seed N]

One profile of a small net is run again and again, each time killed (signal 9) at a random moment, while the
board has troubles of its own, until all kills are spent; the last run is left to finish. Then what the file
holds is held against what the agent measured: every measurement of the schedule, each once, none altered.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from boards.__main__ import write_target
from boards._server import die_with_parent
from boards.icount import IcountBoard
from boards.link import Link

from edgeprune.core.effort import Effort
from edgeprune.core.records import Target
from edgeprune.device.embedded import EmbeddedBoard
from edgeprune.device.targets import connect_target, read_target

CONFIGURATIONS, HELD_OUT, ROUNDS = 6, 2, 6
FAULTS = ("none", "cut", "worker", "none", "agent", "restart")
"""What happens to the board before each kill of the host, in turn."""
RUN_LIMIT_S = 900.0
KILL_AGENT = 'for f in "$1"/*/jobs/*/agent.pid; do [ -e "$f" ] && kill -9 "-$(cat "$f")"; done; true'
KILL_WORKER = 'for f in "$1"/*/jobs/*/agent.pid; do [ -e "$f" ] && pkill -9 -P "$(cat "$f")"; done; true'
SHOW_RESULTS = 'cat "$1"/*/jobs/*/results.jsonl'


@dataclass
class Outcome:
    """What was done to a run, and what became of its samples."""

    faults: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    measurements: int = 0
    lost: int = 0
    doubled: int = 0
    altered: int = 0
    begun_again: int = 0
    seconds: float = 0.0


# --- the run that is killed ----------------------------------------------------------------------


def profile(target: Target, path: Path, rounds: int) -> None:
    """What each of the killed processes does."""
    import torch
    from torch import nn

    from edgeprune.device.session import open_session
    from edgeprune.profile import profile_target
    from edgeprune.trace import trace_graph

    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4),
    ).eval()  # fmt: skip
    inputs = (torch.randn(1, 3, 16, 16),)
    # Long enough that a kill falls into a step, not behind the last.
    effort = Effort(rounds=rounds, repeats=1, seconds=1.0, precision=None)

    def say(what: str, done: int, total: int) -> None:
        print(what, done, total, flush=True)

    with open_session(target, space=str(path)) as session:
        profile_target(
            net, inputs, trace_graph(net, inputs), session, path=path, configurations=CONFIGURATIONS,
            held_out=HELD_OUT, effort=effort, progress=say,
        )  # fmt: skip


# --- what happens to it --------------------------------------------------------------------------


@dataclass(frozen=True)
class Troubled:
    """A board, the link to it, and how it restarts."""

    target: Target
    link: Link
    restart: Callable[[], None]


@contextlib.contextmanager
def troubled_board(name: str, folder: Path) -> Iterator[Troubled]:
    """A stand-in board behind a link that can be cut."""
    board: Any = IcountBoard() if name.startswith("icount") else EmbeddedBoard()
    with board as target:
        if name == "embedded":
            target = replace(target, workdir=str(folder / "board"))
        target = replace(target, address={**target.address, "patience_s": 300})
        link = Link(target)

        def restart() -> None:
            if isinstance(board, IcountBoard):
                board.reboot()
            else:
                # All processes of this stand-in are the agent's: gone at once, and the board is away for a while.
                on_board(target, KILL_AGENT)
                link.go_down(2.0)

        with link as reached:
            yield Troubled(reached, link, restart)


def on_board(target: Target, script: str) -> bytes:
    """Run shell on the board, with its workdir as the first argument."""
    workdir = target.workdir
    if workdir.startswith("~/"):
        script = f'set -- "$HOME/$1"; {script}'
        workdir = workdir[2:]
    with contextlib.closing(connect_target(target)) as transport:
        return transport.run(["sh", "-c", script, "sh", workdir], timeout=120.0).stdout


def run_faults(board: str, kills: int, seed: int = 0) -> Outcome:
    """Kill `kills` runs of one profile, let the next one finish, and account for every sample."""
    began, generator, outcome = time.monotonic(), random.Random(seed), Outcome()
    with tempfile.TemporaryDirectory(prefix="edgeprune-faults-") as temporary:
        folder = Path(temporary)
        path, entry = folder / "profile.jsonl", folder / f"{board}.toml"
        with troubled_board(board, folder) as trouble:
            write_target(trouble.target, entry)
            argv, rounds = [sys.executable, __file__, "--profile", str(entry), str(path)], ROUNDS
            while outcome.faults["host killed"] < kills:
                fault = FAULTS[outcome.runs % len(FAULTS)]
                if not suffer([*argv, str(rounds)], fault, trouble, generator, outcome, folder / "log"):
                    rounds += ROUNDS  # all is measured already: more rounds of the same profile
            argv.append(str(rounds))
            with (folder / "log").open("w") as log:
                done = subprocess.run(argv, stdout=log, stderr=log, timeout=RUN_LIMIT_S)
            outcome.runs += 1
            if done.returncode != 0:
                raise SystemExit(f"the last run failed: {(folder / 'log').read_text()[-2000:]}")
            account(path, on_board(trouble.target, SHOW_RESULTS), rounds, outcome)
    outcome.seconds = time.monotonic() - began
    return outcome


def suffer(
    argv: list[str], fault: str, trouble: Troubled, generator: random.Random, outcome: Outcome, log: Path
) -> bool:
    """One run with one fault of the board, then killed. False when it had finished before."""
    with (
        log.open("w") as errors,
        subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=errors, text=True, preexec_fn=die_with_parent) as run,
    ):
        assert run.stdout is not None
        try:
            # A third of the kills falls anywhere from the start on, the others while the board measures.
            if generator.random() < 1 / 3 and fault == "none":
                time.sleep(generator.uniform(0.0, 8.0))
            else:
                for line in run.stdout:
                    if line.startswith("profiling"):
                        break
                time.sleep(generator.uniform(0.0, 1.5))
                if fault != "none":
                    actions = {
                        "cut": trouble.link.cut,
                        "worker": lambda: on_board(trouble.target, KILL_WORKER),
                        "agent": lambda: on_board(trouble.target, KILL_AGENT),
                        "restart": trouble.restart,
                    }
                    actions[fault]()
                    outcome.faults[fault] += 1
                    time.sleep(generator.uniform(0.0, 3.0))
            outcome.runs += 1
            if run.poll() is not None:
                if run.returncode != 0:
                    raise SystemExit(f"a run failed by itself: {log.read_text()[-2000:]}")
                return False
        finally:
            run.send_signal(signal.SIGKILL)
        outcome.faults["host killed"] += 1
    print(f"kill {outcome.faults['host killed']}, fault: {fault}", file=sys.stderr, flush=True)
    return True


# --- what became of it ---------------------------------------------------------------------------


def account(path: Path, on_the_board: bytes, rounds: int, outcome: Outcome) -> None:
    """Hold the profile's file against the agent's own."""
    from edgeprune.core.records import Measurement
    from edgeprune.core.store import read_lines
    from edgeprune.profile import ProfileHeading

    held = [item for item in read_lines(path, ProfileHeading, Measurement) if isinstance(item, Measurement)]
    made: dict[str, list[list[float]]] = {}
    begun: Counter[str] = Counter()
    for line in on_the_board.splitlines():
        event = json.loads(line)
        if event["event"] == "begin":
            begun[event["key"]] += 1
        elif event["event"] == "result" and event["error"] is None and event["kind"] == "time":
            made.setdefault(event["key"], []).append(event["value"]["samples"]["values"])
    slots = Counter((item.round, item.configuration) for item in held)
    outcome.measurements = len(held)
    outcome.lost = rounds * (CONFIGURATIONS + HELD_OUT) - len(slots)
    outcome.doubled = sum(slots.values()) - len(slots) + sum(len(values) - 1 for values in made.values())
    outcome.altered = sum(
        made.get(f"{item.round}-{item.configuration}-time", [[]])[0] != list(item.samples.values) for item in held
    )
    outcome.begun_again = sum(begun.values()) - len(begun)


def main() -> None:
    """Print the table and the result line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 kills instead of 25")
    parser.add_argument("--board", nargs="+", default=["embedded"], choices=["embedded", "icount"])
    parser.add_argument("--kills", type=int, help="how often the host is killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", nargs=3, metavar=("TARGET", "FILE", "ROUNDS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    kills = options.kills or (5 if options.quick else 25)
    if options.profile:
        entry, path, rounds = options.profile
        profile(read_target(Path(entry)), Path(path), int(rounds))
        return
    outcomes = {board: run_faults(board, kills, options.seed) for board in options.board}
    names = ("host killed", "cut", "worker", "agent", "restart")
    print(
        f"{'board':>10}" + "".join(f"{name:>13}" for name in names) + "  measured  lost  doubled  altered  again  time"
    )
    for board, outcome in outcomes.items():
        print(
            f"{board:>10}" + "".join(f"{outcome.faults[name]:13}" for name in names) + f"{outcome.measurements:10}"
            f"{outcome.lost:6}{outcome.doubled:9}{outcome.altered:9}{outcome.begun_again:13}{outcome.seconds:6.0f}s"
        )
    aims = {}
    for board, outcome in outcomes.items():
        killed, wrong = outcome.faults["host killed"], outcome.lost + outcome.doubled + outcome.altered
        aims[f"{board}_kills"] = {"value": killed, "aim": f">= {kills}", "met": killed >= kills}
        aims[f"{board}_samples_lost_or_doubled"] = {"value": wrong, "aim": "0", "met": wrong == 0}
    print("RESULT", json.dumps({"aims": aims}))


if __name__ == "__main__":
    main()
