"""Scores of many rows as columns of numbers on disk, of which overall scores are the sums.

Memory does not grow with the scores: rows are appended to a temporary file block by block, and columns are made of it
in a second one, which is mapped. Both lose their names when they are made, so that not even a kill leaves them behind.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from novelgpt.scoring.row_scores import RowScores

NATS = "reference_nats"
TOKENS = "reference_tokens"
TOKENS_RIGHT = "reference_tokens_right"
CHARACTERS = "reference_characters"
MODELLED_CHARACTERS = f"modelled_{CHARACTERS}"
BLEU_COLUMNS = tuple(f"sacrebleu_statistics_{place}" for place in range(10))
# Overall scores of the model come from its sums, not from the rows' own values.
DERIVED = frozenset({"loss", "perplexity", "bits_per_character", "token_accuracy"})

BLOCK_ROWS = 4096


@dataclass(frozen=True)
class ScoreColumns:
    """Columns to sum.

    Attributes:
        places: name of a column -> its index in `values`.
        values: [columns, rows] float64, mapped from disk.
    """

    places: dict[str, int]
    values: numpy.ndarray

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.values.shape[1])

    def only(self, names: Iterable[str]) -> ScoreColumns:
        """Some of the columns; the values stay where they are."""
        return ScoreColumns({name: self.places[name] for name in names}, self.values)

    def block(self, start: int, stop: int) -> numpy.ndarray:
        """[rows, columns] of some rows, in the order of `places`; each column is contiguous."""
        chosen = list(self.places.values())
        all_in_order = chosen == list(range(len(self.values)))
        return (self.values[:, start:stop] if all_in_order else self.values[chosen, start:stop]).T


class ScoreTable:
    """Scores of rows, to which more are appended.

    Args:
        folder: on whose disk they are kept; by default that of temporary files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed when the table is collected
        self._names: dict[str, int] = {}  # name -> index of its value in a row
        # Names of a row in its order -> number of that kind of rows, of which there are few, and indices of its values.
        self._kinds: dict[tuple[str, ...], tuple[int, numpy.ndarray]] = {}
        self._kind_of_row = array("H")
        self._blocks: list[tuple[int, int]] = []  # (first byte, values per row) of each full block
        self._block = numpy.zeros((BLOCK_ROWS, len(BLEU_COLUMNS)))

    def __len__(self) -> int:
        return len(self._kind_of_row)

    def append(self, row: RowScores) -> None:
        """Add the numbers of a row.

        Raises:
            OSError: the disk is full.
        """
        numbers = {
            name: value for name, value in row.items() if isinstance(value, (int, float)) and name not in DERIVED
        }
        kind = tuple(numbers)
        if kind not in self._kinds:
            for name in kind:
                self._names.setdefault(name, len(BLEU_COLUMNS) + len(self._names))
            self._kinds[kind] = len(self._kinds), numpy.array([self._names[name] for name in kind], int)
            new = len(BLEU_COLUMNS) + len(self._names) - self._block.shape[1]
            self._block = numpy.pad(self._block, ((0, 0), (0, new)))
        number, places = self._kinds[kind]
        values = self._block[len(self) % BLOCK_ROWS]
        values[: len(BLEU_COLUMNS)] = row.get("sacrebleu_statistics", 0)
        values[places] = list(numbers.values())
        self._kind_of_row.append(number)
        if len(self) % BLOCK_ROWS == 0:
            self._blocks.append((self._file.tell(), self._block.shape[1]))
            self._file.write(self._block.tobytes())
            self._block[:] = 0

    def columns(self, rows: numpy.ndarray | None = None) -> ScoreColumns:
        """The columns of all rows or some.

        For each score its values (0 where a row lacks it) and "rows_with_…" (1 where a row has it), in the order in
        which these rows bring scores up; then the counts that other scores need.

        Args:
            rows: numbers of the rows, ascending; None for all.

        Raises:
            OSError: the disk is full.
        """
        kinds = numpy.frombuffer(self._kind_of_row, numpy.uint16)
        names = self._names_of(kinds if rows is None else kinds[rows])
        columns = [column for name in names for column in (name, f"rows_with_{name}")]
        columns += [MODELLED_CHARACTERS] * (NATS in names)
        count = len(self) if rows is None else len(rows)
        with_bleu = False
        values: numpy.ndarray
        with tempfile.TemporaryFile(dir=self._folder) as file:
            done = 0
            for start in range(0, len(self), BLOCK_ROWS):
                stop = min(start + BLOCK_ROWS, len(self))
                chosen = slice(None) if rows is None else rows[slice(*numpy.searchsorted(rows, (start, stop)))] - start
                raw = self._rows_of_block(start // BLOCK_ROWS)[: stop - start][chosen]
                made = self._columns_of(raw, kinds[start:stop][chosen], names)
                with_bleu = with_bleu or bool(raw[:, : len(BLEU_COLUMNS)].any())
                for place, values in enumerate(made):
                    file.seek(8 * (place * count + done))
                    file.write(values.tobytes())
                done += len(raw)
            file.flush()
            columns += BLEU_COLUMNS if with_bleu else ()
            shape = len(columns), count
            values = numpy.memmap(file, float, "r", shape=shape) if all(shape) else numpy.zeros(shape)
        return ScoreColumns({name: place for place, name in enumerate(columns)}, values)

    def _names_of(self, kinds: numpy.ndarray) -> list[str]:
        """The scores of rows of these kinds, in the order in which they first have them."""
        found: dict[int, None] = {}
        for start in range(0, len(kinds), BLOCK_ROWS):
            found |= dict.fromkeys(kinds[start : start + BLOCK_ROWS].tolist())
        of_kind = list(self._kinds)
        return list(dict.fromkeys(name for kind in found for name in of_kind[kind]))

    def _rows_of_block(self, number: int) -> numpy.ndarray:
        """[rows, values] as they were appended; later scores than those that the block knows are missing."""
        if number == len(self._blocks):
            return self._block
        first, width = self._blocks[number]
        self._file.flush()
        return numpy.memmap(self._file, float, "r", first, (BLOCK_ROWS, width))

    def _columns_of(self, raw: numpy.ndarray, kinds: numpy.ndarray, names: Sequence[str]) -> list[numpy.ndarray]:
        """The columns of some rows, with those of BLEU last, also where they are 0."""
        zeros = numpy.zeros(len(raw))
        columns: list[numpy.ndarray] = []
        has: dict[str, numpy.ndarray] = {}
        for name in names:
            place = self._names[name]
            known = numpy.array([name in kind for kind in self._kinds], float)
            has[name] = known[kinds]
            columns += [raw[:, place] if place < raw.shape[1] else zeros, has[name]]
        if NATS in names:
            characters = columns[2 * names.index(CHARACTERS)] if CHARACTERS in names else zeros
            columns.append(characters * has[NATS])
        return [*columns, *raw[:, : len(BLEU_COLUMNS)].T]


def table_of(rows: Iterable[RowScores]) -> ScoreTable:
    """A table of these rows."""
    table = ScoreTable()
    for row in rows:
        table.append(row)
    return table
