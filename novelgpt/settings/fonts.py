"""Fonts of this machine for the letters of pictures: matplotlib's own font has no Chinese ones."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from matplotlib import font_manager, get_data_path
from matplotlib.ft2font import FT2Font

from novelgpt.settings.terminal import one_line

FONT_FILES = (
    "NotoSansCJKsc", "NotoSansSC", "NotoSansCJK", "SourceHanSansSC", "SourceHanSansCN", "SourceHanSans", "PingFang",
    "HiraginoSansGB", "msyh", "MicrosoftYaHei", "HarmonyOSSansSC", "SarasaGothicSC", "wqymicrohei", "wqyzenhei",
    "STHeiti", "simhei", "Deng", "DroidSansFallback", "ArialUnicode", "NotoSerifCJK", "SourceHanSerif", "simsun",
    "uming", "ukai",
)  # fmt: skip
"""Beginnings of the file names of fonts with Chinese letters, the best for a screen first; then others."""

# Fonts that have a box or nothing for every letter.
_EMPTY = ("lastresort", "adobeblank", "adobenotdef")
# It tells of each font whose one weight is not called "normal".
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
