"""Easy inputs leave early: small classifiers along the way (BranchyNet, Teerapittayanon et al., ICPR 2016,
arXiv:1709.01686)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from edgeprune.core.errors import DataError, ModelError, UsageError
from edgeprune.gating import Batches, Choice, Gating, Measure
from edgeprune.gating._choices import Learner, Standardised, StandardisedConv, count_macs, free_path
from edgeprune.graphs.capture import module_path, writes_memory
from edgeprune.objective import label_loss

NEVER = 2.0
"""No confidence reaches it."""
CANDIDATES = 400
"""Thresholds that are tried, spread over the confidences seen."""
TEMPERATURE = 2.0
LEAST_LEFT = 0.02
"""Share of the MACs that must follow an exit."""


def make(
    *, at: str = "0.4", after: str = "", rate: float = 0.0, tolerance: float = 0.005, hidden: int = 64, places: int = 4,
    strength: float = 1.0, alone: bool = False,
) -> Gating:  # fmt: skip
    """Exits where a share of the work is done; an input leaves at the first that is confident enough.

    at:         shares of the multiply-accumulates in (0, 1), separated by spaces: an exit at the place nearest to each.
    after:      paths of submodules instead, separated by spaces (`layer1 layer2`).
    rate:       in [0, 1): share of the calibration examples that leave early. 0: `tolerance` decides.
    tolerance:  >= 0, accuracy that leaving early may cost on the calibration examples.
    hidden:     channels of an exit's own 3x3 convolution; 0: none. places: it sees means over places x places of the
                image.
    strength:   > 0, of the exits' losses beside the model's.
    alone:      train the exits only, and leave the model as it is: what does not leave early is answered as before.
                An epoch is then one look at the training data, and what was seen is learnt many times.
    raises:     UsageError.
    source:     secs. III-B and III-C of the paper; ours: confidence is the largest probability, exits also learn from
                the model's own end (self-distillation), and one threshold serves all exits. `alone` is the "IC-only
                training" of Shallow-Deep Networks (Kaya et al., ICML 2019, arXiv:1810.07052).
    """
    try:
        shares = sorted({float(share) for share in at.split()})
    except ValueError as error:
        raise UsageError(f"early_exit: at='{at}' must be shares such as '0.3 0.6'") from error
    if not shares or not 0 < shares[0] <= shares[-1] < 1:
        raise UsageError(f"early_exit: at='{at}' must lie between 0 and 1")
    if not (0 <= rate < 1 and tolerance >= 0 and strength > 0 and hidden >= 0 and places >= 1):
        raise UsageError(
            f"early_exit: rate={rate} must be in [0, 1), tolerance={tolerance} and hidden={hidden} not below 0, "
            f"places={places} at least 1, strength={strength} above 0"
        )
    return _EarlyExit(shares, after.split(), rate, tolerance, hidden, places, strength, alone)


class _Exit(Learner):
    """What sees values (n, channels, h, w) of a place in the model and may answer in its stead."""

    threshold: Tensor

    def __init__(self, share: float, shape: tuple[int, int, int], classes: int, hidden: int, places: int) -> None:
        super().__init__(share)
        channels, *sizes = shape
        self.places = max(p for p in range(1, places + 1) if all(size % p == 0 for size in sizes))
        everywhere = self.places**2
        self.classify = (
            nn.Sequential(
                StandardisedConv(channels, hidden, 3 if self.places > 1 else 1), nn.ReLU(), nn.Flatten(),
                nn.Linear(hidden * everywhere, classes),
            )
            if hidden
            else nn.Sequential(nn.Flatten(), Standardised(channels * everywhere, classes))
        )  # fmt: skip
        self.register_buffer("threshold", torch.tensor(NEVER))

    def look(self, seen: Tensor) -> Tensor:
        """Means over places of the image: (n, channels, h, w) -> (n, channels, places, places)."""
        return functional.avg_pool2d(seen, [size // self.places for size in seen.shape[2:]])

    def answer(self, features: Tensor) -> Tensor:
        """(n, channels, places, places) -> (n, classes)."""
        answer: Tensor = self.classify(features)
        return answer

    def forward(self, seen: Tensor, more: Tensor) -> Tensor:
        """The exit's answer where it is sure, else `more`."""
        own = self.answer(self.look(seen))
        if self.training:
            self.taken = own
            return more
        confidence = own.softmax(1).amax(1, keepdim=True)
        return torch.where(confidence < self.threshold, more, own)


