"""Sources of rows in given proportions: which rows are trained when, whole passes and fractions of one exactly.

Each source is an endless sequence of passes over its rows, each in an order of its own. An epoch takes from it the next
`weight` passes, so that a weight of 0.3 trains other rows in the next epoch, and every row equally often in the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Protocol

import numpy

from novelgpt.settings.errors import UserError
from novelgpt.text.origins import TracedRows
from novelgpt.text.packing import PackedRows
from novelgpt.text.sections import OF_SOURCE, SectionedRows

# Packs of a section at least, on average, so that rows of all lengths meet in it.
LEAST_PACKS = 64


class MixableRows(Protocol):
    """Rows of several sources, of which some can be taken, also more than once.

    Attributes:
        lengths: [rows] tokens of each.
    """

    lengths: numpy.ndarray

    def subset(self, numbers: numpy.ndarray) -> TracedRows:
        """The rows with these indices, in this order."""


class MixedOrder:
    """Rows of sources in the order in which an endless training takes them, in sections.

    A section holds weight / `per_epoch` passes over each source.

    Args:
        sources: [rows] the source of each row.
        weights: passes over each source in an epoch, by its number; 0 leaves it out.
        seed: of all orders.
        per_epoch: sections that make an epoch.
    """

    def __init__(self, sources: numpy.ndarray, weights: Sequence[Fraction], seed: int, per_epoch: int = 1) -> None:
        self.weights = weights
        self.seed = seed
        self.per_epoch = per_epoch
        by_source = numpy.argsort(sources, kind="stable")
        ends = numpy.cumsum(numpy.bincount(sources, minlength=len(weights)))
        self._rows = numpy.split(by_source, ends[:-1])

    def section(self, number: int) -> numpy.ndarray:
        """Indices of the rows of a section, source by source.

        Shares are rounded from the start of the training on, so that after any number of sections, the rows taken from
        a source differ by at most half a row from weight x rows x sections / `per_epoch`.
        """
        taken = [numpy.zeros(0, numpy.int64)]
        for source, (weight, rows) in enumerate(zip(self.weights, self._rows, strict=True)):
            begin, end = (
                math.floor(count * weight * len(rows) / self.per_epoch + Fraction(1, 2))
                for count in (number, number + 1)
            )
            while begin < end:
                of_pass, place = divmod(begin, len(rows))
                stop = min(len(rows), place + end - begin)
                order = numpy.random.default_rng([self.seed, OF_SOURCE, source, of_pass]).permutation(len(rows))
                taken.append(rows[order[place:stop]])
                begin += stop - place
        return numpy.concatenate(taken)


class MixedRows(SectionedRows):
    """An endless training on sources in given proportions: rows, or packs of them.

    Its length is that of the first epoch of the mix. Epochs differ a little in their rows or packs, so the Trainer's
    are cut from those of the mix laid end to end: each is as long as one of the mix is on average.

    Args:
        rows: of all sources.
        sources: [rows] the source of each row.
        weights: passes over each source in an epoch.
        seed: of all orders.
        max_length: tokens per pack; None where rows are not packed.

    Attributes:
        lengths: [len(self)] tokens of each row or pack of the first epoch.

    Raises:
        UserError: the weights leave no row in the first epoch.
    """

    def __init__(
        self,
        rows: MixableRows,
        sources: numpy.ndarray,
        weights: Sequence[Fraction],
        seed: int,
        max_length: int | None = None,
    ) -> None:
        super().__init__(seed)
        self.rows = rows
        self.max_length = max_length
        sizes = numpy.ones(len(rows.lengths)) if max_length is None else rows.lengths
        each = float(numpy.bincount(sources, sizes, len(weights)) @ [float(weight) for weight in weights])  # an epoch
        sections = max(1, math.ceil(max(weights)))  # so that the copies of a row lie in different sections
        if max_length is not None:
            sections = min(sections, max(1, int(each / max_length / LEAST_PACKS)))
        self._order = MixedOrder(sources, weights, seed, sections)
        first = [self.section(number) for number in range(sections)]
        self.lengths = numpy.concatenate([numpy.asarray(part.lengths)[order] for part, order in first])
        if not len(self.lengths):
            raise UserError("--mix leaves no row in an epoch", "give larger weights")
        found = len(self.lengths) if max_length is None else int(self.lengths.sum())
        self.per_epoch = max(1, round(len(self.lengths) * each / found))

    def make(self, section: int) -> TracedRows:
        """The rows or packs of a section."""
        rows = self.rows.subset(self._order.section(section))
        return PackedRows(rows, self.max_length) if self.max_length is not None and len(rows) else rows


class RowsBySource(TracedRows):
    """Rows, or packs of rows of one source each, source by source, so that a loss can be told for every source.

    Args:
        rows: of all sources.
        sources: [rows] the source of each row.
        names: of the sources.
        max_length: tokens per pack; None where rows are not packed.

    Attributes:
        sources: [len(self)] the source of each row or pack.
        lengths: [len(self)] tokens of each row or pack.
    """

    def __init__(
        self, rows: MixableRows, sources: numpy.ndarray, names: Sequence[str], max_length: int | None = None
    ) -> None:
        self.names = names
        present = numpy.unique(sources)
        parts = [rows.subset(numpy.flatnonzero(sources == source)) for source in present]
        self._parts: list[TracedRows] = [part if max_length is None else PackedRows(part, max_length) for part in parts]
        sizes = [len(part) for part in self._parts]
        self._ends = numpy.cumsum(sizes)
        self.sources = numpy.repeat(present, sizes)
        self.lengths = numpy.concatenate([numpy.asarray(part.lengths) for part in self._parts])

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"input_ids", "labels"}, and "position_ids" where rows are packed, each [tokens]."""
        part, found = self._find(index)
        return part[found]

    def origins(self, index: int, begin: int = 0, end: int | None = None) -> list[str]:
        """Files and rows that tokens [begin, end) of a row or pack came from."""
        part, found = self._find(index)
        return part.origins(found, begin, end)

    def _find(self, index: int) -> tuple[TracedRows, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(numpy.searchsorted(self._ends, index, side="right"))
        part = self._parts[number]
        return part, index - int(self._ends[number]) + len(part)
