"""Charts of a report as inline SVG.

Every horizontal length is a share of the chart's width and every text has its own size, so that one chart fits a phone
and a wide screen with letters of the same size. Texts stay texts, in the reader's fonts. Colours come from the page's
style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

_UNITS = ((10**9, "\N{NO-BREAK SPACE}G"), (10**6, "\N{NO-BREAK SPACE}M"), (10**3, "\N{NO-BREAK SPACE}k"))


class BarSegment(NamedTuple):
    """A segment of a bar."""

    label: str
    value: float
    """At least 0."""
    kind: str
    """The CSS class that gives its colour."""


class LogScale(NamedTuple):
    """Values from `low` to `high` along a chart's width, each decade equally wide."""

    low: int
    high: int

    def place(self, value: float) -> float:
        """Position of a value, in per cent of the width; values beyond the ends are at the ends."""
        inside = min(max(value, self.low), self.high)
        return 100 * math.log10(inside / self.low) / math.log10(self.high / self.low)


def decades(values: Sequence[float]) -> LogScale:
    """The shortest scale of whole decades that contains all values; values below 1 count as 1."""
    low = math.floor(math.log10(max(1, min(values, default=1))) + 1e-9)
    high = math.ceil(math.log10(max(1, max(values, default=1))) - 1e-9)
    return LogScale(10**low, 10 ** max(high, low + 1))


def close_scale(values: Sequence[int]) -> LogScale:
    """A scale from and to 1, 2 or 5 times a power of ten that contains 98 % of the values; outliers are at its ends."""
    ordered = sorted(values) or [1]
    low, high = (max(1, quantile(ordered, share)) for share in (0.01, 0.99))
    steps = [factor * 10**power for power in range(len(str(high)) + 1) for factor in (1, 2, 5)]
    below = max(step for step in steps if step <= low)
    return LogScale(below, min(step for step in steps if step >= high and step > below))


def shares(values: Sequence[int], decimals: int = 2) -> list[str]:
    """Each value's share in per cent, rounded so that the shares shown add up to 100 exactly (largest remainders)."""
    total = sum(values)
    steps = 100 * 10**decimals if total else 0
    floors = [value * steps // max(total, 1) for value in values]
    largest = sorted(range(len(values)), key=lambda i: (-(values[i] * steps % max(total, 1)), i))
    for i in largest[: steps - sum(floors)]:
        floors[i] += 1
    return [f"{floor // 10**decimals}.{floor % 10**decimals:0{decimals}d}" for floor in floors]


def quantile(ordered: Sequence[int], share: float) -> int:
    """The value of an ordered, non-empty sequence below which about `share` of the values are."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def short_number(value: float) -> str:
    """Three digits and a unit: 941, 12.4 k, 7.40 M."""
    for size, unit in _UNITS:
        if value >= size * 0.9995:  # from here on rounding would give 1000 of the smaller unit
            scaled = value / size
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{unit}"
    return f"{value:,.0f}"


def tick_label(value: int) -> str:
    """A round number and a unit: 200, 1 k, 50 k."""
    return next((f"{value // size}{unit}" for size, unit in _UNITS if value >= size), str(value))


def _percent(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".") + "%"


def _svg(kind: str, height: int, description: str, content: Sequence[Markup]) -> Markup:
    return Markup('<svg class="{}" width="100%" height="{}" role="img" aria-label="{}">{}</svg>').format(
        kind, height, description, Markup("").join(content)
    )


def _rectangle(kind: str, x: float, width: float, y: float, height: float, title: str = "") -> Markup:
    inner = Markup("<title>{}</title>").format(title) if title else Markup("")
    return Markup('<rect class="{}" x="{}" y="{:g}" width="{}" height="{:g}">{}</rect>').format(
        kind, _percent(x), y, _percent(width), height, inner
    )


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{:g}" x2="{}" y2="{:g}"/>').format(
        kind, _percent(x1), y1, _percent(x2), y2
    )


def _text(kind: str, x: str, y: float, anchor: str, text: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{:g}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, text)


def stacked_bar(parts: Sequence[BarSegment], description: str, total: float = 0, height: int = 10) -> Markup:
    """A bar of segments, from left to right; the whole width is `total`, or the sum of the segments."""
    whole = total or sum(part.value for part in parts) or 1
    drawn: list[Markup] = []
    position = 0.0
    for part in parts:
        width = 100 * part.value / whole
        if width:
            drawn.append(_rectangle(part.kind, position, width, 0, height, f"{part.label}: {part.value:,}"))
        position += width
    return _svg("bar", height, description, drawn)


def box_strip(values: Sequence[int], scale: LogScale, description: str) -> Markup:
    """A box plot: min to max as a line, the middle half as a box, the median as a stroke."""
    ordered = sorted(values)
    shortest, low, middle, high, longest = (scale.place(quantile(ordered, at)) for at in (0, 0.25, 0.5, 0.75, 1))
    return _svg(
        "strip",
        14,
        description,
        [
            _line("whisker", shortest, 7, longest, 7),
            _line("whisker", shortest, 4, shortest, 10),
            _line("whisker", longest, 4, longest, 10),
            _rectangle("box", low, max(high - low, 0.5), 2, 10),
            _line("median", middle, 0, middle, 14),
        ],
    )


def histogram(values: Sequence[int], description: str, unit: str) -> Markup:
    """Counts of positive values on a logarithmic axis, with the median; ten bins a decade, five where values are few.

    Args:
        values: not empty.
        description: the alternative text.
        unit: of the counts, in the plural: "chapters".
    """
    top, bottom = 24, 152
    scale = decades(values)
    ticks = [10**power for power in range(len(str(scale.low)) - 1, len(str(scale.high)))]
    bins = 10 if len(values) >= 200 else 5
    counts = [0] * ((len(ticks) - 1) * bins)
    for value in values:
        place = int(scale.place(value) / 100 * len(counts) + 1e-9)
        counts[min(place, len(counts) - 1)] += 1
    # Grid lines at 1, 2 or 5 times a power of ten, so that two to five of them reach the largest count.
    power = 10 ** max(0, len(str(max(counts))) - 2)
    step = next(factor * power for factor in (1, 2, 5, 10, 20, 50, 100) if factor * power * 5 >= max(counts))
    highest = step * math.ceil(max(counts) / step)
    drawn: list[Markup] = []
    for count in range(0, highest + 1, step):
        y = bottom - (bottom - top) * count / highest
        drawn += [
            _line("grid", 0, y, 100, y),
            _text("axis", "-8", y + 4, "end", tick_label(count) if count % 1000 == 0 else f"{count:,}"),
        ]
    width = 100 / len(counts)
    for place, count in enumerate(counts):
        if count:
            edges = [scale.low * 10 ** (at / bins) for at in (place, place + 1)]
            title = f"{edges[0]:,.0f} – {edges[1]:,.0f}: {count:,} {unit}"
            height = (bottom - top) * count / highest
            drawn.append(_rectangle("count", place * width, width, bottom - height, height, title))
    for tick in ticks:
        drawn.append(_line("grid", scale.place(tick), bottom, scale.place(tick), bottom + 5))
        drawn.append(_text("axis", _percent(scale.place(tick)), bottom + 19, "middle", tick_label(tick)))
    middle = quantile(sorted(values), 0.5)
    at = scale.place(middle)
    anchor = "start" if at < 25 else "end" if at > 75 else "middle"
    drawn.append(_line("median", at, top - 6, at, bottom))
    drawn.append(_text("note", _percent(at), top - 11, anchor, f"median 中位数 {middle:,}"))
    return _svg("plot", bottom + 26, description, drawn)
