"""A page of an .epub: XHTML -> paragraphs and headings, without what is not read as text."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import NamedTuple

_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_PARAGRAPHS = {
    *_HEADINGS, "p", "div", "li", "ul", "ol", "dl", "dt", "dd", "blockquote", "section", "article", "aside", "header",
    "footer", "main", "figure", "figcaption", "table", "tr", "td", "th", "pre", "hr", "body", "br",
}  # fmt: skip
_NO_TEXT = frozenset(("script", "style", "title", "svg", "template"))
# Readings above characters (ruby); their end tags may be left out.
_READINGS = frozenset(("rt", "rp", "rtc"))
_VOID = frozenset(("area", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"))
_BLANKS = re.compile(r"[ \t\n\r\f]+")
_WRAP = re.compile(r"(?<=[\u2e80-\u9fff\uff00-\uffef]) ?\n ?(?=[\u2e80-\u9fff\uff00-\uffef])")
_IMAGE = "\ufffc"  # where an image stands: Unicode's replacement for an object
_HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
# What an image shows, not a character that it stands for.
_CAPTIONS = frozenset((
    "图", "圖", "图片", "圖片", "插图", "插圖", "插画", "插畫", "封面", "图像", "照片", "表情", "空白", "分隔线",
))  # fmt: skip
LONGEST_ALT = 4


class Image(NamedTuple):
    """An image of a page: its alternative text, and its file."""

    alt: str
    file: str

    @property
    def character(self) -> str:
        """The characters that it stands for; "" where its text says none."""
        alt = "".join(self.alt.split())
        usable = 0 < len(alt) <= LONGEST_ALT and alt not in _CAPTIONS and not alt.isascii()
        return alt if usable else ""


class PageBlock:
    """A paragraph of a page, or a heading.

    Attributes:
        level: 1 to 6 of a heading; 0 for a paragraph.
        heading: which of the page's headings it belongs to, as line breaks make several blocks of one; 0 for none.
        pieces: of its text.
        images: in the order of their places in the text.
        ids: the places in it that a table of contents can point to.
    """

    def __init__(self, level: int, heading: int = 0) -> None:
        self.level = level
        self.heading = heading
        self.pieces: list[str] = []
        self.images: list[Image] = []
        self.ids: set[str] = set()

    @property
    def text(self) -> str:
        """Its text, blanks made regular; images in the running text give the characters that they stand for."""
        joined = "".join(self.pieces)
        images = iter(self.images)
        shown = self.is_running
        joined = re.sub(_IMAGE, lambda _: next(images).character if shown else "", joined)
        joined = re.sub(r"[ \t\r\f]*\n[ \t\r\n\f]*", "\n", joined)
        cleaned = _BLANKS.sub(" ", _WRAP.sub("", joined)).strip(" ")
        return "" if cleaned.isspace() else cleaned

    @property
    def is_running(self) -> bool:
        """Whether there is text beside the images."""
        return bool("".join(self.pieces).replace(_IMAGE, "").strip())

    def lost(self) -> list[tuple[str, Image]]:
        """Images in the running text that may be characters, of which nothing says which; with the text before each."""
        if not self.is_running:
            return []
        parts = "".join(self.pieces).split(_IMAGE)
        return [
            ("".join("".join(parts[: number + 1]).split())[-10:], image)
            for number, image in enumerate(self.images)
            if not image.character
        ]


def read_page(text: str) -> list[PageBlock]:
    """The blocks of a page that have text, in order."""
    page = _Page()
    page.feed(text)
    page.close()
    return [block for block in page.blocks if block.text]


class _Page(HTMLParser):
    """Takes up blocks in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks = [PageBlock(0)]
        self._silent = 0
        self._levels: list[int] = []
        self._headings = 0
        self._in_link = False  # to a note: its image is a sign to click on
        self._reading = False
        self._hidden: list[str] = []  # tags that are open within a hidden one, that one first

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in _VOID and (self._hidden or _is_hidden(given)):
            self._hidden.append(tag)
        if tag in _NO_TEXT:
            self._silent += 1
        if tag in _READINGS or tag == "rb":
            self._reading = tag != "rb"
        if tag in _HEADINGS:
            self._levels.append(_HEADINGS[tag])
            self._headings += 1
        if tag in _PARAGRAPHS:
            self._begin()
        if tag == "a":
            self._in_link = "#" in (given.get("href") or "") or "noteref" in (given.get("epub:type") or "")
        if tag == "img" and not self._is_apart() and not self._in_link:
            self.blocks[-1].images.append(Image(given.get("alt") or "", given.get("src") or ""))
            self.blocks[-1].pieces.append(_IMAGE)
        self.blocks[-1].ids.update(value for name, value in attrs if name in ("id", "name") and value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _NO_TEXT:
            self.handle_starttag(tag, attrs)
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._hidden:
            while self._hidden.pop() != tag:
                pass  # end tags that are left out
        if tag in _NO_TEXT:
            self._silent = max(0, self._silent - 1)
        if tag in _READINGS or tag == "ruby":
            self._reading = False
        if tag in _HEADINGS and self._levels:
            self._levels.pop()
        if tag == "a":
            self._in_link = False
        if tag in _PARAGRAPHS:
            self._reading = False
            self._begin()

    def handle_data(self, data: str) -> None:
        if not self._is_apart():
            self.blocks[-1].pieces.append(data.replace(_IMAGE, ""))

    def _is_apart(self) -> bool:
        return bool(self._silent or self._reading or self._hidden)

    def _begin(self) -> None:
        block = PageBlock(self._levels[-1], self._headings) if self._levels else PageBlock(0)
        if not self.blocks[-1].text:  # places in front of a paragraph point to it
            block.ids = self.blocks.pop().ids
        self.blocks.append(block)


def _is_hidden(given: dict[str, str | None]) -> bool:
    """Whether readers do not see an element, or see the number of a printed page in it."""
    kinds = f"{given.get('epub:type') or ''} {given.get('role') or ''}".split()
    return (
        "hidden" in given
        or bool({"pagebreak", "doc-pagebreak"} & set(kinds))
        or bool(_HIDDEN.search(given.get("style") or ""))
    )
