"""A profile that survives everything: the host killed, connections cut, the agent killed, the board restarted.

    python tools/bench_faults.py [--quick] [--board embedded icount] [--kills N] [--seed N]

One profile of a small net is run again and again, each time killed (signal 9) at a random moment, while the
board has troubles of its own, until all kills are spent; the last run is left to finish. Then what the file
holds is held against what the agent measured: every measurement of the schedule, each once, none altered.
The runs are forks of one process that has exported the net, so that nearly all of their life is at the board.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
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


def serve_runs(target: Target, path: Path) -> None:
    """Fork a run for every number of rounds on standard input; say its process id, what it does, how it ended."""
    import torch
    from torch import nn

    from edgeprune.core.family import load_member
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
    graph = trace_graph(net, inputs)
    resizer = load_member("formats", "onnx").make_resizer(net, inputs, graph)

    def say(what: str, done: object = "", total: object = "") -> None:
        print(what, done, total, flush=True)

    def run(rounds: int) -> None:
        # Long enough that a kill falls into a step, not behind the last.
        effort = Effort(rounds=rounds, repeats=1, seconds=1.0, precision=None)
        with open_session(target, space=str(path)) as session:
            profile_target(
                net, inputs, graph, session, path=path, configurations=CONFIGURATIONS, held_out=HELD_OUT,
                effort=effort, progress=say, resizer=resizer,
            )  # fmt: skip

    say("ready")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                die_with_parent()
                run(int(line))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        say("run", child)
        say("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


class Host:
    """The process that forks the runs, one at a time."""

    def __init__(self, entry: Path, path: Path, log: Path) -> None:
        """entry: the target's file. path: of the profile. log: gets what the runs complain about."""
        self.log = log
        self.status: int | None = None
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, __file__, "--host", str(entry), str(path)], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=errors, text=True, preexec_fn=die_with_parent,
            )  # fmt: skip
        self.wait_for("ready")

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def start(self, rounds: int) -> None:
        """Begin a run."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{rounds}\n")
        self._process.stdin.flush()
        self.status = None
        self._run = int(self.wait_for("run")[1])

    def wait_for(self, *words: str) -> list[str]:
        """The next line that begins with one of the words, or says that the run ended. status: how it did."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = line.split()
            if said[0] == "ended":
                self.status = int(said[1])
            if said[0] in (*words, "ended"):
                return said
        raise SystemExit(f"the host failed: {self.log.read_text()[-2000:]}")

    def kill(self) -> bool:
        """Signal 9. False when the run had ended well before. raises: SystemExit when it had failed."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._run, signal.SIGKILL)
            while self.status is None:
                self.wait_for()
        if self.status not in (0, -signal.SIGKILL):
            raise SystemExit(f"a run failed by itself ({self.status}): {self.log.read_text()[-2000:]}")
        return self.status != 0


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
            rounds = ROUNDS
            with Host(entry, path, folder / "log") as host:
                while outcome.faults["host killed"] < kills:
                    fault = FAULTS[outcome.runs % len(FAULTS)]
                    outcome.runs += 1
                    if suffer(host, rounds, fault, trouble, generator, outcome):
                        outcome.faults["host killed"] += 1
                        print(f"kill {outcome.faults['host killed']}, fault: {fault}", file=sys.stderr, flush=True)
                    else:
                        rounds += ROUNDS  # all is measured already: more rounds of the same profile
                host.start(rounds)
                outcome.runs += 1
                host.wait_for()
                host.kill()  # nothing is left to kill: it raises where the run failed
            account(path, on_board(trouble.target, SHOW_RESULTS), rounds, outcome)
    outcome.seconds = time.monotonic() - began
    return outcome


def suffer(host: Host, rounds: int, fault: str, trouble: Troubled, generator: random.Random, outcome: Outcome) -> bool:
    """One run with one fault of the board, then killed. False when it had finished before."""
    trouble.link.wait_until_up()  # a run that finds no board at its start says so and ends
    host.start(rounds)
    # Half of the kills without another fault fall anywhere from the start on, the others while the board measures.
    if fault == "none" and generator.random() < 1 / 2:
        time.sleep(generator.uniform(0.0, 4.0))
        return host.kill()
    if host.wait_for("profiling")[0] == "profiling":
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
    return host.kill()


# --- what became of it ---------------------------------------------------------------------------


def account(path: Path, on_the_board: bytes, rounds: int, outcome: Outcome) -> None:
    """Hold the profile's file against the agent's own."""
    from edgeprune.core.records import Measurement
    from edgeprune.core.store import read_lines
    from edgeprune.tables.stored import ProfileHeading

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
    parser.add_argument("--host", nargs=2, metavar=("TARGET", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    kills = options.kills or (5 if options.quick else 25)
    if options.host:
        entry, path = map(Path, options.host)
        serve_runs(read_target(entry), path)
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
