"""Files to prompts and references."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dataset.instructions import Instructions
from dataset.readers import Message, read_unworded_rows, word_row
from novelgpt.model.generation import Answer
from novelgpt.settings.errors import UserError
from novelgpt.text.conversation import (
    IGNORED,
    EncodedRow,
    begins_with_thought,
    encode_conversation,
    encode_prompt,
)
from novelgpt.text.encoding import encode, encode_document
from novelgpt.text.thoughts import PROMPT_END, opens_thought, split_thought
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
    """

    id: str
    prompt_ids: list[int]
    messages: list[Message]
    reference: str
    scoring: Scoring = Scoring()
    plain: bool = False
    thinking: bool | None = None
    opened: bool | None = None

    @property
    def prompt(self) -> str:
        """The texts of the messages that ask."""
        return "\n".join(message["content"] for message in self.asked())

    def asked(self) -> list[Message]:
        """The messages before the reference."""
        return self.messages[:-1] if self.reference else self.messages

    def told_apart(self, answer: Answer) -> tuple[str, str]:
        """(thought, answer proper) of what a model or a server answers; raw text has no thought."""
        if self.plain or answer.reasoning:
            return answer.reasoning, answer.text
        return split_thought(answer.text, self.opened)

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
            return EncodedRow(self.prompt_ids + ids, [IGNORED] * len(self.prompt_ids) + ids)
        row = encode_conversation(self.messages, tokenizer)[-1]
        border = len(self.prompt_ids)
        return EncodedRow(row.input_ids, [IGNORED] * border + row.labels[border:])


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
    rows = []
    for file in files:
        for unworded in read_unworded_rows(Path(file)):
            if "text_prompt" in unworded["record"]:
                rows.append(_plain_row(unworded, tokenizer))
            else:
                rows.append(_conversation_row(unworded, tokenizer, instructions))
            if max_rows is not None and len(rows) >= max_rows:
                return rows
    if not rows:
        raise UserError(f"no row in {', '.join(files)}", "name --data_files with rows to answer")
    return rows


def _conversation_row(
    unworded: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None, instructions: Instructions | None
) -> PromptRow:
    row = word_row(unworded, instructions)
    messages = row["messages"]
    answered = messages[-1]["role"] == "assistant"
    prompt = messages[:-1] if answered else messages
    reference = messages[-1]["content"] if answered else ""
    thinking = begins_with_thought(reference) if reference else None
    prompt_ids = encode_prompt(prompt, tokenizer, thinking) if tokenizer is not None else []
    opened = None if tokenizer is None else opens_thought(str(tokenizer.decode(prompt_ids[-PROMPT_END:])))
    scoring = read_scoring(unworded["record"], row["source"])
    return PromptRow(row["id"], prompt_ids, messages, reference, scoring, thinking=thinking, opened=opened)


def _plain_row(unworded: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> PromptRow:
    record, where = unworded["record"], unworded["source"]
    texts = record["text_prompt"], record.get("text_completion") or ""
    if not all(isinstance(text, str) for text in texts) or not texts[0]:
        raise UserError(
            f"{where}: text_prompt or text_completion is no text", "give the row a text to go on with, and what follows"
        )
    prompt, reference = texts
    messages = [{"role": "user", "content": prompt}]
    if reference:
        messages.append({"role": "assistant", "content": reference})
    prompt_ids = encode_document(prompt, tokenizer) if tokenizer is not None else []
    return PromptRow(
        unworded["id"], prompt_ids, messages, reference, read_scoring(record, where), plain=True, opened=False
    )
