"""Formats and precisions side by side: size, error, agreement, latency, transposes.

    python tools/bench_tflite.py [--quick] [--net NAME ...] [--data DIR] [--board embedded|icount|icount-a76]
                                 [--side PIXELS] [--legacy]

ONNX Runtime and LiteRT run the same nets at every precision their formats can be written in. Latency is in turns with
the same runtime's float32 file, so that what the machine does from second to second falls out; the milliseconds of the
two float32 files tell the runtimes apart. Agreement is top-1 against PyTorch on CIFAR test images, enlarged for all but
ResNet-20; these have random weights up to a last layer that is fitted to CIFAR's labels, and see smaller images on
emulated boards. Without data they see noise, and ResNet-20 is left out. `--legacy` also installs tflite-runtime on the
board, in an environment of its own, and runs the same .tflite files with it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cifar
import numpy as np
import torch
from bench_profile import open_board, zoo
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.compensation.batch_norm import reestimate_batch_norm
from edgeprune.core.effort import EFFORTS, NOISELESS, Effort
from edgeprune.core.errors import EdgepruneError
from edgeprune.core.family import load_member
from edgeprune.core.records import Artifact, Step, Target
from edgeprune.core.stats import median, quantity, turn_ratios
from edgeprune.device.runtimes import tflite
from edgeprune.device.session import open_session
from edgeprune.device.targets import setup_target
from edgeprune.export import export_model

RUNTIMES = {"onnxruntime": "onnx", "tflite": "tflite"}
LEGACY = "tflite-runtime"
CALIBRATION = 64
FITTED, RIDGE = 1024, 300.0
"""Images that the last layer of a net without trained weights is fitted to, and how much that is damped, as a multiple
of the features' mean square. With little damping it would amplify what any rounding does, which no trained net does."""


@dataclass(frozen=True, kw_only=True)
class Net:
    """A model with what it is judged on."""

    name: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    calibration: list[tuple[np.ndarray, ...]]
    test: Tensor


@dataclass(kw_only=True)
class Row:
    """One file; None where a cell was not measured, `note` says why."""

    net: str
    runtime: str
    precision: str
    size: int | None = None
    error: float | None = None
    agreement: float | None = None
    transposes: str = ""
    share: float | None = None
    latency_s: float | None = None
    seconds: float | None = None
    note: str = ""


