"""Zeros and gates beside fewer channels on the same board: accuracy, measured latency, and size raw and compressed.

    python tools/bench_sparse.py [--quick] [--data DIR] [--net wrn16_2|resnet20] [--speed-up 2] [--epochs 5]
                                 [--board embedded|icount|icount-a76] [--row n_m:n=2,m=4 ...] [--out DIR]
                                 [--images 50000] [--dense-epochs N] [--inputs 256] [--no-pointwise]
                                 [--planned-for embedded]

A row is one net; all have the same training after they were made, which also distils from the dense net:

    dense              as it is: what more training alone gives, and how far two equal files are measured apart
    structured         fewer channels, planned within the budget and confirmed by the board (ONNX Runtime)
    PATTERN            zeros of a member of `patterns` and its options
    structured+PATTERN both
    GATING             work decided per input by a member of `gating` and its options (ONNX Runtime)
    structured+GATING  both; exits that are trained alone go into the structured row as it was trained
    structured+int8    fewer channels, stored and computed in 8 bits (not trained for them)
    pivot:groups=4     all layers that can be in so many diagonal blocks, as grouped convolutions, refitted
    pivot:planned      each layer in as many as pay on the board (ONNX Runtime) for the latency of the structured row

Each is exported to ONNX and, but for gates, to TFLite, and timed in turns with the dense net's file of the same
runtime: a share below 1 is faster. Gated nets are timed on test images, each on its own: the share is the mean over
them, `worst` that of those for which the same gates run as for the slowest. A second table times a small net of
depthwise and pointwise layers, not trained, whose pointwise layers are sparse: of them alone LiteRT has kernels that
skip zeros (`edgeprune export --sparse`). The default trains 5 epochs on 50 000 images, `--quick` one epoch on 2 560.
With --out a row that was made is kept and not made again. With --planned-for the nets that a run on another board
planned, and kept there, are only measured.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_accuracy import INPUTS, SPEED_UP, Board, Ours, aim
from bench_profile import open_board
from cifar import NETS, Cifar, load_net, log, make_parser, read_options, show

from edgeprune.core.describe import table
from edgeprune.core.effort import EFFORTS, NOISELESS, Effort
from edgeprune.core.family import list_members, load_member
from edgeprune.core.records import Precision, Step, Target, WidthRules
from edgeprune.core.rules import apply_rules
from edgeprune.core.stats import median, over_inputs, turn_ratios
from edgeprune.device.session import open_session
from edgeprune.export import evaluate_artifact, export_model
from edgeprune.gate import gate_model, settle_gates
from edgeprune.gating import load_gating
from edgeprune.graphs.choices import decide_runs
from edgeprune.load import as_arrays
from edgeprune.pivot import pivot_model, plan_pivot
from edgeprune.recover import evaluate_accuracy, recover_accuracy
from edgeprune.sparsify import order_channels, sparsify_model
from edgeprune.trace import trace_graph

RUNTIMES = {"onnxruntime": ".onnx", "tflite": ".tflite"}
TITLES = {"onnxruntime": "ONNX Runtime", "tflite": "LiteRT"}
DENSE, STRUCTURED, INT8 = "dense", "structured", "int8"
PIVOT, PLANNED = "pivot:", "pivot:planned"
N_M, BLOCK = "n_m:n=2,m=4", "block:rows=1,columns=4,sparsity=0.5"
SKIP, EXIT = "block_skip:rate=0.55", "early_exit:at=0.48 0.81,rate=0.76,alone=true,strength=2.5"
ROWS = [
    DENSE, STRUCTURED, *(f"unstructured:sparsity={share}" for share in (0.5, 0.8, 0.9, 0.95)), N_M, BLOCK,
    f"{STRUCTURED}+{N_M}", f"{STRUCTURED}+{INT8}", *(f"{PIVOT}groups={groups}" for groups in (2, 4, 8)), PLANNED,
    SKIP, EXIT, f"{STRUCTURED}+{EXIT}",
]  # fmt: skip
POINTWISE_SIDE = 96
INPUTS_TIMES = 20
"""How many times as long as one net over and over it takes to time many images, each on its own."""
NOTICEABLE = 0.97
"""A share of the dense latency below which zeros are said to gain; equal files are measured within 1 to 2 % of 1."""


@dataclass
class Row:
    """One net. shares: runtime -> latency over the dense net's. sizes: suffix -> (bytes, compressed bytes).

    runs: gate -> whether it runs, for each of the first test images.
    """

    name: str
    before: float | None = None
    after: float | None = None
    zeros: float = 0.0
    shares: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    note: str = ""
    worst: float | None = None
    runs: dict[str, list[bool]] = field(default_factory=dict)


def main() -> None:
    """Make the nets, measure them, print the tables, a verdict per runtime and the RESULT line."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--net", choices=sorted(NETS), default="wrn16_2")
    parser.add_argument("--board", choices=["embedded", "icount", "icount-a76"], default="embedded")
    parser.add_argument(
        "--planned-for", choices=["embedded", "icount", "icount-a76"], help="its plans, not those of --board"
    )
    parser.add_argument("--row", action="append", help="only this row (repeatable)")
    parser.add_argument("--speed-up", type=float, help="of the structured rows' measured latency, above 1")
    parser.add_argument("--epochs", type=int, help="of training (default 5, quick 1); 0: none")
    parser.add_argument("--dense-epochs", type=int, help="of the dense row: 0 beside exits that are trained alone")
    parser.add_argument("--images", type=int, help="to train on (default 50000, quick 2560)")
    parser.add_argument("--inputs", type=int, default=256, help="test images that gated nets are timed on, up to 256")
    parser.add_argument("--quick", action="store_true", help="one epoch on 2 560 images, fewer measurements")
    parser.add_argument("--no-pointwise", action="store_true", help="without the second table")
    parser.add_argument("--out", type=Path, help="keep results here, and go on from them")
    options, folder = read_options(parser)
    options.epochs = options.epochs if options.epochs is not None else 1 if options.quick else 5
    options.dense_epochs = options.epochs if options.dense_epochs is None else options.dense_epochs
    data = Cifar(folder, train=options.images or (2_560 if options.quick else 50_000),
                 test=2_000 if options.quick else 5_000)  # fmt: skip
    effort = EFFORTS["quick" if options.quick else "default"] if options.board == "embedded" else NOISELESS
    with tempfile.TemporaryDirectory() as temporary, open_board(options.board) as target:
        kept = options.out or Path(temporary)
        kept.mkdir(parents=True, exist_ok=True)
        rows = make_rows(options, load_net(options.net, folder), data, target, kept)
        measure_rows(rows, options.net, target, effort, kept, next(iter(data.test))[0][: options.inputs])
        print(f"\n{options.net} on {options.board}, {options.epochs} x {len(data.train.y)} images of training")
        print(describe(rows))
        for runtime in RUNTIMES:
            print(verdict(runtime, rows))
        if not options.no_pointwise:
            pointwise = make_pointwise(kept)
            measure_rows(pointwise, "pointwise", target, effort, kept)
            print(f"\npointwise layers, {POINTWISE_SIDE} x {POINTWISE_SIDE}, not trained, on {options.board}")
            print(describe(pointwise))
            for runtime in RUNTIMES:
                print(verdict(runtime, pointwise))
    print("RESULT " + json.dumps({"aims": aims(rows)}))


