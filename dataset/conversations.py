"""Conversation files to encoded rows, for supervised fine-tuning."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dataset.instructions import load_instructions
from dataset.readers import Record, read_conversation_rows, read_unworded_rows, word_row
from novelgpt.settings.arguments import ConversationArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.process import is_first_process
from novelgpt.settings.terminal import counted, say
from novelgpt.text.conversation import IGNORE_INDEX, EncodedRow, encode_conversation, record_answers
from novelgpt.text.messages import Message, is_empty_answer
from novelgpt.text.origins import TracedRows
from novelgpt.text.packing import PackedRows
from novelgpt.text.statistics import TokenCounts, show_counts, show_row

SPLIT_SEED = 42


class EncodedRows(TracedRows):
    """Encoded conversations, in memory."""

    def __init__(self, rows: Sequence[EncodedRow]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """{"input_ids", "labels"}, each [tokens]."""
        return {"input_ids": self.rows[index].input_ids, "labels": self.rows[index].labels}

    def origins(self, index: int, begin: int = 0, end: int | None = None) -> list[str]:
        """The file and row."""
        return [self.rows[index].source] if self.rows[index].source else []


def read_conversations(
    data: ConversationArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[EncodedRows | PackedRows, EncodedRows | PackedRows]:
    """Rows to train on and rows to evaluate on, packed if asked, with a table of what became of them.

    Raises:
        UserError: what `read_conversation_rows` raises, an over-long row under `refuse`, or no trainable token left.
    """
    if data.max_length < 2:
        raise UserError(f"--max_length {data.max_length} leaves no token to predict", "take at least 2")
    train, valid = _read_rows(data)
    record_answers((row["messages"] for row in train), tokenizer)
    encoded = {}
    counts = {}
    for name, rows in (("train", train), ("valid", valid)):
        encoded[name], counts[name] = encode_rows(rows, tokenizer, data)
        if not counts[name].trained:
            raise _nothing_to_train(name, len(rows), counts[name], data.max_length)
    if is_first_process():
        show_counts(counts)
        first = encoded["train"][0]
        show_row(first.input_ids, first.labels, tokenizer)
    if not data.packing:
        return EncodedRows(encoded["train"]), EncodedRows(encoded["valid"])
    train_packs, valid_packs = (PackedRows(encoded[name], data.max_length) for name in ("train", "valid"))
    if is_first_process():
        say(
            f"{counted(len(train_packs.rows), 'row')} in {counted(len(train_packs), 'pack')} of "
            f"{data.max_length:,} tokens, {train_packs.fill():.1%} full: "
            f"{len(train_packs.rows) / len(train_packs):.1f} rows a pack",
            "",
        )
    return train_packs, valid_packs


def _nothing_to_train(name: str, rows: int, counts: TokenCounts, max_length: int) -> UserError:
    """Why no token of a data set is trained: its rows are cut before their answers, or hold none to train."""
    cause = f"no trainable token is left in the {counted(rows, f'{name} row')} within --max_length {max_length}"
    if any(note.startswith("rows above") for note in counts.notes):
        return UserError(cause, "raise --max_length, or bring rows with answers")
    noted = "; ".join(f"{number:,} {note}" for note, number in counts.notes.items())
    return UserError(f"{cause}: {noted}", "bring rows with answers to train on")


def _read_rows(data: ConversationArguments) -> tuple[list[Record], list[Record]]:
    """Rows to train on, each in a wording drawn for it, and rows to evaluate on, in the first wording of their task."""
    drawn = load_instructions(data.instruction_templates, data.instruction_seed)
    rows = [row for file in data.train_files for row in read_unworded_rows(Path(file))]
    if data.valid_files:
        train = [word_row(row, drawn) for row in rows]
        return train, [row for file in data.valid_files for row in read_conversation_rows(Path(file), drawn.fixed())]
    kept = math.ceil(len(rows) * data.valid_fraction)
    if not 0 < kept < len(rows):
        for row in rows:
            word_row(row, drawn)  # what is wrong in a row is to be mended first
        raise UserError(
            f"{counted(len(rows), 'row')} cannot be split into training and evaluation "
            f"with --valid_fraction {data.valid_fraction}",
            "name --valid_files or bring more rows",
        )
    order = list(range(len(rows)))
    random.Random(SPLIT_SEED).shuffle(order)
    held_out = set(order[:kept])
    # In the order of the files, so that what is wrong is told of the first row that has it.
    worded = [word_row(row, drawn.fixed() if number in held_out else drawn) for number, row in enumerate(rows)]
    return [worded[number] for number in order[kept:]], [worded[number] for number in order[:kept]]


def encode_rows(
    rows: list[Record], tokenizer: PreTrainedTokenizerBase, data: ConversationArguments
) -> tuple[list[EncodedRow], TokenCounts]:
    """Rows of at most `max_length` tokens, each with something to train, and the count of what happened to the rest."""
    kept: list[EncodedRow] = []
    counts = TokenCounts()
    for row in rows:
        messages = row["messages"]
        while messages and messages[0]["role"] == "assistant":
            messages = messages[1:]
            counts.notes["answers before any question, left out"] += 1
        try:
            pieces = encode_conversation(messages, tokenizer, row.get("tools", ()))
        except UserError as error:
            raise UserError(f"{row['source']}: {error.cause}", error.remedy) from error
        _note_untrained(messages, counts)
        if not pieces:
            counts.notes["rows without an answer, left out"] += 1
        elif messages[-1]["role"] != "assistant":
            counts.notes["rows whose last messages have no answer, which were left out"] += 1
        known = len(kept)
        for piece in pieces:
            counts.tokens_in += len(piece.input_ids)
            if len(piece.input_ids) <= data.max_length:
                _keep(piece, kept, counts)
                continue
            if data.overlong == "refuse":
                raise UserError(
                    f"{row['source']}: {len(piece.input_ids)} tokens, above --max_length {data.max_length}",
                    "raise --max_length, or choose --overlong truncate or split",
                )
            counts.notes[f"rows above {data.max_length} tokens ({data.overlong})"] += 1
            if data.overlong == "truncate":
                counts.dropped += len(piece.input_ids) - data.max_length
                _keep(EncodedRow(piece.input_ids[: data.max_length], piece.labels[: data.max_length]), kept, counts)
            else:
                _keep_split(piece, data.max_length, kept, counts)
        for made in kept[known:]:
            made.source = row["source"]
    return kept, counts


def _note_untrained(messages: list[Message], counts: TokenCounts) -> None:
    for message in messages:
        if message["role"] == "assistant" and not message.get("trained", True):
            empty = is_empty_answer(message)
            counts.notes["empty answers, not trained" if empty else "answers that a flag keeps out of the loss"] += 1


def _keep(row: EncodedRow, kept: list[EncodedRow], counts: TokenCounts, repeated: int = 0) -> None:
    """Keep a row that has something to train; its first `repeated` tokens were counted before."""
    trained = sum(label != IGNORE_INDEX for label in row.labels)
    if trained == 0:
        counts.notes["rows without a trainable token, left out"] += 1
        counts.dropped += len(row.input_ids) - repeated
        return
    kept.append(row)
    counts.rows += 1
    counts.trained += trained
    counts.context += len(row.input_ids) - repeated - trained
    counts.lengths.append(len(row.input_ids))


def _keep_split(row: EncodedRow, max_length: int, kept: list[EncodedRow], counts: TokenCounts) -> None:
    """Cut a row into several; each but the first starts with half a row of what came before, untrained."""
    context = max_length // 2
    end = 0
    while end < len(row.input_ids):
        begin = max(0, end - context)
        stop = min(begin + max_length, len(row.input_ids))
        labels = [IGNORE_INDEX] * (end - begin) + row.labels[end:stop]
        _keep(EncodedRow(row.input_ids[begin:stop], labels), kept, counts, repeated=end - begin)
        end = stop
