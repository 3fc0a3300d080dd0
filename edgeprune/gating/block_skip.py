"""Residual branches that are skipped for inputs that can do without (Veit & Belongie, ECCV 2018, arXiv:1711.11503)."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, fx, nn

from edgeprune.core.errors import ModelError, UsageError
from edgeprune.core.records import Branch
from edgeprune.gating import Batches, Choice, Gating, Measure
from edgeprune.gating._choices import Standardised, count_macs, free_path
from edgeprune.graphs.branches import find_branches
from edgeprune.graphs.capture import operator_name, writes_memory
from edgeprune.graphs.propagate import propagate

OPEN = 2.0
"""Of an untrained gate: it runs, and in training with a chance of 88 %."""
CLOSE = 0.02
"""How far from the rate that was asked for a trained model may be before its gates are shifted."""
FURTHEST, HALVINGS = 30.0, 12
"""Of that shift: the most, and how often the interval is halved."""


def make(*, rate: float = 0.6, branches: str = "*", strength: float = 4.0) -> Gating:
    """One gate a residual branch: a linear layer on the means of the channels that the branch reads.

    rate:      in (0, 1), share of the guarded multiply-accumulates that are to be computed on average.
    branches:  shell patterns of their names (`edgeprune trace` lists them), separated by spaces.
    strength:  > 0, of the penalty for another rate.
    raises:    UsageError.
    source:    sec. 3 of the paper: a straight-through estimate of the decision, here with logistic noise (the binary
               Gumbel relaxation) that fades while it trains, and one target for all gates together.
    """
    if not 0 < rate < 1:
        raise UsageError(f"block_skip: rate={rate} must lie between 0 and 1, as rate=0.6")
    if not strength > 0:
        raise UsageError(f"block_skip: strength={strength} must be above 0")
    return _BlockSkip(rate, branches.split(), strength)


class _Skip(Choice):
    """axis: of the channels, `channels` many."""

    def __init__(self, share: float, axis: int, channels: int) -> None:
        super().__init__(share)
        self.axis = axis
        self.decide = Standardised(channels, 1)
        nn.init.zeros_(self.decide.weight)
        nn.init.constant_(self.decide.bias, OPEN)

    def forward(self, entry: Tensor, more: Tensor, less: Tensor) -> Tensor:
        """`more` where the gate runs, else `less`."""
        axes = [axis for axis in range(1, entry.ndim) if axis != self.axis]
        logits = self.decide(entry.mean(axes) if axes else entry)
        shape = [-1, *[1] * (more.ndim - 1)]
        if not self.training:
            return torch.where((logits > 0).view(shape), more, less)
        even = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
        soft = torch.sigmoid(logits + self.chance * torch.logit(even))
        ran = ((soft > 0.5).to(soft.dtype) + soft - soft.detach()).view(shape)
        self.taken = ran
        return less + ran * (more - less)


class _BlockSkip(Gating):
    def __init__(self, rate: float, patterns: list[str], strength: float) -> None:
        self.rate, self.patterns, self.strength = rate, patterns, strength

    def place(self, captured: fx.GraphModule) -> list[str]:
        macs = sum(count_macs(node) for node in captured.graph.nodes)
        branches = find_branches(captured, propagate(captured), ())
        chosen = [b for b in branches if any(fnmatchcase(b.name, pattern) for pattern in self.patterns)]
        placed: list[str] = []
        refused: dict[str, str] = {}
        nodes = {node.name: node for node in captured.graph.nodes}
        gated: dict[fx.Node, fx.Node] = {}
        for branch in chosen:
            inside = [nodes[name] for name in branch.nodes]
            share = sum(map(count_macs, inside)) / max(macs, 1)
            if (reason := _reason_against(branch, nodes, share)) is not None:
                refused[branch.name] = reason
                continue
            path = free_path(captured, f"{branch.name}.gate")
            total, rest = nodes[branch.total], nodes[branch.rest]
            gated[total] = _insert(captured, path, inside, total, gated.get(rest, rest), share)
            placed.append(path)
        if not placed:
            names = ", ".join(branch.name for branch in branches) or "none"
            reasons = "; ".join(f"{name} {why}" for name, why in refused.items())
            raise ModelError(
                f"block_skip found no residual branch to skip ({reasons or f'those there are: {names}'}); "
                "a model without residual sums can have early_exit"
            )
        return placed

    def penalty(self, choices: Mapping[str, Choice], logits: Tensor, targets: Tensor) -> Tensor:
        del targets
        ran = logits.new_zeros(())
        for choice in choices.values():
            assert choice.taken is not None
            ran = ran + choice.share * choice.taken.float().mean()
            choice.forget()
        return self.strength * (ran / sum(choice.share for choice in choices.values()) - self.rate).square()

    @torch.no_grad()
    def settle(self, module: nn.Module, choices: Mapping[str, Choice], calibration: Batches, measure: Measure) -> None:
        del module, calibration
        guarded = sum(choice.share for choice in choices.values())

        def excess(shift: float) -> float:
            """How much more than asked runs where every gate is this much more open."""
            for name, choice in choices.items():
                assert isinstance(choice, _Skip)
                choice.decide.bias.copy_(before[name] + shift)
            runs = measure()
            return sum(choice.share * runs[name] for name, choice in choices.items()) / guarded - self.rate

        before = {name: choice.decide.bias.clone() for name, choice in choices.items() if isinstance(choice, _Skip)}
        if abs(excess(0.0)) <= CLOSE:
            return
        low, high = -FURTHEST, FURTHEST
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            found = excess(middle)
            if abs(found) <= CLOSE:
                return
            low, high = (middle, high) if found < 0 else (low, middle)


def _reason_against(branch: Branch, nodes: Mapping[str, fx.Node], share: float) -> str | None:
    total, rest = nodes[branch.total], nodes[branch.rest]
    if share <= 0:
        return "computes nothing that is worth a gate"
    order = list(nodes.values())
    later = order[order.index(total) + 1 :]
    if writes_memory(total) and total.args[0] is rest and any(user in later for user in rest.users):
        return "is added to its input in place, which is read again later"
    return None


def _insert(
    captured: fx.GraphModule, path: str, inside: list[fx.Node], total: fx.Node, rest: fx.Node, share: float
) -> fx.Node:
    """Let what follows a residual sum read the gate's choice instead of it, and return that."""
    sources = {source for node in inside for source in node.all_input_nodes} - set(inside)
    (entry,) = (s for s in sources if s.op != "get_attr" and isinstance(s.meta.get("val"), Tensor))
    value = entry.meta["val"]
    convolves = any(operator_name(node).startswith("conv") for node in inside)
    axis = 1 if convolves or value.ndim == 2 else value.ndim - 1
    if writes_memory(total):
        assert isinstance(total.target, torch._ops.OpOverload)
        total.target = getattr(torch.ops.aten.add, total.target._overloadname)
    captured.add_submodule(path, _Skip(share, axis, int(value.shape[axis])))
    with captured.graph.inserting_after(total):
        chosen = captured.graph.call_module(path, (entry, total, rest))
    chosen.meta["val"] = total.meta["val"]
    total.replace_all_uses_with(chosen, delete_user_cb=lambda user: user is not chosen)
    return chosen
