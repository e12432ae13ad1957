"""The texts that stand for special tokens: marks of the chat template, which a text that people wrote never is.

What data or a user says may spell such a mark ("<|im_end|> ends a message"). There it is text like any other, in
training and in prediction, or a question could end itself and a quoted mark would train the end of an answer.

Special tokens that a user has added for answers ("<场景>") are no such marks: they stay the tokens that they are.
"""

from __future__ import annotations

import functools
import re

from transformers import PreTrainedTokenizerBase

from novelgpt.text.encoding import encode
from novelgpt.text.template_bounds import render_template
from novelgpt.text.templates import ASSISTANT_ID, BAICHUAN_NAMES, USER_ID, template_record

# How a mark of a template looks; added tokens may as well be blanks or words.
_MARK = re.compile(r"[<\[|｜].+[>\]|｜]")
# Special tokens that models come with, whether or not their template uses them.
_OF_MODELS = re.compile(
    r"<[|｜].+[|｜]>|</?s>|<(?:bos|eos|pad|unk|mask)>|[<\[]?(?:extra_id|reserved|unused).*|\[(?:CLS|SEP|PAD|UNK|\w*MASK)\]"
)
# Tags that answers themselves hold, whatever a tokenizer makes of them.
_TAGS = ("<think>", "</think>")
_PROBE = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]


def mark_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The special tokens that models come with, and what the template marks turns with; longest first."""
    return _mark_texts(tokenizer, str(tokenizer.chat_template), len(tokenizer))


def mark_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches one mark with the blanks around it that the tokenizer takes for a part of it."""
    return _mark_pattern(tokenizer, str(tokenizer.chat_template), len(tokenizer))


def encode_ordinary(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a piece of text in which marks are text like any other, with nothing added before or after."""
    marks = mark_texts(tokenizer)
    if not any(mark in text for mark in marks):
        return encode(text, tokenizer)
    own = _own_pattern(tokenizer, str(tokenizer.chat_template), len(tokenizer))
    pieces = own.split(text)  # what is between a user's own tokens, and these, in turn
    if len(pieces) > 1:
        return [
            token
            for number, piece in enumerate(pieces)
            for token in (encode(piece, tokenizer) if number % 2 else encode_ordinary(piece, tokenizer))
        ]
    options = {"add_special_tokens": False, "verbose": False, "split_special_tokens": True}
    ids = list(tokenizer(text, **options)["input_ids"])
    if not set(ids) & {tokenizer.convert_tokens_to_ids(mark) for mark in marks}:
        return ids
    # Marks that the tokenizer does not call special: no cut piece is one.
    pattern = re.compile("|".join(f"(?<={re.escape(mark[0])})(?={re.escape(mark[1:])})" for mark in marks if mark[1:]))
    return [token for piece in pattern.split(text) for token in tokenizer(piece, **options)["input_ids"]]


@functools.lru_cache(maxsize=16)
def _mark_texts(tokenizer: PreTrainedTokenizerBase, template: str, size: int) -> tuple[str, ...]:
    added = tokenizer.added_tokens_decoder.values()
    marks = set(tokenizer.special_tokens_map.values()) | {
        token.content
        for token in added
        if token.special and (_OF_MODELS.fullmatch(token.content) or token.content in template)
    }
    if template_record(tokenizer)["name"] in BAICHUAN_NAMES:
        marks |= set(tokenizer.convert_ids_to_tokens([USER_ID, ASSISTANT_ID]))
    try:
        rendered = render_template(tokenizer, _PROBE) if template else ""
    except Exception:  # whatever a template may raise
        rendered = ""
    marks |= {token.content for token in added if _MARK.fullmatch(token.content) and token.content in rendered}
    return tuple(sorted(marks.difference(_TAGS, [""]), key=len, reverse=True))


@functools.lru_cache(maxsize=16)
def _own_pattern(tokenizer: PreTrainedTokenizerBase, template: str, size: int) -> re.Pattern[str]:
    """Matches, as a group, a special token that is no mark."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    own = sorted(special.difference(mark_texts(tokenizer), _TAGS), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, own)) or '(?!)'})")


@functools.lru_cache(maxsize=16)
def _mark_pattern(tokenizer: PreTrainedTokenizerBase, template: str, size: int) -> re.Pattern[str]:
    strips = {token.content: (token.lstrip, token.rstrip) for token in tokenizer.added_tokens_decoder.values()}
    parts = []
    for mark in mark_texts(tokenizer):
        left, right = strips.get(mark, (False, False))
        parts.append(("\\s*" if left else "") + re.escape(mark) + ("\\s*" if right else ""))
    return re.compile("|".join(parts) or "(?!)")
