"""How this bundle's model runs: LiteRT (ai_edge_litert), or an older TensorFlow Lite runtime where that is there."""

from pathlib import Path
from typing import List

import numpy as np

try:
    from ai_edge_litert.interpreter import Interpreter
except ImportError:
    try:
        from tflite_runtime.interpreter import Interpreter
    except ImportError:
        from tensorflow.lite import Interpreter


class Model:
    """A loaded model; arrays go in and come out in the order of the manifest."""

    def __init__(self, path: Path, threads: int) -> None:
        self._interpreter = Interpreter(str(path), num_threads=threads)
        self._interpreter.allocate_tensors()
        self._inputs = [value["index"] for value in self._interpreter.get_input_details()]
        self._outputs = [value["index"] for value in self._interpreter.get_output_details()]

    def run(self, inputs: List[np.ndarray]) -> List[np.ndarray]:
        for index, array in zip(self._inputs, inputs):
            self._interpreter.set_tensor(index, array)
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(index) for index in self._outputs]
