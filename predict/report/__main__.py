"""A page about one or several runs: scores, pictures, examples.

    python -m predict.report RUN
    python -m predict.report RUN OTHER --output FOLDER

RUN: a folder with predictions.jsonl, row_scores.jsonl and scores.json, a run folder in which `predict` is one, or
another tool's file of predictions that `python -m predict.score` has scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from novelgpt.scoring.row_scores import RowScores
from novelgpt.scoring.summary import Comparison, compare_rows
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.fonts import INSTALL_REMEDY, ChineseFont, find_chinese_font
from novelgpt.settings.terminal import say
from novelgpt.settings.whole_files import write_whole
from predict.report.charts import (
    LABELS,
    PICTURES,
    Named,
    histogram_chart,
    length_chart,
    loss_chart,
    repetition_chart,
    scores_chart,
)
from predict.report.curves import bin_width, means_by_length, repetition_by_position, sample
from predict.report.examples import choose_examples, visible
from predict.report.figures import Chart, Picture, draw_picture
from predict.report.metrics import METRICS, is_number
from predict.report.page import make_page
from predict.report.runs import Run, matched_rows, read_runs

FOLDER = "report"
ROUGE = ("rouge-1", "rouge-2", "rouge-l")
LIKENESS = [name for name, metric in METRICS.items() if metric.group == "overlap" and name != "sacrebleu"]
_OF_REFERENCES = ("reference_nats", "reference_tokens", "reference_tokens_right", "reference_characters")
_LARGEST_EXPONENT = 700.0
_PAIRED = ("distributions", "lengths")


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Write the report that the command line asks for."""
    parser = CommandParser(prog="python -m predict.report", description="A page about one or several runs.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders or folders with predictions")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where to write [default: beside the predictions of the first]"
    )
    words = parser.parse_args(argv)
    runs = read_runs(words.runs)
    folder = words.output or runs[0].folder
    font = find_chinese_font(LABELS)
    page = write_report(runs, folder, font)
    say(f"  report     {page}", f"  pictures   {folder / FOLDER}")
    if font is None:
        say("  No font with Chinese letters was found: labels in the pictures are English only.")
        say(f"  To have them in Chinese, {INSTALL_REMEDY}, and run this again.")


def write_report(runs: Sequence[Run], folder: Path, font: ChineseFont | None) -> Path:
    """Write report.html, and its pictures into `report/` beside it; the same runs and font give the same bytes.

    Args:
        runs: what the page is about.
        folder: made if it is not there.
        font: for Chinese labels in the pictures; None for English ones alone.

    Returns:
        The page's path.

    Raises:
        UserError: the folder cannot be written.
    """
    matches = [matched_rows(runs[0], run) for run in runs]
    pictures = [
        (section, [draw_picture(chart, font) for chart in charts]) for section, charts in _charts(runs, matches)
    ]
    comparisons = [(number, _compare(runs[0], run, matches[number])) for number, run in enumerate(runs) if number]
    text = make_page(runs, comparisons, pictures, choose_examples(runs, matches), font is None)
    page = folder / "report.html"
    try:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        _write_pictures([picture for _, drawn in pictures for picture in drawn], folder / FOLDER)
        write_whole(page, text.encode())
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}", "name an --output that can be written") from error
    return page


def _charts(runs: Sequence[Run], matches: Sequence[Sequence[int] | None]) -> list[tuple[str, list[Chart]]]:
    """(section, its charts), those left out for which there are no numbers."""
    named = [Named(visible(run.name), number, run) for number, run in enumerate(runs)]
    scored = [one for one in named if one.content.scored]
    sections: list[tuple[str, list[Chart | None]]] = [
        ("scores", [_scores(scored)] if scored else []),
        (
            "distributions",
            [
                *(
                    histogram_chart(metric, _values(scored, metric), metric, chinese)
                    for metric, chinese in ((name, METRICS[name].chinese) for name in ROUGE)
                ),
                histogram_chart("perplexity", _perplexities(named), "perplexity", "每条的困惑度", logarithmic=True),
            ],
        ),
        ("lengths", [_length(scored, side) for side in ("reference", "prediction")] if scored else []),
        ("repetition", [_repetition(named, matches)]),
        ("losses", [loss_chart([one._replace(content=one.content.losses) for one in named])]),
    ]
    drawn = [(section, [chart for chart in charts if chart is not None]) for section, charts in sections]
    return [(section, _side_by_side(charts, len(runs)) if section in _PAIRED else charts) for section, charts in drawn]


