"""Rows of several documents without padding: text cut into blocks for pretraining, conversations fitted for SFT."""

from __future__ import annotations

import bisect
import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch

from novelgpt.text.conversation import IGNORE_INDEX, EncodedRow
from novelgpt.text.origins import SavedOrigins, TokenOrigins, TracedRows, unique
from novelgpt.text.statistics import TokenCounts


class TokenizedText(NamedTuple):
    """Documents end to end.

    Attributes:
        tokens: of all documents, in memory or mapped.
        starts: [documents] int64, where each starts in `tokens`; by default, one document starts at the first.
        origins: of the tokens, where known.
    """

    tokens: numpy.ndarray
    starts: numpy.ndarray = numpy.zeros(1, numpy.int64)
    origins: TokenOrigins | SavedOrigins | None = None


class TokenArray:
    """Arrays end to end, as one; of mapped files, only what is asked for is read. Processes get them by file name."""

    def __init__(self, parts: Sequence[numpy.ndarray]) -> None:
        self.parts = [part for part in parts if len(part)]
        self.ends = numpy.cumsum([len(part) for part in self.parts], dtype=numpy.int64)

    def __getitem__(self, places: slice) -> numpy.ndarray:
        """Tokens [as many as there are] of a slice without a step."""
        begin, end, _ = places.indices(int(self.ends[-1]) if self.parts else 0)
        first, last = numpy.searchsorted(self.ends, [begin, max(begin, end - 1)], side="right").tolist()
        taken = [numpy.zeros(0, numpy.uint16)]
        for part, stop in zip(self.parts[first : last + 1], self.ends[first : last + 1].tolist(), strict=True):
            start = stop - len(part)
            taken.append(part[max(0, begin - start) : max(0, end - start)])
        return taken[1] if len(taken) == 2 else numpy.concatenate(taken)

    def __reduce__(self) -> tuple[Any, ...]:
        return _make_array, ([
            (part.filename, part.dtype.str) if isinstance(part, numpy.memmap) else part for part in self.parts
        ],)  # fmt: skip


def _make_array(parts: list[Any]) -> TokenArray:
    return TokenArray([map_tokens(*part) if isinstance(part, tuple) else part for part in parts])


def map_tokens(path: Path, dtype: str) -> numpy.ndarray:
    """Tokens in a file, of which only what is asked for is read."""
    if not path.stat().st_size:
        return numpy.zeros(0, dtype)  # an empty file cannot be mapped
    return numpy.memmap(path, dtype=dtype, mode="r")


