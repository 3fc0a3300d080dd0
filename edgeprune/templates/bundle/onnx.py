"""How this bundle's model runs: ONNX Runtime on the processor."""

from pathlib import Path
from typing import List

import numpy as np
import onnxruntime


class Model:
    """A loaded model; arrays go in and come out in the order of the manifest."""

    def __init__(self, path: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._names = [value.name for value in self._session.get_inputs()]

    def run(self, inputs: List[np.ndarray]) -> List[np.ndarray]:
        return list(self._session.run(None, dict(zip(self._names, inputs))))
