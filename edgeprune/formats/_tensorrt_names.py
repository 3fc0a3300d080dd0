"""From TensorRT's names of its layers to the ONNX operations they compute.

    Conv_0 + Relu_1                                      fused, in this order
    /a/Conv || /b/Conv                                   side by side, on one input
    PWN(PWN(/Sub), PWN(/Div))                            pointwise operations
    conv1.weight + QuantizeLinear_7 + Conv_9             an initialiser among them
    Reformatting CopyNode for Input Tensor 0 to Conv_0   a change of layout before (Output: after) a layer
    {ForeignNode[/a/MatMul.../b/Add]}                    all from the first to the last, compiled as a whole
    __myl_Conv_myl0_3 [ONNX Layer: /a/Conv]              of the compiler's making, with the engine's own note
source: published logs of trtexec 8.2 to 10 (tests/fixtures/tensorrt).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

NOTE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
FOREIGN = re.compile(r"\{ForeignNode\[(.+?)\.\.\.(.+?)\]\}")
COPY = re.compile(r"^Reformatting CopyNode for (?:Input|Output) Tensor \d+ to ")
SEPARATOR = re.compile(r" \+ | \|\| |, |[(){}\[\]]")
PREFIX = re.compile(r"^(?:copied_)?(?:un)?(?:squeeze|reshape)_(?:node_)?(?:before|after)_")
SUFFIX = re.compile(r"(?:_clone_\d+| copy)$")


def find_nodes(layer: str, order: Mapping[str, int]) -> list[str]:
    """Names of the ONNX operations in a layer's name, each once; empty where it names none.

    order: the model's operations, name -> place.
    """
    named = [name for name in NOTE.findall(layer) if name in order]
    if named:
        return list(dict.fromkeys(named))
    text = COPY.sub("", layer)
    for foreign in FOREIGN.finditer(text):
        ends = [name for name in foreign.groups() if name in order]
        if len(ends) == 2:
            first, last = sorted(order[name] for name in ends)
            named += [name for name, place in order.items() if first <= place <= last]
        named += ends
    for token in SEPARATOR.split(FOREIGN.sub("", text)):
        candidates = (token.strip(), PREFIX.sub("", token.strip()), SUFFIX.sub("", token.strip()))
        named += [name for name in candidates if name in order]
    return list(dict.fromkeys(named))
