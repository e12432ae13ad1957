"""Charts as pictures: PNG files, and SVG for wide and narrow pages in light and dark colours.

Letters in the pictures are outlines, so they look alike everywhere. Chinese ones, which matplotlib's own font lacks,
come from a font of this machine; without one, labels are English only. The same charts give the same bytes.
"""

from __future__ import annotations

import base64
import io
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from matplotlib import font_manager, get_data_path, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

from novelgpt.settings.terminal import one_line

# By Okabe and Ito (2008), "Color Universal Design", darkened where thin lines need it, so that colour-blind readers can
# tell them apart. Each series also has its own marker and line style.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b5589a", "#c98a00", "#3aa0dc")
MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", (0, (6, 1.5)), (0, (2, 1)), "-.", (0, (8, 2, 1, 2, 1, 2)), (0, (4, 3)))
INK, SOFT, GRID, HUMAN = "#1d1c1a", "#6a665e", "#e3dfd6", "#57534c"
_DARK = {
    **dict(zip(COLOURS, ("#4fb0ea", "#ff8a3d", "#35c79b", "#e08fc6", "#f0b429", "#9ad8ff"), strict=True)),
    INK: "#ebe8e1",
    SOFT: "#a29d93",
    GRID: "#38362f",
    HUMAN: "#c9c4b8",
}

COUNTS = "{x:,.0f}"
"""Format of an axis that counts: 12,000."""

_PIXELS_PER_INCH = 96
WIDE, FULL, NARROW = 562, 1160, 360
"""Widths of pictures in CSS pixels: half the page, the whole page, and a phone."""


@dataclass(frozen=True)
class ChartLabels:
    """How labels are written. font: for Chinese letters, None for English labels only; narrow: little room."""

    font: ChineseFont | None
    narrow: bool = False

    def both(self, english: str, chinese: str) -> str:
        """Both languages, or English where no font has the Chinese letters."""
        return f"{english} {chinese}" if self.can_write(chinese) else english

    def can_write(self, text: str) -> bool:
        """Whether the font has every letter."""
        letters = self.font.characters if self.font else frozenset()
        return all(character.isascii() or character in letters for character in text)


@dataclass(frozen=True)
class Chart:
    """A chart to draw.

    Attributes:
        name: of its PNG file.
        english: title.
        chinese: title.
        note: a sentence that says what the chart shows; also the alternative text.
        note_chinese: the same in Chinese.
        draw: draws on the axes.
        height: in CSS pixels.
        legend_rows: entries of the legend, for which room is left.
        full: as wide as the page.
    """

    name: str
    english: str
    chinese: str
    note: str
    note_chinese: str
    draw: Callable[[Axes, ChartLabels], None]
    height: int = 330
    legend_rows: int = 0
    full: bool = False


@dataclass(frozen=True)
class Picture:
    """A drawn chart. svgs: data URIs by width ("wide", "narrow") and colours ("light", "dark")."""

    chart: Chart
    png: bytes
    svgs: dict[tuple[str, str], str]


def draw_picture(chart: Chart, font: ChineseFont | None) -> Picture:
    """Draw a chart in every form; `picture` of page_macros.html shows it on a page."""
    settings: dict[Any, Any] = {
        "font.family": [*([font.family] if font else []), OWN_FAMILY], "font.size": 9.0, "axes.titlesize": 10.5,
        "axes.labelsize": 9.0, "legend.fontsize": 8.5, "text.parse_math": False, "axes.unicode_minus": False,
        "text.color": INK, "axes.labelcolor": SOFT, "axes.edgecolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT,
        "grid.color": GRID, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
        "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "axes.axisbelow": True, "svg.fonttype": "path",
        "svg.hashsalt": chart.name, "lines.linewidth": 1.8, "axes.titlelocation": "left", "axes.titlepad": 10.0,
        "legend.frameon": False,
    }  # fmt: skip
    width = FULL if chart.full else WIDE
    svgs = {}
    with rc_context(settings):
        for form, pixels in (("wide", width), ("narrow", NARROW)):
            figure = _figure(chart, ChartLabels(font, form == "narrow"), pixels, title=False)
            for background in (figure.patch, *(axes.patch for axes in figure.axes)):  # the page shows through
                background.set_alpha(0.0)
            stream = io.StringIO()
            figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
            light = stream.getvalue()
            light = light[light.index("<svg") :]  # the root element, which is what a data URI takes
            dark = re.sub("|".join(_DARK), lambda found: _DARK[found[0]], light)
            for scheme, svg in (("light", light), ("dark", dark)):
                svgs[form, scheme] = f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
        figure = _figure(chart, ChartLabels(font), width, title=True)
        return Picture(chart, figure_png(figure, dpi=2 * _PIXELS_PER_INCH), svgs)


