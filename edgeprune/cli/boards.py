"""The boards: what there is, what one has, what an artifact does on it."""

from __future__ import annotations

from typing import Annotated

import typer

import edgeprune
from edgeprune.cli.common import AsJson, bars, show

targets_app = typer.Typer(help="The boards: list them, look at one, prepare one.", no_args_is_help=True)


@targets_app.command("list")
def list_boards(as_json: AsJson = False) -> None:
    """The inventory: ./targets, then those that come with edgeprune."""
    show([edgeprune.load_target(name) for name in edgeprune.list_targets()], as_json, "describe_targets")


@targets_app.command("check")
def check_board(
    name: str,
    trust: Annotated[bool, typer.Option("--trust", help="remember the host key of a board seen first")] = False,
    as_json: AsJson = False,
) -> None:
    """Connect and print the board's facts, and what is missing."""
    facts = edgeprune.check_target(edgeprune.load_target(name), trust_new_host=trust)
    show(facts, as_json, "describe_facts")
    if facts.missing:
        raise typer.Exit(3)


@targets_app.command("setup")
def setup_board(
    name: str,
    offline: Annotated[bool, typer.Option("--offline", help="the host downloads the wheels, pushes them")] = False,
) -> None:
    """Make a virtual environment with the runtime on the board."""
    with bars() as progress:
        facts = edgeprune.setup_target(edgeprune.load_target(name), offline=offline, progress=progress)
    show(facts, False, "describe_facts")


COMMANDS = ()
