"""Text that repeats itself, for training not to: pseudo-repetitions (DITTO, Xu et al. 2022, arXiv:2206.02369).

Real text hardly ever repeats a passage many times in a row, so a model never learns how such a passage goes on, and
whatever made it write something twice makes it do so for ever.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy
import torch

# [tokens] int64 in a row, [rows, tokens] in a batch: how far before each token its last copy is; 0 elsewhere.
PERIODS = "repeat_periods"
# Tokens of a piece: some text, then the last part of it again and again.
PIECE = 512
# Of real text before the repetition; shorter pieces stay as they are.
LEAST_CONTEXT = 16
# Tokens of what is repeated: from a single one to a sentence, log-uniform: short ones are likelier.
LONGEST_PERIOD = 64
LARGEST_CONTEXT_SHARE = 0.75
SEED = 2022


class Piece(NamedTuple):
    """A part of a row that goes on with its own last tokens.

    Attributes:
        begin: its first token in the row.
        repeats: the first token that is replaced by a repetition; `end` where none is.
        end: behind its last token.
        period: tokens of what is repeated; 0 where nothing is.
    """

    begin: int
    repeats: int
    end: int
    period: int


def is_repetitive(share: float, number: int) -> bool:
    """Whether a row becomes pseudo-repetitions.

    Args:
        share: of all rows that do.
        number: that identifies the row.
    """
    return share > 0 and numpy.random.default_rng([SEED, number]).random() < share


def draw_pieces(length: int, document_starts: list[int], number: int, several: bool) -> list[Piece]:
    """Cut a row into pieces, and draw where each begins to repeat itself.

    Args:
        length: tokens of the row.
        document_starts: where documents start in it; no piece reaches across.
        number: that identifies the row; the same number gives the same pieces.
        several: whether a row may hold several documents, and several pieces of each; if not, only document starts cut
            it.
    """
    generator = numpy.random.default_rng([SEED, number, 1])
    bounds = sorted({0, length, *document_starts, *(range(0, length, PIECE) if several else ())})
    pieces = []
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        least, most = LEAST_CONTEXT, int((end - begin) * LARGEST_CONTEXT_SHARE)
        if least > most:
            pieces.append(Piece(begin, end, end, 0))
            continue
        context = int(generator.integers(least, most + 1))
        # The first copy lies within the context, after its first token, which nothing predicts.
        longest = min(LONGEST_PERIOD, context - 1)
        period = min(longest, int(numpy.exp(generator.uniform(0, numpy.log(longest + 1)))))
        pieces.append(Piece(begin, begin + context, end, period))
    return pieces


def repeat_pieces(ids: torch.Tensor, pieces: list[Piece]) -> tuple[torch.Tensor, torch.Tensor]:
    """Let each piece of a row go on with its own last tokens.

    Args:
        ids: [tokens] of the row.
        pieces: of the whole row.

    Returns:
        The tokens, [tokens] int64; and how far before each its last copy is, [tokens] int64, 0 where nothing is
        repeated.
    """
    ids, periods = ids.clone(), torch.zeros_like(ids)
    for piece in pieces:
        places = torch.arange(piece.repeats, piece.end)
        if piece.period:
            ids[places] = ids[piece.repeats - piece.period + (places - piece.repeats) % piece.period]
        periods[places] = piece.period
    return ids, periods
