"""Documents to tokens in chunks, so that a book of any length streams and every core has work.

Pretraining on text files and `python -m dataset tokens` share this code, so both produce the same tokens. Documents are
cut only where that does not change their tokens: after a line end, before a line that is not blank. Tokenizers for
which this does not hold get whole documents.
"""

from __future__ import annotations

import re
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from novelgpt.text.encoding import document_begin_ids, document_end_id, encode
from novelgpt.text.origins import Origin

# In characters. Chunks are small enough to spread evenly over the cores; a batch keeps them busy and takes about 50 MB.
CHUNK, BATCH = 4_000, 250_000
# Batches being encoded while others are being cut or written, so that the cores never wait for Python.
CONCURRENT_BATCHES = 2
_CUT = re.compile(r"\n(?=[^\S\r\n]*\S)")
_BEFORE = ("字", "。", "”", "a", "1", " ", "　", "\t", "-", "…")
_AFTER = ("字", "“", "a", "A", "1", " 字", "  a", "　　字", "\t字", "    a", "-", "…", "<", "第一章")


class Chunk(NamedTuple):
    """A part of a document, which may include its start, its end, both or neither."""

    text: str
    starts_document: bool
    ends_document: bool
    origin: Origin = Origin("", "")


class Unfinished(NamedTuple):
    """The end of a document that may continue in the next row: text that is not encoded yet."""

    book: str
    text: str
    starts_document: bool


class DocumentCutter:
    """Cuts text rows into chunks of documents; neighbouring rows of one book are one document.

    Args:
        in_chunks: whether documents may be cut (see `chunks_are_exact`).
        unfinished: the document that an earlier cutter ended with.
    """

    def __init__(self, in_chunks: bool, unfinished: Unfinished | None = None) -> None:
        self.in_chunks = in_chunks
        self.unfinished = unfinished
        self._origin = Origin("", "")  # of what is unfinished

    def cut(self, rows: Iterable[Mapping[str, str]], whole_files: bool = False, last: bool = False) -> Iterator[Chunk]:
        """Yield the chunks that are complete; the end of the last book is kept, as the next rows may continue it.

        Args:
            rows: {"text", "book", "chapter", "title", "source"}. Rows of one book are joined by an empty line.
            whole_files: each row is a file and a document of its own; its chunks name their lines.
            last: no rows follow, so the last document is complete.
        """
        for row in rows:
            names = ", ".join(row[name] for name in ("book", "chapter", "title") if not whole_files and row[name])
            source = f"{row['source']} ({names})" if names else row["source"]
            book = "" if whole_files else row["book"]
            text = row["text"].strip("\n")
            line = 1 + len(row["text"]) - len(row["text"].lstrip("\n"))
            first, starts_document = source, True
            if self.unfinished is not None and book and self.unfinished.book == book:
                text, starts_document = f"{self.unfinished.text}\n\n{text}", self.unfinished.starts_document
                first = self._origin.first or source
            elif self.unfinished is not None:
                yield Chunk(self.unfinished.text, self.unfinished.starts_document, True, self._origin)
            begin, end = 0, -1
            while end < len(text):
                found = _CUT.search(text, begin + CHUNK) if self.in_chunks else None
                end = found.end() if found else len(text)
                origin = Origin(first, source)
                if whole_files:
                    next_line = line + text.count("\n", begin, end)
                    last_line = max(line, next_line - text.endswith("\n", begin, end))
                    origin, line = Origin(f"{source}:{line}", f"{source}:{last_line}"), next_line
                if found:
                    yield Chunk(text[begin:end], starts_document, False, origin)
                    begin, starts_document, first = end, False, source
            self.unfinished, self._origin = Unfinished(book, text[begin:], starts_document), origin
        if self.unfinished is not None and (last or not self.unfinished.book):
            yield Chunk(self.unfinished.text, self.unfinished.starts_document, True, self._origin)
            self.unfinished = None


def chunks_are_exact(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chunks of a document have the tokens of the whole.

    Probes what may surround a line end, and every token of the vocabulary that continues past one. Qwen and Baichuan
    pass; tokenizers that put a space before each text, or merge an indent into the line end, do not.
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
    """`encode` each text, on all cores where the tokenizer is a fast one."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return [encode(text, tokenizer) for text in texts]
    return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def token_type(tokenizer: PreTrainedTokenizerBase) -> numpy.dtype:
    """The smallest unsigned integers that hold every token, little-endian."""
    return numpy.dtype("<u2" if max(tokenizer.get_vocab().values()) < 1 << 16 else "<u4")


class ChunkEncoder:
    """A tokenizer, with properties of it that take a while to determine.

    Attributes:
        in_chunks: whether documents may be cut.
        dtype: of the tokens.
        begin: the tokens before each document; most tokenizers have none.
        end: the token after each document.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.in_chunks = chunks_are_exact(tokenizer)
        self.dtype = token_type(tokenizer)
        self.begin, self.end = document_begin_ids(tokenizer), document_end_id(tokenizer)

    def encode(
        self, chunks: Iterable[Chunk], add_origin: Callable[[int, Origin], None]
    ) -> Iterator[tuple[numpy.ndarray, list[int]]]:
        """Encode chunks in batches, each document between its begin and end tokens.

        Args:
            chunks: of documents, in order.
            add_origin: gets the first token and the origin of each chunk.

        Yields:
            tokens [any number], of `dtype`, and where documents start, counted from the first token of all.
        """
        encode("字", self.tokenizer)  # clears any truncation and padding that the tokenizer's file sets
        chunks, count = iter(chunks), 0
        encoding: deque[tuple[list[Chunk], Future[list[list[int]]]]] = deque()
        fast = isinstance(self.tokenizer, PreTrainedTokenizerFast)
        with ThreadPoolExecutor(CONCURRENT_BATCHES if fast else 1) as pool:
            while True:
                batch: list[Chunk] = []
                characters = 0
                while characters < BATCH and (chunk := next(chunks, None)) is not None:
                    batch.append(chunk)
                    characters += len(chunk.text) + 1  # documents may be empty
                if batch:
                    encoding.append((batch, pool.submit(encode_texts, [chunk.text for chunk in batch], self.tokenizer)))
                    if len(encoding) <= CONCURRENT_BATCHES:
                        continue
                if not encoding:
                    return
                # An array of the standard library takes lists of numbers at twice the speed of numpy's.
                tokens = array("H" if self.dtype.itemsize == 2 else "I")
                starts: list[int] = []
                encoded, future = encoding.popleft()
                for chunk, ids in zip(encoded, future.result(), strict=True):
                    add_origin(count + len(tokens), chunk.origin)
                    if chunk.starts_document:
                        starts.append(count + len(tokens))
                        tokens.extend(self.begin)
                    tokens.extend(ids)
                    if chunk.ends_document:
                        tokens.append(self.end)
                count += len(tokens)
                yield numpy.frombuffer(tokens, self.dtype.newbyteorder("=")).astype(self.dtype, copy=False), starts
