"""Several processes that train one model together, each on a part of every batch; `accelerate` starts and joins them.

Every process reads all batches, drawn alike, and computes on its part; gradients are averaged by the examples they came
from, so that a step is that of the whole batch. Batch norms take the statistics of the part, as data-parallel training
does. Ours, on top of accelerate's process group, since its wrappers would divide the batches themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeprune.core.errors import ConnectionLost, first_line
from edgeprune.core.family import MissingLibrary
from edgeprune.training.batch import Batch


@dataclass(frozen=True)
class Processes:
    """This process among those that train together; by default it is alone, and nothing is exchanged.

    index: 0 is the main one, which alone writes. device: where it is to compute, None: where the model is.
    launcher: the process that started it, None: it does not end with any.
    """

    count: int = 1
    index: int = 0
    device: torch.device | None = None
    launcher: int | None = None

    @property
    def main(self) -> bool:
        """Whether it is the one that writes."""
        return self.index == 0

    def part(self, batch: Batch) -> tuple[Batch | None, float]:
        """What this process takes of a batch, and its share of the examples; a batch of few is the main one's."""
        if self.count == 1:
            return batch, 1.0
        examples = len(batch.targets)
        if examples < 2 * self.count:  # one example alone has no batch statistics
            return (batch, 1.0) if self.main else (None, 0.0)

        def mine(tensor: Tensor) -> Tensor:
            return tensor.tensor_split(self.count)[self.index]

        others = None if batch.others is None else mine(batch.others)
        part = Batch(tuple(mine(tensor) for tensor in batch.inputs), mine(batch.targets), others, batch.share)
        return part, len(part.targets) / examples

    @contextmanager
    def apart(self, seed: int) -> Iterator[None]:
        """Draws of each process's own, as of dropout: those for the data, which are the same for all, stay in step."""
        if self.count == 1:
            yield
            return
        with torch.random.fork_rng(devices=[self.device] if self.device and self.device.type == "cuda" else []):
            torch.manual_seed(seed * self.count + self.index)
            yield

    def total(self, value: float) -> float:
        """The sum of a number over all processes."""
        return value if self.count == 1 else float(self._sum(torch.tensor([float(value)], device=self.device)))

    def of_main(self, value: float) -> float:
        """What the main process has."""
        return self.total(value if self.main else 0.0)

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[nn.Parameter], share: float) -> None:
        """Those of the whole batch, from those of each part; a parameter that no part has reached has none."""
        if self.count == 1:
            return
        parameters = list(parameters)
        reached = torch.tensor([float(each.grad is not None) for each in parameters], device=self.device)
        flat = [
            torch.zeros_like(each).flatten() if each.grad is None else share * each.grad.flatten()
            for each in parameters
        ]
        summed = self._sum(torch.cat([reached, *flat]))
        gradients = summed[len(parameters) :].split([each.numel() for each in parameters])
        for each, gradient, count in zip(parameters, gradients, summed[: len(parameters)].tolist(), strict=True):
            each.grad = gradient.view_as(each).to(each.dtype) if count else None

    @torch.no_grad()
    def average(self, tensors: Iterable[Tensor]) -> None:
        """The mean over all processes, in place; whole numbers stay."""
        for tensor in tensors if self.count > 1 else ():
            if tensor.is_floating_point():
                tensor.copy_(self._sum(tensor) / self.count)

    @torch.no_grad()
    def spread(self, module: nn.Module) -> None:
        """Give all processes the floats of the main one's model."""
        for tensor in module.state_dict().values() if self.count > 1 else ():
            if tensor.is_floating_point():
                tensor.copy_(self._sum(tensor if self.main else torch.zeros_like(tensor)))

    def _sum(self, tensor: Tensor) -> Tensor:
        """raises: ConnectionLost when others have ended, or what launched them: a killed launcher kills nobody."""
        from accelerate.utils import reduce

        if self.launcher is not None and os.getppid() != self.launcher:
            raise ConnectionLost("what launched this process has ended; start the training again, and it goes on")
        try:
            return reduce(tensor.contiguous(), "sum")  # type: ignore[no-any-return]
        except RuntimeError as error:
            raise ConnectionLost(f"another process of the training has ended or failed: {first_line(error)}") from error

    def end(self) -> None:
        """Leave the others, which go on by themselves."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()


ALONE = Processes()


def find_processes() -> Processes:
    """Those that `accelerate launch` (or `torchrun`) has started, this one among them; else this one alone.

    raises: MissingLibrary where several were started and accelerate is not installed.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not several and "ACCELERATE_MIXED_PRECISION" not in os.environ:  # which its launcher always sets
        return ALONE
    try:
        from accelerate import PartialState
    except ModuleNotFoundError as error:
        raise MissingLibrary("several processes need accelerate: pip install 'edgeprune[accelerate]'") from error
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    state = PartialState(cpu=asked or not torch.accelerator.is_available())
    return Processes(state.num_processes, state.process_index, state.device, os.getppid())
