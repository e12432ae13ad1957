"""The fields by which a row says how its prediction is scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from novelgpt.scoring.answers import ANSWER_SCORES
from novelgpt.scoring.row_scores import ScoredRow
from novelgpt.settings.errors import UserError

# What predictions and references are called: here, by LLaMA-Factory, by ms-swift.
TEXT_FIELDS = (("prediction", "reference"), ("predict", "label"), ("response", "labels"))


@dataclass(frozen=True)
class Scoring:
    """What a row says of its scores; nothing by default.

    Attributes:
        metrics: names of the scores of short answers that it asks for.
        answers: further true answers, for those.
        score_group: rows of one group have scores of their own beside those of all rows; "" for none.
        scored_characters: of a longer prediction, only the first so many are scored; None for all.
    """

    metrics: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    score_group: str = ""
    scored_characters: int | None = None

    def scored_row(self, prediction: str, reference: str) -> ScoredRow:
        """What is scored of a prediction."""
        return ScoredRow(prediction[: self.scored_characters], reference, self.metrics, self.answers)

    def fields(self) -> dict[str, Any]:
        """The fields that say so, for a row of predictions."""
        return {name: value for name, value in asdict(self).items() if value not in ((), "", None)}


def read_scoring(record: Mapping[str, Any], where: str) -> Scoring:
    """What the fields `metrics`, `answers`, `score_group` and `scored_characters` of a row say.

    Raises:
        UserError: a field is of another kind, or names no score.
    """
    group = record.get("score_group", "")
    if not isinstance(group, str):
        raise UserError(f"{where}: field score_group is no text", 'write it in quotes: "2000"')
    characters = record.get("scored_characters")
    if characters is not None and (not isinstance(characters, int) or characters < 1):
        raise UserError(f"{where}: field scored_characters is {characters!r}", "write a number from 1, or leave it out")
    if "metrics" not in record:
        return Scoring(score_group=group, scored_characters=characters)
    texts = {}
    for name in ("metrics", "answers"):
        value = record.get(name, [])
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise UserError(f"{where}: field {name} is no list of texts", 'write ["…", "…"], or leave it out')
        texts[name] = tuple(value)
    unknown = set(texts["metrics"]) - set(ANSWER_SCORES)
    if unknown:
        raise UserError(f"{where}: no metric {sorted(unknown)[0]!r}", f"take of {', '.join(ANSWER_SCORES)}")
    return Scoring(texts["metrics"], texts["answers"], group, characters)


def text_fields(record: Mapping[str, Any]) -> tuple[str, str]:
    """Names of the fields that hold the prediction and the reference of a row."""
    # Our own name before the others': a row may as well keep the response that it was made from.
    return next((names for names in TEXT_FIELDS if names[0] in record), TEXT_FIELDS[0])


def read_texts(record: Mapping[str, Any], where: str) -> tuple[str, str]:
    """Prediction and reference of a row, under any of the names of `TEXT_FIELDS`.

    Raises:
        UserError: one of them is missing or no text.
    """
    names = text_fields(record)
    for name in names:
        if not isinstance(record.get(name), str):
            pairs = ", ".join(" and ".join(pair) for pair in TEXT_FIELDS)
            raise UserError(
                f"{where}: field {name} is missing or no text", f"give every row both texts, under the names {pairs}"
            )
    return record[names[0]], record[names[1]]
