"""What training minimises, in which steps, and how a model is judged: by labels, or by the outputs of a dense one."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from edgeprune.core.errors import DataError
from edgeprune.training.attention import attention_loss, watch
from edgeprune.training.batch import Batch

Batches = Iterable[tuple[Any, Tensor]]

WARM_UP_SHARE = 0.05
"""Share of all steps over which the learning rate rises to its peak."""


@dataclass(frozen=True)
class Objective:
    """What one training minimises, and is judged by.

    teacher: the dense model, or None. match: learn its outputs alone, whatever they are; else labels, and for a share
    of the loss what it says of them, softened by a temperature. smoothing: [0, 1), of labels. features: >= 0, weight of
    attention transfer (`training/attention.py`) at these layers.
    """

    teacher: nn.Module | None
    match: bool
    share: float
    temperature: float
    smoothing: float = 0.0
    features: float = 0.0
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.teacher is not None:
            self.teacher.eval()

    def loss(self, module: nn.Module, batch: Batch, autocast: bool) -> tuple[Tensor, Any]:
        """Of a model on a batch, and its outputs; with `autocast` it and the teacher compute in bfloat16.

        raises: DataError where outputs do not fit.
        """
        kind, wanted, taught = batch.targets.device.type, None, dict[str, Tensor]()
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=autocast), watch(module, self.layers) as seen:
            outputs = module(*batch.inputs)
        if self.teacher is not None and (self.match or self.share > 0 or self.layers):
            with (
                torch.no_grad(),
                torch.autocast(kind, dtype=torch.bfloat16, enabled=autocast),
                watch(self.teacher, self.layers) as taught,
            ):
                wanted = self.teacher(*batch.inputs)
        loss = difference_loss(outputs, wanted) if self.match else self._label_loss(outputs, batch, wanted)
        return loss + self.features * attention_loss(seen, taught) if self.layers else loss, outputs

    def _label_loss(self, outputs: Any, batch: Batch, wanted: Tensor | None) -> Tensor:
        return label_loss(
            outputs, batch.targets, wanted, share=self.share, temperature=self.temperature, smoothing=self.smoothing,
            others=batch.others, mixed=1 - batch.share,
        )  # fmt: skip

    def measure(self, module: nn.Module, batches: Batches | None) -> float | None:
        """Accuracy, or how far the outputs are from those that are matched; None without batches."""
        if batches is None:
            return None
        if self.match and self.teacher is not None:
            return evaluate_difference(module, self.teacher, batches)
        return evaluate_accuracy(module, batches)


@torch.no_grad()
def evaluate_accuracy(module: nn.Module, batches: Batches) -> float:
    """Top-1 accuracy in [0, 1], in eval mode; the module's mode is restored.

    raises: DataError when the batches are empty or do not fit a classifier.
    """
    training, right, count = module.training, 0, 0
    module.eval()
    device = device_of(module)
    try:
        for inputs, targets in batches:
            logits = module(*inputs_on(inputs, device))
            check_targets(logits, targets)
            right += int((logits.argmax(dim=1).cpu() == targets.cpu()).sum())
            count += len(targets)
    finally:
        module.train(training)
    if not count:
        raise DataError("there are no test examples to measure accuracy on")
    return right / count


@torch.no_grad()
def evaluate_difference(module: nn.Module, teacher: nn.Module, batches: Batches) -> float:
    """Power of the difference of two models' outputs over the teacher's, in eval mode; 0: they are the same.

    returns: mean over the outputs, each over all batches. raises: DataError without batches, or when the outputs differ
        in number or shape.
    """
    training = module.training
    module.eval()
    device, sums = device_of(module), torch.zeros(2, 0, dtype=torch.float64)
    try:
        for inputs, _ in batches:
            tensors = inputs_on(inputs, device)
            pairs = _pairs(module(*tensors), teacher(*tensors))
            powers = [[(a - b).double().square().sum().cpu(), b.double().square().sum().cpu()] for a, b in pairs]
            found = torch.tensor(powers, dtype=torch.float64).T
            sums = found + sums if sums.shape == found.shape else found
    finally:
        module.train(training)
    if not sums.numel():
        raise DataError("there are no examples to compare outputs on")
    return float((sums[0] / sums[1].clamp(min=torch.finfo(torch.float32).tiny)).mean())


def label_loss(
    logits: Any,
    targets: Tensor,
    wanted: Tensor | None = None,
    *,
    share: float = 0.0,
    temperature: float = 2.0,
    smoothing: float = 0.0,
    others: Tensor | None = None,
    mixed: float = 0.0,
) -> Tensor:
    """Cross-entropy and, for a share of it, distillation from a dense model's logits.

    wanted: those logits. share: [0, 1], of the distillation. temperature: > 0, of the softened outputs.
    smoothing: [0, 1), of the labels, spread over all classes. others: labels of what the inputs are mixed with, which
        counts `mixed`, in [0, 1].
    raises: DataError where the outputs are none of a classifier, or the targets no labels.
    source: Hinton et al., 2015, arXiv:1503.02531, section 2; smoothing: Szegedy et al., CVPR 2016, arXiv:1512.00567,
        section 7.
    """
    check_targets(logits, targets)
    logits = logits.float()
    loss: Tensor = logits.new_zeros(())
    if share < 1:
        entropy = functional.cross_entropy(logits, targets, label_smoothing=smoothing)
        if others is not None:
            entropy = torch.lerp(entropy, functional.cross_entropy(logits, others, label_smoothing=smoothing), mixed)
        loss = loss + (1 - share) * entropy
    if share > 0 and wanted is not None:
        divergence = functional.kl_div(
            functional.log_softmax(logits / temperature, dim=1),
            functional.log_softmax(wanted.float() / temperature, dim=1), reduction="batchmean", log_target=True,
        )  # fmt: skip
        loss = loss + share * divergence * temperature**2
    return loss


def difference_loss(outputs: Any, wanted: Any) -> Tensor:
    """Squared error of every output over the power of what is wanted, averaged over the outputs.

    So large and small outputs count alike, such as the levels of a feature pyramid; what is zero throughout counts as
    it is. raises: DataError when the outputs differ in number or shape.
    source: FitNets' hint loss (Romero et al., ICLR 2015, arXiv:1412.6550, section 2.2), without the regressor, since
        outputs keep their widths; the normalisation is ours.
    """
    losses = []
    for ours, theirs in _pairs(outputs, wanted):
        power = theirs.float().square().mean()
        losses.append((ours.float() - theirs.float()).square().mean() / torch.where(power > 0, power, 1))
    return torch.stack(losses).mean()


def _pairs(outputs: Any, wanted: Any) -> list[tuple[Tensor, Tensor]]:
    ours, theirs = (
        [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        for given in (outputs, wanted)
    )
    shapes = [[list(leaf.shape) for leaf in leaves] for leaves in (ours, theirs)]
    if not theirs or shapes[0] != shapes[1]:
        raise DataError(f"outputs of shapes {shapes[0]} cannot be matched with the dense model's, {shapes[1]}")
    return list(zip(ours, theirs, strict=True))


def inputs_on(inputs: Any, device: torch.device) -> tuple[Tensor, ...]:
    """The tensors of a batch's inputs, of which there may be one or several, on a device."""
    return tuple(tensor.to(device) for tensor in (inputs if isinstance(inputs, tuple | list) else (inputs,)))


