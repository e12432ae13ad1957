"""A vocabulary of single characters, and a token for all others."""

from __future__ import annotations

from collections import Counter

from tokenizers import AddedToken, Tokenizer, decoders, models

from dataset.tokenizers.subwords import MARKS, UNKNOWN
from dataset.tokenizers.too_small import check_room, corpus_too_small
from novelgpt.text.pretokenization import QWEN_SPECIAL_TOKENS


def train_characters(pieces: list[str], vocabulary_size: int) -> Tokenizer:
    """The most frequent characters, with quotation marks, digits and line ends in any case, and Qwen's special tokens.

    Args:
        pieces: of text.
        vocabulary_size: tokens, special ones included.

    Raises:
        UserError: the pieces have fewer characters, or there is no room.
    """
    least = 1 + len(MARKS) + len(QWEN_SPECIAL_TOKENS)
    check_room("char", vocabulary_size, least)
    counts: Counter[str] = Counter()
    for piece in pieces:
        counts.update(piece)
    for mark in MARKS:
        counts.pop(mark, None)
    room = vocabulary_size - least
    ranked = sorted(counts, key=lambda character: (-counts[character], character))[:room]
    vocabulary = {token: index for index, token in enumerate([UNKNOWN, *MARKS, *ranked])}
    if len(ranked) < room:
        raise corpus_too_small("char", vocabulary_size, least + len(ranked), least)
    # A BPE that merges nothing: it needs no pattern to cut a text into characters.
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_SPECIAL_TOKENS])
    return tokenizer
