"""Byte-level BPE: any text, of any language, has tokens, and they give back every one of its characters."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dataset.tokenizers.too_small import check_room, corpus_too_small
from novelgpt.text.pretokenization import QUOTATION_MARKS, QWEN_PRETOKENIZATION, QWEN_SPECIAL_TOKENS

# Of UTF-8. The library counts a token's length in bytes.
BYTES_OF_A_HANZI = 3
MIN_FREQUENCY = 2


def train_byte_level_bpe(pieces: list[str], vocabulary_size: int, max_token_length: int) -> Tokenizer:
    """Train a byte-level BPE with Qwen's pre-tokenization and special tokens.

    Nothing is normalised, so that decode(encode(text)) == text for every text; Qwen's own tokenizer composes characters
    (NFC), which most Chinese text never notices and a few rare hanzi do not survive.

    Args:
        pieces: of text.
        vocabulary_size: tokens, special ones included.
        max_token_length: hanzi that a token may have; of letters, three times as many.

    Raises:
        UserError: the pieces give fewer tokens, or there is no room for all bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    check_room("byte_bpe", vocabulary_size, len(alphabet) + len(QWEN_SPECIAL_TOKENS))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"[{QUOTATION_MARKS}]"), "isolated"),
            pre_tokenizers.Split(Regex(QWEN_PRETOKENIZATION), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - len(QWEN_SPECIAL_TOKENS),
        min_frequency=MIN_FREQUENCY,
        initial_alphabet=alphabet,
        max_token_length=BYTES_OF_A_HANZI * max_token_length,
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_SPECIAL_TOKENS])
    if tokenizer.get_vocab_size() < vocabulary_size:
        raise corpus_too_small("byte_bpe", vocabulary_size, tokenizer.get_vocab_size())
    return tokenizer