def make_rows(options: argparse.Namespace, net: nn.Module, data: Cifar, target: Target, kept: Path) -> list[Row]:
    """Every net, trained, judged and exported."""
    rows, models = [], Structured(options, net, data, target, kept)
    for name in options.row or ROWS:
        stem = file_stem(options.net, name)
        made_from = [name, epochs_of(name, options), len(data.train.y), len(data.test.y)]
        # A plan is of its board; everything else is only measured on it.
        planned_for = options.planned_for or options.board
        planned = name.startswith((STRUCTURED, PLANNED))
        made_from += [models.structured_limit, planned_for] if planned else []
        note = kept / f"{stem}.json"
        if note.is_file() and (known := json.loads(note.read_text()))["made_from"] == made_from:
            rows.append(Row(**known["row"]))
            continue
        if planned and planned_for != options.board:
            raise SystemExit(f"{kept} has no {name} of these options that was planned for {planned_for}")
        start = time.perf_counter()
        row = make_row(name, models, kept / stem)
        note.write_text(json.dumps({"made_from": made_from, "row": asdict(row)}))
        log(f"  {name}: {percent(row.before)} -> {percent(row.after)}, {time.perf_counter() - start:.0f} s {row.note}")
        rows.append(row)
    return rows


def epochs_of(name: str, options: argparse.Namespace) -> int:
    """How long a row trains."""
    return int(options.dense_epochs if name == DENSE else options.epochs)


