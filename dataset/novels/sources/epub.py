"""Chapters of an .epub: its reading order, its table of contents, and its pages."""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote
from xml.etree import ElementTree

from dataset.decode import decode_tolerant
from dataset.mending import BadBytes
from dataset.novels.normalized import without_blanks
from dataset.novels.records import BookSection, HostileFileError, RawBook
from dataset.novels.sources.epub_pages import (
    CHAPTER_UNITS,
    PageBlock,
    chapter_level,
    find_units,
    is_chapter,
    mark_headings,
    matches_title,
    matter_of_page,
    matter_of_section,
    read_page,
)
from novelgpt.settings.errors import UserError

_SKIPPED = {"cover": "cover_page", "toc": "contents_page", "copyright-page": "imprint_page"}
_ENTITY = re.compile(r"&(?!amp;|lt;|gt;|quot;|apos;)[A-Za-z][A-Za-z0-9]*;")
_PAGE_NAMES = (".xhtml", ".html", ".htm", ".xht", ".xml")
_ENCRYPTION = "META-INF/encryption.xml"
_EDGE = 3  # pages at either end, where distributors of a book put their own
MAX_IMAGES_NAMED = 20


def read_epub(name: str, names: Sequence[str], read: Callable[[str], bytes], source: str) -> RawBook:
    """The book of an epub: its chapters in reading order; those with a `rule` are pages that are not part of it.

    A chapter begins where the table of contents (nav or ncx) points to, and at headings: numbered ones anywhere in a
    page, others if there is no table of contents. Other pages continue the chapter before. A chapter's text does not
    repeat its title; it is empty if there is nothing else. Contents, imprint and advertisements become sections with a
    rule. A page or table of contents that is missing or damaged costs no more than itself.

    Args:
        name: of the book.
        names: of all members.
        read: bytes of a member; raises UserError where it cannot be read.
        source: of the epub, to name in errors.

    Raises:
        UserError: protected, damaged as a whole, or without text.
    """
    package = _Package(names, read, source)
    encrypted = _all(package.xml(_ENCRYPTION), "CipherReference") if _ENCRYPTION in names else []
    protected = {unquote(one.get("URI", "")) for one in encrypted}
    book = _SectionBuilder(package.contents())
    guide = {
        package.member(package.base, one.get("href", "")): _SKIPPED.get(one.get("type", ""), "")
        for one in _all(package.tree, "reference")
    }
    encodings: list[str] = []
    bad: list[BadBytes] = []
    spine = package.spine()
    pages: dict[str, tuple[list[PageBlock], bool]] = {}
    for number, page in enumerate(spine):
        if page in protected:
            raise UserError(f"{source} is protected against reading ({page} is encrypted)", "leave it out")
        try:
            data = read(page)
        except UserError as error:
            package.findings.append(f"a page is lost: {package.why_lost(error, page)}")
            continue
        if data.strip():
            text, encoding, more = decode_tolerant(data, f"{source}!{page}")
            encodings.append(encoding)
            bad += more
            pages[page] = (read_page(text), number < _EDGE or number >= len(spine) - _EDGE)
    mark_headings([block for blocks, _ in pages.values() for block in blocks])
    for page, (blocks, at_the_edge) in pages.items():
        if blocks:
            book.add(page, blocks, guide.get(page, ""), at_the_edge, only=len(spine) == 1)
    sections = tuple(draft.finished() for draft in book.drafts if draft.blocks)
    if not any(section.text for section in sections if not section.rule):
        raise UserError(f"{source} holds no text", "leave it out")
    findings = package.findings
    if book.lost:
        shown = "; ".join(book.lost[:MAX_IMAGES_NAMED])
        findings += [f"images in the text that may be characters, without a word for them ({len(book.lost)}): {shown}"]
    encoding = max(encodings, key=encodings.count)
    return RawBook(name, source, "", encoding, tuple(bad), sections, tuple(findings))


