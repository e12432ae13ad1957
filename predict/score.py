"""Scores of a predictions file.

    python -m predict.score FILE.jsonl
    python -m predict.score FILE.jsonl --compare OTHER.jsonl
    python -m predict.score FILE.jsonl --convention llamafactory

FILE: any .jsonl, .json, .csv or .parquet whose rows have `prediction` and `reference`; or `predict` and `label`, as
LLaMA-Factory writes them, or `response` and `labels`, as ms-swift does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from dataset.records import read_records
from dataset.row_fields import ABSENT
from novelgpt.scoring.conventions import CONVENTIONS
from novelgpt.scoring.row_scores import RowScores, ScoredRow, score_rows
from novelgpt.scoring.segmentation import segment
from novelgpt.scoring.summary import Comparison, compare_rows, definitions, summarise_rows
from novelgpt.settings.atomic_files import atomic_write
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.console import make_console
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.paths import check_folder_can_be_made
from novelgpt.settings.remedies import pip_install
from novelgpt.settings.terminal import counted, say
from novelgpt.text.messages import split_thought
from predict.scoring_fields import Scoring, read_scoring, read_texts

GROUPS_SHOWN = 4  # beside each other in the terminal


@dataclass(frozen=True)
class Prediction:
    """A row of a predictions file.

    Attributes:
        id: of the row.
        row: what is scored of it.
        known: scores that come with it: "stopped", whether the model ended it by itself; "cut", whether it is longer
            than what is scored of it.
        group: of the row; "" for none.
    """

    id: str
    row: ScoredRow
    known: Mapping[str, float]
    group: str = ""


def scored_prediction(
    name: str, prediction: str, reference: str, scoring: Scoring, finish_reason: str | None
) -> Prediction:
    """A row of predictions as it is scored."""
    known = {} if finish_reason is None else {"stopped": float(finish_reason == "stop")}
    if scoring.scored_characters is not None:
        known["cut"] = float(len(prediction) > scoring.scored_characters)
    return Prediction(name, scoring.scored_row(prediction, reference), known, scoring.score_group)


def read_predictions(path: Path, keep_thoughts: bool = False) -> list[Prediction]:
    """The rows of a predictions file.

    Args:
        path: of the file.
        keep_thoughts: whether a thought (<think>…</think>) before an answer belongs to the texts. Else the answer alone
            does, on either side.

    Raises:
        UserError: what the readers raise, no row, or a row without its texts.
    """
    records = list(read_records(path))
    taken = {str(record["id"]) for _, record in records if record.get("id") not in ABSENT}
    predictions = []
    for number, (where, record) in enumerate(records):
        scoring = read_scoring(record, where)
        name = str(number) if record.get("id") in ABSENT else str(record["id"])
        while record.get("id") in ABSENT and name in taken:
            name += "~"
        prediction, reference = read_texts(record, where)
        if not keep_thoughts:
            prediction, reference = (split_thought(text, False)[1] for text in (prediction, reference))
        predictions.append(scored_prediction(name, prediction, reference, scoring, record.get("finish_reason")))
    if not predictions:
        raise UserError(f"{path} holds no row", "name a file with predictions")
    return predictions


def score_predictions(
    predictions: Sequence[Prediction], of_the_model: Mapping[int, RowScores] | None = None, workers: int | None = None
) -> list[RowScores]:
    """Scores of each row, its "id" and, where it has one, its "score_group" first.

    Args:
        predictions: the rows.
        of_the_model: number of a row -> scores of its reference under the model, which are added.
        workers: processes; None for as many as there is work for.
    """
    scored = score_rows((prediction.row for prediction in predictions), workers)
    rows = []
    for number, (prediction, scores) in enumerate(zip(predictions, scored, strict=True)):
        group = {"score_group": prediction.group} if prediction.group else {}
        of_model = (of_the_model or {}).get(number, {})
        rows.append({"id": prediction.id, **group, **scores, **prediction.known, **of_model})
    return rows


def write_scores(rows: Sequence[RowScores], path: Path, further: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write scores.json (means, intervals, definitions, groups) and row_scores.jsonl beside it, and print the scores.

    Args:
        rows: scores of each row, as `score_predictions` gives them.
        path: of scores.json.
        further: what else belongs into it: the model, the settings, the time it took.

    Returns:
        What scores.json holds.
    """
    scores, intervals = _scores_of_the_whole(rows)
    scores |= further or {}
    scores["intervals"] = intervals
    texts = definitions()
    scores["definitions"] = {name: texts[name] for name in intervals if name in texts}
    groups = _groups(rows)
    if groups:
        scores["groups"] = groups
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    row_file = path.with_name("row_scores.jsonl") if path.name == "scores.json" else path.with_suffix(".rows.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(row_file, lines)
    _write_json(path, scores)
    _show_scores(scores)
    return scores


def _scores_of_the_whole(rows: Sequence[RowScores]) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Means and counts of some rows, and the intervals of the means."""
    means, intervals = summarise_rows(rows)
    finite = {name: value for name, value in means.items() if math.isfinite(value)}
    counts = {
        "rows": len(rows),
        "rows_without_reference": sum("rouge-1" not in row for row in rows),
        "empty_predictions": sum(row["prediction_characters"] == 0 for row in rows),
    }
    return {**finite, **counts}, {name: intervals[name] for name in finite}


def _groups(rows: Sequence[RowScores]) -> dict[str, dict[str, Any]]:
    """Name of each group -> its scores with their intervals; numbers in their order, other names as they come."""
    members: dict[str, list[RowScores]] = {}
    for row in rows:
        if "score_group" in row:
            members.setdefault(row["score_group"], []).append(row)
    names = list(members)
    if all(map(str.isdecimal, names)):
        names.sort(key=int)
    groups = {}
    for name in names:
        scores, intervals = _scores_of_the_whole(members[name])
        groups[name] = {**scores, "intervals": intervals}
    return groups


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Score the file that the command line names."""
    parser = CommandParser(prog="python -m predict.score", description="Scores of a predictions file.")
    parser.add_argument("file", type=Path, help="rows with the texts `prediction` and `reference` "
                        "(predict and label, response and labels)")  # fmt: skip
    parser.add_argument("--output", type=Path, help="where to write [default: scores.json beside the file]")
    parser.add_argument("--compare", type=Path, metavar="OTHER",
                        help="other predictions for the same rows: is OTHER better?")  # fmt: skip
    parser.add_argument("--convention", choices=sorted(CONVENTIONS), help="the figures that another tool would print")
    parser.add_argument("--scorer", choices=["novelgpt", "rouge_chinese"], default="novelgpt",
                        help="rouge_chinese: rouge-1/2/l by the package itself, slowly [default: novelgpt, which "
                        "equals it]")  # fmt: skip
    parser.add_argument("--workers", type=int, help="processes [default: one a core where there is much to score]")
    words = parser.parse_args(argv)
    if words.compare and words.convention:
        raise UserError("--compare and --convention at once", "take one of them")
    if words.workers is not None and words.workers < 1:
        raise UserError(f"--workers {words.workers} is too few", "take at least 1")
    if words.output:
        if words.output.is_dir():
            raise UserError(f"--output {words.output} is a folder", "name a file")
        check_folder_can_be_made(words.output.parent, f"--output {words.output}")
    predictions = read_predictions(words.file, keep_thoughts=words.convention is not None)
    if words.convention:
        _score_by_convention(predictions, words.convention, words.output or words.file.with_name("scores.json"))
    elif words.compare:
        _compare(words.file, predictions, words.compare, words.output, words.workers)
    else:
        rows = score_predictions(predictions, workers=words.workers)
        further = {}
        if words.scorer == "rouge_chinese":
            further["scorer"] = _score_by_package(predictions, rows)
        write_scores(rows, words.output or words.file.with_name("scores.json"), further)


def _score_by_convention(predictions: Sequence[Prediction], convention: str, path: Path) -> None:
    rows = [prediction.row for prediction in predictions]
    scores = CONVENTIONS[convention]([row.prediction for row in rows], [row.reference for row in rows])
    recipe = " ".join((CONVENTIONS[convention].__doc__ or "").split())
    path = path.with_name(f"scores.{convention}.json") if path.name == "scores.json" else path
    _write_json(path, {**scores, "rows": len(rows), "recipe": recipe})
    table = Table(title=f"Scores as {convention} prints them", title_justify="left", show_header=False)
    for name, value in scores.items():
        table.add_row(name, f"{value:.4f}")
    make_console().print(table)
    say(recipe)


def _score_by_package(predictions: Sequence[Prediction], rows: list[RowScores]) -> str:
    """Put rouge_chinese's own figures into the rows; says which version made them."""
    try:
        import rouge_chinese
    except ImportError as error:
        raise UserError("--scorer rouge_chinese needs that package", pip_install("rouge-chinese")) from error
    from importlib.metadata import version

    package = rouge_chinese.Rouge()
    for prediction, row in zip(predictions, rows, strict=True):
        sides = [segment(text) for text in (prediction.row.prediction, prediction.row.reference)]
        if all(side.strip() for side in sides):  # the package raises where a side is blank
            row |= {name: value["f"] for name, value in package.get_scores(*sides)[0].items()}
    return f"rouge_chinese {version('rouge-chinese')}"


def _compare(
    file: Path, predictions: Sequence[Prediction], other_file: Path, output: Path | None, workers: int | None
) -> None:
    others = {prediction.id: prediction for prediction in read_predictions(other_file)}
    missing = [prediction.id for prediction in predictions if prediction.id not in others]
    if missing or len(others) != len(predictions):
        raise UserError(
            f"{file} and {other_file} do not answer the same rows"
            + (f": {missing[0]} is in the first only" if missing else f": {len(predictions)} and {len(others)} ids"),
            "predict with both models on the same files",
        )
    paired = [others[prediction.id] for prediction in predictions]
    for prediction, other in zip(predictions, paired, strict=True):
        if prediction.row.reference != other.row.reference:
            raise UserError(f"row {prediction.id} has two references", "predict with both models on the same files")
    comparisons = compare_rows(
        score_predictions(predictions, workers=workers), score_predictions(paired, workers=workers)
    )
    written: dict[str, Any] = {"first": str(file), "second": str(other_file), "rows": len(predictions)}
    written["scores"] = [asdict(comparison) for comparison in comparisons]
    path = output or file.with_name("comparison.json")
    _write_json(path, written)
    _show_comparison(comparisons, len(predictions))
    say(f"  {path}")


def _show_scores(scores: Mapping[str, Any]) -> None:
    table = Table(title="Scores", title_justify="left")
    for title in ("score", "value", "95 % interval", "references"):
        table.add_column(title, justify="left" if title == "score" else "right")
    for name in _shown(scores):
        low, high = scores["intervals"].get(name, (None, None))
        interval = "" if low is None or not math.isfinite(low) else f"{low:,.4f} to {high:,.4f}"
        table.add_row(name, _told(scores, name), interval, _told(scores, _of_references(name)))
    make_console().print(table)
    groups = scores.get("groups", {})
    if len(groups) > GROUPS_SHOWN:
        say(f"scores of {counted(len(groups), 'group')}: see the file")
    elif groups:
        _show_groups(groups)


def _show_groups(groups: Mapping[str, Mapping[str, Any]]) -> None:
    """A table of the groups side by side, each prediction beside its references."""
    table = Table(title="Scores of each group", title_justify="left")
    table.add_column("score")
    for group in groups:
        table.add_column(group, justify="right")
        table.add_column("references", justify="right")
    names = dict.fromkeys(name for scores in groups.values() for name in _shown(scores))
    for name in names:
        cells = [(_told(scores, name), _told(scores, _of_references(name))) for scores in groups.values()]
        table.add_row(name, *(cell for pair in cells for cell in pair))
    make_console().print(table)


def _shown(scores: Mapping[str, Any]) -> list[str]:
    """Names of the scores that get a line: numbers, but those of the references, which stand beside."""
    beside = {_of_references(name) for name in scores}
    return [name for name, value in scores.items() if isinstance(value, (int, float)) and name not in beside]


def _of_references(name: str) -> str:
    """Name of the same score of the references."""
    return "reference_characters" if name == "prediction_characters" else f"reference_{name}"


def _told(scores: Mapping[str, Any], name: str) -> str:
    value = scores.get(name)
    return "" if value is None else f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"


def _show_comparison(comparisons: Sequence[Comparison], rows: int) -> None:
    table = Table(title=f"Second against first, {counted(rows, 'row')}", title_justify="left")
    for title in ("score", "first", "second", "difference", "95 % interval", "p"):
        table.add_column(title, justify="left" if title == "score" else "right")
    for one in comparisons:
        if one.name.startswith("reference_") or not (math.isfinite(one.first) and math.isfinite(one.second)):
            continue
        certain = one.p_value < 0.05
        table.add_row(
            one.name, f"{one.first:,.4f}", f"{one.second:,.4f}", f"{one.second - one.first:+,.4f}",
            f"{one.low:+,.4f} to {one.high:+,.4f}", f"{one.p_value:.4f}", style="bold" if certain else "",
        )  # fmt: skip
    make_console().print(table)
    say("bold: p below 0.05 by approximate randomization. With many scores, one in twenty is so by chance.")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


if __name__ == "__main__":
    main()
