"""Reads the rows to answer: prompts, and references where there are any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dataset.instructions import Instructions
from dataset.readers import SourceRow, read_conversation, read_source_rows
from dataset.row_fields import ABSENT
from novelgpt.settings.errors import UserError
from novelgpt.text.conversation import IGNORE_INDEX, EncodedRow, encode_conversation, encode_prompt
from novelgpt.text.encoding import encode, encode_document
from novelgpt.text.messages import (
    PROMPT_END,
    Message,
    begins_with_thought,
    full_answer,
    is_empty_answer,
    opens_thought,
)
from predict.predictions import ScoringFields, read_scoring


@dataclass
class PromptRow:
    """One question.

    Attributes:
        id: of the row.
        prompt_ids: tokens of the prompt, the same as in training; [] for a server.
        messages: prompt and, where the row has one, reference answer.
        reference: the correct last answer; "" where the row has none.
        scoring: how the row wants to be scored.
        plain: whether the prompt is raw text to continue, as in pretraining, without a chat template.
        thinking: whether the prompt leaves room for a thought; None where no reference decides it, and the template's
            default applies.
        opened: whether the prompt ends within a thought; None where it has no tokens here.
        tools: that the assistant may call, as chat templates take them.
    """

    id: str
    prompt_ids: list[int]
    messages: list[Message]
    reference: str
    scoring: ScoringFields = ScoringFields()
    plain: bool = False
    thinking: bool | None = None
    opened: bool | None = None
    tools: Sequence[dict[str, Any]] = ()

    @property
    def asked(self) -> list[Message]:
        """The messages before the reference."""
        return self.messages[:-1] if self.reference else self.messages

    @property
    def prompt(self) -> str:
        """The texts of the messages before the reference."""
        return "\n".join(message["content"] for message in self.asked)

    def encoded_reference(self, tokenizer: PreTrainedTokenizerBase) -> EncodedRow | None:
        """Prompt and reference as a training row with labels on the last answer only; None without a reference.

        Labels before the reference, at the ends of earlier answers, are removed. The reference of a plain row has no
        end token, as the text continues.
        """
        if not self.reference:
            return None
        length = len(self.prompt_ids)
        if self.plain:
            ids = encode(self.reference, tokenizer)
            return EncodedRow(self.prompt_ids + ids, [IGNORE_INDEX] * length + ids)
        row = encode_conversation(self.messages, tokenizer, self.tools)[-1]
        return EncodedRow(row.input_ids, [IGNORE_INDEX] * length + row.labels[length:])


def read_prompt_rows(
    files: list[str],
    tokenizer: PreTrainedTokenizerBase | None,
    max_rows: int | None,
    instructions: Instructions | None = None,
) -> list[PromptRow]:
    """The rows of all files; a conversation asks for its last answer.

    Prompts leave room for a thought where the reference starts with one, as in training; rows without a reference
    follow the majority of the training's answers. Rows that name a task are worded by `instructions`, by default by the
    first built-in wording. Rows {"text_prompt", "text_completion"} are raw text to continue. Without a tokenizer (a
    server has its own), prompts have no tokens.

    Raises:
        UserError: what the readers raise, or no row at all.
    """
    rows: list[PromptRow] = []
    unnamed: list[PromptRow] = []
    for source in islice((row for file in files for row in read_source_rows(Path(file))), max_rows):
        if "text_prompt" in source.fields:
            rows.append(_plain_row(source, tokenizer))
        else:
            rows.append(_conversation_row(source, tokenizer, instructions))
        if source.fields.get("id") in ABSENT:
            unnamed.append(rows[-1])
    if not rows:
        raise UserError(f"no row in {', '.join(files)}", "name --data_files with rows to answer")
    made = set(map(id, unnamed))
    taken = {row.id for row in rows if id(row) not in made}
    for row in unnamed:
        names = chain([row.id], map(f"{row.id}~{{}}".format, count(2)))
        row.id = next(name for name in names if name not in taken)
        taken.add(row.id)
    return rows


def _conversation_row(
    source: SourceRow, tokenizer: PreTrainedTokenizerBase | None, instructions: Instructions | None
) -> PromptRow:
    row = read_conversation(source, instructions)
    # How much an answer counts in training does not matter: the last one is asked for.
    messages = row["messages"]
    for message in messages:
        message.pop("weight", None)
    answered = messages[-1]["role"] == "assistant"
    if answered and is_empty_answer(messages[-1]):
        messages, answered = messages[:-1], False
    if not messages:
        raise UserError(f"{row['source']}: the row asks nothing", "give it a question, or leave it out")
    tools = row.get("tools", [])
    if tokenizer is None and (tools or any(message.get("tool_calls") for message in messages)):
        raise UserError(
            f"{row['source']}: field {'tools' if tools else 'tool_calls'} is not sent to a server",
            "predict with --model, whose chat template takes tools, or leave these rows out",
        )
    scoring = read_scoring(source.fields, row["source"])
    reference = full_answer(messages[-1]) if answered else ""
    thinking = begins_with_thought(reference) if answered else row.get("enable_thinking")
    made = PromptRow(row["id"], [], messages, reference, scoring, thinking=thinking, tools=tools)
    if tokenizer is not None:
        try:
            made.prompt_ids = encode_prompt(messages[:-1] if answered else messages, tokenizer, thinking, tools)
            if answered and messages[-1].get("tool_calls"):
                # The calls as the template writes them, without the end token.
                encoded = encode_conversation(messages, tokenizer, tools)[-1]
                answer = [label for label in encoded.labels[len(made.prompt_ids) :] if label != IGNORE_INDEX]
                made.reference = str(tokenizer.decode(answer[:-1]))
        except UserError as error:
            raise UserError(f"{row['source']}: {error.cause}", error.remedy) from error
        made.opened = opens_thought(str(tokenizer.decode(made.prompt_ids[-PROMPT_END:])))
    return made


def _plain_row(source: SourceRow, tokenizer: PreTrainedTokenizerBase | None) -> PromptRow:
    record, where = source.fields, source.source
    prompt, reference = record["text_prompt"], record.get("text_completion") or ""
    if not isinstance(prompt, str) or not isinstance(reference, str) or not prompt:
        raise UserError(
            f"{where}: text_prompt or text_completion is not text", "give the row a text to continue, and what follows"
        )
    messages: list[Message] = [{"role": "user", "content": prompt}]
    if reference:
        messages.append({"role": "assistant", "content": reference})
    prompt_ids = encode_document(prompt, tokenizer) if tokenizer is not None else []
    scoring = read_scoring(record, where)
    return PromptRow(source.id, prompt_ids, messages, reference, scoring, plain=True, opened=False)


def check_lengths(
    rows: Sequence[PromptRow], tokenizer: PreTrainedTokenizerBase, positions: int | None, max_new_tokens: int
) -> None:
    """Refuse rows beyond the model's positions: there some models fail, others write nonsense.

    Args:
        rows: with the tokens of their prompts.
        tokenizer: of the model.
        positions: of the model; None for no limit.
        max_new_tokens: of the longest answer.

    Raises:
        UserError: names the first such row, and the limit.
    """
    if positions is None:
        return
    beyond = [row for row in rows if len(row.prompt_ids) + max_new_tokens > positions]
    if beyond:
        others = f", and so have {len(beyond) - 1} others" if len(beyond) > 1 else ""
        room = positions - max(len(row.prompt_ids) for row in beyond)
        shorter = f"--max_new_tokens {room} leaves room for all; or " if room > 0 else ""
        raise UserError(
            f"row {beyond[0].id}: its prompt of {len(beyond[0].prompt_ids)} tokens has no room for an answer of "
            f"{max_new_tokens} within the {positions} positions of the model{others}",
            f"{shorter}shorten the prompts or leave those rows out; a model whose positions were extended says so in "
            "its config.json",
        )
    for row in rows:
        reference = row.encoded_reference(tokenizer)
        if reference is not None and len(reference.input_ids) > positions:
            raise UserError(
                f"row {row.id}: prompt and reference take {len(reference.input_ids)} tokens, more than the "
                f"{positions} positions of the model, so the reference has no loss",
                "shorten the reference or leave the row out",
            )
