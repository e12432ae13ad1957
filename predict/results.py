"""The results of a prediction: predictions.jsonl, scores.json, a first look on the terminal, the model card."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from dataset.sources import RowSource
from novelgpt.inference.generation import Answer
from novelgpt.model.card import SCORES, code, read_card, table, write_card
from novelgpt.scoring.summary import reference_scores
from novelgpt.settings.atomic_files import atomic_file, hash_json
from novelgpt.settings.file_hashes import content_hash
from novelgpt.settings.terminal import counted, say
from novelgpt.text.messages import split_thought
from predict.predictions import Prediction
from predict.rows import PromptRow, PromptRows
from predict.score import score_predictions, write_scores

SHOWN_ANSWERS = 2
SHOWN_CHARACTERS = 160
CARD_COLUMNS = ["rows of", "rows", "rouge-1", "rouge-2", "rouge-l", "bleu4_char", "rep4_char", "perplexity", "stopped"]
CARD_NOTE = "By `predict`, whose scores.json has all scores with their definitions, intervals and settings."


@dataclass
class AnsweredRow:
    """A row and its answer, thoughts separated from the texts of both sides.

    Attributes:
        row: the question.
        answer: to it.
        thought: of the answer; "" for none.
        text: the answer without it.
        reference_thought: of the reference.
        reference: the reference without it.
    """

    row: PromptRow
    answer: Answer

    def __post_init__(self) -> None:
        self.thought, self.text = self.answer.reasoning, self.answer.text
        self.reference_thought, self.reference = "", self.row.reference
        if not self.row.plain:  # raw text has no thought
            # Some gateways return the thought separately and leave it in the text as well.
            thought, self.text = split_thought(self.text, False if self.thought else self.row.opened)
            self.thought = self.thought or thought
            self.reference_thought, self.reference = split_thought(self.reference, False)


@dataclass
class Endings:
    """How answers ended.

    Attributes:
        rows: that were answered.
        tokens: of all answers.
        counted: whether the tokens of every answer that has any are known; some servers do not count them.
        only_thoughts: answers that are a thought and no more.
        reasons: how many answers ended for each reason.
    """

    rows: int = 0
    tokens: int = 0
    counted: bool = True
    only_thoughts: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, one: AnsweredRow) -> None:
        """Count an answer."""
        self.rows += 1
        self.tokens += one.answer.completion_tokens
        self.counted = self.counted and bool(one.answer.completion_tokens or not one.answer.text)
        self.only_thoughts += bool(one.thought) and not one.text
        self.reasons[one.answer.finish_reason] += 1


def write_results(
    rows: PromptRows,
    answers: Mapping[int, Answer],
    sums: numpy.ndarray,
    settings: Mapping[str, Any],
    known: int,
    folder: Path,
) -> tuple[dict[str, Any], Endings]:
    """Write predictions.jsonl and the scores, and print the first answers; one row after the other is in memory.

    Args:
        rows: all of them.
        answers: by the number of the row.
        sums: [rows, 3] of each reference under the model, as `row_sums` returns them; 0 for none.
        settings: further entries of scores.json; "seconds" is the time of all but `known` answers.
        known: number of answers from earlier, interrupted predictions.
        folder: of both files.

    Returns:
        The content of scores.json, and how the answers ended.
    """
    endings = Endings()
    with atomic_file(folder / "predictions.jsonl") as file:
        for number, row in enumerate(rows):
            one = AnsweredRow(row, answers[number])
            file.write((_line(one) + "\n").encode())
            endings.add(one)
    for number in range(min(SHOWN_ANSWERS, len(rows))):
        _show(AnsweredRow(rows[number], answers[number]))
    # The time of answers made before an interrupt is unknown.
    if not known and endings.counted:
        settings = {**settings, "tokens_per_second": endings.tokens / settings["seconds"]}
    predictions = (
        _prediction(AnsweredRow(row, answers[number]), sums[number].tolist()) for number, row in enumerate(rows)
    )
    return write_scores(score_predictions(predictions), folder / "scores.json", settings), endings


def _prediction(one: AnsweredRow, sums: list[float]) -> Prediction:
    of_the_model = reference_scores(sums) if sums[1] else {}
    return Prediction(one.row.id, one.text, one.reference, one.row.scoring, one.answer.finish_reason, of_the_model)


def _line(one: AnsweredRow) -> str:
    line: dict[str, Any] = {
        "id": one.row.id,
        "prompt": one.row.prompt,
        "reference": one.reference,
        "prediction": one.text,
        "finish_reason": one.answer.finish_reason,
        "prompt_tokens": one.answer.prompt_tokens or len(one.row.prompt_ids),
        "completion_tokens": one.answer.completion_tokens,
    }
    thoughts = {"reasoning": one.thought, "reference_reasoning": one.reference_thought}
    line |= {name: value for name, value in thoughts.items() if value}
    return json.dumps(line | one.row.scoring.fields(), ensure_ascii=False)


def _show(one: AnsweredRow) -> None:
    """Print an answer below the end of its prompt and the start of its reference."""

    def start(text: str) -> str:
        return text[:SHOWN_CHARACTERS].replace("\n", "⏎") + "…" * (len(text) > SHOWN_CHARACTERS)

    prompt = one.row.prompt
    end = "…" * (len(prompt) > SHOWN_CHARACTERS) + prompt[-SHOWN_CHARACTERS:].replace("\n", "⏎")
    say(
        f"row {one.row.id}",
        f"  prompt        {end}",
        *([f"  reference     {start(one.reference)}"] if one.reference else []),
        f"  prediction    {start(one.text)}  ({one.answer.finish_reason}, "
        f"{counted(one.answer.completion_tokens, 'token')})",
    )


def say_endings(endings: Endings) -> None:
    """Say how many answers are only a thought, or ended neither by themselves nor at --max_new_tokens."""
    if endings.only_thoughts:
        say(
            f"{endings.only_thoughts} of {endings.rows} answers are only a thought, and count as empty: raise "
            "--max_new_tokens; a server that takes whole answers for thoughts needs no reasoning parser"
        )
    for reason in sorted(endings.reasons.keys() - {"stop", "length"}):
        say(f"{endings.reasons[reason]} of {endings.rows} answers ended with {reason!r}, according to the server")


def _digest(source: RowSource) -> str:
    """What tells the rows of a source from others: the hash of its file, or of all that decides them."""
    is_file = source.files == (source.given,) and Path(source.given).is_file()
    return content_hash(Path(source.given))[0] if is_file else hash_json(source.identity())


def add_scores_to_card(folder: Path, sources: Sequence[RowSource], scores: Mapping[str, Any]) -> None:
    """Add a line to the scores of a model's card, replacing an earlier one for the same rows.

    Nothing happens if the folder has no card, or one that was edited, or if rows came through a pipe, which cannot be
    read again to name them.

    Args:
        folder: of the model.
        sources: whose rows were answered.
        scores: content of scores.json.
    """
    card = read_card(folder)
    if card is None or any(Path(file).exists() and not Path(file).is_file() for one in sources for file in one.files):
        return
    hashes = [(Path(source.given).name, _digest(source)) for source in sources]
    names = ", ".join(f"{code(name)} sha256 {code(digest[:16])}" for name, digest in hashes)
    cells = [f"{scores[name]:.4f}" if name in scores else "" for name in CARD_COLUMNS[2:]]
    *head, line = table(CARD_COLUMNS, [[names, str(scores["rows"]), *cells]]).splitlines()
    rows = line.split(" | ")[:2]
    others = [row for row in card.sections.get(SCORES, "").splitlines()[4:] if row.split(" | ")[:2] != rows]
    card.sections[SCORES] = "\n".join([CARD_NOTE, "", *head, *others, line])
    if "rouge-l" in scores:
        card.metadata["metrics"] = sorted({*card.metadata.get("metrics", []), "rouge"})
    try:
        write_card(folder, card)
    except OSError as error:
        say(f"the card of {folder} does not get the scores: {error.strerror or error}", style="yellow")
