"""Reads the rows to answer: prompts, and references where there are any."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy
from transformers import PreTrainedTokenizerBase

from dataset.instructions import Instructions
from dataset.readers import SourceRow, read_conversation, read_sourced_rows
from dataset.row_fields import ABSENT
from dataset.sources import RowSource
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
from predict.stored_rows import IdIndex, StoredRows


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


class PromptRows:
    """Rows to answer, in their order; they are on disk, and memory holds some 25 bytes of each.

    Args:
        sources: that the rows come from.
        near: where results are written, on whose disk the rows are kept; None for that of temporary files.

    Attributes:
        sources: that the rows come from.
        lengths: of each row, the tokens of its prompt; for a server, its characters.
        full_lengths: of each row, the tokens of prompt and reference; 0 without a reference, or for a server.
    """

    def __init__(self, sources: Sequence[RowSource], near: Path | None) -> None:
        self.sources = sources
        self._rows = StoredRows(near)
        self.lengths = array("q")
        self.full_lengths = array("q")
        self._unnamed = array("b")
        # Of rows without an id of their own: what follows the made one, as "~2"; 0 for nothing.
        self._suffixes = array("q")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> PromptRow:
        return self._row(number, self._rows[number])

    def __iter__(self) -> Iterator[PromptRow]:
        return itertools.starmap(self._row, enumerate(self._rows))

    def _row(self, number: int, stored: list[Any]) -> PromptRow:
        name, prompt_ids, messages, reference, (metrics, answers, group, characters), *further = stored
        scoring = ScoringFields(tuple(metrics), tuple(answers), group, characters)
        suffix = self._suffixes[number]
        name = f"{name}~{suffix}" if suffix else name
        return PromptRow(name, prompt_ids, messages, reference, scoring, *further)

    def append(self, row: PromptRow, full_length: int, unnamed: bool) -> None:
        """Add a row.

        Args:
            row: whose id is made of file and number where it is `unnamed`.
            full_length: of prompt and reference, in tokens.
            unnamed: whether the row has no id of its own.

        Raises:
            UserError: the disk is full.
        """
        further = row.plain, row.thinking, row.opened, row.tools
        self._rows.append([row.id, row.prompt_ids, row.messages, row.reference, astuple(row.scoring), *further])
        self.lengths.append(len(row.prompt_ids) or len(row.prompt))
        self.full_lengths.append(full_length)
        self._unnamed.append(unnamed)
        self._suffixes.append(0)

    def finish(self) -> None:
        """Make the ids of rows that have none unique, once all rows are here.

        Raises:
            UserError: the disk is full.
        """
        self._rows.finish()
        if not any(self._unnamed):
            return
        index = IdIndex((row[0] for row in self._rows), self._stored_id)
        for numbers in index.repeated():
            tried: dict[str, int] = {}
            for number in numbers:
                if self._unnamed[number]:
                    name = self._stored_id(number)
                    names = (
                        (suffix, f"{name}~{suffix}" if suffix > 1 else name)
                        for suffix in itertools.count(tried.get(name, 1))
                    )
                    suffix = next(suffix for suffix, made in names if not self._is_given(made, index))
                    tried[name] = suffix + 1
                    self._suffixes[number] = suffix if suffix > 1 else 0

    def _is_given(self, name: str, index: IdIndex) -> bool:
        """Whether a row has this id of its own."""
        return not all(self._unnamed[number] for number in index.numbers(name))

    def _stored_id(self, number: int) -> str:
        return str(self._rows[number][0])


def read_prompt_rows(
    sources: Sequence[RowSource],
    tokenizer: PreTrainedTokenizerBase | None,
    max_rows: int | None,
    instructions: Instructions | None = None,
    near: Path | None = None,
) -> PromptRows:
    """The rows of all sources; a conversation asks for its last answer.

    Prompts leave room for a thought where the reference starts with one, as in training; rows without a reference
    follow the majority of the training's answers. Rows that name a task are worded by `instructions`, by default by the
    first built-in wording. Rows {"text_prompt", "text_completion"} are raw text to continue. Without a tokenizer (a
    server has its own), prompts have no tokens.

    Args:
        sources: of the rows.
        tokenizer: of the model; None for a server.
        max_rows: as many are read; None for all.
        instructions: wordings of tasks.
        near: where results are written, on whose disk the rows are kept; by default that of temporary files.

    Raises:
        UserError: what the readers raise, no row at all, or a full disk.
    """
    rows = PromptRows(sources, near)
    for source in itertools.islice(itertools.chain.from_iterable(map(read_sourced_rows, sources)), max_rows):
        if "text_prompt" in source.fields:
            row = _plain_row(source, tokenizer)
        else:
            row = _conversation_row(source, tokenizer, instructions)
        encoded = None if tokenizer is None else row.encoded_reference(tokenizer)
        full_length = 0 if encoded is None else len(encoded.input_ids)
        rows.append(row, full_length, source.fields.get("id") in ABSENT)
    if not len(rows):
        raise UserError(
            f"no row in {', '.join(source.given for source in sources)}", "name --data_files with rows to answer"
        )
    rows.finish()
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


def check_lengths(rows: PromptRows, positions: int | None, max_new_tokens: int) -> None:
    """Refuse rows beyond the model's positions: there some models fail, others write nonsense.

    Args:
        rows: with the tokens of their prompts.
        positions: of the model; None for no limit.
        max_new_tokens: of the longest answer.

    Raises:
        UserError: names the first such row, and the limit.
    """
    if positions is None:
        return
    lengths, full_lengths = (numpy.frombuffer(one, numpy.int64) for one in (rows.lengths, rows.full_lengths))
    beyond = numpy.flatnonzero(lengths + max_new_tokens > positions)
    if len(beyond):
        others = f", and so have {len(beyond) - 1} others" if len(beyond) > 1 else ""
        room = positions - int(lengths.max())
        shorter = f"--max_new_tokens {room} leaves room for all; or " if room > 0 else ""
        raise UserError(
            f"row {rows[int(beyond[0])].id}: its prompt of {lengths[beyond[0]]} tokens has no room for an answer of "
            f"{max_new_tokens} within the {positions} positions of the model{others}",
            f"{shorter}shorten the prompts or leave those rows out; a model whose positions were extended says so in "
            "its config.json",
        )
    too_long = numpy.flatnonzero(full_lengths > positions)
    if len(too_long):
        raise UserError(
            f"row {rows[int(too_long[0])].id}: prompt and reference take {full_lengths[too_long[0]]} tokens, more than "
            f"the {positions} positions of the model, so the reference has no loss",
            "shorten the reference or leave the row out",
        )
