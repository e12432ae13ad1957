"""Rows of JSON that are spread over lines or wrapped in a list, parsed one by one. A window slides over the text, so
that memory never holds all of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from dataset.text_files import TextFile
from novelgpt.settings.errors import UserError

# Lists of mappings that belong to one row, whatever else it holds.
_LISTS_OF_ROWS = {
    "messages", "conversations", "conversation", "tools", "functions", "prompt", "completion", "chosen", "rejected",
    "history", "tool_calls", "objects", "images",
}  # fmt: skip
_FIELDS_OF_ROWS = _LISTS_OF_ROWS | {"instruction", "query", "response", "output", "title", "abstract", "text", "task"}
_FIELDS_OF_ROWS |= {"text_prompt", "prediction", "predict"}
_DECODER = json.JSONDecoder()
_NOT_BLANK = re.compile(r"\S")
_NOT_JSON_BLANK = re.compile(r"[^ \t\n\r]")
_LONGEST_CUT = 16
"""Where the end of the window cuts a number, a name such as -Infinity or an escape, the value seems to end, or to be
invalid, at most so many characters before that end."""


def read_json_values(text: TextFile) -> Iterator[tuple[str, str]]:
    """(place, JSON) of each row: each of the values that follow one another; if there is only one, each item of a list,
    or of the one list of rows under a name ({"version": 1, "data": [...]}).

    The place is ":17", the line in which the row begins, or " row 3", its number in the list. Memory holds a row at a
    time, however large the file is.

    Raises:
        UserError: invalid JSON, with its line, once the rows before it are read; several lists of rows under names.
    """
    window = _Window(text)
    first = window.next_value()
    place = f":{window.line}"
    if first == "[":
        yield from _with_numbers(window.items())
        if window.next_value():
            yield place, "[]"  # a list before other values is a row, which is to be refused as none
        return
    number = _find_list_of_rows(text) if first == "{" else None
    if number is not None:
        for member, _ in enumerate(window.members()):
            if member == number:
                yield from _with_numbers(window.items())
                return
            window.pass_value()
    while first:
        place = f":{window.line}"
        yield place, window.value()[1]
        first = window.next_value()


def invalid_json(where: str, column: int, reason: str) -> UserError:
    """The error of JSON that its rules do not allow.

    Args:
        where: file and line.
        column: of that line, from 1.
        reason: as `JSONDecodeError.msg` gives it.
    """
    return UserError(f"{where}: invalid JSON, column {column}: {reason}",
                     "correct that line, or write the file with json.dumps")  # fmt: skip


def unreadable_json(where: str, error: ValueError | RecursionError) -> UserError:
    """The error of JSON that Python cannot hold: a number of thousands of digits, lists in lists in lists."""
    return UserError(f"{where}: JSON that cannot be read: {error}", "write rows of fields and texts")


def _with_numbers(items: Iterable[tuple[Any, str]]) -> Iterator[tuple[str, str]]:
    return ((f" row {number}", row) for number, (_, row) in enumerate(items))


def _find_list_of_rows(text: TextFile) -> int | None:
    """Which member of a file's only value, a mapping, is the list of its rows; None if that is a row itself, or if more
    values follow it.

    Raises:
        UserError: invalid JSON in that value, or several lists of rows.
    """
    window = _Window(text)
    window.next_value()
    numbers: dict[str, int | None] = {}  # as in any mapping of JSON, the last member of a name counts
    for number, name in enumerate(window.members()):
        if name in _FIELDS_OF_ROWS:
            return None
        numbers[name] = number if window.pass_value() == {dict} else None
    if window.next_value():
        return None
    lists = {name: number for name, number in numbers.items() if number is not None}
    if len(lists) > 1:
        raise UserError(
            f"{text.path}: several lists of rows in one file: {', '.join(lists)}",
            "put each into a file of its own, and name those to train on and to evaluate on",
        )
    return next(iter(lists.values()), None)


class _Window:
    """A stretch of a JSON text, of at least the value that is being parsed.

    Attributes:
        line: number of the line in which the last value began that `next_value` found.
    """

    def __init__(self, text: TextFile) -> None:
        self.line = 1
        self._path, self._blocks = text.path, text.blocks()
        self._text, self._is_last = "", False
        self._at = 0  # index of the next character
        self._kept = 0  # what stands before this index may be dropped; the last value ends there, or a list begins
        self._counted, self._lines, self._line_begin = 0, 1, 0  # an index, the number of its line and where that begins

    def next_value(self) -> str:
        """Move to the next of the values that follow one another; returns its first character, "" at the end."""
        first = self._skip_to(_NOT_BLANK)
        self._count_lines(self._at)
        self.line = self._lines
        return first

    def value(self) -> tuple[Any, str]:
        """Parse the value that begins here, and move behind it; returns its JSON, too."""
        self._kept = self._at
        while True:
            try:
                value, stop = _DECODER.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if self._is_last or not self._may_be_cut(error):
                    raise self._invalid(error, error.pos if isinstance(error, json.JSONDecodeError) else 0) from error
            else:
                if self._is_last or stop + _LONGEST_CUT < len(self._text):
                    text = self._text[self._at : stop]
                    self._move_to(stop)
                    return value, text
            self._extend()

    def items(self) -> Iterator[tuple[Any, str]]:
        """`value` of each item of the list that begins here; moves behind it."""
        self._move_to(self._at + 1)
        mark = self._skip_to(_NOT_JSON_BLANK)
        while mark != "]":
            yield self.value()
            mark = self._skip_to(_NOT_JSON_BLANK)
            if mark == ",":
                self._at += 1
                mark = self._skip_to(_NOT_JSON_BLANK)
                if mark != "]":
                    continue
            elif mark == "]":
                break
            raise self._misplaced("[0")
        self._move_to(self._at + 1)

    def members(self) -> Iterator[str]:
        """The name of each member of the mapping that begins here; the caller moves behind the value, which is next."""
        self._move_to(self._at + 1)
        before = "{"
        mark = self._skip_to(_NOT_JSON_BLANK)
        while mark != "}":
            if mark != '"':
                raise self._misplaced(before)
            name, _ = self.value()
            if self._skip_to(_NOT_JSON_BLANK) != ":":
                raise self._misplaced('{""')
            self._at += 1
            self._skip_to(_NOT_JSON_BLANK)
            yield name
            before = '{"":0'
            mark = self._skip_to(_NOT_JSON_BLANK)
            if mark == ",":
                self._at += 1
                mark = self._skip_to(_NOT_JSON_BLANK)
                if mark != "}":
                    continue
            elif mark == "}":
                break
            raise self._misplaced(before)
        self._move_to(self._at + 1)

    def pass_value(self) -> set[type]:
        """Move behind the value that begins here; returns the types of its items, if it is a list."""
        if self._text.startswith("[", self._at):
            return {type(value) for value, _ in self.items()}
        self.value()
        return set()

    def _skip_to(self, wanted: re.Pattern[str]) -> str:
        """Move to the next character of a kind, and return it; "" at the end."""
        while True:
            found = wanted.search(self._text, self._at)
            if found is not None:
                self._at = found.start()
                return found[0]
            self._at = len(self._text)
            if self._is_last:
                return ""
            self._extend()

    def _move_to(self, index: int) -> None:
        self._at = self._kept = index

    def _extend(self) -> None:
        """Drop what is passed, and read at least as much as is left: a long value is parsed again a few times only."""
        self._count_lines(self._kept)
        parts = [self._text[self._kept :]]
        wanted = len(parts[0]) + 1
        for block in self._blocks:
            parts.append(block)
            wanted -= len(block)
            if wanted <= 0:
                break
        else:
            self._is_last = True
        self._text = "".join(parts)
        self._at, self._counted = self._at - self._kept, 0
        self._line_begin, self._kept = self._line_begin - self._kept, 0

    def _count_lines(self, index: int) -> None:
        self._lines += self._text.count("\n", self._counted, index)
        line_end = self._text.rfind("\n", self._counted, index)
        self._line_begin = line_end + 1 if line_end >= 0 else self._line_begin
        self._counted = index

    def _may_be_cut(self, error: ValueError | RecursionError) -> bool:
        """Whether an error may come from the end of the window alone."""
        if not isinstance(error, json.JSONDecodeError):
            return not isinstance(error, RecursionError)  # digits that a point may follow
        return error.msg.startswith("Unterminated string") or error.pos + _LONGEST_CUT >= len(self._text)

    def _misplaced(self, before: str) -> UserError:
        """The error of the next character, which is none that continues a list or a mapping.

        Args:
            before: JSON that may stand for what that holds up to the last value, or before the first.
        """
        try:
            _DECODER.raw_decode(before + self._text[self._kept : self._at + 1])
        except json.JSONDecodeError as error:
            return self._invalid(error, error.pos - len(before) + self._kept)
        raise AssertionError("JSON that is valid")

    def _invalid(self, error: ValueError | RecursionError, index: int) -> UserError:
        if not isinstance(error, json.JSONDecodeError):
            return unreadable_json(f"{self._path}:{self.line}", error)
        self._count_lines(index)
        return invalid_json(f"{self._path}:{self._lines}", index - self._line_begin + 1, error.msg)
