"""The command line: what it says to a user who gets something wrong, and what the README promises."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command import edgeprune, edgeprune_process

from edgeprune.core.effort import EFFORTS

ROOT = Path(__file__).parent.parent
NETS = """
import os

import torch
from torch import nn


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    )


def wide():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 96, 3, padding=1), nn.ReLU(),
        nn.Conv2d(96, 96, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 5),
    )


def doubled():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 24, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    )


def noisy():
    os.write(1, b"a line of a native library\\n")
    return net()


def broken():
    raise RuntimeError("no such checkpoint")


def number():
    return 3


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()[:5]
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        if x.sum() > 0:
            x = x * 2
        return self.head(self.body(x).mean((2, 3)))


def branching():
    return Branching()
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a model, its data and nothing else."""
    (tmp_path / "nets.py").write_text(NETS)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=rng.normal(size=(60, 3, 12, 12)).astype(np.float32), y=rng.integers(0, 5, 60))
    return tmp_path


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, contextlib, io\n"
        "sys.argv = ['edgeprune', '--help']\n"
        "from edgeprune.cli import run_command\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out: run_command()\n"
        "assert 'Commands' in out.getvalue()\n"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'scipy', 'paramiko', 'plotly'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_every_command_is_in_the_readme() -> None:
    from typer.main import get_command

    from edgeprune.cli import app

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert {"demo", "run", "trace", "profile", "plan", "targets"} <= set(commands)
    for name in commands:
        assert f"edgeprune {name}" in readme, f"README.md does not name `edgeprune {name}`"
    for name in commands["targets"].commands:
        assert f"edgeprune targets {name}" in readme, f"README.md does not name `edgeprune targets {name}`"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nosuch"], 2, "No such command"),
        (["trace"], 2, "Missing argument"),
        (["trace", "nets.py:net"], 4, "input shapes are not given"),
        (["trace", "nets.py:net", "--input", "1xthree"], 2, "expected sizes such as 1x3x224x224"),
        (["trace", "nets.py:net", "--input", "1x4x12x12"], 4, "does not run on inputs of shape"),
        (["trace", "absent.py:net", "--input", "1x3x12x12"], 4, "absent.py"),
        (["trace", "nets.py:nothing", "--input", "1x3x12x12"], 4, "nothing"),
        (["trace", "nets.py:broken", "--input", "1x3x12x12"], 4, "no such checkpoint"),
        (["trace", "nets.py:number", "--input", "1x3x12x12"], 4, "expected a torch.nn.Module"),
        (["trace", "nets.py:branching", "--input", "1x3x12x12"], 4, "if x.sum() > 0"),
        (["score", "nets.py:net", "--input", "1x3x12x12", "--data", "data.npz", "-o", "i.json", "--criterion", "nope"],
         2, "known: "),
        (["score", "nets.py:net", "--input", "1x3x12x12", "--data", "data.npz", "-o", "i.json",
          "--executor", "here:n=1"], 2, "is not an option of here"),
        (["plan", "nets.py:net", "--input", "1x3x12x12", "--profile", "absent.jsonl", "--importance", "i.json",
          "-o", "plan.json", "--latency", "0.5x", "--executor", "processes:workers=two"], 2, "expected int"),
        (["profile", "nets.py:net", "--input", "1x3x12x12", "--target", "nope", "-o", "p.jsonl"], 2, "known: "),
        (["plan", "nets.py:net", "--input", "1x3x12x12", "--profile", "absent.jsonl", "--importance", "i.json",
          "-o", "plan.json", "--latency", "0.5x"], 4, "absent.jsonl"),
        (["trace", "nets.py:net", "--input", "1x3x12x12", "--freeze", "nope"], 2, "no group of channels matches"),
        (["sparsify", "nets.py:net", "--input", "1x3x12x12", "--pattern", "n_m:n=5,m=4", "-o", "s"], 2, "less than m"),
        (["gate", "nets.py:net", "--input", "1x3x12x12", "--gate", "block_skip", "--data", "data.npz", "-o", "g"], 4,
         "no residual branch"),
        (["gate", "nets.py:net", "--input", "1x3x12x12", "--gate", "early_exit:at=2", "--data", "data.npz", "-o", "g"],
         2, "must lie between 0 and 1"),
        (["pivot", "nets.py:net", "--input", "1x3x12x12", "-o", "s", "--groups", "two"], 2, "numbers such as 2,4,8"),
        (["pivot", "nets.py:net", "--input", "1x3x12x12", "-o", "s", "--groups", "2,4"], 2, "are for a plan"),
        (["pivot", "nets.py:net", "--input", "1x3x12x12", "-o", "s", "--latency", "0.7x"], 2, "go together"),
        (["pivot", "nets.py:net", "--input", "1x3x12x12", "-o", "s", "--groups", "7"], 4, "blocks do not divide"),
        (["sparsify", "nets.py:net", "--input", "1x3x12x12", "--pattern", "n_m:m=7", "-o", "s"], 4, "not divisible"),
        (["export", "nets.py:net", "--input", "1x3x12x12", "-o", "m.onnx", "--sparse"], 2, "store every zero"),
        (["recover", "nets.py:net", "--input", "1x3x12x12", "--data", "data.npz", "-o", "r", "--ema", "1"], 2,
         "below 1"),
        (["recover", "nets.py:net", "--input", "1x3x12x12", "--data", "data.npz", "-o", "r", "--features", "1"], 2,
         "give it as the teacher"),
        (["run", "absent.toml"], 2, "there is no absent.toml"),
        (["targets", "check", "nope"], 2, "known: "),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None,
)  # fmt: skip
def test_bad_input_is_one_sentence_and_an_exit_code(
    project: Path,
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    before = {p.name for p in project.iterdir()}
    done = edgeprune(*arguments, cwd=project)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    left = {p.name for p in project.iterdir()} - before - {"__pycache__"}
    assert not left, f"left behind: {left}"


def test_trace_prints_groups_and_writes_the_record(project: Path) -> None:
    from edgeprune.core.records import Graph
    from edgeprune.core.store import read_record

    done = edgeprune("trace", "nets.py:net", "--input", "1x3x12x12", "-o", "graph.json", cwd=project)
    assert done.returncode == 0, done.stderr
    assert "2 groups can be pruned" in done.stdout
    graph = read_record(Graph, project / "graph.json")
    assert sorted(group.units for group in graph.prunable) == [16, 24]


@pytest.mark.slow
@pytest.mark.device
def test_stage_by_stage(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of the pipeline after the other, as the README lists them, on the embedded board."""
    from edgeprune.core.records import Graph, Importance, Plan, Report, Sparsity
    from edgeprune.core.store import read_record

    monkeypatch.setitem(EFFORTS, "quick", replace(EFFORTS["quick"], repeats=2, seconds=0.1, precision=None))
    net, data = ("nets.py:wide", "--input", "1x3x12x12"), ("--data", "data.npz")
    board = ("--target", "embedded", "--effort", "quick")
    tables, scores = ("--profile", "profile.jsonl"), ("--importance", "importance.json")
    limits = ("--latency", "0.8x", "--size", "0.6x")
    for arguments in (
        ("trace", *net, "-o", "graph.json"),
        ("profile", *net, *board, "--configurations", "6", "--held-out", "2", "-o", "profile.jsonl"),
        ("score", *net, *data, "--executor", "processes:workers=1", "-o", "importance.json"),
        ("plan", *net, *tables, *scores, *limits, *data, "--trials", "3", *board, "-o", "plan.json"),
        ("compact", *net, "--plan", "plan.json", *data, "-o", "small"),
        ("sparsify", "small/compact.pt2", "--pattern", "unstructured:sparsity=0.5", "-o", "sparse"),
        ("recover", "sparse/sparse.pt2", *data, "--teacher", "nets.py:wide", "--epochs", "1", "-o", "trained"),
        ("export", *net, "-o", "dense.onnx"),
        ("export", "trained/recovered.pt2", "-o", "model.onnx"),
    ):
        done = edgeprune(*arguments, cwd=project)
        assert done.returncode == 0, (arguments, done.stderr)
    several = ("plan", *net, *tables, *scores, "-o", "several.json", "--latency")
    for loop in ((*data, "--trials", "2", *board), ()):
        done = edgeprune(*several, "0.9x, 0.7x", *loop, cwd=project)
        assert done.returncode == 0, done.stderr
        assert "several-0.9x.json" in done.stdout and "several-0.7x.json" in done.stdout
        wide, narrow = (read_record(Plan, project / f"several-{limit}.json") for limit in ("0.9x", "0.7x"))
        assert wide.predicted.latency_s.median > narrow.predicted.latency_s.median  # type: ignore[union-attr]
        assert bool(wide.rounds) == bool(narrow.rounds) == bool(loop), "the board is asked for each, or for none"
    assert wide.loss < narrow.loss
    (project / "several-0.9x.json").unlink()
    done = edgeprune(*several, "0.9x,0.001x", "--json", cwd=project)
    assert done.returncode == 1 and "several-0.001x.json" in done.stderr
    assert json.loads(done.stdout)["several-0.9x.json"]["widths"] == wide.widths
    assert read_record(Plan, project / "several-0.9x.json").widths == wide.widths
    assert not (project / "several-0.001x.json").exists()
    for wrong in ("0.9x,fast", "0.9x,", "0.9x/../a,0.5x"):
        assert edgeprune(*several, wrong, cwd=project).returncode == 2, wrong
    validated = edgeprune(
        "validate", "model.onnx", *board, "--model", "trained/recovered.pt2", "--dense", "dense.onnx", "--plan",
        "plan.json", *data, "--sparsity", "sparse/sparsity.json", "-o", "report.json", "--json",
        cwd=project,
    )  # fmt: skip
    report = read_record(Report, project / "report.json")
    assert validated.returncode == (0 if report.passed else 1), validated.stderr
    assert json.loads(validated.stdout)["artifact_sha256"] == report.artifact_sha256
    graph, plan = read_record(Graph, project / "graph.json"), read_record(Plan, project / "plan.json")
    assert (
        plan.rounds
        and plan.graph_sha256 == graph.model_sha256 == read_record(Importance, project / "importance.json").graph_sha256
    )
    by_name = {check.name: check for check in report.checks}
    assert by_name["numeric error"].passed and by_name["artifact size"].passed
    assert report.compact.artifact_bytes is not None and report.dense.artifact_bytes is not None
    assert report.compact.artifact_bytes < 0.65 * report.dense.artifact_bytes
    assert report.sparsity == read_record(Sparsity, project / "sparse" / "sparsity.json")
    evidence = ("--report", "report.json", "--plan", "plan.json", "--license", "MIT")
    done = edgeprune("bundle", "model.onnx", *data, *evidence, "--for", "python", "-o", "bundle.zip", cwd=project)
    assert done.returncode == 0, done.stderr
    assert edgeprune("bundle", "verify", "bundle.zip", "--on", "embedded", cwd=project).returncode == 0


