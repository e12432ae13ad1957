"""report.html: figures, charts and examples of a prepared collection, in one self-contained file."""

from __future__ import annotations

import json
import math
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dataset.novels.records import BookRecord, count_removed
from dataset.novels.report.charts import (
    BarSegment,
    LogScale,
    box_strip,
    close_scale,
    histogram,
    quantile,
    shares,
    short_number,
    stacked_bar,
    tick_label,
)
from novelgpt.settings.atomic_files import atomic_write
from novelgpt.settings.html_pages import content_hash, page_templates

PAGE = Path(__file__).with_name("page")
BOOK_ROWS, PAIR_ROWS, REFUSED_ROWS, RULE_ROWS = 500, 300, 300, 100
"""Max rows of each table, so that the page opens quickly whatever the size of the collection."""
EXAMPLES, FINDINGS, CHARACTERS = 12, 20, 240
"""Max lines of a rule, findings of a book, and characters of a text."""

FATES = {
    "train": ("For training", "用于训练"),
    "held_out": ("Held out", "留出用于评估"),
    "duplicate": ("Repeated chapters", "重复章节"),
    "removed": ("Removed by rules", "按规则删除"),
    "left_out": ("With held-out works", "与留出作品一同排除"),
    "refused": ("In refused books", "拒收的书"),
}
SCRIPTS = {"simplified": "simplified 简体", "traditional": "traditional 繁体", "none": "–"}
SHARES_SHOWN = (("shortest 最短", 0), ("10 %", 0.1), ("90 %", 0.9), ("longest 最长", 1))
SPLITS = {"train": "training 训练", "held_out": "held out 留出", "left_out": "left out 排除", "refused": "refused 拒收"}
KEPT = ("train", "held_out")


class Truncated(NamedTuple):
    """The first rows of a list, and its length."""

    rows: Sequence[Any]
    total: int


