"""Rows in a temporary file instead of in memory, and where rows with an id are among them."""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy

from novelgpt.settings.errors import UserError
from novelgpt.settings.paths import existing_folder

STEP = 16


class StoredRows:
    """Values that JSON can hold, by number, on the disk of the results; memory holds half a byte of each.

    The file has no name from the moment it is made, so that not even a kill leaves it behind.

    Args:
        near: a folder on that disk, or one that is to be made there; None for the disk of temporary files.
    """

    def __init__(self, near: Path | None) -> None:
        self._folder = Path(tempfile.gettempdir()) if near is None else existing_folder(near)
        try:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  closed when the rows are collected
        except OSError as error:
            raise self._full(error) from error
        self._starts = array("q")  # of every `STEP`-th value, the first byte
        self._count = self._end = 0

    def __len__(self) -> int:
        return self._count

    def append(self, value: Any) -> None:
        """Add a value behind the others.

        Raises:
            UserError: the disk is full.
        """
        line = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        try:
            self._file.write(line)
        except OSError as error:
            raise self._full(error) from error
        if self._count % STEP == 0:
            self._starts.append(self._end)
        self._count += 1
        self._end += len(line)

    def finish(self) -> None:
        """Nothing more is appended.

        Raises:
            UserError: the disk is full.
        """
        try:
            self._file.flush()
        except OSError as error:
            raise self._full(error) from error

    def __getitem__(self, number: int) -> Any:
        place, further = divmod(number, STEP)
        self._file.seek(self._starts[place])
        line = next(itertools.islice(iter(self._file.readline, b""), further, None))
        return json.loads(line.decode("utf-8", "surrogatepass"))

    def __iter__(self) -> Iterator[Any]:
        start = 0
        for _ in range(self._count):
            self._file.seek(start)  # in between, others read elsewhere
            line = self._file.readline()
            start += len(line)
            yield json.loads(line.decode("utf-8", "surrogatepass"))

    def _full(self, error: OSError) -> UserError:
        cause = f"a temporary copy of the rows cannot be written into {self._folder}: {error.strerror or error}"
        return UserError(cause, "make room there")


class IdIndex:
    """Which rows have an id, in 16 bytes a row: hashes are in memory, ids stay where the rows are.

    Args:
        ids: of all rows, in order; None for a row without one.
        id_of: the same by number, to tell ids of equal hashes apart.
    """

    def __init__(self, ids: Iterable[str | None], id_of: Callable[[int], str | None]) -> None:
        hashes = numpy.frombuffer(array("Q", (0 if name is None else _hash(name) for name in ids)), numpy.uint64)
        self._numbers = numpy.argsort(hashes, kind="stable")
        self._hashes = hashes[self._numbers]
        self._id_of = id_of

    def numbers(self, name: str) -> list[int]:
        """Numbers of the rows with this id, ascending."""
        wanted = numpy.uint64(_hash(name))
        first, last = (int(numpy.searchsorted(self._hashes, wanted, side)) for side in ("left", "right"))
        return [number for number in self._numbers[first:last].tolist() if self._id_of(number) == name]

    def repeated(self) -> Iterable[list[int]]:
        """Numbers of rows that may have the same id, ascending: those with equal hashes, more than one at once."""
        starts = numpy.flatnonzero(numpy.diff(self._hashes, prepend=self._hashes[:1] + 1))
        counts = numpy.diff(starts, append=len(self._hashes))
        for start, count in zip(starts[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True):
            yield self._numbers[start : start + count].tolist()

    def distinct(self) -> int:
        """Number of different ids."""
        repeats = sum(len(rows) - len(set(map(self._id_of, rows))) for rows in self.repeated())
        return len(self._hashes) - repeats


def _hash(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