class _EarlyExit(Gating):
    def __init__(
        self,
        at: list[float],
        after: list[str],
        rate: float,
        tolerance: float,
        hidden: int,
        places: int,
        strength: float,
        alone: bool,
    ) -> None:
        self.at, self.after, self.rate, self.tolerance = at, after, rate, tolerance
        self.hidden, self.places, self.strength, self.alone = hidden, places, strength, alone

    def place(self, captured: fx.GraphModule) -> list[str]:
        (output,) = (node for node in captured.graph.nodes if node.op == "output")
        ends = output.all_input_nodes
        if len(ends) != 1 or ends[0].meta["val"].ndim != 2:
            raise ModelError("early_exit needs a classifier with one output (n, classes); block_skip does not")
        (end,) = ends
        cuts = _find_cuts(captured)
        if not cuts:
            raise ModelError("early_exit found no place that everything passes through as an image (n, c, h, w)")
        chosen = self._choose(captured, cuts)
        shares = [*sorted(chosen), 1.0]
        placed: list[str] = []
        answer = end
        for share, following in reversed(list(pairwise(shares))):
            cut = chosen[share]
            path = free_path(captured, f"{module_path(cut)}.exit".lstrip("."))
            channels, height, width = map(int, cut.meta["val"].shape[1:])
            classes = int(end.meta["val"].shape[1])
            exit_ = _Exit(following - share, (channels, height, width), classes, self.hidden, self.places)
            captured.add_submodule(path, exit_)
            with captured.graph.inserting_before(output):
                answer = captured.graph.call_module(path, (cut, answer))
            answer.meta["val"] = end.meta["val"]
            placed.append(path)
        output.replace_input_with(end, answer)
        return placed

    def _choose(self, captured: fx.GraphModule, cuts: Mapping[fx.Node, float]) -> dict[float, fx.Node]:
        """Share of the MACs that is done there -> place."""
        order = {node: number for number, node in enumerate(captured.graph.nodes)}
        found = {}
        for share in [] if self.after else self.at:
            cut = min(cuts, key=lambda node: (abs(cuts[node] - share), -order[node]))
            found[cuts[cut]] = cut
        for path in self.after:
            inside = [n for n in order if n.op == "call_function" and f"{module_path(n)}.".startswith(f"{path}.")]
            behind = [cut for cut in cuts if inside and order[cut] >= order[inside[-1]]]
            if not behind:
                known = dict.fromkeys(module_path(cut) for cut in cuts)
                raise ModelError(
                    f"early_exit: no place for an exit after '{path}'; there are some in {', '.join(known)}"
                )
            done = cuts[behind[0]]
            found[done] = [cut for cut in behind if cuts[cut] == done][-1]
        return found

    def penalty(self, choices: Mapping[str, Choice], logits: Tensor, targets: Tensor) -> Tensor:
        total = logits.new_zeros(())
        for choice in choices.values():
            assert choice.taken is not None
            total = total + label_loss(choice.taken, targets, logits.detach(), share=0.5, temperature=TEMPERATURE)
            choice.forget()
        # By themselves each learns at its own pace; beside the model's loss they count as one.
        return self.strength * total / (1 if self.alone else len(choices))

    @torch.no_grad()
    def settle(self, module: nn.Module, choices: Mapping[str, Choice], calibration: Batches, measure: Measure) -> None:
        del measure
        exits = [choice for choice in choices.values() if isinstance(choice, _Exit)]
        for each in exits:
            each.threshold.fill_(NEVER)
        sure, right, best = _look(module, exits, calibration)
        chosen = NEVER
        tried = torch.quantile(sure.flatten(), torch.linspace(0, 1, CANDIDATES, dtype=sure.dtype)).unique()
        for threshold in tried.flip(0).tolist():
            leaves = sure >= threshold
            early = leaves.any(dim=0)
            first = leaves.int().argmax(dim=0)
            correct = torch.where(early, right.gather(0, first[None])[0], best)
            if self.rate:
                chosen = threshold
                if float(early.float().mean()) >= self.rate:
                    break
            elif float(best.float().mean() - correct.float().mean()) <= self.tolerance:
                chosen = threshold
        for each in exits:
            each.threshold.fill_(chosen)


def _look(
    module: nn.Module, exits: list[_Exit], calibration: Batches
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Confidence and correctness of each exit, (exits, n), the first on the way first; correctness of the end."""
    device = exits[0].threshold.device
    seen: dict[_Exit, Tensor] = {}
    handles = [
        each.register_forward_pre_hook(lambda part, given: seen.__setitem__(part, part.answer(part.look(given[0]))))
        for each in exits
    ]
    sure, right, best = [], [], []
    try:
        for inputs, targets in calibration:
            tensors = inputs if isinstance(inputs, tuple | list) else (inputs,)
            logits, targets = module(*(tensor.to(device) for tensor in tensors)), targets.to(device)
            answers = [seen[each] for each in exits]
            sure.append(torch.stack([own.float().softmax(1).amax(1) for own in answers]))
            right.append(torch.stack([own.argmax(1) == targets for own in answers]))
            best.append(logits.argmax(1) == targets)
    finally:
        for handle in handles:
            handle.remove()
    if not best:
        raise DataError("early_exit needs calibration examples with labels to set its thresholds")
    return torch.cat(sure, 1), torch.cat(right, 1), torch.cat(best)


def _find_cuts(captured: fx.GraphModule) -> dict[fx.Node, float]:
    """Places that all that follows depends on alone, and the share of the MACs that is done there."""
    nodes = list(captured.graph.nodes)
    place = {node: number for number, node in enumerate(nodes)}
    varying: set[fx.Node] = set()
    for node in nodes:
        # A size is not what the image shows.
        holds = node.op == "output" or isinstance(node.meta.get("val"), Tensor | tuple | list)
        if holds and (node.op == "placeholder" or any(source in varying for source in node.all_input_nodes)):
            varying.add(node)
    last_read = {node: max((place[user] for user in node.users if user in varying), default=-1) for node in varying}
    total = sum(map(count_macs, nodes))
    cuts: dict[fx.Node, float] = {}
    live: set[fx.Node] = set()
    done = 0
    for number, node in enumerate(nodes):
        done += count_macs(node)
        if node not in varying:
            continue
        live = {other for other in (*live, node) if last_read[other] > number}
        value = node.meta.get("val")
        image = isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point()
        written = any(writes_memory(user) and user.args[0] is node for user in node.users)
        if live == {node} and image and not written and 0 < done < (1 - LEAST_LEFT) * total:
            cuts[node] = done / total
    return cuts
