"""Train what decides and nothing else: the model is computed once for an example, what its gates see is learnt often.

A step of a small classifier would else cost one of the whole model, and exits that stop learning early let few inputs
leave. What they see is kept in half precision, within a bound.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from edgeprune.core.errors import DataError, RecordError
from edgeprune.core.progress import Progress
from edgeprune.core.records import RecoverSettings
from edgeprune.core.store import replacing
from edgeprune.gating import Gating, find_gates
from edgeprune.gating._choices import Learner
from edgeprune.objective import Batches, check_targets, device_of, inputs_on, length_of, rate_factor, seeded

KEPT_BYTES = 2**30
"""Most that is kept of what gates see, for a moment twice. Of larger data the first batches of each epoch count."""
ROUNDS, BATCH = 10, 128
"""How often each example that is kept is learnt from, and with how many others at a time."""
END, TARGETS = "end", "targets"
"""What is kept beside the gates' features: the model's own outputs, and the labels."""

Seen = dict[str, Tensor]
"""END (n, classes) and each gate's features (n, f, ...) by its path, in half precision; TARGETS (n,)."""


def train_alone(
    module: nn.Module,
    gating: Gating,
    train: Batches,
    settings: RecoverSettings,
    checkpoint: Path | None,
    progress: Progress,
) -> tuple[tuple[float, ...], str]:
    """Train the gates of a model in place; the rest of it stays as it is.

    module: of `gate_model`. train: (inputs, labels), iterable anew each time.
    settings: `epochs` is how often the model looks at the training data, which may be augmented otherwise each time.
    checkpoint: written after each of these, and in the end.
    returns: mean loss of each round of learning; why it was undone, or "".
    raises: DataError without batches; RecordError for a damaged checkpoint.
    """
    gates = {name: gate for name, gate in find_gates(module).items() if isinstance(gate, Learner)}
    learners = nn.ModuleList(gates.values())
    module.eval()
    tensors, facts = _read(checkpoint, settings, gates) if checkpoint is not None else ({}, {})
    if "losses" in facts:
        learners.load_state_dict(tensors)
        return tuple(facts["losses"]), facts["note"]
    for epoch in range(facts.get("epochs", 0), settings.epochs):
        with seeded(settings.seed + 1 + epoch):
            if hasattr(train, "set_epoch"):
                train.set_epoch(epoch)
            doing = f"gates: epoch {epoch + 1} of {settings.epochs}"
            new = _look(module, gates, train, KEPT_BYTES // settings.epochs, doing, progress)
        tensors = {name: torch.cat([tensors[name], value]) if tensors else value for name, value in new.items()}
        _write(checkpoint, settings, tensors, {"epochs": epoch + 1})
    losses, note = _learn(gates, gating, tensors, settings, progress) if tensors else ((), "")
    _write(checkpoint, settings, learners.state_dict(), {"losses": losses, "note": note})
    return losses, note


@torch.no_grad()
def _look(
    module: nn.Module, gates: Mapping[str, Learner], batches: Batches, most: int, doing: str, progress: Progress
) -> Seen:
    """What gates see of the batches, until it takes `most` bytes."""
    device, passing = device_of(module), Seen()

    def pass_by(name: str, gate: Learner, given: tuple[Tensor, Tensor]) -> Tensor:
        seen, more = given
        passing[name] = gate.look(seen)
        return more  # nothing leaves, whatever the threshold

    handles = [
        gate.register_forward_hook(lambda gate, given, _, name=name: pass_by(name, gate, given))
        for name, gate in gates.items()
    ]
    kept: dict[str, list[Tensor]] = {name: [] for name in (*gates, END, TARGETS)}
    held, length = 0, length_of(batches)
    try:
        for number, (inputs, targets) in enumerate(batches):
            end = module(*inputs_on(inputs, device))
            check_targets(end, targets)
            for name, value in {**passing, END: end, TARGETS: targets}.items():
                kept[name].append(_half(value).cpu() if value.is_floating_point() else value.cpu())
                held += kept[name][-1].nbytes
            progress(doing, number + 1, length)
            if held >= most:
                break
    finally:
        for handle in handles:
            handle.remove()
    if not kept[TARGETS]:
        raise DataError("the training data gave no batches; it must be iterable anew each time")
    return {name: torch.cat(values) for name, values in kept.items()}


def _half(value: Tensor) -> Tensor:
    largest = torch.finfo(torch.float16).max
    return value.clamp(-largest, largest).half()


def _learn(
    gates: Mapping[str, Learner], gating: Gating, seen: Seen, settings: RecoverSettings, progress: Progress
) -> tuple[tuple[float, ...], str]:
    """Rounds over what was seen, in an order of their own. returns: mean loss of each, and why they were undone."""
    learners = nn.ModuleList(gates.values()).train()
    start = {name: value.clone() for name, value in learners.state_dict().items()}
    optimizer = torch.optim.SGD(
        learners.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
    )  # fmt: skip
    device, examples = device_of(learners), len(seen[TARGETS])
    steps = math.ceil(examples / BATCH)
    order = torch.Generator().manual_seed(settings.seed)
    losses: list[float] = []
    note = ""
    for round_ in range(ROUNDS):
        total = 0.0
        for step, chosen in enumerate(torch.randperm(examples, generator=order).split(BATCH)):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * rate_factor(round_ * steps + step, ROUNDS * steps)
            for name, gate in gates.items():
                gate.taken = gate.answer(seen[name][chosen].to(device).float())
            loss = gating.penalty(gates, seen[END][chosen].to(device).float(), seen[TARGETS][chosen].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) / steps
        progress("gates: learn", round_ + 1, ROUNDS)
        if not math.isfinite(total):
            learners.load_state_dict(start)
            note = f"the gates' training diverged (loss {total}); try a lower learning rate"
            break
        losses.append(total)
    optimizer.zero_grad(set_to_none=True)
    learners.eval()
    return tuple(losses), note


# --- checkpoint: what was seen so far, then what was learnt ---


def _write(checkpoint: Path | None, settings: RecoverSettings, tensors: Mapping[str, Tensor], facts: object) -> None:
    if checkpoint is None:
        return
    held = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with replacing(checkpoint) as temporary:
        save_file(held, temporary, metadata={"recover": json.dumps({"settings": asdict(settings), "gates": facts})})


def _read(checkpoint: Path, settings: RecoverSettings, gates: Mapping[str, Learner]) -> tuple[Seen, dict[str, Any]]:
    """What is there of this training, else nothing. raises: RecordError."""
    if not checkpoint.is_file():
        return {}, {}
    try:
        with safetensors.safe_open(checkpoint, framework="pt") as file:
            known = json.loads((file.metadata() or {})["recover"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if known["settings"] != json.loads(json.dumps(asdict(settings))):
            return {}, {}
        facts = dict(known["gates"])
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise RecordError(f"{checkpoint} is damaged ({error}); delete it to train from the start") from error
    shapes = {key: value.shape for key, value in nn.ModuleList(gates.values()).state_dict().items()}
    fits = (
        {key: value.shape for key, value in tensors.items()} == shapes
        if "losses" in facts
        else (tensors.keys() == {*gates, END, TARGETS})
    )
    return (tensors, facts) if fits else ({}, {})
