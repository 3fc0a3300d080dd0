"""torch.export of a module as a plain ATen graph, and that graph's identity."""

from __future__ import annotations

import hashlib
import operator
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.utils import _pytree as pytree

from edgeprune.core.errors import ModelError
from edgeprune.graphs.ports import get_ports, set_ports

Inputs = tuple[torch.Tensor, ...]
DROPOUTS = frozenset({"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"})


def capture(module: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """The module's evaluation graph in whole ATen operators, with a free batch size where it allows one.

    inputs: example tensors, batch first. Parameters are shared with the module, not copied.
    returns: a GraphModule whose get_attr nodes bear the module's state-dict keys; the same module
        gives the same node names each time.
    raises: ModelError with the reason and the line when the module rejects the inputs or torch.export the module.
    """
    captured = import_program(export_program(module, inputs))
    set_ports(captured, get_ports(module))
    return captured


def export_program(module: nn.Module, inputs: Inputs) -> ExportedProgram:
    """torch.export in evaluation mode, with a free batch size where the model allows one.

    raises: ModelError with the reason and the line when the module rejects the inputs or torch.export the module, and
        for a quantised module.
    """
    for path, part in module.named_modules():
        if hasattr(part, "_packed_params"):
            raise ModelError(
                f"'{path}' is quantised ({type(part).__name__}); give the model in float32, and quantise what is "
                "pruned: --dtype int8 of `edgeprune export`"
            )
    with evaluating(module), torch.no_grad():
        return _export(module, inputs)


def import_program(program: ExportedProgram) -> fx.GraphModule:
    """The graph of an exported program, also one read from a .pt2 file: no guards, plain calls, normal form."""
    source = program.module(check_guards=False)
    assert isinstance(source, fx.GraphModule)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    leaves = [
        copies[leaf] if isinstance(leaf, fx.Node) else leaf
        for leaf in pytree.tree_leaves(_copy_nodes(source, graph, copies))
    ]
    out_spec = source._out_spec
    assert out_spec is not None
    graph.output(pytree.tree_unflatten(leaves, out_spec))
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users and isinstance(_attribute(source, node), nn.Module):
            graph.erase_node(node)  # the body of a block
    captured = fx.GraphModule(source, graph)
    _keep_counters(source, captured)
    mark_persistent(captured, set(program.state_dict))
    captured.graph.lint()
    return captured


def _copy_nodes(source: fx.GraphModule, graph: fx.Graph, copies: dict[fx.Node, fx.Node]) -> Any:
    """Append the nodes of `source` to `graph`, those of blocks that change nothing in their place.

    copies: node -> its copy, for those in `source` and, before the call, its placeholders in a block.
    returns: what `source` returns, in its own nodes.
    """
    blocks: dict[fx.Node, Sequence[Any]] = {}
    for node in source.graph.nodes:
        if node.op == "output":
            return node.args[0]
        if node in copies or node.op == "call_module" or operator_name(node) == "_assert_tensor_metadata":
            continue
        if (block := _plain_block(source, node)) is not None:
            body, operands = block
            places = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
            copies.update({place: copies[given] for place, given in zip(places, operands, strict=True)})
            blocks[node] = _copy_nodes(body, graph, copies)
        elif node.target is operator.getitem and node.args[0] in blocks:
            copies[node] = copies[blocks[node.args[0]][node.args[1]]]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op == "call_function":
                _normalise(copies[node])
    return None


def _plain_block(source: fx.GraphModule, node: fx.Node) -> tuple[fx.GraphModule, Sequence[Any]] | None:
    """Body and operands of a `with torch.no_grad()` or `with torch.autocast(enabled=False)` block, else None."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    if name == "wrap_with_autocast":
        (_, _, enabled, _, body), operands = node.args[:5], node.args[5:]
        if enabled:
            return None
    elif name == "wrap_with_set_grad_enabled":
        body, operands = node.args[1], node.args[2:]
    else:
        return None
    assert isinstance(body, fx.Node)
    return _attribute(source, body), operands


def _attribute(module: nn.Module, node: fx.Node) -> Any:
    return operator.attrgetter(str(node.target))(module)


def mark_persistent(module: nn.Module, keys: set[str]) -> None:
    """Leave buffers that are not among `keys` (constants of the code) out of the state dict."""
    for prefix, part in module.named_modules():
        part._non_persistent_buffers_set = {n for n in part._buffers if f"{prefix}.{n}".lstrip(".") not in keys}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every submodule's own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _export(module: nn.Module, inputs: Inputs) -> ExportedProgram:
    # A batch of one would be taken for a constant.
    several = tuple(torch.cat([x, x]) if x.ndim and x.shape[0] == 1 else x for x in inputs)
    free: Any = tuple({0: Dim.AUTO} if x.ndim else None for x in several)
    with suppress(Exception):  # the next attempt says why
        program = export(module, several, dynamic_shapes=free, strict=False)
        free_sizes = zip(inputs, _batches(program), strict=True)
        if all(not x.ndim or isinstance(size, torch.SymInt) for x, size in free_sizes):
            return program
    try:
        module(*inputs)
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise ModelError(
            f"the model does not accept inputs of shape {shapes}: {_reason(error)}; "
            "correct the input shapes or the model"
        ) from error
    try:
        return export(module, inputs, strict=False)
    except Exception as error:
        raise ModelError(
            f"torch.export cannot turn the model into a graph: {_reason(error)}; rewrite that line without "
            "control flow that depends on values, or take a submodule without it (--scope backbone)"
        ) from error


def _batches(program: ExportedProgram) -> list[Any]:
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    users = values[len(values) - len(program.graph_signature.user_inputs) :]
    return [value.shape[0] if value.ndim else None for value in users]


def _reason(error: Exception) -> str:
    """First line of the error, and the last line of code outside torch that led to it."""
    library = Path(torch.__file__).parent
    message = (str(error).strip().splitlines() or [type(error).__name__])[0]
    places = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.endswith(".py")]
    users = [f for f in places if library not in Path(f.filename).parents and Path(f.filename) != Path(__file__)]
    return f"{message} ({users[-1].filename}:{users[-1].lineno}: {users[-1].line})" if users else message


def _keep_counters(source: nn.Module, captured: fx.GraphModule) -> None:
    """Batch-norm counters are in no evaluation graph, but belong to the state dict."""
    for name, buffer in source.named_buffers():
        path, _, leaf = name.rpartition(".")
        if leaf == "num_batches_tracked" and any(p.startswith(f"{path}.") for p, _ in captured.named_buffers()):
            captured.get_submodule(path).register_buffer(leaf, buffer)


# --- normal form ---------------------------------------------------------------------------------


def _normalise(node: fx.Node) -> None:
    """Bring a call to one spelling: positional arguments, explicit sizes, indices that are not negative."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    schema = node.target._schema.arguments
    positional = [argument.name for argument in schema if not argument.kwarg_only]
    args: list[Any] = list(node.args)
    kwargs = dict(node.kwargs)
    while len(args) < len(positional) and any(name in kwargs for name in positional[len(args) :]):
        argument = schema[len(args)]
        args.append(kwargs.pop(argument.name, argument.default_value))
    name = operator_name(node)
    if name in ("chunk", "split", "tensor_split") and isinstance(node.meta["val"], list | tuple):
        dim = args[2] if len(args) > 2 else 0
        sizes = [part.shape[dim] for part in node.meta["val"]]
        if all(isinstance(size, int) for size in sizes):
            node.target = torch.ops.aten.split_with_sizes.default
            args = [args[0], sizes, dim]
    elif name in ("max", "min") and "other" in positional:
        node.target = torch.ops.aten.maximum.default if name == "max" else torch.ops.aten.minimum.default
    elif name == "squeeze" and len(args) == 1:
        # Without axes, it would also squeeze a channel axis that is pruned to one channel.
        node.target = torch.ops.aten.squeeze.dims
        args.append([axis for axis, size in enumerate(_value(args[0]).shape) if isinstance(size, int) and size == 1])
    elif name in ("slice", "narrow"):
        size = _value(args[0]).shape[args[1] if len(args) > 1 else 0]
        if isinstance(size, int):
            bounds = args[2:4] if name == "slice" else args[2:3]
            args[2 : 2 + len(bounds)] = [b + size if isinstance(b, int) and b < 0 else b for b in bounds]
    elif name in ("view", "reshape") and sum(not isinstance(size, int) or size < 0 for size in args[1]) == 1:
        # The one size that follows from the batch also follows from the others.
        args[1] = [size if isinstance(size, int) else -1 for size in args[1]]
    elif name == "scaled_dot_product_attention" and kwargs.get("scale") is None:
        depth = _value(args[0]).shape[-1]
        if isinstance(depth, int):
            kwargs["scale"] = depth**-0.5  # that of the dense model
    node.args, node.kwargs = tuple(args), kwargs


def _value(node: Any) -> torch.Tensor:
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value


def operator_name(node: fx.Node) -> str:
    """ATen name without namespace, overload and in-place underscore: `conv2d`, `add`, `relu`."""
    if node.target is operator.getitem:
        return "getitem"
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__name__", str(node.target))
    namespace, _, name = node.target._schema.name.partition("::")
    if not name.startswith("__"):
        name = name.removesuffix("_")
    return name if namespace in ("aten", "prims") else f"{namespace}::{name}"


def shares_memory(node: fx.Node) -> bool:
    """Whether the output may be a view of the first argument; so is what is done in place, or dropout in evaluation."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return operator_name(node) in DROPOUTS or any(r.alias_info is not None for r in node.target._schema.returns)


def writes_memory(node: fx.Node) -> bool:
    """Whether the first argument is written to."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.arguments:
        return False
    alias = node.target._schema.arguments[0].alias_info
    return alias is not None and bool(alias.is_write)


def module_path(node: fx.Node) -> str:
    """Path of the module whose forward holds the call, "" for the root."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    # A second call of one module has a number after the path.
    return "" if path.startswith("_empty_nn_module_stack") else re.sub(r"@\d+", "", path)


def structure_sha256(captured: fx.GraphModule) -> str:
    """Digest of operators, arguments, shapes and parameter names; the weights' values do not count."""
    digest = hashlib.sha256()
    for node in captured.graph.nodes:
        line = [node.op, node.name, operator_name(node) if node.op == "call_function" else str(node.target)]
        if node.op == "get_attr":
            line.append(str(tuple(getattr(_attribute(captured, node), "shape", ()))))
        elif node.op == "placeholder":
            # The first axis is the batch; its symbol's name changes from run to run.
            line.append(str([size if isinstance(size, int) else "batch" for size in node.meta["val"].shape]))
        line += [repr(node.args), repr(sorted(node.kwargs.items()))]
        digest.update("\x1f".join(line).encode() + b"\n")
    return digest.hexdigest()
