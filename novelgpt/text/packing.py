"""Rows of several documents without padding: text cut into blocks for pretraining, conversations fitted for SFT."""

from __future__ import annotations

import bisect
import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch

from novelgpt.text.conversation import IGNORE_INDEX
from novelgpt.text.origins import SavedOrigins, TokenOrigins, TracedRows, unique
from novelgpt.text.pseudo_repetitions import PERIODS, Piece, draw_pieces, is_repetitive, repeat_pieces
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
    """Blocks of `max_length` tokens cut from documents laid end to end. No token is lost but those that
    pseudo-repetitions replace, and none is read before use.

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
        repetitive_share: of the blocks, those that are pseudo-repetitions.
    """

    def __init__(self, texts: Sequence[TokenizedText], max_length: int, mixed: bool = True) -> None:
        self.mixed = mixed
        self.repetitive_share = 0.0
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

    def with_repetitions(self, share: float) -> PackedBlocks:
        """The same blocks, of which a share, the same in each epoch, is pseudo-repetitions."""
        part = copy.copy(self)
        part.repetitive_share = share
        return part

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """{"input_ids", "labels"} and, where blocks are mixed, "position_ids", each [at most max_length].

        Pseudo-repetitions have "repeat_periods" as well.
        """
        begin, end = self.spans[index].tolist()
        ids = torch.from_numpy(self.tokens[begin:end].astype(numpy.int64))
        low, high = numpy.searchsorted(self.starts, [begin, end])
        document_starts = torch.from_numpy(self.starts[low:high] - begin)
        row: dict[str, torch.Tensor] = {}
        if is_repetitive(self.repetitive_share, begin):
            pieces = self._pieces(index)
            ids, row[PERIODS] = repeat_pieces(ids, pieces)
            document_starts = torch.tensor([piece.begin for piece in pieces])
        labels = ids.clone()
        labels[0] = IGNORE_INDEX
        labels[document_starts] = IGNORE_INDEX  # nothing precedes a document that could predict its first token
        row |= {"input_ids": ids, "labels": labels}
        if self.mixed:
            positions = torch.arange(len(ids))
            origin = torch.zeros_like(positions)
            origin[document_starts] = document_starts
            row["position_ids"] = positions - origin.cummax(0).values
        return row

    def _pieces(self, index: int) -> list[Piece]:
        """Of a block of pseudo-repetitions."""
        begin, end = self.spans[index].tolist()
        low, high = numpy.searchsorted(self.starts, [begin, end])
        return draw_pieces(end - begin, (self.starts[low:high] - begin).tolist(), begin, self.mixed)

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
        """Tokens of the text that these blocks span; none is read for it.

        The first of each document, of each piece of pseudo-repetitions, and of all, has no prediction. Those that
        repetitions replace are dropped.
        """
        begins, ends = self.spans.T
        inside = numpy.searchsorted(self.starts, ends) - numpy.searchsorted(self.starts, begins + 1)
        shared = numpy.concatenate([[False], begins[1:] == ends[:-1] - 1])
        context = int(inside.sum() + (~shared).sum())
        tokens_in = int((ends - begins - shared).sum())
        repetitive = [
            index for index, begin in enumerate(begins.tolist()) if is_repetitive(self.repetitive_share, begin)
        ]
        following = numpy.append(shared[1:], False)
        dropped = 0
        for index in repetitive:
            pieces = self._pieces(index)
            # The last token stays if the next block begins with it.
            kept = int(pieces[-1].period > 0 and bool(following[index]))
            dropped += sum(piece.end - piece.repeats for piece in pieces) - kept
            context += len(pieces) - 1 - int(inside[index]) + kept
        note = "blocks are pseudo-repetitions (--ditto); what they replace is dropped, the same in each epoch"
        return TokenCounts(
            rows=len(self),
            tokens_in=tokens_in,
            trained=tokens_in - context - dropped,
            context=context,
            dropped=dropped,
            lengths=self.lengths,
            notes=Counter({note: len(repetitive)} if repetitive else {}),
        )


