"""Documents to blocks of equal length for continued pretraining. No token is lost."""

from __future__ import annotations

import numpy
import torch
from torch.utils.data import Dataset

from novelgpt.text.conversation import IGNORED
from novelgpt.text.statistics import TokenCounts


class PackedBlocks(Dataset[dict[str, torch.Tensor]]):
    """Blocks of `max_length` tokens cut from documents laid end to end.

    Neighbouring blocks share one token, untrained in the later one, so that every token but the first of each document
    is predicted exactly once. Positions restart at each document, by which attention keeps documents apart.

    Args:
        documents: token arrays, each with its end token.
        max_length: tokens per block, at least 2.
    """

    def __init__(self, documents: list[numpy.ndarray], max_length: int) -> None:
        self.tokens = numpy.concatenate([numpy.asarray(d, dtype=numpy.int32) for d in documents])
        lengths = numpy.array([len(document) for document in documents])
        self.starts = numpy.concatenate([[0], numpy.cumsum(lengths)[:-1]])
        self.max_length = max_length
        self.blocks = range(max(1, -(-(len(self.tokens) - 1) // (max_length - 1))))

    def __len__(self) -> int:
        return len(self.blocks)

    def subset(self, blocks: range) -> PackedBlocks:
        """The same text, of which only these blocks are seen."""
        part = PackedBlocks.__new__(PackedBlocks)
        part.tokens, part.starts, part.max_length, part.blocks = self.tokens, self.starts, self.max_length, blocks
        return part

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """{"input_ids", "labels", "position_ids"}, each [at most max_length]."""
        begin = self.blocks[index] * (self.max_length - 1)
        ids = torch.from_numpy(self.tokens[begin : begin + self.max_length].astype(numpy.int64))
        low, high = numpy.searchsorted(self.starts, [begin, begin + len(ids)])
        document_starts = torch.from_numpy(self.starts[low:high] - begin)
        labels = ids.clone()
        labels[0] = IGNORED
        labels[document_starts] = IGNORED  # nothing before a document tells its first token
        positions = torch.arange(len(ids))
        origin = torch.zeros_like(positions)
        origin[document_starts] = document_starts
        return {"input_ids": ids, "labels": labels, "position_ids": positions - origin.cummax(0).values}

    def counts(self) -> TokenCounts:
        """Tokens of the text that these blocks span; the first of each document, and of all, has no prediction."""
        begin = self.blocks.start * (self.max_length - 1)
        end = min(len(self.tokens), (self.blocks.stop - 1) * (self.max_length - 1) + self.max_length)
        low, high = numpy.searchsorted(self.starts, [begin + 1, end])
        context = 1 + int(high - low)
        last = end - (self.blocks.stop - 1) * (self.max_length - 1)
        return TokenCounts(
            rows=len(self),
            tokens_in=end - begin,
            trained=end - begin - context,
            context=context,
            lengths=[self.max_length] * (len(self) - 1) + [last],
        )
