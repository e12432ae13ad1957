"""Scores of a prediction file.

    python -m predict.score FILE.jsonl
    python -m predict.score FILE.jsonl --compare OTHER.jsonl
    python -m predict.score FILE.jsonl --convention llamafactory

FILE: any .jsonl, .json, .csv or .parquet whose rows have `prediction` and `reference`; or `predict` and `label`, as
LLaMA-Factory writes them, or `response` and `labels`, as ms-swift does.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
from argparse import Namespace
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy

from novelgpt.scoring.conventions import CONVENTIONS
from novelgpt.scoring.row_scores import RowScores, ScoredRow, score_rows
from novelgpt.scoring.score_table import ScoreColumns, ScoreTable
from novelgpt.scoring.segmentation import segment
from novelgpt.scoring.summary import Comparison, compare_columns, definitions, reference_name, summarise_columns
from novelgpt.settings.atomic_files import atomic_file, atomic_write
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.console import make_console, number_table
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.paths import check_folder_can_be_made, existing_folder
from novelgpt.settings.remedies import pip_install
from novelgpt.settings.terminal import counted, say
from predict.predictions import Prediction, PredictionFile

MAX_GROUPS = 4  # side by side in the terminal


def score_predictions(predictions: Iterable[Prediction], workers: int | None = None) -> Iterator[RowScores]:
    """Scores of each row: "id" and, if set, "score_group" first; then "stopped" and "cut" where they are known.

    Args:
        predictions: the rows, of which a few are in memory at once.
        workers: processes; None for as many as there is work for.
    """
    waiting: deque[Prediction] = deque()

    def to_score() -> Iterator[ScoredRow]:
        for one in predictions:
            waiting.append(one)
            yield ScoredRow(one.scored_text, one.reference, one.scoring.metrics, one.scoring.answers)

    for scores in score_rows(to_score(), workers):
        one = waiting.popleft()
        row: RowScores = {"id": one.id}
        if one.scoring.score_group:
            row["score_group"] = one.scoring.score_group
        row |= scores
        if one.finish_reason is not None:
            row["stopped"] = float(one.finish_reason == "stop")
        if one.scoring.scored_characters is not None:
            row["cut"] = float(one.text != one.scored_text)
        yield row | one.of_the_model


def write_scores(rows: Iterable[RowScores], path: Path, further: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write scores.json (means, intervals, definitions, groups) and row_scores.jsonl beside it, and print the scores.

    Args:
        rows: scores of each row, as `score_predictions` returns them; each is written when it comes.
        path: of scores.json.
        further: other entries: the model, the settings, the time it took.

    Returns:
        The content of scores.json.
    """
    row_file = path.with_name("row_scores.jsonl") if path.name == "scores.json" else path.with_suffix(".rows.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    table, texts = ScoreTable(path.parent), definitions()
    members: dict[str, array[int]] = {}  # of each group, numbers of its rows
    with atomic_file(row_file) as file:
        for number, row in enumerate(rows):
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            table.append(row)
            if "score_group" in row:
                members.setdefault(row["score_group"], array("q")).append(number)
        scores = _overall_scores(table.columns())
        intervals = scores.pop("intervals")
        scores |= further or {}
        scores |= {"intervals": intervals, "definitions": {name: texts[name] for name in intervals if name in texts}}
        names = sorted(members, key=int) if all(map(str.isdecimal, members)) else list(members)
        if members:
            numbers = {name: numpy.frombuffer(members[name], numpy.int64) for name in names}
            scores["groups"] = {name: _overall_scores(table.columns(numbers[name])) for name in names}
    _write_json(path, scores)
    _show_scores(scores)
    return scores


def _overall_scores(columns: ScoreColumns) -> dict[str, Any]:
    """Return means and counts of some rows, and the "intervals" of the means."""
    means, intervals = summarise_columns(columns)
    finite: dict[str, Any] = {name: value for name, value in means.items() if math.isfinite(value)}
    with_reference = columns.places.get("rows_with_rouge-1")
    empty = columns.values[columns.places["prediction_characters"]] == 0
    counts = {
        "rows": columns.rows,
        "rows_without_reference": columns.rows
        - (0 if with_reference is None else int(columns.values[with_reference].sum())),
        "empty_predictions": int(numpy.count_nonzero(empty)),
    }
    return finite | counts | {"intervals": {name: intervals[name] for name in finite}}


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Score the file that the command line names."""
    parser = CommandParser(prog="python -m predict.score", description="Scores of a prediction file.")
    parser.add_argument("file", type=Path, help="rows with the texts `prediction` and `reference` "
                        "(predict and label, response and labels)")  # fmt: skip
    parser.add_argument("--output", type=Path, help="where to write [default: scores.json beside the file]")
    parser.add_argument("--compare", type=Path, metavar="OTHER",
                        help="other predictions for the same rows: is OTHER better?")  # fmt: skip
    parser.add_argument("--convention", choices=sorted(CONVENTIONS), help="the scores that another tool would print")
    parser.add_argument("--scorer", choices=["novelgpt", "rouge_chinese"], default="novelgpt",
                        help="rouge_chinese: rouge-1/2/l by that package, slow [default: novelgpt, with equal "
                        "results]")  # fmt: skip
    parser.add_argument("--workers", type=int, help="processes [default: one per core for large files]")
    args = parser.parse_args(argv)
    if args.compare and args.convention:
        raise UserError("--compare and --convention at once", "choose one of them")
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers} is too few", "use at least 1")
    if args.output:
        if args.output.is_dir():
            raise UserError(f"--output {args.output} is a folder", "name a file")
        check_folder_can_be_made(args.output.parent, f"--output {args.output}")
    output = args.output or args.file.with_name("scores.json")
    try:
        _score(args, output)
    except BrokenPipeError:
        raise  # of the terminal
    except OSError as error:
        cause = f"{error.filename or output.parent} cannot be written: {error.strerror or error}"
        raise UserError(cause, "make room there, or name another --output") from error


def _score(args: Namespace, output: Path) -> None:
    predictions = PredictionFile(args.file, output.parent, keep_thoughts=args.convention is not None)
    if args.convention:
        _score_by_convention(predictions, args)
    elif args.compare:
        _compare(predictions, args)
    elif args.scorer == "rouge_chinese":
        if importlib.util.find_spec("rouge_chinese") is None:
            raise UserError("--scorer rouge_chinese needs that package", pip_install("rouge-chinese"))
        version = importlib.metadata.version("rouge-chinese")
        write_scores(_with_package_scores(predictions, args), output, {"scorer": f"rouge_chinese {version}"})
    else:
        write_scores(score_predictions(predictions, args.workers), output)


def _score_by_convention(predictions: PredictionFile, args: Namespace) -> None:
    convention = CONVENTIONS[args.convention]
    scores = convention((one.scored_text for one in predictions), (one.reference for one in predictions))
    recipe = " ".join((convention.__doc__ or "").split())
    path = args.output or args.file.with_name("scores.json")
    path = path.with_name(f"scores.{args.convention}.json") if path.name == "scores.json" else path
    _write_json(path, {**scores, "rows": len(predictions), "recipe": recipe})
    table = number_table(f"Scores as {args.convention} prints them", "score", "value")
    table.show_header = False
    for name, value in scores.items():
        table.add_row(name, f"{value:.4f}")
    make_console().print(table)
    say(recipe)


def _with_package_scores(predictions: PredictionFile, args: Namespace) -> Iterator[RowScores]:
    """The rows' scores, with rouge_chinese's own in place of those that are equal to them."""
    import rouge_chinese

    for one, row in zip(predictions, score_predictions(predictions, args.workers), strict=True):
        sides = [segment(text) for text in (one.scored_text, one.reference)]
        if all(side.strip() for side in sides):  # the package raises on blank texts
            row |= {name: value["f"] for name, value in rouge_chinese.Rouge().get_scores(*sides)[0].items()}
        yield row


def _compare(predictions: PredictionFile, args: Namespace) -> None:
    path = args.output or args.file.with_name("comparison.json")
    others = PredictionFile(args.compare, path.parent)
    numbers = _numbers_of_same_rows(predictions, others, args)
    folder = existing_folder(path.parent)
    columns: list[ScoreColumns] = []
    sides: tuple[Iterable[Prediction], ...] = (predictions, map(others.__getitem__, numbers))
    for side in sides:
        table = ScoreTable(folder)
        for row in score_predictions(side, args.workers):
            table.append(row)
        columns.append(table.columns())
    comparisons = compare_columns(columns[0], columns[1])
    scores = [asdict(comparison) for comparison in comparisons]
    files = {"first": str(args.file), "second": str(args.compare)}
    _write_json(path, {**files, "rows": len(predictions), "scores": scores})
    _show_comparison(comparisons, len(predictions))
    say(f"  {path}")


def _numbers_of_same_rows(predictions: PredictionFile, others: PredictionFile, args: Namespace) -> Sequence[int]:
    """For each prediction, the number of the other one with its id."""
    remedy = "predict with both models on the same files"
    index, numbers = others.index(), array("q")
    missing = ""
    for name in predictions.ids():
        found = index.numbers(name)
        if not found:
            missing = f"{name} is in the first only"
            break
        numbers.append(found[-1])
    ids = index.distinct()
    if missing or ids != len(predictions):
        found_ids = missing or f"{len(predictions)} and {ids} ids"
        raise UserError(f"{args.file} and {args.compare} do not answer the same rows: {found_ids}", remedy)
    for one, number in zip(predictions, numbers, strict=True):
        if one.reference != others[number].reference:
            raise UserError(f"row {one.id} has two references", remedy)
    return numbers


def _show_comparison(comparisons: Sequence[Comparison], rows: int) -> None:
    title = f"Second against first, {counted(rows, 'row')}"
    table = number_table(title, "score", "first", "second", "difference", "95 % interval", "p")
    for score in comparisons:
        if score.name.startswith("reference_") or not (math.isfinite(score.first) and math.isfinite(score.second)):
            continue
        interval = f"{score.low:+,.4f} to {score.high:+,.4f}"
        table.add_row(
            score.name, f"{score.first:,.4f}", f"{score.second:,.4f}", f"{score.second - score.first:+,.4f}", interval,
            f"{score.p_value:.4f}", style="bold" if score.p_value < 0.05 else "",
        )  # fmt: skip
    make_console().print(table)
    say("bold: p below 0.05 by approximate randomization. With many scores, one in twenty is so by chance.")


def _show_scores(scores: Mapping[str, Any]) -> None:
    """Print the scores, the references' values beside those of the predictions; then those of groups side by side."""
    table = number_table("Scores", "score", "value", "95 % interval", "references")
    for name in _shown_names(scores):
        low, high = scores["intervals"].get(name, (math.nan, math.nan))
        interval = f"{low:,.4f} to {high:,.4f}" if math.isfinite(low) else ""
        table.add_row(name, _cell(scores, name), interval, _cell(scores, reference_name(name)))
    make_console().print(table)
    groups = scores.get("groups", {})
    if len(groups) > MAX_GROUPS:
        say(f"scores of {counted(len(groups), 'group')}: see the file")
    elif groups:
        table = number_table(
            "Scores of each group", "score", *(title for group in groups for title in (group, "references"))
        )
        for name in dict.fromkeys(name for of_group in groups.values() for name in _shown_names(of_group)):
            columns = (name, reference_name(name))
            table.add_row(name, *(_cell(of_group, column) for of_group in groups.values() for column in columns))
        make_console().print(table)


def _shown_names(scores: Mapping[str, Any]) -> list[str]:
    """Names of the scores that get a line: numbers, except those of references, which are shown beside."""
    beside = {reference_name(name) for name in scores}
    return [name for name, value in scores.items() if isinstance(value, (int, float)) and name not in beside]


def _cell(scores: Mapping[str, Any], name: str) -> str:
    value = scores.get(name)
    return "" if value is None else f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


if __name__ == "__main__":
    main()
