"""Entry point: runs the command line and turns errors into one sentence and an exit code."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

INTERRUPTED = 130
INTERNAL_ERROR = 70


def main() -> NoReturn:
    """Run `edgeprune` with sys.argv and exit with 0, 1 unmet, 2 usage, 3 device or 4 model/data."""
    with _stdout_of_our_own():
        code = _run()
    sys.exit(code)


@contextmanager
def _stdout_of_our_own() -> Iterator[None]:
    """What native libraries print goes to stderr (HiGHS does now and then): with --json stdout is one record."""
    stdout = sys.stdout
    stdout.flush()
    kept = os.dup(1)
    buffering = 1 if os.isatty(kept) else -1
    ours = os.fdopen(os.dup(1), "w", buffering=buffering, encoding=stdout.encoding, errors=stdout.errors)
    os.dup2(2, 1)
    sys.stdout = ours
    try:
        yield
    finally:
        sys.stdout = stdout
        with suppress(BrokenPipeError):  # whoever read it went away
            ours.close()
        os.dup2(kept, 1)
        os.close(kept)


def _run() -> int:
    from edgeprune.core.errors import EdgepruneError

    debug = os.environ.get("EDGEPRUNE_DEBUG") == "1"
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
        debug = True
    if not debug:
        # torch and onnxscript warn about their own deprecations; nothing a user can act on.
        warnings.simplefilter("ignore")
    from edgeprune.cli import run_command

    try:
        return run_command()
    except EdgepruneError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; what was finished is on disk, the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`edgeprune trace | head`); keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        print(f"internal error: {type(error).__name__}: {error}", file=sys.stderr)
        print("This is a bug in edgeprune: please report it with what --debug prints.", file=sys.stderr)
        return INTERNAL_ERROR


if __name__ == "__main__":
    main()
