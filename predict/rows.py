"""Files to prompts and references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dataset.instructions import Instructions
from dataset.readers import SourceRow, read_conversation, read_source_rows
from dataset.row_fields import ABSENT
from novelgpt.inference.generation import Answer
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
    split_thought,
)
from predict.scoring_fields import Scoring, read_scoring


@dataclass
class PromptRow:
    """One question.

    Attributes:
        id: of the row.
        prompt_ids: tokens of the prompt, the same as in training.
        messages: prompt and, where the row has one, reference answer.
        reference: the true last answer; "" where the row has none.
        scoring: what the row says of its scores.
        plain: whether the prompt is raw text that the model goes on with, as in pretraining, without the marks of a
            conversation.
        thinking: whether the prompt shall leave room for a thought; None where no reference says so, and the default of
            the template decides.
        opened: whether the prompt ends within a thought; None where it has no tokens here.
        tools: that the assistant may call, as chat templates take them.
    """

    id: str
    prompt_ids: list[int]
    messages: list[Message]
    reference: str
    scoring: Scoring = Scoring()
    plain: bool = False
    thinking: bool | None = None
    opened: bool | None = None
    tools: Sequence[dict[str, Any]] = ()

    @property
    def prompt(self) -> str:
        """The texts of the messages that ask."""
        return "\n".join(message["content"] for message in self.asked())

    def asked(self) -> list[Message]:
        """The messages before the reference."""
        return self.messages[:-1] if self.reference else self.messages

    def told_apart(self, answer: Answer) -> tuple[str, str]:
        """(thought, answer proper) of what a model or a server answers; raw text has no thought."""
        if self.plain:
            return answer.reasoning, answer.text
        # Some gateways set the thought apart and leave it in the text as well.
        thought, text = split_thought(answer.text, False if answer.reasoning else self.opened)
        return answer.reasoning or thought, text

    def reference_told_apart(self) -> tuple[str, str]:
        """(thought, answer proper) of the reference."""
        return ("", self.reference) if self.plain else split_thought(self.reference, False)

    def encoded_reference(self, tokenizer: PreTrainedTokenizerBase) -> EncodedRow | None:
        """Prompt and reference as a training row, in which the last answer alone is labelled; None without one.

        The labels at the ends of earlier answers lie before the reference, so that none of them is left, whichever way
        the template ends answers. The reference of a plain row is labelled without an end token, as the text goes on.
        """
        if not self.reference:
            return None
        if self.plain:
            ids = encode(self.reference, tokenizer)
            return EncodedRow(self.prompt_ids + ids, [IGNORE_INDEX] * len(self.prompt_ids) + ids)
        row = encode_conversation(self.messages, tokenizer, self.tools)[-1]
        border = len(self.prompt_ids)
        return EncodedRow(row.input_ids, [IGNORE_INDEX] * border + row.labels[border:])


def read_prompt_rows(
    files: list[str],
    tokenizer: PreTrainedTokenizerBase | None,
    max_rows: int | None,
    instructions: Instructions | None = None,
) -> list[PromptRow]:
    """The rows of all files; a conversation asks for its last answer.

    Prompts leave room for a thought where the reference begins with one, as in training; rows without a reference go by
    what most answers of the training did. Rows that name a task are worded by `instructions`, by default by the first
    of the built-in wordings. Rows {"text_prompt", "text_completion"} are raw text to go on with. Without a tokenizer (a
    server has its own), prompts have no tokens.

    Raises:
        UserError: what the readers raise, or no row at all.
    """
    rows: list[PromptRow] = []
    nameless: list[PromptRow] = []
    for source in islice((row for file in files for row in read_source_rows(Path(file))), max_rows):
        if "text_prompt" in source.fields:
            rows.append(_plain_row(source, tokenizer))
        else:
            rows.append(_conversation_row(source, tokenizer, instructions))
        if source.fields.get("id") in ABSENT:
            nameless.append(rows[-1])
    if not rows:
        raise UserError(f"no row in {', '.join(files)}", "name --data_files with rows to answer")
    _name_apart(nameless, rows)
    return rows


def _name_apart(nameless: Sequence[PromptRow], rows: Sequence[PromptRow]) -> None:
    """Give the rows that brought no id one that no other row has."""
    made = {id(row) for row in nameless}
    taken = {row.id for row in rows if id(row) not in made}
    for row in nameless:
        name, number = row.id, 1
        while row.id in taken:
            number += 1
            row.id = f"{name}~{number}"
        taken.add(row.id)


def _conversation_row(
    source: SourceRow, tokenizer: PreTrainedTokenizerBase | None, instructions: Instructions | None
) -> PromptRow:
    row = read_conversation(source, instructions)
    # Whether an answer was trained is no matter here: the last one is what the model is to say.
    messages = row["messages"]
    for message in messages:
        message.pop("trained", None)
    answered = messages[-1]["role"] == "assistant"
    if answered and is_empty_answer(messages[-1]):
        messages, answered = messages[:-1], False
    if not messages:
        raise UserError(f"{row['source']}: the row asks nothing", "give it a question, or leave it out")
    tools = row.get("tools", [])
    called = next((message for message in messages if message.get("tool_calls")), None)
    if tokenizer is None and (tools or called):
        raise UserError(
            f"{row['source']}: field {'tools' if tools else 'tool_calls'} is not sent to a server",
            "predict with --model, whose chat template takes tools, or leave these rows out",
        )
    prompt = messages[:-1] if answered else messages
    made = PromptRow(row["id"], [], messages, "", read_scoring(source.fields, row["source"]), tools=tools)
    made.reference = full_answer(messages[-1]) if answered else ""
    made.thinking = begins_with_thought(made.reference) if answered else row.get("enable_thinking")
    if tokenizer is not None:
        try:
            made.prompt_ids = encode_prompt(prompt, tokenizer, made.thinking, tools)
            if answered and messages[-1].get("tool_calls"):
                made.reference = _calls_in_words(made, tokenizer)
        except UserError as error:
            raise UserError(f"{row['source']}: {error.cause}", error.remedy) from error
        made.opened = opens_thought(str(tokenizer.decode(made.prompt_ids[-PROMPT_END:])))
    return made


def _calls_in_words(row: PromptRow, tokenizer: PreTrainedTokenizerBase) -> str:
    """The last answer with its calls as the template writes them, without the end token."""
    encoded = encode_conversation(row.messages, tokenizer, row.tools)[-1]
    answer = [label for label in encoded.labels[len(row.prompt_ids) :] if label != IGNORE_INDEX]
    return str(tokenizer.decode(answer[:-1]))


def _plain_row(source: SourceRow, tokenizer: PreTrainedTokenizerBase | None) -> PromptRow:
    record, where = source.fields, source.source
    texts = record["text_prompt"], record.get("text_completion") or ""
    if not all(isinstance(text, str) for text in texts) or not texts[0]:
        raise UserError(
            f"{where}: text_prompt or text_completion is no text", "give the row a text to go on with, and what follows"
        )
    prompt, reference = texts
    messages: list[Message] = [{"role": "user", "content": prompt}]
    if reference:
        messages.append({"role": "assistant", "content": reference})
    prompt_ids = encode_document(prompt, tokenizer) if tokenizer is not None else []
    return PromptRow(source.id, prompt_ids, messages, reference, read_scoring(record, where), plain=True, opened=False)
