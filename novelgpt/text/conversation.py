"""Conversations to (input_ids, labels): the only maker of prompts and of loss masks, for training and prediction.

A conversation is cut into pieces of text by what the chat template renders for it: prompt, answer, what follows the
answer. Each piece is tokenised on its own, so that the tokens of a prompt are the same whether an answer follows (in
training) or is to be generated (in prediction), and the mask never depends on searching text.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from novelgpt.settings.errors import UserError
from novelgpt.text.tokenizer import encode

IGNORED = -100
Message = dict[str, str]


@dataclass
class EncodedRow:
    """One training row.

    input_ids: [tokens]; labels: [tokens], equal to input_ids where trained, else -100, not shifted.
    """

    input_ids: list[int]
    labels: list[int]

    def extend(self, ids: list[int], trained: bool) -> None:
        """Append tokens, all trained or all not."""
        self.input_ids += ids
        self.labels += ids if trained else [IGNORED] * len(ids)


class _HistoryRewrittenError(Exception):
    """The chat template renders earlier turns differently once later ones follow (Qwen3 drops old thoughts)."""


def encode_conversation(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> list[EncodedRow]:
    """Rows that train every assistant turn: decode(trained tokens) == answer + end token, for each turn.

    One row as a rule. Where the template rewrites earlier turns, one row for each turn, each with the very prompt that
    prediction would use. Messages after the last answer are left out; a conversation without answers gives no row.

    Raises:
        UserError: the template fails on the messages, or changes an answer beyond blanks at its ends.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        return []
    try:
        return [_encode(messages[: turns[-1] + 1], tokenizer)]
    except _HistoryRewrittenError:
        rows = []
        for turn in turns:
            row = EncodedRow([], [])
            row.extend(encode_prompt(messages[:turn], tokenizer), trained=False)
            prompt = _render(messages[:turn], tokenizer, add_generation_prompt=True)
            _add_answer(row, prompt, messages[: turn + 1], tokenizer)
            rows.append(row)
        return rows


def encode_prompt(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens up to where the next answer starts: exactly those that training saw before that answer."""
    try:
        return _encode(messages, tokenizer, add_generation_prompt=True).input_ids
    except _HistoryRewrittenError:
        return encode(_render(messages, tokenizer, add_generation_prompt=True), tokenizer)


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens at which generation stops: the end of an answer in the template, and the tokenizer's end token."""
    probe = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    row = encode_conversation(probe, tokenizer)[0]
    last = [label for label in row.labels if label != IGNORED][-1]
    return sorted({last, int(tokenizer.eos_token_id)})


def _encode(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False
) -> EncodedRow:
    row = EncodedRow([], [])
    rendered = ""
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = _render(messages[:index], tokenizer, add_generation_prompt=True)
            if not prompt.startswith(rendered):
                raise _HistoryRewrittenError
            row.extend(encode(prompt[len(rendered) :], tokenizer), trained=False)
            rendered = _add_answer(row, prompt, messages[: index + 1], tokenizer)
    if add_generation_prompt:
        prompt = _render(messages, tokenizer, add_generation_prompt=True)
        if not prompt.startswith(rendered):
            raise _HistoryRewrittenError
        row.extend(encode(prompt[len(rendered) :], tokenizer), trained=False)
    return row


def _add_answer(row: EncodedRow, prompt: str, messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """Append the answer of the last message, its end token and what the template puts after; return all rendered."""
    content = messages[-1]["content"]
    full = _render(messages, tokenizer, add_generation_prompt=False)
    rest = full[len(prompt) :]
    # Templates trim blanks at either end (Qwen3's: line feeds in front); the longest form that stands there is it.
    forms = [form for blanks in ("\n", None)
             for form in (content, content.lstrip(blanks), content.rstrip(blanks), content.strip(blanks))]  # fmt: skip
    answer = max((form for form in forms if rest.startswith(form)), key=len, default=None)
    if not full.startswith(prompt) or answer is None:
        raise UserError(
            f"the chat template changes the answer {content[:20]!r}…, so what to train on is unclear",
            "remove reasoning tags from the answers, or give the tokenizer a template that keeps answers as they are",
        )
    tail = encode(rest[len(answer) :], tokenizer)
    special = tail and tail[0] in tokenizer.added_tokens_decoder
    end = tail.pop(0) if special else int(tokenizer.eos_token_id)
    row.extend([*encode(answer, tokenizer), end], trained=True)
    row.extend(tail, trained=False)
    return full


def _render(messages: list[Message], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool) -> str:
    try:
        # enable_thinking: the empty think block of Qwen3 then stands in the prompt, outside the loss.
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=False
        )
    except Exception as error:
        roles = " ".join(message["role"] for message in messages)
        raise UserError(
            f"the chat template refuses messages of the roles {roles!r}: {error}",
            "order the roles as the template wants, or give the tokenizer another template",
        ) from error
    assert isinstance(text, str)
    return text
