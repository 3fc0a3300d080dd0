"""What all stages of a run share: the run file, the model, the board, and where records are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.compact import compact_and_compensate
from edgeprune.core.effort import Effort, find_effort
from edgeprune.core.family import load_member
from edgeprune.core.progress import Progress
from edgeprune.core.records import (
    Artifact,
    Graph,
    Plan,
    Precision,
)
from edgeprune.core.runfile import RunFile
from edgeprune.core.runfolder import RunFolder
from edgeprune.core.store import digest, read_record
from edgeprune.core.tensors import Calibration
from edgeprune.device.session import Session
from edgeprune.device.targets import runtime_format
from edgeprune.formats import Resizer
from edgeprune.load import Data, as_arrays
from edgeprune.on_board import (
    choose_runtime,
    connect,
)
from edgeprune.precisions import Judge

Batches = Iterable[tuple[Any, Tensor]]


@dataclass(frozen=True)
class Context:
    """One run.

    sources: what identifies the weights and the data. start: the model whose units are removed: `model`, or after a
    step of a schedule that with zeros in the place of what went. original: the model before its transform, if any.
    """

    run: RunFile
    base: Path
    folder: RunFolder
    sources: tuple[str, ...]
    model: nn.Module
    inputs: tuple[Tensor, ...]
    data: Data
    progress: Progress
    start: nn.Module
    original: nn.Module | None = None

    @property
    def dense(self) -> nn.Module:
        """What the pruned model is measured against, and learns from."""
        return self.model if self.original is None else self.original

    def _assemble(self, graph: Graph, plan: Plan) -> nn.Module:
        """The net of a plan before any training."""
        calibration = self.data.require("calibration") if self.run.prune.compensate else None
        return compact_and_compensate(self.start, self.inputs, graph, plan, calibration, progress=self.progress)

    def _judge(self, graph: Graph) -> Judge:
        return Judge(
            inputs=self.inputs, graph=graph, format=self.format_name, calibration=self._calibration,
            batches=self.data.require("calibration"),
        )  # fmt: skip

    def _resizer(self, graph: Graph, precision: Precision) -> Resizer:
        """Other widths of the model in a precision: made once, which takes several exports."""
        if precision not in self._resizers:
            made: Resizer = self.format.make_resizer(self.model, self.inputs, graph, precision=precision)
            made.dense_bytes += read_record(Artifact, self.folder / "dense.json").metadata_bytes
            self._resizers[precision] = made
        return self._resizers[precision]

    def _board(self) -> AbstractContextManager[Session]:
        target = self.run.target
        return connect(
            target.name,
            threads=target.threads,
            runtime=self.runtime,
            meter=target.meter,
            space=self.folder.path,
            progress=self.progress,
        )

    @cached_property
    def _resizers(self) -> dict[Precision, Resizer]:
        return {}

    @cached_property
    def runtime(self) -> str:
        """What executes the artifacts on the board."""
        return choose_runtime(self.run.target.name, self.run.target.runtime, self.run.export.format)

    @cached_property
    def format_name(self) -> str:
        """The member of `formats` that it runs."""
        return runtime_format(self.runtime)

    @property
    def format(self) -> ModuleType:
        """That member."""
        return load_member("formats", self.format_name)

    @property
    def _described(self) -> dict[str, Any]:
        """What an artifact says of itself to apps."""
        return {"labels": self.data.labels, "preprocessing": self.data.preprocessing}

    @property
    def _effort(self) -> Effort:
        return find_effort(self.run.target.effort)

    @property
    def _planning(self) -> list[Any]:
        """What decides the widths besides scores, tables and budget."""
        prune, search = self.run.prune, self.run.search
        settings = [prune.solver, prune.levels, prune.compensate, search.trials, search.seconds, self.run.seed]
        return settings if self._other is None else [*settings, digest(self._other.widths)]

    @cached_property
    def _other(self) -> Plan | None:
        """The plan whose widths this run scales. raises: RecordError, UsageError."""
        return None if self.run.prune.like is None else read_record(Plan, self.base / self.run.prune.like)

    @property
    def _calibration(self) -> Calibration:
        """What ranges of activations come from."""
        return as_arrays(first(self.data.require("calibration"), self.run.prune.batches))


def weights_digest(model: nn.Module) -> str:
    """sha256 over names, shapes and values of everything in the state dict."""
    whole = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        whole.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        whole.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def first(batches: Batches, count: int) -> list[tuple[Any, Tensor]]:
    """The first `count` batches, kept in memory."""
    return [batch for batch, _ in zip(batches, range(count), strict=False)]
