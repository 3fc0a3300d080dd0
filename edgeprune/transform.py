"""Rewrite a model before it is traced, and put back what did not pay."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edgeprune.core.budget import Kind, parse_limit
from edgeprune.core.errors import DataError, ModelError, UsageError
from edgeprune.core.family import configure, load_member
from edgeprune.core.records import Graph, Plan, Profile, Rewritten
from edgeprune.core.runfile import RunFile
from edgeprune.core.runfolder import RunFolder
from edgeprune.core.store import write_atomic
from edgeprune.statistics import Batch

Batches = Iterable[tuple[Any, Any]]
TOLERANCE = 1e-4
"""Largest difference between the two forms of a float32 model, relative to the largest output."""


def transform_model(
    module: nn.Module, calibration: Batches | None, *, transform: str = "kfe", options: str = ""
) -> tuple[nn.Module, Rewritten]:
    """A copy of the model with the same output and other channels to prune.

    calibration: (inputs, labels); the labels may be anything. transform, options: a member of `transforms/` and
        its configuration.
    returns: the copy, and what was rewritten and what was not.
    raises:  DataError without calibration data; UsageError; ModelError when no layer can be rewritten, or when the
        model's own code cannot do with other layers.
    """
    member = load_member("transforms", transform)
    batches = [_as_batch(inputs) for inputs, _ in calibration or ()]
    if not batches:
        raise DataError(f"the transform {transform} needs calibration data; give the data source a .calibration")
    expected, model = _outputs(module, batches[0][0]), copy.deepcopy(module)
    try:
        found: Rewritten = configure(member.rewrite, options)(model, batches)
    except AttributeError as error:
        raise ModelError(
            f"the model's own code looks into a layer that was rewritten ({error}); rewrite only others (layers=...)"
        ) from error
    if not found.layers:
        reasons = "; ".join(f"{path or 'it'} {why}" for path, why in found.skipped.items())
        raise ModelError(f"no layer of the model can be rewritten by {transform}{': ' if reasons else ''}{reasons}")
    pairs = zip(_outputs(model, batches[0][0]), expected, strict=True)
    difference = max(float((ours - given).abs().max() / given.abs().max().clamp_min(1e-6)) for ours, given in pairs)
    if not difference <= TOLERANCE:
        raise ModelError(
            f"the model computes something else with rewritten layers (relative difference {difference:.1e}); "
            "rewrite only some of them (layers=...)"
        )
    return model, found


def transform_run(
    module: nn.Module, calibration: Batches, folder: RunFolder, made_from: Sequence[Any], chosen: str
) -> nn.Module:
    """`transform_model` as a stage of a run: eigenvectors are not the same to the bit twice, so the weights are kept.

    chosen: `name:option=value,...`. made_from: what else decides the result.
    """
    name, _, options = chosen.partition(":")
    weights = folder / "transformed.safetensors"

    def make() -> Rewritten:
        model, rewritten = transform_model(module, calibration, transform=name, options=options)
        state = {key: tensor.detach().clone().contiguous() for key, tensor in model.state_dict().items()}
        write_atomic(weights, serialise(state))
        return rewritten

    rewritten = folder.record(Rewritten, "transformed.json", [*made_from, chosen], make, also=[weights.name])
    model = copy.deepcopy(module)
    load_member("transforms", name).rebuild(model, rewritten.layers)
    model.load_state_dict(load_file(weights))
    return model


def check_run(run: RunFile) -> None:
    """raises: UsageError for what a run with a transform, or with layers in blocks, cannot have."""
    key = "transform" if run.prune.transform is not None else "pivot"
    limits: list[tuple[str, str | None, Kind]] = [
        ("latency", run.budget.latency, "time"), ("memory", run.budget.memory, "bytes"),
        ("energy", run.budget.energy, "energy"),
    ]  # fmt: skip
    for name, text, kind in limits:
        if text is not None and parse_limit(text, kind).relative:
            raise UsageError(
                f"[budget] {name} = '{text}' would be relative to the rewritten model, which takes other than yours; "
                f"with [prune] {key} give a number with a unit (`edgeprune measure` says what yours takes)"
            )
    if run.export.dtype in ("int8", "auto"):
        raise UsageError(f"[prune] {key} does not go with [export] dtype = '{run.export.dtype}'; use float32")
    if run.prune.pivot and run.prune.transform is not None:
        raise UsageError("[prune] pivot and transform do not go together; use one of them")
    if run.prune.pivot and run.prune.pivot_latency is None and run.budget.latency is None:
        raise UsageError("[prune] pivot is planned for a latency; give pivot_latency, or [budget] latency")


def settle_plan(graph: Graph, plan: Plan, transform: str, profile: Profile | None = None) -> tuple[Plan, list[str]]:
    """What to compact, and which layers to put back afterwards, since at these widths their new form saves nothing.

    profile: prices the layers; parameters do without one.
    returns: the plan with these layers whole, so that they lose nothing for no gain; their paths.
    """
    layers: list[str] = load_member("transforms", transform).unpaid_layers(graph, plan.widths, profile)
    whole = inner_groups(graph, layers)
    keep = {name: kept for name, kept in plan.keep.items() if name not in whole}
    return replace(plan, keep=keep), layers


def inner_groups(graph: Graph, layers: Iterable[str]) -> set[str]:
    """Groups of channels that one of these rewritten layers both produces and reads, and nothing else does."""
    return {
        group.name
        for group in graph.groups
        if {member.role for member in group.members} == {"out", "in"}
        and any(all(member.parameter.startswith(f"{path}.") for member in group.members) for path in layers)
    }


def restore_layers(module: nn.Module, layers: Sequence[str], transform: str) -> nn.Module:
    """Put layers back in place, with the same output. returns: the module."""
    load_member("transforms", transform).restore(module, layers)
    return module


def _as_batch(inputs: Any) -> Batch:
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), None


def _outputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """In evaluation. raises: DataError when the model does not run on these inputs."""
    try:
        with torch.no_grad():
            return list(pytree.tree_leaves(copy.deepcopy(module).eval()(*inputs)))
    except (RuntimeError, TypeError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        shapes = [tuple(getattr(x, "shape", ())) for x in inputs]
        raise DataError(f"the model does not run on calibration inputs of shape {shapes}: {first_line}") from error