class PackedRows(TracedRows):
    """Packs of whole rows, of at most `max_length` tokens together; no row is cut. A pack is assembled when asked for.

    Args:
        rows: encoded rows, each at most max_length tokens.
        max_length: tokens per pack.

    Attributes:
        packs: the numbers of the rows of each pack.
        lengths: [packs] int64, tokens.
    """

    def __init__(self, rows: TracedRows, max_length: int) -> None:
        self.rows = rows
        self.max_length = max_length
        self.packs = best_fit(rows.lengths, max_length)
        self.lengths = numpy.add.reduceat(rows.lengths[self.packs.items], self.packs.starts[:-1], dtype=numpy.int64)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """{"input_ids", "labels", "position_ids"} and, where a row has weights, "loss_weights".

        Each is [at most max_length]; positions restart at each row.
        """
        rows = [self.rows[int(number)] for number in self.packs[index]]
        lengths = [len(row["input_ids"]) for row in rows]
        ids, labels = (
            numpy.concatenate([row[name] for row in rows], dtype=numpy.int64) for name in ("input_ids", "labels")
        )
        labels[numpy.cumsum([0, *lengths[:-1]])] = IGNORE_INDEX  # no row predicts the start of the next
        pack = {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.cat([torch.arange(length) for length in lengths]),
        }
        if any("loss_weights" in row for row in rows):
            weights = [row.get("loss_weights", numpy.ones(len(row["input_ids"]), numpy.float32)) for row in rows]
            pack["loss_weights"] = torch.from_numpy(numpy.concatenate(weights) * (labels != IGNORE_INDEX))
        return pack

    def origins(self, index: int, begin: int = 0, end: int | None = None) -> list[str]:
        """Files and rows of the conversations in the pack."""
        numbers = self.packs[index]
        stops = numpy.cumsum(self.rows.lengths[numbers])
        starts = stops - self.rows.lengths[numbers]
        inside = (begin < stops) & (starts < (stops[-1] if end is None else end))
        return unique(name for number in numbers[inside] for name in self.rows.origins(int(number)))

    def fill(self) -> float:
        """Share of the packs' capacity that rows fill."""
        return float(self.lengths.sum()) / max(1, len(self) * self.max_length)


@dataclass(frozen=True)
class Packs:
    """Numbers of items in packs.

    Attributes:
        items: [items] unsigned integers, pack after pack, rising in each.
        starts: [packs + 1] int64, where each pack starts in `items`.
    """

    items: numpy.ndarray
    starts: numpy.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> numpy.ndarray:
        """Numbers of the items of a pack."""
        return self.items[self.starts[index] : self.starts[index + 1]]

    def __iter__(self) -> Iterator[numpy.ndarray]:
        return (self[index] for index in range(len(self)))


def best_fit(lengths: Sequence[int] | numpy.ndarray, capacity: int) -> Packs:
    """Pack items so that no pack holds more than `capacity`; lengths are from 1 to `capacity`.

    Best-fit decreasing: the longest first, each into the fullest pack that has room for it, of those the one that was
    filled last. Packs are ordered by their first item. All items of one length are placed at once, into as many packs
    of equal room as they fill, so that the time is that of a few steps for each distinct length, and of sorting.

    >>> [pack.tolist() for pack in best_fit([5, 3, 4, 1, 2], capacity=6)]
    [[0, 3], [1], [2, 4]]
    """
    lengths = numpy.asarray(lengths)
    pack_of = numpy.empty(len(lengths), numpy.int64)
    packs = 0
    waiting: dict[int, list[numpy.ndarray]] = {}  # room -> packs that have it, the last filled last
    rooms: list[int] = []  # sorted: the keys of waiting
    order = numpy.argsort(-lengths.astype(numpy.int64), kind="stable")
    for items in numpy.split(order, numpy.flatnonzero(numpy.diff(lengths[order])) + 1):
        length = int(lengths[items[0]]) if len(items) else 0
        while len(items):
            place = bisect.bisect_left(rooms, length)
            room = rooms[place] if place < len(rooms) else capacity
            # A pack that gets one item and has room for another is the fullest that has: it is filled at once.
            each = max(1, room // length)  # an item above the capacity gets a pack of its own
            wanted = -(-len(items) // each)
            if place == len(rooms):
                chosen = numpy.arange(packs, packs + wanted)
                packs += wanted
            else:
                top = waiting[room].pop()
                chosen = top[: -wanted - 1 : -1]
                if len(chosen) < len(top):
                    waiting[room].append(top[: len(top) - len(chosen)])
                elif not waiting[room]:
                    del waiting[room]
                    rooms.pop(place)
            placed, items = items[: len(chosen) * each], items[len(chosen) * each :]
            pack_of[placed] = numpy.repeat(chosen, each)[: len(placed)]
            last = len(placed) - (len(chosen) - 1) * each  # items of the last pack
            for filled, count in ((chosen[:-1], each), (chosen[-1:], last)):
                left = room - count * length
                if len(filled):
                    if left not in waiting:
                        waiting[left] = []
                        bisect.insort(rooms, left)
                    waiting[left].append(filled)
    # By their first items: the first place of each pack in the order of the items.
    _, first = numpy.unique(pack_of, return_index=True)
    rank = numpy.empty(packs, numpy.int64)
    rank[numpy.argsort(first)] = numpy.arange(packs)
    ranked = rank[pack_of]
    starts = numpy.concatenate([[0], numpy.cumsum(numpy.bincount(ranked, minlength=packs))])
    items = numpy.argsort(ranked, kind="stable")
    return Packs(items.astype(numpy.min_scalar_type(len(items))), starts)
