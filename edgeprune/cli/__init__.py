"""Commands and options. One command per stage: it reads files, calls the stage, writes its record.

Stages are reached through `edgeprune.NAME`, which imports them when they are first used, so that
`edgeprune --help` answers at once.
"""

from __future__ import annotations

import sys

import typer

import edgeprune
from edgeprune.cli import artifacts, boards, changes, runs, stages

INTERRUPTED = 130

app = typer.Typer(help=edgeprune.__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
# In the order of `edgeprune --help`: the whole, the boards, the stages one by one.
for part in (runs, boards, stages, changes, artifacts):
    for command in part.COMMANDS:
        app.command()(command)
app.add_typer(artifacts.bundle_app, name="bundle")
app.add_typer(boards.targets_app, name="targets")


def run_command() -> int:
    """Parse sys.argv and run one command. returns: the exit code of the command line's own errors."""
    try:
        result = typer.main.get_command(app).main(standalone_mode=False, prog_name="edgeprune")
    except typer.Exit as error:
        return error.exit_code
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except typer.TyperException as error:
        command = " ".join(["edgeprune", *(word for word in sys.argv[1:2] if not word.startswith("-"))])
        print(f"error: {error.format_message()} Try `{command} --help`.", file=sys.stderr)
        return error.exit_code
    if result == INTERRUPTED:  # typer turns Ctrl-C into this number
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0


@app.command()
def version() -> None:
    """The version of edgeprune."""
    print(edgeprune.__version__)
