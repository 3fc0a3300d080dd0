"""A plot as SVG text: axes, points, lines and bands, in colours that stand out on a light and on a dark page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

INK, GRID = "#80858f", "#80858f40"
BLUE, GREEN, ORANGE, RED = "#4c8dd6", "#12a594", "#f2a20d", "#e5484d"
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 54, 48

Points = Iterable[tuple[float, float]]


@dataclass
class Plot:
    """One panel of width x height pixels; x and y are (least, most) of its axes.

    y_format, x_format: how a tick's number is written.
    """

    title: str
    x_title: str
    y_title: str
    x: tuple[float, float]
    y: tuple[float, float]
    width: int = 720
    height: int = 320
    x_format: str = "{:g}"
    y_format: str = "{:g}"
    _parts: list[str] = field(default_factory=list)
    _legend: list[tuple[str, str]] = field(default_factory=list)

    def points(self, points: Points, colour: str, *, name: str = "", size: float = 4, opacity: float = 0.8) -> None:
        """Dots; what lies outside of the axes is left out."""
        path = "".join(f"M{self._x(x):.1f} {self._y(y):.1f}h0" for x, y in points if self._shows(x, y))
        style = f'stroke="{colour}" stroke-width="{size:g}" stroke-linecap="round" opacity="{opacity:g}"'
        self._parts.append(f'<path d="{path}" {style} fill="none"/>')
        self._name(name, colour)

    def line(self, points: Points, colour: str, *, name: str = "", dashes: str = "", width: float = 2) -> None:
        """A line through the points."""
        path = "L".join(f"{self._x(x):.1f} {self._y(y):.1f}" for x, y in points)
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        self._parts.append(f'<path d="M{path}" stroke="{colour}" stroke-width="{width:g}"{dashed} fill="none"/>')
        self._name(name, colour)

    def band(self, low: Sequence[tuple[float, float]], high: Sequence[tuple[float, float]], colour: str) -> None:
        """The area between two lines."""
        path = "L".join(f"{self._x(x):.1f} {self._y(y):.1f}" for x, y in (*low, *reversed(high)))
        self._parts.append(f'<path d="M{path}Z" fill="{colour}" opacity="0.15"/>')

    def note(self, x: float, y: float, text: str, colour: str = INK) -> None:
        """Words that begin at a point."""
        self._parts.append(_text(self._x(x), self._y(y), text, colour))

    def render(self) -> str:
        """The panel, to be put into an SVG by `stack`."""
        parts = [_text(LEFT, 18, self.title, INK, weight="bold")]
        bottom, right = self.height - BOTTOM, self.width - RIGHT
        for tick in ticks(*self.x):
            parts.append(_text(self._x(tick), bottom + 16, self.x_format.format(tick), INK, anchor="middle"))
        for tick in ticks(*self.y):
            y = self._y(tick)
            parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="{GRID}"/>')
            parts.append(_text(LEFT - 6, y + 4, self.y_format.format(tick), INK, anchor="end"))
        parts.append(f'<path d="M{LEFT} {TOP}V{bottom}H{right}" stroke="{INK}" fill="none"/>')
        parts.append(_text((LEFT + right) / 2, self.height - 12, self.x_title, INK, anchor="middle"))
        middle = (TOP + bottom) / 2
        turned = _text(0, 0, self.y_title, INK, anchor="middle")
        parts.append(f'<g transform="translate(14 {middle:.0f}) rotate(-90)">{turned}</g>')
        place = float(LEFT)
        for name, colour in self._legend:
            parts.append(
                f'<path d="M{place + 5:.0f} 36h0" stroke="{colour}" stroke-width="10" stroke-linecap="round"/>'
            )
            parts.append(_text(place + 14, 40, name, INK))
            place += 7.2 * len(name) + 34
        return "\n".join([*parts, *self._parts])

    def _name(self, name: str, colour: str) -> None:
        if name:
            self._legend.append((name, colour))

    def _x(self, value: float) -> float:
        low, high = self.x
        return LEFT + (value - low) / (high - low) * (self.width - LEFT - RIGHT)

    def _y(self, value: float) -> float:
        low, high = self.y
        return self.height - BOTTOM - (value - low) / (high - low) * (self.height - TOP - BOTTOM)

    def _shows(self, x: float, y: float) -> bool:
        return self.x[0] <= x <= self.x[1] and self.y[0] <= y <= self.y[1]


def stack(*plots: Plot) -> str:
    """Panels one below the other, as an SVG file's text."""
    width, height = max(plot.width for plot in plots), sum(plot.height for plot in plots)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="13">'
    ]
    top = 0
    for plot in plots:
        parts.append(f'<g transform="translate(0 {top})">\n{plot.render()}\n</g>')
        top += plot.height
    return "\n".join([*parts, "</svg>\n"])


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers in [low, high], at most so many."""
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(place * step, 12) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def _text(x: float, y: float, text: str, colour: str, *, anchor: str = "start", weight: str = "normal") -> str:
    style = f'fill="{colour}" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
