"""Rows of prediction files, and the fields by which a row says how its prediction is scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

from dataset.records import read_records
from dataset.row_fields import ABSENT
from novelgpt.scoring.answers import ANSWER_SCORES
from novelgpt.scoring.row_scores import RowScores
from novelgpt.settings.errors import UserError
from novelgpt.text.messages import split_thought
from predict.stored_rows import IdIndex, StoredRows

# Field names of predictions and references: ours, LLaMA-Factory's, ms-swift's.
TEXT_FIELDS = (("prediction", "reference"), ("predict", "label"), ("response", "labels"))


@dataclass(frozen=True)
class ScoringFields:
    """How a row wants to be scored.

    Attributes:
        metrics: names of the scores of short answers to compute.
        answers: further correct answers, for those.
        score_group: rows of one group get their own scores besides those of all rows; "" for none.
        scored_characters: of a longer prediction, only the first so many are scored; None for all.
    """

    metrics: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    score_group: str = ""
    scored_characters: int | None = None

    def fields(self) -> dict[str, Any]:
        """The fields that are set, for a row of predictions."""
        return {name: value for name, value in asdict(self).items() if value not in ((), "", None)}


@dataclass(frozen=True)
class Prediction:
    """A row of a prediction file.

    Attributes:
        id: of the row.
        text: the whole prediction.
        reference: the correct answer; "" for none.
        scoring: how it is scored.
        finish_reason: why it ended, "stop" for by itself; None where unknown.
        of_the_model: scores of the reference under the model, where it is at hand.
    """

    id: str
    text: str
    reference: str
    scoring: ScoringFields = ScoringFields()
    finish_reason: str | None = None
    of_the_model: RowScores = field(default_factory=dict)

    @property
    def scored_text(self) -> str:
        """The part of the prediction that is scored."""
        return self.text[: self.scoring.scored_characters]


class PredictionFile:
    """The rows of a prediction file, each of which was checked; they can be read many times, and are not in memory.

    A row without an id has its number for one, with as many "~" behind it as tell it apart from ids of the file.

    Args:
        path: of the file; a pipe, too.
        near: where results are written, on whose disk the rows are kept meanwhile.
        keep_thoughts: whether a thought (<think>…</think>) before an answer is part of the texts; otherwise both sides
            are the answer without it.

    Raises:
        UserError: an unreadable file, no rows, or a row without its texts.
    """

    def __init__(self, path: Path, near: Path, keep_thoughts: bool = False) -> None:
        self._rows = StoredRows(near)
        named = 0
        for where, record in read_records(path):
            name = None if record.get("id") in ABSENT else str(record["id"])
            named += name is not None
            self._rows.append([name, *_checked_row(record, where, keep_thoughts)])
        self._rows.finish()
        if not len(self._rows):
            raise UserError(f"{path} holds no row", "name a file with predictions")
        self._given: IdIndex | None = None  # where some rows have an id, and others do not
        if 0 < named < len(self._rows):
            self._given = IdIndex((row[0] for row in self._rows), lambda number: self._rows[number][0])

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Prediction]:
        return (self._prediction(number, row) for number, row in enumerate(self._rows))

    def __getitem__(self, number: int) -> Prediction:
        return self._prediction(number, self._rows[number])

    def _prediction(self, number: int, row: list[Any]) -> Prediction:
        name, text, reference, (metrics, answers, group, characters), finish_reason = row
        scoring = ScoringFields(tuple(metrics), tuple(answers), group, characters)
        return Prediction(self._name(number, name), text, reference, scoring, finish_reason)

    def ids(self) -> Iterator[str]:
        """The id of each row."""
        return (self._name(number, row[0]) for number, row in enumerate(self._rows))

    def index(self) -> IdIndex:
        """Which rows have an id."""
        return IdIndex(self.ids(), lambda number: self._name(number, self._rows[number][0]))

    def _name(self, number: int, given: str | None) -> str:
        if given is not None:
            return given
        name = str(number)
        while self._given is not None and self._given.numbers(name):
            name += "~"
        return name


def _checked_row(record: Mapping[str, Any], where: str, keep_thoughts: bool) -> list[Any]:
    """[text, reference, scoring fields, finish reason] of a row."""
    scoring = read_scoring(record, where)
    fields = text_fields(record)
    for field_name in fields:
        if not isinstance(record.get(field_name), str):
            pairs = ", ".join(" and ".join(pair) for pair in TEXT_FIELDS)
            cause = f"{where}: field {field_name} is missing or not text"
            raise UserError(cause, f"give every row both texts, under the names {pairs}")
    texts = [record[field_name] for field_name in fields]
    if not keep_thoughts:
        texts = [split_thought(text, False)[1] for text in texts]
    return [*texts, astuple(scoring), record.get("finish_reason")]


def read_scoring(record: Mapping[str, Any], where: str) -> ScoringFields:
    """The fields `metrics`, `answers`, `score_group` and `scored_characters` of a row.

    Raises:
        UserError: a field is of the wrong type, or names no score.
    """
    group = record.get("score_group", "")
    if not isinstance(group, str):
        raise UserError(f"{where}: field score_group is not text", 'write it in quotes: "2000"')
    characters = record.get("scored_characters")
    if characters is not None and (not isinstance(characters, int) or characters < 1):
        raise UserError(f"{where}: field scored_characters is {characters!r}", "write a number from 1, or leave it out")
    if "metrics" not in record:
        return ScoringFields(score_group=group, scored_characters=characters)
    metrics, answers = record["metrics"], record.get("answers", [])
    for name, texts in (("metrics", metrics), ("answers", answers)):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}: field {name} is not a list of texts", 'write ["…", "…"], or leave it out')
    if unknown := sorted(set(metrics) - set(ANSWER_SCORES)):
        raise UserError(f"{where}: no metric {unknown[0]!r}", f"choose from {', '.join(ANSWER_SCORES)}")
    return ScoringFields(tuple(metrics), tuple(answers), group, characters)


def text_fields(record: Mapping[str, Any]) -> tuple[str, str]:
    """Names of the fields that hold the prediction and the reference of a row."""
    # Ours first: a row may also keep the response that it was made from.
    return next((names for names in TEXT_FIELDS if names[0] in record), TEXT_FIELDS[0])
