"""Choices that a model makes for each example: `torch.where` on one boolean an example.

A batch computes both sides and masks; a file for one example skips what was not chosen (`formats/_onnx_choices.py`).
True is always what computes more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from edgeprune.core.errors import DataError
from edgeprune.graphs.capture import Inputs, capture, operator_name
from edgeprune.graphs.ports import get_ports

BoolArray = npt.NDArray[np.bool_]


def decide_runs(module: nn.Module, inputs: Inputs, batches: Iterable[tuple[Any, Any]]) -> dict[str, BoolArray]:
    """Gate -> whether it runs, for each example in turn; see `count_runs`."""
    return Decisions(module, inputs).of_all(batches)


def count_runs(module: nn.Module, inputs: Inputs, batches: Iterable[tuple[Any, Any]]) -> dict[str, float]:
    """Gate -> share of the examples for which what it guards is computed, in evaluation mode.

    inputs: example tensors, batch first. batches: (inputs, targets). A gate that lies in what another one left out
    does not run. raises: DataError without examples.
    """
    return Decisions(module, inputs).count(batches)


class Decisions(fx.Interpreter):
    """What the gates of a model decide. Its tensors are the model's: what is changed there shows here."""

    def __init__(self, module: nn.Module, inputs: Inputs) -> None:
        captured = capture(module, inputs)
        super().__init__(captured)
        self.choices = dict(zip(find_choices(captured), get_ports(module).gates, strict=True))
        self.decided: dict[fx.Node, Tensor] = {}

    def count(self, batches: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        """See `count_runs`."""
        return {name: float(ran.mean()) for name, ran in self.of_all(batches).items()}

    def of_all(self, batches: Iterable[tuple[Any, Any]]) -> dict[str, BoolArray]:
        """See `decide_runs`."""
        chosen = [self.decide(tensors) for tensors, _ in batches]
        if not chosen:
            raise DataError("there are no examples to see the gates decide on")
        return {name: torch.cat([each[name] for each in chosen]).numpy(force=True) for name in chosen[0]}

    @torch.no_grad()
    def decide(self, inputs: Any) -> dict[str, Tensor]:
        """Gate -> (n,) bool: whether it runs for each example of a batch."""
        self.decided = {}
        tensors = inputs if isinstance(inputs, tuple | list) else (inputs,)
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        self.run(*(tensor.to(device) for tensor in tensors))
        runs: dict[str, Tensor] = {}
        for node in reversed(self.choices):
            outer = [user for user in node.users if user in self.choices and user.args[1] is node]
            runs[self.choices[node]] = self.decided[node]
            if outer:
                runs[self.choices[node]] = self.decided[node] & runs[self.choices[outer[0]]]
        return {name: runs[name] for name in self.choices.values()}

    def run_node(self, n: fx.Node) -> Any:
        if n in self.choices:
            condition = self.env[n.args[0]]  # type: ignore[index]
            self.decided[n] = condition.flatten()
        return super().run_node(n)


def find_choices(captured: fx.GraphModule) -> list[fx.Node]:
    """The choices in a captured graph, in its order."""
    return [node for node in captured.graph.nodes if node.op == "call_function" and _chooses(node)]


def _chooses(node: fx.Node) -> bool:
    if operator_name(node) != "where" or len(node.args) != 3 or not isinstance(node.args[0], fx.Node):
        return False
    condition, value = node.args[0].meta.get("val"), node.meta.get("val")
    if node.args[0].op == "get_attr" or not isinstance(condition, Tensor) or not isinstance(value, Tensor):
        return False
    return condition.ndim == value.ndim > 0 and all(size == 1 for size in condition.shape[1:])
