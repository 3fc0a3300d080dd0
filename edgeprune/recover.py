"""Train a compact model until it is good again: by labels, by what the dense model says of them, or by that alone."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from edgeprune.compensation.batch_norm import reestimate_batch_norm
from edgeprune.core.errors import DataError, UsageError
from edgeprune.core.progress import Progress, silent
from edgeprune.core.records import Graph, Precision, RecoverResult, RecoverSettings
from edgeprune.gating import GateTraining, Gating, find_gates, load_gating
from edgeprune.gating._alone import train_alone
from edgeprune.graphs.fake_quantize import simulate_int8
from edgeprune.objective import Batches, Objective, device_of, inputs_on, length_of, rate_factor, seeded
from edgeprune.objective import evaluate_accuracy as evaluate_accuracy
from edgeprune.patterns import load_sparsifier
from edgeprune.regularizers import Regularizer, load_regularizer
from edgeprune.training.attention import shared_layers
from edgeprune.training.average import Average
from edgeprune.training.batch import Batch, lay_out, mix_batch
from edgeprune.training.checkpoint import read_checkpoint, readable, write_checkpoint
from edgeprune.training.hook import Hook
from edgeprune.training.options import PRUNED, SCRATCH, check_options
from edgeprune.training.processes import ALONE, Processes
from edgeprune.training.scratch import draw_weights
from edgeprune.training.speed import fastest_way

JUDGING_STEPS = 8
"""Steps whose mean loss stands for the start, and for the end of an epoch."""
DIVERGED = 1.5
"""An end loss this many times that of the start means that the training did harm."""
SETTLING_BATCHES = 64
"""Training batches from which the statistics of batch norms are taken when training has ended."""
MATCHING_GRADIENT = 1.0
"""Largest norm of the gradient when outputs are matched, whose loss is 1 where nothing is alike."""
RANGE_BATCHES = 4
"""Training batches from which the ranges of int8 start."""


class Data(Protocol):
    """What recovery reads of a data source; `load.Data` is one."""

    @property
    def train(self) -> Batches | None: ...
    @property
    def test(self) -> Batches | None: ...


def recover_accuracy(
    module: nn.Module,
    data: Data,
    *,
    teacher: nn.Module | None = None,
    epochs: int = 5,
    lr: float = 0.02,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    distil_weight: float = 0.5,
    temperature: float = 2.0,
    autocast: bool | None = None,
    checkpoint: Path | None = None,
    progress: Progress = silent,
    seed: int = 0,
    precision: Precision | None = None,
    regularizer: str | None = None,
    graph: Graph | None = None,
    pattern: str | None = None,
    match_outputs: bool = False,
    gating: str | None = None,
    start: str = PRUNED,
    ema: float = 0.0,
    label_smoothing: float = 0.0,
    mixup: float = 0.0,
    features: float = 0.0,
    processes: Processes = ALONE,
) -> RecoverResult:
    """Train `module` in place with SGD (Nesterov), a short warm-up and a cosine down to zero.

    data:          train batches (augmentation is theirs), test batches.
    teacher:       the dense model; adds distillation (Hinton et al., 2015, arXiv:1503.02531).
    epochs:        >= 0. lr: peak. distil_weight: [0, 1], share of the distillation loss.
    temperature:   > 0, of the softened outputs.
    autocast:      bfloat16 where True; None times a few steps in both precisions, each with images laid out both ways
                   in memory, and takes the fastest.
    checkpoint:    file written after each epoch; training goes on from it, with the same outcome as
                   if it had never stopped (batches drawn with the global generators, or with a
                   `set_epoch` method, are drawn again alike).
    precision:     int8 trains through simulated rounding (`graphs/fake_quantize.py`) in float32, for `module` to lose
                   less when it is quantised; both accuracies are then of the simulated model. None: float32.
    regularizer:   member of `regularizers` and its options (`increg:ratio=0.6`): drives whole units of `graph`'s
                   prunable groups, traced from `module`, to zero, for a plan to remove. Its last epoch counts,
                   though the loss may have risen.
    pattern:       member of `patterns` and its options (`n_m:n=2,m=4`): weights of `module` are zero in it, in float32
                   and in int8. Its last epoch counts as well.
    match_outputs: learn the teacher's outputs alone, whatever they are, such as features; the batches' targets are not
                   read. Dropout is off and batch norms keep the statistics they have.
    gating:        member of `gating` and its options (`block_skip:rate=0.6`): trains the gates that `gate_model` put
                   into `module` with the same text. Its last epoch counts as well.
    start:         "pruned", or "scratch" for new weights (`training/scratch.py`); accuracy_before is of those given.
    ema:           [0, 1), decay of an average of the weights (`training/average.py`), which is judged and returned.
    label_smoothing: [0, 1), of the labels. mixup: >= 0, alpha of mixed examples (`training/batch.py`), which the
                   teacher sees as well.
    features:      >= 0, weight of attention transfer from the teacher (`training/attention.py`).
    processes:     that train together (`training/processes.py`), all with the same arguments; the checkpoint has to be
                   where all can read it.
    returns:       RecoverResult; the module is in eval mode, its batch-norm statistics taken anew. A loss that is
                   not finite, or one that ends far above where it began, keeps the best epoch and says so.
    raises:        DataError without training data or labels; RecordError for a damaged checkpoint, or a graph of
                   another model; ModelError for new weights of a parameter that no layer draws; UsageError for a
                   regularizer without a graph, gates that the model lacks, and what `training/options.py` refuses.
    """
    if data.train is None:
        raise DataError("recovery needs training data; give the data source a .train, or set epochs = 0")
    settings = RecoverSettings(
        epochs=epochs, lr=lr, momentum=momentum, weight_decay=weight_decay,
        distil_weight=0.0 if teacher is None else distil_weight, temperature=temperature, seed=seed,
        precision=precision, regularizer=regularizer, pattern=pattern, match_outputs=match_outputs, gating=gating,
        start=start, ema=ema, label_smoothing=label_smoothing, mixup=mixup, features=features,
    )  # fmt: skip
    in_8_bits = precision is not None and precision.dtype == "int8"
    check_options(
        start=start, ema=ema, label_smoothing=label_smoothing, mixup=mixup, features=features,
        taught=teacher is not None, match_outputs=match_outputs, regularizer=regularizer, pattern=pattern,
        gating=gating, in_8_bits=in_8_bits, processes=processes.count,
    )  # fmt: skip
    if regularizer is not None and graph is None:
        raise UsageError("a regularizer needs the model's graph (`trace_graph`)")
    if gating is not None and not find_gates(module):
        raise UsageError("the model has no gates to train; put them in with `gate_model`")
    chosen = None if gating is None else load_gating(gating)
    if chosen is not None and chosen.alone:
        return _recover_alone(module, data, chosen, settings, checkpoint, progress)
    trained = module
    if precision is not None and in_8_bits:
        # bfloat16 rounds as coarsely as what is simulated.
        trained, autocast = _simulate(module, data.train, precision, seed), False
    trainer = _Trainer(trained, data, teacher, settings, autocast, checkpoint, processes)
    if regularizer is not None and graph is not None:
        trainer.hook = load_regularizer(regularizer, trained, graph, trainer.planned_steps("a regularizer"))
    if pattern is not None:
        trainer.hook = load_sparsifier(pattern, module, trainer.planned_steps("a pattern"))
    if chosen is not None:
        trainer.hook = GateTraining(chosen, find_gates(module), trainer.planned_steps("the training of gates"))
    resumed = trainer.resume()
    if processes.of_main(trainer.epoch) != trainer.epoch:
        raise UsageError(f"{checkpoint} is not the same for all processes; it must lie where all can read it")
    if not resumed:
        trainer.begin()
    for epoch in range(trainer.epoch, epochs):
        if trainer.note:
            break
        trainer.train_epoch(epoch, progress if processes.main else silent)
        trainer.save()
    result = trainer.finish()
    module.eval()
    return result


def _recover_alone(
    module: nn.Module,
    data: Data,
    gating: Gating,
    settings: RecoverSettings,
    checkpoint: Path | None,
    progress: Progress,
) -> RecoverResult:
    """Training of gates that leaves the model as it is."""
    assert data.train is not None
    objective = Objective(None, match=False, share=0.0, temperature=settings.temperature)
    before = objective.measure(module, data.test)
    losses, note = train_alone(module, gating, data.train, settings, checkpoint, progress)
    return RecoverResult(
        accuracy_before=before, accuracy_after=objective.measure(module, data.test), losses=losses,
        epochs=settings.epochs, autocast=False, note=note,
    )  # fmt: skip


def _simulate(module: nn.Module, train: Batches, precision: Precision, seed: int) -> nn.Module:
    device = device_of(module)
    with seeded(seed):
        batches = [inputs_on(inputs, device) for inputs, _ in itertools.islice(train, RANGE_BATCHES)]
    if not batches:
        raise DataError("the training data gave no batches to take the ranges of int8 from")
    return simulate_int8(module, tuple(tensor[:2] for tensor in batches[0]), precision, batches)


class _Trainer:
    """One recovery: the module, its optimiser, and what is needed to go on after a kill."""

    def __init__(
        self,
        module: nn.Module,
        data: Data,
        teacher: nn.Module | None,
        settings: RecoverSettings,
        autocast: bool | None,
        checkpoint: Path | None,
        processes: Processes,
    ) -> None:
        assert data.train is not None
        self.processes = processes
        self.module, self.data, self.settings, self.checkpoint = module, data, settings, checkpoint
        self.train = data.train
        self.device = device_of(module)
        layers = self._layers_to_compare(teacher) if teacher is not None and settings.features else ()
        self.objective = Objective(
            teacher, settings.match_outputs, settings.distil_weight, settings.temperature,
            smoothing=settings.label_smoothing, features=settings.features, layers=layers,
        )  # fmt: skip
        self.parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self.optimizer = torch.optim.SGD(
            self.parameters.values(), lr=settings.lr, momentum=settings.momentum,
            weight_decay=settings.weight_decay, nesterov=settings.momentum > 0,
        )  # fmt: skip
        self.given_autocast = autocast
        self.autocast, self.channels_last = bool(autocast), False
        self.epoch, self.steps, self.note = 0, 0, ""
        self.losses: list[float] = []
        self.before: float | None = None
        self.judged: list[float] = []
        self.best: dict[str, Tensor] = {}
        self.start: dict[str, Tensor] = {}
        self.average: Average | None = None
        self.hook: Hook = Regularizer(())

    def planned_steps(self, asking: str) -> int:
        """How long the training is, which a hook has to know. raises: DataError."""
        if not (length := length_of(self.train)):
            raise DataError(f"{asking} needs training batches with a length")
        return length * self.settings.epochs

    def begin(self) -> None:
        self.before = self.objective.measure(self.module, self.data.test)
        self.best = self._state()
        self.start = self.best if self.settings.match_outputs else {}
        if self.settings.start == SCRATCH:
            draw_weights(self.module, self.settings.seed)
        self.processes.spread(self.module)
        if self.settings.ema:
            self.average = Average(self.module, self.settings.ema)
        batch = self._first_batch() if self.settings.epochs and self.given_autocast is None else None
        part = None if batch is None else self.processes.part(batch)[0]
        if part is not None:
            targets = part.targets
            self.module.train(not self.settings.match_outputs)
            with seeded(self.settings.seed):
                self.autocast, self.channels_last = fastest_way(
                    self.module, part.inputs,
                    lambda trial, inputs, autocast: self.objective.loss(trial, Batch(inputs, targets), autocast)[0],
                )  # fmt: skip
        self.autocast = bool(self.processes.of_main(self.autocast))
        self.channels_last = bool(self.processes.of_main(self.channels_last))

    def _first_batch(self) -> Batch | None:
        with seeded(self.settings.seed):
            first = next(iter(self.train), None)
        return None if first is None else Batch(inputs_on(first[0], self.device), first[1].to(self.device))

    def _layers_to_compare(self, teacher: nn.Module) -> tuple[str, ...]:
        batch = self._first_batch()
        return () if batch is None else shared_layers(self.module, teacher, tuple(x[:2] for x in batch.inputs))

    def train_epoch(self, epoch: int, progress: Progress) -> None:
        settings = self.settings
        losses: list[float] = []
        recent: deque[Batch] = deque(maxlen=JUDGING_STEPS if self.average is not None else 0)
        self.module.train(not settings.match_outputs)
        with seeded(settings.seed + 1 + epoch):
            if hasattr(self.train, "set_epoch"):
                self.train.set_epoch(epoch)
            for step, (inputs, targets) in enumerate(self.train):
                self._set_rate(epoch, step)
                batch = self._load(inputs, targets)
                loss = self._step(batch, epoch * self.steps + step)
                if not math.isfinite(loss):
                    self.note = f"training diverged (loss {loss} in epoch {epoch + 1}); try a lower learning rate"
                    break
                losses.append(loss)
                done = epoch * self.steps + step + 1
                recent.append(batch)
                if self.average is not None:
                    self.average.follow(self.module, done - 1)
                progress(f"recover: epoch {epoch + 1} of {settings.epochs}", done, settings.epochs * self.steps)
            self._join_buffers()
            ending = losses[-JUDGING_STEPS:] if self.average is None or self.note else self._losses_of_average(recent)
        if not losses and not self.note:
            raise DataError(
                f"the training data gave no batches in epoch {epoch + 1}; it must be iterable anew each time"
            )
        self.steps = self.steps or len(losses)
        self.epoch = epoch + 1
        if losses:
            self.losses.append(sum(losses) / len(losses))
        if not self.note:
            self._judge(losses[:JUDGING_STEPS], ending)
            if self.epoch == settings.epochs:
                self._end()

    def _load(self, inputs: Any, targets: Tensor) -> Batch:
        tensors = lay_out(inputs_on(inputs, self.device), self.channels_last)
        return mix_batch(Batch(tensors, targets.to(self.device)), self.settings.mixup)

    def _loss(self, batch: Batch, number: int) -> tuple[Tensor | None, float, float]:
        """Of this process's part of a batch, if it has one; its share of the batch; the value for the whole."""
        part, share = self.processes.part(batch)
        loss = None
        if part is not None:
            with self.processes.apart(self.settings.seed + number):
                loss, outputs = self.objective.loss(self.module, part, self.autocast)
            if (penalty := self.hook.penalty(outputs, part.targets)) is not None:
                loss = loss + penalty
        return loss, share, self.processes.total(0.0 if loss is None else share * float(loss.detach()))

    def _step(self, batch: Batch, number: int) -> float:
        self.hook.before_forward()
        loss, share, value = self._loss(batch, number)
        if math.isfinite(value):
            self.optimizer.zero_grad(set_to_none=True)
            if loss is not None:
                loss.backward()
            self.processes.average_gradients(self.parameters.values(), share)
            if self.settings.match_outputs:  # no batch statistics hold the size of a step back
                nn.utils.clip_grad_norm_(self.parameters.values(), MATCHING_GRADIENT)
            self.hook.after_backward()
            self.optimizer.step()
            self.hook.after_step(self.optimizer.param_groups[0]["lr"])
        return value

    def _join_buffers(self) -> None:
        """Statistics of batch norms are of each process's parts until here."""
        names = [name for name, _ in self.module.named_buffers()]
        for values in (self.module.state_dict(), {} if self.average is None else self.average.values):
            self.processes.average(values[name] for name in names if name in values)

    def _set_rate(self, epoch: int, step: int) -> None:
        # An iterable without a length shows it in the first epoch; until then the rate only warms up.
        self.steps = self.steps or length_of(self.train)
        total = self.steps * self.settings.epochs
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * rate_factor(epoch * self.steps + step, total)

    @torch.no_grad()
    def _losses_of_average(self, batches: Iterable[Batch]) -> list[float]:
        """Of the averaged weights, as a step would find them: in the module's mode, with statistics of the batch."""
        assert self.average is not None
        with self.average.in_place(self.module):
            return [self._loss(batch, number)[2] for number, batch in enumerate(batches)]

    def _judge(self, beginning: list[float], ending: list[float]) -> None:
        """Remember this state if no epoch before ended with a lower training loss.

        Not judged on the calibration batches: a compensated model was fitted to them, so that any training
        would look like a loss. The first steps, at a rate near zero, stand for the start.
        """
        if not self.judged:
            self.judged.append(float(np.mean(beginning)))
        self.judged.append(float(np.mean(ending)))
        if (self.judged[-1] <= min(self.judged[1:]) or self._hooked) and not self._diverged():
            self.best = self._state()

    @property
    def _hooked(self) -> bool:
        settings = self.settings
        return any(each is not None for each in (settings.regularizer, settings.pattern, settings.gating))

    def _diverged(self) -> bool:
        # What a regularizer, a pattern or gates take away may cost more than the training gives.
        return not self._hooked and len(self.judged) > 1 and not self.judged[-1] <= DIVERGED * self.judged[0]

    def _state(self) -> dict[str, Tensor]:
        """What would be returned now."""
        state = self.module.state_dict() if self.average is None else self.average.values
        return {key: value.detach().clone() for key, value in state.items()}

    def finish(self) -> RecoverResult:
        if self._diverged() and not self.note:
            self.note = "the training loss ended far above where it began; kept the best epoch"
        if self.note:
            self.module.load_state_dict(self.best)
        self.hook.finish()
        self.module.eval()
        self.module.zero_grad(set_to_none=True)
        kind = "difference" if self.settings.match_outputs else "accuracy"
        after = self.objective.measure(self.module, self.data.test)
        worse = self.before is not None and after is not None and not after <= self.before
        if self.start and worse and not self._hooked:
            # The loss does not show it: a model that was refitted to the same examples is near on those alone.
            self.note = self.note or "training brought the outputs no nearer on the test batches, and is undone"
            self.module.load_state_dict(self.start)
            after = self.before
        self.processes.spread(self.module)
        measured = {f"{kind}_before": self.before, f"{kind}_after": after}
        return RecoverResult(losses=tuple(self.losses), epochs=self.epoch, autocast=self.autocast,
                             channels_last=self.channels_last, note=self.note, zeroed=self.hook.zeroed(),
                             **measured)  # fmt: skip

    def _end(self) -> None:
        """Take the statistics of batch norms anew: those that followed the training lag behind the weights.

        After few steps that alone can cost several points of accuracy.
        """
        if self.average is not None:
            self.module.load_state_dict(self.average.values)
        if self.settings.precision is not None or self.settings.match_outputs:
            return
        with seeded(self.settings.seed):
            few = itertools.islice(self.train, SETTLING_BATCHES)
            reestimate_batch_norm(self.module, ((inputs_on(inputs, self.device), targets) for inputs, targets in few))

    def save(self) -> None:
        if self.checkpoint is None or not self.processes.main:
            return
        buffers = {name: self.optimizer.state[value].get("momentum_buffer") for name, value in self.parameters.items()}
        parts = {
            "model": self.module.state_dict(), "best": self.best, "start": self.start, "regularizer": self.hook.held,
            "momentum": {name: buffer for name, buffer in buffers.items() if buffer is not None},
            "average": {} if self.average is None else self.average.values,
        }  # fmt: skip
        facts = {"epoch": self.epoch, "steps": self.steps, "note": self.note, "losses": self.losses,
                 "judged": [str(value) for value in self.judged], "before": self.before,
                 "autocast": self.autocast, "channels_last": self.channels_last}  # fmt: skip
        write_checkpoint(self.checkpoint, self.settings, parts, facts)

    def resume(self) -> bool:
        """Go on from the checkpoint if it is one of this recovery. raises: RecordError when damaged."""
        if self.checkpoint is None:
            return False
        with readable(self.checkpoint):
            if (found := read_checkpoint(self.checkpoint, self.settings, self.device)) is None:
                return False
            parts, facts = found
            own = {key: value.shape for key, value in self.module.state_dict().items()}
            if {key: value.shape for key, value in parts["model"].items()} != own:
                return False  # of other widths
            self.module.load_state_dict(parts["model"])
            for name, value in parts.get("momentum", {}).items():
                self.optimizer.state[self.parameters[name]]["momentum_buffer"] = value
            self.hook.load(parts.get("regularizer", {}))
            if self.settings.ema:
                self.average = Average(self.module, self.settings.ema)
                self.average.load(parts["average"])
            self.best, self.start = parts["best"], parts.get("start", {})
            self.epoch, self.steps, self.note = int(facts["epoch"]), int(facts["steps"]), str(facts["note"])
            self.losses, self.judged = list(facts["losses"]), [float(value) for value in facts["judged"]]
            self.before = facts["before"]
            self.autocast, self.channels_last = bool(facts["autocast"]), bool(facts["channels_last"])
        return True
