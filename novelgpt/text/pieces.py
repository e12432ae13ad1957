"""Documents to tokens in pieces, so that a book of any length streams and every core has work.

Training from text and preparing tokens both go through here, so that they get the same tokens. A document is cut where
its tokens are those of the whole all the same: behind a line end, before a line that is not blank. Tokenizers that this
does not hold for get their documents whole.
"""

from __future__ import annotations

import re
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from novelgpt.text.encoding import document_begin_ids, document_end_id, encode
from novelgpt.text.origins import Origin, TextMarks

# Of characters. Pieces are small enough to share out evenly; a batch keeps the cores busy and takes about 50 MB.
PIECE, BATCH = 4_000, 250_000
# Batches being encoded while others are being cut, or written: the cores never wait for Python.
AT_ONCE = 2
_CUT = re.compile(r"\n(?=[^\S\r\n]*\S)")
_BEFORE = ("字", "。", "”", "a", "1", " ", "　", "\t", "-", "…")
_AFTER = ("字", "“", "a", "A", "1", " 字", "  a", "　　字", "\t字", "    a", "-", "…", "<", "第一章")


class Piece(NamedTuple):
    """A part of a document, in which it begins, ends, both or neither."""

    text: str
    begins: bool
    ends: bool
    origin: Origin = Origin("", "")


class Unfinished(NamedTuple):
    """The end of a document that may go on: `text` is not encoded yet; `begins` as in Piece."""

    book: str
    text: str
    begins: bool


class DocumentCutter:
    """Texts in, pieces of documents out.

    Neighbouring texts of one book are one document, with an empty line between them.

    Args:
        in_pieces: whether documents may be cut, as `cuts_are_exact` says.
        unfinished: what an earlier cutter was left with.
    """

    def __init__(self, in_pieces: bool, unfinished: Unfinished | None = None) -> None:
        self.in_pieces = in_pieces
        self.unfinished = unfinished
        self._origin: Origin | None = None  # of what is unfinished

    def add(self, text: str, book: str, where: str = "", lines: bool = False) -> Iterator[Piece]:
        """Pieces that are settled now; a text without a book is a document of its own.

        Args:
            text: whatever its length.
            book: that it belongs to.
            where: the row that it is, for the origins of pieces.
            lines: `where` is a whole file, of which pieces name their lines.
        """
        line = 1 + len(text) - len(text.lstrip("\n"))  # of the file
        text = text.strip("\n")
        last, begins = self.unfinished, True
        first = where
        if last is not None and book and last.book == book:
            text, begins = f"{last.text}\n\n{text}", last.begins
            first = self._origin.first if self._origin else where
        else:
            yield from self.end()

        def origin(begin: int, end: int) -> Origin:
            nonlocal line
            if not lines:
                return Origin(where if begin else first, where)
            top, line = line, line + text.count("\n", begin, end)
            return Origin(f"{where}:{top}", f"{where}:{max(top, line - text.endswith(chr(10), begin, end))}")

        begin = 0
        while self.in_pieces and (cut := _CUT.search(text, begin + PIECE)):
            yield Piece(text[begin : cut.end()], begins, False, origin(begin, cut.end()))
            begin, begins = cut.end(), False
        self.unfinished = Unfinished(book, text[begin:], begins)
        self._origin = origin(begin, len(text))

    def end(self) -> Iterator[Piece]:
        """The last piece of the document, if there is one."""
        if self.unfinished is not None:
            yield Piece(self.unfinished.text, self.unfinished.begins, True, self._origin or Origin("", ""))
            self.unfinished = self._origin = None


