"""Attention: whole heads are channels; what is summed within a head is not."""

from __future__ import annotations

from edgeprune.ops import Axes, Call, Rule, Value


def attention(call: Call) -> Axes:
    """softmax(query key^T) value over (..., heads, tokens, depth); heads pass, and so does the values' depth."""
    query, key, value = call.value("query"), call.value("key"), call.value("value")
    for tensor, axis in ((query, -1), (key, -1), (query, -2), (key, -2), (value, -2)):
        call.freeze(tensor.axes[axis], "is summed in attention")
    batch = list(query.axes[:-2])
    sources: list[Value] = [key, value]
    if (mask := call.optional("attn_mask")) is not None:
        sources.append(mask)
    for source in sources:
        for back in range(3, min(len(query.shape), len(source.shape)) + 1):
            if source.shape[-back] == query.shape[-back]:
                axis = len(batch) - (back - 2)
                batch[axis] = call.tie(batch[axis], source.axes[-back])
            else:
                call.freeze(source.axes[-back], "is shared between heads")
                call.freeze(query.axes[-back], "is shared between heads")
    return (*batch, None, value.axes[-1])


RULES: dict[str, Rule] = {"scaled_dot_product_attention": attention}
