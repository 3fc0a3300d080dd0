"""How well `edgeprune measure` repeats, finds a small difference, and finds none where there is none.

    python tools/bench_measure.py [--quick] [--net NAME ...] [--target NAME] [--out DIR]

Of each net there are three files: A; B, about 3 % slower because some layer is a block of channels wider; and a
copy of A. What B really costs is said by one long measurement. A's latency is repeated alone, and in turns with B
as a reference: B's median over their ratio. With --out every measurement is kept, and the next call goes on from
them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeprune.core.budget import format_seconds
from edgeprune.core.effort import EFFORTS
from edgeprune.core.records import Measured, Quantity, Target
from edgeprune.core.store import read_record, write_record
from edgeprune.device.embedded import EmbeddedBoard
from edgeprune.device.session import Session, open_session
from edgeprune.device.targets import load_target
from edgeprune.formats import onnx as onnx_format
from edgeprune.measure import measure_files

REPEATS_AIM, RIGHT_AIM, SAME_AIM = 0.02, 1.0, 0.9
"""Spread of repeated medians; shares of the comparisons with the right verdict."""
SLOWER = 1.03
NETS = {"small": (16, (96,) * 12), "large": (64, (96,) * 12)}
"""Name -> side of the input, channels of each layer."""
BLOCK = 16
"""Channels that the runtime computes at once; half of it on narrower processors."""


def make_net(widths: Sequence[int]) -> nn.Module:
    """3 x 3 convolutions one after the other, the first with stride 2."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for place, (cin, cout) in enumerate(zip((3, *widths), widths, strict=False)):
        layers += [nn.Conv2d(cin, cout, 3, stride=2 if place == 0 else 1, padding=1), nn.ReLU()]
    return nn.Sequential(*layers).eval()


