"""A seeded sample of a corpus of any size, in memory that does not grow with it."""

from __future__ import annotations

import hashlib
import heapq
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dataset.corpus import TRAIN, CorpusSource
from dataset.readers import read_text_rows
from dataset.text_files import open_text
from novelgpt.settings.errors import UserError
from novelgpt.settings.terminal import progress

# In characters. A line that is longer, as in books of one line, is drawn in parts.
LONGEST_PIECE = 4_000
LARGE_ENOUGH = 10 * LONGEST_PIECE
# A line with its end and the blank lines behind it: pretraining cuts documents there, and a tokenizer may merge
# punctuation with line ends.
_LINE_END = r"\n(?:[^\S\n]{0,99}\n){0,99}"
_PIECE = re.compile(rf"[^\n]{{1,{LONGEST_PIECE}}}(?:{_LINE_END})?|{_LINE_END}")


@dataclass(frozen=True)
class Sample:
    """Pieces of a corpus: lines with their ends, in the order of the corpus.

    Attributes:
        pieces: to train a tokenizer on.
        report: others, to measure it on.
        corpus_characters: number of all characters.
    """

    pieces: list[str]
    report: list[str]
    corpus_characters: int

    @property
    def characters(self) -> int:
        """Number of those to train on."""
        return sum(map(len, self.pieces))

    @property
    def sha256(self) -> str:
        """Of the pieces to train on, in UTF-8, each followed by a NUL."""
        digest = hashlib.sha256()
        for piece in self.pieces:
            digest.update(f"{piece}\0".encode())
        return digest.hexdigest()


def draw_sample(
    sources: Iterable[CorpusSource], text_column: str, characters: int, report_characters: int, seed: int
) -> Sample:
    """Draw pieces of the text that is to be trained on; held-out books are not read.

    Every piece gets a random key, and those with the smallest keys are kept: as many as fit into the wanted number of
    characters. So each is as likely to be drawn as any other, in one pass. Of a corpus that is too small for both
    parts, each gets its share.

    Args:
        sources: as `find_sources` returns them.
        text_column: field of the text in rows.
        characters: at most so many to train on.
        report_characters: at most so many for the report.
        seed: of the keys.

    Raises:
        UserError: a source holds tokens, nothing is to be trained on, no piece is as short as the sample, or what
            reading the files raises.
    """
    draw = random.Random(seed)
    wanted = characters + report_characters
    kept: list[tuple[float, int, str]] = []  # a heap: the largest key, negated, comes first
    bound, size, seen = 1.0, 0, 0
    for index, piece in enumerate(_read_pieces(list(sources), text_column)):
        key = draw.random()
        seen += len(piece)
        if key >= bound:
            continue
        heapq.heappush(kept, (-key, index, piece))
        size += len(piece)
        while size > wanted:
            negated, _, dropped = heapq.heappop(kept)
            bound = -negated
            size -= len(dropped)
    kept.sort(reverse=True)
    first = _count_within(kept, 0, min(report_characters, size * report_characters // wanted))
    last = _count_within(kept, first, characters)
    report, pieces = kept[:first], kept[first:last]
    if not pieces:
        raise UserError(
            f"--sample_characters {characters} leaves nothing to train on: no line that is drawn is as short",
            f"take more: {LARGE_ENOUGH} is enough for any corpus",
        )
    del kept
    return Sample(_in_order(pieces), _in_order(report), seen)


def cut_pieces(stretches: Iterable[str]) -> Iterator[str]:
    """Cut a text into its pieces, whose concatenation it is.

    Args:
        stretches: of the text, of any length.
    """
    rest = ""
    for stretch in stretches:
        text, complete = rest + stretch, None
        for found in _PIECE.finditer(text):
            if found.end() == len(text):
                break  # it may go on in the next stretch, or turn out to be a blank line of the piece before
            if complete is not None:
                yield complete[0]
            complete = found
        rest = text if complete is None else text[complete.start() :]
    yield from (found[0] for found in _PIECE.finditer(rest))


def _count_within(kept: list[tuple[float, int, str]], begin: int, characters: int) -> int:
    """Where the pieces from `begin` on exceed a number of characters."""
    for index in range(begin, len(kept)):
        characters -= len(kept[index][2])
        if characters < 0:
            return index
    return len(kept)


def _in_order(pieces: list[tuple[float, int, str]]) -> list[str]:
    pieces.sort(key=lambda piece: piece[1])
    return [piece for _, _, piece in pieces]


def _read_pieces(sources: list[CorpusSource], text_column: str) -> Iterator[str]:
    for source in sources:
        if source.manifest is not None:
            raise UserError(f"{source.folder} already holds tokens", "name the text that they were made from")
    # Prepared folders have one form of rows; the column is that of other files.
    columns = {path: text_column if source.folder is None else "text"
               for source in sources if source.split == TRAIN for path in source.files}  # fmt: skip
    if not columns:
        raise UserError("nothing to train a tokenizer on: all text is held out", "name text that is trained on")
    with progress(sum(path.stat().st_size for path in columns), "reading the corpus", "B") as advance:
        for path, column in columns.items():
            for text in _read_texts(path, column):
                yield from cut_pieces(text)
            advance(path.stat().st_size)


def _read_texts(path: Path, text_column: str) -> Iterator[Iterable[str]]:
    """The texts of a file, each in stretches."""
    if path.suffix.lower() == ".txt":
        yield open_text(path).blocks()
        return
    for row in read_text_rows(path, text_column):
        # Pretraining joins the chapters of a book by an empty line.
        yield [row["text"].strip("\n") + "\n\n" if row["book"] else row["text"]]
