"""How far a tokenizer of words cuts texts where a segmenter does."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import accumulate

from tokenizers import Tokenizer

from dataset.tokenizers.words import Segmenter


def measure_agreement(tokenizer: Tokenizer, pieces: list[str], segmenter: Segmenter) -> dict[str, float]:
    """F1 of the ends of words against those of a segmenter.

    Returns:
        of the tokenizer, and of the simplest way to cut by its vocabulary: the longest match first.
    """
    texts = [text for piece in pieces if (text := piece.strip())]
    wanted = [_ends(segmenter(text)) for text in texts]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    own = [{end for _, end in encoding.offsets} for encoding in encoded]
    vocabulary = tokenizer.get_vocab()
    longest = max(map(len, vocabulary))
    greedy = [_ends(cut_greedily(text, vocabulary, longest)) for text in texts]
    return {"likeliest": _f1(own, wanted), "longest_match": _f1(greedy, wanted)}


def cut_greedily(text: str, vocabulary: Collection[str], longest: int) -> list[str]:
    """Words of a vocabulary, the longest that fits first; single characters where none does."""
    words, begin = [], 0
    while begin < len(text):
        lengths = range(min(longest, len(text) - begin), 1, -1)
        size = next((length for length in lengths if text[begin : begin + length] in vocabulary), 1)
        words.append(text[begin : begin + size])
        begin += size
    return words


def _ends(words: Iterable[str]) -> set[int]:
    return set(accumulate(map(len, words)))


def _f1(found: list[set[int]], wanted: list[set[int]]) -> float:
    common = sum(len(one & other) for one, other in zip(found, wanted, strict=True))
    return 2 * common / max(1, sum(map(len, found)) + sum(map(len, wanted)))
