"""The special tokens of a tokenizer and its chat template, which a text that people wrote never is.

Data and users may spell a special token ("<|im_end|> ends a message"). There it is text like any other, in training and
in prediction: otherwise a question could end itself, and a quoted token would train the end of an answer.

Special tokens that a user has added for answers ("<场景>") are not among them: they stay the tokens they are.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from novelgpt.text import template_bounds
from novelgpt.text.encoding import encode
from novelgpt.text.templates import ASSISTANT_ID, BAICHUAN_NAMES, USER_ID, template_record

# How a template spells its special tokens; added tokens may as well be whitespace or words.
_BRACKETED = re.compile(r"[<\[|｜].+[>\]|｜]")
# Special tokens that models come with, whether or not their template uses them.
_OF_MODELS = re.compile(
    r"<[|｜].+[|｜]>|</?s>|<(?:bos|eos|pad|unk|mask)>|[<\[]?(?:extra_id|reserved|unused).*|\[(?:CLS|SEP|PAD|UNK|\w*MASK)\]"
)
# Tags that answers themselves contain, whatever a tokenizer makes of them.
_TAGS = ("<think>", "</think>")
_PROBE = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]


@dataclass(frozen=True)
class SpecialTokens:
    """What encoding needs to know of a tokenizer's special tokens.

    Attributes:
        texts: those of the model and of its chat template, longest first.
        pattern: matches one of them, with the whitespace around it that the tokenizer takes as a part of it.
        users: matches, as a group, a special token that a user has added.
        added_ids: ids of all added tokens.
    """

    texts: tuple[str, ...]
    pattern: re.Pattern[str]
    users: re.Pattern[str]
    added_ids: frozenset[int]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """The special tokens of a tokenizer, collected once for each chat template and vocabulary size."""
    return _collect(tokenizer, str(tokenizer.chat_template), len(tokenizer))


def encode_literally(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a text in which the special tokens of models and templates are text, and those of users are not."""
    special = special_tokens(tokenizer)
    if not any(token in text for token in special.texts):
        return encode(text, tokenizer)
    parts = special.users.split(text)  # texts and users' tokens in turn
    if len(parts) > 1:
        encoders = (encode_literally, encode)
        return [token for number, part in enumerate(parts) for token in encoders[number % 2](part, tokenizer)]
    options = {"add_special_tokens": False, "verbose": False, "split_special_tokens": True}
    ids = list(tokenizer(text, **options)["input_ids"])
    if not set(ids) & {tokenizer.convert_tokens_to_ids(token) for token in special.texts}:
        return ids
    # Tokens that the tokenizer does not call special: none survives a cut after its first character.
    cuts = "|".join(f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in special.texts if token[1:])
    return [token for part in re.split(cuts, text) for token in tokenizer(part, **options)["input_ids"]]


@functools.lru_cache(maxsize=16)
def _collect(tokenizer: PreTrainedTokenizerBase, template: str, size: int) -> SpecialTokens:
    added = tokenizer.added_tokens_decoder
    texts = set(tokenizer.special_tokens_map.values()) | {
        token.content
        for token in added.values()
        if token.special and (_OF_MODELS.fullmatch(token.content) or token.content in template)
    }
    if template_record(tokenizer)["name"] in BAICHUAN_NAMES:
        texts |= set(tokenizer.convert_ids_to_tokens([USER_ID, ASSISTANT_ID]))
    try:
        with template_bounds.processor_time(template_bounds.RENDER_SECONDS):
            rendered = str(tokenizer.apply_chat_template(_PROBE, tokenize=False)) if template else ""
    except Exception:  # whatever a template may raise
        rendered = ""
    texts |= {
        token.content for token in added.values() if _BRACKETED.fullmatch(token.content) and token.content in rendered
    }
    ordered = sorted(texts.difference(_TAGS, [""]), key=len, reverse=True)
    strips = {token.content: token for token in added.values()}
    spaced = [
        ("\\s*" if text in strips and strips[text].lstrip else "")
        + re.escape(text)
        + ("\\s*" if text in strips and strips[text].rstrip else "")
        for text in ordered
    ]
    users = {token.content for token in added.values() if token.special}.difference(ordered, _TAGS)
    return SpecialTokens(
        tuple(ordered),
        re.compile("|".join(spaced) or "(?!)"),
        re.compile(f"({'|'.join(map(re.escape, sorted(users, key=len, reverse=True))) or '(?!)'})"),
        frozenset(added),
    )
