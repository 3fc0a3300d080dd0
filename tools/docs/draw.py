"""The pictures of "How we measure", from any profile.

    python tools/docs/draw.py PROFILE.jsonl [--out DIR]

Writes drift.svg, staircase.svg, predictions.svg and speeds.svg, and prints the figures that they show.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from svg import BLUE, GREEN, INK, ORANGE, RED, Plot, stack

from edgeprune.core.budget import format_seconds
from edgeprune.core.cost import kernel_latency, kernel_sizes
from edgeprune.core.errors import EdgepruneError
from edgeprune.core.records import Kernel, Profile
from edgeprune.core.stats import find_modes, median, turn_medians, turn_ratios
from edgeprune.profile import read_profile
from edgeprune.tables.combine import Configured, average_rounds, predict_kernels
from edgeprune.tables.design import DENSE

HERE = Path(__file__).parent
MS = 1e3


def draw_drift(profile: Profile) -> tuple[str, str]:
    """The dense model's turns over the whole profile, and what is left of that in the ratios of neighbours."""
    others = [item for item in profile.measurements if item.configuration != DENSE]
    alone = np.concatenate([turn_medians(item.dense) for item in others])
    ratios = [turn_ratios(item.samples, item.dense) for item in others]
    level = np.concatenate([each / np.median(each) for each in ratios])
    alone /= np.median(alone)
    top = float(max(1.15, np.percentile(np.concatenate([alone, level]), 99)))
    panels = []
    for title, values, colour in (
        ("The dense model's turns, alone", alone, RED),
        ("Ratios of neighbouring turns", level, GREEN),
    ):
        low, high = np.percentile(values, [25, 75])
        panel = Plot(
            title=f"{title}: half of them within {high - low:.1%}", x_title="turn, in order of time",
            y_title="of the median", x=(0, len(values)), y=(0.9, top), height=240, y_format="{:.2f}",
        )  # fmt: skip
        panel.line([(0, 1), (len(values), 1)], INK, width=1, dashes="4 4")
        panel.points(enumerate(values.tolist()), colour, size=3, opacity=0.6)
        panels.append(panel)
    spreads = [float(np.subtract(*np.percentile(values, [75, 25]))) for values in (alone, level)]
    return stack(*panels), f"interquartile range of turns alone {spreads[0]:.2%}, of ratios {spreads[1]:.2%}"


def draw_staircase(profile: Profile) -> tuple[str, str] | None:
    """The kernel with the clearest steps: its measured times and its table over the channels it writes."""
    configured = [item for item in average_rounds(profile.measurements) if item.kernels]
    units = _dense_widths(configured)
    tables = {table.signature: table for table in profile.tables}
    stepped = [
        kernel
        for kernel in profile.kernels
        if kernel.in_extent is None or len(tables[kernel.signature].in_sizes) == 1
        if tables[kernel.signature].tile_out > 1
    ]
    if not stepped:
        return None
    kernel = max(stepped, key=lambda kernel: _dense_time(configured, kernel))
    table = tables[kernel.signature]
    seen = [(kernel_sizes(kernel, item.widths, units)[1], item.kernels[kernel.name]) for item in configured]
    most = max(size for size, _ in seen)
    sizes = np.arange(1, most + 1)
    # Kernels are profiled, tables are of the model as it runs without the profiler.
    scale = median([seconds / float(kernel_latency(table, 0, size)) for size, seconds in seen])
    fitted = scale * np.asarray([float(kernel_latency(table, 0, int(size))) for size in sizes])
    plot = Plot(
        title=f"{kernel.nodes[0]}: {kernel.signature}", x_title="channels written", y_title="time of the kernel (ms)",
        x=(0, most + 1), y=(0, MS * max(seconds for _, seconds in seen) * 1.1),
    )  # fmt: skip
    steps = [(float(x), MS * float(y)) for size, y in zip(sizes, fitted, strict=True) for x in (size - 1, size)]
    plot.line(steps, BLUE, name="table")
    plot.points(
        [(size, MS * seconds) for size, seconds in seen if size % table.tile_out], ORANGE, size=6, name="other widths"
    )
    plot.points([(size, MS * seconds) for size, seconds in seen if size % table.tile_out == 0], GREEN, size=6,
                name=f"multiples of {table.tile_out}")  # fmt: skip
    return stack(plot), f"{kernel.signature}: blocks of {table.tile_out} channels, {len(seen)} widths"


