"""Training a byte-level BPE: any text, of any language, has tokens."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from novelgpt.text.pretokenization import QWEN_PRETOKENIZATION, QWEN_SPECIAL_TOKENS

# As the library writes the bytes; sorted, as it keeps no order of its own.
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MIN_FREQUENCY = 2


def train_byte_level_bpe(
    texts: Iterable[str],
    vocabulary_size: int,
    max_token_bytes: int,
    isolated: str = "",
    normalizer: normalizers.Normalizer | None = None,
) -> Tokenizer:
    """Train a byte-level BPE with Qwen's pre-tokenization and special tokens.

    The same texts give the same tokenizer. Texts with few different pairs give fewer tokens than asked for.

    Args:
        texts: to learn the merges from.
        vocabulary_size: tokens, special ones included.
        max_token_bytes: of UTF-8 that a token may have.
        isolated: characters that no token merges with others.
        normalizer: of texts, before they are cut.
    """
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    cuts = [*([f"[{isolated}]"] if isolated else []), QWEN_PRETOKENIZATION]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cuts),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - len(QWEN_SPECIAL_TOKENS),
        min_frequency=MIN_FREQUENCY,
        initial_alphabet=ALPHABET,
        max_token_length=max_token_bytes,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_SPECIAL_TOKENS])
    return tokenizer