def cuts_are_exact(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the pieces of a document have the tokens of the whole.

    Tried on what may stand around a line end, and on every token of the vocabulary that goes on behind one. It holds
    for Qwen and Baichuan; not for tokenizers that put a blank before each text, or take an indent into the line end.
    """
    pairs = [(f"{before}{ends}", after) for before in _BEFORE for ends in ("\n", "\n\n", "\n　\n") for after in _AFTER]
    for token in tokenizer.get_vocab():
        text = token.replace("Ċ", "\n").replace("Ġ", " ").replace("▁", " ")
        if "\n" in text.rstrip("\n"):
            cut = text.rindex("\n") + 1
            pairs.append((f"字{text[:cut]}", f"{text[cut:]}字"))
    whole = encode_texts([before + after for before, after in pairs], tokenizer)
    left = encode_texts([before for before, _ in pairs], tokenizer)
    right = encode_texts([after for _, after in pairs], tokenizer)
    return all(ids == [*one, *two] for ids, one, two in zip(whole, left, right, strict=True))


def encode_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """What `encode` gives for each text, on all cores where the tokenizer is a fast one."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return [encode(text, tokenizer) for text in texts]
    return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def token_type(tokenizer: PreTrainedTokenizerBase) -> numpy.dtype:
    """The smallest unsigned integers that hold every token, little-endian."""
    return numpy.dtype("<u2" if max(tokenizer.get_vocab().values()) < 1 << 16 else "<u4")


class PieceEncoder:
    """A tokenizer, with what takes a while to find out about it.

    Attributes:
        in_pieces: whether documents may be cut.
        dtype: of the tokens.
        begin: the tokens before each document; most tokenizers have none.
        end: the token behind each document.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.in_pieces = cuts_are_exact(tokenizer)
        self.dtype = token_type(tokenizer)
        self.begin, self.end = document_begin_ids(tokenizer), document_end_id(tokenizer)

    def encode(
        self, pieces: Iterable[Piece], marks: TextMarks | None = None
    ) -> Iterator[tuple[numpy.ndarray, list[int]]]:
        """Tokens of the pieces end to end, in batches, each document between its begin and end tokens.

        Args:
            pieces: of documents.
            marks: gets the origins of the pieces.

        Yields:
            tokens [any number], of `dtype`, and the places in them where documents begin.
        """
        encode("字", self.tokenizer)  # which clears away limits of length that the tokenizer's file may set
        fast = isinstance(self.tokenizer, PreTrainedTokenizerFast)
        waiting: deque[tuple[list[Piece], Future[tuple[numpy.ndarray, list[int], list[int]]]]] = deque()
        count = 0

        def settle() -> tuple[numpy.ndarray, list[int]]:
            nonlocal count
            batch, future = waiting.popleft()
            tokens, begins, starts = future.result()
            for piece, start in zip(batch, starts, strict=True):
                if marks is not None:
                    marks.add(count + start, piece.origin)
            count += len(tokens)
            return tokens, begins

        with ThreadPoolExecutor(AT_ONCE if fast else 1) as pool:
            for batch in _batches(pieces):
                waiting.append((batch, pool.submit(self._encode_batch, batch)))
                if len(waiting) > AT_ONCE:
                    yield settle()
            while waiting:
                yield settle()

    def _encode_batch(self, batch: list[Piece]) -> tuple[numpy.ndarray, list[int], list[int]]:
        """Tokens, and the places in them where documents and where pieces begin."""
        # An array of the standard library takes lists of numbers at twice the speed of numpy's.
        tokens = array("H" if self.dtype.itemsize == 2 else "I")
        begins: list[int] = []
        starts: list[int] = []
        for piece, ids in zip(batch, encode_texts([piece.text for piece in batch], self.tokenizer), strict=True):
            starts.append(len(tokens))
            if piece.begins:
                begins.append(len(tokens))
                tokens.extend(self.begin)
            tokens.extend(ids)
            if piece.ends:
                tokens.append(self.end)
        made = numpy.frombuffer(tokens, self.dtype.newbyteorder("=")).astype(self.dtype, copy=False)
        return made, begins, starts


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text) + 1  # documents may be empty
        if characters >= BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
