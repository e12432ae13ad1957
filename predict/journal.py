"""Answers on disk as they come, so that a killed prediction goes on where it was: no row twice, none missing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from novelgpt.inference.generation import Answer
from novelgpt.settings.errors import UserError
from novelgpt.settings.locks import make_and_lock, unlock


def unwritten(place: Path, error: OSError) -> UserError:
    """The error of results, or answers, that cannot be written; the answers before them are kept."""
    cause = f"{error.filename or place} cannot be written: {error.strerror or error}"
    return UserError(cause, "make room there; the same command goes on from the answers that are kept")


class _Entry(BaseModel):
    """A line of the journal."""

    model_config = ConfigDict(strict=True, extra="forbid")

    row: int = Field(ge=0)
    text: str
    finish_reason: str
    completion_tokens: int = Field(ge=0)
    prompt_tokens: int = Field(default=0, ge=0)
    reasoning: str = ""


class Journal:
    """The answers of one prediction: a file a process in `predictions.partial`, a line an answer.

    The first line of each file says which prediction it belongs to. Files of another prediction are no part of this
    one, and go when it ends; a line that a kill cut off is written again, and a row whose line holds no answer (as
    earlier versions took from servers) is asked again.

    Args:
        folder: of the results.
        prediction: what the answers depend on, as one text: model, rows, settings.
        process: number of this process.

    Attributes:
        answers: by number of the row, those of all processes, as they were when this one began, and its own.

    Raises:
        UserError: another prediction is writing here, or nothing can be written.
    """

    def __init__(self, folder: Path, prediction: str, process: int = 0) -> None:
        self.folder = folder / "predictions.partial"
        self.answers: dict[int, Answer] = {}
        own = self.folder / f"{process}.jsonl"
        try:
            # Not what another prediction, which ends in this moment, removes.
            self._handle, _ = make_and_lock(self.folder, own.name)
        except BlockingIOError as error:
            raise UserError(f"another prediction writes into {folder}", "wait for it, or name --output_dir") from error
        except OSError as error:
            raise UserError(f"{own}: {error.strerror}", "name a folder that can be written") from error
        self.file: IO[bytes] = own.open("a+b")  # closed with the journal
        for path in sorted(self.folder.glob("*.jsonl")):
            complete = self._read(path, prediction)
            if path == own:
                self.file.truncate(complete)
        if self.file.seek(0, os.SEEK_END) == 0:
            self._append([json.dumps({"prediction": prediction})])

    def add(self, answers: Mapping[int, Answer]) -> None:
        """Write answers, by number of the row; when this returns, they are on the disk.

        Raises:
            UserError: they cannot be written; those before them are.
        """
        self.answers.update(answers)
        self._append(
            [json.dumps({"row": number, **asdict(answer)}, ensure_ascii=False) for number, answer in answers.items()]
        )

    def remove(self) -> None:
        """Delete all files, once the results are written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _append(self, lines: list[str]) -> None:
        # Half a character (a lone surrogate) is possible in what a model writes, and no UTF-8.
        try:
            self.file.write("".join(line + "\n" for line in lines).encode("utf-8", errors="replace"))
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # what is buffered would be written once more
                self.file.close()
            raise unwritten(self.folder, error) from error

    def _read(self, path: Path, prediction: str) -> int:
        """Take the answers of a file of this prediction; how many of its bytes are complete lines of it."""
        data = path.read_bytes()
        lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
        complete = 0
        for place, line in enumerate(lines):
            try:
                entry = json.loads(line)
                if place == 0:
                    if entry != {"prediction": prediction}:
                        return 0
                else:
                    self._take(entry)
            except (ValueError, RecursionError):
                break  # a disk that lost power may hold anything behind the last line that was synced
            complete += len(line)
        return complete

    def _take(self, entry: object) -> None:
        """Take the answer of a line, if it is one."""
        with contextlib.suppress(ValidationError):
            valid = _Entry.model_validate(entry)
            if not valid.text and valid.completion_tokens > 1 and "reasoning" not in valid.model_fields_set:
                return  # an earlier version took null for an answer, and lost the thought beside it
            self.answers[valid.row] = Answer(**valid.model_dump(exclude={"row"}))

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        unlock(self._handle)
