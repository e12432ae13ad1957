"""Rows that ask a model to go on with a novel it has not seen, from held-out text.

    python -m predict.continuations data/novels output/continuations.jsonl
    python -m predict.continuations data/novels output/asked.jsonl --ask chat --lengths 2000

Each row has a passage from the beginning of a chapter as its prompt, and what the author wrote next as its reference.
All lengths are asked at the same places, so that their scores differ by the length alone. `python -m predict` scores a
prediction up to the length of its reference, and each length by itself.
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
NEAR = 0.1  # of a length: how far from it the reference may end, so that it ends with a sentence

_SENTENCE_END = re.compile(r"[。！？!?…]+[”’」』）)\"]*|(?=\n)")
_PARAGRAPH_END = re.compile(r"\n+")


class Place(NamedTuple):
    """Where a row begins in its book: at a chapter, from which character of the book, and where its prompt ends."""

    chapter: str
    start: int
    prompt_end: int


class Chapter(NamedTuple):
    """A chapter as it stands in a file; `follows`: whether nothing is missing between it and the one before."""

    name: str
    text: str
    follows: bool


@dataclass(frozen=True)
class Book:
    """A book as one text.

    Attributes:
        name: of the book.
        text: its chapters, with a line feed between them.
        chapters: (name, where it begins in the text, where the text behind it first has a gap) of each, in order.
    """

    name: str
    text: str
    chapters: tuple[tuple[str, int, int], ...]

    @classmethod
    def of(cls, name: str, chapters: Sequence[Chapter]) -> Book:
        """The book of these chapters."""
        texts = [chapter.text if chapter.text.endswith("\n") else chapter.text + "\n" for chapter in chapters]
        ends = list(itertools.accumulate(map(len, texts)))
        found: list[tuple[str, int, int]] = []
        gap = ends[-1]
        for number in reversed(range(len(chapters))):
            found.insert(0, (chapters[number].name, ends[number] - len(texts[number]), gap))
            gap = gap if chapters[number].follows else ends[number] - len(texts[number])
        return cls(name, "".join(texts), tuple(found))


@dataclass(frozen=True)
class Asking:
    """What rows are made.

    Attributes:
        lengths: characters of the references, each a group of rows.
        prompt_characters: most characters of a prompt.
        per_book: most places of a book.
        seed: of the choice of places.
        chat: ask in a conversation instead of giving raw text.
    """

    lengths: tuple[int, ...] = (500, 2000, 4000)
    prompt_characters: int = 2000
    per_book: int = 10
    seed: int = 42
    chat: bool = False

    @property
    def reach(self) -> int:
        """Characters that a place needs."""
        return self.prompt_characters + int(max(self.lengths) * (1 + NEAR))


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
            raise UserError(f"{name} holds no book out", "prepare it with --held_out or --held_out_share")
        files += found
    return files


def read_books(files: Iterable[Path]) -> Iterator[Book]:
    """Books of files of text rows: neighbouring rows of one name, which may go on from file to file.

    A .txt file is a book. Names that come again get a number.

    Raises:
        UserError: what `read_text_rows` raises.
    """
    rows = (row for file in files for row in _text_rows(file))
    times: Counter[str] = Counter()
    for (_, name), of_book in itertools.groupby(rows, key=_book_of):
        times[name] += 1
        chapters = []
        before = ""
        for row in of_book:
            chapters.append(Chapter(row["chapter"] or row["title"], row["text"], _follows(before, row["place"])))
            before = row["place"]
        yield Book.of(name if times[name] == 1 else f"{name} ({times[name]})", chapters)


def places(book: Book, asking: Asking) -> tuple[list[Place], int]:
    """The places of a book that rows can begin at, none within the text of another; and how many chapters too little
    text follows.

    Openings of chapters, and in chapters that are as long as several rows further paragraphs.
    """
    found: list[Place] = []
    short = 0
    free = 0
    ends = [begin for _, begin, _ in book.chapters[1:]] + [len(book.text)]
    for (chapter, begin, gap), end in zip(book.chapters, ends, strict=True):
        prompt_end = _prompt_end(book.text, begin, asking.prompt_characters)
        if begin + asking.reach > gap or prompt_end is None:
            short += 1
            continue
        if begin >= free:
            found.append(Place(chapter, begin, prompt_end))
            free = begin + asking.reach
        while (start := _paragraph_from(book.text, max(begin, free))) + asking.reach <= end:
            prompt_end = _prompt_end(book.text, start, asking.prompt_characters)
            if prompt_end is not None:
                found.append(Place(chapter, start, prompt_end))
            free = start + asking.reach
    return found, short


def choose(found: Sequence[Place], count: int, generator: random.Random) -> list[Place]:
    """At most `count` of the places, spread evenly: one from each of as many equal parts of the book."""
    if len(found) <= count:
        return list(found)
    borders = [number * len(found) // count for number in range(count + 1)]
    return [found[generator.randrange(first, last)] for first, last in zip(borders, borders[1:], strict=False)]


def reference_from(text: str, start: int, length: int) -> str:
    """About `length` characters from `start` on, up to the end of the sentence that ends nearest; none near: exactly.

    >>> reference_from("他来了。她走了，没有回头。天黑了。", 0, 12)
    '他来了。她走了，没有回头。'
    """
    slack = int(length * NEAR)
    ends = [
        match.end()
        for match in _SENTENCE_END.finditer(text, start + length - slack, start + length + slack + 4)
        if match.end() <= start + length + slack
    ]
    end = min(ends, key=lambda place: abs(place - start - length), default=start + length)
    return text[start:end].rstrip("\n")


def rows_of(book: Book, asking: Asking) -> tuple[list[dict[str, Any]], int]:
    """The rows of a book, and how many of its chapters are followed by too little text."""
    found, short = places(book, asking)
    generator = random.Random(f"{asking.seed} {book.name}")
    rows = []
    for place in choose(found, asking.per_book, generator):
        passage = book.text[place.start : place.prompt_end]
        for length in asking.lengths:
            reference = reference_from(book.text, place.prompt_end, length)
            row: dict[str, Any] = {"id": f"{book.name}/{place.start}/{length}"}
            if asking.chat:
                question = QUESTION.format(characters=length, passage=passage.rstrip("\n"))
                row["messages"] = [
                    {"role": "user", "content": question}, {"role": "assistant", "content": reference}
                ]  # fmt: skip
            else:
                row |= {"text_prompt": passage, "text_completion": reference}
            row |= {"score_group": str(length), "scored_characters": len(reference)}
            rows.append(row | {"book": book.name, "chapter": place.chapter})
    return rows, short


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Make the rows that the command line asks for."""
    parser = CommandParser(
        prog="python -m predict.continuations", description="Rows that ask a model to go on with held-out novels."
    )
    parser.add_argument("held_out", nargs="+", type=from_home, help="folders of `dataset novels`, of which only the "
                        "held-out part is read, or text files that no training has seen")  # fmt: skip
    parser.add_argument("output", type=Path, help="where the rows go, .jsonl")
    parser.add_argument("--lengths", type=int, nargs="+", default=[500, 2000, 4000],
                        help="characters of the references [default: 500 2000 4000]")  # fmt: skip
    parser.add_argument("--prompt_characters", type=int, default=2000, help="most of a prompt [default: 2000]")
    parser.add_argument("--per_book", type=int, default=10, help="most places of a book [default: 10]")
    parser.add_argument("--seed", type=int, default=42, help="of the choice of places [default: 42]")
    parser.add_argument("--ask", choices=["plain", "chat"], default="plain",
                        help="plain: raw text, for base models; chat: a request [default: plain]")  # fmt: skip
    words = parser.parse_args(argv)
    for name, values in (("lengths", words.lengths), ("prompt_characters", [words.prompt_characters]),
                         ("per_book", [words.per_book])):  # fmt: skip
        if min(values) < 1:
            raise UserError(f"--{name} {min(values)}", "take at least 1")
    if words.output.suffix != ".jsonl":
        raise UserError(f"{words.output} is no .jsonl file", "name one behind the held-out text")
    lengths = tuple(sorted(set(words.lengths)))
    asking = Asking(lengths, words.prompt_characters, words.per_book, words.seed, words.ask == "chat")
    files = held_out_files(words.held_out)
    rows: list[dict[str, Any]] = []
    books = short = 0
    for book in read_books(files):
        of_book, short_of_book = rows_of(book, asking)
        rows += of_book
        books += bool(of_book)
        short += short_of_book
    if not rows:
        raise UserError(
            f"no place in {', '.join(words.held_out)} with {asking.reach} characters: "
            f"{counted(short, 'chapter')} {'is' if short == 1 else 'are'} too short",
            "lower --lengths or --prompt_characters, or bring longer texts",
        )
    _write(rows, words.output)
    places = counted(len(rows) // len(lengths), "place")
    say(f"{counted(len(rows), 'row')} from {places} in {counted(books, 'book')}, in {words.output}")
    say(f"left out: {counted(short, 'chapter')}, which fewer than {asking.reach} characters follow")


def _text_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Text rows, with "place": what their own field `source` says, which prepared folders have."""
    plain = file.suffix.lower() == ".txt"
    records: Iterable[tuple[str, dict[str, Any]]] = itertools.repeat(("", {})) if plain else read_records(file)
    for row, (_, record) in zip(read_text_rows(file), records, strict=False):
        yield {**row, "book": row["book"] or file.stem, "place": str(record.get("source") or "")}


def _book_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """What neighbouring rows of one book have in common; a .txt file is a book whatever its name."""
    path = row["source"] if row["source"].lower().endswith(".txt") else ""
    return path, row["book"]


def _follows(before: str, place: str) -> bool:
    """Whether two neighbouring rows are neighbouring chapters, by their places "file#4" in the source; True where these
    say nothing."""
    (file, _, number), (file_before, _, number_before) = place.rpartition("#"), before.rpartition("#")
    if not (number.isdecimal() and number_before.isdecimal()):
        return True
    return file == file_before and int(number) == int(number_before) + 1


def _prompt_end(text: str, start: int, characters: int) -> int | None:
    """The last paragraph border within so many characters; where there is none, the last end of a sentence."""
    for pattern in (_PARAGRAPH_END, _SENTENCE_END):
        ends = [match.end() for match in pattern.finditer(text, start, start + characters)]
        # A heading alone says too little.
        ends = [end for end in ends if end - start >= characters // 2]
        if ends:
            return ends[-1]
    return None


def _paragraph_from(text: str, start: int) -> int:
    """Where the first paragraph at or after `start` begins."""
    match = _PARAGRAPH_END.search(text, max(0, start - 1))
    return match.end() if match else len(text)


def _write(rows: Iterable[dict[str, Any]], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", "name a file that can be written") from error


if __name__ == "__main__":
    main()