def test_stdout_is_ours_alone(project: Path) -> None:
    done = edgeprune_process("trace", "nets.py:noisy", "--input", "1x3x12x12", "--json", cwd=project)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["groups"]) >= 2
    assert "a line of a native library" in done.stderr


def test_a_part_of_a_model_that_cannot_be_exported(project: Path) -> None:
    """Traced, scored without labels and planned as if it were the model; the whole says what to do."""
    model = ("nets.py:branching", "--input", "1x3x12x12")
    whole = edgeprune("trace", *model, cwd=project)
    assert whole.returncode == 4 and "--scope" in whole.stderr
    part = edgeprune("trace", *model, "--scope", "body", cwd=project)
    assert part.returncode == 0, part.stderr
    assert re.search(r"^0 +16 ", part.stdout, re.M) and "1 groups can be pruned" in part.stdout
    wrong = edgeprune("trace", *model, "--scope", "bodi", cwd=project)
    assert wrong.returncode == 4 and "it has body, head" in wrong.stderr
    scored = edgeprune(
        "score", *model, "--scope", "body", "--data", "data.npz", "--criterion", "reconstruction", "--no-curves",
        "-o", "importance.json", cwd=project,
    )  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    scores = json.loads((project / "importance.json").read_text())["record"]["scores"]
    assert list(scores) == ["0"] and "1 groups scored by reconstruction" in scored.stdout