def file_stem(net: str, name: str) -> str:
    """A row's name for files."""
    return f"{net}-{''.join(sign if sign.isalnum() or sign in '.=' else '-' for sign in name)}"


class Structured:
    """The dense net and, planned once, the one with fewer channels."""

    def __init__(self, options: argparse.Namespace, net: nn.Module, data: Cifar, target: Target, kept: Path) -> None:
        self.options, self.net, self.data, self.target, self.kept = options, net, data, target, kept
        self.structured_limit = 1 / (options.speed_up or SPEED_UP[options.net])
        self.smaller: nn.Module | None = None
        self.trained: dict[str, nn.Module] = {}

    def start(self, name: str) -> nn.Module:
        """What a row is made from."""
        if not name.startswith(STRUCTURED):
            return copy.deepcopy(self.net)
        if self.smaller is None:
            quick = self.options.quick
            with open_session(replace(self.target, runtime="onnxruntime"), space="bench-sparse") as session:
                board = Board(session, self.net, EFFORTS["quick" if quick else "default"])
                ours = Ours(self.options.net, self.net, self.data, session, self.structured_limit, self.kept,
                            quick=quick)  # fmt: skip
                # 2:4 wants channels in fours.
                ours.graph = apply_rules(ours.graph, WidthRules(step=4))
                row, self.smaller = ours.prune("curves", board)
            log(f"  structured: {row.share:.3f} of the dense latency; {row.widths}")
        return copy.deepcopy(self.smaller)

    def pivot(self, name: str) -> tuple[nn.Module, str]:
        """The net in blocks, and how many of its multiplications are left."""
        if name == PLANNED:
            with open_session(replace(self.target, runtime="onnxruntime"), space="bench-pivot") as session:
                effort = EFFORTS["quick"] if self.options.board == "embedded" else NOISELESS
                latency = f"{self.structured_limit:.4f}x"
                model, found = plan_pivot(self.net, INPUTS, self.data.calibration, session, latency=latency,
                                          effort=effort)  # fmt: skip
        else:
            groups = int(name.rpartition("=")[2])
            model, found = pivot_model(self.net, INPUTS, self.data.calibration, groups=groups)
        return model, f"{found.macs / found.whole_macs:.3f} of the MACs, {len(found.layers)} layers in blocks"


