"""Chapters of an .epub: its reading order, its table of contents, and the text of its pages."""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from urllib.parse import unquote
from xml.etree import ElementTree

from dataset.decode import decode_tolerant
from dataset.novels.records import BadBytes, Section
from novelgpt.settings.errors import UserError

_HEADINGS = frozenset(f"h{level}" for level in range(1, 7))
_PARAGRAPHS = _HEADINGS | {
    "p", "div", "li", "ul", "ol", "dl", "dt", "dd", "blockquote", "section", "article", "aside", "header", "footer",
    "main", "figure", "figcaption", "table", "tr", "td", "th", "pre", "hr", "body", "br",
}  # fmt: skip
_NO_TEXT = frozenset(("script", "style", "title", "svg", "template"))
_BLANKS = re.compile(r"[ \t\n\r\f]+")
_WRAP = re.compile(r"(?<=[\u2e80-\u9fff\uff00-\uffef]) ?\n ?(?=[\u2e80-\u9fff\uff00-\uffef])")
_SKIPPED = ("cover", "toc")
_ENTITY = re.compile(r"&(?!amp;|lt;|gt;|quot;|apos;)[A-Za-z][A-Za-z0-9]*;")
_PAGE_TYPES = ("application/xhtml+xml", "text/html")


class _Block:
    """A paragraph of a page, or a heading; `ids` are the places in it that a table of contents can point to."""

    def __init__(self, heading: bool) -> None:
        self.heading = heading
        self.pieces: list[str] = []
        self.ids: set[str] = set()

    @property
    def text(self) -> str:
        joined = re.sub(r"[ \t\r\f]*\n[ \t\r\n\f]*", "\n", "".join(self.pieces))
        cleaned = _BLANKS.sub(" ", _WRAP.sub("", joined)).strip(" ")
        return "" if cleaned.isspace() else cleaned


class _Page(HTMLParser):
    """The blocks of a page, in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks = [_Block(False)]
        self._silent = 0
        self._heading = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _NO_TEXT:
            self._silent += 1
        self._heading += tag in _HEADINGS
        if tag in _PARAGRAPHS:
            self._begin()
        self.blocks[-1].ids.update(value for name, value in attrs if name in ("id", "name") and value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _NO_TEXT:
            self.handle_starttag(tag, attrs)
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in _NO_TEXT:
            self._silent = max(0, self._silent - 1)
        if tag in _HEADINGS:
            self._heading = max(0, self._heading - 1)
        if tag in _PARAGRAPHS:
            self._begin()

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.blocks[-1].pieces.append(data)

    def _begin(self) -> None:
        block = _Block(self._heading > 0)
        if not self.blocks[-1].text:  # places in front of a paragraph point to it
            block.ids = self.blocks.pop().ids
        self.blocks.append(block)


class _Chapter:
    """A section in the making: from one place that the contents or a heading name to the next."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.blocks: list[_Block] = []

    def finished(self) -> Section:
        title, rest = self.title, [block for block in self.blocks if block.text]
        joined = ""
        for count, block in enumerate(rest, start=1):  # the heading is not said twice
            joined += _without_blanks(block.text)
            if title and joined == _without_blanks(title):
                rest = rest[count:]
                break
            if not _without_blanks(title).startswith(joined):
                break
        return Section(title, "\n".join(block.text for block in rest))


def read_epub(
    names: Sequence[str], read: Callable[[str], bytes], source: str
) -> tuple[tuple[Section, ...], str, tuple[BadBytes, ...]]:
    """The chapters of an epub in reading order, the encoding of its pages, and bytes of them that fit no character.

    A chapter begins where the table of contents (nav or ncx) points to, or, where that is silent, at a page that begins
    with a heading; other pages go on with the chapter before. A chapter's text does not repeat its title; it is empty
    where there is nothing else. The cover, the contents page and pages without text are passed over.

    Args:
        names: of all members.
        read: bytes of a member; raises UserError where it cannot be read.
        source: of the epub, to name in errors.

    Raises:
        UserError: protected, damaged, or without text.
    """
    container = _xml(read("META-INF/container.xml"), f"{source}!META-INF/container.xml")
    package_name = next((root.get("full-path", "") for root in _all(container, "rootfile")), "")
    package = _xml(read(package_name), f"{source}!{package_name}")
    base = posixpath.dirname(package_name)
    items = {item.get("id", ""): item for item in _all(package, "item")}
    hrefs = {key: _resolve(base, item.get("href", "")) for key, item in items.items()}
    protected = _protected(names, read, source)
    titles = _contents(package, items, hrefs, read, source)
    skipped = {_resolve(base, one.get("href", "")) for one in _all(package, "reference") if one.get("type") in _SKIPPED}
    chapters: list[_Chapter] = []
    encodings: list[str] = []
    bad: list[BadBytes] = []
    for reference in _all(package, "itemref"):
        key = reference.get("idref", "")
        item = items.get(key)
        if item is None or item.get("media-type") not in _PAGE_TYPES or "nav" in item.get("properties", "").split():
            continue
        name = hrefs[key]
        if name in skipped:
            continue
        if name in protected:
            raise UserError(f"{source} is protected against reading ({name} is encrypted)", "leave it out")
        data = read(name)
        if not data.strip():
            continue
        text, encoding, more = decode_tolerant(data, f"{source}!{name}")
        encodings.append(encoding)
        bad += more
        _add_page(chapters, text, {place: title for (page, place), title in titles.items() if page == name})
    sections = tuple(chapter.finished() for chapter in chapters if chapter.blocks)
    if not any(section.text for section in sections):
        raise UserError(f"{source} holds no text", "leave it out")
    return sections, max(encodings, key=encodings.count), tuple(bad)


