"""What several processes do in test_training.py: train together, are killed, and go on. Started by a launcher."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from digits import images
from safetensors.torch import save_file
from torch import Tensor, nn

from edgeprune.load import ArrayBatches, Data
from edgeprune.recover import recover_accuracy
from edgeprune.training.processes import find_processes

torch.set_num_threads(1)
PLAIN = {"epochs": 2, "lr": 0.1, "autocast": False, "label_smoothing": 0.1, "mixup": 0.3}
FULL = {**PLAIN, "ema": 0.9, "features": 1.0}


def digits() -> Data:
    """The last training batch is of one example, which cannot be divided."""
    x, y = images(shuffled=True)
    return Data(
        train=ArrayBatches(x[:601], y[:601], batch=50, shuffle=True),
        calibration=ArrayBatches(x[:200], y[:200], batch=50),
        test=ArrayBatches(x[601:1001], y[601:1001]),
    )


def plain() -> nn.Module:
    """Without what looks at a whole batch: one process and several do the same."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(256, 10)),
    ).eval()


def normed(seed: int = 0) -> nn.Module:
    """With dropout and batch norms, whose statistics are of each part, and a layer that nothing reaches."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Flatten())
    net.append(nn.Linear(512, 10))
    net.unused = nn.Parameter(torch.ones(3))
    return net.eval()


class Cut:
    """Batches that break off in every process at once, as a kill would."""

    def __init__(self, batches: Any, count: int) -> None:
        self.batches, self.left = batches, count

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            yield batch


def main(out: Path) -> None:
    """Leaves each process's weights in the folder."""
    processes = find_processes()

    def keep(net: nn.Module, name: str) -> None:
        save_file(net.state_dict(), out / f"{name}-{processes.index}-of-{processes.count}.safetensors")

    net = plain()
    recover_accuracy(net, digits(), processes=processes, **PLAIN)
    keep(net, "plain")
    teacher, checkpoint = normed(1), out / "checkpoint"
    net = normed()
    recover_accuracy(net, digits(), teacher=teacher, processes=processes, **FULL)
    keep(net, "whole")
    data = digits()
    try:
        cut = Data(train=Cut(data.train, 22), test=data.test)  # one of them for the layers to compare
        recover_accuracy(normed(), cut, teacher=teacher, processes=processes, checkpoint=checkpoint, **FULL)
    except KeyboardInterrupt:
        assert processes.total(float(checkpoint.exists())) == processes.count
    net = normed()
    if processes.main:  # what the others have does not count
        torch.manual_seed(5)
    recover_accuracy(net, digits(), teacher=teacher, processes=processes, checkpoint=checkpoint, **FULL)
    keep(net, "resumed")
    processes.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
