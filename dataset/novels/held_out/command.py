"""A list of works to hold out, from a folder that `python -m dataset novels` prepared.

    python -m dataset held_out CHOICE PREPARED LIST

CHOICE names the works to test on; their authors' other works, and what the comparison of all books links to them, are
listed with them. The folder must have been prepared from everything in which they may occur.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dataset.novels.artefacts import BOOKS, FINGERPRINTS, read_rows
from dataset.novels.duplicates.near_duplicates import BookPrints
from dataset.novels.duplicates.shingles import load_fingerprints
from dataset.novels.held_out.sketches import EMPTY, Sketch, sketch_of
from dataset.novels.held_out.works import MAX_WORDS, HeldOutWork, author_and_title, save_held_out_works, words_of
from dataset.novels.manifest import MANIFEST
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.remedies import python_module
from novelgpt.settings.terminal import say

FIELDS = ("author", "title", "era")


@dataclass(frozen=True)
class _Book:
    """A book of a prepared folder: its fingerprints, and the hash of its file."""

    prints: BookPrints
    sha256: str

    @property
    def words(self) -> list[str]:
        """Of its name and its path."""
        return [*words_of(self.prints.name), *words_of(self.prints.source)]

    def as_work(self, author: str, title: str, role: str, of: str, era: str) -> HeldOutWork:
        """As a work of a list, with its whole sketch."""
        prints = self.prints.prints
        return HeldOutWork(author, title, role, of, era, int(prints.characters.sum()), self.sha256, sketch_of(prints))


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Make the list that the command line names."""
    parser = CommandParser(
        prog="python -m dataset held_out",
        description="A list of works to hold out wherever they occur, for `novels --held_out_works`: hashes and "
        "sketches of the works, not their text.",
    )
    parser.add_argument("choice", type=Path, help="YAML file: a name, and works with author, title, era")
    parser.add_argument("prepared", type=Path, help="folder that `novels` made of everything they may occur in")
    parser.add_argument("list", type=Path, help="file to write")
    args = parser.parse_args(argv)
    name, chosen = read_choice(args.choice)
    works = list_works(chosen, args.prepared)
    try:
        args.list.parent.mkdir(parents=True, exist_ok=True)
        save_held_out_works(name, works, args.list)
    except OSError as error:
        raise UserError(f"{args.list}: {error.strerror}", "name a file that can be written") from error
    for work in works:
        link = f" ({work.role} of {work.of})" if work.of else ""
        say(f"{work.name}: {work.characters:,} characters{link}")
    say(f"list 清单: {args.list}, {args.list.stat().st_size:,} bytes")


def read_choice(path: Path) -> tuple[str, list[dict[str, str]]]:
    """The name of a list, and {"author", "title", "era"} of the works to test on.

    Raises:
        UserError: no such file, or it is not a choice.
    """
    remedy = "write `name: my_list` and `works:`, below it lines like `- {author: 萧红, title: 生死场, era: modern}`"
    try:
        choice = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}", remedy) from None
    choice = choice if isinstance(choice, dict) else {}
    name, works = choice.get("name"), choice.get("works")
    if not isinstance(name, str) or len(name) > MAX_WORDS or not isinstance(works, list) or not works:
        raise UserError(f"{path}: no name or no works", remedy)
    for number, work in enumerate(works, start=1):
        if not isinstance(work, dict) or set(work) - set(FIELDS) or not work.get("title"):
            raise UserError(f"{path}: work {number} is not an author, a title and an era", remedy)
        if any(len(str(value)) > MAX_WORDS for value in work.values()):
            raise UserError(f"{path}: work {number} has a text of more than {MAX_WORDS} characters", remedy)
    return name, [{field: str(work.get(field) or "") for field in FIELDS} for work in works]


def list_works(chosen: Sequence[Mapping[str, str]], prepared: Path) -> list[HeldOutWork]:
    """The works to test on, then those that may not be trained on with them.

    Args:
        chosen: from `read_choice`.
        prepared: folder that holds each of them once under its author and title.

    Raises:
        UserError: not a prepared folder, or a work is not in it, or twice.
    """
    books, alike = _read_prepared(prepared)
    tested: dict[str, HeldOutWork] = {}
    for work in chosen:
        wanted = HeldOutWork(**work, role="test", of="", characters=0, sha256="", sketch=EMPTY)
        found = [source for source, book in books.items() if _is_it(wanted, book)]
        if len(found) != 1:
            what = "is not in it" if not found else f"is there {len(found)} times: {', '.join(found)}"
            raise UserError(f"{prepared}: {wanted.name} {what}", "name each work as its file does: AUTHOR_TITLE.txt")
        tested[found[0]] = books[found[0]].as_work(role="test", of="", **work)
    linked: dict[str, HeldOutWork] = {}
    for first, second in alike:
        for here, there in ((first, second), (second, first)):
            if here in tested and there not in tested:
                linked.setdefault(there, _linked(books[there], tested[here], "near_duplicate"))
    for source, book in books.items():
        by = next((one for one in tested.values() if one.is_by(book.words)), None)
        if by is not None and source not in tested and source not in linked:
            linked[source] = _linked(book, by, "same_author")
    sketches: list[Sketch] = []
    works = []
    for one in [*tested.values(), *linked.values()]:
        # Editions repeat most of each other: each holds what those before it lack.
        works.append(replace(one, sketch=one.sketch.without(sketches)))
        sketches.append(one.sketch)
    return works


def _is_it(wanted: HeldOutWork, book: _Book) -> bool:
    """Whether the file of a book is named for a work, or, for works without an author, has its title as its name."""
    return wanted.is_named(book.words) or (not wanted.author and book.prints.name == wanted.title)


def _linked(book: _Book, work: HeldOutWork, role: str) -> HeldOutWork:
    """A book that may not be trained on for the sake of a work."""
    author, title = author_and_title(book.prints.name)
    return book.as_work(author[:MAX_WORDS], title[:MAX_WORDS], role, work.name, work.era)


def _read_prepared(prepared: Path) -> tuple[dict[str, _Book], list[tuple[str, str]]]:
    """source -> book, of the books of a prepared folder that can be used; and the sources of those that are alike.

    Raises:
        UserError: it is none, or its cache is gone or of another version.
    """
    command = python_module(f"dataset novels RAW {prepared} --held_out_share 0")
    remedy = f"make it by `{command}`, and keep its cache"
    books: dict[str, _Book] = {}
    try:
        inputs: list[dict[str, Any]] = json.loads((prepared / MANIFEST).read_text(encoding="utf-8"))["inputs"]
        hashes = {entry["source"]: entry["sha256"] for entry in inputs}
        for artefact in sorted((prepared / "cache" / "files").iterdir()):
            records = json.loads((artefact / BOOKS).read_text(encoding="utf-8"))
            for record, prints in zip(records, load_fingerprints(artefact / FINGERPRINTS), strict=True):
                source = record["source"]
                if not record["refused"]:
                    books[source] = _Book(BookPrints(record["name"], source, prints), hashes[_file_of(source, hashes)])
        rows = [row for row in read_rows(prepared / "duplicates.jsonl") if row["level"] == "book"]
        alike = [(row["first"], row["second"]) for row in rows if row["first"] in books and row["second"] in books]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{prepared} is not a prepared folder: {error}", remedy) from None
    return dict(sorted(books.items())), alike


def _file_of(source: str, files: Mapping[str, str]) -> str:
    """The file of a book: its source, or what that begins with, as of a.zip!b.txt; of a series the first file."""
    return source if source in files else max((file for file in files if source.startswith(file)), key=len)
