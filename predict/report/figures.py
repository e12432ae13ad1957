"""Charts as pictures: PNG files, and SVG for wide and narrow pages in light and dark colours.

Letters in the pictures are outlines, so that they look alike everywhere. Chinese ones come from a font of this machine;
without one, labels are English only. The same charts give the same bytes.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from novelgpt.settings.fonts import ChineseFont

# By Okabe and Ito (2008), "Color Universal Design", darkened where thin lines need it: people who do not see red or
# green as others do can tell them apart. Beside them, every run has a marker and a line of its own.
RUN_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b5589a", "#c98a00", "#3aa0dc")
RUN_MARKERS = ("o", "s", "^", "D", "v", "P")
RUN_LINES = ("-", (0, (6, 1.5)), (0, (2, 1)), "-.", (0, (8, 2, 1, 2, 1, 2)), (0, (4, 3)))
INK, SOFT, GRID, HUMAN, PAPER = "#1d1c1a", "#6a665e", "#e3dfd6", "#57534c", "#ffffff"
_DARK = {
    **dict(zip(RUN_COLOURS, ("#4fb0ea", "#ff8a3d", "#35c79b", "#e08fc6", "#f0b429", "#9ad8ff"), strict=True)),
    INK: "#ebe8e1",
    SOFT: "#a29d93",
    GRID: "#38362f",
    HUMAN: "#c9c4b8",
}

_POINTS_PER_INCH, _PIXELS_PER_INCH = 72, 96
WIDE, FULL, NARROW = 562, 1160, 360
"""Widths of pictures on the page in CSS pixels: half the page, all of it, and on a phone."""


@dataclass(frozen=True)
class Look:
    """How labels are written. font: of Chinese ones, None for English labels alone; narrow: little room."""

    font: ChineseFont | None
    narrow: bool = False

    def label(self, english: str, chinese: str) -> str:
        """Both languages, or English where no font has the Chinese letters."""
        return f"{english} {chinese}" if self.can_write(chinese) else english

    def can_write(self, text: str) -> bool:
        """Whether every letter would be seen."""
        return all(
            character.isascii() or (self.font is not None and character in self.font.characters) for character in text
        )


@dataclass(frozen=True)
class Chart:
    """What is to be drawn.

    Attributes:
        name: of its PNG file.
        english: title.
        chinese: title.
        note: what it says, in a sentence, for those who do not see it as well; and in Chinese.
        note_chinese: the same.
        draw: draws on the axes.
        height: in CSS pixels.
        legend_rows: entries of the legend, for which there must be room.
        full: as wide as the page.
    """

    name: str
    english: str
    chinese: str
    note: str
    note_chinese: str
    draw: Callable[[Axes, Look], None]
    height: int = 330
    legend_rows: int = 0
    full: bool = False


@dataclass(frozen=True)
class Picture:
    """A chart, drawn. svgs: by width ("wide", "narrow") and colours ("light", "dark"), as data URIs."""

    chart: Chart
    png: bytes
    svgs: dict[tuple[str, str], str]
    width: int
    height: int


def draw_picture(chart: Chart, font: ChineseFont | None) -> Picture:
    """Draw a chart in every form."""
    families = ([font.family] if font else []) + ["DejaVu Sans"]
    settings: dict[Any, Any] = {
        "font.family": families, "font.size": 9.0, "axes.titlesize": 10.5, "axes.labelsize": 9.0,
        "legend.fontsize": 8.5, "text.parse_math": False, "axes.unicode_minus": False, "text.color": INK,
        "axes.labelcolor": SOFT, "axes.edgecolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT, "grid.color": GRID,
        "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5, "axes.axisbelow": True, "svg.fonttype": "path", "svg.hashsalt": chart.name,
        "lines.linewidth": 1.8, "axes.titlelocation": "left", "axes.titlepad": 10.0, "legend.frameon": False,
    }  # fmt: skip
    width = FULL if chart.full else WIDE
    with rc_context(settings):
        svgs = {}
        for form, pixels in (("wide", width), ("narrow", NARROW)):
            svg = _draw_svg(chart, Look(font, form == "narrow"), pixels)
            svgs[form, "light"] = _data_uri(svg)
            svgs[form, "dark"] = _data_uri(_recoloured(svg))
        return Picture(chart, _draw_png(chart, Look(font), width), svgs, width, _height(chart, False))


def _figure(chart: Chart, look: Look, pixels: int, titled: bool) -> Figure:
    height = _height(chart, look.narrow) + 24 * titled
    figure = Figure(figsize=(pixels / _PIXELS_PER_INCH, height / _PIXELS_PER_INCH), layout="constrained")
    axes = figure.add_subplot()
    chart.draw(axes, look)
    if titled:
        axes.set_title(look.label(chart.english, chart.chinese), color=INK, fontweight="normal")
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        columns = _legend_columns(chart, look.narrow)
        figure.legend(
            handles, labels, loc="outside lower left", ncols=columns, handlelength=2.6, columnspacing=1.6,
            borderaxespad=0.2,
        )  # fmt: skip
    return figure


def _legend_columns(chart: Chart, narrow: bool) -> int:
    return 1 if narrow else 4 if chart.full else 2


def _height(chart: Chart, narrow: bool) -> int:
    rows = -(-chart.legend_rows // _legend_columns(chart, narrow)) if chart.legend_rows > 1 else 0
    return chart.height + 20 * rows


def _draw_svg(chart: Chart, look: Look, pixels: int) -> str:
    figure = _figure(chart, look, pixels, titled=False)
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0.0)
    for axes in figure.axes:
        axes.patch.set_alpha(0.0)
    stream = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(stream, format="svg", metadata=metadata)
    return stream.getvalue()


def _draw_png(chart: Chart, look: Look, pixels: int) -> bytes:
    figure = _figure(chart, look, pixels, titled=True)
    FigureCanvasAgg(figure)
    figure.patch.set_facecolor(PAPER)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=2 * _PIXELS_PER_INCH, metadata={"Software": None})
    return stream.getvalue()


def _recoloured(svg: str) -> str:
    return re.sub("|".join(_DARK), lambda found: _DARK[found[0]], svg)


def _data_uri(svg: str) -> str:
    # From the root element on: what stands before it is for files of their own.
    return "data:image/svg+xml;base64," + base64.b64encode(svg[svg.index("<svg") :].encode()).decode()