def load_nets(names: Sequence[str], data: Path | None, examples: int, side: int) -> list[Net]:
    """The nets, with real images where there are any; `side` is that of all but ResNet-20's."""
    generator = torch.Generator().manual_seed(0)
    real = None if data is None else cifar.Cifar(data, train=FITTED, test=examples, calibration=CALIBRATION)
    found = []
    for name in names:
        if name == "resnet20":
            if data is None or real is None:
                print("resnet20: no data folder (--data, $EDGEPRUNE_DATA), so left out")
                continue
            images = torch.cat([x for x, _ in real.test])
            calibration = [(x.numpy(),) for x, _ in real.calibration]
            found.append(Net(name=name, module=cifar.load_net(name, data).eval(), inputs=(images[:1],),
                             calibration=calibration, test=images))  # fmt: skip
            continue
        torch.manual_seed(0)
        module = _timm(name) if name == "efficientnet_lite0" else zoo(name)
        calibration = torch.randn(CALIBRATION // 4, 3, side, side, generator=generator)
        test = torch.randn(32, 3, side, side, generator=generator)
        if real is not None:
            calibration = _enlarge(torch.cat([x for x, _ in real.calibration])[: CALIBRATION // 4], side)
            test = _enlarge(torch.cat([x for x, _ in real.test])[: examples // 4], side)
        # Random weights need batch-norm statistics, or every activation dies out.
        reestimate_batch_norm(module.eval(), [(calibration, None)])
        if real is not None:
            _fit_last(module, cifar.normalise(real.train.x), real.train.y, side)
        found.append(Net(name=name, module=module, inputs=(test[:1],),
                         calibration=[(x[None].numpy(),) for x in calibration], test=test))  # fmt: skip
    return found


def _enlarge(images: Tensor, side: int) -> Tensor:
    return functional.interpolate(images, size=(side, side), mode="bilinear")


@torch.no_grad()
def _fit_last(module: nn.Module, images: Tensor, labels: Tensor, side: int) -> None:
    """Ridge regression of the labels on what the last layer reads, for its first outputs; the others stay below.

    Random features tell images apart only a little: without it one output is the largest for all of them.
    """
    last = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]
    seen: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double()))
    for batch in images.split(32):
        module(_enlarge(batch, side))
    handle.remove()
    features, wanted = torch.cat(seen), functional.one_hot(labels).double()
    classes = wanted.shape[1]
    mean, middle = features.mean(0), wanted.mean(0)
    x = features - mean
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, x.T @ (wanted - middle)).T
    last.weight[:classes] = weight.float()
    last.weight[classes:] *= 0.01
    last.bias[:classes] = (middle - weight @ mean).float()
    last.bias[classes:] = -1.0


def _timm(name: str) -> nn.Module:
    zoo("resnet18")  # declares the operators without which torchvision, and so timm, cannot be imported
    import timm

    module: nn.Module = timm.create_model(name, pretrained=False)
    return module


def write_files(net: Net, format: str, folder: Path) -> list[tuple[Row, Artifact | None]]:
    """The net at every precision of a format, with what the host makes of it."""
    member = load_member("formats", format)
    with torch.no_grad():
        expected = torch.cat([net.module(x) for x in net.test.split(32)]).numpy()
    made: list[tuple[Row, Artifact | None]] = []
    for precision in member.PRECISIONS:
        row = Row(net=net.name, runtime="", precision=precision.name)
        path = folder / f"{net.name}-{precision.name}{member.SUFFIX}"
        began = time.monotonic()
        try:
            artifact = export_model(
                net.module, net.inputs, path, format=format, precision=precision, calibration=net.calibration
            )
        except EdgepruneError as error:
            row.note = str(error)
            made.append((row, None))
            continue
        row.seconds = time.monotonic() - began
        got = np.concatenate([member.run(path, [x.numpy()[None]])[0] for x in net.test])
        row.size, row.error = artifact.bytes, float(np.abs(got - expected).max() / np.abs(expected).max())
        row.agreement = float((got.argmax(1) == expected.argmax(1)).mean())
        row.transposes = artifact.tools.get("transposes", "")
        made.append((row, artifact))
    return made


def time_files(made: list[tuple[Row, Artifact | None]], target: Target, runtime: str, effort: Effort) -> list[Row]:
    """Latency of every file in turns with the float32 one of its format."""
    rows = [replace(row, runtime=runtime) for row, _ in made]
    paths = {f"{a.sha256[:12]}{Path(a.path).suffix}": Path(a.path) for _, a in made if a is not None}
    names = [None if a is None else f"{a.sha256[:12]}{Path(a.path).suffix}" for _, a in made]
    member = "tflite" if runtime == LEGACY else runtime
    with open_session(replace(target, runtime=member), space=f"bench-{runtime}") as session:
        session.push(paths)
        steps = [
            Step(key=f"{name} {number}", kind="time", artifact=name, against=names[0], seconds=effort.seconds,
                 precision=effort.precision, min_samples=effort.samples, steady=effort.steady)
            for number in range(effort.repeats) for name in names if name is not None
        ]  # fmt: skip
        results = {result.key: result for result in session.run(steps, job=f"tflite-{time.time_ns():x}")}
        with suppress(EdgepruneError):
            session.remove(list(paths))
    for row, name in zip(rows, names, strict=True):
        own: list[Any] = [results[f"{name} {number}"] for number in range(effort.repeats)] if name else []
        failed = next((result.error for result in own if result.error), None)
        if failed or not own:
            row.note = row.note or f"does not run: {failed}"
            continue
        row.share = quantity(np.concatenate([turn_ratios(r.samples, r.against) for r in own])).median
        row.latency_s = median([value for r in own for value in r.samples.values])
    return rows


def install_legacy(target: Target, folder: Path) -> Target:
    """The same board with tflite-runtime, which wants an older numpy: an environment of its own."""
    emulated = target.name.startswith("icount")
    legacy = replace(target, runtime="tflite", workdir="~/legacy" if emulated else f"{folder}/legacy", python=None)
    with patch.object(tflite, "WHEELS", [each for each in tflite.WHEELS if LEGACY in each["requirements"][0]]):
        facts = setup_target(legacy, offline=True)
    return replace(legacy, python=facts.python)


def show_head() -> None:
    """The table's first line."""
    print(f"{'net':>20} {'runtime':>15} {'precision':>11} {'KiB':>8} {'error':>9} {'top-1 =':>8} {'T':>3}"
          f" {'/float32':>9} {'ms':>9} {'export s':>9}  note", flush=True)  # fmt: skip


def show(rows: Sequence[Row]) -> None:
    """Lines of the table, as soon as they are measured."""
    for row in rows:
        cells = [
            "-" if row.size is None else f"{row.size / 1024:.0f}",
            "-" if row.error is None else f"{row.error:.1e}",
            "-" if row.agreement is None else f"{row.agreement:.1%}",
            row.transposes or "-",
            "-" if row.share is None else f"{row.share:.3f}",
            "-" if row.latency_s is None else f"{row.latency_s * 1e3:.3f}",
            "-" if row.seconds is None else f"{row.seconds:.1f}",
        ]
        widths = (8, 9, 8, 3, 9, 9, 9)
        text = " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        print(f"{row.net:>20} {row.runtime:>15} {row.precision:>11} {text}  {row.note[:80]}", flush=True)


NETS = ("resnet20", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_lite0")


def main() -> None:
    """Print the table and the result line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds, two nets")
    parser.add_argument("--net", nargs="+", choices=NETS)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--board", choices=["embedded", "icount", "icount-a76"], default="embedded")
    parser.add_argument("--side", type=int, help="of all images but ResNet-20's (default 224, 96 on emulated boards)")
    parser.add_argument("--legacy", action="store_true", help="also with tflite-runtime")
    options = parser.parse_args()
    torch.set_num_threads(1)
    effort = EFFORTS["quick" if options.quick else "default"] if options.board == "embedded" else NOISELESS
    side = options.side or (224 if options.board == "embedded" else 96)
    names = options.net or (NETS[0::2] if options.quick else NETS)
    rows: list[Row] = []
    show_head()
    with tempfile.TemporaryDirectory() as temporary, open_board(options.board) as target:
        legacy = install_legacy(target, Path(temporary)) if options.legacy else None
        for net in load_nets(names, cifar.find_data(options.data), 200 if options.quick else 1000, side):
            for runtime, format in RUNTIMES.items():
                made = write_files(net, format, Path(temporary))
                found = time_files(made, target, runtime, effort)
                if format == "tflite" and legacy:
                    found += time_files(made, legacy, LEGACY, effort)
                show(found)
                rows += found
    transposes = [int(row.transposes) for row in rows if row.transposes]
    cells = [row for row in rows if row.runtime in RUNTIMES]
    told = sum(row.share is not None or bool(row.note) for row in cells)
    aims = {
        "transposes_left": {"value": max(transposes, default=None), "aim": "== 0", "met": not any(transposes)},
        "cells_measured_or_explained": {"value": told / len(cells), "aim": "== 1", "met": told == len(cells)},
    }
    print("RESULT", json.dumps({"aims": aims}))


if __name__ == "__main__":
    main()
