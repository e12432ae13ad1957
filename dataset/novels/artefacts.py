"""What the step of one source file leaves behind: a folder that is complete if it is there.

A folder is named for everything that decides its content, so what is there never has to be made again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from dataset.mending import BadBytes
from dataset.novels.books import PreparedBook
from dataset.novels.duplicates.near_duplicates import Fingerprints, fingerprint, save_fingerprints
from dataset.novels.records import BookRecord

CHAPTERS, REMOVED, SKIPPED = "chapters.jsonl", "removed.jsonl", "skipped.jsonl"
BOOKS, FINGERPRINTS = "books.json", "fingerprints.npz"


def json_line(row: dict[str, Any]) -> str:
    """A row and its line end, Chinese as it is."""
    return json.dumps(row, ensure_ascii=False) + "\n"


class ArtefactWriter:
    """Writes the books of one source file into a folder, one after the other.

    * chapters.jsonl: {"book": place in books.json, "text", "chapter", "title", "source"}
    * removed.jsonl: {"source", "line", "rule", "text"}, with "section" where the source gives the chapters; of bytes
      that could not be decoded their values in hexadecimal, and "offset" in place of the line
    * skipped.jsonl: {"source", "reason"} of members of an archive that are no texts
    * books.json: the records; of a text that cannot be used, with the reason
    * fingerprints.npz: of all books, as `dataset.novels.duplicates.near_duplicates` keeps them
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: list[BookRecord] = []
        self.fingerprints: list[Fingerprints] = []
        self._chapters, self._removed, self._skipped = (
            (folder / name).open("w", encoding="utf-8", newline="\n") for name in (CHAPTERS, REMOVED, SKIPPED)
        )

    def add(self, book: PreparedBook, bad_bytes: Sequence[BadBytes]) -> None:
        """Write a book."""
        source = book.record.source
        for place, chapter in enumerate(book.chapters, start=1):
            row = {"book": len(self.records), "text": chapter.text, "chapter": chapter.label or chapter.heading,
                   "title": chapter.title, "source": f"{source}#{place}"}  # fmt: skip
            self._chapters.write(json_line(row))
        for entry in book.removed:
            number, rule, text = entry.removed
            section = {} if entry.section is None else {"section": entry.section}
            self._removed.write(json_line({"source": source, **section, "line": number, "rule": rule, "text": text}))
        for bad in bad_bytes:
            row = {"source": source, "offset": bad.offset, "rule": "undecodable_bytes", "text": bad.data.hex()}
            self._removed.write(json_line(row))
        self.records.append(book.record)
        texts = [] if book.record.refused else [chapter.text for chapter in book.chapters]
        self.fingerprints.append(fingerprint(texts))

    def refuse(self, source: str, reason: str) -> None:
        """Note a text that cannot be used, or the file where its rest cannot be read."""
        name = PurePosixPath(source.rsplit("!", 1)[-1]).stem
        rest = reason.removeprefix(source)
        if rest.startswith((" ", ": ")):
            reason = rest.lstrip(": ")
        elif rest.startswith(":"):
            reason = f"line {rest[1:]}"
        self.records.append(BookRecord(name, source, refused=reason, split="refused"))
        self.fingerprints.append(fingerprint([]))

    def skip(self, source: str, reason: str) -> None:
        """Note a member of an archive that is no text."""
        self._skipped.write(json_line({"source": source, "reason": reason}))

    def __enter__(self) -> ArtefactWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self._chapters.close()
        self._removed.close()
        self._skipped.close()
        if kind is None:
            text = json.dumps([asdict(record) for record in self.records], ensure_ascii=False)
            (self.folder / BOOKS).write_text(text, encoding="utf-8")
            save_fingerprints(self.fingerprints, self.folder / FINGERPRINTS)


def read_book_records(folder: Path) -> list[BookRecord]:
    """Of an artefact, in the order of its source."""
    rows = json.loads((folder / BOOKS).read_text(encoding="utf-8"))
    return [BookRecord(**row) for row in rows]


def read_chapters(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of chapters.jsonl: {"book": place in books.json, "chapter", "title", "text", "source"}, in order."""
    with (folder / CHAPTERS).open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield json.loads(line)