def device_of(module: nn.Module) -> torch.device:
    """Where the parameters are."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def length_of(batches: Batches) -> int:
    """How many there are; 0 where they do not say."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return 0


def check_targets(logits: Any, targets: Tensor) -> None:
    """raises: DataError unless the outputs are (n, classes) and the targets n labels below that."""
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(f"accuracy needs a classifier with outputs (n, classes); this model gives {shape}")
    if targets.is_floating_point() or targets.shape != logits.shape[:1]:
        raise DataError(f"targets are {targets.dtype} of shape {list(targets.shape)}, expected {len(logits)} labels")
    if int(targets.max()) >= logits.shape[1] or int(targets.min()) < 0:
        raise DataError(f"the data has the label {int(targets.max())}, the model only {logits.shape[1]} classes")


def rate_factor(done: int, total: int) -> float:
    """Share of the peak learning rate at a step: a short warm-up, then a cosine down to zero.

    done: steps before it. total: of the whole training; 0 where that is not known yet, which only warms up.
    """
    warm_up = max(1.0, WARM_UP_SHARE * total) if total else 20.0
    rising, position = min(1.0, (done + 1) / warm_up), min(1.0, done / total) if total else 0.0
    return rising * 0.5 * (1 + math.cos(math.pi * position))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators for a while, so that an epoch draws the same after a resume."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # Of several GPUs the current one alone: asking another for its state would take memory there.
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
