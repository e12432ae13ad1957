"""Rows that ask a model to continue a novel it has not seen, from held-out text.

    python -m predict.continuations data/novels output/continuations.jsonl
    python -m predict.continuations data/novels output/asked.jsonl --ask chat --lengths 2000

The prompt of a row is a passage from the start of a chapter, its reference what the author wrote next. All lengths are
asked at the same passages, so that their scores differ only by length. `python -m predict` scores a prediction up to
the length of its reference, and each length separately.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dataset.readers import read_text_rows
from dataset.records import read_records
from novelgpt.settings.atomic_files import atomic_write
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.paths import from_home
from novelgpt.settings.remedies import python_module
from novelgpt.settings.terminal import counted, say

QUESTION = "请续写下面的小说，约{characters}字。人物、口吻和文风与原文一致，直接写正文。\n\n{passage}"
TOLERANCE = 0.1  # share of a length by which the reference may differ from it, to end with a sentence

_SENTENCE_END = re.compile(r"[。！？!?…]+[”’」』）)\"]*|(?=\n)")
_PARAGRAPH_END = re.compile(r"\n+")


class Passage(NamedTuple):
    """Where a row starts in its book: name of the chapter, first character, end of the prompt."""

    chapter: str
    start: int
    prompt_end: int


class BookChapter(NamedTuple):
    """A chapter of a file; `follows`: whether nothing is missing between it and the previous one."""

    name: str
    text: str
    follows: bool


@dataclass(frozen=True)
class Book:
    """A book as one text.

    Attributes:
        name: of the book.
        text: its chapters, each ending with a line feed.
        chapters: (name, start in the text, first gap in the text after it) of each, in order.
    """

    name: str
    text: str
    chapters: tuple[tuple[str, int, int], ...]

    @classmethod
    def of(cls, name: str, chapters: Sequence[BookChapter]) -> Book:
        """The book of these chapters."""
        texts = [chapter.text if chapter.text.endswith("\n") else chapter.text + "\n" for chapter in chapters]
        starts = [0, *itertools.accumulate(map(len, texts))]
        found: list[tuple[str, int, int]] = []
        gap = starts[-1]
        for chapter, start in reversed(list(zip(chapters, starts, strict=False))):
            found.insert(0, (chapter.name, start, gap))
            gap = gap if chapter.follows else start
        return cls(name, "".join(texts), tuple(found))


@dataclass(frozen=True)
class ContinuationSettings:
    """Which rows are made.

    Attributes:
        lengths: characters of the references, each a group of rows.
        prompt_characters: maximum of a prompt.
        per_book: maximum of passages per book.
        seed: of the choice of passages.
        chat: ask in a conversation instead of giving raw text.
    """

    lengths: tuple[int, ...] = (500, 2000, 4000)
    prompt_characters: int = 2000
    per_book: int = 10
    seed: int = 42
    chat: bool = False

    @property
    def needed(self) -> int:
        """Characters that a passage needs."""
        return self.prompt_characters + int(max(self.lengths) * (1 + TOLERANCE))


def held_out_files(names: Sequence[str]) -> list[Path]:
    """The held-out files of prepared folders, and files that are named themselves.

    Raises:
        UserError: a folder that was not prepared, or holds nothing out.
    """
    files: list[Path] = []
    for name in names:
        path = Path(name)
        if not path.is_dir():
            files.append(path)
            continue
        if not (path / "manifest.json").is_file():
            raise UserError(f"{name} has no manifest.json", f"prepare it: {python_module('dataset novels RAW OUT')}")
        found = sorted(file for file in path.glob("held_out-*") if file.suffix in (".parquet", ".jsonl"))
        if not found:
            remedy = "prepare it with --held_out, --held_out_works or --held_out_share"
            raise UserError(f"{name} holds no book out", remedy)
        files += found
    return files


def read_books(files: Iterable[Path]) -> Iterator[Book]:
    """Books of files of text rows: consecutive rows of one name, also across files; a .txt file is a book.

    Repeated names get a number.

    Raises:
        UserError: what `read_text_rows` raises.
    """
    rows = (row for file in files for row in _text_rows(file))

    def book_of(row: Mapping[str, Any]) -> tuple[str, str]:  # a .txt file is a book, whatever its name
        return row["source"] if row["source"].lower().endswith(".txt") else "", row["book"]

    times: Counter[str] = Counter()
    for (_, name), of_book in itertools.groupby(rows, key=book_of):
        times[name] += 1
        chapters = []
        before = ""
        for row in of_book:
            chapters.append(BookChapter(row["chapter"] or row["title"], row["text"], _follows(before, row["place"])))
            before = row["place"]
        yield Book.of(name if times[name] == 1 else f"{name} ({times[name]})", chapters)


def find_passages(book: Book, settings: ContinuationSettings) -> tuple[list[Passage], int]:
    """The passages of a book that rows can start at, none within the text of another; and the number of chapters
    followed by too little text.

    Chapter openings, and further paragraphs of chapters that are as long as several rows.
    """
    found: list[Passage] = []
    short = free = 0
    ends = [start for _, start, _ in book.chapters[1:]] + [len(book.text)]
    for (chapter, opening, gap), end in zip(book.chapters, ends, strict=True):
        prompt_end = _prompt_end(book.text, opening, settings.prompt_characters)
        if opening + settings.needed > gap or prompt_end is None:
            short += 1
            continue
        if opening >= free:
            found.append(Passage(chapter, opening, prompt_end))
            free = opening + settings.needed
        while (start := _paragraph_from(book.text, max(opening, free))) + settings.needed <= end:
            prompt_end = _prompt_end(book.text, start, settings.prompt_characters)
            if prompt_end is not None:
                found.append(Passage(chapter, start, prompt_end))
            free = start + settings.needed
    return found, short


def choose(found: Sequence[Passage], count: int, generator: random.Random) -> list[Passage]:
    """At most `count` of the passages, one from each of as many equal parts of the book."""
    if len(found) <= count:
        return list(found)
    cuts = [number * len(found) // count for number in range(count + 1)]
    return [found[generator.randrange(first, last)] for first, last in itertools.pairwise(cuts)]


def reference_from(text: str, start: int, length: int) -> str:
    """About `length` characters from `start`, up to the nearest end of a sentence; exactly so many if none is near.

    >>> reference_from("他来了。她走了，没有回头。天黑了。", 0, 12)
    '他来了。她走了，没有回头。'
    """
    slack = int(length * TOLERANCE)
    ends = [
        match.end()
        for match in _SENTENCE_END.finditer(text, start + length - slack, start + length + slack + 4)
        if match.end() <= start + length + slack
    ]
    end = min(ends, key=lambda end: abs(end - start - length), default=start + length)
    return text[start:end].rstrip("\n")


def rows_of(book: Book, settings: ContinuationSettings) -> tuple[list[dict[str, Any]], int]:
    """The rows of a book, and the number of its chapters followed by too little text."""
    found, short = find_passages(book, settings)
    rows = []
    for passage in choose(found, settings.per_book, random.Random(f"{settings.seed} {book.name}")):
        prompt = book.text[passage.start : passage.prompt_end]
        for length in settings.lengths:
            reference = reference_from(book.text, passage.prompt_end, length)
            row: dict[str, Any] = {"id": f"{book.name}/{passage.start}/{length}"}
            if settings.chat:
                question = QUESTION.format(characters=length, passage=prompt.rstrip("\n"))
                row["messages"] = [
                    {"role": "user", "content": question}, {"role": "assistant", "content": reference}
                ]  # fmt: skip
            else:
                row |= {"text_prompt": prompt, "text_completion": reference}
            row |= {"score_group": str(length), "scored_characters": len(reference)}
            rows.append(row | {"book": book.name, "chapter": passage.chapter})
    return rows, short


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Make the rows that the command line asks for."""
    parser = CommandParser(
        prog="python -m predict.continuations", description="Rows that ask a model to continue held-out novels."
    )
    parser.add_argument("held_out", nargs="+", type=from_home, help="folders of `dataset novels`, of which only the "
                        "held-out part is read, or text files that no training has seen")  # fmt: skip
    parser.add_argument("output", type=Path, help="where the rows go, .jsonl")
    parser.add_argument("--lengths", type=int, nargs="+", default=[500, 2000, 4000],
                        help="characters of the references [default: 500 2000 4000]")  # fmt: skip
    parser.add_argument("--prompt_characters", type=int, default=2000, help="maximum of a prompt [default: 2000]")
    parser.add_argument("--per_book", type=int, default=10, help="maximum of passages per book [default: 10]")
    parser.add_argument("--seed", type=int, default=42, help="of the choice of passages [default: 42]")
    parser.add_argument("--ask", choices=["plain", "chat"], default="plain",
                        help="plain: raw text, for base models; chat: a request [default: plain]")  # fmt: skip
    args = parser.parse_args(argv)
    for name, value in (("lengths", min(args.lengths)), ("prompt_characters", args.prompt_characters),
                        ("per_book", args.per_book)):  # fmt: skip
        if value < 1:
            raise UserError(f"--{name} {value}", "use at least 1")
    if args.output.suffix != ".jsonl":
        raise UserError(f"{args.output} is not a .jsonl file", "name one behind the held-out text")
    lengths = tuple(sorted(set(args.lengths)))
    settings = ContinuationSettings(lengths, args.prompt_characters, args.per_book, args.seed, args.ask == "chat")
    rows: list[dict[str, Any]] = []
    books = short = 0
    for book in read_books(held_out_files(args.held_out)):
        of_book, short_of_book = rows_of(book, settings)
        rows += of_book
        books += bool(of_book)
        short += short_of_book
    if not rows:
        raise UserError(
            f"no passage in {', '.join(args.held_out)} with {settings.needed} characters: "
            f"{counted(short, 'chapter')} {'is' if short == 1 else 'are'} too short",
            "lower --lengths or --prompt_characters, or bring longer texts",
        )
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(args.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise UserError(f"{args.output}: {error.strerror}", "name a file that can be written") from error
    passages = counted(len(rows) // len(lengths), "passage")
    say(f"{counted(len(rows), 'row')} from {passages} in {counted(books, 'book')}, in {args.output}")
    say(f"left out: {counted(short, 'chapter')}, which fewer than {settings.needed} characters follow")


def _text_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Text rows with "place": the field `source` of prepared folders."""
    plain = file.suffix.lower() == ".txt"
    records: Iterable[tuple[str, dict[str, Any]]] = itertools.repeat(("", {})) if plain else read_records(file)
    for row, (_, record) in zip(read_text_rows(file), records, strict=False):
        yield {**row, "book": row["book"] or file.stem, "place": str(record.get("source") or "")}


def _follows(before: str, place: str) -> bool:
    """Whether two consecutive rows are consecutive chapters, by their places "file#4" in the source; True without such
    places."""
    (file, _, number), (file_before, _, number_before) = place.rpartition("#"), before.rpartition("#")
    if not (number.isdecimal() and number_before.isdecimal()):
        return True
    return file == file_before and int(number) == int(number_before) + 1


def _prompt_end(text: str, start: int, characters: int) -> int | None:
    """The last end of a paragraph within so many characters; without one, the last end of a sentence."""
    for pattern in (_PARAGRAPH_END, _SENTENCE_END):
        ends = [match.end() for match in pattern.finditer(text, start, start + characters)]
        # A heading alone is too little.
        ends = [end for end in ends if end - start >= characters // 2]
        if ends:
            return ends[-1]
    return None


def _paragraph_from(text: str, start: int) -> int:
    """Start of the first paragraph at or after `start`."""
    match = _PARAGRAPH_END.search(text, max(0, start - 1))
    return match.end() if match else len(text)


if __name__ == "__main__":
    main()