def candidates(widths: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Nets that may be 3 % slower, by multiply-adds: a layer inside 2.9 % more, the first one 1.7 % for each block."""
    inner, first, last = list(widths), list(widths), list(widths)
    inner[5] += BLOCK
    first[0] += 2 * BLOCK
    last[-1] += 2 * BLOCK
    return {"inner": tuple(inner), "first": tuple(first), "last": tuple(last)}


def write_nets(name: str, folder: Path) -> dict[str, Path]:
    """The files of a net, made once."""
    side, widths = NETS[name]
    nets = {"a": widths, **candidates(widths)}
    files = {key: folder / f"{name}-{key}.onnx" for key in (*nets, "copy")}
    for key, channels in nets.items():
        if not files[key].exists():
            onnx_format.export(make_net(channels), (torch.randn(1, 3, side, side),), files[key])
    shutil.copy(files["a"], files["copy"])
    return files


class Bench:
    """One net on one board; measurements are made once and kept."""

    def __init__(self, name: str, session: Session, folder: Path) -> None:
        self.name, self.session, self.folder = name, session, folder
        self.files = write_nets(name, folder)

    def measure(self, label: str, *keys: str, effort: str = "default") -> Measured:
        """The files of these keys, measured or read from an earlier call."""
        path = self.folder / f"{self.name}-{label}.json"
        if path.exists():
            return read_record(Measured, path)
        measured = measure_files([self.files[key] for key in keys], self.session, effort=EFFORTS[effort])
        write_record(path, measured)
        said = measured.verdict or format_seconds(measured.timings[0].latency_s.median)
        print(f"{self.name} {label}: {said}", file=sys.stderr, flush=True)
        return measured

    def find_slower(self) -> tuple[str, Measured]:
        """The candidate that is nearest to 3 % slower, and a long measurement of it."""
        looks = {key: self.measure(f"look-{key}", "a", key) for key in candidates(NETS[self.name][1])}
        best = min(looks, key=lambda key: abs(ratio(looks[key]) - SLOWER))
        return best, self.measure(f"long-{best}", "a", best, effort="thorough")

    def run(self, repeats: int, comparisons: int) -> dict[str, Any]:
        """All measurements of the net, the kinds in turns so that a bad hour meets them alike."""
        slower, long = self.find_slower()
        alone, differ, same = [], [], []
        for number in range(max(repeats, comparisons)):
            if number < repeats:
                alone.append(self.measure(f"alone-{number}", "a"))
            if number < comparisons:
                differ.append(self.measure(f"{slower}-{number}", "a", slower))
                same.append(self.measure(f"same-{number}", "a", "copy"))
        slower_s = float(np.median([each.timings[1].latency_s.median for each in differ]))
        return {
            "slower": slower,
            "long": long.ratio,
            "raw_s": [each.timings[0].latency_s.median for each in alone],
            "turns_s": [slower_s / ratio(each) for each in differ[:repeats]],
            "differ": [each.ratio for each in differ],
            "same": [each.ratio for each in same],
            "rounds": [len(each.timings[0].rounds) for each in (*differ, *same)],
        }


def ratio(measured: Measured) -> float:
    """Second file over first."""
    assert measured.ratio is not None
    return measured.ratio.median


def spread(values: Sequence[float]) -> float:
    """Largest over smallest, less 1."""
    return max(values) / min(values) - 1


def found_slower(value: Quantity) -> bool:
    """The verdict is that the second file is slower."""
    return value.low > 1


def found_same(value: Quantity) -> bool:
    """The verdict is that there is no difference."""
    return value.low <= 1 <= value.high


def show(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """What repeated, and what was found."""
    print(f"{'net':>8}{'measured':>14}{'runs':>6}{'median':>12}{'least':>12}{'most':>12}{'spread':>8}")
    for name, row in rows.items():
        for what, values in (("alone", row["raw_s"]), ("in turns", row["turns_s"])):
            times = "".join(f"{format_seconds(f(values)):>12}" for f in (np.median, min, max))
            print(f"{name:>8}{what:>14}{len(values):>6}{times}{spread(values):8.2%}")
    print(
        f"\n{'net':>8}{'compared':>14}{'runs':>6}{'ratio':>8}{'least':>8}{'most':>8}{'right':>7}{'+-':>8}{'rounds':>8}"
    )
    for name, row in rows.items():
        long = row["long"]
        print(f"{name:>8}{row['slower'] + ', long':>14}{1:>6}{long.median:8.4f}{long.low:8.4f}{long.high:8.4f}"
              f"{'':>7}{_reach([long]):8.2%}")  # fmt: skip
        for what, values, right in ((row["slower"], row["differ"], found_slower), ("copy", row["same"], found_same)):
            ratios = [value.median for value in values]
            print(
                f"{name:>8}{what:>14}{len(values):>6}{np.median(ratios):8.4f}{min(ratios):8.4f}{max(ratios):8.4f}"
                f"{sum(map(right, values)):>7}{_reach(values):8.2%}{np.mean(row['rounds']):8.1f}"
            )
    print("least and most of the long measurement: its 99 % interval; +-: median half-width of that interval")


def _reach(values: Sequence[Quantity]) -> float:
    return float(np.median([(value.high - value.low) / 2 for value in values]))


def find_aims(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What was to be shown, and whether it was."""
    aims: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        for key, values in (("repeats_alone", row["raw_s"]), ("repeats_in_turns", row["turns_s"])):
            value = spread(values)
            aims[f"{name}_{key}"] = {"value": value, "aim": f"<= {REPEATS_AIM}", "met": value <= REPEATS_AIM}
        for key, values, right, share in (
            ("slower_found", row["differ"], found_slower, RIGHT_AIM),
            ("no_difference_found", row["same"], found_same, SAME_AIM),
        ):
            value = sum(map(right, values)) / len(values)
            aims[f"{name}_{key}"] = {"value": value, "aim": f">= {share}", "met": value >= share, "of": len(values)}
        aims[f"{name}_slower_found"]["slower_by"] = row["long"].median - 1
    return aims


@contextlib.contextmanager
def find_board(name: str | None) -> Iterator[Target]:
    """The target to measure on."""
    if name:
        yield load_target(name)
        return
    with EmbeddedBoard() as target:
        yield target


def main() -> None:
    """Print the tables and the result line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first net only: under 10 minutes")
    parser.add_argument("--net", nargs="+", choices=NETS, help="which nets")
    parser.add_argument("--target", help="a target of the inventory instead of the embedded board")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of one file")
    parser.add_argument("--comparisons", type=int, default=10, help="comparisons of each pair")
    parser.add_argument("--out", type=Path, help="keep the measurements here, and go on from them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary, find_board(options.target) as target:
        folder = options.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.net or list(NETS)[: 1 if options.quick else None]:
            with open_session(target, space=str(folder)) as session:
                rows[name] = Bench(name, session, folder).run(options.repeats, options.comparisons)
    show(rows)
    print("RESULT", json.dumps({"aims": find_aims(rows)}))


if __name__ == "__main__":
    main()
