"""Rows of several documents without padding: text cut into blocks for pretraining, conversations fitted for SFT."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy
import torch

from novelgpt.text.conversation import IGNORE_INDEX, EncodedRow
from novelgpt.text.origins import TracedRows, names_across, unique
from novelgpt.text.statistics import TokenCounts
from novelgpt.text.token_files import TokenArray, TokenText


class PackedBlocks(TracedRows):
    """Blocks of `max_length` tokens cut from documents laid end to end. No token is lost.

    Neighbouring blocks share one token, untrained in the later one, so that every token but the first of each document
    is predicted exactly once. Positions restart at each document, by which attention keeps documents apart.

    Args:
        documents: token arrays, each with its end token.
        max_length: tokens per block, at least 2.
        mixed: whether a block may hold several documents. If not, each document is cut on its own, its last block is
            shorter, and blocks have no "position_ids".
    """

    def __init__(self, documents: list[numpy.ndarray], max_length: int, mixed: bool = True) -> None:
        lengths = [len(document) for document in documents]
        tokens = numpy.concatenate([numpy.asarray(document, dtype=numpy.int32) for document in documents])
        self._lay_out(TokenText(TokenArray([tokens]), numpy.cumsum([0, *lengths])[:-1]), max_length, mixed)

    @classmethod
    def of_text(cls, text: TokenText, max_length: int, mixed: bool = True) -> PackedBlocks:
        """Blocks of documents that lie end to end already; no token is read before its block is."""
        blocks = cls.__new__(cls)
        blocks._lay_out(text, max_length, mixed)
        return blocks

    def _lay_out(self, text: TokenText, max_length: int, mixed: bool) -> None:
        self.tokens, self.starts, self.parts = text
        self.mixed = mixed
        borders = numpy.array([0]) if mixed else self.starts
        self.spans = _spans(borders, numpy.append(borders[1:], len(self.tokens)), max_length)

    def __len__(self) -> int:
        return len(self.spans)

    def subset(self, blocks: range | numpy.ndarray) -> PackedBlocks:
        """The same text, of which only these blocks are seen; they are numbered upwards."""
        part = PackedBlocks.__new__(PackedBlocks)
        part.tokens, part.starts, part.parts, part.mixed = self.tokens, self.starts, self.parts, self.mixed
        part.spans = self.spans[numpy.asarray(blocks, dtype=numpy.int64)]
        return part

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """{"input_ids", "labels"} and, where blocks are mixed, "position_ids", each [at most max_length]."""
        begin, end = self.spans[index].tolist()
        ids = torch.from_numpy(self.tokens[begin:end].astype(numpy.int64))
        low, high = numpy.searchsorted(self.starts, [begin, end])
        document_starts = torch.from_numpy(self.starts[low:high] - begin)
        labels = ids.clone()
        labels[0] = IGNORE_INDEX
        labels[document_starts] = IGNORE_INDEX  # nothing before a document tells its first token
        row = {"input_ids": ids, "labels": labels}
        if self.mixed:
            positions = torch.arange(len(ids))
            origin = torch.zeros_like(positions)
            origin[document_starts] = document_starts
            row["position_ids"] = positions - origin.cummax(0).values
        return row

    def origins(self, index: int, begin: int = 0, end: int | None = None) -> list[str]:
        """Rows and lines, as exactly as the text was encoded: in pieces of about 4,000 characters."""
        first, stop = self.spans[index].tolist()
        return names_across(self.parts, first + begin, stop if end is None else min(first + end, stop))

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
            lengths=(ends - begins).tolist(),
        )


def _spans(begins: numpy.ndarray, ends: numpy.ndarray, max_length: int) -> numpy.ndarray:
    """[pieces, 2]: each [begin, end) cut into pieces of max_length that share one token with the piece before."""
    step = max_length - 1
    counts = numpy.maximum(1, -(-(ends - begins - 1) // step))
    before = numpy.repeat(numpy.cumsum(counts) - counts, counts)
    starts = numpy.repeat(begins, counts) + (numpy.arange(len(before)) - before) * step
    return numpy.stack([starts, numpy.minimum(starts + max_length, numpy.repeat(ends, counts))], axis=1)


class PackedRows(TracedRows):
    """Whole rows fitted into packs of at most `max_length` tokens; no row is cut.

    Args:
        rows: encoded rows, each at most max_length tokens.
        max_length: tokens per pack.

    Attributes:
        packs: the numbers of the rows of each pack.
    """

    def __init__(self, rows: Sequence[EncodedRow], max_length: int) -> None:
        self.rows = rows
        self.max_length = max_length
        self.packs = best_fit([len(row.input_ids) for row in rows], max_length)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """{"input_ids", "labels", "position_ids"}, each [at most max_length]; positions restart at each row."""
        rows = [self.rows[number] for number in self.packs[index]]
        return {
            "input_ids": torch.cat([torch.tensor(row.input_ids) for row in rows]),
            "labels": torch.cat([torch.tensor([IGNORE_INDEX, *row.labels[1:]]) for row in rows]),
            "position_ids": torch.cat([torch.arange(len(row.input_ids)) for row in rows]),
        }

    def origins(self, index: int, begin: int = 0, end: int | None = None) -> list[str]:
        """Files and rows of the conversations in the pack."""
        found = []
        start = 0
        for number in self.packs[index]:
            stop = start + len(self.rows[number].input_ids)
            if begin < stop and (end is None or start < end) and self.rows[number].source:
                found.append(self.rows[number].source)
            start = stop
        return unique(found)

    def fill(self) -> float:
        """Share of the packs' tokens that rows take."""
        return sum(len(row.input_ids) for row in self.rows) / max(1, len(self) * self.max_length)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of items packed so that no pack holds more than `capacity`.

    Best-fit decreasing: the longest first, each into the pack it leaves least room in; O(n log n) for items and
    O(capacity) more at worst for each new size of room. Packs come in the order of their first item, items of a pack in
    the order given.

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