class _Package:
    """The package document of an epub: its members, their order, and the table of contents.

    Args:
        names: as in `read_epub`.
        read: as in `read_epub`.
        source: as in `read_epub`.
    """

    def __init__(self, names: Sequence[str], read: Callable[[str], bytes], source: str) -> None:
        self.names, self.read, self.source = names, read, source
        self.findings: list[str] = []
        self._folded = {name.lower(): name for name in names}
        roots = _all(self.xml("META-INF/container.xml"), "rootfile")
        name = next((root.get("full-path", "") for root in roots), "")
        self.tree = self.xml(name)
        self.base = posixpath.dirname(name)
        self._items = {item.get("id", ""): item for item in _all(self.tree, "item")}
        self._hrefs = {key: self.member(self.base, item.get("href", "")) for key, item in self._items.items()}

    def member(self, folder: str, href: str) -> str:
        """The member that an href means: tools on other systems mix upper and lower case."""
        name = posixpath.normpath(posixpath.join(folder, unquote(href.partition("#")[0])))
        return name if name in self.names else self._folded.get(name.lower(), name)

    def xml(self, name: str) -> ElementTree.Element:
        """The root of an XML member.

        It may declare no entities: those can grow without end, or name files of this machine. It is decoded first, so
        that no encoding hides a declaration.
        """
        source = f"{self.source}!{name}"
        text = decode_tolerant(self.read(name), source).text
        if "<!ENTITY" in text:
            raise HostileFileError(f"{source} declares XML entities", "leave it out: books need none, attacks do")
        try:
            # XML has HTML's named entities by number only; and the text is no longer in the encoding it declares.
            plain = _ENTITY.sub(lambda found: html.unescape(found[0]), re.sub(r"^\s*<\?xml[^>]*\?>", "", text))
            return ElementTree.fromstring(plain)
        except ElementTree.ParseError as error:
            raise UserError(f"{source} is damaged: {error}", "fetch it again") from error

    def spine(self) -> list[str]:
        """The pages in reading order, without the navigation."""
        pages = []
        for reference in _all(self.tree, "itemref"):
            key = reference.get("idref", "")
            item = self._items.get(key)
            if item is None:
                self.findings.append(f"a page is lost: the manifest has no {key!r}, which the reading order names")
            elif "nav" not in item.get("properties", "").split():
                # The name counts as well, as media types are often wrong.
                name, kind = self._hrefs[key], item.get("media-type", "")
                if "html" in kind or name.lower().endswith(_PAGE_NAMES):
                    pages.append(name)
                else:
                    kind = item.get("media-type", "no media type")
                    self.findings.append(f"a page is left out: {name} is not a text ({kind})")
        return pages

    def contents(self) -> dict[tuple[str, str], str]:
        """Titles by (page, anchor) from the nav of EPUB 3 or else the ncx of EPUB 2; the first one counts.

        The anchor is "" for the page's top.
        """
        items = self._items
        nav = next((key for key, item in items.items() if "nav" in item.get("properties", "").split()), None)
        ncx = next((spine.get("toc", "") for spine in _all(self.tree, "spine")), None)
        if ncx not in items:
            kinds = ((key, item.get("media-type")) for key, item in items.items())
            ncx = next((key for key, kind in kinds if kind == "application/x-dtbncx+xml"), None)
        for key in (nav, ncx):
            if key is None:
                continue
            name = self._hrefs[key]
            try:
                found = _nav_titles(self.xml(name)) if key == nav else _ncx_titles(self.xml(name))
            except UserError as error:
                why = self.why_lost(error, name)
                self.findings.append(f"the table of contents is lost, and chapters are found by their headings: {why}")
                continue
            titles: dict[tuple[str, str], str] = {}
            for href, title in found:
                page, _, anchor = href.partition("#")
                where = self.member(posixpath.dirname(name), page) if page else name
                titles.setdefault((where, unquote(anchor)), " ".join(title.split()))
            return titles
        return {}

    def why_lost(self, error: UserError, name: str) -> str:
        """Why a member could not be read.

        Raises:
            UserError: it is not damage, but an attack.
        """
        if isinstance(error, HostileFileError):
            raise error
        return error.cause.removeprefix(f"{self.source}!") if name in self.names else f"there is no {name}"


