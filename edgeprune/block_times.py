"""What layers take on a board in diagonal blocks: one net for each number of blocks, with its kernels timed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from edgeprune.core.effort import DEFAULT, Effort
from edgeprune.core.errors import AgentError, DeviceError
from edgeprune.core.family import load_member
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import Graph, Quantity, Step, StepResult
from edgeprune.core.stats import clean_turns, median, pooled_ratio, turn_ratios
from edgeprune.device.session import Session
from edgeprune.formats import Resizer
from edgeprune.graphs.pivot import GATHER, Blocks
from edgeprune.trace import trace_graph

WHOLE = "whole"


class BlockTimes:
    """Times layers and nets on a session's board; its files are taken off it at the end.

    cut: makes the net whose layers have the given forms. paths: of the layers that may have any. whole_s: latency of
    the net without, once `price` has measured it.
    """

    def __init__(
        self,
        cut: Callable[[Mapping[str, Blocks]], nn.Module],
        inputs: tuple[Tensor, ...],
        paths: Container[str],
        session: Session,
        effort: Effort = DEFAULT,
        progress: Progress = silent,
    ) -> None:
        self.cut, self.inputs, self.paths = cut, inputs, paths
        self.session, self.effort, self.progress = session, effort, progress
        self.member = load_member("formats", session.format)
        self.whole_s = 0.0
        self._seconds: dict[tuple[str, int, bool], float] = {}
        self._files: list[str] = []
        self._folder = tempfile.TemporaryDirectory(prefix="edgeprune-pivot-")

    def __enter__(self) -> BlockTimes:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()
        with suppress(DeviceError):  # a board that cannot be reached any more keeps them
            self.session.remove(self._files)

    def seconds(self, path: str, blocks: Blocks | None) -> float:
        """What a layer takes in a form, with its gather."""
        return self._seconds[_key(path, blocks)]

    def price(self, options: Mapping[str, Sequence[Blocks]], groups: Sequence[int]) -> None:
        """Time every layer in every form: nets in which all layers that can have one form have it.

        raises: AgentError where a net does not run, or the runtime does not tell its kernels apart.
        """
        nets: dict[str, dict[str, Blocks]] = {WHOLE: {}}
        for count in sorted(groups):
            for gathered in (False, True):
                nets[f"{count}{' gathered' if gathered else ''}"] = {
                    path: each
                    for path, known in options.items()
                    for each in known
                    if each.groups == count and (each.columns is not None) == gathered
                }
        nets = {name: chosen for name, chosen in nets.items() if chosen or name == WHOLE}
        resizers = {}
        for done, (name, chosen) in enumerate(nets.items()):
            self.progress("exporting layers in blocks", done, len(nets))
            resizers[name] = self._push(name, self.cut(chosen))
        runs = self.effort.rounds
        timings = [self._timing(name, turn) for turn in range(runs) for name in nets]
        profiles = [
            Step(key=f"kernels {turn} {name}", kind="kernels", artifact=self._file(name), against=self._file(WHOLE),
                 runs=self.effort.profiled_runs)
            for turn in range(runs) for name in nets
        ]  # fmt: skip
        results = self._run([*timings, *profiles])
        self.whole_s = median(np.concatenate([clean_turns(each.against) for each in results.values() if each.against]))
        for name, chosen in nets.items():
            # Profiled runs are slower: of them only what share of the whole each kernel takes counts.
            share = _ratio([results[f"{turn} {name}"] for turn in range(runs)]).median
            times = self._by_layer(*resizers[name], [results[f"kernels {turn} {name}"] for turn in range(runs)])
            for path in options if name == WHOLE else chosen:
                self._seconds[_key(path, chosen.get(path))] = self.whole_s * share * times.get(path, 0.0)

    def measure(self, chosen: Mapping[str, Blocks]) -> Quantity:
        """The net's latency over the whole one's, in turns."""
        name = f"plan-{len(self._files)}"
        self._push(name, self.cut(chosen))
        results = self._run([self._timing(name, turn) for turn in range(self.effort.repeats)])
        return _ratio(list(results.values()))

    def _timing(self, name: str, turn: int) -> Step:
        """In turns with the whole net."""
        effort = self.effort
        return Step(
            key=f"{turn} {name}", kind="time", artifact=self._file(name), against=self._file(WHOLE),
            seconds=effort.seconds, precision=effort.precision, min_samples=effort.samples, steady=effort.steady,
        )  # fmt: skip

    def _file(self, name: str) -> str:
        return f"{name}{self.member.SUFFIX}"

    def _push(self, name: str, module: nn.Module) -> tuple[Graph, Resizer]:
        """Put a net's file on the board. returns: what its kernels lead back to."""
        graph, path = trace_graph(module, self.inputs), Path(self._folder.name) / self._file(name)
        # Of one width only, which takes no other exports to tell widths apart.
        fixed = replace(graph, groups=tuple(replace(group, frozen_because="is timed") for group in graph.groups))
        resizer: Resizer = self.member.make_resizer(module, self.inputs, fixed)
        resizer.write_model({}, path)
        self._files.append(path.name)
        self.session.push({path.name: path})
        return graph, resizer

    def _run(self, steps: Sequence[Step]) -> dict[str, StepResult]:
        """Results by key. raises: AgentError for a step that failed."""
        results = self.session.run(steps, job=f"pivot-{time.time_ns():x}")
        for result in results:
            if result.no_kernels:
                raise AgentError(
                    f"runtime {self.session.target.runtime} does not tell what each layer takes ({result.error}); "
                    "pivot to one number of groups instead"
                )
            if result.error is not None:
                raise AgentError(f"target {self.session.target.name} cannot run a net in blocks: {result.error}")
        return {result.key: result for result in results}

    def _by_layer(self, graph: Graph, resizer: Resizer, rounds: Sequence[StepResult]) -> dict[str, float]:
        """What share of the net's kernel time each layer takes."""
        mapped = resizer.map_kernels(rounds[0].kernels)
        charged = [mapped.charge(result.kernels) for result in rounds]
        owners = {node.name: owner for node in graph.nodes if (owner := self._owner(node.parameters)) is not None}
        shares: dict[str, float] = {}
        for kernel in mapped.kernels:
            owner = next((owners[node] for node in kernel.nodes if node in owners), None)
            if owner is not None:
                share = median([times.get(kernel.name, 0.0) / sum(times.values()) for times in charged])
                shares[owner] = shares.get(owner, 0.0) + share
        return shares

    def _owner(self, parameters: Iterable[str]) -> str | None:
        """The layer that an operation on these parameters belongs to: the convolution, or the gather before it."""
        for parameter in parameters:
            path, _, name = parameter.rpartition(".")
            if name in ("weight", GATHER) and path in self.paths:
                return path
        return None


def _key(path: str, blocks: Blocks | None) -> tuple[str, int, bool]:
    return (path, 1, False) if blocks is None else (path, blocks.groups, blocks.columns is not None)


def _ratio(results: Sequence[StepResult]) -> Quantity:
    return pooled_ratio([turn_ratios(r.samples, r.against) for r in results if r.samples and r.against])
