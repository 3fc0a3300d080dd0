"""What of the saved multiplications grouped convolutions save in time: kernels alone, in four layers of one width.

    python tools/bench_pivot.py [--board embedded|icount|icount-a76] [--width N ...] [--kernel 1|3] [--out DIR]

A net of four convolutions and ReLUs is timed in turns with the same in 2, 4 and 8 groups. *Reached* is the share of the
latency that goes over the share of the multiplications that go: 1 where time falls as they do. Whole nets, with their
accuracy: the rows `pivot:groups=` of `tools/bench_sparse.py`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from bench_accuracy import aim
from bench_profile import open_board
from bench_sparse import DENSE, RUNTIMES, TITLES, Row, file_stem, measure_rows, write_files
from torch import nn

from edgeprune.core.describe import table
from edgeprune.core.effort import EFFORTS, NOISELESS

SIDES = {16: 32, 32: 32, 64: 16, 128: 16, 256: 8}
"""Side of the image at each width."""
GROUPS = (2, 4, 8)
AIM = 0.7
"""Least share of the reduction in multiplications that 4 groups are to reach on some runtime."""


def layers(width: int, kernel: int, groups: int) -> nn.Sequential:
    """Four convolutions with ReLUs."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=groups) for _ in range(4)]
    return nn.Sequential(*(part for convolution in convolutions for part in (convolution, nn.ReLU()))).eval()


def main() -> None:
    """Make the nets, measure them, print a table and the RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--board", choices=["embedded", "icount", "icount-a76"], default="embedded")
    parser.add_argument("--width", type=int, action="append", choices=sorted(SIDES), help="repeatable (default: all)")
    parser.add_argument("--kernel", type=int, choices=[1, 3], default=3)
    parser.add_argument("--out", type=Path, help="keep the files here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    effort = EFFORTS["quick"] if options.board == "embedded" else NOISELESS
    cells, reached = [], {}
    with tempfile.TemporaryDirectory() as temporary, open_board(options.board) as target:
        kept = options.out or Path(temporary)
        kept.mkdir(parents=True, exist_ok=True)
        for width in options.width or SIDES:
            net, inputs = f"conv{options.kernel}-{width}", (torch.zeros(1, width, SIDES[width], SIDES[width]),)
            rows = [Row(DENSE), *(Row(f"{groups} groups") for groups in GROUPS)]
            for row, groups in zip(rows, (1, *GROUPS), strict=True):
                model = layers(width, options.kernel, groups)
                row.sizes = write_files(model, kept / file_stem(net, row.name), inputs)
            measure_rows(rows, net, target, effort, kept)
            for row, groups in zip(rows[1:], GROUPS, strict=True):
                shares = [row.shares[runtime] for runtime in RUNTIMES]
                parts = [(1 - share) / (1 - 1 / groups) for share in shares]
                reached |= {(width, groups, runtime): part for runtime, part in zip(RUNTIMES, parts, strict=True)}
                found = (text for s, p in zip(shares, parts, strict=True) for text in (f"{s:.3f}", f"{p:.0%}"))
                cells.append([f"{width} at {SIDES[width]}", str(groups), str(width // groups), *found])
                print(" ".join(cells[-1]), flush=True)
    header = ["width", "groups", "a block", *(text for r in RUNTIMES for text in (f"{TITLES[r]} / dense", "reached"))]
    print(f"\n{options.kernel}x{options.kernel} convolutions on {options.board}")
    print(table(header, cells))
    best = {runtime: max(v for (_, g, r), v in reached.items() if (g, r) == (4, runtime)) for runtime in RUNTIMES}
    aims = {f"reached at 4 groups, best width, {TITLES[r]}": aim(value, ">=", AIM) for r, value in best.items()}
    print("RESULT " + json.dumps({"aims": aims}))


if __name__ == "__main__":
    main()