def _nav_titles(tree: ElementTree.Element) -> list[tuple[str, str]]:
    """(href, title) of each entry of a nav."""
    lists = _all(tree, "nav")
    contents = [one for one in lists if "toc" in (one.get("{http://www.idpf.org/2007/ops}type") or "").split()]
    return [(a.get("href", ""), "".join(a.itertext())) for one in (contents or lists)[:1] for a in _all(one, "a")]


def _ncx_titles(tree: ElementTree.Element) -> list[tuple[str, str]]:
    """(href, title) of each entry of an ncx."""
    return [
        (content.get("src", ""), "".join(label.itertext()))
        for point in _all(tree, "navPoint")
        for label, content in zip(_all(point, "navLabel")[:1], _all(point, "content")[:1], strict=False)
    ]


def _all(tree: ElementTree.Element, tag: str) -> list[ElementTree.Element]:
    """Elements by name, in any namespace."""
    return [one for one in tree.iter() if isinstance(one.tag, str) and one.tag.rpartition("}")[2] == tag]


@dataclass
class _SectionDraft:
    """A section under construction: from one position that the contents or a heading name to the next."""

    title: str
    rule: str = ""
    blocks: list[PageBlock] = field(default_factory=list)

    def finished(self) -> BookSection:
        title, rest = self.title, [block for block in self.blocks if block.text]
        joined = ""
        for count, block in enumerate(rest, start=1):  # the heading is not repeated
            joined += without_blanks(block.text)
            if title and joined == without_blanks(title):
                rest = rest[count:]
                break
            if not without_blanks(title).startswith(joined):
                break
        texts = [block.text for block in rest]
        return BookSection(title, "\n".join(texts), self.rule or matter_of_section(title, texts))


class _SectionBuilder:
    """Divides pages into sections.

    Args:
        titles: of the table of contents, by page and anchor.
    """

    def __init__(self, titles: dict[tuple[str, str], str]) -> None:
        self.titles = titles
        self.drafts: list[_SectionDraft] = []
        self.lost: list[str] = []

    def add(self, name: str, blocks: list[PageBlock], rule: str, at_the_edge: bool, only: bool) -> None:
        """Append the blocks of a page to the last chapter, or to new ones."""
        rule = rule or matter_of_page([block.text for block in blocks], self.titles.values(), at_the_edge)
        if rule:
            self.drafts.append(_SectionDraft("", rule, blocks))
            return
        starts = self._starts(name, blocks, only)
        for index, block in enumerate(blocks):
            self.lost += block.lost()
            self.drafts += [_SectionDraft(title) for title in starts.get(index, ())]
            # Pages that are left out are never continued.
            current = next((draft for draft in reversed(self.drafts) if not draft.rule), None)
            if current is None:
                current = _SectionDraft("")
                self.drafts.append(current)
            current.blocks.append(block)

    def _starts(self, name: str, blocks: list[PageBlock], only: bool) -> dict[int, list[str]]:
        """Titles of the chapters that begin at each block, by its index."""
        titles = {anchor: title for (page, anchor), title in self.titles.items() if page == name}
        starts: dict[int, list[str]] = {0: [titles[""]]} if titles.get("") else {}
        for index, block in enumerate(blocks):
            named = sorted(anchor for anchor in block.ids if titles.get(anchor))
            if named and not (index == 0 and titles.get("") == titles[named[0]]):
                starts.setdefault(index, []).append(titles[named[0]])
        level = 0 if self.titles else chapter_level([block.level for block in blocks if block.level], only)
        for index, title, shaped in find_units(blocks, level):
            above = starts.get(index, [""])[-1] if index in starts else titles.get("", "")
            if matches_title(title, above) and index in starts:
                continue
            begins = (
                not titles and index not in starts and (index == 0 or (level > 0 and blocks[index].level == level))
                if shaped is None
                else shaped.unit in CHAPTER_UNITS or not is_chapter(above)
            )
            if begins:
                starts.setdefault(index, []).append(title)
        return starts
