"""Any meter there is a program for: `command:PROGRAM ARGUMENTS` runs on the board and prints power.

The protocol: a line of standard output per reading, at least ten a second, flushed, for as long as
the program is let live:

    4.87             watts, of the moment the line is written
    12.250 4.87      seconds on the meter's own clock, and watts of that moment
    # anything       ignored, as is what stands after the numbers

The words are split as a POSIX shell would, but no shell runs; give the path of a script. It is ended
by SIGKILL.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence

from edgeprune.core.errors import UsageError
from edgeprune.device.meters import Meter, Power, Reading
from edgeprune.device.sources import Source


def make(options: str) -> Meter:
    try:
        argv = tuple(shlex.split(options))
    except ValueError as error:
        raise UsageError(f"meter 'command:{options}': {error}") from error
    if not argv:
        raise UsageError("meter 'command' needs a program: command:PROGRAM ARGUMENTS")
    return Meter(
        source=Source(argv=argv),
        watts=parse_lines,
        stream=True,
        hint="run it by hand on the board: does it print `WATTS` or `SECONDS WATTS`, and flush each line?",
    )


def parse_lines(readings: Sequence[Reading]) -> list[Power]:
    """Power from lines; a meter's own clock is set by the line that took the least time to arrive."""
    parsed = [(arrived, _numbers(line)) for arrived, line in readings]
    own = [(arrived, numbers) for arrived, numbers in parsed if len(numbers) == 2]
    offset = min((arrived - numbers[0] for arrived, numbers in own), default=0.0)
    return [
        (numbers[0] + offset if len(numbers) == 2 else arrived, numbers[-1]) for arrived, numbers in parsed if numbers
    ]


def _numbers(line: str) -> list[float]:
    """The first two words of a line, as far as they are finite numbers."""
    numbers: list[float] = []
    for word in line.split()[:2]:
        try:
            value = float(word)
        except ValueError:
            break
        if not math.isfinite(value):
            return []
        numbers.append(value)
    return numbers
