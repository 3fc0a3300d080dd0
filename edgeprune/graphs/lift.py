"""An ATen graph made a module again: real layers under their original names, so that it trains."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from edgeprune.graphs.capture import mark_persistent, module_path, operator_name
from edgeprune.graphs.ports import get_ports, set_ports

CONVOLUTIONS: dict[str, type[nn.Module]] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
}
DROPOUTS: dict[str, type[nn.Module]] = {
    "dropout": nn.Dropout,
    "feature_dropout": nn.Dropout2d,
    "alpha_dropout": nn.AlphaDropout,
    "feature_alpha_dropout": nn.FeatureAlphaDropout,
}
BATCH_NORMS: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def lift(captured: fx.GraphModule) -> fx.GraphModule:
    """Replace convolutions, linears, norms and dropouts by `nn` modules that hold the same tensors.

    captured: from `capture` or `import_program`; its tensors are taken over, not copied. A parameter that
        no layer can hold (shared between unlike calls, or computed with) stays where it is.
    returns: a module with the same state-dict keys that switches between training and evaluation.
    """
    calls: dict[str, tuple[nn.Module, list[fx.Node]]] = {}
    for node in captured.graph.nodes:
        if node.op == "call_function":
            _collect(captured, node, calls)
    graph, keys = captured.graph, set(captured.state_dict())
    for path, (layer, nodes) in calls.items():
        _install(captured, path, layer)
        for node in nodes:
            with graph.inserting_before(node):
                new = graph.call_module(path, (node.args[0],))
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    lifted = fx.GraphModule(captured, graph, class_name="Lifted")
    mark_persistent(lifted, keys)
    set_ports(lifted, get_ports(captured))
    for node in lifted.graph.nodes:
        node.meta = {}
    lifted.graph.lint()
    return lifted


def _collect(captured: fx.GraphModule, node: fx.Node, calls: dict[str, tuple[nn.Module, list[fx.Node]]]) -> None:
    """Add the call to the layer that stands for it, where one can."""
    op = operator_name(node)
    if op in DROPOUTS:
        beside = _free_path(captured, module_path(node), op, calls)
        inplace = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name.endswith("_")
        calls[beside] = (DROPOUTS[op](p=node.args[1], inplace=inplace), [node])
        return
    build = LAYERS.get(op)
    arguments = _arguments(node)
    path = _owner(node, arguments)
    if build is None or path is None:
        return
    tensors = {
        name: operator.attrgetter(str(given.target))(captured)
        for name, given in arguments.items()
        if name in PARAMETERS and isinstance(given, fx.Node)
    }
    layer = build(node, arguments, tensors)
    if layer is None:
        return
    if path in calls:
        known, nodes = calls[path]
        if repr(known) == repr(layer) and known.training == layer.training:
            nodes.append(node)
        return
    _hold(layer, tensors)
    calls[path] = (layer, [node])


PARAMETERS = ("weight", "bias", "running_mean", "running_var")


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by schema name, defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    arguments: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        default = argument.default_value
        arguments[argument.name] = (
            node.args[position] if position < len(node.args) else node.kwargs.get(argument.name, default)
        )
    return arguments


def _owner(node: fx.Node, arguments: dict[str, Any]) -> str | None:
    """Path of the module whose tensors the call reads under their usual names, or None."""
    paths = set()
    for name in PARAMETERS:
        given = arguments.get(name)
        if isinstance(given, fx.Node):
            path, _, leaf = str(given.target).rpartition(".")
            if given.op != "get_attr" or leaf != name or not path:
                return None
            if any(operator_name(user) != operator_name(node) for user in given.users):
                return None
            paths.add(path)
    return paths.pop() if len(paths) == 1 else None


def _free_path(captured: fx.GraphModule, path: str, op: str, calls: dict[str, Any]) -> str:
    """The dropout's own path; one beside it where that belongs to the module that calls it."""
    taken = {name for name, _ in captured.named_modules()} | set(calls)
    candidate, number = path or op, 1
    while candidate in taken or any(name.startswith(f"{candidate}.") for name in taken):
        number += 1
        candidate = f"{path}.{op}_{number}".lstrip(".")
    return candidate


