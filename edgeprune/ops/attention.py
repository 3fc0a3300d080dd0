"""Attention: whole heads are channels, and so are what queries and keys, or values, have within a head."""

from __future__ import annotations

from edgeprune.ops import Axes, Call, Rule, Value


def attention(call: Call) -> Axes:
    """softmax(query key^T) value over (..., heads, tokens, depth); heads pass, and so does the values' depth."""
    query, key, value = call.value("query"), call.value("key"), call.value("value")
    if call.plain("scale") is None:  # follows the depth
        call.freeze(query.axes[-1], "is summed in attention")
    call.contract_any(query, len(query.shape) - 1, key, len(key.shape) - 1)
    for tensor in (query, key, value):
        call.freeze(tensor.axes[-2], "is summed in attention")
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
    axes = (*batch, None, value.axes[-1])
    call.masked = call.product_masked(axes, (value, value.axes))
    return axes


RULES: dict[str, Rule] = {"scaled_dot_product_attention": attention}
