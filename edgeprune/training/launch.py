"""Recovery of a run in several processes: `edgeprune recover` on the files in its folder, begun by a launcher."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

from edgeprune.core.errors import UsageError
from edgeprune.core.records import RecoverResult
from edgeprune.core.runfile import RunFile
from edgeprune.core.runfolder import RunFolder
from edgeprune.core.store import read_record


def check_launcher(launch: tuple[str, ...]) -> None:
    """raises: UsageError for a launcher that is not there."""
    if launch and shutil.which(launch[0]) is None:
        raise UsageError(
            f"[recover] launch: there is no program '{launch[0]}'; `accelerate` comes with pip install "
            "'edgeprune[accelerate]'"
        )


def recover_command(run: RunFile, model: Path, out: Path, epochs: int) -> list[str]:
    """The command line that trains a run's compact model as its [recover] says, from the folder of the run file.

    model: a .pt2 file. out: the folder that it writes into.
    """
    settings, dense = run.recover, run.model
    options = {"data": run.data.source, "out": out, "epochs": epochs, "lr": settings.lr, "seed": run.training_seed}
    options |= settings.options
    if settings.distil:
        options |= {"teacher": dense.factory or dense.file}
        options |= {} if dense.weights is None else {"teacher-weights": dense.weights}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += [word for shape in dense.inputs for word in ("--input", "x".join(map(str, shape)))]
    return [*settings.launch, "-m", "edgeprune", "recover", str(model), *words]


def launch_recovery(run: RunFile, base: Path, folder: RunFolder, epochs: int) -> RecoverResult:
    """Train the compact model of a run's folder, which leaves `recovered.*` there. base: where the run file lies.

    raises: UsageError when the launcher, or what it starts, fails.
    """
    out = folder.path.resolve()
    command = recover_command(run, out / "compact.pt2", out, epochs)
    folder.log(f"recover: {shlex.join(command)}")
    run_command(command, base)
    return read_record(RecoverResult, out / "recover.json")


def run_command(command: list[str], folder: Path) -> None:
    """Run it in a folder to its end; an interruption ends it too. raises: UsageError when it fails."""
    process = subprocess.Popen(command, cwd=folder)
    try:
        code = process.wait()
    except BaseException:
        process.terminate()  # launchers pass it on to what they have started
        process.wait()
        raise
    if code:
        raise UsageError(f"`{shlex.join(command)}` ended with exit code {code}; what it said is above")