def make_row(name: str, models: Structured, stem: Path) -> Row:
    """Zeros, training, files."""
    base, _, extra = name.partition("+")
    int8 = extra == INT8
    chosen = None if int8 or name in (DENSE, STRUCTURED) or name.startswith(PIVOT) else extra or base
    gating = chosen if is_gated(name) else None
    pattern = None if gating else chosen
    row, data = Row(name), models.data
    of_trained = bool(extra) and (int8 or (gating is not None and load_gating(gating).alone))
    if of_trained and base not in models.trained:  # its row was kept by an earlier run
        make_row(base, models, stem.with_name(file_stem(models.options.net, base)))
    model = copy.deepcopy(models.trained[base]) if of_trained else models.start(name)
    if not int8:
        if name.startswith(PIVOT):
            model, row.note = models.pivot(name)
        if pattern is not None:
            order_channels(model, INPUTS, trace_graph(model, INPUTS), pattern)
            record = sparsify_model(model, pattern)
            row.zeros = record.share
            if record.skipped:
                row.note = f"{len(record.skipped)} layers dense"
        elif gating is not None:
            model = gate_model(model, INPUTS, gating)
        if not (epochs := epochs_of(name, models.options)):
            row.before = evaluate_accuracy(model, data.test)
        else:
            result = recover_accuracy(
                model,
                data,
                teacher=models.net,
                epochs=epochs,
                lr=0.02,
                pattern=pattern,
                gating=gating,
                progress=show,
            )
            row.before, row.after = result.accuracy_before, result.accuracy_after
        if gating is not None:
            gated = settle_gates(model, INPUTS, data.calibration, gating)
            row.after = evaluate_accuracy(model, data.test)
            decided = decide_runs(model, INPUTS, [next(iter(data.test))])
            row.runs = {path: ran.tolist() for path, ran in decided.items()}
            row.note = f"{gated.macs_share:.0%} of the MACs; " + ", ".join(
                f"{name.rpartition('.')[0]} {gate.runs:.0%}" for name, gate in gated.gates.items()
            )
        models.trained[name] = model
    row.sizes = write_files(
        model, stem, INPUTS, as_arrays(data.calibration) if int8 else None,
        runtimes=[name for name in RUNTIMES if gating is None or name == "onnxruntime"],
    )  # fmt: skip
    if int8:
        path = stem.with_name(f"{stem.name}.onnx")
        row.after = evaluate_artifact(path, data.test, format="onnx")
    return row


def write_files(
    model: nn.Module,
    stem: Path,
    inputs: tuple[Tensor, ...],
    calibration: Any = None,
    *,
    sparse: bool = False,
    runtimes: Sequence[str] = tuple(RUNTIMES),
) -> dict[str, tuple[int, int]]:
    """The runtimes' formats. calibration: makes them int8. sparse: TFLite without zeros. returns: sizes by suffix."""
    sizes = {}
    for suffix in map(RUNTIMES.__getitem__, runtimes):
        path = stem.with_name(f"{stem.name}{suffix}")
        # unsigned activations are what ONNX Runtime is faster with on x86
        activations = "uint8" if suffix == ".onnx" else "int8"
        precision = Precision() if calibration is None else Precision(dtype="int8", activations=activations)
        artifact = export_model(
            model, inputs, path, format=suffix[1:], precision=precision, calibration=calibration,
            sparse=sparse and suffix == ".tflite",
        )  # fmt: skip
        assert artifact.compressed_bytes is not None
        sizes[suffix] = artifact.bytes, artifact.compressed_bytes
    return sizes


# --- the board -----------------------------------------------------------------------------------


