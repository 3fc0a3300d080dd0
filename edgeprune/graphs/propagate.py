"""Channel ids followed through a captured graph by the rules of `ops`."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils import _pytree as pytree

from edgeprune.core.records import IntArray
from edgeprune.core.units import Units
from edgeprune.graphs.capture import operator_name, shares_memory, writes_memory
from edgeprune.ops import Axes, Call, NoRule, Rule, Symbolic, Value, load_rules


@dataclass(slots=True)
class Propagation:
    """What the rules found.

    values: node name -> its tensor, or a tuple of them. parameters: state-dict key -> its tensor.
    batch: stands for the free batch size.
    constants: (node, place in its arguments, ids it counts). consumed: parameter axes that take channels in.
    unsupported: (operator, node) that no rule covers. memory: node -> the node that its output is a view of, or itself.
    choices: view -> ids that it splits, axes that could keep them.
    """

    batch: int
    units: Units = field(default_factory=Units)
    values: dict[str, Value | tuple[Value, ...]] = field(default_factory=dict)
    parameters: dict[str, Value] = field(default_factory=dict)
    constants: list[tuple[str, tuple[int, ...], IntArray]] = field(default_factory=list)
    consumed: set[tuple[str, int]] = field(default_factory=set)
    unsupported: list[tuple[str, str]] = field(default_factory=list)
    memory: dict[str, str] = field(default_factory=dict)
    choices: dict[str, tuple[IntArray, int]] = field(default_factory=dict)


def propagate(captured: fx.GraphModule) -> Propagation:
    """Follow every channel from the parameters that make it to those that read it.

    Where a view splits channels along several axes, or merges several axes of channels, one of them keeps its units:
    the first that is not frozen later.
    """
    options: dict[str, int] = {}
    batch = _stand_in(captured)
    found = _follow_all(captured, batch, options)
    while again := {name: options.get(name, 0) + 1 for name, left in _stuck(found) if options.get(name, 0) + 1 < left}:
        options |= again
        found = _follow_all(captured, batch, options)
    if hopeless := {name for name, _ in _stuck(found)} & options.keys():
        kept = {name: option for name, option in options.items() if name not in hopeless}
        found = _follow_all(captured, batch, kept)
    return found


def _stand_in(captured: fx.GraphModule) -> int:
    """A number for the free batch size: a prime that divides no size keeps views of batch and channels apart."""
    tensors = [leaf for node in captured.graph.nodes for leaf in pytree.tree_leaves(node.meta.get("val"))]
    sizes = {size for t in tensors if isinstance(t, torch.Tensor) for size in t.shape if isinstance(size, int)}
    sizes.discard(0)  # of an empty slice: every prime divides it
    primes = (n for n in itertools.count(11) if all(n % divisor for divisor in range(2, n)))
    return next(prime for prime in primes if all(size % prime for size in sizes))


def _stuck(found: Propagation) -> list[tuple[str, int]]:
    """Views whose choice ended frozen or inexact, with the number of axes to choose from."""
    frozen = np.array(sorted({**found.units.inexact(), **found.units.frozen()}), np.int64)
    return [(name, n) for name, (ids, n) in found.choices.items() if np.isin(found.units.find(ids), frozen).all()]


def _follow_all(captured: fx.GraphModule, batch: int, options: Mapping[str, int]) -> Propagation:
    found, rules = Propagation(batch=batch), load_rules()
    attributes = {node: operator.attrgetter(node.target)(captured) for node in captured.graph.find_nodes(op="get_attr")}
    canonical: dict[int, str] = {}
    for node in captured.graph.nodes:
        if node.op == "placeholder":
            shape = concrete(node.meta["val"].shape, batch)
            fixed = f"reads model input '{node.name}'"
            found.values[node.name] = Value(shape=shape, axes=(None,) * len(shape), fixed_because=fixed)
        elif node.op == "get_attr":
            tensor = attributes[node]
            if not isinstance(tensor, torch.Tensor):
                continue  # the body of an operator without a rule
            key = canonical.setdefault(id(tensor), node.target)
            if key not in found.parameters:
                names = [other for other, same in attributes.items() if same is tensor]
                found.parameters[key] = _parameter(found.units, key, tensor, _kernel_axes(names))
            found.values[node.name] = found.parameters[key]
            found.memory[node.name] = key
        elif node.op == "call_function":
            _follow(found, rules, node, options.get(node.name, 0))
        elif node.op == "output":
            for source in node.all_input_nodes:
                _freeze(found, found.values.get(source.name), "is a model output")
    return found


def concrete(shape: Any, batch: int) -> tuple[int, ...]:
    """Shape with every size that depends on the batch computed for `batch`."""
    return tuple(size if isinstance(size, int) else _evaluate(size, batch) for size in shape)


def _evaluate(size: torch.SymInt, batch: int) -> int:
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))


def _kernel_axes(names: list[fx.Node]) -> int:
    """First spatial axis of a convolution's weight; far beyond the last for other parameters; 0 for unused ones.

    names: the nodes that stand for the parameter, several where it is shared.
    """
    users = [user for name in names for user in name.users]
    if not users:
        return 0
    convolved = any(operator_name(user).startswith("conv") and user.args[1] in names for user in users)
    return 2 if convolved else 1 << 16


def _parameter(units: Units, key: str, tensor: torch.Tensor, channels: int) -> Value:
    # Integers and single positions hold no channels; fixed axes freeze what meets them.
    carries = [tensor.is_floating_point() and size > 1 and axis < channels for axis, size in enumerate(tensor.shape)]
    axes = tuple(units.fresh(n) if carry else None for n, carry in zip(tensor.shape, carries, strict=True))
    return Value(shape=tuple(tensor.shape), axes=axes, parameter=key, masked=True)


def _follow(found: Propagation, rules: dict[str, Rule], node: fx.Node, option: int) -> None:
    if node.target is operator.getitem:
        whole, index = node.args
        assert isinstance(whole, fx.Node) and isinstance(index, int)
        if isinstance(parts := found.values.get(whole.name), tuple):
            found.values[node.name] = parts[index]
            found.memory[node.name] = found.memory[whole.name]
        return
    outputs = node.meta.get("val")
    several = isinstance(outputs, list | tuple)
    tensors = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
    if not any(isinstance(t, torch.Tensor) for t in tensors):
        if operator_name(node) != "sym_size":
            _give_up(found, node)
        return
    shapes = [concrete(t.shape, found.batch) if isinstance(t, torch.Tensor) else () for t in tensors]
    call = _call(found, node, shapes, option)
    axes, covered = _apply(rules.get(call.op), call)
    if covered:
        found.constants += [(node.name, place, ids) for place, ids in call.lowered]
        found.consumed.update(call.consumed)
        found.consumed.update(holder for ids in call.consumed_ids if (holder := _holder(found, ids)) is not None)
        if call.choices is not None:
            found.choices[node.name] = call.choices
    else:
        _give_up(found, node)
    inherited = next((v.fixed_because for v in call.values()), None)
    values = tuple(_value(shape, a, call, inherited) for shape, a in zip(shapes, axes, strict=True))
    found.values[node.name] = values if several else values[0]
    _share_memory(found, node, call.masked)


def _holder(found: Propagation, ids: IntArray) -> tuple[str, int] | None:
    """The parameter's axis that the ids were made for."""
    for key, value in found.parameters.items():
        for axis, own in enumerate(value.axes):
            if own is not None and own[0] == ids[0]:
                return key, axis
    return None


