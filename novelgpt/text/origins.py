"""Which rows of which files training rows were made of, so that a loss can be traced back to its text."""

from __future__ import annotations

import bisect
import json
from abc import abstractmethod
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy
from torch.utils.data import Dataset


class TracedRows(Dataset[Any]):
    """Training rows that know their origins and lengths without being read.

    Attributes:
        lengths: [rows] int64, tokens of each row.
    """

    lengths: numpy.ndarray

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def origins(self, index: int, begin: int = 0, end: int | None = None) -> list[str]:
        """Files and rows that tokens [begin, end) of row `index` came from, such as `rows.jsonl:17`; [] if unknown."""


class Origin(NamedTuple):
    """The rows or lines in which a stretch of text starts and ends, such as `novel.txt:12`."""

    first: str
    last: str

    def __str__(self) -> str:
        return self.first if self.first == self.last else f"{self.first} to {self.last}"


class TokenOrigins:
    """The origins of tokens that lie end to end: those of each chunk, by the token that it starts with."""

    def __init__(self) -> None:
        self._starts = array("q")
        self._origins: list[Origin] = []

    def add(self, start: int, origin: Origin) -> None:
        """Add the chunk that starts at token `start`, no earlier than those before."""
        self._starts.append(start)
        self._origins.append(origin)

    def names(self, begin: int, end: int) -> list[str]:
        """Origins of the chunks that tokens [begin, end) lie in, each once, in order."""
        first = max(0, bisect.bisect_right(self._starts, begin) - 1)
        return unique(map(str, self._origins[first : bisect.bisect_left(self._starts, end)]))


class SavedOrigins(NamedTuple):
    """TokenOrigins in a file that is read only when asked: lines of [token, first, last], both without `source`."""

    path: Path
    source: str

    def names(self, begin: int, end: int) -> list[str]:
        """Origins of the chunks that tokens [begin, end) lie in; `source` where there is no file."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except OSError:
            return [self.source]
        origins = TokenOrigins()
        for start, first, last in map(json.loads, lines):
            origins.add(start, Origin(f"{self.source}{first}", f"{self.source}{last}"))
        return origins.names(begin, end)


def write_origin(file: TextIO, source: str, start: int, origin: Origin) -> None:
    """Append a line for SavedOrigins. Names lose the prefix `source`, so that source files may be renamed."""
    file.write(json.dumps([start, *(name.removeprefix(source) for name in origin)]) + "\n")


def unique(names: Iterable[str]) -> list[str]:
    """Each once, in their order."""
    return list(dict.fromkeys(names))
