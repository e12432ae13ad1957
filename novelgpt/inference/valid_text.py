"""Generated tokens whose bytes are valid UTF-8.

A character outside of a vocabulary is several tokens, each with some of its bytes (most tokenizers: Qwen, Llama,
Baichuan). A sampled token now and then does not fit those before it, and the text has a U+FFFD in the place of a
character. So tokens that cannot follow get no probability.
"""

from __future__ import annotations

import functools

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from novelgpt.text.token_bytes import CONTINUATIONS, is_whole, token_bytes

# After each first byte of a character: the number of bytes that follow it, and the smallest and largest next byte. RFC
# 3629, section 4: neither overlong forms nor surrogates nor anything behind U+10FFFF.
_FOLLOWING = {
    **dict.fromkeys(range(0xC2, 0xE0), (1, 0x80, 0xBF)),
    **dict.fromkeys(range(0xE0, 0xF0), (2, 0x80, 0xBF)), 0xE0: (2, 0xA0, 0xBF), 0xED: (2, 0x80, 0x9F),
    0xF0: (3, 0x90, 0xBF), **dict.fromkeys(range(0xF1, 0xF4), (3, 0x80, 0xBF)), 0xF4: (3, 0x80, 0x8F),
}  # fmt: skip
# What may follow: bytes that are missing, and the bounds of the next one. Between characters nothing is missing.
_Expected = tuple[int, int, int]
BETWEEN: _Expected = (0, 0, 0)
STATES: tuple[_Expected, ...] = tuple(sorted({BETWEEN, *_FOLLOWING.values(), (2, 0x80, 0xBF), (1, 0x80, 0xBF)}))
# The row of a table after `STATES`: what came before is not known, or was invalid.
UNKNOWN = len(STATES)
INVALID = -1
# A character has four bytes at most: what is missing shows in the last three tokens, none of which is empty.
WINDOW = 3


def follow(state: _Expected, data: bytes) -> _Expected | None:
    """What may follow after further bytes; None where they cannot follow.

    >>> follow(BETWEEN, "字".encode()[:1])
    (2, 128, 191)
    >>> follow((2, 128, 191), "字".encode()[1:])
    (0, 0, 0)
    >>> follow((2, 128, 191), b"a") is None
    True
    """
    for byte in data:
        missing, low, high = state
        if missing:
            if not low <= byte <= high:
                return None
            state = (missing - 1, 0x80, 0xBF) if missing > 1 else BETWEEN
        elif byte < 0x80:
            state = BETWEEN
        elif byte in _FOLLOWING:
            state = _FOLLOWING[byte]
        else:
            return None
    return state


@functools.lru_cache(maxsize=8)
def transitions(tokenizer: PreTrainedTokenizerBase, size: int) -> torch.Tensor | None:
    """[states + 1, tokens] int8: the state after each token, or INVALID where it cannot follow.

    States are places in `STATES`, or UNKNOWN. Special tokens follow between characters only. None where every token is
    whole characters.

    Args:
        tokenizer: any.
        size: its number of tokens: one that gets further tokens is another.
    """
    numbers = {state: number for number, state in enumerate(STATES)}
    vocabulary = token_bytes(tokenizer)
    table = torch.full((len(STATES) + 1, len(vocabulary)), INVALID, dtype=torch.int8)
    table[[numbers[BETWEEN], UNKNOWN]] = numbers[BETWEEN]
    parts = [number for number, data in enumerate(vocabulary) if data is not None and not is_whole(data)]
    for number in parts:
        data = vocabulary[number] or b""
        begun = data.lstrip(CONTINUATIONS)
        after = follow(BETWEEN, begun)
        table[UNKNOWN, number] = UNKNOWN if after is None or not begun else numbers[after]
        for state, row in numbers.items():
            after = follow(state, data)
            table[row, number] = INVALID if after is None else numbers[after]
    return table if parts else None


class ValidText(LogitsProcessor):
    """Gives no probability to tokens that would make the text invalid UTF-8."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.table = transitions(tokenizer, len(tokenizer))
        self.forbidden: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask scores.

        Args:
            input_ids: [rows, tokens] so far; their last tokens decide.
            scores: [rows, vocabulary] of the next token. The vocabulary may be larger than the tokenizer's.

        Returns:
            Scores, -inf where a token cannot follow. As they were in rows of which nothing would be left: other
            processors have taken all that could, or the vocabulary has not every byte.
        """
        if self.table is None:
            return scores
        if self.forbidden is None or self.forbidden.shape[1] != scores.shape[1]:
            self.table = _widened(self.table, scores.shape[1]).to(scores.device)
            self.forbidden = self.table == INVALID
        state = torch.full((len(scores),), UNKNOWN, device=scores.device)
        for token in input_ids[:, -WINDOW:].T:
            after = self.table[state, token].long()
            state = torch.where(after == INVALID, self.table[UNKNOWN, token].long(), after)
        state[state == UNKNOWN] = STATES.index(BETWEEN)  # of four bytes, a whole character
        masked = scores.masked_fill(self.forbidden[state], -torch.inf)
        nothing_left = masked.amax(dim=1, keepdim=True) == -torch.inf
        return torch.where(nothing_left, scores, masked)


def _widened(table: torch.Tensor, width: int) -> torch.Tensor:
    """With columns for rows of the model's vocabulary that belong to no token; without those that it has not."""
    more = table.new_full((len(table), max(0, width - table.shape[1])), INVALID)
    more[[STATES.index(BETWEEN), UNKNOWN]] = STATES.index(BETWEEN)
    return torch.cat([table, more], dim=1)[:, :width]