def _share_memory(found: Propagation, node: fx.Node, masked: bool) -> None:
    """Note whose memory the output is; what was written to is no longer zero where the written was not."""
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    shares = source is not None and shares_memory(node) and source.name in found.memory
    found.memory[node.name] = owner = found.memory[source.name] if shares and source is not None else node.name
    if shares and writes_memory(node) and not masked:
        for name, value in found.values.items():
            if found.memory.get(name) == owner and isinstance(value, Value):
                found.values[name] = replace(value, masked=False, zeros=None)


def _apply(rule: Rule | None, call: Call) -> tuple[list[Axes], bool]:
    """The rule's axes and True; or fixed axes and False where it does not cover the call."""
    if rule is not None:
        try:
            result = rule(call)
        except NoRule:
            pass
        else:
            axes = result if isinstance(result, list) else [result]
            if len(axes) == len(call.out_shapes) and all(map(_fits, axes, call.out_shapes)):
                return axes, True
    return [(None,) * len(shape) for shape in call.out_shapes], False


def _fits(axes: Axes, shape: tuple[int, ...]) -> bool:
    return len(axes) == len(shape) and all(a is None or len(a) == s for a, s in zip(axes, shape, strict=True))


def _value(shape: tuple[int, ...], axes: Axes, call: Call, inherited: str | None) -> Value:
    value = Value(shape=shape, axes=axes, masked=call.masked, zeros=call.zeros)
    if inherited is not None and all(axis is None for axis in axes):
        return replace(value, fixed_because=inherited)
    return value


def _call(found: Propagation, node: fx.Node, shapes: list[tuple[int, ...]], option: int) -> Call:
    target = node.target
    schema = target._schema.arguments if isinstance(target, torch._ops.OpOverload) else []
    arguments: dict[str, Any] = {}
    places: dict[str, int] = {}
    for position, argument in enumerate(schema):
        if position < len(node.args):
            places[argument.name] = position
            given = node.args[position]
        else:
            given = node.kwargs.get(argument.name, argument.default_value)
        arguments[argument.name] = _resolve(found, given)
    if not schema:
        arguments = {str(i): _resolve(found, given) for i, given in enumerate(node.args)}
    return Call(
        node=node.name,
        op=operator_name(node),
        arguments=arguments,
        places=places,
        out_shapes=shapes,
        units=found.units,
        option=option,
    )


def _resolve(found: Propagation, given: Any) -> Any:
    if isinstance(given, fx.Node):
        value = found.values.get(given.name)
        return Symbolic() if value is None else list(value) if isinstance(value, tuple) else value
    if isinstance(given, list | tuple):
        return [_resolve(found, item) for item in given]
    return given


def _give_up(found: Propagation, node: fx.Node) -> None:
    """Name the operator and freeze what it reads; where no channels meet it, nothing is lost and it stays unnamed."""
    sources = [source for source in node.all_input_nodes if _carries(found.values.get(source.name))]
    if sources:
        op = operator_name(node)
        found.unsupported.append((op, node.name))
        for source in sources:
            _freeze(found, found.values[source.name], f"no rule for operator '{op}' ('{node.name}')")


def _carries(value: Value | tuple[Value, ...] | None) -> bool:
    parts = value if isinstance(value, tuple) else () if value is None else (value,)
    return any(axis is not None for part in parts for axis in part.axes)


def _freeze(found: Propagation, value: Value | tuple[Value, ...] | None, reason: str) -> None:
    for part in value if isinstance(value, tuple) else (value,) if value is not None else ():
        for axis in part.axes:
            if axis is not None:
                found.units.freeze(axis, reason)
