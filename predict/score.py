"""Scores of a predictions file.

    python -m predict.score FILE.jsonl --output scores.json

FILE: any .jsonl, .json, .csv or .parquet whose rows have `prediction` and `reference`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dataset.readers import read_records
from novelgpt.scoring.rouge import mean_f, score_texts
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.errors import UserError, exit_on_user_error

DEFINITIONS = {
    "rouge-1": "mean F of the sets of jieba words, as rouge_chinese 1.0.3 gives it; empty texts count as 0",
    "rouge-2": "mean F of the sets of pairs of jieba words, as rouge_chinese 1.0.3 gives it; empty texts count as 0",
    "rouge-l": "mean F of the longest common subsequence of jieba words, as rouge_chinese 1.0.3 gives it; "
    "empty texts count as 0",
}


def score_predictions(predictions: list[str], references: list[str]) -> dict[str, Any]:
    """rouge-1, rouge-2, rouge-l (means of F in [0, 1]), counts and mean lengths in characters."""
    return {
        **mean_f(score_texts(predictions, references)),
        "rows": len(predictions),
        "empty_predictions": sum(not text.strip() for text in predictions),
        "prediction_characters": sum(map(len, predictions)) / len(predictions),
        "reference_characters": sum(map(len, references)) / len(references),
    }


def write_scores(scores: dict[str, Any], path: Path) -> None:
    """Write scores.json with the definition of each score, and print the scores."""
    definitions = {name: text for name, text in DEFINITIONS.items() if name in scores}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    text = json.dumps(scores | {"definitions": definitions}, ensure_ascii=False, indent=2)
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)
    table = Table(title="Scores", title_justify="left", show_header=False)
    for name, value in scores.items():
        if isinstance(value, (int, float)):
            table.add_row(name, f"{value:,.4f}" if isinstance(value, float) else f"{value:,}")
    Console().print(table)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Score the file that the command line names."""
    parser = CommandParser(prog="python -m predict.score", description="Scores of a predictions file.")
    parser.add_argument("file", type=Path, help="rows with the texts `prediction` and `reference`")
    parser.add_argument("--output", type=Path, help="where to write [default: scores.json beside the file]")
    words = parser.parse_args(argv)
    predictions: list[str] = []
    references: list[str] = []
    for where, record in read_records(words.file):
        for field, texts in (("prediction", predictions), ("reference", references)):
            if not isinstance(record.get(field), str):
                raise UserError(f"{where}: field {field} is missing or no text", "give every row both texts")
            texts.append(record[field])
    if not predictions:
        raise UserError(f"{words.file} holds no row", "name a file with predictions")
    write_scores(score_predictions(predictions, references), words.output or words.file.with_name("scores.json"))


if __name__ == "__main__":
    main()
