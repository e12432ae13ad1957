"""What a report reads of each run: scores, scores of rows, where the texts stand in their file, the losses of training.

Texts stay on the disk: of each row only its place in the file is held, and what tells whether two runs answered the
same rows.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from novelgpt.scoring.row_scores import RowScores
from novelgpt.settings.errors import UserError
from novelgpt.settings.remedies import python_module
from novelgpt.settings.units import counted
from predict.report.metrics import is_number
from predict.scoring_fields import read_scoring

MOST_RUNS = 6


@dataclass(frozen=True)
class Run:
    """One set of predictions.

    Attributes:
        name: unlike that of every other run of the report.
        folder: with predictions.jsonl, row_scores.jsonl and scores.json.
        scores: what scores.json holds.
        rows: what row_scores.jsonl holds.
        places: of each row, the first byte of its line in predictions.jsonl.
        identities: of each row, a hash of id and reference.
        losses: log entries of the training that made the model, where they lie beside; [] otherwise.
    """

    name: str
    folder: Path
    scores: dict[str, Any]
    rows: list[RowScores]
    places: list[int]
    identities: list[str]
    losses: list[dict[str, Any]]

    def texts(self, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The lines of predictions.jsonl of these rows, one by one; of a prediction, the part that is scored."""
        with (self.folder / "predictions.jsonl").open("rb") as file:
            for number in numbers:
                file.seek(self.places[number])
                entry = json.loads(file.readline())
                yield {**entry, "prediction": entry["prediction"][: entry.get("scored_characters")]}

    def values(self, name: str) -> list[float]:
        """A score of each row that has it."""
        return [float(row[name]) for row in self.rows if is_number(row.get(name))]

    @property
    def scored(self) -> list[int]:
        """Numbers of the rows that have a reference, and so the scores of a pair."""
        return [number for number, row in enumerate(self.rows) if is_number(row.get("rouge-l"))]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs of these folders, in order.

    Args:
        paths: prediction folders, or run folders in which the folder `predict` is one.

    Raises:
        UserError: too many, one twice, a file is missing or broken, or the files of a folder do not fit together.
    """
    if len(paths) > MOST_RUNS:
        raise UserError(f"{counted(len(paths), 'run')} are too many for one page", f"name at most {MOST_RUNS}")
    folders = [_prediction_folder(path) for path in paths]
    resolved = [folder.resolve() for folder in folders]
    for number, folder in enumerate(resolved):
        if folder in resolved[:number]:
            raise UserError(f"{paths[number]} is named twice", "name each run once")
    return [_read_run(folder, name) for folder, name in zip(folders, _names(resolved), strict=True)]


def matched_rows(first: Run, other: Run) -> list[int] | None:
    """Of each row of `first`, the number of the same row (id and reference) in `other`; None if they answer others."""
    if first.identities == other.identities:
        return list(range(len(first.identities)))
    places = {identity: number for number, identity in enumerate(other.identities)}
    if len(places) != len(first.identities) or places.keys() != set(first.identities):
        return None
    return [places[identity] for identity in first.identities]


def _prediction_folder(path: Path) -> Path:
    for folder in (path, path / "predict"):
        if (folder / "predictions.jsonl").is_file():
            return folder
    if not path.is_dir():
        raise UserError(f"{path} is no folder", "name the folder of a run, or the folder with its predictions.jsonl")
    raise UserError(
        f"no predictions.jsonl in {path} or {path / 'predict'}", f"bash scripts/run_predict.sh with MODEL={path}"
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ from each other, without a last `predict`."""
    parts = [(folder.parent if folder.name == "predict" else folder).parts for folder in folders]
    count = 1
    while count < max(map(len, parts)) and len({part[-count:] for part in parts}) < len(parts):
        count += 1
    names = ["/".join(part[-count:]) for part in parts]
    # A run folder may hold predictions in itself and in `predict`.
    return ["/".join(folder.parts[-2:]) if names.count(n) > 1 else n for folder, n in zip(folders, names, strict=True)]


def _read_run(folder: Path, name: str) -> Run:
    again = python_module(f"predict.score {shlex.quote(str(folder / 'predictions.jsonl'))}")
    path = folder / "scores.json"
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        rows = [row for _, row in _read_lines(folder / "row_scores.jsonl", again)]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing", again) from error
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}", "make the file readable") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}", again) from error
    if not isinstance(scores, dict) or scores.get("rows") != len(rows):
        raise UserError(f"{path} is not about the {counted(len(rows), 'row')} of row_scores.jsonl", again)
    places, identities = _read_places(folder / "predictions.jsonl", rows, again)
    return Run(name, folder, scores, rows, places, identities, _read_losses(folder))


def _read_lines(path: Path, remedy: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(first byte, object) of each line."""
    place = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    entry = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}:{number}: no JSON: {error}", remedy) from error
                if not isinstance(entry, dict):
                    raise UserError(f"{path}:{number}: no JSON object", remedy)
                yield place, entry
            place += len(line)


def _read_places(path: Path, rows: Sequence[RowScores], again: str) -> tuple[list[int], list[str]]:
    """Places and identities of the predictions, which must be those that the rows are scores of."""
    places: list[int] = []
    identities: list[str] = []
    for number, (place, entry) in enumerate(_read_lines(path, "predict again, or mend the line")):
        prediction, reference = entry.get("prediction"), entry.get("reference", "")
        if not (isinstance(prediction, str) and isinstance(reference, str)):
            raise UserError(f"{path}: row {number + 1} has no text `prediction` or `reference`", "predict again")
        identity = str(entry.get("id", number))
        row = rows[number] if number < len(rows) else {}
        scored = read_scoring(entry, f"{path}: row {number + 1}").scored_row(prediction, reference).prediction
        if str(row.get("id")) != identity or row.get("prediction_characters") != len(scored):
            raise UserError(f"{path}: row {number + 1}, {identity}, is not what row_scores.jsonl was made of", again)
        places.append(place)
        key = json.dumps([identity, reference]).encode()  # escapes, so that no text is without bytes
        identities.append(hashlib.blake2b(key, digest_size=12).hexdigest())
    if len(places) != len(rows) or not places:
        raise UserError(f"{path} has {counted(len(places), 'row')}, and row_scores.jsonl has {len(rows)}", again)
    return places, identities


def _read_losses(folder: Path) -> list[dict[str, Any]]:
    """The entries of the metrics.jsonl of the run folder, as they stand after the last resumption."""
    path = next((path for path in (folder / "metrics.jsonl", folder.parent / "metrics.jsonl") if path.is_file()), None)
    if path is None or (path.parent != folder and folder.name != "predict"):
        return []
    entries: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the end of a line that a kill cut off
        if not isinstance(entry, dict) or not is_number(entry.get("step")):
            continue
        if entries and entry["step"] < entries[-1]["step"]:
            # Resumed from an earlier checkpoint: what came after it was trained again.
            entries = [earlier for earlier in entries if earlier["step"] < entry["step"]]
        entries.append(entry)
    return entries
