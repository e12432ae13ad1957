"""Chapters of an .epub: its reading order, its table of contents, and what becomes of its pages."""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple
from urllib.parse import unquote
from xml.etree import ElementTree

from dataset.decode import decode_tolerant
from dataset.mending import BadBytes
from dataset.novels.records import HostileFileError, Section
from dataset.novels.sources.epub_headings import (
    CHAPTER_UNITS,
    chapter_level,
    find_units,
    is_chapter,
    mark_headings,
    says,
    without_blanks,
)
from dataset.novels.sources.epub_matter import matter_of_page, matter_of_section
from dataset.novels.sources.epub_page import PageBlock, read_page
from novelgpt.settings.errors import UserError

_SKIPPED = {"cover": "cover_page", "toc": "contents_page", "copyright-page": "imprint_page"}
_ENTITY = re.compile(r"&(?!amp;|lt;|gt;|quot;|apos;)[A-Za-z][A-Za-z0-9]*;")
_PAGE_NAMES = (".xhtml", ".html", ".htm", ".xht", ".xml")
_EDGE = 3  # pages at either end, where those who pass a book on put their own
MOST_IMAGES_NAMED = 20


class Epub(NamedTuple):
    """What an epub holds.

    Attributes:
        sections: its chapters in reading order; those with a `rule` are pages that are no part of the book.
        encoding: of most of its pages.
        bad_bytes: of pages, that fit no character.
        findings: sentences about what is missing, damaged or lost.
    """

    sections: tuple[Section, ...]
    encoding: str
    bad_bytes: tuple[BadBytes, ...]
    findings: tuple[str, ...]


class _SectionDraft:
    """A section in the making: from one place that the contents or a heading name to the next."""

    def __init__(self, title: str, rule: str = "") -> None:
        self.title = title
        self.rule = rule
        self.blocks: list[PageBlock] = []

    def finished(self) -> Section:
        title, rest = self.title, [block for block in self.blocks if block.text]
        joined = ""
        for count, block in enumerate(rest, start=1):  # the heading is not said twice
            joined += without_blanks(block.text)
            if title and joined == without_blanks(title):
                rest = rest[count:]
                break
            if not without_blanks(title).startswith(joined):
                break
        texts = [block.text for block in rest]
        return Section(title, "\n".join(texts), self.rule or matter_of_section(title, texts))


def read_epub(names: Sequence[str], read: Callable[[str], bytes], source: str) -> Epub:
    """The chapters of an epub in reading order, and what was met on the way.

    A chapter begins where the table of contents (nav or ncx) points to, and at headings: numbered ones wherever they
    stand in a page, others where the contents are silent. Other pages go on with the chapter before. A chapter's text
    does not repeat its title; it is empty where there is nothing else. Contents, imprint and advertisements become
    sections with a rule. A page or table of contents that is missing or damaged costs no more than itself.

    Args:
        names: of all members.
        read: bytes of a member; raises UserError where it cannot be read.
        source: of the epub, to name in errors.

    Raises:
        UserError: protected, damaged as a whole, or without text.
    """
    container = _xml(read("META-INF/container.xml"), f"{source}!META-INF/container.xml")
    package_name = next((root.get("full-path", "") for root in _all(container, "rootfile")), "")
    package = _xml(read(package_name), f"{source}!{package_name}")
    base = posixpath.dirname(package_name)
    items = {item.get("id", ""): item for item in _all(package, "item")}
    folded = {name.lower(): name for name in names}

    def stored(name: str) -> str:
        """The member that is meant: those who pack books on other systems mix upper and lower case."""
        return name if name in names else folded.get(name.lower(), name)

    hrefs = {key: stored(_resolve(base, item.get("href", ""))) for key, item in items.items()}
    protected = _protected(names, read, source)
    findings: list[str] = []
    listed = _contents(package, items, hrefs, read, names, source, findings)
    titles = {(stored(page), place): title for (page, place), title in listed.items()}
    guide = {
        stored(_resolve(base, one.get("href", ""))): _SKIPPED.get(one.get("type", ""), "")
        for one in _all(package, "reference")
    }
    pages = _Pages(titles)
    encodings: list[str] = []
    bad: list[BadBytes] = []
    spine = _spine(package, items, hrefs, findings)
    read_pages: dict[str, tuple[list[PageBlock], bool]] = {}
    for place, name in enumerate(spine):
        if name in protected:
            raise UserError(f"{source} is protected against reading ({name} is encrypted)", "leave it out")
        try:
            data = read(name)
        except UserError as error:
            findings.append(f"a page is lost: {_why_lost(error, name, names, source)}")
            continue
        if not data.strip():
            continue
        text, encoding, more = decode_tolerant(data, f"{source}!{name}")
        encodings.append(encoding)
        bad += more
        read_pages[name] = (read_page(text), place < _EDGE or place >= len(spine) - _EDGE)
    mark_headings([block for blocks, _ in read_pages.values() for block in blocks])
    for name, (blocks, at_the_edge) in read_pages.items():
        pages.add(name, blocks, guide.get(name, ""), at_the_edge, only=len(spine) == 1)
    sections = tuple(chapter.finished() for chapter in pages.chapters if chapter.blocks)
    if not any(section.text for section in sections if not section.rule):
        raise UserError(f"{source} holds no text", "leave it out")
    return Epub(sections, max(encodings, key=encodings.count), tuple(bad), (*findings, *pages.lost_images()))


