"""Rows of prediction files, and the fields by which a row says how its prediction is scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dataset.records import read_records
from dataset.row_fields import ABSENT
from novelgpt.scoring.answers import ANSWER_SCORES
from novelgpt.settings.errors import UserError
from novelgpt.text.messages import split_thought

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
    """

    id: str
    text: str
    reference: str
    scoring: ScoringFields = ScoringFields()
    finish_reason: str | None = None

    @property
    def scored_text(self) -> str:
        """The part of the prediction that is scored."""
        return self.text[: self.scoring.scored_characters]


def read_predictions(path: Path, keep_thoughts: bool = False) -> list[Prediction]:
    """The rows of a prediction file.

    Args:
        path: of the file.
        keep_thoughts: whether a thought (<think>…</think>) before an answer is part of the texts; otherwise both sides
            are the answer without it.

    Raises:
        UserError: an unreadable file, no rows, or a row without its texts.
    """
    records = list(read_records(path))
    taken = {str(record["id"]) for _, record in records if record.get("id") not in ABSENT}
    predictions = []
    for number, (where, record) in enumerate(records):
        if record.get("id") in ABSENT:
            name = str(number)
            while name in taken:
                name += "~"
        else:
            name = str(record["id"])
        scoring = read_scoring(record, where)
        fields = text_fields(record)
        for field in fields:
            if not isinstance(record.get(field), str):
                pairs = ", ".join(" and ".join(pair) for pair in TEXT_FIELDS)
                cause = f"{where}: field {field} is missing or not text"
                raise UserError(cause, f"give every row both texts, under the names {pairs}")
        text, reference = (record[field] for field in fields)
        if not keep_thoughts:
            text, reference = split_thought(text, False)[1], split_thought(reference, False)[1]
        predictions.append(Prediction(name, text, reference, scoring, record.get("finish_reason")))
    if not predictions:
        raise UserError(f"{path} holds no row", "name a file with predictions")
    return predictions


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
