"""Conversation files to encoded rows, for supervised fine-tuning (SFT)."""

from __future__ import annotations

import itertools
import math
import random
from array import array
from fractions import Fraction
from typing import NamedTuple

import numpy
from transformers import PreTrainedTokenizerBase

from dataset.encoded_rows import EncodedRows, EncodedTable
from dataset.instructions import load_instructions
from dataset.mix import mix_sources, show_source_table
from dataset.sources import RowSource, find_row_sources
from dataset.streaming import stream_conversations
from dataset.token_cache import encoded_table
from novelgpt.settings.arguments import ConversationArguments, TrainArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.process import is_first_process
from novelgpt.settings.terminal import counted, say
from novelgpt.text.origins import TracedRows
from novelgpt.text.packing import PackedRows
from novelgpt.text.statistics import TokenCounts, show_counts, show_first_row
from novelgpt.text.templates import record_thinking

SPLIT_SEED = 42


class _Rows(NamedTuple):
    """Encoded rows, and which of them are for what.

    Attributes:
        table: of all sources, one after the other.
        sources: of each part of the table.
        named: those of `train_files`.
        train: numbers of the training rows, in order (see `EncodedTable`).
        valid: of the validation rows.
    """

    table: EncodedTable
    sources: list[RowSource]
    named: list[RowSource]
    train: numpy.ndarray
    valid: numpy.ndarray


def read_conversations(
    data: ConversationArguments, tokenizer: PreTrainedTokenizerBase, training: TrainArguments | None = None
) -> tuple[TracedRows, TracedRows]:
    """Training and validation rows, packed if asked, with a table of what became of them.

    Training rows draw their wordings; validation rows take the first wording of their task. The tokenizer records
    whether most answers of the training rows begin with a thought.

    Args:
        data: the files, and how they are read.
        tokenizer: of the model.
        training: how long, and from which seed; for a mix of sources and a stream.

    Raises:
        UserError: what the readers raise, an over-long row under `refuse`, or no trainable token left.
    """
    if data.max_length < 2:
        raise UserError(f"--max_length {data.max_length} leaves no token to predict", "take at least 2")
    if data.min_length > data.max_length:
        raise UserError(f"--min_length {data.min_length} is above --max_length {data.max_length}", "lower it")
    if data.streaming:
        return stream_conversations(data, tokenizer, training or TrainArguments())
    rows = _encode_rows(data, tokenizer)
    encoded, counts = {}, {}
    for name, numbers in (("train", rows.train), ("valid", rows.valid)):
        parts = rows.table.parts(numbers)
        counts[name] = rows.table.counts(parts)
        if not counts[name].trained:
            raise _nothing_to_train(name, len(numbers), counts[name], data.max_length)
        if name == "train":
            answers, thoughts = (int(rows.table.values(column)[parts].sum()) for column in ("answers", "thoughts"))
            record_thinking(tokenizer, 2 * thoughts > answers)
        encoded[name] = EncodedRows(rows.table, parts, rows.sources)
    if is_first_process():
        show_counts(counts)
        show_first_row(encoded["train"], tokenizer)
    if data.mix:
        return mix_sources(encoded["train"], encoded["valid"], rows.named, data, training or TrainArguments())
    train, valid = (
        PackedRows(encoded[name], data.max_length) if data.packing else encoded[name] for name in ("train", "valid")
    )
    if is_first_process():
        if training is not None and len(rows.named) > 1:
            once = [Fraction(1)] * len(rows.named)
            show_source_table(encoded["train"], rows.named, once, len(train), training)
        if isinstance(train, PackedRows):
            say(
                f"{counted(len(train.rows), 'row')} in {counted(len(train), 'pack')} of {data.max_length:,} tokens, "
                f"{train.fill():.1%} full: {len(train.rows) / len(train):.1f} rows per pack",
                "",
            )
    return train, valid


def _encode_rows(data: ConversationArguments, tokenizer: PreTrainedTokenizerBase) -> _Rows:
    """Encode the rows of all sources, and divide them into training and validation rows."""
    drawn = load_instructions(data.instruction_templates, data.instruction_seed)
    fixed = drawn.fixed()
    sources = find_row_sources(data.train_files, data.dataset, data.dataset_dir, data.columns, data.max_rows)
    table = EncodedTable([encoded_table(source, tokenizer, data, drawn) for source in sources])
    count = table.read_rows
    if data.valid_files or data.eval_dataset:
        further = find_row_sources(data.valid_files, data.eval_dataset, data.dataset_dir, data.columns)
        table = table.extended([encoded_table(source, tokenizer, data, fixed) for source in further])
        return _Rows(table, [*sources, *further], sources, numpy.arange(count), numpy.arange(count, table.read_rows))
    # Of a mix, the loss is told for each source, and a part of each is held out.
    ends = table.read_ends if data.mix else numpy.array([count])
    split = [_split(*part, data.valid_fraction) for part in itertools.pairwise([0, *ends.tolist()])]
    valid, train = (numpy.concatenate(parts) for parts in zip(*split, strict=True))
    # Held-out rows that drew a wording are encoded once more, with the first one.
    worded = numpy.sort(valid[table.values("worded")[table.first[valid]]])
    of_source = numpy.split(worded, numpy.searchsorted(worded, table.read_ends[:-1]))
    begins = [0, *table.read_ends[:-1].tolist()]
    again = [(source, own - begin) for source, own, begin in zip(sources, of_source, begins, strict=True) if len(own)]
    table = table.extended([encoded_table(source, tokenizer, data, fixed, numbers) for source, numbers in again])
    renumbered = numpy.arange(count)
    renumbered[worded] = count + numpy.arange(len(worded))
    return _Rows(table, [*sources, *(source for source, _ in again)], sources, train, renumbered[valid])


def _split(begin: int, end: int, fraction: float) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Rows [begin, end) in validation rows, a fraction of them, and training rows; both in random order."""
    held_out = math.ceil((end - begin) * fraction)
    if not 0 < held_out < end - begin:
        raise UserError(
            f"{counted(end - begin, 'row')} cannot be split into training and validation "
            f"with --valid_fraction {fraction}",
            "name --valid_files or bring more rows",
        )
    order = array("q", range(begin, end))
    random.Random(SPLIT_SEED).shuffle(order)
    held, rest = numpy.split(numpy.frombuffer(order, numpy.int64), [held_out])
    return held, rest


def _nothing_to_train(name: str, rows: int, counts: TokenCounts, max_length: int) -> UserError:
    """Why no token of a data set is trained: its rows are cut before their answers, or have none to train."""
    cause = f"no trainable token is left in the {counted(rows, f'{name} row')} within --max_length {max_length}"
    if any(note.startswith("rows above") for note in counts.notes):
        return UserError(cause, "raise --max_length, or bring rows with answers")
    if any(note.startswith("rows below") for note in counts.notes):
        return UserError(cause, "lower --min_length, or bring rows with answers")
    noted = "; ".join(f"{number:,} {note}" for note, number in counts.notes.items())
    return UserError(f"{cause}: {noted}" if noted else cause, "bring rows with answers to train on")
