"""The parts that the tiny base is trained on, each of which is weighted as a whole.

    python scripts/recipes/tiny_base/parts.py PREPARED PAPERS OUT [--books MANIFEST]

From a folder of `dataset novels` come modern.jsonl, earlier.jsonl and held_out.jsonl, text rows of whole books; from
title/abstract rows come papers.jsonl and, of every tenth row, papers_held_out.jsonl, which is only evaluated on.
books.json lists the books.

A book is modern where it is written as Chinese is now, told by two characters that have changed since: 的, which took
the place of 之 and of much else, and 她, which is a word of its own only since about 1920.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

from dataset.corpus import TRAIN, find_sources
from dataset.novels.held_out.works import author_and_title
from dataset.readers import read_text_rows
from dataset.records import Record, read_records
from novelgpt.settings.atomic_files import atomic_folder, hash_file
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.terminal import say
from predict.continuations import held_out_files

MODERN, EARLIER, HELD_OUT = "modern", "earlier", "held_out"
# Of 1,000 characters. The first is enough by itself; the second also holds of the late 19th century, but not with 她.
MUCH_DE, SOME_DE, SOME_TA = 30, 18, 1
HELD_OUT_PAPERS = 10
PAPER_COLUMNS = "title,abstract"


def is_modern(text: str) -> bool:
    """Whether a book is written as Chinese is now."""
    de, ta = (1000 * text.count(character) / max(1, len(text)) for character in "的她")
    return de >= MUCH_DE or (de >= SOME_DE and ta >= SOME_TA)


def books_of(files: Iterable[Path]) -> Iterator[tuple[str, list[Record]]]:
    """(name, rows) of each book of prepared files, in order."""
    records = (record for file in files for _, record in read_records(file))
    for name, rows in itertools.groupby(records, key=itemgetter("book")):
        yield name, list(rows)


def describe(name: str, source: str, known: Mapping[str, Record]) -> dict[str, Any]:
    """{"title", "author", "died"} of a book: as its file is described, else as it is named: AUTHOR_TITLE.txt."""
    file = Path(re.split(r"[#!]", source)[0])
    entry = known.get(file.name, {})
    author, title = author_and_title(file.stem)
    return {
        "title": entry.get("title") or title or name,
        "author": entry.get("author") or author,
        "died": entry.get("author_death_year"),
    }


def write_rows(path: Path, rows: Iterable[Record]) -> None:
    """One JSON object a line."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_books(prepared: Path, known: Mapping[str, Record], folder: Path) -> list[dict[str, Any]]:
    """Write the books into their parts.

    Returns:
        {"name", "title", "author", "died", "part", "characters"} of each.
    """
    train = [file for source in find_sources([str(prepared)]) if source.split == TRAIN for file in source.files]
    listed = []
    try:
        tested = held_out_files([str(prepared)])
    except UserError as error:
        raise UserError(error.cause, "HELD_OUT_SHARE=0.05 before the command holds some of your books out") from None
    for files, held_out in ((train, False), (tested, True)):
        for name, rows in books_of(files):
            text = "".join(row["text"] for row in rows)
            part = HELD_OUT if held_out else MODERN if is_modern(text) else EARLIER
            write_rows(folder / f"{part}.jsonl", rows)
            listed.append({"name": name, **describe(name, rows[0]["source"], known), "part": part,
                           "characters": len(text)})  # fmt: skip
    return listed


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Write the parts, all or none of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("prepared", type=Path, help="folder of `dataset novels` with held-out works")
    parser.add_argument("papers", type=Path, help="title/abstract rows")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--books", type=Path, help="JSON list of {file, title, author, author_death_year}")
    args = parser.parse_args(argv)
    known = {str(entry.get("file")): entry for _, entry in read_records(args.books)} if args.books else {}
    papers = [{"text": row["text"]} for row in read_text_rows(args.papers, PAPER_COLUMNS)]
    with atomic_folder(args.out) as folder:
        books = write_books(args.prepared, known, folder)
        kept = [row for number, row in enumerate(papers) if number % HELD_OUT_PAPERS]
        write_rows(folder / "papers.jsonl", kept)
        write_rows(folder / "papers_held_out.jsonl", papers[::HELD_OUT_PAPERS])
        parts = {part: sum(book["characters"] for book in books if book["part"] == part)
                 for part in (MODERN, EARLIER, HELD_OUT)}  # fmt: skip
        if not parts[MODERN] + parts[EARLIER]:
            raise UserError(f"{args.prepared} holds no book to train on", "prepare more novels")
        parts |= {"papers": sum(len(row["text"]) for row in kept)}
        file = {"name": args.papers.name, "sha256": hash_file(args.papers)[0]}
        listed = {"books": books, "parts": parts, "papers": len(kept), "papers_file": file}
        text = json.dumps(listed, ensure_ascii=False, indent=1)
        (folder / "books.json").write_text(text + "\n", encoding="utf-8")
    say(*(f"{part}: {characters:,} characters" for part, characters in parts.items()))


if __name__ == "__main__":
    main()