def _spine(
    package: ElementTree.Element,
    items: dict[str, ElementTree.Element],
    hrefs: dict[str, str],
    findings: list[str],
) -> list[str]:
    """The pages in reading order, without the navigation."""
    names = []
    for reference in _all(package, "itemref"):
        key = reference.get("idref", "")
        item = items.get(key)
        if item is None:
            findings.append(f"a page is lost: the manifest has no {key!r}, which the reading order names")
        elif "nav" in item.get("properties", "").split():
            continue
        elif _is_page(item.get("media-type", ""), hrefs[key]):
            names.append(hrefs[key])
        else:
            kind = item.get("media-type", "no media type")
            findings.append(f"a page is left out: {hrefs[key]} is no text ({kind})")
    return names


def _is_page(kind: str, name: str) -> bool:
    """Whether an item of the reading order is a page: the name counts as well, as media types are often wrong."""
    return "html" in kind or name.lower().endswith(_PAGE_NAMES)


class _Pages:
    """Takes up pages, and makes chapters of them.

    Args:
        titles: of the table of contents, by page and place in the page; "" for the page's top.
    """

    def __init__(self, titles: dict[tuple[str, str], str]) -> None:
        self.titles = titles
        self.chapters: list[_SectionDraft] = []
        self._lost: list[str] = []

    def add(self, name: str, blocks: list[PageBlock], rule: str, at_the_edge: bool, only: bool) -> None:
        """Append the blocks of a page to the last chapter, or to new ones."""
        texts = [block.text for block in blocks]
        rule = (rule if blocks else "") or matter_of_page(texts, self.titles.values(), at_the_edge)
        if not blocks:
            return
        if rule:
            self.chapters.append(_SectionDraft("", rule))
            self.chapters[-1].blocks += blocks
            return
        starts = self._starts(name, blocks, only)
        for index, block in enumerate(blocks):
            self._lost += [f"…{before}[{image.file}]" for before, image in block.lost()]
            for title in starts.get(index, ()):
                self.chapters.append(_SectionDraft(title))
            self._current().blocks.append(block)

    def lost_images(self) -> list[str]:
        """A sentence on images that may be characters."""
        if not self._lost:
            return []
        shown = "; ".join(self._lost[:MOST_IMAGES_NAMED])
        return [f"images in the text that may be characters, without a word for them ({len(self._lost)}): {shown}"]

    def _current(self) -> _SectionDraft:
        """The last chapter of the book; pages that are left out have nothing that goes on."""
        for chapter in reversed(self.chapters):
            if not chapter.rule:
                return chapter
        self.chapters.append(_SectionDraft(""))
        return self.chapters[-1]

    def _starts(self, name: str, blocks: list[PageBlock], only: bool) -> dict[int, list[str]]:
        """Titles of the chapters that begin at each block, by its index."""
        titles = {place: title for (page, place), title in self.titles.items() if page == name}
        starts: dict[int, list[str]] = {0: [titles[""]]} if titles.get("") else {}
        for index, block in enumerate(blocks):
            named = sorted(place for place in block.ids if titles.get(place))
            if named and not (index == 0 and titles.get("") == titles[named[0]]):
                starts.setdefault(index, []).append(titles[named[0]])
        level = 0 if self.titles else chapter_level([block.level for block in blocks if block.level], only)
        for index, title, shaped in find_units(blocks, level):
            above = starts.get(index, [""])[-1] if index in starts else titles.get("", "")
            if says(title, above) and index in starts:
                continue
            if shaped is not None:
                begins = shaped.unit in CHAPTER_UNITS or not is_chapter(above)
            else:
                begins = not titles and (index == 0 or (level > 0 and blocks[index].level == level))
            if begins and not (index in starts and shaped is None):
                starts.setdefault(index, []).append(title)
        return starts


def _contents(
    package: ElementTree.Element,
    items: dict[str, ElementTree.Element],
    hrefs: dict[str, str],
    read: Callable[[str], bytes],
    names: Sequence[str],
    source: str,
    findings: list[str],
) -> dict[tuple[str, str], str]:
    """Titles by (page, place in the page) from the nav of EPUB 3 or else the ncx of EPUB 2; the first one counts."""
    nav = next((key for key, item in items.items() if "nav" in item.get("properties", "").split()), None)
    named = next((spine.get("toc", "") for spine in _all(package, "spine")), "")
    kinds = {key: item.get("media-type") for key, item in items.items()}
    ncx = named if named in items else next((key for key in kinds if kinds[key] == "application/x-dtbncx+xml"), None)
    for key in (nav, ncx):
        if key is None:
            continue
        name = hrefs[key]
        try:
            return _titles(_xml(read(name), f"{source}!{name}"), name, is_nav=key == nav)
        except UserError as error:
            why = _why_lost(error, name, names, source)
            findings.append(f"the table of contents is lost, and chapters are told by their headings: {why}")
    return {}


def _why_lost(error: UserError, name: str, names: Sequence[str], source: str) -> str:
    """Why a member could not be read.

    Raises:
        UserError: it is no damage, but an attack.
    """
    if isinstance(error, HostileFileError):
        raise error
    return error.cause.removeprefix(f"{source}!") if name in names else f"there is no {name}"


def _titles(tree: ElementTree.Element, name: str, is_nav: bool) -> dict[tuple[str, str], str]:
    """As `_contents`, of the document with this name."""
    titles: dict[tuple[str, str], str] = {}
    if not is_nav:
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
        raise HostileFileError(f"{source} declares XML entities", "leave it out: books need none, attacks do")
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
