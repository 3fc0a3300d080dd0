"""A part of a model that cannot be exported whole, such as a detector's backbone: what it reads, and its place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edgeprune.core.errors import DataError, ModelError
from edgeprune.graphs.capture import evaluating

Batches = Iterable[tuple[Any, Tensor]]


def enter_scope(model: nn.Module, path: str, inputs: tuple[Any, ...]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The submodule at a path, and the tensors that it receives in a real forward pass of the model.

    inputs: example inputs of the model. A submodule that is called several times gets those of the first call.
    returns: the submodule itself, which takes the place of the model in every stage, and its example inputs. Pruned in
        place (`compact_model(..., in_place=True)`) it need not be put back.
    raises: ModelError when there is none at the path, when the forward pass fails or does not call it, or when it is
        called with anything but tensors.
    """
    part = _find(model, path)
    return part, _receive(model, part, path, inputs)


def scope_batches(model: nn.Module, path: str, batches: Batches) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    """Batches of the model as its submodule sees them, with the targets they had; all are kept in memory.

    raises: as `enter_scope`; DataError when there are none.
    """
    part = _find(model, path)
    seen = [
        (_receive(model, part, path, tuple(given) if isinstance(given, tuple | list) else (given,)), targets)
        for given, targets in batches
    ]
    if not seen:
        raise DataError("there are no batches to take through the model")
    return seen


class ScopeBatches:
    """As `scope_batches`, taken through the model anew in each pass and so not kept in memory; without targets.

    Floats stand in their place: labels of the model are none of its submodule's outputs.
    """

    def __init__(self, model: nn.Module, path: str, batches: Batches) -> None:
        self.model, self.path, self.batches = model, path, batches

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Let batches that are drawn anew in each epoch be drawn."""
        if hasattr(self.batches, "set_epoch"):
            self.batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        part = _find(self.model, self.path)
        for given, _ in self.batches:
            inputs = tuple(given) if isinstance(given, tuple | list) else (given,)
            seen = _receive(self.model, part, self.path, inputs)
            yield seen, torch.zeros(len(seen[0]))


@dataclass(frozen=True)
class ScopeData:
    """Data of a model as its submodule sees them; without batches to train on, those for calibration are."""

    train: ScopeBatches | None
    calibration: ScopeBatches | None
    test: ScopeBatches | None


class Splits(Protocol):
    """Batches of the whole model; `load.Data` is one."""

    @property
    def train(self) -> Batches | None: ...
    @property
    def calibration(self) -> Batches | None: ...
    @property
    def test(self) -> Batches | None: ...


def scope_data(model: nn.Module, path: str, data: Splits) -> ScopeData:
    """All splits of a data source, each taken through the model anew in every pass, without targets."""
    train, calibration, test = (
        None if batches is None else ScopeBatches(model, path, batches)
        for batches in (data.train or data.calibration, data.calibration, data.test)
    )
    return ScopeData(train, calibration, test)


def put_back(model: nn.Module, path: str, part: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Put a pruned submodule in the place of the one it was made from.

    inputs: example inputs of the model, which has to run with it.
    raises: ModelError when it does not; the model is then as it was.
    """
    before = _find(model, path)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, part)
    try:
        _run(model, inputs)
    except ModelError as error:
        setattr(model.get_submodule(parent), name, before)
        raise ModelError(
            f"the model does not run with another '{path}' ({error}); prune it in place (compact_model, in_place=True)"
        ) from error


def _find(model: nn.Module, path: str) -> nn.Module:
    try:
        part = model.get_submodule(path)
    except AttributeError as error:
        known = ", ".join(name for name, _ in model.named_children()) or "none"
        raise ModelError(f"the model has no submodule '{path}'; it has {known}") from error
    if not path:
        raise ModelError("the scope is empty; name a submodule")
    return part


def _receive(model: nn.Module, part: nn.Module, path: str, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    def stop(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        raise _Called(given, named)  # what comes after it is not needed, and may take long

    handle = part.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        _run(model, inputs)
    except _Called as call:
        given, named = call.given, call.named
    else:
        raise ModelError(f"the forward pass of the model does not call '{path}'; name a submodule that it calls")
    finally:
        handle.remove()
    if named or not given or not all(isinstance(value, Tensor) for value in given):
        kinds = ", ".join([*(type(value).__name__ for value in given), *(f"{name}=" for name in named)]) or "nothing"
        raise ModelError(f"'{path}' is called with {kinds}; a scope takes tensors by position: name a part of it")
    return tuple(value.detach().clone() for value in given)


class _Called(Exception):
    """A submodule was called with these arguments."""

    def __init__(self, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        super().__init__()
        self.given, self.named = given, named


@torch.no_grad()
def _run(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    try:
        with evaluating(model):
            model(*inputs)
    except _Called:
        raise
    except Exception as error:  # whatever the user's code raises
        first = str(error).partition("\n")[0]
        raise ModelError(f"the model does not run on these inputs: {type(error).__name__}: {first}") from error
