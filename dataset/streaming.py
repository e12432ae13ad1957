"""Rows that are read, encoded and packed while the training runs, of sources that need not fit on a disk as tokens.

The stream of a run follows from its sources, weights and seed alone. It is cut into sections of `buffer_rows` rows,
which are encoded, packed and shuffled as a whole; a checkpoint holds where its section starts in the files.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy
from transformers import PreTrainedTokenizerBase

from dataset.encoded_rows import BLOCK_FEATURES, EncodedRows, EncodedTable, encode_block
from dataset.instructions import Instructions, load_instructions
from dataset.mix import check_figure, rows_by_source, weights_of
from dataset.records import RawRow
from dataset.sources import RowSource, find_row_sources
from dataset.token_cache import encoded_table
from novelgpt.settings.arguments import ConversationArguments, TrainArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.mix import parse_mix
from novelgpt.settings.process import is_first_process
from novelgpt.settings.terminal import counted
from novelgpt.text.origins import TracedRows
from novelgpt.text.packing import PackedRows
from novelgpt.text.sections import ROWS_STATE, SectionedRows
from novelgpt.text.statistics import TokenCounts, show_counts, show_first_row
from novelgpt.text.templates import record_thinking
from novelgpt.training.checkpoints.sampling import order_seed
from novelgpt.training.checkpoints.trainer import STATES

T = TypeVar("T")


@dataclass
class SourcePosition:
    """How far a source is read.

    Attributes:
        rows: of the current pass.
        size: bytes of these rows.
        pass_size: bytes of a pass: of the files, until the first pass has shown how much text they hold.
        passes: before the current one, by size.
    """

    rows: int = 0
    size: int = 0
    pass_size: int = 1
    passes: float = 0.0

    def progress(self) -> float:
        """Passes over the source so far."""
        return self.passes + self.size / self.pass_size


class InterleavedRows:
    """The rows of several sources, again and again, such that each is always as far as its weight says.

    Args:
        sources: of the rows.
        weights: passes over each, relative to the others; 0 leaves it out.
        positions: where to start; None for the start of all.
    """

    def __init__(
        self,
        sources: Sequence[RowSource],
        weights: Sequence[Fraction],
        positions: Sequence[SourcePosition] | None = None,
    ) -> None:
        self.sources = sources
        self._weights = [float(weight) for weight in weights]
        self._positions = [SourcePosition(**asdict(position)) for position in positions or _starts(sources)]
        self._rows: list[Iterator[RawRow] | None] = [None] * len(sources)

    def take(self, count: int) -> list[tuple[int, int, RawRow]]:
        """The next rows: (index of its source, its number there, row).

        Raises:
            UserError: what the sources raise, or one holds no rows.
        """
        return [self._take() for _ in range(count)]

    def positions(self) -> list[SourcePosition]:
        """Where the next row is."""
        return [SourcePosition(**asdict(position)) for position in self._positions]

    def _take(self) -> tuple[int, int, RawRow]:
        due = (
            (position.progress() / weight, index)
            for index, (position, weight) in enumerate(zip(self._positions, self._weights, strict=True))
            if weight
        )
        index = min(due)[1]
        position, source = self._positions[index], self.sources[index]
        rows = self._rows[index]
        if rows is None:
            rows = self._rows[index] = itertools.islice(_until_exit(source.rows()), position.rows, None)
        row = next(rows, None)
        if row is None:
            if not position.rows:
                raise UserError(f"{source.given} holds no rows", "leave it out, or write rows to it")
            position.passes += position.size / position.pass_size
            position.pass_size = position.size
            position.rows = position.size = 0
            self._rows[index] = None
            return self._take()
        position.rows += 1
        position.size += len(row.text.encode())
        return index, position.rows - 1, row


def _until_exit(rows: Iterable[T]) -> Iterator[T]:
    """The rows, for a thread that ends with the main one: Python waits for it before the process exits."""
    for row in rows:
        if not threading.main_thread().is_alive():
            sys.exit()
        yield row


def _starts(sources: Sequence[RowSource]) -> list[SourcePosition]:
    """The start of each source, with the bytes of its files; equal ones where files are elsewhere."""
    sizes = [[Path(file).stat().st_size for file in source.files if Path(file).is_file()] for source in sources]
    known = all(len(size) == len(source.files) for size, source in zip(sizes, sources, strict=True))
    return [SourcePosition(pass_size=max(1, sum(size)) if known else 1 << 30) for size in sizes]


class StreamedRows(SectionedRows):
    """Rows, or packs of them, of sources that are read as the training goes on.

    The next section is made in another thread while one is trained.

    Args:
        sources: of the rows.
        weights: passes over each, relative to the others.
        tokenizer: of the model.
        data: how rows are read, cut and packed.
        instructions: wordings of rows that name a task.
        seed: of the order within sections.
        per_epoch: rows of the whole run.
        state: of `state`, to resume; None for the start.

    Attributes:
        lengths: [len(self)] tokens of each row or pack of the first section of this process.
        table: of that section.
        thinking: whether most answers of the first section of the run begin with a thought.
    """

    def __init__(
        self,
        sources: Sequence[RowSource],
        weights: Sequence[Fraction],
        tokenizer: PreTrainedTokenizerBase,
        data: ConversationArguments,
        instructions: Instructions,
        seed: int,
        per_epoch: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(seed)
        self.per_epoch = per_epoch
        self._sources, self._weights = sources, weights
        self._tokenizer, self._data, self._instructions = tokenizer, data, instructions
        first = 0 if state is None else int(state["section"])
        positions = None if state is None else [SourcePosition(**position) for position in state["positions"]]
        self._positions = {first: positions or _starts(sources)}
        self.starts = [(0 if state is None else int(state["start"]), first)]
        self._reader: tuple[int, InterleavedRows] | None = None  # the section that it reads next
        # Sums over the rows before each section that is known, without their lengths, whose number has no bound.
        self._counts = {first: TokenCounts() if state is None else _counts_of(state["counts"])}
        self._reading = threading.Lock()
        self._coming: tuple[int, Future[tuple[EncodedTable, TracedRows]]] | None = None
        rows, order = self.section(first)
        self.lengths = rows.lengths[order]
        if state is None:
            answers, thoughts = (int(self.table.values(column).sum()) for column in ("answers", "thoughts"))
            self.thinking = 2 * thoughts > answers
        else:
            self.thinking = bool(state["thinking"])

    def make(self, section: int) -> TracedRows:
        """The rows or packs of a section.

        Raises:
            UserError: a row cannot be read or encoded, or none has anything to train.
        """
        if self._coming is None or self._coming[0] != section:
            self._coming = section, self._start(section)
        table, rows = self._coming[1].result()
        if not self._made:
            self.table = table
        sums = self._counts[section] + table.counts(numpy.arange(len(table.lengths)))
        self._counts[section + 1] = replace(sums, lengths=TokenCounts().lengths)
        if self.start_of(section) + len(rows) < self.per_epoch:
            self._coming = section + 1, self._start(section + 1)
        return rows

    def state(self, number: int) -> dict[str, Any]:
        """What a run needs to go on with a number, which lies in a section that is or was made, or in the next one."""
        section, start = self.position(number)
        positions = [asdict(position) for position in self._positions[section]]
        counts = {name: value for name, value in vars(self._counts[section]).items() if name != "lengths"}
        return {
            "section": section, "start": start, "positions": positions, "thinking": self.thinking, "counts": counts
        }  # fmt: skip

    def counts(self) -> TokenCounts:
        """Counts of the rows of all sections that the run has made so far, without their lengths."""
        return self._counts[max(self._counts)]

    def _start(self, section: int) -> Future[tuple[EncodedTable, TracedRows]]:
        """Start to read a section, in a thread of its own; one at a time reads."""
        made: Future[tuple[EncodedTable, TracedRows]] = Future()

        def read() -> None:
            try:
                with self._reading:
                    made.set_result(self._read(section))
            except BaseException as error:  # told where the section is needed
                made.set_exception(error)

        threading.Thread(target=read, name="stream").start()
        return made

    def _read(self, section: int) -> tuple[EncodedTable, TracedRows]:
        """Read, encode and pack a section, whose start in the files is known."""
        if self._reader is None or self._reader[0] != section:
            self._reader = section, InterleavedRows(self._sources, self._weights, self._positions[section])
        reader = self._reader[1]
        taken = reader.take(self._data.buffer_rows)
        self._reader = section + 1, reader
        self._positions[section + 1] = reader.positions()
        blocks: list[dict[str, Any]] = [{name: [[]] for name in BLOCK_FEATURES} for _ in self._sources]
        for index, number, row in taken:
            for column, value in zip(blocks[index].values(), (number, row.file, row.place, row.text), strict=True):
                column[0].append(value)
        table = EncodedTable([
            datasets.table.InMemoryTable(encode_block(
                block | {"row": [_until_exit(block["row"][0])]}, source, self._tokenizer, self._data, self._instructions
            ))
            for block, source in zip(blocks, self._sources, strict=True)
        ])  # fmt: skip
        encoded = EncodedRows(table, numpy.arange(len(table.lengths)), self._sources)
        if not len(encoded):
            first, last = (
                f"{self._sources[index].files[row.file]}{row.place}" for index, _, row in (taken[0], taken[-1])
            )
            raise UserError(f"no trainable token is left in the {counted(len(taken), 'row')} from {first} to {last}",
                            "raise --max_length or --buffer_rows, or bring rows with answers")  # fmt: skip
        return table, PackedRows(encoded, self._data.max_length) if self._data.packing else encoded


def _counts_of(stored: dict[str, Any]) -> TokenCounts:
    """Counts as a checkpoint holds them."""
    return TokenCounts(**stored | {"notes": Counter(stored["notes"])})


def stream_conversations(
    data: ConversationArguments, tokenizer: PreTrainedTokenizerBase, training: TrainArguments
) -> tuple[StreamedRows, TracedRows]:
    """Training rows that are read as the training goes on, and validation rows; packed if asked.

    The tokenizer records whether most answers of the first section begin with a thought.

    Args:
        data: files, weights, and how rows are read.
        tokenizer: of the model.
        training: its length, its seed, and the checkpoint that it resumes from.

    Raises:
        UserError: what the readers raise, parts of files are named, or no trainable token is left.
    """
    sources = find_row_sources(data.train_files, data.dataset, data.dataset_dir, data.columns, data.max_rows)
    weights = weights_of(sources, parse_mix(data.mix))
    part = next((source.given for source in sources if source.part is not None), None)
    if part is not None:
        raise UserError(f"--streaming cannot draw {part}, as the number of its rows is unknown", "take the whole file")
    instructions = load_instructions(data.instruction_templates, data.instruction_seed)
    state = None
    if training.resume_from_checkpoint is not None:
        states = Path(training.resume_from_checkpoint, STATES)
        state = json.loads(states.read_text(encoding="utf-8"))[ROWS_STATE]
    per_batch = training.per_device_train_batch_size * training.world_size
    rows = training.max_steps * training.gradient_accumulation_steps * per_batch
    train = StreamedRows(sources, weights, tokenizer, data, instructions, order_seed(training), rows, state)
    record_thinking(tokenizer, train.thinking)
    further = find_row_sources(data.valid_files, data.eval_dataset, data.dataset_dir, data.columns)
    table = EncodedTable([encoded_table(source, tokenizer, data, instructions.fixed()) for source in further])
    valid = EncodedRows(table, numpy.arange(len(table.lengths)), further)
    if not len(valid):
        raise UserError("no trainable token is left in the validation rows", "raise --max_length, or bring others")
    if is_first_process():
        buffered = f"train: {'the first' if state is None else 'the next'} {counted(data.buffer_rows, 'row')}"
        columns = {buffered: train.table, "valid": table}
        show_counts({name: one.counts(numpy.arange(len(one.lengths))) for name, one in columns.items()})
        show_first_row(train, tokenizer)
    if data.mix:
        by_source = rows_by_source(valid, data)
        check_figure(training.metric_for_best_model, by_source.names)
        return train, by_source
    return train, PackedRows(valid, data.max_length) if data.packing else valid
