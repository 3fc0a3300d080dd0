"""Run the model of this bundle: python example.py [INPUT.npy]. Needs numpy and onnxruntime, nothing else."""

import hashlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

here = Path(__file__).parent
manifest = json.loads((here / "manifest.json").read_text(encoding="utf-8"))
for name, expected in manifest["files"].items():
    if hashlib.sha256((here / name).read_bytes()).hexdigest() != expected["sha256"]:
        sys.exit(f"{name} was altered; unpack the bundle again")


def prepare(array: np.ndarray, info: dict[str, Any]) -> np.ndarray:
    """Integers are raw data and are scaled and normalised; floats go in as they are."""
    if np.issubdtype(array.dtype, np.integer) and info["dtype"].startswith("float"):
        steps = manifest["preprocessing"]
        array = array.astype(info["dtype"]) * np.float32(steps.get("scale", 1.0))
        per_channel = (1, -1, *(1,) * (array.ndim - 2))
        array = array - np.reshape(steps.get("mean", [0.0]), per_channel)
        array = array / np.reshape(steps.get("std", [1.0]), per_channel)
    return np.ascontiguousarray(array, dtype=info["dtype"])


options = onnxruntime.SessionOptions()
options.intra_op_num_threads = manifest["measured"]["conditions"]["threads"]
session = onnxruntime.InferenceSession(here / manifest["model"], options, providers=["CPUExecutionProvider"])

feeds = {}
for info in manifest["inputs"]:
    shape = [max(size, 1) for size in info["shape"]]
    feeds[info["name"]] = np.random.default_rng(0).standard_normal(shape).astype(info["dtype"])
if len(sys.argv) > 1:
    first = manifest["inputs"][0]
    feeds[first["name"]] = prepare(np.load(sys.argv[1], allow_pickle=False), first)

seconds = []
for _ in range(20):
    start = time.perf_counter()
    outputs = session.run(None, feeds)
    seconds.append(time.perf_counter() - start)

labels = (here / "labels.txt").read_text(encoding="utf-8").splitlines() if (here / "labels.txt").exists() else []
best = int(np.argmax(outputs[0][0]))
print(f"top-1: {best} {labels[best] if best < len(labels) else ''} (output {float(outputs[0][0].flat[best]):.6g})")
print(f"latency: {statistics.median(seconds) * 1e3:.3f} ms, median of {len(seconds)}")
