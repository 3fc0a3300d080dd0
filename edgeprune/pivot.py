"""Pivot a model: order its channels so that large weights gather in diagonal blocks, and run those as grouped layers.

A permutation of a group's channels is taken up by all layers that write and read it, so that it costs nothing; all
layers on a residual stream share one. A layer that would keep more in another order can read its inputs through a
gather, which costs an operation. What is outside of the blocks is pruned, and least squares repair the rest.

Into how many blocks a layer falls is a choice of a plan: how long each layer takes in each form is measured on the
board, in the net; what it loses is the divergence of the net's outputs with this layer alone in blocks; a solver
chooses, and the board confirms the whole.

What is known of the method's paper, and what is ours: `graphs/blocks.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from edgeprune.block_times import BlockTimes
from edgeprune.compensation.batch_norm import match_batch_norm
from edgeprune.compensation.least_squares import compensate
from edgeprune.compensation.obs import collect_gram, explain_masked
from edgeprune.core.budget import parse_limit
from edgeprune.core.cost import count_macs, evaluate, mac_terms
from edgeprune.core.effort import DEFAULT, Effort
from edgeprune.core.errors import ModelError, UsageError
from edgeprune.core.family import load_member
from edgeprune.core.problem import Choice, Problem, Row
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import FloatArray, Graph, LayerBlocks, Pivoted, Quantity
from edgeprune.device.session import Session
from edgeprune.graphs.blocks import Mass, find_orders, kept_share, own_columns
from edgeprune.graphs.capture import capture
from edgeprune.graphs.lift import lift
from edgeprune.graphs.permute import movable_groups, permute_units, same_outputs
from edgeprune.graphs.pivot import (
    Blocks,
    block_mask,
    contributions,
    cut_blocks,
    find_convolutions,
    mask_blocks,
)
from edgeprune.search import divergence, outputs_of, split_examples
from edgeprune.trace import trace_captured

Batches = Iterable[tuple[Any, Tensor]]
LEAST_CHANNELS = 2
"""Inputs and outputs of a block at least; with one of each a layer is depthwise."""
DAMPING = 1e-2
"""Of the refit of one layer, as a share of its mean squared input."""
ROUNDS = 5
"""Plans that the board measures at most."""
NEAR = 0.97
"""A measured latency above this share of the limit is near enough."""


def pivot_model(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    calibration: Batches | None = None,
    *,
    groups: int = 4,
    gather: bool = False,
    layers: Sequence[str] = (),
    refit: bool = True,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[nn.Module, Pivoted]:
    """A copy of the model in which every layer that can be is a convolution of so many groups.

    inputs: example inputs. calibration: (inputs, anything): weighs weights by what they multiply, and refits layers.
    groups: blocks of a layer. gather: layers may read their inputs in an order of their own, at the cost of an
        operation each. layers: shell patterns of paths; none: all. refit: by least squares.
    returns: a module of its own under the same state-dict keys, and what became of the layers.
    raises: UsageError; ModelError when no layer can be pivoted.
    """
    net = _prepare(module, inputs, calibration, (groups,), layers, seed, progress)
    chosen = {path: net.candidates(path, gather=gather)[-1] for path in net.parts}
    return net.assemble(chosen, calibration if refit else None, progress), net.record(chosen)


def plan_pivot(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    calibration: Batches,
    session: Session,
    *,
    latency: str,
    groups: Sequence[int] = (2, 4, 8),
    layers: Sequence[str] = (),
    refit: bool = True,
    solver: str = "milp",
    effort: Effort = DEFAULT,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[nn.Module, Pivoted]:
    """A copy of the model whose layers are in blocks where that loses least for a latency, as the board measures it.

    latency: `12 ms`, or `0.7x` of the model's own. groups: numbers of blocks to choose from. solver: member of
        `solvers`. The others as in `pivot_model`; gathers are weighed, too.
    returns: as `pivot_model`; where no choice is within the limit, the fastest.
    raises: DataError without calibration data; AgentError when the board does not run the nets, or its runtime does
        not tell what each layer takes.
    """
    net = _prepare(module, inputs, calibration, groups, layers, seed, progress)
    options = {path: net.candidates(path, gather=True) for path in net.parts}
    losses = _losses(net, options, calibration, refit, progress)
    with BlockTimes(net.cut, inputs, net.parts, session, effort, progress) as board:
        board.price(options, groups)
        limit_s = parse_limit(latency, "time").absolute(board.whole_s)
        choices = {path: _worthwhile(board, path, options[path], losses[path]) for path in options}
        chosen, share = _close_loop(board, choices, limit_s, solver)
    found = net.record(chosen)
    priced = {
        path: replace(
            found.layers[path], loss=next(o.loss for o in choices[path] if o.blocks is blocks),
            latency_s=board.seconds(path, blocks), whole_latency_s=board.seconds(path, None),
        )
        for path, blocks in chosen.items()
    }  # fmt: skip
    skipped = found.skipped | {
        path: "loses too much for what it gains" if len(choices[path]) > 1 else "is not faster in blocks on this board"
        for path in options
        if path not in chosen
    }
    record = replace(
        found, layers=priced, skipped=skipped, latency_share=share, limit_share=limit_s / board.whole_s
    )  # fmt: skip
    return net.assemble(chosen, calibration if refit else None, progress), record


# --- the model in a new order --------------------------------------------------------------------


@dataclass(frozen=True)
class _Net:
    """A lifted model whose channels are ordered for blocks.

    base: computes what the given one does. parts: path -> numbers of blocks that a layer may have. shares: what each
    pair of channels contributes.
    """

    base: fx.GraphModule
    inputs: tuple[Tensor, ...]
    graph: Graph
    parts: Mapping[str, tuple[int, ...]]
    shares: Mapping[str, FloatArray]
    skipped: Mapping[str, str]
    permuted: tuple[str, ...]

    def candidates(self, path: str, *, gather: bool) -> list[Blocks]:
        """What a layer may become; with a gather where that keeps more."""
        share, found = self.shares[path], []
        for parts in self.parts[path]:
            found.append(Blocks(parts))
            columns = own_columns(share, parts) if gather else None
            if columns is not None and kept_share(share[:, columns], parts) > kept_share(share, parts) + 1e-6:
                found.append(Blocks(parts, columns))
        return found

    def cut(self, chosen: Mapping[str, Blocks]) -> fx.GraphModule:
        """The net in blocks, without a refit. raises: ModelError when it is not the net with zeros."""
        masked, cut = copy.deepcopy(self.base), copy.deepcopy(self.base)
        mask_blocks(masked, chosen)
        cut_blocks(cut, chosen)
        if not same_outputs(masked, cut, self.inputs):
            raise ModelError("the model in blocks computes something else than with zeros outside of the blocks")
        return cut

    def assemble(self, chosen: Mapping[str, Blocks], calibration: Batches | None, progress: Progress) -> nn.Module:
        """The net in blocks; with calibration batches layers are refitted."""
        net = self.cut(chosen)
        if calibration is not None and compensate(
            net, self.base, self.graph, {}, calibration, cut=chosen, progress=progress
        ):
            match_batch_norm(net, calibration)
        return net.eval()

    def record(self, chosen: Mapping[str, Blocks]) -> Pivoted:
        """What became of the layers."""
        layers = {}
        for path, blocks in chosen.items():
            share = self.shares[path] if blocks.columns is None else self.shares[path][:, blocks.columns]
            layers[path] = LayerBlocks(
                groups=blocks.groups, gathered=blocks.columns is not None, kept_share=kept_share(share, blocks.groups)
            )
        terms = mac_terms(self.graph)
        macs = {
            node.parameters[0]: evaluate(terms[node.name], {}, self.graph.units)
            for node in self.graph.nodes
            if node.name in terms and node.parameters
        }
        whole, gone = count_macs(self.graph, {}), 0
        for path, blocks in chosen.items():
            own = macs[f"{path}.weight"]
            gone += own - own // blocks.groups
        return Pivoted(
            layers=layers, skipped=dict(self.skipped), permuted=self.permuted, macs=whole - gone, whole_macs=whole
        )


def _prepare(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    calibration: Batches | None,
    groups: Sequence[int],
    patterns: Sequence[str],
    seed: int,
    progress: Progress,
) -> _Net:
    if not groups or min(groups) < 2:
        raise UsageError(f"groups={', '.join(map(str, groups)) or 'none'}: give numbers of 2 or more")
    progress("ordering channels", 0, 0)
    captured = capture(copy.deepcopy(module), inputs)  # which shares its tensors with what it is of
    graph = trace_captured(captured, next((x.shape[0] for x in inputs if x.ndim), 1))
    base = lift(captured).eval()
    parts, skipped = _eligible(base, groups, patterns)
    if not parts:
        reasons = "; ".join(f"{path} {why}" for path, why in skipped.items())
        raise ModelError(f"no layer of the model can run in diagonal blocks{': ' if reasons else ''}{reasons}")
    shares = contributions(base, parts, calibration)
    masses = {f"{path}.weight": Mass(shares[path], parts[path]) for path in parts}
    orders = find_orders(masses, movable_groups(base, inputs, graph), seed=seed)
    permute_units(base, graph, orders)
    return _Net(base, inputs, graph, parts, contributions(base, parts, calibration), skipped, tuple(orders))


def _eligible(
    base: fx.GraphModule, groups: Sequence[int], patterns: Sequence[str]
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Numbers of blocks by path, and why other layers stay whole."""
    found, skipped = find_convolutions(base)
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in (*found, *skipped)):
            raise UsageError(f"no layer is called '{pattern}'; there are {', '.join((*found, *skipped))}")
    parts = {}
    for path, layer in found.items():
        sizes = layer.weight.shape[:2]
        fitting = [g for g in groups if all(size % g == 0 and size // g >= LEAST_CHANNELS for size in sizes)]
        if patterns and not any(fnmatchcase(path, pattern) for pattern in patterns):
            skipped[path] = "was not chosen"
        elif fitting:
            parts[path] = tuple(sorted(fitting))
        else:
            counts = " or ".join(map(str, groups))
            skipped[path] = f"has {sizes[1]} inputs and {sizes[0]} outputs, which {counts} blocks do not divide"
    return parts, skipped


# --- what blocks lose ----------------------------------------------------------------------------


@torch.no_grad()
def _losses(
    net: _Net, options: Mapping[str, Sequence[Blocks]], calibration: Batches, refit: bool, progress: Progress
) -> dict[str, list[float]]:
    """Divergence of the net's outputs with one layer alone in each of its forms. raises: DataError."""
    fitting, judging = split_examples(calibration)
    wanted = outputs_of(net.base, judging)
    found: dict[str, list[float]] = {}
    for done, (path, blocks) in enumerate(options.items()):
        progress("losses of blocks", done, len(options))
        layer = net.base.get_submodule(path)
        assert isinstance(layer, nn.Conv1d | nn.Conv2d)
        before = {name: tensor.clone() for name, tensor in layer.named_parameters()}
        gram = _gram(net.base, layer, fitting) if refit else None
        found[path] = []
        for each in blocks:
            kept = block_mask(layer.weight, each)
            if gram is not None:
                explain_masked(layer, gram, kept.flatten(1), DAMPING)
            layer.weight.mul_(kept.to(layer.weight))
            found[path].append(divergence(outputs_of(net.base, judging), wanted))
            for name, tensor in layer.named_parameters():
                tensor.copy_(before[name])
    return found


def _gram(base: nn.Module, layer: nn.Conv1d | nn.Conv2d, batches: Batches) -> Tensor | None:
    """XᵀX of what a layer reads; None where that is too large."""
    grams: list[Tensor | None] = []
    handle = layer.register_forward_pre_hook(lambda _, given: grams.append(collect_gram(layer, given[0])))
    try:
        outputs_of(base, batches)
    finally:
        handle.remove()
    known = [gram[0] for gram in grams if gram is not None]
    return torch.stack(known).sum(0) if known else None


# --- what blocks take, and the choice ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Option:
    """One form of a layer; None: whole."""

    blocks: Blocks | None
    seconds: float
    loss: float


def _worthwhile(board: BlockTimes, path: str, blocks: Sequence[Blocks], losses: Sequence[float]) -> list[_Option]:
    """The fastest first; of each none that another beats in time and loss. The whole layer is the last."""
    known = [(None, 0.0), *zip(blocks, losses, strict=True)]
    options = [_Option(each, board.seconds(path, each), max(loss, 0.0)) for each, loss in known]
    front: list[_Option] = []
    for option in sorted(options, key=lambda o: (o.loss, o.seconds)):
        if not front or option.seconds < front[-1].seconds:
            front.append(option)
    return front[::-1]


def _close_loop(
    board: BlockTimes, choices: Mapping[str, Sequence[_Option]], limit_s: float, solver: str
) -> tuple[dict[str, Blocks], Quantity]:
    """The choice that loses least of those that the board measured within the limit; else the fastest."""
    asked_s = limit_s
    tried: list[tuple[dict[str, Blocks], Quantity, float]] = []
    for _ in range(ROUNDS):
        options = _solve(board, choices, asked_s, solver)
        chosen = {path: option.blocks for path, option in options.items() if option.blocks is not None}
        if any(chosen == known for known, *_ in tried):
            break
        share = board.measure(chosen)
        tried.append((chosen, share, sum(option.loss for option in options.values())))
        measured_s = share.median * board.whole_s
        if NEAR * limit_s <= measured_s <= limit_s:
            break
        asked_s *= limit_s / measured_s
    within = [each for each in tried if each[1].median * board.whole_s <= limit_s]
    best = min(within, key=lambda each: each[2]) if within else min(tried, key=lambda each: each[1].median)
    return best[0], best[1]


def _solve(
    board: BlockTimes, choices: Mapping[str, Sequence[_Option]], limit_s: float, solver: str
) -> dict[str, _Option]:
    """One form per layer, of least loss within the limit; the fastest of each where nothing is."""
    several = {path: options for path, options in choices.items() if len(options) > 1}
    chosen = {path: options[0] for path, options in choices.items()}
    if not several:
        return chosen
    costs = {v: np.array([option.seconds for option in options]) for v, options in enumerate(several.values())}
    problem = Problem(
        choices=tuple(
            Choice(name=path, widths=np.arange(1, len(options) + 1), loss=np.array([o.loss for o in options]))
            for path, options in several.items()
        ),
        rows=(Row(
            quantity="latency_s", limit=limit_s, unary=costs,
            constant=board.whole_s - sum(float(each[-1]) for each in costs.values()),
        ),),
    )  # fmt: skip
    levels = load_member("solvers", solver).solve(problem, time_limit_s=20.0).levels
    if levels is None:
        return chosen
    return chosen | {path: several[path][level] for path, level in zip(several, levels, strict=True)}
