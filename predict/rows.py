"""Files to prompts and references."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dataset.readers import Message, read_conversation_rows
from novelgpt.settings.errors import UserError
from novelgpt.text.conversation import (
    IGNORED,
    EncodedRow,
    begins_with_thought,
    encode_conversation,
    encode_prompt,
)


@dataclass
class PromptRow:
    """One question.

    Attributes:
        id: of the row.
        prompt_ids: tokens of the prompt, the same as in training.
        messages: prompt and, where the row has one, reference answer.
        reference: the true last answer; "" where the row has none.
    """

    id: str
    prompt_ids: list[int]
    messages: list[Message]
    reference: str

    def encoded_reference(self, tokenizer: PreTrainedTokenizerBase) -> EncodedRow | None:
        """Prompt and reference as a training row, in which the last answer alone is labelled; None without one.

        The labels at the ends of earlier answers lie before the reference, so that none of them is left, whichever way
        the template ends answers.
        """
        if not self.reference:
            return None
        row = encode_conversation(self.messages, tokenizer)[-1]
        border = len(self.prompt_ids)
        return EncodedRow(row.input_ids, [IGNORED] * border + row.labels[border:])


def read_prompt_rows(files: list[str], tokenizer: PreTrainedTokenizerBase, max_rows: int | None) -> list[PromptRow]:
    """The rows of all files; a conversation asks for its last answer.

    Prompts leave room for a thought where the reference begins with one, as in training; rows without a reference go by
    what most answers of the training did.

    Raises:
        UserError: what the readers raise, or no row at all.
    """
    rows = []
    for file in files:
        for row in read_conversation_rows(Path(file)):
            messages = row["messages"]
            answered = messages[-1]["role"] == "assistant"
            prompt = messages[:-1] if answered else messages
            reference = messages[-1]["content"] if answered else ""
            thinking = begins_with_thought(reference) if reference else None
            rows.append(PromptRow(row["id"], encode_prompt(prompt, tokenizer, thinking), messages, reference))
            if max_rows is not None and len(rows) >= max_rows:
                return rows
    if not rows:
        raise UserError(f"no row in {', '.join(files)}", "name --data_files with rows to answer")
    return rows
