"""Conversation files to encoded rows, for supervised fine-tuning (SFT)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from transformers import PreTrainedTokenizerBase

from dataset.instructions import load_instructions
from dataset.readers import Conversation, read_conversation, read_source_rows
from novelgpt.settings.arguments import ConversationArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.process import is_first_process
from novelgpt.settings.terminal import counted, say
from novelgpt.text.conversation import IGNORE_INDEX, EncodedRow, encode_conversation
from novelgpt.text.messages import OWN_THOUGHT, Message, is_empty_answer
from novelgpt.text.origins import TracedRows
from novelgpt.text.packing import PackedRows
from novelgpt.text.statistics import TokenCounts, show_counts, show_row
from novelgpt.text.templates import record_thinking

SPLIT_SEED = 42


@dataclass(eq=False)
class EncodedRows(TracedRows):
    """Encoded conversations, in memory."""

    rows: Sequence[EncodedRow]

    def __post_init__(self) -> None:
        self.lengths = numpy.array([len(row.input_ids) for row in self.rows], numpy.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[Any]]:
        """{"input_ids", "labels"} and, of a weighted row, "loss_weights", each [tokens]."""
        row = self.rows[index]
        weights = {} if row.loss_weights is None else {"loss_weights": row.loss_weights}
        return {"input_ids": row.input_ids, "labels": row.labels, **weights}

    def origins(self, index: int, begin: int = 0, end: int | None = None) -> list[str]:
        """The file and row."""
        return [self.rows[index].source] if self.rows[index].source else []


def read_conversations(
    data: ConversationArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[EncodedRows | PackedRows, EncodedRows | PackedRows]:
    """Training and validation rows, packed if asked, with a table of what became of them.

    Training rows draw their wordings; validation rows take the first wording of their task. The tokenizer records
    whether most answers of the training rows begin with a thought.

    Raises:
        UserError: what the readers raise, an over-long row under `refuse`, or no trainable token left.
    """
    if data.max_length < 2:
        raise UserError(f"--max_length {data.max_length} leaves no token to predict", "take at least 2")
    if data.min_length > data.max_length:
        raise UserError(f"--min_length {data.min_length} is above --max_length {data.max_length}", "lower it")
    drawn = load_instructions(data.instruction_templates, data.instruction_seed)
    fixed = drawn.fixed()
    sources = [row for file in data.train_files for row in read_source_rows(Path(file))]
    if data.valid_files:
        train = [read_conversation(row, drawn) for row in sources]
        valid = [read_conversation(row, fixed) for file in data.valid_files for row in read_source_rows(Path(file))]
    else:
        order = list(range(len(sources)))
        random.Random(SPLIT_SEED).shuffle(order)
        count = math.ceil(len(sources) * data.valid_fraction)
        held_out = set(order[:count])
        # In the order of the files, so that an error names the first row that has it.
        worded = [read_conversation(row, fixed if number in held_out else drawn) for number, row in enumerate(sources)]
        train, valid = [worded[number] for number in order[count:]], [worded[number] for number in order[:count]]
        if not train or not valid:
            raise UserError(
                f"{counted(len(sources), 'row')} cannot be split into training and validation "
                f"with --valid_fraction {data.valid_fraction}",
                "name --valid_files or bring more rows",
            )
    answers = [message for row in train for message in row["messages"] if message["role"] == "assistant"]
    thoughts = sum(1 for one in answers if one.get("reasoning_content") or OWN_THOUGHT.match(one["content"]))
    record_thinking(tokenizer, 2 * thoughts > len(answers))
    encoded = {}
    counts = {}
    for name, rows in (("train", train), ("valid", valid)):
        encoded[name], counts[name] = encode_rows(rows, tokenizer, data)
        if not counts[name].trained:
            raise _nothing_to_train(name, len(rows), counts[name], data.max_length)
    if is_first_process():
        show_counts(counts)
        first = encoded["train"][0]
        show_row(first.input_ids, first.labels, tokenizer, first.loss_weights)
    if not data.packing:
        return EncodedRows(encoded["train"]), EncodedRows(encoded["valid"])
    train_packs, valid_packs = (PackedRows(encoded[name], data.max_length) for name in ("train", "valid"))
    if is_first_process():
        say(
            f"{counted(len(train_packs.rows), 'row')} in {counted(len(train_packs), 'pack')} of "
            f"{data.max_length:,} tokens, {train_packs.fill():.1%} full: "
            f"{len(train_packs.rows) / len(train_packs):.1f} rows per pack",
            "",
        )
    return train_packs, valid_packs


def _nothing_to_train(name: str, rows: int, counts: TokenCounts, max_length: int) -> UserError:
    """Why no token of a data set is trained: its rows are cut before their answers, or have none to train."""
    cause = f"no trainable token is left in the {counted(rows, f'{name} row')} within --max_length {max_length}"
    if any(note.startswith("rows above") for note in counts.notes):
        return UserError(cause, "raise --max_length, or bring rows with answers")
    if any(note.startswith("rows below") for note in counts.notes):
        return UserError(cause, "lower --min_length, or bring rows with answers")
    noted = "; ".join(f"{number:,} {note}" for note, number in counts.notes.items())
    return UserError(f"{cause}: {noted}", "bring rows with answers to train on")


def encode_rows(
    rows: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, data: ConversationArguments
) -> tuple[list[EncodedRow], TokenCounts]:
    """Rows of at most `max_length` tokens, each with something to train, and the count of what happened to the rest."""
    kept: list[EncodedRow] = []
    counts = TokenCounts()
    for row in rows:
        messages = row["messages"]
        while messages and messages[0]["role"] == "assistant":
            messages = messages[1:]
            counts.notes["answers before any question, left out"] += 1
        for message in messages:
            if message["role"] == "assistant" and message.get("weight") == 0:
                flagged = "answers that a flag keeps out of the loss"
                counts.notes["empty answers, not trained" if is_empty_answer(message) else flagged] += 1
        if data.mask_history:
            messages = _mask_history(messages, counts)
        try:
            encoded = encode_conversation(messages, tokenizer, row.get("tools", ()))
        except UserError as error:
            raise UserError(f"{row['source']}: {error.cause}", error.remedy) from error
        if not encoded:
            counts.notes["rows without an answer, left out"] += 1
        elif messages[-1]["role"] != "assistant":
            counts.notes["rows whose last messages have no answer, which were left out"] += 1
        for whole in encoded:
            counts.tokens_in += len(whole.input_ids)
            # Each part with the number of tokens at its start that an earlier part has counted.
            parts = [(whole, 0)]
            if not data.min_length <= len(whole.input_ids) <= data.max_length:
                parts = _fit(whole, row["source"], data, counts)
            for part, repeated in parts:
                trained = sum(label != IGNORE_INDEX for label in part.labels)
                if trained == 0:
                    counts.notes["rows without a trainable token, left out"] += 1
                    counts.dropped += len(part.input_ids) - repeated
                    continue
                part.source = row["source"]
                kept.append(part)
                counts.rows += 1
                counts.trained += trained
                counts.context += len(part.input_ids) - repeated - trained
    counts.lengths = numpy.array([len(row.input_ids) for row in kept], numpy.int64)
    return kept, counts


def _mask_history(messages: Sequence[Message], counts: TokenCounts) -> list[Message]:
    """The messages with weight 0 for every answer but the last."""
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    masked = {number for number in turns[:-1] if messages[number].get("weight") != 0}
    if masked:
        counts.notes["answers before the last one, not trained (mask_history)"] += len(masked)
    return [{**one, "weight": 0.0} if number in masked else one for number, one in enumerate(messages)]


def _fit(
    row: EncodedRow, source: str, data: ConversationArguments, counts: TokenCounts
) -> list[tuple[EncodedRow, int]]:
    """What is left of a row below `min_length` or above `max_length` tokens.

    Returns:
        its parts, each with how many of its first tokens an earlier part holds.

    Raises:
        UserError: it is too long, and `overlong` is refuse.
    """
    size, max_length = len(row.input_ids), data.max_length
    if size < data.min_length:
        counts.notes[f"rows below {data.min_length} tokens, left out"] += 1
        counts.dropped += size
        return []
    if data.overlong == "refuse":
        raise UserError(
            f"{source}: {size} tokens, above --max_length {max_length}",
            "raise --max_length, or choose --overlong truncate or split",
        )
    counts.notes[f"rows above {max_length} tokens ({data.overlong})"] += 1
    if data.overlong == "drop":
        counts.dropped += size
        return []
    if data.overlong == "truncate":
        counts.dropped += size - max_length
        return [(_part(row, 0, max_length, 0), 0)]
    # A row that is split starts each further part with half a row of what came before, untrained.
    context = max_length // 2
    starts = range(0, size - context, max_length - context)
    shares = [(start, context if start else 0) for start in starts]
    return [(_part(row, start, start + max_length, repeated), repeated) for start, repeated in shares]


def _part(row: EncodedRow, start: int, stop: int, repeated: int) -> EncodedRow:
    """Tokens [start, stop) of a row, of which the first `repeated` are not trained."""
    ids, labels = row.input_ids[start:stop], row.labels[start + repeated : stop]
    weights = row.loss_weights
    if weights is not None:
        weights = [0.0] * repeated + weights[start + repeated : stop]
    return EncodedRow(ids, [IGNORE_INDEX] * repeated + labels, weights)
