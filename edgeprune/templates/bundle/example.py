"""Run the model of this bundle: python example.py [INPUT.npy] [--save OUTPUTS.npz]

Without an input the recorded one, whose outputs are held against the recorded ones (exit code 1 when
they differ). Needs numpy and what runtime.py imports, nothing else.
"""

import argparse
import hashlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
from runtime import Model

here = Path(__file__).resolve().parent
manifest = json.loads((here / "manifest.json").read_text(encoding="utf-8"))


def prepare(array: np.ndarray, info: Dict[str, Any]) -> np.ndarray:
    """An array in the input's layout: whole numbers are raw and get normalised, all but the input's own type."""
    if array.dtype == info["dtype"]:
        return np.ascontiguousarray(array)
    if array.dtype.kind in "iu" and info["normalisation"]:
        steps, shape = info["normalisation"], [1] * array.ndim
        shape[info["layout"].index("C")] = -1
        array = array * steps.get("scale", 1.0) - np.reshape(steps.get("mean", [0.0]), shape)
        array = array / np.reshape(steps.get("std", [1.0]), shape)
    if info["scale"] is not None:
        limits = np.iinfo(info["dtype"])
        array = np.clip(np.rint(array / info["scale"]) + info["zero_point"], limits.min, limits.max)
    return np.ascontiguousarray(array, dtype=info["dtype"])


def value_of(array: np.ndarray, info: Dict[str, Any]) -> np.ndarray:
    """What an output's numbers stand for."""
    return array if info["scale"] is None else (array.astype(np.float32) - info["zero_point"]) * info["scale"]


def recorded(kind: str) -> List[np.ndarray]:
    """The arrays of the bundle's recorded run: `inputs` or `outputs`."""
    entries = manifest["example"][kind]
    return [np.fromfile(here / e["file"], np.dtype(e["dtype"]).newbyteorder("<")).reshape(e["shape"]) for e in entries]


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("input", nargs="?", help="array of the first input, in the manifest's layout")
parser.add_argument("--save", help="write all outputs here (.npz)")
options = parser.parse_args()

for name, expected in manifest["files"].items():
    if (here / name).is_file() and hashlib.sha256((here / name).read_bytes()).hexdigest() != expected["sha256"]:
        sys.exit(f"{name} was altered; unpack the bundle again")

inputs = recorded("inputs")
if options.input:
    inputs[0] = prepare(np.load(options.input, allow_pickle=False), manifest["inputs"][0])
model = Model(here / manifest["model"], manifest["measured"]["conditions"]["threads"])
seconds = []
for _ in range(20):
    start = time.perf_counter()
    outputs = model.run(inputs)
    seconds.append(time.perf_counter() - start)
if options.save:
    np.savez(options.save, *outputs)

scores = value_of(outputs[0], manifest["outputs"][0])[0].reshape(-1)
best = int(np.argmax(scores))
labels = (here / "labels.txt").read_text(encoding="utf-8").splitlines() if manifest["labels"] else []
print(f"top-1: {best} {labels[best] if best < len(labels) else ''} (output {float(scores[best]):.6g})")
print(f"latency: {statistics.median(seconds) * 1e3:.3f} ms, median of {len(seconds)}")
if not options.input:
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(outputs, recorded("outputs"))]
    error = max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-12)) for a, b in pairs)
    allowed = manifest["example"]["tolerance"]
    print(f"recorded outputs: {error:.2g} off, relative; allowed {allowed:g}")
    sys.exit(not error <= allowed)
