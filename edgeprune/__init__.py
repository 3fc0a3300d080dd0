"""Prune a PyTorch network to the latency, memory and size that are measured on your board.

The pipeline, one module and one command per stage:
load -> trace -> profile -> score -> plan -> compact -> recover -> export -> validate -> bundle -> report.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeprune.advise import advise_pruning as advise_pruning
    from edgeprune.bundle import try_bundle as try_bundle
    from edgeprune.bundle import verify_bundle as verify_bundle
    from edgeprune.bundle import write_bundle as write_bundle
    from edgeprune.compact import compact_and_compensate as compact_and_compensate
    from edgeprune.compact import compact_model as compact_model
    from edgeprune.compact import save_compact as save_compact
    from edgeprune.compare import compare_recipes as compare_recipes
    from edgeprune.core.store import read_record as read_record
    from edgeprune.core.store import write_record as write_record
    from edgeprune.device.session import open_session as open_session
    from edgeprune.device.targets import check_target as check_target
    from edgeprune.device.targets import list_targets as list_targets
    from edgeprune.device.targets import load_target as load_target
    from edgeprune.device.targets import setup_target as setup_target
    from edgeprune.draw import render_drawing as render_drawing
    from edgeprune.draw import write_drawing as write_drawing
    from edgeprune.export import export_model as export_model
    from edgeprune.fleet import profile_fleet as profile_fleet
    from edgeprune.gate import gate_model as gate_model
    from edgeprune.gate import settle_gates as settle_gates
    from edgeprune.inspect import inspect_file as inspect_file
    from edgeprune.inspect import read_any_record as read_any_record
    from edgeprune.load import example_inputs as example_inputs
    from edgeprune.load import load_data as load_data
    from edgeprune.load import load_model as load_model
    from edgeprune.measure import measure_files as measure_files
    from edgeprune.on_board import choose_runtime as choose_runtime
    from edgeprune.on_board import connect as connect
    from edgeprune.on_board import dense_cost as dense_cost
    from edgeprune.on_board import plan_on_board as plan_on_board
    from edgeprune.pipeline import report_run as report_run
    from edgeprune.pipeline import run_pipeline as run_pipeline
    from edgeprune.pivot import pivot_model as pivot_model
    from edgeprune.pivot import plan_pivot as plan_pivot
    from edgeprune.plan import choose_widths as choose_widths
    from edgeprune.precisions import try_precisions as try_precisions
    from edgeprune.profile import profile_target as profile_target
    from edgeprune.profile import read_profile as read_profile
    from edgeprune.recover import evaluate_accuracy as evaluate_accuracy
    from edgeprune.recover import recover_accuracy as recover_accuracy
    from edgeprune.scope import enter_scope as enter_scope
    from edgeprune.scope import put_back as put_back
    from edgeprune.scope import scope_batches as scope_batches
    from edgeprune.scope import scope_data as scope_data
    from edgeprune.score import score_groups as score_groups
    from edgeprune.search import search_curves as search_curves
    from edgeprune.sparsify import order_channels as order_channels
    from edgeprune.sparsify import prepare_pattern as prepare_pattern
    from edgeprune.sparsify import sparsify_model as sparsify_model
    from edgeprune.trace import trace_graph as trace_graph
    from edgeprune.transform import restore_layers as restore_layers
    from edgeprune.transform import settle_plan as settle_plan
    from edgeprune.transform import transform_model as transform_model
    from edgeprune.validate import collect_examples as collect_examples
    from edgeprune.validate import validate_artifact as validate_artifact

__version__ = "0.1.0"

_PLACES = {
    "advise": ("advise_pruning",),
    "bundle": ("try_bundle", "verify_bundle", "write_bundle"),
    "compact": ("compact_and_compensate", "compact_model", "save_compact"),
    "compare": ("compare_recipes",),
    "core.store": ("read_record", "write_record"),
    "device.session": ("open_session",),
    "device.targets": ("check_target", "list_targets", "load_target", "setup_target"),
    "draw": ("render_drawing", "write_drawing"),
    "export": ("export_model",),
    "fleet": ("profile_fleet",),
    "gate": ("gate_model", "settle_gates"),
    "inspect": ("inspect_file", "read_any_record"),
    "load": ("example_inputs", "load_data", "load_model"),
    "measure": ("measure_files",),
    "on_board": (
        "choose_runtime",
        "connect",
        "dense_cost",
        "plan_on_board",
    ),
    "pipeline": ("report_run", "run_pipeline"),
    "pivot": ("pivot_model", "plan_pivot"),
    "plan": ("choose_widths",),
    "precisions": ("try_precisions",),
    "profile": ("profile_target", "read_profile"),
    "recover": ("evaluate_accuracy", "recover_accuracy"),
    "scope": ("enter_scope", "put_back", "scope_batches", "scope_data"),
    "score": ("score_groups",),
    "search": ("search_curves",),
    "sparsify": ("order_channels", "prepare_pattern", "sparsify_model"),
    "trace": ("trace_graph",),
    "transform": ("restore_layers", "settle_plan", "transform_model"),
    "validate": ("collect_examples", "validate_artifact"),
}
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    # PEP 562: `import edgeprune` stays instant, and `edgeprune.trace_graph` imports torch when it is first used.
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'edgeprune' has no attribute '{name}'")
    return getattr(importlib.import_module(f"edgeprune.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
