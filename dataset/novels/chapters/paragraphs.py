"""Lines of a book to paragraphs: joins hard wraps, cuts overlong lines at sentence ends. No character is lost."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

LONGEST_PARAGRAPH = 3_000
"""Characters; a longer line is not a paragraph of its author, and is cut at sentence ends."""
_CUT_EVERY = 800
_TOLERANCE = 6
"""Columns by which a full line may differ from the width: three characters, as punctuation may not start a line."""
_WIDTHS = range(40, 121)
_UNFINISHED_SHARE = 0.55
_FULL_SHARE = 0.3

_SENTENCE_END = re.compile(r"[。！？!?…]+[”’」』）)】》\"]*")
_FINAL = frozenset("。！？!?…”’」』）)】》\"'：:")
_NUMBER_ONLY = re.compile(r"[（(【\[]?[0-9０-９一二三四五六七八九十百零〇○]{1,5}[)）】\]、.．]?")
_LETTERS = frozenset(string.ascii_letters)
_NEVER_FIRST = frozenset("，。；、！？：,;")
_MID_SENTENCE = frozenset("，、；,;")
_OPENING = re.compile("[“「『‘（《]")
_CLOSING = re.compile("[”」』’）》]")


def join_lines(texts: Sequence[str], width: int | None = None) -> list[str]:
    """Paragraphs of some lines: no indents, no blank lines, hard-wrapped lines joined, overlong ones cut.

    Args:
        texts: lines, indents included.
        width: columns at which they are hard-wrapped (`wrap_width`); None if every line is a paragraph.

    Returns:
        Non-empty paragraphs, with the same characters besides white space as `texts`, in order.
    """
    paragraphs = [text for text in map(str.strip, texts) if text] if width is None else _unwrap(texts, width)
    if max(map(len, paragraphs), default=0) <= LONGEST_PARAGRAPH:
        return paragraphs
    return [part for paragraph in paragraphs for part in cut_at_sentence_ends(paragraph)]


def wrap_width(texts: Sequence[str]) -> int | None:
    """Columns (a Chinese character has two) at which these lines are hard-wrapped; None if they are not.

    They are if many lines have nearly the same width, most of these stop in the middle of a sentence, and hardly any
    line is longer. Lines of verse end with punctuation, and are narrower than 20 characters.
    """
    lines = [text for text in map(str.rstrip, texts) if text]
    if len(lines) < 8 or sum(length > _WIDTHS.stop for length in map(len, lines)) > len(lines) * 0.02:
        return None
    widths = _all_columns(lines)
    width, _ = Counter(widths).most_common(1)[0]
    if width not in _WIDTHS:
        wide = Counter(column for column in widths if column in _WIDTHS)
        if not wide:
            return None
        width, _ = wide.most_common(1)[0]
    full = [line for line, column in zip(lines, widths, strict=True) if abs(column - width) <= _TOLERANCE]
    wrapped = (
        len(full) >= max(5, len(lines) * _FULL_SHARE)
        and sum(line[-1] not in _FINAL for line in full) >= len(full) * _UNFINISHED_SHARE
        and sum(column > width + _TOLERANCE for column in widths) <= len(lines) * 0.03
    )
    return width if wrapped else None


def fits_width(texts: Sequence[str], width: int) -> bool:
    """Whether lines too few to judge may be wrapped like the rest of their book: none is longer than `width` allows."""
    return max(_all_columns(map(str.rstrip, texts)), default=0) <= width + _TOLERANCE


def cut_at_sentence_ends(paragraph: str) -> Iterator[str]:
    """Parts of about 800 characters of a paragraph of more than 3,000; others unchanged.

    The cut is after 。！？… and the quotation marks that follow; inside quotation marks only if 1,600 characters have
    no sentence end outside of them; text without any sentence end is left whole.
    """
    if len(paragraph) <= LONGEST_PARAGRAPH:
        yield paragraph
        return
    start, looked, depth = 0, 0, 0
    for match in _SENTENCE_END.finditer(paragraph):
        end = match.end()
        stretch = paragraph[looked:end]
        depth = max(0, depth + len(_OPENING.findall(stretch)) - len(_CLOSING.findall(stretch)))
        looked = end
        if end - start >= (_CUT_EVERY if depth == 0 else 2 * _CUT_EVERY) and len(paragraph) - end > _CUT_EVERY // 4:
            yield paragraph[start:end].strip()
            start, depth = end, 0
    yield paragraph[start:].strip()


def parts_of_about(paragraphs: Sequence[str], characters: int) -> Iterator[list[str]]:
    """Paragraphs in order, in parts of about `characters` each, cut only between paragraphs."""
    total = sum(map(len, paragraphs))
    count = max(1, round(total / characters))
    part: list[str] = []
    done, parts = 0, 1
    for paragraph in paragraphs:
        # The boundary moves to the nearer end of the paragraph that it falls into.
        if part and parts < count and done + len(paragraph) / 2 > total * parts / count:
            yield part
            part, parts = [], parts + 1
        part.append(paragraph)
        done += len(paragraph)
    if part:
        yield part


def _unwrap(texts: Sequence[str], width: int) -> list[str]:
    """Join lines that were broken at `width`. A line clearly shorter, a blank line or an indent ends a paragraph.

    A full line that stops in the middle of a sentence continues after blank lines, too: there a page ended. It does so
    if it stops with a comma, or if paragraphs are indented and the next line is not.

    Verse and letters form blocks of their own indent and width: there a line continues if it stops in the middle of a
    clause. A line that starts with a comma or a full stop continues any.
    """
    shortest, longest = width - _TOLERANCE, width + _TOLERANCE
    widths = _all_columns(map(str.rstrip, texts))
    blanks = [text[: len(text) - len(text.lstrip())] for text in texts]
    indents = [len(blank) + blank.count("\u3000") for blank in blanks]
    # The indent, in columns, of continuation lines: the smallest that is frequent.
    counts = Counter(indent for width, indent in zip(widths, indents, strict=True) if width)
    base = min((indent for indent, count in counts.items() if count >= 0.15 * counts.total()), default=0)
    blocks = _block_widths(texts, widths, indents, base)
    # If a blank line follows nearly every full line, blank lines do not separate paragraphs.
    followers = [after == 0 for width, after in pairwise(widths) if width >= shortest]
    double_spaced = widths.count(0) * 3 >= len(widths) and sum(followers) > 0.8 * len(followers) > 0
    indented = any(indent > base + 1 for width, indent in zip(widths, indents, strict=True) if width)
    paragraphs: list[str] = []
    parts: list[str] = []
    full, block = False, -1
    for text, columns, indent in zip(texts, widths, indents, strict=True):
        if not columns:
            unfinished = full and (parts[-1][-1] in _MID_SENTENCE or (indented and parts[-1][-1] not in _FINAL))
            if not double_spaced and not unfinished:
                full, block = False, -1
            continue
        stripped = text.strip()
        if parts:
            is_number = len(stripped) <= 8 and _NUMBER_ONLY.fullmatch(stripped) is not None
            if not (
                (full and columns <= longest and indent <= base + 1 and not is_number)
                or indent == block
                or stripped[0] in _NEVER_FIRST
            ):
                paragraphs.append("".join(parts))
                parts = []
            elif stripped[0] in _LETTERS and parts[-1][-1] in _LETTERS:
                parts.append(" ")
        parts.append(stripped)
        full = shortest <= columns <= longest
        block = indent if indent > base and abs(columns - blocks.get(indent, -9)) <= 2 and _continues(stripped) else -1
    if parts:
        paragraphs.append("".join(parts))
    return paragraphs


def _continues(stripped: str) -> bool:
    """Whether a full line stops within a clause, and is not a row of a list in columns."""
    return stripped[-1].isalnum() and "\u3000\u3000" not in stripped and "  " not in stripped


def _block_widths(texts: Sequence[str], widths: Sequence[int], indents: Sequence[int], base: int) -> dict[int, int]:
    """Indent -> width of the lines of that indent that are continued, for all indents deeper than `base`."""
    counts: dict[int, Counter[int]] = {}
    for text, width, indent in zip(texts, widths, indents, strict=True):
        if indent > base and width and _continues(text.strip()):
            counts.setdefault(indent, Counter())[width] += 1
    modes = {indent: counter.most_common(1)[0] for indent, counter in counts.items()}
    return {indent: width for indent, (width, count) in modes.items() if count >= 3 and width - indent >= 24}


def _all_columns(texts: Iterable[str]) -> list[int]:
    """Display widths: 1 for ASCII, 2 for what takes three bytes in UTF-8, as Chinese and its punctuation do."""
    return [(len(text) + len(text.encode("utf-8", "surrogatepass"))) >> 1 for text in texts]
