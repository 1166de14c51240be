"""Plots with two axes as inline SVG that follows the page's width: axes, curves, and marks that keep their size.

Across, everything is in percent of the width; up, in pixels. Text keeps its size on every screen, and so do marks.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

TOP = 8  # pixels above the plot
_SCALE = 1000  # units of a curve's own coordinates in either direction
_FEWEST, _MOST = 2, 6  # ticks of an axis


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high`; `unit` stands behind the first tick's number."""

    low: float
    high: float
    unit: str = ""
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies, from 0 to 1; beyond the ends it lies at the end."""
        low, high, value = (
            (math.log(v) for v in (self.low, self.high, value))
            if self.log
            else (
                self.low,
                self.high,
                value,
            )
        )
        return min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.5

    def ticks(self) -> list[float]:
        """Round numbers between the ends: a few of them."""
        return _decades(self.low, self.high) if self.log else _steps(self.low, self.high)

    def label(self, tick: float, first: bool) -> str:
        return f"{tick:g} {self.unit}".rstrip() if first else f"{tick:g}"


def around(
    values: Iterable[float],
    unit: str = "",
    *,
    zero: bool = False,
    log: bool = False,
    least: float = 0.0,
    left: float = 0.0,
) -> Axis:
    """An axis that holds all `values` with some room, from zero on with `zero`; they must not be empty.

    It spans at least `least`, so that differences without meaning do not fill it; a share `left` of it is kept free
    before the first value, where the numbers of the other axis stand.
    """
    found = list(values)
    low, high = min(found), max(found)
    if log:
        return Axis(low / 1.15, high * 1.15, unit, True)
    missing = max(least - (high - low), 0.0) / 2
    low, high = low - missing, high + missing
    room = (high - low or abs(high) or 1.0) * 0.08
    low, high = (0.0 if zero else low - room), high + room
    return Axis(low - left * (high - low), high, unit)


def plot(title: str, height: int, x: Axis, y: Axis | None, content: Iterable[Markup], caption: str = "") -> Markup:
    """The frame of a plot `height` pixels high: grid, numbers, and what was drawn with `curve` and `mark`.

    Without `y` there is nothing to read upwards. `caption` says below the numbers what the axis across is.
    """
    parts = [*(_grid_up(y, height) if y else ()), *_grid_across(x, height), *content]
    below = 20
    if caption:
        below = 36
        text = Markup('<text class="tick" x="100%" y="{}" text-anchor="end">{}</text>')
        parts.append(text.format(TOP + height + 31, caption))
    return Markup('<svg class="picture plot" role="img" aria-label="{}" width="100%" height="{}">{}</svg>').format(
        title, height + TOP + below, Markup().join(parts)
    )


def curve(points: Sequence[tuple[float, float]], kind: str, height: int, x: Axis, y: Axis) -> Markup:
    """A line through `points` (x, y)."""
    places = " ".join(f"{_SCALE * x.at(a):.1f},{_SCALE * (1 - y.at(b)):.1f}" for a, b in points)
    return Markup(
        '<svg x="0" y="{}" width="100%" height="{}" viewBox="0 0 {} {}" preserveAspectRatio="none">'
        '<polyline class="curve {}" points="{}"/></svg>'
    ).format(TOP, height, _SCALE, _SCALE, kind, places)


def mark(place: tuple[float, float], drawn: Markup, height: int, x: Axis, y: Axis) -> Markup:
    """`drawn`, whose own origin is at 0, 0, at the place (x, y)."""
    return Markup('<svg x="{:.2f}%" y="{:.1f}" overflow="visible">{}</svg>').format(
        100 * x.at(place[0]), TOP + height * (1 - y.at(place[1])), drawn
    )


def sparkline(values: Sequence[float | None], kind: str = "good") -> Markup:
    """A curve of a few numbers without axes, with a dot on the last one; gaps are skipped."""
    known = [(i, v) for i, v in enumerate(values) if v is not None]
    if len(known) < 2:
        return Markup()
    wide, high, room = 72, 22, 3
    y = around([v for _, v in known])
    places = [
        (room + (wide - 2 * room) * i / (len(values) - 1), room + (high - 2 * room) * (1 - y.at(v))) for i, v in known
    ]
    spoken = ", ".join(f"{v:g}" for _, v in known)
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    return Markup(
        '<svg class="spark" role="img" aria-label="{}" width="{}" height="{}">'
        '<polyline class="curve {}" points="{}"/><circle class="{}" cx="{:.1f}" cy="{:.1f}" r="2.5"/></svg>'
    ).format(spoken, wide, high, kind, line, kind, *places[-1])


def key(entries: Iterable[tuple[str, str]]) -> Markup:
    """What the colours mean: (kind, words)."""
    items = Markup().join(Markup('<span><i class="{}"></i>{}</span>').format(kind, text) for kind, text in entries)
    return Markup('<p class="key">{}</p>').format(items)


def _grid_up(y: Axis, height: int) -> list[Markup]:
    parts = []
    for index, tick in enumerate(reversed(y.ticks())):
        place = TOP + height * (1 - y.at(tick))
        line = Markup('<line class="grid" x1="0" x2="100%" y1="{0:.1f}" y2="{0:.1f}"/>').format(place)
        text = Markup('<text class="tick" x="0" y="{:.1f}">{}</text>').format(place - 3, y.label(tick, index == 0))
        parts += [line, text]
    return parts


def _grid_across(x: Axis, height: int) -> list[Markup]:
    parts = []
    for index, tick in enumerate(x.ticks()):
        at = 100 * x.at(tick)
        line = Markup('<line class="grid" x1="{0:.2f}%" x2="{0:.2f}%" y1="{1}" y2="{2}"/>').format(
            at, TOP, TOP + height
        )
        anchor = "start" if at < 6 else "end" if at > 94 else "middle"
        text = Markup('<text class="tick" x="{:.2f}%" y="{}" text-anchor="{}">{}</text>').format(
            at, TOP + height + 15, anchor, x.label(tick, index == 0)
        )
        parts += [line, text]
    return parts


def _steps(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in [low, high]."""
    span = high - low
    if not span > 0:
        return [low]
    power = 10 ** math.floor(math.log10(span))
    for step in (power * f for f in (0.1, 0.2, 0.5, 1, 2, 5)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < _MOST:
            return [float(f"{step * i:.10g}") for i in range(first, last + 1)]
    return [low]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high], with 2 and 5 times them where those are few; multiples where even these are."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        found = [float(f"{f * 10.0**p:.6g}") for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(found) > _FEWEST:
            return found if len(found) <= _MOST + 2 else found[:: math.ceil(len(found) / _MOST)]
    return _steps(low, high)
