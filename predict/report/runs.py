"""What a report reads of each run: scores, row scores, byte offsets of the texts in their file, training losses.

Texts stay on disk: for each row only its offset is kept, and a hash that identifies it in other runs.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dataset.row_fields import ABSENT
from novelgpt.scoring.row_scores import RowScores
from novelgpt.settings.errors import UserError
from novelgpt.settings.html_pages import visible
from novelgpt.settings.parsed_files import check_fields, read_object
from novelgpt.settings.remedies import python_module, run_pipeline
from novelgpt.settings.terminal import counted
from novelgpt.text.messages import split_thought
from predict.predictions import read_scoring, text_fields
from predict.report.metrics import is_number

MAX_RUNS = 6
# Names of prediction files: here, and in LLaMA-Factory.
FILES = ("predictions.jsonl", "generated_predictions.jsonl")


@dataclass(frozen=True)
class ReportRun:
    """One set of predictions.

    Attributes:
        number: position on the page, from 0.
        name: unique in the report, as a page can show it.
        file: of the predictions, beside row_scores.jsonl and scores.json.
        scores: content of scores.json.
        rows: content of row_scores.jsonl.
        offsets: of each row, the first byte of its line in the file.
        identities: of each row, a hash of id and reference.
        losses: log entries of the training that made the model, if its metrics.jsonl is beside; [] otherwise.
    """

    number: int
    name: str
    file: Path
    scores: dict[str, Any]
    rows: list[RowScores]
    offsets: list[int]
    identities: list[str]
    losses: list[dict[str, Any]]

    @property
    def letter(self) -> str:
        """Its short name on the page: A, B, …"""
        return chr(ord("A") + self.number)

    def texts(self, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The lines of these rows, one by one, with "prediction" (the part that is scored) and "reference"."""
        with self.file.open("rb") as file:
            for number in numbers:
                file.seek(self.offsets[number])
                entry = json.loads(file.readline())
                prediction, reference = _scored_texts(entry, self.rows[number]) or _texts(entry)
                scored = prediction[: entry.get("scored_characters")]
                yield {**entry, "id": self.rows[number].get("id"), "prediction": scored, "reference": reference}

    def values(self, name: str) -> list[float]:
        """The values of a score, of the rows that have it."""
        return [float(row[name]) for row in self.rows if is_number(row.get(name))]

    @property
    def scored(self) -> list[int]:
        """Numbers of the rows that have a reference."""
        return [number for number, row in enumerate(self.rows) if is_number(row.get("rouge-l"))]


def read_runs(paths: Sequence[Path]) -> list[ReportRun]:
    """The runs of these folders, in order.

    Args:
        paths: prediction folders, run folders with a prediction folder `predict`, or prediction files.

    Raises:
        UserError: too many, one twice, a file is missing or broken, or the files of a folder do not match.
    """
    if len(paths) > MAX_RUNS:
        raise UserError(f"{counted(len(paths), 'run')} are too many for one page", f"name at most {MAX_RUNS}")
    files = [_prediction_file(path) for path in paths]
    resolved = [file.parent.resolve() for file in files]
    for number, folder in enumerate(resolved):
        if folder in resolved[:number]:
            raise UserError(f"{paths[number]} is named twice", "name each run once")
    return [
        _read_run(number, visible(name), file)
        for number, (name, file) in enumerate(zip(_names(resolved), files, strict=True))
    ]


def matched_rows(first: ReportRun, other: ReportRun) -> list[int] | None:
    """For each row of `first`, the number of the same row (id and reference) in `other`; None if the rows differ."""
    if first.identities == other.identities:  # also where two rows are alike
        return list(range(len(first.identities)))
    numbers = {identity: number for number, identity in enumerate(other.identities)}
    if len(numbers) != len(first.identities) or numbers.keys() != set(first.identities):
        return None
    return [numbers[identity] for identity in first.identities]


