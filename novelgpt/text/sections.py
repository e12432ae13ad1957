"""Training rows without an end, in sections that are made when they are asked for."""

from __future__ import annotations

import bisect
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy
from torch.utils.data import Dataset

from novelgpt.text.origins import TracedRows
from novelgpt.text.statistics import TokenCounts

# Sections that are kept once they are made: a batch may lie across two.
KEPT = 2
# What random generators are for, beside the run's seed: the order of rows of a source, and of a section.
OF_SOURCE, OF_SECTION = 0, 1
# Under which a checkpoint's states hold that of the rows.
ROWS_STATE = "rows"


class SectionedRows(TracedRows):
    """Rows numbered from 0 without an end, shuffled within each section, the same in every process.

    A section can be made on its own, once it is known where its numbers start.

    Args:
        seed: of the order within sections.

    Attributes:
        lengths: [len(self)] tokens of the first rows.
        per_epoch: numbers that the Trainer takes as an epoch; the next ones follow in the next epoch.
    """

    per_epoch: int

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.starts = [(0, 0)]  # (its first number, section) of each section that is known, in order
        self._made: dict[int, tuple[TracedRows, numpy.ndarray]] = {}

    @abstractmethod
    def make(self, section: int) -> TracedRows:
        """The rows or packs of a section."""

    def __len__(self) -> int:
        """Number of rows that are looked at before training, and whose lengths are known."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """These rows."""
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The row of a number: {"input_ids", "labels"}, and "position_ids" where rows are packed, each [tokens]."""
        rows, index = self._find(number)
        return rows[index]

    def origins(self, index: int, begin: int = 0, end: int | None = None) -> list[str]:
        """Files and rows that tokens [begin, end) of the row of a number came from."""
        rows, found = self._find(index)
        return rows.origins(found, begin, end)

    def section(self, section: int) -> tuple[TracedRows, numpy.ndarray]:
        """The rows of a section whose start is known, and the order in which they are trained."""
        if section not in self._made:
            rows = self.make(section)
            order = numpy.random.default_rng([self.seed, OF_SECTION, section]).permutation(len(rows))
            self._made[section] = rows, order
            if len(self._made) > KEPT:
                del self._made[next(iter(self._made))]
            following = (self.start_of(section) + len(rows), section + 1)
            if following not in self.starts:
                bisect.insort(self.starts, following)
        return self._made[section]

    def start_of(self, section: int) -> int:
        """The first number of a section that is known."""
        return next(start for start, known in self.starts if known == section)

    def state(self, number: int) -> dict[str, Any] | None:
        """What a run needs to resume with the row of a number, in JSON; None where that follows from the number."""
        return None

    def counts(self) -> TokenCounts | None:
        """What is counted of all rows that the run has read so far; None where all were counted before it."""
        return None

    def position(self, number: int) -> tuple[int, int]:
        """(section, its first number) of the last section that is known to start no later than a number.

        For a number before all that is known, it is the first one: a run that resumes looks at rows that it has read.
        """
        start, section = self.starts[max(0, bisect.bisect_right(self.starts, (number, numpy.inf)) - 1)]
        return section, start

    def _find(self, number: int) -> tuple[TracedRows, int]:
        """The rows of the section that a number lies in, and its index among them."""
        section, start = self.position(number)
        rows, order = self.section(section)
        while number >= start + len(rows):
            start, section = start + len(rows), section + 1
            rows, order = self.section(section)
        return rows, int(order[number - start if number >= start else number % len(rows)])


def rows_per_epoch(rows: Dataset[Any]) -> int:
    """Number of rows that the Trainer takes as an epoch."""
    return rows.per_epoch if isinstance(rows, SectionedRows) else len(rows)  # type: ignore[arg-type]