def test_a_part_of_a_model_learns_the_outputs_of_the_whole_ones(project: Path) -> None:
    """`recover --scope`: a smaller body comes nearer to what the dense one computes, without labels."""
    import torch

    from edgeprune import compact_model, enter_scope, load_model, save_compact, trace_graph
    from edgeprune.core.records import ModelSpec

    images = torch.zeros(2, 3, 12, 12)
    model = load_model(ModelSpec(factory="nets.py:branching", inputs=((2, 3, 12, 12),)), project)
    body, inputs = enter_scope(model, "body", (images,))
    graph = trace_graph(body, inputs)
    keep = {group.name: list(range(group.units * 3 // 4)) for group in graph.prunable}
    save_compact(compact_model(body, inputs, graph, keep), inputs, project / "small")
    recover = ("recover", "small/compact.pt2", "--data", "data.npz", "--epochs", "2", "--lr", "0.1", "-o", "out")
    alone = edgeprune(*recover, "--scope", "body", cwd=project)
    assert alone.returncode == 2 and "name that with --teacher" in alone.stderr
    done = edgeprune(*recover, "--scope", "body", "--teacher", "nets.py:branching", "--input", "2x3x12x12", cwd=project)
    assert done.returncode == 0, done.stderr
    found = re.search(r"difference from the dense outputs ([\d.]+)% -> ([\d.]+)%: out/recovered.pt2", done.stdout)
    assert found and float(found[2]) < float(found[1]), done.stdout


def test_an_output_folder_that_cannot_be_written(project: Path) -> None:
    (project / "file").write_text("")
    done = edgeprune("trace", "nets.py:net", "--input", "1x3x12x12", "-o", "file/graph.json", cwd=project)
    assert done.returncode == 2
    assert "choose another output directory" in done.stderr


def test_an_altered_record_is_refused(project: Path) -> None:
    score = ["score", "nets.py:net", "--input", "1x3x12x12", "--data", "data.npz", "-o", "importance.json"]
    assert edgeprune(*score, "--criterion", "magnitude:p=1", cwd=project).returncode == 0
    path = project / "importance.json"
    path.write_text(path.read_text().replace('"magnitude', '"magnitudo'))
    done = edgeprune("plan", "nets.py:net", "--input", "1x3x12x12", "--profile", "importance.json", "--importance",
                     "importance.json", "-o", "plan.json", "--latency", "0.5x", cwd=project)  # fmt: skip
    assert done.returncode == 4
    assert "importance.json" in done.stderr
    assert not (project / "plan.json").exists()


def test_units_trained_to_zero_are_counted_and_their_weights_load(project: Path) -> None:
    from edgeprune.core.records import Importance
    from edgeprune.core.store import read_record

    recover = ["recover", "nets.py:net", "--input", "1x3x12x12", "--data", "data.npz", "-o", "sparse", "--epochs", "2"]
    done = edgeprune(*recover, "--regularizer", "greg:ratio=0.5", cwd=project)
    assert done.returncode == 0, done.stderr
    assert "20 units in 2 groups are zero" in done.stdout
    score = ["score", "nets.py:net", "--input", "1x3x12x12", "--data", "data.npz", "-o", "i.json", "--no-curves"]
    done = edgeprune(*score, "--criterion", "lamp", "--weights", "sparse/recovered.safetensors", cwd=project)
    assert done.returncode == 0, done.stderr
    scores = read_record(Importance, project / "i.json").scores
    assert sorted(int((values == 0).sum()) for values in scores.values()) == [8, 12]


def test_recovery_from_scratch_with_the_work_of_the_dense_model_and_all_additions(project: Path) -> None:
    from edgeprune.core.records import RecoverResult
    from edgeprune.core.runfolder import RunFolder
    from edgeprune.core.store import read_record

    recover = ["recover", "nets.py:net", "--input", "1x3x12x12", "--data", "data.npz", "-o", "out", "--epochs", "1"]
    done = edgeprune(*recover, "--start", "scratch", "--budget", "macs", cwd=project)
    assert done.returncode == 2 and "name that with --teacher" in done.stderr
    done = edgeprune(*recover, "--budget", "macs", "--teacher", "nets.py:wide", cwd=project)
    assert done.returncode == 2 and "is for start = 'scratch'" in done.stderr
    options = ("--ema", "0.9", "--label-smoothing", "0.1", "--mixup", "0.2", "--features", "1")
    scratch = ("--start", "scratch", "--budget", "macs", "--teacher", "nets.py:doubled", *options)
    done = edgeprune(*recover, *scratch, cwd=project)
    assert done.returncode == 0, done.stderr
    assert "2 epochs, as much arithmetic as those of the dense model" in done.stdout and "accuracy" in done.stdout
    assert read_record(RecoverResult, project / "out" / "recover.json").epochs == 2
    with RunFolder(project / "out").locked(".recover.lock"):
        done = edgeprune(*recover, *scratch, cwd=project)
    assert done.returncode == 2 and "another edgeprune is running in out" in done.stderr


def test_gates_are_trained_saved_and_exported(project: Path) -> None:
    made = edgeprune("gate", "nets.py:net", "--input", "1x3x12x12", "--gate", "early_exit:at=0.5,rate=0.5", "--data",
                     "data.npz", "--epochs", "1", "-o", "gated", cwd=project)  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "an input needs" in made.stdout and "accuracy" in made.stdout
    assert {file.name for file in (project / "gated").iterdir()} == {"gated.pt2", "gated.safetensors", "gating.json"}
    done = edgeprune("export", "gated/gated.pt2", "-o", "model.onnx", cwd=project)
    assert done.returncode == 0, done.stderr
    done = edgeprune("inspect", "model.onnx", cwd=project)
    assert done.returncode == 0 and "If" in done.stdout, done.stderr
    done = edgeprune("export", "gated/gated.pt2", "-o", "model.tflite", cwd=project)
    assert done.returncode == 2 and "no branches" in done.stderr, done.stderr


def test_a_pattern_at_once_and_trained(project: Path) -> None:
    from safetensors.torch import load_file

    from edgeprune.core.records import Sparsity
    from edgeprune.core.store import read_record

    sparsify = ["sparsify", "nets.py:net", "--input", "1x3x12x12", "--pattern", "unstructured:sparsity=0.75", "-o"]
    done = edgeprune(*sparsify, "once", cwd=project)
    assert done.returncode == 0, done.stderr
    assert "2,916 of 4,008 weights are zero (72.8%)" in done.stdout and "dense: small: 120 weights" in done.stdout
    done = edgeprune(*sparsify, "trained", "--data", "data.npz", "--epochs", "1", cwd=project)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout and not (project / "trained" / "sparsify.checkpoint").exists()
    once, trained = (load_file(project / folder / "sparse.safetensors") for folder in ("once", "trained"))
    for name, layer in read_record(Sparsity, project / "trained" / "sparsity.json").layers.items():
        assert int((trained[name] == 0).sum()) == layer.zeros == int((once[name] == 0).sum())
        assert not bool((trained[name] == once[name]).all()), "it trained"
    done = edgeprune("export", "trained/sparse.pt2", "--input", "1x3x12x12", "-o", "model.onnx", cwd=project)
    assert done.returncode == 0 and "compressed" in done.stdout, done.stderr


def test_layers_in_blocks(project: Path) -> None:
    pivot = ["pivot", "nets.py:net", "--input", "1x3x12x12", "-o", "blocks", "--data", "data.npz"]
    done = edgeprune(*pivot, "--groups", "4", cwd=project)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^3 +4 ", done.stdout, re.M), "layer 3 in 4 blocks"
    assert "3 inputs and 16 outputs, which 4 blocks do not divide" in done.stdout and "MACs" in done.stdout
    done = edgeprune("export", "blocks/pivoted.pt2", "-o", "model.onnx", cwd=project)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a small disk")
@pytest.mark.parametrize("command", ["trace", "export"])
def test_full_output_disk(project: Path, command: str) -> None:
    """One sentence and exit code 2; nothing half-written lies there, and with room the same command works."""
    disk = project / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], check=True)
    try:
        (disk / "ballast").write_bytes(bytes(60 * 1024))
        out = disk / ("result.onnx" if command == "export" else "result.json")
        arguments = [command, "nets.py:net", "--input", "1x3x12x12", "--out", str(out)]
        done = edgeprune(*arguments, cwd=project)
        assert done.returncode == 2, done.stderr
        assert "No space left" in done.stderr and "Traceback" not in done.stderr
        assert [path.name for path in disk.iterdir()] == ["ballast"]
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert edgeprune(*arguments, cwd=project).returncode == 0
        assert len(list(disk.iterdir())) == 2
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
