"""What all texts are made of: columns, intervals, short numbers."""

from __future__ import annotations

from collections.abc import Sequence

from edgeprune.core.budget import format_seconds
from edgeprune.core.records import Quantity

UNKNOWN = "not measured"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Columns as wide as their widest cell; numbers (all but the columns `left`) to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


def interval(value: Quantity | None) -> str:
    """A latency with its interval."""
    if value is None:
        return UNKNOWN
    return f"{format_seconds(value.median)} [{format_seconds(value.low)}, {format_seconds(value.high)}]"


def short_number(number: float) -> str:
    """Three digits and k, M or G."""
    for suffix in ("", " k", " M"):
        if number < 999.5:
            return f"{number:.3g}{suffix}"
        number /= 1000
    return f"{number:.3g} G"