def _add_page(chapters: list[_Chapter], text: str, titles: dict[str, str]) -> None:
    """Append the blocks of a page to the last chapter, or to new ones; `titles` by place, "" for the page's top."""
    page = _Page()
    page.feed(text)
    page.close()
    blocks = [block for block in page.blocks if block.text]
    if not blocks:
        return
    heads = []
    for block in blocks:
        if not block.heading:
            break
        heads.append(block.text)
    top = titles.get("") or ("" if titles else " ".join(heads))
    if top or not chapters:
        chapters.append(_Chapter(top))
    for block in blocks:
        named = sorted(place for place in block.ids if titles.get(place))
        if named and not (block is blocks[0] and top == titles[named[0]]):
            chapters.append(_Chapter(titles[named[0]]))
        chapters[-1].blocks.append(block)


def _contents(
    package: ElementTree.Element,
    items: dict[str, ElementTree.Element],
    hrefs: dict[str, str],
    read: Callable[[str], bytes],
    source: str,
) -> dict[tuple[str, str], str]:
    """Titles by (page, place in the page) from the nav of EPUB 3 or else the ncx of EPUB 2; the first one counts."""
    titles: dict[tuple[str, str], str] = {}
    nav = next((key for key, item in items.items() if "nav" in item.get("properties", "").split()), None)
    ncx = next((key for key, item in items.items() if item.get("media-type") == "application/x-dtbncx+xml"), None)
    key = nav or ncx
    if key is None:
        return titles
    name = hrefs[key]
    tree = _xml(read(name), f"{source}!{name}")
    if nav is None:
        found = [
            (content.get("src", ""), "".join(label.itertext()))
            for point in _all(tree, "navPoint")
            for label, content in zip(_all(point, "navLabel")[:1], _all(point, "content")[:1], strict=False)
        ]
    else:
        lists = _all(tree, "nav")
        contents = [one for one in lists if "toc" in (one.get("{http://www.idpf.org/2007/ops}type") or "").split()]
        found = [(a.get("href", ""), "".join(a.itertext())) for one in (contents or lists)[:1] for a in _all(one, "a")]
    for href, title in found:
        page, _, place = href.partition("#")
        where = (_resolve(posixpath.dirname(name), page) if page else name, unquote(place))
        titles.setdefault(where, " ".join(title.split()))
    return titles


def _protected(names: Sequence[str], read: Callable[[str], bytes], source: str) -> set[str]:
    name = "META-INF/encryption.xml"
    if name not in names:
        return set()
    tree = _xml(read(name), f"{source}!{name}")
    return {unquote(one.get("URI", "")) for one in _all(tree, "CipherReference")}


def _xml(data: bytes, source: str) -> ElementTree.Element:
    """The root of an XML document that declares no entities: those can grow without end, or name files of this machine.

    The document is decoded first, so that no encoding hides a declaration.
    """
    text = decode_tolerant(data, source).text
    if "<!ENTITY" in text:
        raise UserError(f"{source} declares XML entities", "leave it out: books need none, attacks do")
    try:
        # What HTML names, XML has by number only; and the text is no longer in the encoding that its first line names.
        plain = _ENTITY.sub(lambda found: html.unescape(found[0]), re.sub(r"^\s*<\?xml[^>]*\?>", "", text))
        return ElementTree.fromstring(plain)
    except ElementTree.ParseError as error:
        raise UserError(f"{source} is damaged: {error}", "fetch it again") from error


def _all(tree: ElementTree.Element, tag: str) -> list[ElementTree.Element]:
    """Elements by name, in any namespace."""
    return [one for one in tree.iter() if isinstance(one.tag, str) and one.tag.rpartition("}")[2] == tag]


def _resolve(base: str, href: str) -> str:
    return posixpath.normpath(posixpath.join(base, unquote(href.partition("#")[0])))


def _without_blanks(text: str) -> str:
    return "".join(text.split())
