"""What is said where a corpus has fewer tokens, or a vocabulary less room, than was asked for."""

from __future__ import annotations

from novelgpt.settings.errors import UserError


def corpus_too_small(kind: str, vocabulary_size: int, found: int, least: int) -> UserError:
    """The error of a corpus that gives fewer tokens than asked for.

    Args:
        kind: of tokenizer.
        vocabulary_size: that was asked for.
        found: the number of tokens, special ones included, that the corpus gives.
        least: of `check_room`.
    """
    return UserError(
        f"the corpus is too small for --vocab_size {vocabulary_size}: a tokenizer of kind {kind} finds {found} tokens "
        "in it, special ones included",
        f"take --vocab_size {found} or less, or bring more text" if found > least else "bring more text",
    )


def check_room(kind: str, vocabulary_size: int, least: int) -> None:
    """Check that a vocabulary has room for what each of its kind holds.

    Args:
        kind: of tokenizer.
        vocabulary_size: that was asked for.
        least: number of tokens that it holds in any case.

    Raises:
        UserError: it has not.
    """
    if vocabulary_size <= least:
        raise UserError(
            f"--vocab_size {vocabulary_size} leaves no token to learn: {least} are special tokens, bytes or marks that "
            f"every tokenizer of kind {kind} has",
            f"take more than {least}",
        )
