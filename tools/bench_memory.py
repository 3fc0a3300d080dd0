"""How well the peak activation memory of widths never measured is predicted.

    python tools/bench_memory.py [--quick] [--net NAME ...] [--board embedded|arm64] [--runtime onnxruntime|tflite]

Widths as a profile has them: the dense model and eight more fit the line of `tables.combine.fit_memory`, others,
as plans have them, are held out. All are measured as in a profile: the growth of a process that runs the model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from bench_profile import NETS, load_net
from boards.icount import IcountBoard

from edgeprune.core.cost import activation_bytes, live_bytes
from edgeprune.core.family import load_member
from edgeprune.core.records import Measurement, MemoryModel, Samples, Step, StepResult, Target
from edgeprune.device.embedded import EmbeddedBoard
from edgeprune.device.session import Session, open_session
from edgeprune.tables.combine import fit_memory
from edgeprune.tables.design import FITTED_MEMORY, Configuration, design_configurations
from edgeprune.trace import trace_graph

AIM = 0.05
"""Largest relative error of a held-out prediction."""
DEFAULT_NETS = ["mobilenet_v2", "resnet18", "resnet20_32"]


def bench(name: str, session: Session, held_out: int, folder: Path) -> tuple[MemoryModel, float]:
    """The fitted model with its error, and the largest error of what lives at once instead of it."""
    module, inputs = load_net(name)
    graph = trace_graph(module, inputs)
    member = load_member("formats", session.format)
    resizer = member.make_resizer(module, inputs, graph)
    sweep = design_configurations(graph, 1 + FITTED_MEMORY, held_out)
    weights = f"{name}.bin"
    resizer.write_weights(folder / weights)
    files = {weights: folder / weights}
    for entry in sweep:
        file = f"{name}-{entry.name}{member.SUFFIX}"
        files[file] = folder / file
        resizer.write_structure(entry.widths, files[file], weights)
    session.push(files)
    steps = [Step(key=entry.name, kind="memory", artifact=f"{name}-{entry.name}{member.SUFFIX}") for entry in sweep]
    results = {result.key: result for result in session.run(steps, job=f"memory-{name}")}
    conditions = session.conditions()
    measured = [
        to_measurement(entry, results[entry.name], activation_bytes(graph, entry.widths, conditions)) for entry in sweep
    ]
    model = fit_memory(measured)
    if model is None or model.error is None:
        raise SystemExit("the board cannot tell what a process takes")
    live = [
        abs(live_bytes(graph, item.widths) / item.activation_bytes - 1)
        for item in measured if item.held_out and item.activation_bytes
    ]  # fmt: skip
    return model, max(live)


def to_measurement(entry: Configuration, result: StepResult, arena: int) -> Measurement:
    """What the fit wants of one configuration."""
    if result.error is not None:
        raise SystemExit(f"{entry.name}: {result.error}")
    none = Samples(values=(1.0,))
    return Measurement(
        configuration=entry.name, round=0, widths=entry.widths, held_out=entry.held_out, samples=none, dense=none,
        activation_bytes=result.activation_bytes, arena_bytes=arena,
    )  # fmt: skip


def find_board(name: str) -> AbstractContextManager[Target]:
    """The board of that name, for as long as the block. Instructions need no counting for memory."""
    return IcountBoard(name=name, icount=False) if name == "arm64" else EmbeddedBoard()


def main() -> None:
    """Print the table and the result line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 widths held out instead of 12")
    parser.add_argument("--net", nargs="+", choices=NETS, default=DEFAULT_NETS)
    parser.add_argument("--board", choices=["embedded", "arm64"], default="embedded", help="arm64: emulated")
    parser.add_argument("--runtime", choices=["onnxruntime", "tflite"], default="onnxruntime")
    options = parser.parse_args()
    torch.set_num_threads(1)
    heads = (
        ("model", 20),
        ("held out", 10),
        ("mean", 8),
        ("max", 8),
        ("scale", 7),
        ("base KiB", 10),
        ("live: max", 11),
    )
    print("".join(f"{head:>{width}}" for head, width in heads))
    aims = {}
    with tempfile.TemporaryDirectory() as temporary, find_board(options.board) as target:
        for name in options.net:
            with open_session(replace(target, runtime=options.runtime), space=temporary) as session:
                model, live = bench(name, session, 4 if options.quick else 12, Path(temporary))
            assert model.error is not None
            print(
                f"{name:>20}{model.error.configurations:10}{model.error.mean:8.2%}{model.error.max:8.2%}"
                f"{model.scale:7.3f}{model.base_bytes / 1024:10.1f}{live:11.1%}",
                flush=True,
            )
            aims[f"{name}_peak_memory_max_error"] = {
                "value": model.error.max, "aim": f"<= {AIM}", "met": model.error.max <= AIM
            }  # fmt: skip
    print("RESULT", json.dumps({"aims": aims}))


if __name__ == "__main__":
    main()