def figure_png(figure: Figure, dpi: float | None = None) -> bytes:
    """A figure as a PNG file; `dpi` replaces the figure's own."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi or figure.dpi, metadata={"Software": None})
    return stream.getvalue()


def _figure(chart: Chart, labels: ChartLabels, pixels: int, title: bool) -> Figure:
    columns = 1 if labels.narrow else 4 if chart.full else 2
    legend = 20 * -(-chart.legend_rows // columns) if chart.legend_rows > 1 else 0
    size = (pixels / _PIXELS_PER_INCH, (chart.height + legend + 24 * title) / _PIXELS_PER_INCH)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    chart.draw(axes, labels)
    if title:
        axes.set_title(labels.both(chart.english, chart.chinese), color=INK, fontweight="normal")
    handles, names = axes.get_legend_handles_labels()
    if len(names) > 1:
        figure.legend(
            handles, names, loc="outside lower left", ncols=columns, handlelength=2.6, columnspacing=1.6,
            borderaxespad=0.2,
        )  # fmt: skip
    return figure


FONT_FILES = (
    "NotoSansCJKsc", "NotoSansSC", "NotoSansCJK", "SourceHanSansSC", "SourceHanSansCN", "SourceHanSans", "PingFang",
    "HiraginoSansGB", "msyh", "MicrosoftYaHei", "HarmonyOSSansSC", "SarasaGothicSC", "wqymicrohei", "wqyzenhei",
    "STHeiti", "simhei", "Deng", "DroidSansFallback", "ArialUnicode", "NotoSerifCJK", "SourceHanSerif", "simsun",
    "uming", "ukai",
)  # fmt: skip
"""Beginnings of the file names of fonts with Chinese letters, the best for a screen first; then others."""

# Fonts that have a box or nothing for every letter.
_EMPTY = ("lastresort", "adobeblank", "adobenotdef")
# It warns of each font whose only weight is not called "normal".
logging.getLogger(font_manager.__name__).setLevel(logging.ERROR)
_BOLD = re.compile(r"bold|black|heavy|medium|light|thin|bd\.|-[bl]\.", re.IGNORECASE)
OWN_FAMILY = "DejaVu Sans"
"""The font that comes with matplotlib."""
INSTALL_REMEDY = "install one, such as Noto Sans CJK (Debian, Ubuntu: apt install fonts-noto-cjk)"


@dataclass(frozen=True)
class ChineseFont:
    """A font file that has letters for Chinese labels.

    Attributes:
        path: of the file.
        family: name under which matplotlib knows it.
        characters: what it has letters for.
    """

    path: Path
    family: str
    characters: frozenset[str]


def find_chinese_font(needed: str, files: Iterable[Path] | None = None) -> ChineseFont | None:
    """The best font of the machine that has all letters of `needed`; None where there is none.

    Args:
        needed: what must be written; what ASCII has is not asked for.
        files: where to look; by default all fonts that the system names.
    """
    wanted = {character for character in needed if not character.isascii()}
    return next((_registered(*found) for found in _fonts(files) if wanted <= found[1]), None)


def _fonts(files: Iterable[Path] | None) -> Iterator[tuple[Path, frozenset[str]]]:
    """Files that matplotlib can read, with the characters that they have letters for, the best first."""
    if files is None:
        files = (Path(name) for name in font_manager.findSystemFonts())
    ranked = []
    for path in files:
        plain = re.sub(r"[-_ ]", "", path.name).lower()
        if not plain.startswith(_EMPTY):
            begins = (rank for rank, begin in enumerate(FONT_FILES) if plain.startswith(begin.lower()))
            ranked.append((next(begins, len(FONT_FILES)), bool(_BOLD.search(path.name)), str(path)))
    for _, _, name in sorted(ranked):
        try:
            yield Path(name), _characters(Path(name))
        except (OSError, RuntimeError, ValueError):
            continue  # a broken file, or a kind that matplotlib cannot read


def _characters(path: Path) -> frozenset[str]:
    return frozenset(map(chr, FT2Font(str(path)).get_charmap()))


def _registered(path: Path, characters: frozenset[str]) -> ChineseFont:
    font_manager.fontManager.addfont(str(path))
    return ChineseFont(path, font_manager.FontProperties(fname=str(path)).get_name(), characters)


@dataclass(frozen=True)
class Lettering:
    """How a text of any origin is drawn.

    Attributes:
        text: in one line, what no font has letters for as its code.
        families: names of fonts, by which matplotlib looks for each letter.
        complete: whether every letter is drawn as it is.
    """

    text: str
    families: tuple[str, ...]
    complete: bool


@lru_cache(maxsize=16)  # a picture that is drawn again looks through the machine's fonts once
def lettering(text: str, files: tuple[Path, ...] | None = None) -> Lettering:
    """The text as matplotlib's own font, and where that lacks letters a Chinese one, can draw it.

    Args:
        text: a name of a run, say. matplotlib must not read formulas in it: `parse_math=False`.
        files: where to look for fonts; by default all fonts that the system names.
    """
    text = one_line(text)
    drawn = _characters(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    families = [OWN_FAMILY]
    lacking = set(text) - drawn
    best: tuple[Path, frozenset[str]] | None = None
    for found in _fonts(files) if lacking else ():
        if len(lacking & found[1]) > (0 if best is None else len(lacking & best[1])):
            best = found
        if best is not None and lacking <= best[1]:
            break
    if best is not None:
        font = _registered(*best)
        families.append(font.family)
        drawn |= font.characters
    shown = "".join(letter if letter in drawn else f"<U+{ord(letter):04X}>" for letter in text)
    return Lettering(shown, tuple(families), shown == text)