def _side_by_side(charts: Sequence[Chart], runs: int) -> list[Chart]:
    """Charts of one height, also where a run has nothing to show in one of them; a single one gets the whole width."""
    return [replace(chart, legend_rows=runs, full=len(charts) == 1) for chart in charts]


def _scores(runs: Sequence[Named]) -> Chart:
    def intervals(run: Run) -> dict[str, tuple[float, float, float]]:
        found = {name: run.scores[name] for name in LIKENESS if is_number(run.scores.get(name))}
        ends = run.scores.get("intervals", {})
        return {name: (value, *ends.get(name, (value, value))) for name, value in found.items()}

    contents = [one._replace(content=intervals(one.content)) for one in runs]
    return scores_chart([name for name in LIKENESS if any(name in one.content for one in contents)], contents)


def _values(runs: Sequence[Named], metric: str) -> list[Named]:
    return [one._replace(content=one.content.values(metric)) for one in runs]


def _perplexities(runs: Sequence[Named]) -> list[Named]:
    found = [
        one._replace(content=[math.exp(min(loss, _LARGEST_EXPONENT)) for loss in one.content.values("loss")])
        for one in runs
    ]
    return [one for one in found if one.content]


def _length(runs: Sequence[Named], side: str) -> Chart | None:
    contents = []
    for one in runs:
        rows = [one.content.rows[number] for number in one.content.scored]
        lengths, values = [row[f"{side}_characters"] for row in rows], [row["rouge-l"] for row in rows]
        contents.append(one._replace(content=(lengths, values, means_by_length(lengths, values))))
    return length_chart("rouge-l", contents, side)


def _repetition(runs: Sequence[Named], matches: Sequence[Sequence[int] | None]) -> Chart | None:
    lengths = [length for one in runs for length in one.content.values("prediction_characters")]
    lengths += runs[0].content.values("reference_characters")
    width = bin_width(lengths)
    curves = []
    read = ("", "")
    for one in runs:
        numbers = sample(one.content.values("prediction_characters"))
        if len(numbers) < len(one.content.rows):
            read = f" Of many rows, {len(numbers):,} at even distances were read.", f"等间隔抽取 {len(numbers):,} 行。"
        texts = (entry["prediction"] for entry in one.content.texts(numbers))
        curves.append(one._replace(content=repetition_by_position(texts, width)))
    first: Run = runs[0].content
    numbers = [first.scored[place] for place in sample(first.values("reference_characters"))]
    human = repetition_by_position((entry["reference"] for entry in first.texts(numbers)), width) if numbers else None
    if not any(len(one.content.places) for one in curves):
        return None
    return repetition_chart(curves, human, width, read)


def _compare(first: Run, other: Run, match: Sequence[int] | None) -> list[Comparison] | None:
    if match is None:
        return None
    return compare_rows([_own(row) for row in first.rows], [_own(other.rows[number]) for number in match])


def _own(row: RowScores) -> RowScores:
    """The scores of the prediction, and what those of the whole are made of; what the references have is the same."""
    return {name: value for name, value in row.items() if name in _OF_REFERENCES or not name.startswith("reference_")}


def _write_pictures(pictures: Sequence[Picture], folder: Path) -> None:
    """Write the PNG files, and remove those that an earlier report had and this one has not."""
    for picture in pictures:
        write_whole(folder / f"{picture.chart.name}.png", picture.png)
    for name in set(PICTURES) - {picture.chart.name for picture in pictures}:
        (folder / f"{name}.png").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
