"""A model as it travels to workers: as the program of torch.export, since they may be unable to import its classes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from edgeprune.core.errors import ModelError, first_line
from edgeprune.graphs.capture import Inputs, capture, export_program, import_program
from edgeprune.graphs.lift import lift
from edgeprune.graphs.slice import named_tensors


class Portable:
    """A model that can be pickled, and costs nothing where it is not.

    inputs: example tensors, as for `trace_graph`.
    """

    def __init__(self, module: nn.Module, inputs: Inputs) -> None:
        self.module, self._inputs = module, inputs

    @cached_property
    def captured(self) -> fx.GraphModule:
        """As `capture` gives it: with the same names wherever it is."""
        return capture(self.module, self._inputs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """raises: ModelError when the program cannot be written."""
        file = io.BytesIO()
        program = export_program(self.module, self._inputs)
        try:
            torch.export.save(program, file)
        except Exception as error:
            raise ModelError(
                f"the model cannot be sent to workers: {first_line(error)}; take executor 'here'"
            ) from error
        return _Arrived, (file.getvalue(), _shared_names(self.module))


class _Arrived:
    """The same in a worker: with real layers under the same names, in evaluation mode."""

    def __init__(self, program: bytes, shared: list[list[str]]) -> None:
        self.captured, self._shared = import_program(torch.export.load(io.BytesIO(program))), shared
        _name_again(self.captured, shared)

    @cached_property
    def module(self) -> nn.Module:
        lifted = lift(copy.deepcopy(self.captured)).eval()
        _name_again(lifted, self._shared)
        return lifted


def _shared_names(module: nn.Module) -> list[list[str]]:
    """Names of tensors that have several: a file of torch.export keeps one of them, and a graph may know another."""
    names: dict[int, list[str]] = {}
    for name, tensor in named_tensors(module).items():
        names.setdefault(id(tensor), []).append(name)
    return [found for found in names.values() if len(found) > 1]


def _name_again(root: fx.GraphModule, shared: list[list[str]]) -> None:
    """Let tensors, and modules of which only one name is left, be found under all of their names."""
    for names in shared:
        there = named_tensors(root)
        kept = next((name for name in names if name in there), None)
        if kept is None:
            continue  # nothing computes with it
        for name in names:
            path, _, leaf = name.rpartition(".")
            if path not in dict(root.named_modules(remove_duplicate=False)):
                root.add_submodule(path, root.get_submodule(kept.rpartition(".")[0]))
            owner = root.get_submodule(path)
            owned: dict[str, Any] = owner._parameters if isinstance(there[kept], nn.Parameter) else owner._buffers
            owned[leaf] = there[kept]
