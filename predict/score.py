"""Scores of a prediction file.

    python -m predict.score FILE.jsonl
    python -m predict.score FILE.jsonl --compare OTHER.jsonl
    python -m predict.score FILE.jsonl --convention llamafactory

FILE: any .jsonl, .json, .csv or .parquet whose rows have `prediction` and `reference`; or `predict` and `label`, as
LLaMA-Factory writes them, or `response` and `labels`, as ms-swift does.
"""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from novelgpt.scoring.conventions import CONVENTIONS
from novelgpt.scoring.row_scores import RowScores, ScoredRow, score_rows
from novelgpt.scoring.segmentation import segment
from novelgpt.scoring.summary import compare_rows, definitions, reference_name, summarise_rows
from novelgpt.settings.atomic_files import atomic_write
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.console import make_console, number_table
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.paths import check_folder_can_be_made
from novelgpt.settings.remedies import pip_install
from novelgpt.settings.terminal import counted, say
from predict.predictions import Prediction, read_predictions

MAX_GROUPS = 4  # side by side in the terminal


def score_predictions(
    predictions: Sequence[Prediction], of_the_model: Mapping[int, RowScores] | None = None, workers: int | None = None
) -> list[RowScores]:
    """Scores of each row: "id" and, if set, "score_group" first; then "stopped" and "cut" where they are known.

    Args:
        predictions: the rows.
        of_the_model: number of a row -> scores of its reference under the model, which are added.
        workers: processes; None for as many as there is work for.
    """
    scored = score_rows(
        (ScoredRow(one.scored_text, one.reference, one.scoring.metrics, one.scoring.answers) for one in predictions),
        workers,
    )
    rows = []
    for number, (one, scores) in enumerate(zip(predictions, scored, strict=True)):
        row: RowScores = {"id": one.id}
        if one.scoring.score_group:
            row["score_group"] = one.scoring.score_group
        row |= scores
        if one.finish_reason is not None:
            row["stopped"] = float(one.finish_reason == "stop")
        if one.scoring.scored_characters is not None:
            row["cut"] = float(one.text != one.scored_text)
        rows.append(row | (of_the_model or {}).get(number, {}))
    return rows


def write_scores(rows: Sequence[RowScores], path: Path, further: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write scores.json (means, intervals, definitions, groups) and row_scores.jsonl beside it, and print the scores.

    Args:
        rows: scores of each row, as `score_predictions` returns them.
        path: of scores.json.
        further: other entries: the model, the settings, the time it took.

    Returns:
        The content of scores.json.
    """
    scores, texts = _overall_scores(rows), definitions()
    intervals = scores.pop("intervals")
    scores |= further or {}
    scores |= {"intervals": intervals, "definitions": {name: texts[name] for name in intervals if name in texts}}
    members: dict[str, list[RowScores]] = {}
    for row in rows:
        if "score_group" in row:
            members.setdefault(row["score_group"], []).append(row)
    names = sorted(members, key=int) if all(map(str.isdecimal, members)) else list(members)
    if members:
        scores["groups"] = {name: _overall_scores(members[name]) for name in names}
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    row_file = path.with_name("row_scores.jsonl") if path.name == "scores.json" else path.with_suffix(".rows.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(row_file, lines)
    _write_json(path, scores)
    _show_scores(scores)
    return scores


def _overall_scores(rows: Sequence[RowScores]) -> dict[str, Any]:
    """Return means and counts of some rows, and the "intervals" of the means."""
    means, intervals = summarise_rows(rows)
    finite: dict[str, Any] = {name: value for name, value in means.items() if math.isfinite(value)}
    counts = {
        "rows": len(rows),
        "rows_without_reference": sum("rouge-1" not in row for row in rows),
        "empty_predictions": sum(row["prediction_characters"] == 0 for row in rows),
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
    predictions = read_predictions(args.file, keep_thoughts=args.convention is not None)
    if args.convention:
        _score_by_convention(predictions, args)
    elif args.compare:
        _compare(predictions, args)
    else:
        rows = score_predictions(predictions, workers=args.workers)
        further = {"scorer": _score_by_package(predictions, rows)} if args.scorer == "rouge_chinese" else {}
        write_scores(rows, args.output or args.file.with_name("scores.json"), further)


def _score_by_convention(predictions: Sequence[Prediction], args: Namespace) -> None:
    convention = CONVENTIONS[args.convention]
    scores = convention([one.scored_text for one in predictions], [one.reference for one in predictions])
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


def _score_by_package(predictions: Sequence[Prediction], rows: list[RowScores]) -> str:
    """Put rouge_chinese's own scores into the rows; returns its name and version."""
    try:
        import rouge_chinese
    except ImportError as error:
        raise UserError("--scorer rouge_chinese needs that package", pip_install("rouge-chinese")) from error
    from importlib.metadata import version

    for one, row in zip(predictions, rows, strict=True):
        sides = [segment(text) for text in (one.scored_text, one.reference)]
        if all(side.strip() for side in sides):  # the package raises on blank texts
            row |= {name: value["f"] for name, value in rouge_chinese.Rouge().get_scores(*sides)[0].items()}
    return f"rouge_chinese {version('rouge-chinese')}"


def _compare(predictions: Sequence[Prediction], args: Namespace) -> None:
    remedy = "predict with both models on the same files"
    others = {one.id: one for one in read_predictions(args.compare)}
    missing = [one.id for one in predictions if one.id not in others]
    if missing or len(others) != len(predictions):
        found = f"{missing[0]} is in the first only" if missing else f"{len(predictions)} and {len(others)} ids"
        raise UserError(f"{args.file} and {args.compare} do not answer the same rows: {found}", remedy)
    paired = [others[one.id] for one in predictions]
    for one, other in zip(predictions, paired, strict=True):
        if one.reference != other.reference:
            raise UserError(f"row {one.id} has two references", remedy)
    first, second = (score_predictions(side, workers=args.workers) for side in (predictions, paired))
    comparisons = compare_rows(first, second)
    path = args.output or args.file.with_name("comparison.json")
    scores = [asdict(comparison) for comparison in comparisons]
    files = {"first": str(args.file), "second": str(args.compare)}
    _write_json(path, {**files, "rows": len(predictions), "scores": scores})
    title = f"Second against first, {counted(len(predictions), 'row')}"
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
    say(f"  {path}")


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
