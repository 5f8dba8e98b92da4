"""Draws line and dot charts as inline SVG: black on white, without script or network."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape
from typing import Any, TypeAlias

from numpy.typing import NDArray

Values: TypeAlias = Sequence[float] | NDArray[Any]
WIDTH, HEIGHT = 720, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 40


@dataclasses.dataclass(frozen=True, slots=True)
class Series:
    """One line or one set of dots. NaN leaves a gap; on a log axis 0 lies on the lowest line."""

    name: str
    x: Values
    y: Values
    color: str = "#000"
    width: float = 1.5
    dots: bool = False
    dash: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Band:
    """The area between two curves over the same x."""

    name: str
    x: Values
    low: Values
    high: Values
    color: str = "#ccc"


class Axis:
    """Maps data to pixels, linearly or logarithmically, with readable ticks. A logarithmic axis of
    values that can be 0 has a lowest line for them, a decade below the smallest other."""

    def __init__(
        self, values: Sequence[float], start: float, stop: float, log: bool = False
    ) -> None:
        good = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        low: float
        high: float
        low, high = (min(good), max(good)) if good else (0.1, 1.0)
        self.has_zero = log and any(v == 0 for v in values)
        if log:
            low, high = math.floor(math.log10(low)), math.ceil(math.log10(high))
            low -= self.has_zero
        if low == high:
            low, high = low - 0.5, high + 0.5
        self.low, self.high, self.start, self.stop, self.log = low, high, start, stop, log

    def pixel(self, value: float) -> float | None:
        """Returns the pixel, or None where the value cannot be drawn."""
        if value == 0 and self.has_zero:
            return self.start
        if not math.isfinite(value) or (self.log and value <= 0):
            return None
        v = math.log10(value) if self.log else value
        return self.start + (v - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Returns decades (and 0 where it has a line), or about five round numbers."""
        if self.log:
            every, first = max(1, math.ceil((self.high - self.low) / 7)), int(self.low)
            decades = [10.0**e for e in range(first + self.has_zero, int(self.high) + 1, every)]
            return [0.0, *decades] if self.has_zero else decades
        raw = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(raw))
        step = min((m * unit for m in (1, 2, 5, 10) if m * unit >= raw), default=raw)
        first = math.ceil(self.low / step)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def chart(
    title: str,
    series: Sequence[Series],
    bands: Sequence[Band] = (),
    *,
    x_label: str = "step",
    y_label: str = "",
    log: bool = False,
    log_x: bool = False,
) -> str:
    """Returns the chart as one <figure> with a legend."""
    xs = [v for s in series for v in s.x] + [v for b in bands for v in b.x]
    ys = [v for s in series for v in s.y] + [v for b in bands for v in (*b.low, *b.high)]
    x = Axis(xs, LEFT, WIDTH - RIGHT, log_x)
    y = Axis(ys, HEIGHT - BOTTOM, TOP, log)
    parts = [_grid(x, y, x_label, y_label)]
    parts += [_band(b, x, y) for b in bands]
    parts += [_dots(s, x, y) if s.dots else _line(s, x, y) for s in series]
    names = [(s.name if _visible(s, y) else f"{s.name} (no finite value)", s.color) for s in series]
    names = [n for s, n in zip(series, names, strict=True) if s.name]
    names += [(b.name, b.color) for b in bands]
    legend = "".join(_legend(name, color) for name, color in names)
    head = f"<figure><figcaption>{escape(title)}</figcaption>"
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
    return f'{head}{svg}{"".join(parts)}</svg><p class="legend">{legend}</p></figure>'


def _visible(s: Series, y: Axis) -> bool:
    return any(y.pixel(float(value)) is not None for value in s.y)


def _legend(name: str, color: str) -> str:
    return f'<span><i style="background:{color}"></i>{escape(name)}</span> '


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _number(v: float) -> str:
    return f"{v:.0e}" if v and not 1e-3 <= abs(v) < 1e5 else f"{v:.6g}"


def _grid(x: Axis, y: Axis, x_label: str, y_label: str) -> str:
    lines = []
    for value in y.ticks():
        p = y.pixel(value) or 0.0
        lines.append(f'<path d="M{LEFT} {p:.1f}H{WIDTH - RIGHT}" stroke="#e4e4e4"/>')
        lines.append(_text(LEFT - 6, p + 4, _number(value), "end"))
    for value in x.ticks():
        lines.append(_text(x.pixel(value) or 0.0, HEIGHT - BOTTOM + 16, _number(value), "middle"))
    frame = f"M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"
    lines.append(f'<path d="{frame}" fill="none" stroke="#000"/>')
    lines.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle"))
    lines.append(f'<g transform="translate(12 {HEIGHT / 2}) rotate(-90)">')
    lines.append(_text(0, 0, y_label, "middle") + "</g>")
    return "".join(lines)


def _line(s: Series, x: Axis, y: Axis) -> str:
    path, pen_up = [], True
    for a, b in zip(s.x, s.y, strict=True):
        px, py = x.pixel(float(a)), y.pixel(float(b))
        if px is None or py is None:
            pen_up = True
            continue
        path.append(f"{'M' if pen_up else 'L'}{px:.1f} {py:.1f}")
        pen_up = False
    dash = f' stroke-dasharray="{s.dash}"' if s.dash else ""
    return (
        f'<path d="{"".join(path)}" fill="none" stroke="{s.color}" stroke-width="{s.width}"{dash}/>'
    )


def _dots(s: Series, x: Axis, y: Axis) -> str:
    places = [(x.pixel(float(a)), y.pixel(float(b))) for a, b in zip(s.x, s.y, strict=True)]
    return "".join(
        f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{1.5 * s.width:.1f}" fill="{s.color}"/>'
        for px, py in places
        if px is not None and py is not None
    )


def _band(b: Band, x: Axis, y: Axis) -> str:
    edge = [(x.pixel(float(a)), y.pixel(float(h))) for a, h in zip(b.x, b.high, strict=True)]
    edge += [(x.pixel(float(a)), y.pixel(float(v))) for a, v in zip(b.x, b.low, strict=True)][::-1]
    points = " ".join(f"{px:.1f},{py:.1f}" for px, py in edge if px is not None and py is not None)
    return f'<polygon points="{points}" fill="{b.color}"/>'
