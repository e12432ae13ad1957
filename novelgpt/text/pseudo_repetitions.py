"""Text that repeats itself, for training not to: pseudo-repetitions (DITTO, Xu et al. 2022, arXiv:2206.02369).

Real text hardly ever repeats a passage many times in a row, so a model never learns how such a passage goes on, and
whatever made it write something twice makes it do so for ever.
"""

from __future__ import annotations

import numpy
import torch

# [tokens] int64 in a row, [rows, tokens] in a batch: how far before each token its last copy is; 0 elsewhere.
PERIODS = "repeat_periods"
# Tokens of a piece: some text, then the last part of it again and again.
PIECE = 512
# Of real text before the repetition; shorter pieces stay as they are.
LEAST_CONTEXT = 16
# Tokens of what is repeated: from a single one to a sentence, each length as likely as its logarithm has room.
LONGEST_PERIOD = 64
LARGEST_CONTEXT_SHARE = 0.75
SEED = 2022


def is_repetitive(share: float, number: int) -> bool:
    """Whether a row becomes pseudo-repetitions.

    Args:
        share: of all rows that do.
        number: that identifies the row.
    """
    return share > 0 and numpy.random.default_rng([SEED, number]).random() < share


def repeat_pieces(
    ids: torch.Tensor, document_starts: torch.Tensor, number: int, several: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut a row into pieces, and let each go on with its own last tokens.

    Args:
        ids: [tokens] of the row.
        document_starts: [documents] where documents start in it; no piece reaches across.
        number: that identifies the row; the same number gives the same pieces.
        several: whether a row may hold several documents; if not, it is one piece, and stays as it is where a
            document starts inside.

    Returns:
        The tokens, [tokens] int64; how far before each its last copy is, [tokens] int64, 0 where nothing is repeated;
        and where the pieces start, [pieces] int64.
    """
    generator = numpy.random.default_rng([SEED, number, 1])
    length = len(ids)
    cuts = {0, length, *document_starts.tolist(), *(range(0, length, PIECE) if several else ())}
    bounds = sorted(cuts)
    ids, periods = ids.clone(), torch.zeros_like(ids)
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        least, most = LEAST_CONTEXT, int((end - begin) * LARGEST_CONTEXT_SHARE)
        if least > most:
            continue
        context = int(generator.integers(least, most + 1))
        # The first copy lies within the context, after its first token, which nothing predicts.
        longest = min(LONGEST_PERIOD, context - 1)
        period = min(longest, int(numpy.exp(generator.uniform(0, numpy.log(longest + 1)))))
        repeats = torch.arange(begin + context, end)
        ids[repeats] = ids[begin + context - period + (repeats - begin - context) % period]
        periods[repeats] = period
    return ids, periods, torch.tensor(bounds[:-1])
