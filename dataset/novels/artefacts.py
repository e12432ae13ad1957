"""The artefact of a source file: a folder with its chapters, what was removed, and fingerprints; complete if it exists.

A folder is named for everything that determines its content, so it never has to be made again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from dataset.mending import BadBytes
from dataset.novels.books import PreparedBook
from dataset.novels.duplicates.shingles import Fingerprints, fingerprint, save_fingerprints
from dataset.novels.records import BookRecord

CHAPTERS, REMOVED, SKIPPED = "chapters.jsonl", "removed.jsonl", "skipped.jsonl"
BOOKS, FINGERPRINTS = "books.json", "fingerprints.npz"


def json_line(row: dict[str, Any]) -> str:
    """A row as one line with its line end, Chinese not escaped."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl file that `json_line` made."""
    with path.open(encoding="utf-8", newline="\n") as file:
        yield from map(json.loads, file)


class ArtefactWriter:
    """Writes the books of one source file into a folder, one after the other.

    * chapters.jsonl: {"book": index in books.json, "text", "chapter", "title", "source"}
    * removed.jsonl: {"source", "line", "rule", "text"}, with "section" where the source gives the chapters; of bytes
      that could not be decoded their values in hexadecimal, and "offset" in place of the line
    * skipped.jsonl: {"source", "reason"} of members of an archive that are not texts
    * books.json: the records; of a text that cannot be used, with the reason
    * fingerprints.npz: of all books, as `dataset.novels.duplicates.shingles` stores them
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
        for number, chapter in enumerate(book.chapters, start=1):
            row = {"book": len(self.records), "text": chapter.text, "chapter": chapter.label or chapter.heading,
                   "title": chapter.title, "source": f"{source}#{number}"}  # fmt: skip
            self._chapters.write(json_line(row))
        for (line, rule, text), section in book.removed:
            where = {} if section is None else {"section": section}
            self._removed.write(json_line({"source": source, **where, "line": line, "rule": rule, "text": text}))
        for bad in bad_bytes:
            row = {"source": source, "offset": bad.offset, "rule": "undecodable_bytes", "text": bad.data.hex()}
            self._removed.write(json_line(row))
        self.records.append(book.record)
        self.fingerprints.append(fingerprint([] if book.record.refused else [one.text for one in book.chapters]))

    def refuse(self, source: str, reason: str) -> None:
        """Record a text that cannot be used, or the file where its rest cannot be read."""
        rest = reason.removeprefix(source)
        if rest.startswith((" ", ": ")):
            reason = rest.lstrip(": ")
        elif rest.startswith(":"):
            reason = f"line {rest[1:]}"
        name = PurePosixPath(source.rsplit("!", 1)[-1]).stem
        self.records.append(BookRecord(name, source, refused=reason, split="refused"))
        self.fingerprints.append(fingerprint([]))

    def leave_out(self, source: str, reason: str) -> None:
        """Record a member of an archive: refused if it is a text, skipped if not."""
        path = PurePosixPath(source.partition("!")[2])
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
        if path.suffix.lower() == ".txt" and not hidden:
            self.refuse(source, reason)
        else:
            self._skipped.write(json_line({"source": source, "reason": reason}))

    def __enter__(self) -> ArtefactWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        for file in (self._chapters, self._removed, self._skipped):
            file.close()
        if kind is None:
            text = json.dumps([asdict(record) for record in self.records], ensure_ascii=False)
            (self.folder / BOOKS).write_text(text, encoding="utf-8")
            save_fingerprints(self.fingerprints, self.folder / FINGERPRINTS)