class PackedBlocks(TracedRows):
    """Blocks of `max_length` tokens cut from documents laid end to end. No token is lost, and none is read before use.

    Neighbouring blocks share one token, untrained in the later one, so that every token but the first of each document
    is predicted exactly once. Positions restart at each document; attention distinguishes documents by them.

    Args:
        texts: laid end to end, each document with its end token.
        max_length: tokens per block, at least 2.
        mixed: whether a block may hold several documents. If not, each document is cut on its own, its last block is
            shorter, and blocks have no "position_ids".

    Attributes:
        starts: [documents] int64, where documents start in the tokens.
        spans: [blocks, 2] int64, where blocks begin and end in the tokens.
    """

    def __init__(self, texts: Sequence[TokenizedText], max_length: int, mixed: bool = True) -> None:
        self.mixed = mixed
        self.tokens = TokenArray([text.tokens for text in texts])
        ends = numpy.cumsum([len(text.tokens) for text in texts], dtype=numpy.int64)
        begins = [0, *ends[:-1].tolist()]
        self.starts = numpy.concatenate([text.starts + begin for text, begin in zip(texts, begins, strict=True)])
        self._parts = list(zip(begins, ends.tolist(), [text.origins for text in texts], strict=True))
        # What is cut into blocks: the whole text, or each document.
        first = numpy.zeros(1, numpy.int64) if mixed else self.starts
        last = numpy.append(first[1:], ends[-1])
        step = max_length - 1
        counts = numpy.maximum(1, -(-(last - first - 1) // step))  # blocks of each
        numbers = numpy.arange(counts.sum()) - numpy.repeat(numpy.cumsum(counts) - counts, counts)
        block_begins = numpy.repeat(first, counts) + numbers * step
        block_ends = numpy.minimum(block_begins + max_length, numpy.repeat(last, counts))
        self.spans = numpy.stack([block_begins, block_ends], axis=1)
        self.lengths = block_ends - block_begins

    def __len__(self) -> int:
        return len(self.spans)

    def subset(self, blocks: range | numpy.ndarray) -> PackedBlocks:
        """These blocks of the same text, renumbered from 0."""
        part, numbers = copy.copy(self), numpy.asarray(blocks, dtype=numpy.int64)
        part.spans, part.lengths = self.spans[numbers], self.lengths[numbers]
        return part

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """{"input_ids", "labels"} and, where blocks are mixed, "position_ids", each [at most max_length]."""
        begin, end = self.spans[index].tolist()
        ids = torch.from_numpy(self.tokens[begin:end].astype(numpy.int64))
        low, high = numpy.searchsorted(self.starts, [begin, end])
        document_starts = torch.from_numpy(self.starts[low:high] - begin)
        labels = ids.clone()
        labels[0] = IGNORE_INDEX
        labels[document_starts] = IGNORE_INDEX  # nothing precedes a document that could predict its first token
        row = {"input_ids": ids, "labels": labels}
        if self.mixed:
            positions = torch.arange(len(ids))
            origin = torch.zeros_like(positions)
            origin[document_starts] = document_starts
            row["position_ids"] = positions - origin.cummax(0).values
        return row

    def origins(self, index: int, begin: int = 0, end: int | None = None) -> list[str]:
        """Rows and lines, as exactly as the text was encoded: in chunks of about 4,000 characters."""
        first, stop = self.spans[index].tolist()
        low, high = first + begin, stop if end is None else min(first + end, stop)
        return unique(
            name
            for part_begin, part_end, origins in self._parts
            if origins is not None and max(low, part_begin) < min(high, part_end)
            for name in origins.names(max(low, part_begin) - part_begin, min(high, part_end) - part_begin)
        )

    def counts(self) -> TokenCounts:
        """Tokens of the text that these blocks span; the first of each document, and of all, has no prediction."""
        begins, ends = self.spans.T
        inside = numpy.searchsorted(self.starts, ends) - numpy.searchsorted(self.starts, begins + 1)
        shared = numpy.concatenate([[False], begins[1:] == ends[:-1] - 1])
        context = int(inside.sum() + (~shared).sum())
        tokens_in = int((ends - begins - shared).sum())
        return TokenCounts(
            rows=len(self),
            tokens_in=tokens_in,
            trained=tokens_in - context,
            context=context,
            lengths=self.lengths,
        )


class PackedRows(TracedRows):
    """Packs of whole rows, of at most `max_length` tokens together; no row is cut.

    Args:
        rows: encoded rows, each at most max_length tokens.
        max_length: tokens per pack.

    Attributes:
        packs: the indices of the rows of each pack.
    """

    def __init__(self, rows: Sequence[EncodedRow], max_length: int) -> None:
        self.rows = rows
        self.max_length = max_length
        lengths = [len(row.input_ids) for row in rows]
        self.packs = best_fit(lengths, max_length)
        self.lengths = numpy.array([sum(lengths[number] for number in pack) for pack in self.packs], numpy.int64)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """{"input_ids", "labels", "position_ids"} and, where a row has them, "loss_weights".

        Each is [at most max_length]; positions restart at each row.
        """
        rows = [self.rows[number] for number in self.packs[index]]
        pack = {
            "input_ids": torch.cat([torch.tensor(row.input_ids) for row in rows]),
            "labels": torch.cat([torch.tensor([IGNORE_INDEX, *row.labels[1:]]) for row in rows]),
            "position_ids": torch.cat([torch.arange(len(row.input_ids)) for row in rows]),
        }
        if any(row.loss_weights is not None for row in rows):
            trained = (pack["labels"] != IGNORE_INDEX).to(torch.float32)
            weights = [torch.tensor(row.loss_weights or [1.0] * len(row.input_ids)) for row in rows]
            pack["loss_weights"] = torch.cat(weights) * trained
        return pack

    def origins(self, index: int, begin: int = 0, end: int | None = None) -> list[str]:
        """Files and rows of the conversations in the pack."""
        rows = [self.rows[number] for number in self.packs[index]]
        stops = itertools.accumulate(len(row.input_ids) for row in rows)
        return unique(
            row.source
            for row, stop in zip(rows, stops, strict=True)
            if row.source and begin < stop and (end is None or stop - len(row.input_ids) < end)
        )

    def fill(self) -> float:
        """Share of the packs' capacity that rows fill."""
        return sum(len(row.input_ids) for row in self.rows) / max(1, len(self) * self.max_length)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of items, packed so that no pack holds more than `capacity`.

    Best-fit decreasing: the longest first, each into the fullest pack that has room for it; O(n log n) for items plus
    at worst O(capacity) for each distinct amount of room. Packs are ordered by their first item, items by index.

    >>> best_fit([5, 3, 4, 1, 2], capacity=6)
    [[0, 3], [1], [2, 4]]
    """
    packs: list[list[int]] = []
    packs_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # sorted: the keys of packs_by_room that have packs
    for item in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        place = bisect.bisect_left(rooms, lengths[item])
        if place == len(rooms):
            packs.append([])
            chosen, room = len(packs) - 1, capacity
        else:
            room = rooms[place]
            chosen = packs_by_room[room].pop()
            if not packs_by_room[room]:
                rooms.pop(place)
        packs[chosen].append(item)
        left = room - lengths[item]
        waiting = packs_by_room.setdefault(left, [])
        if not waiting:
            bisect.insort(rooms, left)
        waiting.append(chosen)
    return sorted((sorted(pack) for pack in packs), key=lambda pack: pack[0])