def _install(root: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a layer at a path, with what else was there."""
    try:
        old = root.get_submodule(path)
    except AttributeError:
        old = None
    if old is not None:
        for name, child in old.named_children():
            layer.add_module(name, child)
        for name, parameter in old.named_parameters(recurse=False):
            if name not in layer._parameters:
                layer.register_parameter(name, parameter)
        for name, buffer in old.named_buffers(recurse=False):
            if name not in layer._buffers or name == "num_batches_tracked":
                layer.register_buffer(name, buffer)
    root.add_submodule(path, layer)  # type: ignore[operator]


def _hold(layer: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        owned: dict[str, Any] = layer._parameters if isinstance(tensor, nn.Parameter) else layer._buffers
        owned[name] = tensor


# --- one builder per layer -----------------------------------------------------------------------


def _convolution(node: fx.Node, given: dict[str, Any], tensors: dict[str, torch.Tensor]) -> nn.Module | None:
    kind, weight, groups = CONVOLUTIONS[operator_name(node)], tensors["weight"], given["groups"]
    transposed = "transpose" in operator_name(node)
    rows, columns = weight.shape[0], weight.shape[1] * groups
    options = {name: _wide(given[name], weight.ndim - 2) for name in ("stride", "padding", "dilation")}
    if transposed:
        options["output_padding"] = _wide(given["output_padding"], weight.ndim - 2)
    return kind(
        rows if transposed else columns,
        columns if transposed else rows,
        tuple(weight.shape[2:]),
        groups=groups,
        bias="bias" in tensors,
        device="meta",
        **options,
    )


def _wide(given: Any, spatial: int) -> Any:
    """ATen broadcasts [1] over space, modules want one number per axis."""
    if isinstance(given, str):
        return given
    return tuple(given) * spatial if len(given) == 1 else tuple(given)


def _linear(node: fx.Node, given: dict[str, Any], tensors: dict[str, torch.Tensor]) -> nn.Module | None:
    del node, given
    rows, columns = tensors["weight"].shape
    return nn.Linear(columns, rows, bias="bias" in tensors, device="meta")


def _batch_norm(node: fx.Node, given: dict[str, Any], tensors: dict[str, torch.Tensor]) -> nn.Module | None:
    if given["training"] or "running_mean" not in tensors or ("weight" in tensors) != ("bias" in tensors):
        return None
    rank = node.args[0].meta["val"].ndim  # type: ignore[union-attr]
    layer = BATCH_NORMS[rank](
        tensors["running_mean"].shape[0],
        eps=given["eps"],
        momentum=given["momentum"],
        affine="weight" in tensors,
        device="meta",
    )
    layer.register_buffer("num_batches_tracked", torch.tensor(0))
    return layer


def _layer_norm(node: fx.Node, given: dict[str, Any], tensors: dict[str, torch.Tensor]) -> nn.Module | None:
    del node
    if "weight" not in tensors:
        return None
    shape = list(tensors["weight"].shape)
    return nn.LayerNorm(shape, eps=given["eps"], bias="bias" in tensors, device="meta")


def _group_norm(node: fx.Node, given: dict[str, Any], tensors: dict[str, torch.Tensor]) -> nn.Module | None:
    del node
    if "weight" not in tensors or "bias" not in tensors:
        return None
    return nn.GroupNorm(given["num_groups"], tensors["weight"].shape[0], eps=given["eps"], device="meta")


def _prelu(node: fx.Node, given: dict[str, Any], tensors: dict[str, torch.Tensor]) -> nn.Module | None:
    del node, given
    return nn.PReLU(tensors["weight"].shape[0], device="meta")


Builder = Callable[[fx.Node, dict[str, Any], dict[str, torch.Tensor]], nn.Module | None]
LAYERS: dict[str, Builder] = {
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    "linear": _linear,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "prelu": _prelu,
}
