"""Pages of an .epub: XHTML -> blocks, which blocks are headings, and which pages are not part of the book."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import NamedTuple

from dataset.novels.chapters.heading_choice import choose_headings
from dataset.novels.chapters.headings import HeadingCandidate, find_candidates, first_heading
from dataset.novels.normalized import without_blanks

CHAPTER_UNITS = "章回话話"
_PARAGRAPH_LEVEL = 7  # of headings that are marked up as paragraphs: below h6

_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_PARAGRAPHS = {
    *_HEADINGS, "p", "div", "li", "ul", "ol", "dl", "dt", "dd", "blockquote", "section", "article", "aside", "header",
    "footer", "main", "figure", "figcaption", "table", "tr", "td", "th", "pre", "hr", "body", "br",
}  # fmt: skip
_NO_TEXT = frozenset(("script", "style", "title", "svg", "template"))
# Readings above characters (ruby); their end tags may be omitted.
_READINGS = frozenset(("rt", "rp", "rtc"))
_VOID = frozenset(("area", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"))
_BLANKS = re.compile(r"[ \t\n\r\f]+")
_WRAP = re.compile(r"(?<=[\u2e80-\u9fff\uff00-\uffef]) ?\n ?(?=[\u2e80-\u9fff\uff00-\uffef])")
_IMAGE = "\ufffc"  # in place of an image: Unicode's object replacement character
_HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
# Alternative texts that describe an image, not a character that it depicts.
_CAPTIONS = frozenset((
    "图", "圖", "图片", "圖片", "插图", "插圖", "插画", "插畫", "封面", "图像", "照片", "表情", "空白", "分隔线",
))  # fmt: skip
MAX_ALT = 4

_CONTENTS = frozenset((
    "目录", "目錄", "目次", "总目录", "總目錄", "全书目录", "章节目录", "contents", "tableofcontents",
))  # fmt: skip
_IMPRINT = frozenset((
    "版权信息", "版權信息", "版权页", "版權頁", "版权声明", "版權聲明", "版权", "版權", "版权所有", "版權所有",
    "出版信息", "图书信息", "书籍信息", "图书在版编目", "图书在版编目(cip)数据", "制作信息", "制作说明", "copyright",
    "copyrightpage",
))  # fmt: skip
_IMPRINT_LINE = re.compile(
    r"(?:书\s*名|原书名|作\s*者|原著|著者|译者|编者|主编|绘者|出版社|出版发行|出版者|出版人|出版时间|出版日期|发行|字数|印数"
    r"|印张|版次|印次|开本|定价|责任编辑|策划编辑|特约编辑|封面设计|装帧设计|责任印制|统一书号|书号|印刷|地址|邮编|电话|网址"
    r"|制作)\s*[:：／/]|isbn|cip|版权所有|翻印必究|copyright|©",
    re.IGNORECASE,
)
_ADVERTISING = (
    "扫码", "二维码", "公众号", "微信", "微博", "qq群", "书友群", "加群", "关注", "电子书", "下载", "更多好书",
    "更多精彩", "搜索", "回复", "免费", "领取", "客户端", "app", "www.", "http", ".com", "网址", "阅读平台", "打赏",
    "书单",
)  # fmt: skip
MAX_CONTENTS_LINE, MAX_IMPRINT, MAX_ADVERTISEMENT = 60, 5_000, 400
"""Characters: of a line of contents; of the other pages, as a whole."""


class Image(NamedTuple):
    """An image of a page: its alternative text, and its file."""

    alt: str
    file: str

    @property
    def character(self) -> str:
        """The characters that it depicts; "" if its alternative text names none."""
        alt = without_blanks(self.alt)
        return alt if 0 < len(alt) <= MAX_ALT and alt not in _CAPTIONS and not alt.isascii() else ""


@dataclass
class PageBlock:
    """A paragraph of a page, or a heading.

    Attributes:
        level: 1 to 6 of a heading; 0 for a paragraph.
        heading: number of the page's heading that it belongs to, as line breaks split one into blocks; 0 for none.
        fragments: of its text.
        images: in the order of their positions in the text.
        ids: anchors in it that a table of contents can point to.
    """

    level: int = 0
    heading: int = 0
    fragments: list[str] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)

    @property
    def text(self) -> str:
        """Its text, blanks normalised; images in running text are replaced by the characters that they depict."""
        images = iter(self.images)
        shown = self.is_running
        joined = re.sub(_IMAGE, lambda _: next(images).character if shown else "", "".join(self.fragments))
        joined = re.sub(r"[ \t\r\f]*\n[ \t\r\n\f]*", "\n", joined)
        cleaned = _BLANKS.sub(" ", _WRAP.sub("", joined)).strip(" ")
        return "" if cleaned.isspace() else cleaned

    @property
    def is_running(self) -> bool:
        """Whether there is text beside the images."""
        return bool("".join(self.fragments).replace(_IMAGE, "").strip())

    def lost(self) -> list[str]:
        """Images in running text that may be characters but do not say which: "…text before[file]"."""
        if not self.is_running:
            return []
        parts = "".join(self.fragments).split(_IMAGE)
        return [
            f"…{without_blanks(''.join(parts[: number + 1]))[-10:]}[{image.file}]"
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
    """Collects blocks in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks = [PageBlock()]
        self._silent = 0
        self._levels: list[int] = []
        self._headings = 0
        self._in_link = False  # to a note: its image is a sign to click on
        self._reading = False
        self._hidden: list[str] = []  # open tags from a hidden one on, that one first

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
            self._start_block()
        if tag == "a":
            self._in_link = "#" in (given.get("href") or "") or "noteref" in (given.get("epub:type") or "")
        if tag == "img" and not self._is_ignored() and not self._in_link:
            self.blocks[-1].images.append(Image(given.get("alt") or "", given.get("src") or ""))
            self.blocks[-1].fragments.append(_IMAGE)
        self.blocks[-1].ids.update(value for name, value in attrs if name in ("id", "name") and value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _NO_TEXT:
            self.handle_starttag(tag, attrs)
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._hidden:
            while self._hidden.pop() != tag:
                pass  # tags whose end tags are omitted
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
            self._start_block()

    def handle_data(self, data: str) -> None:
        if not self._is_ignored():
            self.blocks[-1].fragments.append(data.replace(_IMAGE, ""))

    def _is_ignored(self) -> bool:
        return bool(self._silent or self._reading or self._hidden)

    def _start_block(self) -> None:
        block = PageBlock(self._levels[-1], self._headings) if self._levels else PageBlock()
        if not self.blocks[-1].text:  # anchors before a paragraph point to it
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


def matter_of_page(texts: Sequence[str], titles: Collection[str], at_the_edge: bool) -> str:
    """The rule by which a page is left out; "" for a page of the book.

    Args:
        texts: its paragraphs and headings; not empty.
        titles: of the table of contents.
        at_the_edge: whether it is among the first or the last pages of the book.
    """
    if rule := matter_of_section(texts[0], texts[1:]):
        return rule
    known = {_plain(title) for title in titles}
    if len(texts) >= 4 and sum(_plain(text) in known for text in texts) >= 0.8 * len(texts):
        return "contents_page"
    size = sum(map(len, texts))
    named = sum(_IMPRINT_LINE.match(text) is not None for text in texts)
    if named >= 3 and named >= 0.6 * len(texts) and size <= MAX_IMPRINT:
        return "imprint_page"
    advertises = all(sum(word in text.lower() for word in _ADVERTISING) >= 2 for text in texts)
    return "advertisement_page" if at_the_edge and size <= MAX_ADVERTISEMENT and advertises else ""


def matter_of_section(title: str, texts: Sequence[str]) -> str:
    """The rule by which the text below a title is left out because of the title; "" for a chapter."""
    plain = _plain(title)
    if plain in _CONTENTS and all(len(text) <= MAX_CONTENTS_LINE for text in texts):
        return "contents_page"
    return "imprint_page" if plain in _IMPRINT and sum(map(len, texts)) <= MAX_IMPRINT else ""


def _plain(text: str) -> str:
    return without_blanks(text).replace("（", "(").replace("）", ")").strip("【】[]《》—-").lower()


def mark_headings(blocks: Sequence[PageBlock]) -> None:
    """Mark numbered headings that are paragraphs, in a book none of whose numbered headings is marked as one."""
    if not any(is_chapter(block.text) for block in blocks if block.level):
        for heading in choose_headings([block.text for block in blocks]).chapters:
            if heading.unit in CHAPTER_UNITS:
                blocks[heading.index].level = _PARAGRAPH_LEVEL


def find_units(blocks: list[PageBlock], level: int) -> list[tuple[int, str, HeadingCandidate | None]]:
    """Headings: index of the first block, the text of it and of those joined to it, and the number if it has one.

    Consecutive headings are one ("第二章", "风"), until one that has a chapter number itself, or is another of the
    `level` of chapters below one with a title.
    """
    units: list[tuple[int, str, HeadingCandidate | None]] = []
    for index, block in enumerate(blocks):
        if not block.level:
            continue
        shaped = first_heading([block.text])
        above = blocks[index - 1] if index else None
        if above is None or not above.level or shaped is not None:
            units.append((index, block.text, shaped))
            continue
        first, title, before = units[-1]
        untitled = first == index - 1 and before is not None and not before.title
        if block.level == level and block.heading != above.heading and not untitled:
            units.append((index, block.text, shaped))
        else:
            units[-1] = (first, f"{title} {block.text}", before)
    return units


def chapter_level(levels: Sequence[int], only: bool) -> int:
    """The level of the headings that begin chapters in a book without contents: the highest, if it is repeated.

    `only`: the page is the whole book, in which a single heading is the book's name.
    """
    repeated = [level for level in sorted(set(levels)) if levels.count(level) > 1]
    return repeated[0] if repeated and (only or repeated[0] == min(levels)) else 0


def is_chapter(title: str) -> bool:
    """Whether a title has a chapter's number."""
    return any(one.shaped and one.unit in CHAPTER_UNITS for one in find_candidates([title]))


def matches_title(heading: str, title: str) -> bool:
    """Whether a heading equals a title of the contents, or one of the two is the beginning of the other."""
    first, second = without_blanks(heading), without_blanks(title)
    return bool(second) and (first.startswith(second) or second.startswith(first))