def draw_predictions(profile: Profile) -> tuple[str, str]:
    """Predicted against measured latency; the band is the largest held-out error."""
    configured = average_rounds(profile.measurements)
    units, tables = _dense_widths(configured), {table.signature: table for table in profile.tables}
    pairs = [
        (
            item.held_out,
            MS * item.whole_s,
            MS * (profile.overhead_s + predict_kernels(profile.kernels, tables, units | item.widths)),
        )
        for item in configured
    ]
    top = 1.05 * max(max(measured, predicted) for _, measured, predicted in pairs)
    error = profile.held_out
    plot = Plot(
        title="Whole model" + (f": error {error.mean:.1%}, at most {error.max:.1%} (the band)" if error else ""),
        x_title="measured (ms)", y_title="predicted (ms)", x=(0, top), y=(0, top), width=520, height=480,
    )  # fmt: skip
    if error is not None:
        plot.band([(0, 0), (top, top * (1 - error.max))], [(0, 0), (top / (1 + error.max), top), (top, top)], GREEN)
    plot.line([(0, 0), (top, top)], INK, width=1, dashes="4 4")
    plot.points([pair[1:] for pair in pairs if not pair[0]], BLUE, size=6, name="fitted")
    plot.points([pair[1:] for pair in pairs if pair[0]], RED, size=8, name="held out")
    said = "no configurations were held out" if error is None else (
        f"{error.configurations} held out: error {error.mean:.2%} on average, {error.max:.2%} at most"
    )  # fmt: skip
    return stack(plot), said


def draw_speeds(profile: Profile) -> tuple[str, str]:
    """How often each speed of the board came, by the dense model's turns."""
    turns = np.concatenate([turn_medians(item.dense) for item in profile.measurements])
    modes = find_modes(turns)
    low, high = float(turns.min()), float(np.percentile(turns, 98))
    counts, edges = np.histogram(turns, bins=60, range=(low, high))
    plot = Plot(
        title=f"{len(turns)} turns of the dense model", x_title="latency (ms)", y_title="turns",
        x=(MS * low * 0.99, MS * high * 1.01), y=(0, 1.15 * float(counts.max())), height=280,
    )  # fmt: skip
    outline = [
        (MS * float(edge), float(count))
        for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True)
        for edge in (left, right)
    ]
    plot.band([(MS * low, 0), (MS * high, 0)], outline, BLUE)
    plot.line(outline, BLUE)
    if modes is None:
        return stack(plot), "one speed"
    for (share, seconds), colour in zip(modes, (GREEN, ORANGE), strict=True):
        plot.line([(MS * seconds, 0), (MS * seconds, 1.1 * float(counts.max()))], colour, dashes="6 4")
        plot.note(MS * seconds, 1.11 * float(counts.max()), f" {format_seconds(seconds)}: {share:.0%}", colour)
    (fast, fast_s), (slow, slow_s) = modes
    return stack(plot), f"{format_seconds(fast_s)} in {fast:.0%} of the turns, {format_seconds(slow_s)} in {slow:.0%}"


def _dense_time(configured: list[Configured], kernel: Kernel) -> float:
    return next(item.kernels[kernel.name] for item in configured if item.name == DENSE)


def _dense_widths(configured: list[Configured]) -> dict[str, int]:
    """The largest width of every group."""
    widths: dict[str, int] = {}
    for item in configured:
        widths |= {name: max(width, widths.get(name, 0)) for name, width in item.widths.items()}
    return widths


def main() -> None:
    """Draw what the profile can show, and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", type=Path, help="a profile.jsonl")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the pictures (default: beside this file)")
    parser.add_argument("--only", nargs="+", choices=DRAWINGS, help="which pictures")
    options = parser.parse_args()
    try:
        profile = read_profile(options.profile)
    except EdgepruneError as error:
        parser.exit(4, f"{error}\n")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only or DRAWINGS:
        drawn = DRAWINGS[name](profile)
        if drawn is None:
            print(f"{name}: this profile has nothing to show")
            continue
        picture, says = drawn
        (options.out / f"{name}.svg").write_text(picture, "utf-8")
        print(f"{name}: {says}")


DRAWINGS: dict[str, Callable[[Profile], tuple[str, str] | None]] = {
    "drift": draw_drift,
    "staircase": draw_staircase,
    "predictions": draw_predictions,
    "speeds": draw_speeds,
}


if __name__ == "__main__":
    main()