def measure_rows(
    rows: Sequence[Row], net: str, target: Target, effort: Effort, kept: Path, images: Tensor | None = None
) -> None:
    """Each runtime's files in turns with its dense one; adds their shares to the rows. images: for gated rows."""
    for runtime, suffix in RUNTIMES.items():
        paths = {number: kept / f"{file_stem(net, row.name)}{suffix}" for number, row in enumerate(rows)}
        made = [number for number, path in paths.items() if suffix in rows[number].sizes]
        files = {f"{number}{suffix}": paths[number] for number in made}
        # The dense row's share is that of a copy: it tells how far equal files are measured apart.
        dense = f"dense{suffix}"
        first = next(number for number, row in enumerate(rows) if row.name == DENSE)
        files[dense] = files[f"{first}{suffix}"]
        log(f"  measuring {len(made)} files in {TITLES[runtime]}")
        gated = {number for number in made if is_gated(rows[number].name)}
        if gated:
            assert images is not None
            files["inputs.npz"] = write_inputs(files[dense], images, kept)
        with open_session(replace(target, runtime=runtime), space=f"bench-sparse-{runtime}") as session:
            session.push(files)
            steps = [
                Step(key=f"{number} {turn}", kind="inputs" if number in gated else "time",
                     artifact=f"{number}{suffix}", against=dense, inputs="inputs.npz" if number in gated else None,
                     seconds=effort.seconds * (INPUTS_TIMES if number in gated else 1), precision=effort.precision,
                     min_samples=effort.samples, steady=effort.steady)
                for turn in range(effort.repeats) for number in made
            ]  # fmt: skip
            results = {result.key: result for result in session.run(steps, job=f"sparse-{time.time_ns():x}")}
            session.remove(list(files))
        for number in made:
            row, rounds = rows[number], []
            for turn in range(effort.repeats):
                result = results[f"{number} {turn}"]
                if result.error is not None or result.samples is None or result.against is None:
                    raise RuntimeError(f"{row.name}: {result.error}")
                rounds.append((result.samples, result.against))
            if number in gated:
                ours, theirs = zip(*rounds, strict=True)
                found = over_inputs(ours, theirs, row.runs)
                row.shares[runtime], row.worst = found.mean_share, found.worst_share
            else:
                row.shares[runtime] = median(np.concatenate([turn_ratios(*pair) for pair in rounds]))


def is_gated(name: str) -> bool:
    """Whether a row's net decides per input."""
    return name.rpartition("+")[2].partition(":")[0] in list_members("gating")


def write_inputs(artifact: Path, images: Tensor, kept: Path) -> Path:
    """Images as the board takes them."""
    name = load_member("formats", "onnx").inspect(artifact).inputs[0].name
    path = kept / "inputs.npz"
    np.savez(path, **{name: images.numpy()})
    return path


# --- pointwise layers ----------------------------------------------------------------------------


def pointwise_net() -> nn.Module:
    """Depthwise and pointwise layers as in MobileNet (Howard et al., 2017), half as wide, with settled statistics."""

    def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False), nn.BatchNorm2d(inputs), nn.ReLU6(),
            nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU6(),
        )  # fmt: skip

    torch.manual_seed(0)
    shapes = [(16, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1),
              (256, 256, 1), (256, 512, 2), (512, 512, 1)]  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(), *(block(*shape) for shape in shapes),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def make_pointwise(kept: Path) -> list[Row]:
    """The net dense, with zeros, and with zeros that its TFLite file does not store."""
    inputs = (torch.zeros(1, 3, POINTWISE_SIDE, POINTWISE_SIDE),)
    note = kept / "pointwise.json"
    if note.is_file():
        return [Row(**row) for row in json.loads(note.read_text())]
    rows = []
    for sparsity in (0.0, 0.8, 0.9):
        net = pointwise_net()
        pattern = f"unstructured:sparsity={sparsity},layers=*.3"
        share = sparsify_model(net, pattern).share if sparsity else 0.0
        settle(net)
        for sparse in (False, True) if sparsity else (False,):
            row = Row(f"{pattern}{' stored sparsely' if sparse else ''}" if sparsity else DENSE, zeros=share)
            row.sizes = write_files(net, kept / file_stem("pointwise", row.name), inputs, sparse=sparse)
            rows.append(row)
    note.write_text(json.dumps([asdict(row) for row in rows]))
    return rows


def settle(net: nn.Module) -> None:
    """Random weights need batch-norm statistics, or every activation dies out."""
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    net.train()
    with torch.no_grad():
        net(torch.randn(8, 3, POINTWISE_SIDE, POINTWISE_SIDE, generator=torch.Generator().manual_seed(0)))
    net.eval()


