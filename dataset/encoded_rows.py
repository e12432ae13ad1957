"""Encoded conversation rows in Arrow tables: how they are made, block by block, and how training reads them.

A row of a file becomes one or more neighbouring rows of the table: one as a rule, one for each answer where the
template rewrites earlier turns, several where a long row is split. A row that training leaves out has no tokens there,
and keeps what is counted of it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets.table
import numpy
import pyarrow
import pyarrow.compute
from transformers import PreTrainedTokenizerBase

from dataset.instructions import Instructions
from dataset.readers import Conversation, SourceRow, make_source_row, read_conversation
from dataset.records import load_json, not_a_mapping
from dataset.sources import RowSource
from novelgpt.settings.arguments import ConversationArguments
from novelgpt.settings.errors import UserError
from novelgpt.text.conversation import IGNORE_INDEX, EncodedRow, encode_conversation
from novelgpt.text.messages import OWN_THOUGHT, is_empty_answer
from novelgpt.text.origins import TracedRows
from novelgpt.text.statistics import TokenCounts

TOKENS = pyarrow.list_(pyarrow.int32())
SCHEMA = pyarrow.schema({
    # Of the row that was read: its number in its source, the index of its file there, and its place in that file.
    "row": pyarrow.int64(), "file": pyarrow.int32(), "place": pyarrow.string(),
    # What training reads; weights only where one is neither 0 nor 1.
    "input_ids": TOKENS, "labels": TOKENS, "loss_weights": pyarrow.list_(pyarrow.float32()),
    # What is counted; of several parts of one row, the first has what concerns the whole row.
    "trained": pyarrow.int32(), "tokens_in": pyarrow.int32(), "dropped": pyarrow.int32(),
    "answers": pyarrow.int32(), "thoughts": pyarrow.int32(), "notes": pyarrow.list_(pyarrow.string()),
    # Whether its messages may depend on the choice of an instruction template.
    "worded": pyarrow.bool_(),
})  # fmt: skip
# Neighbouring rows of a source, not parsed: what a process encodes at once, and one batch of the table.
BLOCK_FEATURES = datasets.Features({
    "row": datasets.List(datasets.Value("int64")), "file": datasets.List(datasets.Value("int32")),
    "place": datasets.List(datasets.Value("string")), "text": datasets.List(datasets.Value("large_string")),
})  # fmt: skip
BLOCK_CHARACTERS, BLOCK_ROWS = 2**18, 4096
# What training reads, and as what.
TYPES = {"input_ids": numpy.int64, "labels": numpy.int64, "loss_weights": numpy.float32}


@dataclass
class EncodedPart:
    """What becomes of one encoded row, or of a part of it, within `max_length` tokens.

    Attributes:
        row: its tokens and labels, of which some are trained; none where it is left out.
        trained: number of tokens with a label.
        tokens_in: tokens of the encoded row before it was cut, with the first of its parts.
        dropped: those of them that training never sees.
        notes: what is to be counted, in words.
    """

    row: EncodedRow = field(default_factory=lambda: EncodedRow([], []))
    trained: int = 0
    tokens_in: int = 0
    dropped: int = 0
    notes: list[str] = field(default_factory=list)


def encode_row(row: Conversation, tokenizer: PreTrainedTokenizerBase, data: ConversationArguments) -> list[EncodedPart]:
    """The parts of a conversation, at least one, of at most `max_length` tokens each.

    Raises:
        UserError: what `encode_conversation` raises, or an over-long row under `refuse`; names file and row.
    """
    messages, notes = row["messages"], []
    while messages and messages[0]["role"] == "assistant":
        messages = messages[1:]
        notes.append("answers before any question, left out")
    for message in messages:
        if message["role"] == "assistant" and message.get("weight") == 0:
            flagged = "answers that a flag keeps out of the loss"
            notes.append("empty answers, not trained" if is_empty_answer(message) else flagged)
    if data.mask_history:
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        masked = {number for number in turns[:-1] if messages[number].get("weight") != 0}
        messages = [{**one, "weight": 0.0} if number in masked else one for number, one in enumerate(messages)]
        notes += ["answers before the last one, not trained (mask_history)"] * len(masked)
    try:
        encoded = encode_conversation(messages, tokenizer, row.get("tools", ()))
    except UserError as error:
        raise UserError(f"{row['source']}: {error.cause}", error.remedy) from error
    if not encoded:
        notes.append("rows without an answer, left out")
    elif messages[-1]["role"] != "assistant":
        notes.append("rows whose last messages have no answer, which were left out")
    parts: list[EncodedPart] = []
    for whole in encoded:
        size, trained = len(whole.input_ids), len(whole.labels) - whole.labels.count(IGNORE_INDEX)
        if trained and data.min_length <= size <= data.max_length:
            parts.append(EncodedPart(whole, trained, size))
        else:
            parts += _fit(whole, row["source"], data)
    parts = parts or [EncodedPart()]
    parts[0].notes[:0] = notes
    return parts


def _fit(row: EncodedRow, source: str, data: ConversationArguments) -> list[EncodedPart]:
    """What is left of a row outside `min_length` and `max_length` tokens, or without a trained one.

    Parts that are left out are empty; the first has what is counted of the whole row.
    """
    size, max_length, notes = len(row.input_ids), data.max_length, []
    spans = [(0, size, 0)]  # tokens [start, stop), and how many of them an earlier part has counted
    if size < data.min_length:
        notes, spans = [f"rows below {data.min_length} tokens, left out"], []
    elif size > max_length:
        notes = [f"rows above {max_length} tokens ({data.overlong})"]
        if data.overlong == "refuse":
            raise UserError(
                f"{source}: {size} tokens, above --max_length {max_length}",
                "raise --max_length, or choose --overlong truncate or split",
            )
        # Each further part of a row that is split starts with half a row of what came before, untrained.
        context = max_length // 2
        starts = range(0, size - context, max_length - context)
        splits = [(start, min(start + max_length, size), context if start else 0) for start in starts]
        spans = {"truncate": [(0, max_length, 0)], "drop": [], "split": splits}[data.overlong]
    fitted, dropped = [], size
    for start, stop, repeated in spans:
        labels = [IGNORE_INDEX] * repeated + row.labels[start + repeated : stop]
        weights = row.loss_weights and [0.0] * repeated + row.loss_weights[start + repeated : stop]
        trained = len(labels) - labels.count(IGNORE_INDEX)
        if trained:
            fitted.append(EncodedPart(EncodedRow(row.input_ids[start:stop], labels, weights), trained))
            dropped -= stop - start - repeated
        else:
            fitted.append(EncodedPart(notes=["rows without a trainable token, left out"]))
    fitted = fitted or [EncodedPart()]
    fitted[0].tokens_in, fitted[0].dropped = size, dropped
    fitted[0].notes[:0] = notes
    return fitted


def read_blocks(source: RowSource, wanted: set[int] | None = None) -> Iterator[dict[str, list[Any]]]:
    """The rows of a source, not parsed, in blocks of BLOCK_FEATURES: at least one, which may be empty.

    Args:
        source: of the rows.
        wanted: numbers of the rows to take; None for all.

    Raises:
        UserError: what `RowSource.rows` raises.
    """
    block: dict[str, list[Any]] = {name: [] for name in BLOCK_FEATURES}
    characters = blocks = 0
    for number, row in enumerate(source.rows()):
        if wanted is not None and number not in wanted:
            continue
        for values, value in zip(block.values(), (number, row.file, row.place, row.text), strict=True):
            values.append(value)
        characters += len(row.text)
        if characters >= BLOCK_CHARACTERS or len(block["row"]) == BLOCK_ROWS:
            yield block
            block = {name: [] for name in BLOCK_FEATURES}
            characters, blocks = 0, blocks + 1
    if block["row"] or not blocks:  # the library refuses data of no blocks
        yield block


def encode_block(
    block: dict[str, Any],
    source: RowSource,
    tokenizer: PreTrainedTokenizerBase,
    data: ConversationArguments,
    instructions: Instructions,
    stop: Path | None = None,
) -> pyarrow.Table:
    """Encode rows of a source, in any process.

    Args:
        block: of `read_blocks`, as `datasets.Dataset.map` gives it in a batch of one: [1] lists of each column.
        source: of the rows.
        tokenizer: of the model.
        data: how rows are read and cut.
        instructions: wordings of rows that name a task.
        stop: a file that a process makes when it meets an error, so that the others need not reach their end.

    Returns:
        A table of SCHEMA, empty once there is `stop`.

    Raises:
        UserError: a row cannot be read or encoded; names its file and place.
    """
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    rows = zip(*(block[name][0] for name in BLOCK_FEATURES), strict=True)
    try:
        for number, file, place, text in rows if stop is None or not stop.exists() else ():
            where = f"{source.files[file]}{place}"
            record = load_json(text, where)
            if not isinstance(record, dict):
                raise not_a_mapping(record, where)
            if source.columns is not None:
                record = source.columns.record(record, where)
            row = SourceRow(where, record, where)
            if "\\r" in text or "\\u000" in text:  # line ends in JSON
                row = make_source_row(record, where, where)
            conversation = read_conversation(row, instructions)
            answers = [message for message in conversation["messages"] if message["role"] == "assistant"]
            thoughts = sum(1 for one in answers if one.get("reasoning_content") or OWN_THOUGHT.match(one["content"]))
            said = len(answers), thoughts
            for part in encode_row(conversation, tokenizer, data):
                of_table = (number, file, place, part.row.input_ids, part.row.labels, part.row.loss_weights,
                            part.trained, part.tokens_in, part.dropped, *said, part.notes,
                            "task" in record or "title" in record)  # fmt: skip
                said = 0, 0
                for column, value in zip(columns.values(), of_table, strict=True):
                    column.append(value)
    except Exception:
        if stop is not None:
            stop.touch()
        raise
    return pyarrow.table(columns, schema=SCHEMA)


def encode_rows(
    rows: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, data: ConversationArguments
) -> tuple[list[EncodedRow], TokenCounts]:
    """A few conversations in memory: rows that have something to train, and what is counted of all (for previews)."""
    kept: list[EncodedRow] = []
    counts = TokenCounts()
    for row in rows:
        for part in encode_row(row, tokenizer, data):
            if part.row.input_ids:
                part.row.source = row["source"]
                kept.append(part.row)
            counts.trained += part.trained
            counts.tokens_in += part.tokens_in
            counts.dropped += part.dropped
            counts.notes.update(part.notes)
    counts.rows, counts.lengths = len(kept), numpy.array([len(row.input_ids) for row in kept], numpy.int64)
    counts.context = counts.tokens_in - counts.trained - counts.dropped
    return kept, counts


class EncodedTable:
    """The encoded rows of several sources, one after the other, mapped from disk.

    Rows that were read are numbered over all sources; each is one or several neighbouring rows of the table.

    Args:
        tables: of SCHEMA, one for each source.

    Attributes:
        rows: the tables as one.
        ends: [sources] int64, where each source ends in the table.
        read_ends: [sources] int64, where it ends in the rows that were read.
        first: [rows read + 1] int64, where each begins in the table.
        lengths: [rows of the table] int32, tokens.
    """

    def __init__(self, tables: Sequence[datasets.table.Table]) -> None:
        self.tables = list(tables)
        self.rows = datasets.table.concat_tables(self.tables)
        self.ends = numpy.cumsum([len(table) for table in tables], dtype=numpy.int64)
        numbers = self.values("row")
        begins = numpy.diff(numbers, prepend=-1) != 0
        begins[self.ends[:-1][self.ends[:-1] < len(numbers)]] = True  # two sources may have one row each
        self.first = numpy.append(numpy.flatnonzero(begins), len(numbers))
        self.read_ends = numpy.searchsorted(self.first, self.ends)
        column = self.rows.column("input_ids")
        self.lengths = pyarrow.compute.list_value_length(column).to_numpy()

    @property
    def read_rows(self) -> int:
        """Number of rows that were read."""
        return len(self.first) - 1

    def extended(self, tables: Sequence[datasets.table.Table]) -> EncodedTable:
        """This table with further sources behind it."""
        return EncodedTable([*self.tables, *tables]) if tables else self

    def values(self, name: str) -> numpy.ndarray:
        """[rows of the table] values of a column."""
        return self.rows.column(name).to_numpy()

    def parts(self, numbers: numpy.ndarray) -> numpy.ndarray:
        """Rows of the table that were made of the rows with these numbers, in their order."""
        begins, counts = self.first[numbers], self.first[numbers + 1] - self.first[numbers]
        offsets = numpy.arange(counts.sum()) - numpy.repeat(numpy.cumsum(counts) - counts, counts)
        return numpy.repeat(begins, counts) + offsets

    def counts(self, parts: numpy.ndarray) -> TokenCounts:
        """Counts over rows of the table."""
        lengths = self.lengths[parts]
        kept = lengths[lengths > 0]
        tokens_in, trained, dropped = (
            int(self.values(name)[parts].sum(dtype=numpy.int64)) for name in ("tokens_in", "trained", "dropped")
        )
        notes = self.rows.column("notes").take(pyarrow.array(parts))
        return TokenCounts(
            rows=len(kept), tokens_in=tokens_in, trained=trained, context=tokens_in - trained - dropped,
            dropped=dropped, lengths=kept, notes=Counter(pyarrow.compute.list_flatten(notes).to_pylist()),
        )  # fmt: skip


class EncodedRows(TracedRows):
    """Rows of a table, in any order, those without tokens left out; only what is asked for is read.

    In memory are 8 bytes of each row: the arrays of the table are not kept.

    Args:
        table: of all sources.
        parts: rows of the table.
        sources: those of the table.

    Attributes:
        rows: the table, mapped.
        parts: [rows] unsigned integers, rows of the table.
        lengths: [rows] int32, tokens.
    """

    def __init__(self, table: EncodedTable, parts: numpy.ndarray, sources: Sequence[RowSource]) -> None:
        self.rows, self.sources = table.rows, sources
        self._ends = table.ends
        self.parts = parts[table.lengths[parts] > 0].astype(numpy.min_scalar_type(len(table.lengths)))
        self.lengths = table.lengths[self.parts]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> dict[str, numpy.ndarray]:
        """{"input_ids", "labels"}, each [tokens] int64, and, of a weighted row, "loss_weights", [tokens] float32."""
        row = self.rows.fast_slice(int(self.parts[index]), 1)
        columns = {name: row.column(name).chunk(0) for name in TYPES}
        return {
            name: column.flatten().to_numpy().astype(TYPES[name])  # a copy: the file is mapped to be read only
            for name, column in columns.items()
            if not column.null_count
        }

    def source_numbers(self) -> numpy.ndarray:
        """[rows] indices in `sources`."""
        return numpy.searchsorted(self._ends, self.parts, side="right")

    def trained_tokens(self) -> numpy.ndarray:
        """[rows] int32, tokens with a label."""
        return self.rows.column("trained").to_numpy()[self.parts]

    def subset(self, numbers: numpy.ndarray) -> EncodedRows:
        """These rows, in this order."""
        part = copy.copy(self)
        part.parts, part.lengths = self.parts[numbers], self.lengths[numbers]
        return part

    def origins(self, index: int, begin: int = 0, end: int | None = None) -> list[str]:
        """The file and row."""
        part = int(self.parts[index])
        source = self.sources[int(numpy.searchsorted(self._ends, part, side="right"))]
        row = self.rows.fast_slice(part, 1)
        return [f"{source.files[row.column('file')[0].as_py()]}{row.column('place')[0].as_py()}"]
