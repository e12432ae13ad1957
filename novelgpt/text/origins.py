"""Which rows of which files training rows were made of, to be named where their numbers go wrong."""

from __future__ import annotations

import bisect
import json
import re
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch.utils.data import Dataset

_NUMBERED = re.compile(r"(.*?)(0|[1-9][0-9]{0,17})", re.DOTALL)


class TracedRows(Dataset[Any]):
    """Training rows that know where they came from."""

    @abstractmethod
    def origins(self, index: int, begin: int = 0, end: int | None = None) -> list[str]:
        """Files and rows that tokens [begin, end) of row `index` came from, such as `rows.jsonl:17`; [] if unknown."""


class Origin(NamedTuple):
    """Where a stretch of text begins and where it ends."""

    first: str
    last: str

    def __str__(self) -> str:
        return self.first if self.first == self.last else f"{self.first} to {self.last}"


class TokenOrigins(Protocol):
    """Tells where tokens that lie end to end came from."""

    def names(self, begin: int, end: int) -> list[str]:
        """Of tokens [begin, end), in their order."""


class Places:
    """Texts such as `rows.jsonl:17`, of which many begin alike and end in a number, in 12 bytes each."""

    def __init__(self) -> None:
        self._beginnings: dict[str, int] = {}
        self._texts: list[str] = []  # the beginnings, by number
        self._which, self._numbers = array("I"), array("q")

    def append(self, text: str) -> None:
        """Add one at the end."""
        match = _NUMBERED.fullmatch(text)
        beginning, number = (match[1], int(match[2])) if match else (text, -1)
        which = self._beginnings.setdefault(beginning, len(self._texts))
        if which == len(self._texts):
            self._texts.append(beginning)
        self._which.append(which)
        self._numbers.append(number)

    def __len__(self) -> int:
        return len(self._which)

    def __getitem__(self, index: int) -> str:
        """The text, as it was."""
        beginning, number = self._texts[self._which[index]], self._numbers[index]
        return beginning if number < 0 else f"{beginning}{number}"


class TextMarks:
    """What is known where a text is made into tokens: the origin of each piece, and the token it begins at."""

    def __init__(self) -> None:
        self._starts = array("q")
        self._firsts, self._lasts = Places(), Places()

    def add(self, start: int, origin: Origin) -> None:
        """Mark the piece that begins at token `start`, no earlier than those before."""
        self._starts.append(start)
        self._firsts.append(origin.first)
        self._lasts.append(origin.last)

    def __iter__(self) -> Iterator[tuple[int, str, str]]:
        for index, start in enumerate(self._starts):
            yield start, self._firsts[index], self._lasts[index]

    def names(self, begin: int, end: int) -> list[str]:
        """Of the pieces that tokens [begin, end) lie in."""
        first = max(0, bisect.bisect_right(self._starts, begin) - 1)
        found = range(first, bisect.bisect_left(self._starts, end))
        return unique(str(Origin(self._firsts[index], self._lasts[index])) for index in found)


class SavedMarks:
    """Marks in a file that is only read when it is asked: lines of [token, first, last], both without `source`."""

    def __init__(self, path: Path, source: str) -> None:
        self.path, self.source = path, source

    def names(self, begin: int, end: int) -> list[str]:
        """Of the pieces that tokens [begin, end) lie in; what the tokens were made from, where there is no file."""
        marks = TextMarks()
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except OSError:
            return [self.source]
        for start, first, last in map(json.loads, lines):
            marks.add(start, Origin(f"{self.source}{first}", f"{self.source}{last}"))
        return marks.names(begin, end)


def save_marks(marks: TextMarks, path: Path, source: str) -> None:
    """Write what SavedMarks reads. What begins with `source` is written without it, so that files may be renamed."""
    with path.open("w", encoding="utf-8") as file:
        for start, first, last in marks:
            file.write(json.dumps([start, first.removeprefix(source), last.removeprefix(source)]) + "\n")


def names_across(parts: Iterable[tuple[int, TokenOrigins]], begin: int, end: int) -> list[str]:
    """Origins of tokens [begin, end) of parts that lie end to end, each with its number of tokens."""
    found: list[str] = []
    start = 0
    for count, origins in parts:
        low, high = max(begin, start), min(end, start + count)
        if low < high:
            found += origins.names(low - start, high - start)
        start += count
    return unique(found)


def unique(names: Iterable[str]) -> list[str]:
    """Each once, in their order."""
    return list(dict.fromkeys(names))