# --- what it says --------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    """A share for people."""
    return "-" if value is None else f"{value:.1%}"


def describe(rows: Sequence[Row]) -> str:
    """The table; sizes in KiB, raw and compressed."""
    header = ["", "zeros", "before", "after", *(f"{TITLES[runtime]} / dense" for runtime in RUNTIMES), "worst"]
    header += [f"{suffix[1:]} KiB" for suffix in RUNTIMES.values()]
    cells = [
        [
            row.name, f"{row.zeros:.0%}", percent(row.before), percent(row.after),
            *(f"{row.shares[runtime]:.3f}" if runtime in row.shares else "-" for runtime in RUNTIMES),
            "-" if row.worst is None else f"{row.worst:.3f}",
            *(" / ".join(f"{size / 1024:.0f}" for size in row.sizes.get(suffix, ())) or "-"
              for suffix in RUNTIMES.values()),
        ]
        for row in rows
    ]  # fmt: skip
    return table(header, cells)


def verdict(runtime: str, rows: Sequence[Row]) -> str:
    """What a runtime makes of zeros, in a sentence, from nothing but the rows."""
    title = TITLES[runtime]
    zeros = [row for row in rows if row.zeros and not row.name.startswith(STRUCTURED)]
    if not zeros:
        return f"{title}: no row has zeros alone."
    best = min(zeros, key=lambda row: row.shares[runtime])
    worst = max(zeros, key=lambda row: row.shares[runtime])
    low, high = best.shares[runtime], worst.shares[runtime]
    if low < NOTICEABLE:
        said = f"zeros gain: {best.name} takes {low:.3f} of the dense latency"
        said += f", while {worst.name} takes {high:.3f}" if high >= NOTICEABLE else f", all of them at most {high:.3f}"
    else:
        said = f"zeros alone gain nothing ({low:.3f} to {high:.3f} of the dense latency)"
    others = [row for row in rows if row.name == STRUCTURED or row.name.endswith(INT8)]
    told = ", ".join(f"{row.name} {row.shares[runtime]:.3f}" for row in others)
    smallest = min(zeros, key=lambda row: row.sizes[RUNTIMES[runtime]][1])
    dense = next(row for row in rows if row.name == DENSE).sizes[RUNTIMES[runtime]][1]
    size = smallest.sizes[RUNTIMES[runtime]][1] / dense
    return f"{title}: {said}{f'; {told}' if told else ''}. Compressed, {smallest.name} is {size:.0%} of the dense file."


def aims(rows: Sequence[Row]) -> dict[str, dict[str, object]]:
    """Zeros compress, 2:4 keeps the accuracy, and equal files are measured as equal."""
    known = {row.name: row for row in rows}
    found = {}
    dense = known[DENSE]
    dense_accuracy = dense.before if dense.after is None else dense.after
    found["equal files apart by"] = aim(max(abs(share - 1) for share in dense.shares.values()), "<=", 0.02)
    if (sparse := known.get("unstructured:sparsity=0.9")) is not None:
        found["compressed size at 90 % zeros"] = aim(sparse.sizes[".onnx"][1] / dense.sizes[".onnx"][1], "<=", 0.4)
    if (half := known.get(N_M)) is not None and half.after is not None and dense_accuracy is not None:
        found["accuracy of 2:4 after training"] = aim(half.after, ">=", dense_accuracy - 0.02)
    for row in (row for row in rows if row.worst is not None and not row.name.startswith(STRUCTURED)):
        found[f"mean share, {row.name}"] = aim(row.shares["onnxruntime"], "<=", 0.75)
        found[f"worst share, {row.name}"] = aim(row.worst, "<=", 1.03)
        if row.after is not None and dense_accuracy is not None:
            found[f"accuracy, {row.name}"] = aim(row.after, ">=", dense_accuracy - 0.01)
    return found


if __name__ == "__main__":
    main()
