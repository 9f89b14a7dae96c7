"""Charts as inline SVG, styled by the page's CSS classes, so that one serves light and dark.

Two forms: `bars`, and `plot` with logarithmic axes for lines and points.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape


@dataclass
class Bar:
    label: str
    value: float
    low: float
    high: float
    style: str  # CSS class of the colour
    note: str  # shown on hover


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _open(width: float, height: float, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img" '
        f'aria-label="{escape(title, quote=True)}"><title>{escape(title)}</title>'
    )


def short(value: float) -> str:
    """A tick's text: 0.01, 5, 20, 4k (4000, and 4096, as lengths are said), 2M."""
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:g}k"
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:g}{suffix}"
    return f"{value:g}"


class Log:
    """A logarithmic scale from values to pixels."""

    def __init__(self, values: Iterable[float], start: float, end: float, base: int = 10) -> None:
        good = [v for v in values if v > 0] or [1.0, 10.0]
        self.low, self.high = min(good) / 1.15, max(good) * 1.15
        self.start, self.end, self.base = start, end, base

    def __call__(self, value: float) -> float:
        share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return self.start + min(share, 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        steps = (1, 2, 5) if self.high / self.low < 1000 and self.base == 10 else (1,)
        first = math.floor(math.log(self.low, self.base))
        last = math.ceil(math.log(self.high, self.base))
        every = 1 if last - first < 12 else 2
        powers = range(first, last + 1, every)
        found = [step * float(self.base) ** p for p in powers for step in steps]
        return [t for t in found if self.low <= t <= self.high]


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], title: str, width: float = 700) -> str:
    """Horizontal bars from 1x, to the right where above, on a logarithmic axis; whiskers from low
    to high."""
    left, bar, gap, top = 205.0, 13.0, 9.0, 24.0
    rows = sum(len(bars) for _, bars in groups)
    height = top + rows * bar + len(groups) * gap + 8
    everything = [v for _, bars in groups for b in bars for v in (b.low, b.high, b.value)]
    x = Log([*everything, 0.8, 1.5], left, width - 50)
    parts = [_open(width, height, title)]
    for tick in x.ticks():
        parts.append(_line(x(tick), top - 6, x(tick), height, "grid"))
        parts.append(_text(x(tick), top - 11, f"{short(tick)}x", "tick", "middle"))
    y = top
    for name, group in groups:
        parts.append(_text(left - 8, y + bar * len(group) / 2 + 4, name, "label", "end"))
        for b in group:
            begin, end = sorted((x(1.0), x(b.value)))
            middle = y + bar / 2 - 1
            parts.append(
                f'<g><title>{escape(b.note)}</title><rect x="{begin:.1f}" y="{y:.1f}" '
                f'width="{max(end - begin, 1):.1f}" height="{bar - 2:.1f}" class="{b.style}"/>'
                + _line(x(b.low), middle, x(b.high), middle, "whisker")
                + "</g>"
            )
            parts.append(_text(x(max(b.high, 1.0)) + 6, y + bar - 3, f"{b.value:.1f}x", "tick"))
            y += bar
        y += gap
    parts.append(_line(x(1.0), top - 6, x(1.0), height, "one"))
    return "".join([*parts, "</svg>"])


@dataclass
class Series:
    """Points, joined by a line where `line`; a style is a CSS class."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str
    line: bool = True
    notes: Sequence[str] = ()


def plot(
    series: Sequence[Series],
    title: str,
    x_name: str,
    y_name: str,
    size: tuple[float, float] = (430, 270),
    x_base: int = 10,
) -> str:
    """Logarithmic on both axes. Styles mean the same in every chart, so that one legend serves all;
    a limit's name stands at its line's end."""
    width, height = size
    left, top, bottom = 62.0, 30.0, height - 44
    xs, ys = ([p[i] for s in series for p in s.points] for i in (0, 1))
    x, y = Log(xs, left, width - 14, x_base), Log(ys, bottom, top)
    parts = [_open(width, height, title), _text(left, 16, title, "title")]
    for tick in x.ticks():
        parts.append(_line(x(tick), top, x(tick), bottom, "grid"))
        parts.append(_text(x(tick), bottom + 15, short(tick), "tick", "middle"))
    for tick in y.ticks():
        parts.append(_line(left, y(tick), width - 14, y(tick), "grid"))
        parts.append(_text(left - 6, y(tick) + 4, short(tick), "tick", "end"))
    parts.append(_text((left + width - 14) / 2, height - 8, x_name, "tick", "middle"))
    turned = _text(0, 0, y_name, "tick", "middle")
    parts.append(f'<g transform="translate(14 {(top + bottom) / 2:.1f}) rotate(-90)">{turned}</g>')
    for s in series:
        places = [(x(a), y(b)) for a, b in s.points]
        if s.line and len(places) > 1:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
            parts.append(f'<polyline points="{path}" class="curve {s.style}"/>')
        if "limit" in s.style:
            parts.append(_text(places[-1][0], places[-1][1] - 5, s.name, "tick", "end"))
            continue
        notes = s.notes or [f"{s.name}: {short(a)}, {b:.3g}" for a, b in s.points]
        for (a, b), note in zip(places, notes, strict=True):
            parts.append(
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" class="{s.style}"><title>'
                f"{escape(note)}</title></circle>"
            )
    return "".join([*parts, "</svg>"])
