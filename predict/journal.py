"""Answers on disk as they come, so that a killed prediction resumes: no row is answered twice, none is missing."""

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
        answers: by row number, those of all processes when this one started, and its own.

    Raises:
        UserError: another prediction is writing here, or the folder cannot be written.
    """

    def __init__(self, folder: Path, prediction: str, process: int = 0) -> None:
        self.folder = folder / "predictions.partial"
        self.answers: dict[int, Answer] = {}
        own = self.folder / f"{process}.jsonl"
        try:
            # Also while another prediction, which is just ending, removes the folder.
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
        """Write answers by row number; when this returns, they are on the disk.

        Raises:
            UserError: they cannot be written; earlier ones are.
        """
        self.answers.update(answers)
        self._append(
            [json.dumps({"row": number, **asdict(answer)}, ensure_ascii=False) for number, answer in answers.items()]
        )

    def remove(self) -> None:
        """Delete all files, once the results are written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _append(self, lines: list[str]) -> None:
        # A model may write a lone surrogate, which has no UTF-8.
        try:
            self.file.write("".join(line + "\n" for line in lines).encode("utf-8", errors="replace"))
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # the buffer would be written again
                self.file.close()
            raise unwritten(self.folder, error) from error

    def _read(self, path: Path, prediction: str) -> int:
        """Read the answers of a file of this prediction; returns how many of its bytes are complete lines."""
        data = path.read_bytes()
        first, *lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True) or [b""]
        if first != json.dumps({"prediction": prediction}).encode() + b"\n":
            return 0
        complete = len(first)
        for line in lines:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                break  # after a power loss, anything may follow the last synced line
            complete += len(line)
            with contextlib.suppress(ValidationError):
                valid = _JournalLine.model_validate(entry)
                # An earlier version took null for an answer, and lost the thought beside it.
                if valid.text or valid.completion_tokens <= 1 or "reasoning" in valid.model_fields_set:
                    self.answers[valid.row] = Answer(**valid.model_dump(exclude={"row"}))
        return complete

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        unlock(self._handle)
