"""Training rows without an end, in sections that are made when they are asked for."""

from __future__ import annotations

import bisect
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol

import numpy

from novelgpt.text.origins import TracedRows

# Sections that are kept once they are made: a batch may lie across two.
KEPT = 2
# What random generators are for, beside the run's seed: the order of rows of a source, and of a section.
OF_SOURCE, OF_SECTION = 0, 1


class SizedRows(Protocol):
    """Rows, or packs of rows, with their origins.

    Attributes:
        lengths: [rows] tokens of each.
    """

    lengths: Any

    def __len__(self) -> int:
        """Number of rows."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"input_ids", "labels"}, and "position_ids" where rows are packed, each [tokens]."""

    def origins(self, index: int, begin: int = 0, end: int | None = None) -> list[str]:
        """Files and rows that tokens [begin, end) came from."""


class SectionedRows(TracedRows):
    """Rows numbered from 0 without an end, shuffled within each section, the same in every process.

    A section can be made on its own, once it is known where its numbers start.

    Args:
        seed: of the order within sections.

    Attributes:
        per_epoch: numbers that the Trainer takes as an epoch; the next ones follow in the next epoch.
    """

    per_epoch: int

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.starts = [(0, 0)]  # (its first number, section) of each section that is known, in order
        self._made: dict[int, tuple[SizedRows, numpy.ndarray]] = {}

    @abstractmethod
    def make(self, section: int) -> SizedRows:
        """The rows or packs of a section."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows, from 0 on, that are looked at before training."""

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

    def section(self, section: int) -> tuple[SizedRows, numpy.ndarray]:
        """The rows of a section whose start is known, and the order in which they are trained."""
        if section not in self._made:
            rows = self.make(section)
            order = numpy.random.default_rng([self.seed, OF_SECTION, section]).permutation(len(rows))
            self._made[section] = rows, order
            if len(self._made) > KEPT:
                del self._made[next(iter(self._made))]
            start = next(start for start, known in self.starts if known == section)
            following = (start + len(rows), section + 1)
            if following not in self.starts:
                bisect.insort(self.starts, following)
        return self._made[section]

    def _find(self, number: int) -> tuple[SizedRows, int]:
        """The rows of the section that a number lies in, and its index among them."""
        start, section = self.starts[bisect.bisect_right(self.starts, (number, numpy.inf)) - 1]
        rows, order = self.section(section)
        while number >= start + len(rows):
            start, section = start + len(rows), section + 1
            rows, order = self.section(section)
        return rows, int(order[number - start])
