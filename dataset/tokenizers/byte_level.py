"""Byte-level BPE: any text, of any language, has tokens, and they give back every one of its characters."""

from __future__ import annotations

from tokenizers import Tokenizer

from dataset.tokenizers.too_small import check_room, corpus_too_small
from novelgpt.text.byte_level_bpe import ALPHABET, train_byte_level_bpe
from novelgpt.text.pretokenization import QUOTATION_MARKS, QWEN_SPECIAL_TOKENS

# Of UTF-8. The library counts a token's length in bytes.
BYTES_OF_A_HANZI = 3
LEAST = len(ALPHABET) + len(QWEN_SPECIAL_TOKENS)


def train_bytes(pieces: list[str], vocabulary_size: int, max_token_length: int) -> Tokenizer:
    """Train a byte-level BPE of exactly so many tokens, none of which merges a quotation mark.

    Nothing is normalised, so that decode(encode(text)) == text for every text; Qwen's own tokenizer composes characters
    (NFC), which most Chinese text never notices and a few rare hanzi do not survive.

    Args:
        pieces: of text.
        vocabulary_size: tokens, special ones included.
        max_token_length: hanzi that a token may have; of letters, three times as many.

    Raises:
        UserError: the pieces give fewer tokens, or there is no room for all bytes.
    """
    check_room("byte_bpe", vocabulary_size, LEAST)
    tokenizer = train_byte_level_bpe(pieces, vocabulary_size, BYTES_OF_A_HANZI * max_token_length, QUOTATION_MARKS)
    if tokenizer.get_vocab_size() < vocabulary_size:
        raise corpus_too_small("byte_bpe", vocabulary_size, tokenizer.get_vocab_size(), LEAST)
    return tokenizer