def write_report(
    books: Sequence[BookRecord],
    pairs: Sequence[Mapping[str, Any]],
    examples: Mapping[str, Sequence[Mapping[str, Any]]],
    options: Mapping[str, Any],
    path: Path,
    skipped: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the page; the same arguments give the same bytes.

    Args:
        books: all of them, those refused included.
        pairs: rows of duplicates.jsonl: {"kind", "level", "first", "second", "similarity"}; chapters are "source#3".
        examples: rule -> removed lines {"source", "line", "text"}; a page shows the first 12 of each.
        options: of the run, shown unchanged.
        path: of the file, written atomically.
        skipped: (source, reason) of files that are not texts; they are not among the books.
    """
    style, script = ((PAGE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = page_templates(PAGE)
    environment.filters.update(
        short=short_number, tick=tick_label, wan=chinese_number, visible=visible, percent=percent, degree=degree
    )
    kept = [book for book in books if book.split in KEPT]
    refused = [book for book in books if book.split == "refused"]
    text = environment.get_template("page.html").render(
        style=style,
        script=script,
        style_hash=content_hash(style),
        script_hash=content_hash(script),
        totals=count_totals(books),
        fates=describe_fates(books),
        encodings=describe_encodings(books),
        lengths=describe_lengths(kept),
        books=describe_books(books),
        rules=describe_rules(kept, examples),
        pairs=describe_pairs(pairs),
        refused=Truncated(refused[:REFUSED_ROWS], len(refused)),
        skipped=Truncated(skipped[:REFUSED_ROWS], len(skipped)),
        options=[(name, describe_option(value)) for name, value in options.items()],
        splits=SPLITS,
    )
    atomic_write(path, text)


def count_fates(book: BookRecord) -> dict[str, int]:
    """Characters of a book by what became of them; the values add up to `characters_in`."""
    counts = dict.fromkeys(FATES, 0)
    if book.split == "refused":
        return counts | {"refused": book.characters_in}
    counts["removed"] = book.characters_in - book.characters_kept
    if book.split == "left_out":
        return counts | {"left_out": book.characters_kept}
    counts["duplicate"] = book.characters_kept - book.characters_out
    counts[book.split] = book.characters_out
    return counts


def count_totals(books: Sequence[BookRecord]) -> dict[str, int]:
    """Headline figures of a collection; those of its text are of the books kept, `characters_in` is of all."""
    kept = [book for book in books if book.split in KEPT]
    return {
        "files": len({book.source.split("!")[0] for book in books}),
        "books": len(books),
        "kept": len(kept),
        "refused": sum(book.split == "refused" for book in books),
        "left_out": sum(book.split == "left_out" for book in books),
        "chapters": sum(len(book.chapter_characters) for book in kept),
        "duplicates": sum(book.duplicate_chapters for book in kept),
        "held_out": sum(book.split == "held_out" for book in kept),
        "characters_in": sum(book.characters_in for book in books),
        "characters_out": sum(book.characters_out for book in kept),
        "characters_held_out": sum(book.characters_out for book in kept if book.split == "held_out"),
        "characters_read": sum(book.characters_in for book in kept),
        "removed": sum(book.characters_in - book.characters_kept for book in kept),
        "bad_bytes": sum(book.bad_byte_count for book in books),
        "findings": sum(len(book.findings) for book in kept),
        "books_with_findings": sum(bool(book.findings) for book in kept),
    }


def _segments(counts: Mapping[str, int]) -> list[BarSegment]:
    return [BarSegment(" ".join(FATES[fate]), count, fate) for fate, count in counts.items()]


def describe_fates(books: Sequence[BookRecord]) -> dict[str, Any]:
    """The bar of all characters, and its legend: shares that add up to 100 %."""
    totals: Counter[str] = Counter()
    for book in books:
        totals.update(count_fates(book))
    counts = {fate: totals[fate] for fate in FATES}
    return {
        "bar": stacked_bar(_segments(counts), "Where each character went", height=36),
        "rows": [
            {"kind": fate, "english": FATES[fate][0], "chinese": FATES[fate][1], "count": count, "share": share}
            for (fate, count), share in zip(counts.items(), shares(list(counts.values())), strict=True)
        ],
        "total": sum(counts.values()),
    }


def describe_encodings(books: Sequence[BookRecord]) -> list[tuple[str, int, int]]:
    """(encoding, books, characters), most books first."""
    counts = Counter(book.encoding for book in books)
    characters: Counter[str] = Counter()
    for book in books:
        characters[book.encoding] += book.characters_in
    return [
        (encoding or "unknown 未知", count, characters[encoding])
        for encoding, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def describe_lengths(books: Sequence[BookRecord]) -> list[dict[str, Any]]:
    """Charts of the lengths of chapters and of books, with a few figures each."""
    return [
        {
            "english": english,
            "chinese": chinese,
            "picture": histogram(lengths, f"{english}: characters, on a logarithmic axis", english.lower()),
            "figures": [(name, quantile(sorted(lengths), share)) for name, share in SHARES_SHOWN],
        }
        for english, chinese, lengths in (
            ("Chapters", "章节长度", [length for book in books for length in book.chapter_characters]),
            ("Books", "全书长度", [book.characters_kept for book in books]),
        )
        if lengths
    ]


def describe_books(books: Sequence[BookRecord]) -> dict[str, Any]:
    """Rows of the table of books: all of them, or the longest."""
    chosen = list(books)
    if len(books) > BOOK_ROWS:
        chosen = sorted(books, key=lambda book: (-book.characters_in, book.source))[:BOOK_ROWS]
    scale = close_scale([length for book in books for length in book.chapter_characters])
    longest = max((book.characters_in for book in chosen), default=0)
    rows = [_describe_book(book, scale, longest) for book in chosen]
    return {"rows": rows, "total": len(books), "low": scale.low, "high": scale.high}


def _describe_book(book: BookRecord, scale: LogScale, longest: int) -> dict[str, Any]:
    """One row: the record, its charts, and its removed text."""
    lengths = book.chapter_characters
    biggest = sorted(book.removed.items(), key=lambda item: (-item[1]["characters"], item[0]))
    removed = book.characters_in - book.characters_kept
    return {
        "book": book,
        "bar": stacked_bar(_segments(count_fates(book)), "Where its characters went", total=longest),
        "strip": box_strip(lengths, scale, "Lengths of its chapters") if lengths else "",
        "removed": removed,
        "removed_share": removed / book.characters_in if book.characters_in else 0.0,
        "rules": [(rule, counts["characters"]) for rule, counts in biggest[:3]],
        "findings": Truncated(book.findings[:FINDINGS], len(book.findings)),
        "script": SCRIPTS[book.script],
        "split": SPLITS[book.split],
    }


def describe_rules(books: Sequence[BookRecord], examples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """What each rule removed from the books that were kept: most characters first, with examples."""
    lines, characters = count_removed(books)
    names = sorted(lines, key=lambda rule: (-characters[rule], rule))
    whole = sum(characters.values())
    largest = max(characters.values(), default=0)
    rows = [
        {
            "rule": rule,
            "lines": lines[rule],
            "characters": characters[rule],
            "share": share,
            "bar": stacked_bar(
                [BarSegment(visible(rule), characters[rule], "removed")], "Characters it removed", total=largest
            ),
            "examples": list(examples.get(rule, ()))[:EXAMPLES],
        }
        for rule, share in zip(names, shares([characters[rule] for rule in names]), strict=True)
    ]
    return {
        "shown": Truncated(rows[:RULE_ROWS], len(rows)),
        "characters": whole,
        # Chapters may lose or gain characters in other ways, by a change of script for one.
        "other": sum(book.characters_in - book.characters_kept for book in books) - whole,
    }


def describe_pairs(pairs: Sequence[Mapping[str, Any]]) -> Truncated:
    """Pairs of books, then of chapters: one row for all chapters of two books, rows of many chapters first."""
    groups: dict[tuple[str, str, str, str], list[Mapping[str, Any]]] = {}
    for pair in pairs:
        of_chapters = pair["level"] == "chapter"
        first, second = (pair[side].rpartition("#")[0] if of_chapters else pair[side] for side in ("first", "second"))
        groups.setdefault((pair["level"], pair["kind"], first, second), []).append(pair)
    rows = [
        {
            "level": level,
            "kind": kind,
            "first": first,
            "second": second,
            "count": len(members),
            "low": min(pair["similarity"] for pair in members),
            "high": max(pair["similarity"] for pair in members),
        }
        for (level, kind, first, second), members in groups.items()
    ]
    rows.sort(key=lambda row: (row["level"] != "book", -row["count"], -row["high"], row["first"], row["second"]))
    return Truncated(rows[:PAIR_ROWS], len(rows))


def describe_option(value: Any) -> str:
    """An option as a person would write it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(describe_option(each) for each in value) or "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def visible(text: object, limit: int = CHARACTERS) -> str:
    """A text with invisible and bidirectional control characters shown as their codes; long ones truncated."""
    whole = str(text)
    shown = "".join(
        f"\\u{{{ord(character):x}}}" if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") else character
        for character in whole[:limit]
    )
    return f"{shown} … (+{len(whole) - limit:,})" if len(whole) > limit else shown


def percent(share: float) -> str:
    """A share in [0, 1]; small ones that would round to 0 are shown as "< 0.01"."""
    number = "<\N{NO-BREAK SPACE}0.01" if 0 < share < 0.00005 else f"{100 * share:.2f}"
    return f"{number}\N{NO-BREAK SPACE}%"


def degree(similarity: float) -> str:
    """Two decimals, rounded down: below 1 is never shown as 1.00."""
    return f"{math.floor(similarity * 100 + 1e-9) / 100:.2f}"


def chinese_number(value: float) -> str:
    """In 万 and 亿: 740 万."""
    for size, unit in ((100_000_000, "\N{NO-BREAK SPACE}亿"), (10_000, "\N{NO-BREAK SPACE}万")):
        if value >= size:
            scaled = value / size
            return f"{scaled:,.{1 if scaled < 99.95 else 0}f}{unit}"
    return f"{value:,.0f}"
