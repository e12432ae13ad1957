"""Rows of several documents without padding: text cut into blocks for pretraining, conversations fitted for SFT."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy
import torch
from torch.utils.data import Dataset

from novelgpt.text.conversation import IGNORED, EncodedRow
from novelgpt.text.statistics import TokenCounts


class PackedBlocks(Dataset[dict[str, torch.Tensor]]):
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
        self.tokens = numpy.concatenate([numpy.asarray(d, dtype=numpy.int32) for d in documents])
        lengths = numpy.array([len(document) for document in documents])
        self.starts = numpy.concatenate([[0], numpy.cumsum(lengths)[:-1]])
        self.mixed = mixed
        if mixed:
            spans = _spans(0, len(self.tokens), max_length)
        else:
            spans = [
                span
                for start, length in zip(self.starts.tolist(), lengths.tolist(), strict=True)
                for span in _spans(start, start + length, max_length)
            ]
        self.spans = numpy.array(spans)

    def __len__(self) -> int:
        return len(self.spans)

    def subset(self, blocks: range) -> PackedBlocks:
        """The same text, of which only these blocks are seen."""
        part = PackedBlocks.__new__(PackedBlocks)
        part.tokens, part.starts, part.mixed = self.tokens, self.starts, self.mixed
        part.spans = self.spans[blocks.start : blocks.stop]
        return part

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """{"input_ids", "labels"} and, where blocks are mixed, "position_ids", each [at most max_length]."""
        begin, end = self.spans[index].tolist()
        ids = torch.from_numpy(self.tokens[begin:end].astype(numpy.int64))
        low, high = numpy.searchsorted(self.starts, [begin, end])
        document_starts = torch.from_numpy(self.starts[low:high] - begin)
        labels = ids.clone()
        labels[0] = IGNORED
        labels[document_starts] = IGNORED  # nothing before a document tells its first token
        row = {"input_ids": ids, "labels": labels}
        if self.mixed:
            positions = torch.arange(len(ids))
            origin = torch.zeros_like(positions)
            origin[document_starts] = document_starts
            row["position_ids"] = positions - origin.cummax(0).values
        return row

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


def _spans(begin: int, end: int, max_length: int) -> list[tuple[int, int]]:
    """[begin, end) cut into pieces of max_length that share one token with the piece before."""
    starts = range(begin, max(begin + 1, end - 1), max_length - 1)
    return [(start, min(start + max_length, end)) for start in starts]


class PackedRows(Dataset[dict[str, torch.Tensor]]):
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
            "labels": torch.cat([torch.tensor([IGNORED, *row.labels[1:]]) for row in rows]),
            "position_ids": torch.cat([torch.arange(len(row.input_ids)) for row in rows]),
        }

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
