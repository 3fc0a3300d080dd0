"""einsum: a letter is a channel axis that passes, is shared, or is summed."""

from __future__ import annotations

from edgeprune.ops import Axes, Axis, Call, NoRule, Rule, Value


def einsum(call: Call) -> Axes:
    """One operand or two, a letter once in each; what is summed needs an operand whose removed channels are zero."""
    terms, arrow, out = call.plain("equation").replace(" ", "").partition("->")
    operands: list[Value] = call.plain("tensors")
    letters = terms.split(",")
    if not arrow or "." in terms or len(operands) > 2 or any(len(set(term)) < len(term) for term in letters):
        raise NoRule("an equation with '...', a diagonal, three operands or no result")
    axes: dict[str, Axis] = {}
    for letter in dict.fromkeys("".join(letters)):
        places = [(v, t.index(letter)) for v, t in zip(operands, letters, strict=True) if letter in t]
        if len({value.shape[axis] for value, axis in places}) > 1:
            raise NoRule("an axis that is broadcast")
        (first, axis), (second, other) = places[0], places[-1]
        if letter in out:
            axes[letter] = first.axes[axis] if len(places) == 1 else call.tie(first.axes[axis], second.axes[other])
        elif len(places) == 2:
            call.contract_any(first, axis, second, other)
        elif not first.masked:
            call.freeze(first.axes[axis], "is summed")
    result = tuple(axes[letter] for letter in out)
    factors = [
        (value, tuple(value.axes[term.index(letter)] if letter in term else None for letter in out))
        for value, term in zip(operands, letters, strict=True)
    ]
    call.masked = call.product_masked(result, *factors)
    return result


RULES: dict[str, Rule] = {"einsum": einsum}
