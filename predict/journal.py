"""Answers on disk as they come, so that a killed prediction resumes: no row is answered twice, none is missing."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from novelgpt.inference.generation import Answer
from novelgpt.settings.errors import UserError
from novelgpt.settings.locks import make_and_lock, unlock


def unwritten(place: Path, error: OSError) -> UserError:
    """The error of results or answers that cannot be written; earlier answers are kept."""
    cause = f"{error.filename or place} cannot be written: {error.strerror or error}"
    return UserError(cause, "make room there; the same command resumes from the answers that are kept")


class _JournalLine(BaseModel):
    """A line of the journal."""

    model_config = ConfigDict(strict=True, extra="forbid")

    row: int = Field(ge=0)
    text: str
    finish_reason: str
    completion_tokens: int = Field(ge=0)
    prompt_tokens: int = Field(default=0, ge=0)
    reasoning: str = ""


class JournaledAnswers(Mapping[int, Answer]):
    """Answers by row number, read from the journal when they are asked for; memory holds 8 bytes a row."""

    def __init__(self) -> None:
        self._files: list[IO[bytes]] = []
        # Of each row, the first byte of its line, and above that the number of the file; -1 for no answer.
        self._places = array("q")
        self._count = 0

    def open(self, path: Path) -> int:
        """Open a file with answers; returns the number by which `set_place` knows it."""
        self._files.append(path.open("rb"))  # closed with the answers
        return len(self._files) - 1

    def set_place(self, row: int, file: int, first_byte: int) -> None:
        """The answer of a row, in place of an earlier one, is the line that starts there."""
        if row >= len(self._places):
            self._places.extend(array("q", [-1]) * (row + 1 - len(self._places)))
        self._count += self._places[row] < 0
        self._places[row] = file << 48 | first_byte

    def close(self) -> None:
        """No answer is read any more."""
        for file in self._files:
            file.close()

    def __getitem__(self, row: int) -> Answer:
        if row not in self:
            raise KeyError(row)
        place = self._places[row]
        file = self._files[place >> 48]
        file.seek(place & (1 << 48) - 1)
        fields = json.loads(file.readline())
        del fields["row"]
        return Answer(**fields)

    def __contains__(self, row: object) -> bool:
        return isinstance(row, int) and 0 <= row < len(self._places) and self._places[row] >= 0

    def __iter__(self) -> Iterator[int]:
        return (row for row, place in enumerate(self._places) if place >= 0)

    def __len__(self) -> int:
        return self._count


class Journal(contextlib.AbstractContextManager["Journal"]):
    """The answers of one prediction in `predictions.partial`: one file per process, one line per answer.

    The first line of each file identifies the prediction. Files of another prediction are ignored, and removed at the
    end. A line that a kill truncated is written again, and a row whose line has no answer (earlier versions wrote such
    lines for servers) is asked again.

    Args:
        folder: of the results.
        prediction: a text that identifies all that the answers depend on: model, rows, settings.
        process: number of this process.

    Attributes:
        answers: by row number, those of all processes when this one started or `read_others` was called, and its own;
            they stay on disk.

    Raises:
        UserError: another prediction is writing here, or the folder cannot be written.
    """

    def __init__(self, folder: Path, prediction: str, process: int = 0) -> None:
        self.folder = folder / "predictions.partial"
        self.answers = JournaledAnswers()
        self._header = json.dumps({"prediction": prediction})
        self._own = self.folder / f"{process}.jsonl"
        try:
            # Also while another prediction, which is just ending, removes the folder.
            self._handle, _ = make_and_lock(self.folder, self._own.name)
        except BlockingIOError as error:
            raise UserError(f"another prediction writes into {folder}", "wait for it, or name --output_dir") from error
        except OSError as error:
            raise UserError(f"{self._own}: {error.strerror}", "name a folder that can be written") from error
        self.file: IO[bytes] = self._own.open("a+b")  # closed with the journal
        self._number = self.answers.open(self._own)
        for path in sorted(self.folder.glob("*.jsonl")):
            if path == self._own:
                self.file.truncate(self._read(path, self._number))
            else:
                self._read(path, self.answers.open(path))
        if self.file.seek(0, os.SEEK_END) == 0:
            self._append([self._header])

    def add(self, answers: Mapping[int, Answer]) -> None:
        """Write answers by row number; when this returns, they are on the disk.

        Raises:
            UserError: they cannot be written; earlier ones are.
        """
        lines = [
            json.dumps({"row": number, **asdict(answer)}, ensure_ascii=False) for number, answer in answers.items()
        ]
        for number, first_byte in zip(answers, self._append(lines), strict=True):
            self.answers.set_place(number, self._number, first_byte)

    def read_others(self) -> None:
        """Read what other processes have written since this one started, as far as this host sees their files."""
        for path in sorted(self.folder.glob("*.jsonl")):
            if path != self._own:
                self._read(path, self.answers.open(path))

    def remove(self) -> None:
        """Delete all files, once the results are written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _append(self, lines: list[str]) -> list[int]:
        """Write lines; returns the first byte of each."""
        # A model may write a lone surrogate, which has no UTF-8.
        written = [(line + "\n").encode("utf-8", errors="replace") for line in lines]
        try:
            end = self.file.seek(0, os.SEEK_END)
            self.file.write(b"".join(written))
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # the buffer would be written again
                self.file.close()
            raise unwritten(self.folder, error) from error
        return list(itertools.accumulate(map(len, written), initial=end))[:-1]

    def _read(self, path: Path, number: int) -> int:
        """Find the answers of a file of this prediction; returns how many of its bytes are complete lines."""
        complete = 0
        with path.open("rb") as file:
            if file.readline() != self._header.encode() + b"\n":
                return 0
            complete = file.tell()
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):
                    break  # after a power loss, anything may follow the last synced line
                with contextlib.suppress(ValidationError):
                    valid = _JournalLine.model_validate(entry)
                    # An earlier version took null for an answer, and lost the thought beside it.
                    if valid.text or valid.completion_tokens <= 1 or "reasoning" in valid.model_fields_set:
                        self.answers.set_place(valid.row, number, complete)
                complete += len(line)
        return complete

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        self.answers.close()
        unlock(self._handle)