def _prediction_file(path: Path) -> Path:
    places = (path, *(folder / name for folder in (path, path / "predict") for name in FILES))
    if found := next((place for place in places if place.is_file()), None):
        return found
    if not path.is_dir():
        raise UserError(f"{path} is not a folder", "name the folder of a run, or the folder with its predictions.jsonl")
    raise UserError(f"no predictions.jsonl in {path} or {path / 'predict'}", run_pipeline("predict", model=str(path)))


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest suffixes of the paths that are unique, without a last `predict`."""
    parts = [(folder.parent if folder.name == "predict" else folder).parts for folder in folders]
    count = 1
    while count < max(map(len, parts)) and len({part[-count:] for part in parts}) < len(parts):
        count += 1
    names = ["/".join(part[-count:]) for part in parts]
    # A run folder may hold predictions both itself and in `predict`.
    return ["/".join(folder.parts[-2:]) if names.count(n) > 1 else n for folder, n in zip(folders, names, strict=True)]


class _Scores(BaseModel):
    """Fields of scores.json that the report reads besides numbers."""

    intervals: dict[str, tuple[float | None, float | None]] = {}
    definitions: dict[str, Any] = {}
    generation: dict[str, Any] | None = None
    groups: dict[str, dict[str, Any]] = {}


def _read_run(number: int, name: str, file: Path) -> ReportRun:
    again = python_module(f"predict.score {shlex.quote(str(file))}")
    folder = file.parent
    path = folder / "scores.json"
    try:
        path.stat()  # raises FileNotFoundError, as for the other file
        scores = read_object(path, again)
        check_fields(_Scores, scores, str(path), again)
        rows = [row for _, row in _read_lines(folder / "row_scores.jsonl", again)]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing", again) from error
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}", "make the file readable") from error
    if scores.get("rows") != len(rows):
        raise UserError(f"{path} is not about the {counted(len(rows), 'row')} of row_scores.jsonl", again)
    offsets, identities = _read_offsets(file, rows, again)
    return ReportRun(number, name, file, scores, rows, offsets, identities, _read_losses(folder))


def _read_lines(path: Path, remedy: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(first byte, object) of each line."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}:{number}: not JSON: {error}", remedy) from error
                if not isinstance(entry, dict):
                    raise UserError(f"{path}:{number}: not a JSON object", remedy)
                yield offset, entry
            offset += len(line)


def _read_offsets(path: Path, rows: Sequence[RowScores], again: str) -> tuple[list[int], list[str]]:
    """Offsets and identities of the predictions, which must be those that the rows are scores of."""
    offsets: list[int] = []
    identities: list[str] = []
    for number, (offset, entry) in enumerate(_read_lines(path, "predict again, or correct the line")):
        where = f"{path}: row {number + 1}"
        if not all(isinstance(text, str) for text in _texts(entry)):
            raise UserError(f"{where} has no text `prediction` or `reference`", "predict again")
        row = rows[number] if number < len(rows) else {}
        identity = str(row.get("id"))
        read_scoring(entry, where)
        texts = _scored_texts(entry, row)
        if texts is None or not (entry.get("id") in ABSENT or str(entry["id"]) == identity):
            name = str(entry.get("id", number))
            raise UserError(f"{where}, {name}, is not what row_scores.jsonl was made of", again)
        offsets.append(offset)
        key = json.dumps([identity, texts[1]]).encode()  # in ASCII, as lone surrogates have no UTF-8
        identities.append(hashlib.blake2b(key, digest_size=12).hexdigest())
    if len(offsets) != len(rows) or not offsets:
        raise UserError(f"{path} has {counted(len(offsets), 'row')}, and row_scores.jsonl has {len(rows)}", again)
    return offsets, identities


def _texts(entry: dict[str, Any]) -> tuple[Any, Any]:
    """Prediction and reference, "" for none."""
    prediction, reference = text_fields(entry)
    return entry.get(prediction), entry.get(reference, "")


def _scored_texts(entry: dict[str, Any], row: RowScores) -> tuple[str, str] | None:
    """The texts that a row's scores belong to: unchanged, or without the thoughts before the answers; else None."""
    whole = _texts(entry)
    answers = split_thought(whole[0], False)[1], split_thought(whole[1], False)[1]
    scored, expected = slice(entry.get("scored_characters")), row.get("prediction_characters")
    return next((texts for texts in (whole, answers) if len(texts[0][scored]) == expected), None)


def _read_losses(folder: Path) -> list[dict[str, Any]]:
    """The entries of the run folder's metrics.jsonl, without those that a resumed run trained again."""
    path = next((path for path in (folder / "metrics.jsonl", folder.parent / "metrics.jsonl") if path.is_file()), None)
    if path is None or (path.parent != folder and folder.name != "predict"):
        return []
    entries: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the end of a line that a kill cut off
        if not isinstance(entry, dict) or not is_number(entry.get("step")):
            continue
        if entries and entry["step"] < entries[-1]["step"]:
            entries = [earlier for earlier in entries if earlier["step"] < entry["step"]]
        entries.append(entry)
    return entries
